"""Counts of right and wrong, and the accuracies that follow from them.

    matrix = confusion_matrix(labels, logits.argmax(axis=1), num_classes=10)
    accuracy(matrix)            # 0.701
    per_class_accuracy(matrix)  # [10], one a class

A confusion matrix is a table of sums: the matrices of two parts of a data set, added, are the
matrix of the whole.  So batches of any size can be counted one by one.  NumPy only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarflow.errors import DataError, check_int


def confusion_matrix(
    labels: ArrayLike, predictions: ArrayLike, *, num_classes: int
) -> NDArray[np.int64]:
    """Counts how often each class was taken for each class.

    Args:
      labels: [N] integers, 0..num_classes - 1: the true classes.  N may be 0.
      predictions: [N] integers, 0..num_classes - 1: the classes predicted.
      num_classes: number of classes, C.

    Returns:
      [C, C] int64; entry [t, p] is the number of examples of class t predicted as class p.

    Raises:
      ConfigError: if `num_classes` is not a whole number >= 1.
      DataError: if an argument is not one-dimensional, not of integers, or out of range, or if
        the two differ in length.
    """
    num_classes = check_int("num_classes", num_classes)
    true = _class_indices("labels", labels, num_classes)
    predicted = _class_indices("predictions", predictions, num_classes)
    if len(true) != len(predicted):
        raise DataError(
            f"labels and predictions must be equally many, not {len(true)} and {len(predicted)}"
        )
    # Each (true, predicted) pair is one cell of the flattened matrix.
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.int64)


def per_class_accuracy(matrix: ArrayLike) -> NDArray[np.float64]:
    """The share of each true class that was predicted right (its recall).

    Args:
      matrix: [C, C] counts; rows true, columns predicted.

    Returns:
      [C] float64, 0..1.  A class without examples has no accuracy: its entry is NaN (0 would
      claim that the model fails on it), so average with `numpy.nanmean`.

    Raises:
      DataError: if `matrix` is not a square table of counts.
    """
    counts = check_matrix(matrix)
    totals = counts.sum(axis=1)
    shares = np.full(len(counts), np.nan)
    np.divide(np.diagonal(counts), totals, out=shares, where=totals > 0)
    return shares


def accuracy(matrix: ArrayLike) -> float:
    """The share of all examples that was predicted right.

    Args:
      matrix: [C, C] counts; rows true, columns predicted.

    Returns:
      0..1, or NaN for a matrix that counts no example.

    Raises:
      DataError: if `matrix` is not a square table of counts.
    """
    counts = check_matrix(matrix)
    total = int(counts.sum())
    return int(np.trace(counts)) / total if total else math.nan


def check_matrix(matrix: ArrayLike) -> NDArray[np.int64]:
    """Returns `matrix` as [C, C] int64 counts.

    Raises:
      DataError: if it is not square, has no class, or holds anything but whole numbers >= 0.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise DataError(f"a confusion matrix must be of shape [C, C], not {list(counts.shape)}")
    if not np.issubdtype(counts.dtype, np.integer):
        raise DataError(f"a confusion matrix must hold whole numbers, not {counts.dtype}")
    if counts.min() < 0:
        raise DataError(f"a confusion matrix must hold counts >= 0, not {counts.min()}")
    return counts.astype(np.int64)


def _class_indices(name: str, values: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    indices = np.asarray(values)
    if indices.ndim != 1:
        raise DataError(f"{name} must be of shape [N], not {list(indices.shape)}")
    # An empty list comes as float64; there is nothing in it to be of a wrong type.
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise DataError(f"{name} must be integers, not {indices.dtype}")
    if indices.size and (indices.min() < 0 or indices.max() >= num_classes):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise DataError(f"{name} must be in 0..{num_classes - 1}, not {wrong}")
    return indices.astype(np.int64)
