"""Measures of a trained model: counts a class, accuracies, predictions."""
