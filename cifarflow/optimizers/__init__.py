"""The optimiser, its learning-rate schedules, and the choice of precision."""
