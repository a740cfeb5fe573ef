"""Loss, accuracy and confusion matrix of any model, on any labelled images.

    found = evaluate_model(model, data.test)        # a `Split`, or (images, labels)
    print(found.accuracy, found.loss, found.confusion_matrix)

The model may be anybody's, as long as it takes pixels of 0..255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.metrics import accuracy, confusion_matrix
from cifarflow.evaluation.predict import are_probabilities, predict, softmax


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model comes to on some images.

    Attributes:
      loss: mean cross entropy of the labels, in nats; no regularisation is added.
      accuracy: the share that was predicted right, 0..1.
      confusion_matrix: [C, C] int64 counts; rows true, columns predicted.
      probabilities: [N, C] float32.
    """

    loss: float
    accuracy: float
    confusion_matrix: np.ndarray
    probabilities: np.ndarray


def evaluate_model(
    model: Any,
    examples: Iterable[np.ndarray],
    *,
    num_classes: int | None = None,
    batch_size: int = 500,
    tta: str = "none",
    tta_share: float = 1.0,
) -> Evaluation:
    """Evaluates a model on labelled images.

    A model that ends in a softmax and one that ends in logits both do: what its outputs are is seen
    from them.  Pixels are given as they are; one that wants them scaled must do that itself.

    Args:
      model: a Keras model: images [B, H, W, C], 0..255 -> outputs [B, C].
      examples: images [N, H, W, C] uint8, N >= 1, and labels [N] integers; a `Split` is such.
      num_classes: how many classes the data has, which the model must have too; None only asks
        that it has the labels.
      batch_size: images a call; changes time and memory only.
      tta: test-time augmentation, see `predict`.
      tta_share: the share of the images that it is spent on, see there.

    Raises:
      ConfigError: if an option is out of range, or the model has another number of classes.
      DataError: if the images are of another shape than the model takes, or are not images and
        labels.
    """
    try:
        images, labels = (np.asarray(part) for part in examples)
    except (TypeError, ValueError):
        raise DataError(
            f"examples must be images and labels, not {type(examples).__name__}"
        ) from None
    if images.ndim and labels.shape != images.shape[:1]:
        raise DataError(
            f"images and labels must be equally many, not {list(images.shape)} and "
            f"{list(labels.shape)}"
        )
    outputs = predict(model, images, batch_size=batch_size, tta=tta, tta_share=tta_share)
    if outputs.ndim != 2:
        raise ConfigError(
            f"model must give [B, classes] for images [B, H, W, C], not {list(outputs.shape)}"
        )
    classes = outputs.shape[1]
    if num_classes is not None and classes != num_classes:
        raise ConfigError(f"model must have the data's {num_classes} classes, not {classes}")
    if labels.size and labels.max() >= classes:
        raise ConfigError(
            f"model must have the data's classes, the label {labels.max()} among them, "
            f"not {classes}"
        )
    matrix = confusion_matrix(labels, outputs.argmax(-1), num_classes=classes)
    rows = np.arange(len(labels))
    if are_probabilities(outputs):
        probabilities = outputs
        # The smallest number that float32 has with all its digits, for a probability of 0.
        chosen = np.maximum(probabilities[rows, labels].astype(np.float64), 2.0**-126)
        losses = -np.log(chosen)
    else:
        probabilities = softmax(outputs)
        # From the logits, in 64 bits: small probabilities would be 0 by now.
        shifted = outputs.astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(-1)) - shifted[rows, labels]
    return Evaluation(float(losses.mean()), accuracy(matrix), matrix, probabilities)
