"""A model's outputs for many images.

    outputs = predict(model, images)                # [N, num_classes] float32
    probabilities = softmax(outputs)

The outputs are whatever the model ends in: logits, for the builders of this library.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.errors import DataError, check_int


def predict(model: Any, images: np.ndarray, *, batch_size: int = 500) -> np.ndarray:
    """Runs a model in inference mode over an array of images.

    Args:
      model: a Keras model: images [B, H, W, C] -> outputs [B, num_classes].
      images: [N, H, W, C] uint8, 0..255, N >= 1.
      batch_size: images a call; changes time and memory only.

    Returns:
      Outputs [N, num_classes] float32: logits, or whatever the model ends in.

    Raises:
      ConfigError: if batch_size is not a whole number >= 1.
      DataError: if the images are not of the shape and dtype that the model takes.
    """
    check_int("batch_size", batch_size)
    images = np.asarray(images)
    # None is any size, and a subclassed model does not know its input's shape.
    shape = getattr(model, "input_shape", None) or (None,) * 4
    fits = images.ndim == len(shape) == 4 and all(
        side in (None, size) for side, size in zip(shape[1:], images.shape[1:], strict=True)
    )
    if images.dtype != np.uint8 or not fits:
        wanted = ", ".join("any" if side is None else str(side) for side in shape[1:])
        raise DataError(
            f"images must be [N, {wanted}] uint8 for this model, "
            f"not {list(images.shape)} {images.dtype}"
        )
    if not len(images):
        raise DataError("images must hold at least one image, not 0")

    def forward(batch: Any) -> Any:
        return tf.cast(model(batch, training=False), tf.float32)

    # Traced once for batches of any size, the last smaller one too.
    spec = tf.TensorSpec([None, *images.shape[1:]], tf.uint8)
    forward = tf.function(forward).get_concrete_function(spec)
    batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
    return np.concatenate([forward(tf.constant(batch)).numpy() for batch in batches])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turns logits [N, C] into probabilities [N, C] float32."""
    # Integers would wrap around below their smallest.
    logits = np.asarray(logits, np.float64)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
