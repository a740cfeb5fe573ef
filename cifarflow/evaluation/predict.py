"""A model's outputs for many images, of one view of each or averaged over several.

    outputs = predict(model, images)                # [N, num_classes] float32
    outputs = predict(model, images, tta="mirror")  # of each image and its mirror image
    probabilities = softmax(outputs)

    predictor = Predictor(model, tta="mirror")      # the same, traced once for many calls
    outputs = predictor(images)

The outputs are whatever the model ends in: logits, for the builders of this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from cifarflow.errors import ConfigError, DataError, check_choice, check_float, check_int
from cifarflow.models.fusion import fuse
from cifarflow.models.layers import check_image_shape
from cifarflow.models.registry import released_gradients


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
    jit_compile: bool = False,
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
      jit_compile: whether XLA compiles the model, which it then does for each size of batch; it
        saves a GPU the launches of many kernels.

    Returns:
      Outputs [N, num_classes] float32: logits, or whatever the model ends in.

    Raises:
      ConfigError: if batch_size is not a whole number >= 1, tta not known, tta_share out of range,
        or jit_compile neither True nor False.
      DataError: if the images are not of the shape and dtype that the model takes, or too small
        to shift.

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), which pads and
      averages in the same way; the share of the least confident is of Hiverge's cifar10-speedrun
      (2025), 1/4 there.
    """
    predictor = Predictor(
        model, batch_size=batch_size, tta=tta, tta_share=tta_share, jit_compile=jit_compile
    )
    return predictor(images)


