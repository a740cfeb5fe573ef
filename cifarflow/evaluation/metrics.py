"""Counts of right and wrong, and the accuracies that follow from them.

    matrix = confusion_matrix(labels, logits.argmax(axis=1), num_classes=10)
    accuracy(matrix)                       # 0.701
    per_class_accuracy(matrix)             # [10], one a class
    class_scores(matrix).precision         # [10], as are .recall and .f1
    top_k_accuracy(labels, logits, k=5)    # 0.973

A confusion matrix is a table of sums: the matrices of two parts of a data set, added, are the
matrix of the whole.  So batches of any size can be counted one by one.  NumPy only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarflow.errors import ConfigError, DataError, check_int


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
    true = check_classes("labels", labels, num_classes=num_classes)
    predicted = check_classes("predictions", predictions, num_classes=num_classes)
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
    return class_scores(matrix).recall


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


class ClassScores(NamedTuple):
    """How well each class is told from the others; NaN where there is nothing to divide by.

    Attributes:
      precision: [C] float64, 0..1: the share of what was predicted as the class that is of it.
      recall: [C] float64, 0..1: the share of the class that was predicted as it.
      f1: [C] float64, 0..1: the harmonic mean of the two, 2 * hits / (predicted + true).
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]


def class_scores(matrix: ArrayLike) -> ClassScores:
    """Precision, recall and F1 of each class.

    Args:
      matrix: [C, C] counts; rows true, columns predicted.

    Returns:
      The `ClassScores`.  A class that was never predicted has no precision, one without examples no
      recall, and one of neither no F1: these entries are NaN.

    Raises:
      DataError: if `matrix` is not a square table of counts.
    """
    counts = check_matrix(matrix)
    hits, true, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)

    def shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.divide(part, whole, out=np.full(len(counts), np.nan), where=whole > 0)

    return ClassScores(
        shares(hits, predicted), shares(hits, true), shares(2 * hits, true + predicted)
    )


def top_k_accuracy(labels: ArrayLike, outputs: ArrayLike, *, k: int) -> float:
    """The share of all examples whose class is among the k with the largest outputs.

    Of equal outputs the lower class comes first, as it does for `argmax`: with k=1 this is
    `accuracy`.

    Args:
      labels: [N] integers, 0..C - 1.
      outputs: [N, C] finite numbers: logits or probabilities.
      k: whole number, 1..C.

    Returns:
      0..1, or NaN for no examples.

    Raises:
      ConfigError: if k is out of range.
      DataError: if an argument has another shape, or a value out of range.
    """
    scores = check_outputs(outputs)
    num_classes = scores.shape[1]
    if check_int("k", k) > num_classes:
        raise ConfigError(f"k must be at most the {num_classes} classes, not {k!r}")
    true = check_classes("labels", labels, num_classes=num_classes, count=len(scores))
    if not len(true):
        return math.nan
    own = scores[np.arange(len(true)), true][:, None]
    is_before = (scores > own) | ((scores == own) & (np.arange(num_classes)[None] < true[:, None]))
    return float((is_before.sum(axis=1) < k).mean())


def check_outputs(outputs: ArrayLike, *, name: str = "outputs") -> NDArray[np.float64]:
    """Returns `outputs` as [N, C] float64.

    Raises:
      DataError: if they have another shape, no class, or hold anything but finite numbers.
    """
    values = np.asarray(outputs)
    if values.ndim != 2 or not values.shape[1]:
        raise DataError(f"{name} must be of shape [N, C], not {list(values.shape)}")
    if values.dtype.kind not in "fiu":
        raise DataError(f"{name} must be numbers, not {values.dtype}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        wrong = values[~np.isfinite(values)][0]
        raise DataError(f"{name} must be finite, not {wrong}")
    return values


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


def check_classes(
    name: str, values: ArrayLike, *, num_classes: int, count: int | None = None
) -> NDArray[np.int64]:
    """Returns `values` as [N] int64 classes.

    Args:
      name: what they are called, for messages.
      values: [N] integers, 0..num_classes - 1; N may be 0.
      num_classes: how many classes there are.
      count: what N must be; None for any.

    Raises:
      DataError: if they are not that.
    """
    indices = np.asarray(values)
    if indices.ndim != 1:
        raise DataError(f"{name} must be of shape [N], not {list(indices.shape)}")
    if count is not None and len(indices) != count:
        raise DataError(f"{name} must be {count}, one an example, not {len(indices)}")
    # An empty list comes as float64; there is nothing in it to be of a wrong type.
    if indices.size and not np.issubdtype(indices.dtype, np.integer):
        raise DataError(f"{name} must be integers, not {indices.dtype}")
    if indices.size and (indices.min() < 0 or indices.max() >= num_classes):
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise DataError(f"{name} must be in 0..{num_classes - 1}, not {wrong}")
    return indices.astype(np.int64)
