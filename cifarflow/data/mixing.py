"""MixUp and CutMix: two images in one, and labels that say how much of each.

    images, labels = mixup(images, labels, seed, num_classes=10, alpha=0.2)
    images, labels = cutmix(images, labels, seed, num_classes=10, alpha=1.0)

Each image is mixed with the one before it in the batch, whose order is random already, the first
with the last.  How much of it is left is drawn for each image by itself, from Beta(alpha, alpha),
as a whole number of 4096ths: so labels, which add up to 1, are the same bits on every device.

Accuracy over such labels counts the outputs that are largest at an image's larger part.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from cifarflow.data.color import compute_dtype
from cifarflow.data.draws import MIX, MIX_COLUMN, MIX_KIND, MIX_ROW, UNITS, draw, image_sides
from cifarflow.errors import DataError, check_float, check_int
from cifarflow.lazy import tf

# Beyond it half of each image is left as good as always.
MOST_ALPHA = 10


def mixup(
    images: Any, labels: Any, seed: Any, *, num_classes: int, alpha: float = 0.2
) -> tuple[Any, Any]:
    """Lays over each image another one: share * image + (1 - share) * other, and labels likewise.

    Args:
      images: [B, H, W, C], any dtype.
      labels: [B] integers or [B, num_classes] probabilities.
      seed: [2] int64.
      num_classes: how many classes, at least 2.
      alpha: the share is from Beta(alpha, alpha), 0..10: near 0 or 1 if alpha is small; 0 changes
        nothing.

    Returns:
      images [B, H, W, C] of the same dtype, integers rounded, half up; and labels [B, num_classes]
      float32.

    Raises:
      ConfigError: if num_classes or alpha is not a number within its range.
      DataError: as `random_flip`, or if labels are of another shape, or [B] and no integers.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018); there the share is one
    a batch, and the other image is at a random place of it.
    """
    return mix(images, labels, seed, num_classes=num_classes, alphas={"mixup": alpha})


def cutmix(
    images: Any, labels: Any, seed: Any, *, num_classes: int, alpha: float = 1.0
) -> tuple[Any, Any]:
    """Puts a rectangle of another image into each, in its own place, and mixes labels by area.

    The rectangle has the image's proportions and 1 - share of its area; its centre is anywhere, and
    what reaches over the edge is cut off and does not count.

    Args:
      images: [B, H, W, C], any dtype.
      labels: [B] integers or [B, num_classes] probabilities.
      seed: [2] int64.
      num_classes: how many classes, at least 2.
      alpha: the share is from Beta(alpha, alpha), 0..10: for 1 uniform; 0 changes nothing.

    Returns:
      images [B, H, W, C] of the same dtype; and labels [B, num_classes] float32.

    Raises:
      ConfigError: as `mixup`.
      DataError: as `mixup`.

    Source: Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with
    Localizable Features" (2019); there the rectangle is one a batch.
    """
    return mix(images, labels, seed, num_classes=num_classes, alphas={"cutmix": alpha})


def mix(
    images: Any,
    labels: Any,
    seed: Any,
    *,
    num_classes: int,
    alphas: dict[str, float],
    rounded: bool = True,
) -> tuple[Any, Any]:
    """MixUp, CutMix, or for each image one of the two, with probability one half.

    Args:
      images: [B, H, W, C].
      labels: [B] integers or [B, num_classes] probabilities.
      seed: [2] int64.
      num_classes: how many classes.
      alphas: of "mixup" and of "cutmix", of either or of both.
      rounded: whether integers that are mixed by value are rounded; or not, and become float32.

    Returns:
      images and labels, as `mixup`.
    """
    for name, alpha in alphas.items():
        check_float(f"{name} alpha", alpha, maximum=MOST_ALPHA)
    height, width = image_sides(images)
    batch = tf.shape(images)[0]
    targets = _as_probabilities(labels, images, check_int("num_classes", num_classes, minimum=2))
    others, other_targets = tf.roll(images, 1, 0), tf.roll(targets, 1, 0)
    drawn = draw(seed, MIX, [batch], UNITS)
    cut = draw(seed, MIX_KIND, [batch], 2) == 1 if len(alphas) == 2 else None
    share: Any = None
    if "mixup" in alphas:
        units = tf.gather(tf.constant(_shares(alphas["mixup"])), drawn)
        if cut is not None:
            units = tf.where(cut, UNITS, units)
        share = tf.cast(units, tf.float32) / UNITS
    mixed = images if share is None else _overlay(images, others, share, rounded=rounded)
    if "cutmix" in alphas:
        sides = tf.gather(tf.constant(_sides(alphas["cutmix"], height, width)), drawn)
        if cut is not None:
            sides = tf.where(cut[:, None], sides, 0)
        inside, area = _rectangles(seed, sides, height, width)
        mixed = tf.where(inside, tf.cast(others, mixed.dtype), mixed)
        kept = tf.cast(1 - tf.cast(area, tf.float64) / (height * width), tf.float32)
        share = kept if share is None else tf.where(cut, kept, share)
    share = share[:, None]
    return mixed, share * targets + (1 - share) * other_targets


def _as_probabilities(labels: Any, images: Any, num_classes: int) -> Any:
    labels = tf.convert_to_tensor(labels)
    shape = tf.TensorShape([images.shape[0]])
    is_right = labels.shape.is_compatible_with(shape) and labels.dtype.is_integer
    if is_right and labels.shape.rank == 1:
        return tf.one_hot(labels, num_classes)
    if labels.shape.rank == 2 and labels.shape.is_compatible_with([*shape, num_classes]):
        return tf.cast(labels, tf.float32)
    raise DataError(
        f"labels must be one integer an image, {shape}, or [B, {num_classes}] probabilities, "
        f"not {labels.dtype.name} {labels.shape}"
    )


def _overlay(images: Any, others: Any, share: Any, *, rounded: bool) -> Any:
    """Adds share [B] float32 of each image, in 4096ths, and the rest of the other one."""
    dtype = tf.as_dtype(images.dtype)
    compute = compute_dtype(dtype)
    images, others = tf.cast(images, compute), tf.cast(others, compute)
    # Of bytes exact in float32, whether a device rounds between the two or not.
    mixed = others + tf.cast(share, compute)[:, None, None, None] * (images - others)
    if dtype.is_integer:
        return tf.cast(tf.floor(mixed + 0.5), dtype) if rounded else tf.cast(mixed, tf.float32)
    return tf.cast(mixed, dtype)


def _rectangles(seed: Any, sides: Any, height: int, width: int) -> tuple[Any, Any]:
    """Which pixels are inside, [B, H, W, 1] bool, and how many, [B] int32."""
    batch = tf.shape(sides)[0]
    axes, lengths = [], []
    for axis, (stream, size) in enumerate(((MIX_ROW, height), (MIX_COLUMN, width))):
        first = draw(seed, stream, [batch, 1], size) - sides[:, axis : axis + 1] // 2
        place = tf.range(size)[None, :]
        within = (place >= first) & (place < first + sides[:, axis : axis + 1])
        axes.append(within)
        lengths.append(tf.reduce_sum(tf.cast(within, tf.int32), 1))
    return axes[0][:, :, None, None] & axes[1][:, None, :, None], lengths[0] * lengths[1]


@functools.lru_cache(maxsize=32)
def _shares(alpha: float) -> np.ndarray:
    """4096 quantiles of Beta(alpha, alpha), in 4096ths, [4096] int32.

    One at random of so many equally likely ones is as good as a number from the distribution, and
    needs no logarithm on a device, of which each has its own.
    """
    if not alpha:
        return np.full(UNITS, UNITS, np.int32)
    # With x = (y ** (1 / alpha)) / 2 the density x**(alpha - 1) * (1 - x)**(alpha - 1) dx is
    # (1 - x)**(alpha - 1) dy but for a factor: nothing in it is infinite for x up to one half, and
    # the other half is its mirror image.
    y = np.linspace(0, 1, 2**16 + 1)
    x = 0.5 * y ** (1 / alpha)
    density = (2 * (1 - x)) ** (alpha - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    quantiles = (np.arange(UNITS // 2) + 0.5) / (UNITS // 2)
    lower = 0.5 * np.interp(quantiles, below / below[-1], y) ** (1 / alpha)
    lower = np.round(lower * UNITS).astype(np.int32)
    return np.concatenate([lower, UNITS - lower[::-1]])


@functools.lru_cache(maxsize=32)
def _sides(alpha: float, height: int, width: int) -> np.ndarray:
    """Height and width of the rectangle for each of these quantiles, [4096, 2] int32."""
    root = np.sqrt(1 - _shares(alpha) / UNITS)
    return np.stack([root * height, root * width], axis=1).astype(np.int32)
