"""The scores of a model's outputs for a test set, as a run's summary keeps them.

    summary["scores"] = score_outputs(labels, outputs)

None stands where a score is not defined, since JSON has no NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from cifarflow.evaluation.confidence import calibration
from cifarflow.evaluation.metrics import (
    check_outputs,
    class_scores,
    confusion_matrix,
    top_k_accuracy,
)
from cifarflow.evaluation.predict import softmax

TOP_K = (2, 3, 5)


def score_outputs(labels: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """All that the labels and a model's outputs say beside its accuracy.

    Args:
      labels: [N] integers, 0..C - 1: the true classes.
      outputs: [N, C] logits.

    Returns:
      JSON values: "top_K_accuracy" for each K of `TOP_K` below C, "expected_calibration_error",
      "calibration_bins" as [mean confidence, accuracy, count] each, and of each class "precision",
      "recall" and "f1".

    Raises:
      DataError: if an argument has another shape, or a value out of range.
    """
    num_classes = check_outputs(outputs).shape[1]
    found = calibration(labels, softmax(outputs))
    matrix = confusion_matrix(labels, outputs.argmax(-1), num_classes=num_classes)
    return {
        **{
            f"top_{k}_accuracy": _number(top_k_accuracy(labels, outputs, k=k))
            for k in TOP_K
            if k < num_classes
        },
        "expected_calibration_error": _number(found.error),
        "calibration_bins": [
            [*_numbers((part.confidence, part.accuracy)), part.examples] for part in found.bins
        ],
        **{name: _numbers(values) for name, values in class_scores(matrix)._asdict().items()},
    }


def _numbers(values: Iterable[float | None]) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(float(value), 6)
