"""The compiled step, the loop around it, and what happens at its events."""
