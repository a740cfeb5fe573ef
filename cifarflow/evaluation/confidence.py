"""How sure a model is of its predictions, whether it should be, and where it is most wrong.

    found = calibration(labels, softmax(outputs))
    found.error                                   # 0.043: its confidence is off by 4 % on average
    found.bins                                    # for a reliability diagram

    worst = worst_mistakes(labels, softmax(outputs), count=24)
    images[worst.indices]                         # the most confident mistake first

The confidence of a prediction is the probability of the class predicted.  NumPy only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarflow.errors import DataError, check_int
from cifarflow.evaluation.metrics import check_classes, check_outputs

# Half precision leaves sums of rows some thousandths off 1.
_SUM_TOLERANCE = 0.02


class CalibrationBin(NamedTuple):
    """The predictions whose confidence is within one of equal parts of 0..1.

    Attributes:
      confidence: their mean confidence; None if there are none.
      accuracy: the share of them that is right; None if there are none.
      examples: how many they are.
    """

    confidence: float | None
    accuracy: float | None
    examples: int


class Calibration(NamedTuple):
    """How far confidence and accuracy are apart.

    Attributes:
      error: the expected calibration error, 0..1; NaN for no examples.
      bins: from the least confidence to the most, of equal width.
    """

    error: float
    bins: tuple[CalibrationBin, ...]


def calibration(labels: ArrayLike, probabilities: ArrayLike, *, bins: int = 15) -> Calibration:
    """The expected calibration error, and the bins of a reliability diagram.

    Bin m of M holds the n_m of n predictions with a confidence above (m - 1) / M and up to m / M::

        error = sum over m of n_m / n * |accuracy_m - confidence_m|

    Args:
      labels: [N] integers, 0..C - 1: the true classes.
      probabilities: [N, C], 0..1, each row adding up to 1 (softmax, not logits).
      bins: how many, M, >= 1.

    Returns:
      The `Calibration`.

    Raises:
      ConfigError: if bins is not a whole number >= 1.
      DataError: if an argument has another shape, or a value out of range.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), which has 15 bins.
    """
    bins = check_int("bins", bins)
    chances = check_probabilities(probabilities)
    true = check_classes("labels", labels, num_classes=chances.shape[1], count=len(chances))
    confidence = chances.max(axis=1)
    right = chances.argmax(axis=1) == true
    # The edges as they are written above, so that 0.2 of 15 bins is the upper edge of the third.
    edges = np.arange(1, bins) / bins
    place = np.searchsorted(edges, confidence, side="left")
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, weights=confidence, minlength=bins)
    hits = np.bincount(place, weights=right, minlength=bins)
    error = float(np.abs(hits - sums).sum() / len(true)) if len(true) else math.nan
    return Calibration(
        error,
        tuple(
            CalibrationBin(float(total / count), float(hit / count), int(count))
            if count
            else CalibrationBin(None, None, 0)
            for total, hit, count in zip(sums, hits, counts, strict=True)
        ),
    )


class Mistakes(NamedTuple):
    """Predictions that are wrong, the most confident first.

    Attributes:
      indices: [K] int32, the examples' places.
      labels: [K] int32, their true classes.
      predicted: [K] int32, the classes predicted.
      probabilities: [K, C] float32, of every class.
    """

    indices: NDArray[np.int32]
    labels: NDArray[np.int32]
    predicted: NDArray[np.int32]
    probabilities: NDArray[np.float32]


def worst_mistakes(labels: ArrayLike, probabilities: ArrayLike, *, count: int = 24) -> Mistakes:
    """The wrong predictions that the model is most confident of.

    Args:
      labels: [N] integers, 0..C - 1: the true classes.
      probabilities: [N, C], 0..1, each row adding up to 1 (softmax, not logits).
      count: how many at most, >= 1.

    Returns:
      The `Mistakes`, as many as there are up to `count`; of equal confidence the first comes first.

    Raises:
      ConfigError: if count is not a whole number >= 1.
      DataError: if an argument has another shape, or a value out of range.
    """
    count = check_int("count", count)
    chances = check_probabilities(probabilities)
    true = check_classes("labels", labels, num_classes=chances.shape[1], count=len(chances))
    predicted = chances.argmax(axis=1)
    wrong = np.flatnonzero(predicted != true)
    order = np.argsort(-chances[wrong].max(axis=1), kind="stable")
    chosen = wrong[order[:count]]
    return Mistakes(
        chosen.astype(np.int32),
        true[chosen].astype(np.int32),
        predicted[chosen].astype(np.int32),
        chances[chosen].astype(np.float32),
    )


def check_probabilities(probabilities: ArrayLike) -> NDArray[np.float64]:
    """Returns `probabilities` as [N, C] float64.

    Raises:
      DataError: if they have another shape, one is not in 0..1, or a row does not add up to 1.
    """
    chances = check_outputs(probabilities, name="probabilities")
    if not len(chances):
        return chances
    sums = chances.sum(axis=1)
    if chances.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
        raise DataError(
            "each row of probabilities must be >= 0 and add up to 1 (apply softmax to logits), "
            f"not {chances.min():g}..{chances.max():g} with sums {sums.min():g}..{sums.max():g}"
        )
    # A bin ends at 1, and half precision may have left a little more.
    return np.minimum(chances, 1.0)