class Predictor:
    """`predict` for one model and many calls: traced once for each shape of image.

    Each call takes the weights that the model has by then.  A model whose layers have changed needs
    a new one.

    Args:
      model: as `predict` takes it, and so are the others.
      batch_size: images a call of the model.
      tta: test-time augmentation.
      tta_share: which share of the images gets all views.
      jit_compile: whether XLA compiles the model.

    Raises:
      ConfigError: as `predict`.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int = 500,
        tta: str = "none",
        tta_share: float = 1.0,
        jit_compile: bool = False,
    ) -> None:
        self._model = model
        self._batch_size = check_int("batch_size", batch_size)
        self._tta = check_choice("tta", tta, _VIEWS)
        self._share = check_float("tta_share", tta_share, maximum=1.0, above_minimum=True)
        if not isinstance(jit_compile, bool):
            raise ConfigError(f"jit_compile must be True or False, not {jit_compile!r}")
        self._jit_compile = jit_compile
        # By the images' (H, W, C).
        self._forwards: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Returns the outputs for images, as `predict` does.

        Args:
          images: [N, H, W, C] uint8, 0..255, N >= 1.

        Returns:
          Outputs [N, num_classes] float32.

        Raises:
          DataError: as `predict`.
        """
        return self.plain_and_mean(images)[1]

    def plain_and_mean(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the outputs for images both without and with test-time augmentation.

        It takes no longer than a call, which needs the first for the second.

        Args:
          images: [N, H, W, C] uint8, 0..255, N >= 1.

        Returns:
          Outputs [N, num_classes] float32 of the images as they are, and means over their views;
          with tta="none" the two are equal.

        Raises:
          DataError: as `predict`.
        """
        images = np.asarray(images)
        self._check_images(images)
        first, *others = _VIEWS[self._tta]
        plain = self._outputs_of(images, first)
        outputs = plain.copy()
        if others:
            chosen: Any = slice(None)
            if self._share < 1:
                count = self._count_unsure(len(images))
                chosen = np.argsort(_confidence(outputs), kind="stable")[:count]
            unsure = images[chosen]
            mean = first.weight * outputs[chosen]
            for view in others:
                mean += view.weight * self._outputs_of(unsure, view)
            outputs[chosen] = mean
        return plain, outputs

    def compile(self, image_shape: tuple[int, int, int], *, num_images: int) -> None:
        """Does, once and without any images, what the first call takes longer for.

        It traces the model and runs each size of batch that the call will have over black images,
        since kernels choose their way of working, and XLA compiles, at a size's first use.

        Args:
          image_shape: (H, W, C) of the images to come.
          num_images: how many a call will have.

        Raises:
          ConfigError: if num_images is not a whole number >= 1.
          DataError: if image_shape is not three sizes, or not what the model and tta take.
        """
        shape = check_image_shape(image_shape)
        counts = {check_int("num_images", num_images)}
        if len(_VIEWS[self._tta]) > 1:
            counts.add(self._count_unsure(num_images))
        # The last batch may be smaller.
        sizes = {size for n in counts for size in (min(n, self._batch_size), n % self._batch_size)}
        images = np.zeros((max(sizes), *shape), np.uint8)
        self._check_images(images)
        for size in sorted(sizes - {0}):
            self._outputs_of(images[:size], _VIEWS[self._tta][0])

    def _check_images(self, images: np.ndarray) -> None:
        # None is any size, and a subclassed model does not know its input's shape.
        shape = getattr(self._model, "input_shape", None) or (None,) * 4
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
        if self._tta == "multicrop" and min(images.shape[1:3]) < 2:
            raise DataError(
                f"images must be 2 pixels or more in height and width for tta={self._tta!r}, "
                f"not {list(images.shape)}"
            )

    def _count_unsure(self, num_images: int) -> int:
        """How many of so many images get all views."""
        return max(1, round(self._share * num_images))

    def _outputs_of(self, images: np.ndarray, view: _View) -> np.ndarray:
        """Outputs [N, num_classes] of one view of each image."""
        shape = images.shape[1:]
        if shape not in self._forwards:
            shifts = self._tta == "multicrop"
            self._forwards[shape] = _make_forward(
                self._model, shape, shifts=shifts, jit_compile=self._jit_compile
            )
        forward, size = self._forwards[shape], self._batch_size
        batches = (images[i : i + size] for i in range(0, len(images), size))
        where = [tf.constant(value) for value in view[1:]]
        # Read all at once in the end: a GPU works on while the next batch is on its way to it.
        outputs = [forward(tf.constant(batch), *where) for batch in batches]
        return np.array(tf.concat(outputs, 0))


def _make_forward(
    model: Any, shape: tuple[int, ...], *, shifts: bool, jit_compile: bool
) -> Callable[..., Any]:
    """Compiles the model's outputs for a view of a batch, traced once for all views and sizes."""
    infer = fuse(model, training=False)

    def forward(batch: Any, row: Any, column: Any, mirrored: Any) -> Any:
        if shifts:
            around = tf.pad(batch, [[0, 0], [1, 1], [1, 1], [0, 0]], "REFLECT")
            # Not around[:, row : row + height]: XLA would compile anew for each place of a slice.
            rows = tf.gather(around, row + tf.range(shape[0]), axis=1)
            batch = tf.gather(rows, column + tf.range(shape[1]), axis=2)
        batch = tf.where(mirrored, batch[:, :, ::-1], batch)
        with released_gradients():
            return tf.cast(infer(batch), tf.float32)

    # A batch of any size: the last one may be smaller.
    return tf.function(forward, jit_compile=jit_compile).get_concrete_function(
        tf.TensorSpec([None, *shape], tf.uint8),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.bool),
    )


def _confidence(outputs: np.ndarray) -> np.ndarray:
    """The largest probability [N] of each image."""
    # A model may end in probabilities, and the softmax of these has another order.
    probabilities = outputs if are_probabilities(outputs) else softmax(outputs)
    return np.asarray(probabilities.max(axis=-1))


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether outputs [N, C] are probabilities, as those of a model that ends in a softmax."""
    return bool(np.all(outputs >= 0) and np.allclose(outputs.sum(axis=-1), 1, atol=0.01))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turns logits [N, C] into probabilities [N, C] float32."""
    # Integers would wrap around below their smallest.
    logits = np.asarray(logits, np.float64)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)
