"""A model's outputs for many images, of one view of each or averaged over several.

    outputs = predict(model, images)                # [N, num_classes] float32
    outputs = predict(model, images, tta="mirror")  # of each image and its mirror image
    probabilities = softmax(outputs)

The outputs are whatever the model ends in: logits, for the builders of this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from cifarflow.errors import DataError, check_choice, check_float, check_int
from cifarflow.models.fusion import fuse


class _View(NamedTuple):
    """One view of an image and its weight in the mean.

    Attributes:
      row, column: where to crop from the image with one pixel reflected around it; (1, 1) is the
        image as it was.
      mirrored: whether left and right change places.
    """

    weight: float
    row: int
    column: int
    mirrored: bool


# The first is always the image itself: by its outputs the images for the other views are chosen.
_VIEWS = {
    "none": [_View(1, 1, 1, False)],
    "mirror": [_View(1 / 2, 1, 1, mirrored) for mirrored in (False, True)],
    "multicrop": [
        _View(weight, corner, corner, mirrored)
        for weight, corner in ((1 / 4, 1), (1 / 8, 0), (1 / 8, 2))
        for mirrored in (False, True)
    ],
}


def predict(
    model: Any,
    images: np.ndarray,
    *,
    batch_size: int = 500,
    tta: str = "none",
    tta_share: float = 1.0,
) -> np.ndarray:
    """Runs a model in inference mode over an array of images, with test-time augmentation or not.

    With `tta` the outputs are means over views of the image:

    - "mirror", 2 views: of the image and its mirror image.
    - "multicrop", 6 views: half of it as "mirror", the other half the same over two shifts by one
      pixel along a diagonal, (-1, -1) and (1, 1), where the image's edge is reflected.

    Args:
      model: a Keras model: images [B, H, W, C] -> outputs [B, num_classes].
      images: [N, H, W, C] uint8, 0..255, N >= 1.
      batch_size: images a call; changes time and memory only.
      tta: test-time augmentation: "none", "mirror" or "multicrop".
      tta_share: which share of the images gets all views, above 0 and at most 1; rounded to whole
        images, at least one.  These are the images of least confidence, which is the largest
        probability after the plain view; of equals the first.  The others keep the plain view's
        outputs, and so do all of them without `tta`.

    Returns:
      Outputs [N, num_classes] float32: logits, or whatever the model ends in.

    Raises:
      ConfigError: if batch_size is not a whole number >= 1, tta not known, or tta_share out of
        range.
      DataError: if the images are not of the shape and dtype that the model takes, or too small
        to shift.

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), which pads and
      averages in the same way; the share of the least confident is of Hiverge's cifar10-speedrun
      (2025), 1/4 there.
    """
    check_int("batch_size", batch_size)
    views = _VIEWS[check_choice("tta", tta, _VIEWS)]
    share = check_float("tta_share", tta_share, maximum=1.0, above_minimum=True)
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
    if tta == "multicrop" and min(images.shape[1:3]) < 2:
        raise DataError(
            f"images must be 2 pixels or more in height and width for tta={tta!r}, "
            f"not {list(images.shape)}"
        )

    forward = _make_forward(model, images.shape[1:], shifts=tta == "multicrop")

    def outputs_of(images: np.ndarray, view: _View) -> np.ndarray:
        batches = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        where = [tf.constant(value) for value in view[1:]]
        return np.concatenate([forward(tf.constant(batch), *where).numpy() for batch in batches])

    plain, *others = views
    outputs = outputs_of(images, plain)
    if others:
        chosen: Any = slice(None)
        if share < 1:
            count = max(1, round(share * len(images)))
            chosen = np.argsort(_confidence(outputs), kind="stable")[:count]
        unsure = images[chosen]
        mean = plain.weight * outputs[chosen]
        for view in others:
            mean += view.weight * outputs_of(unsure, view)
        outputs[chosen] = mean
    return outputs


def _make_forward(model: Any, shape: tuple[int, ...], *, shifts: bool) -> Callable[..., Any]:
    """Compiles the model's outputs for a view of a batch, traced once for all views and sizes."""
    height, width, _ = shape
    infer = fuse(model, training=False)

    def forward(batch: Any, row: Any, column: Any, mirrored: Any) -> Any:
        if shifts:
            around = tf.pad(batch, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT")
            batch = around[:, row : row + height, column : column + width]
            batch = tf.ensure_shape(batch, [None, *shape])
        batch = tf.where(mirrored, batch[:, :, ::-1], batch)
        return tf.cast(infer(batch), tf.float32)

    # A batch of any size: the last one may be smaller.
    return tf.function(forward).get_concrete_function(
        tf.TensorSpec([None, *shape], tf.uint8),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.bool),
    )


def _confidence(outputs: np.ndarray) -> np.ndarray:
    """The largest probability [N] of each image."""
    # A model may end in probabilities, and the softmax of these has another order.
    are_probabilities = np.all(outputs >= 0) and np.allclose(outputs.sum(axis=-1), 1, atol=0.01)
    probabilities = outputs if are_probabilities else softmax(outputs)
    return np.asarray(probabilities.max(axis=-1))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turns logits [N, C] into probabilities [N, C] float32."""
    # Integers would wrap around below their smallest.
    logits = np.asarray(logits, np.float64)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
