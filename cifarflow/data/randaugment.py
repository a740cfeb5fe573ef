"""RandAugment: a few random operations on each image, all of one magnitude.

    images = rand_augment(images, seed)                      # two operations of magnitude 9 of 30
    images = rand_augment(images, seed, ops=3, magnitude=5)

No operation is run image by image.  In one round each image takes one of the `OPERATIONS`:
geometry is a gather of whole pixels, all that treats a pixel by its value alone is a table of 256
entries a channel, and color and sharpness are one blend of the image with its grey or its smooth
version.  The magnitude is a constant, so all tables of places and most of values are constants too;
integers do the rest, and the same bytes come out on every device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cifarflow.data.draws import RANDAUGMENT, UNITS, draw, image_sides
from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.lazy import tf

OPERATIONS = (
    "identity",
    "autocontrast",
    "equalize",
    "rotate",
    "solarize",
    "color",
    "posterize",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
MOST_MAGNITUDE, MOST_OPS = 30, 10
# What the largest magnitude does.
_MOST_DEGREES, _MOST_SHEAR, _MOST_SHIFT, _MOST_CHANGE, _MOST_BITS = 30, 0.3, 0.45, 0.9, 4
_FILL = 128
_GREY = (77, 150, 29)  # of 256


def rand_augment(images: Any, seed: Any, *, magnitude: int = 9, ops: int = 2) -> Any:
    """Applies to each image `ops` operations, each drawn from all fourteen.

    At the largest magnitude, 30, an image is rotated by 30 degrees, sheared by 0.3 or shifted by
    0.45 of its side, to either side; its color, contrast, brightness or sharpness is multiplied by
    0.1 or 1.9; posterize leaves 4 of 8 bits, solarize inverts every pixel.  Smaller ones do
    proportionally less; autocontrast, equalize and identity have no magnitude.  What comes from
    outside of the image is grey.

    Args:
      images: [B, H, W, C] uint8, C 1 or 3; with one channel color changes nothing.
      seed: [2] int64.
      magnitude: of all operations, 0..30.
      ops: how many, one after another, 1..10.

    Returns:
      [B, H, W, C] uint8.

    Raises:
      ConfigError: if magnitude or ops is not a whole number within its range.
      DataError: as `random_flip`, or if images are not uint8 of 1 or 3 channels.

    Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
    space" (2020), with the scales of torchvision's; there each image of a batch may get the same
    operations.  Different here: the fill is grey and not black; contrast is about the grey of the
    mean color; values are rounded half up and not down.
    """
    magnitude, ops = check_magnitude(magnitude), check_ops(ops)
    image_sides(images)
    if images.dtype != tf.uint8 or images.shape[3] not in (1, 3):
        raise DataError(
            "images must be uint8 of 1 or 3 channels for randaugment, "
            f"not {tf.as_dtype(images.dtype).name} of {images.shape[3]}"
        )
    # A number says the operation, and to which side it goes.
    drawn = draw(seed, RANDAUGMENT, [tf.shape(images)[0], ops], 2 * len(OPERATIONS))
    for place in range(ops):
        images = _operate(images, drawn[:, place], magnitude)
    return images


def check_magnitude(magnitude: object) -> int:
    """Returns a magnitude that is a whole number in 0..30; else raises a ConfigError."""
    number = check_int("randaugment magnitude", magnitude, minimum=0)
    if number > MOST_MAGNITUDE:
        raise ConfigError(
            f"randaugment magnitude must be at most {MOST_MAGNITUDE}, not {magnitude!r}"
        )
    return number


def check_ops(ops: object) -> int:
    """Returns a number of operations that is a whole number in 1..10; else raises a ConfigError."""
    number = check_int("randaugment ops", ops)
    if number > MOST_OPS:
        raise ConfigError(f"randaugment ops must be at most {MOST_OPS}, not {ops!r}")
    return number


def _operate(images: Any, drawn: Any, magnitude: int) -> Any:
    """One operation on each image.

    Args:
      images: [B, H, W, C] uint8.
      drawn: [B] int32, twice the place in `OPERATIONS`, and 1 more for the other side.
      magnitude: 0..30.
    """
    share = magnitude / MOST_MAGNITUDE
    images = _move(images, drawn, share)
    images = _look_up(images, drawn, share)
    return _blend(images, drawn, share)


def _is(drawn: Any, name: str) -> Any:
    return drawn // 2 == OPERATIONS.index(name)


# ------------------------------------------------------------------------------------- geometry


def _move(images: Any, drawn: Any, share: float) -> Any:
    """Rotates, shears and shifts, by one gather of whole pixels."""
    height, width, channels = images.shape[1:]
    places = tf.gather(tf.constant(_places(height, width, share)), drawn)
    count = tf.shape(images)[0] * (height * width)
    first = tf.range(tf.shape(images)[0]) * (height * width)
    # The fill is one pixel more, behind all others: to lay it over the result takes twice as long.
    fill = tf.fill([1, channels], tf.constant(_FILL, tf.uint8))
    source = tf.concat([tf.reshape(images, [-1, channels]), fill], 0)
    pixels = tf.gather(source, tf.where(places < 0, count, first[:, None] + places))
    return tf.ensure_shape(tf.reshape(pixels, tf.shape(images)), images.shape)


@functools.lru_cache(maxsize=32)
def _places(height: int, width: int, share: float) -> np.ndarray:
    """From where each pixel comes, [28, H * W] int32, -1 for outside: of each drawn number."""
    y, x = np.mgrid[:height, :width].reshape(2, -1).astype(np.float64)
    # From the middle, in which a rotation and a shear keep their place.
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    angle, shear, shift = math.radians(_MOST_DEGREES), _MOST_SHEAR, _MOST_SHIFT
    moves: dict[str, Callable[[float], tuple[Any, Any]]] = {
        "rotate": lambda s: (
            math.cos(s * angle) * y + math.sin(s * angle) * x,
            math.cos(s * angle) * x - math.sin(s * angle) * y,
        ),
        "shear_x": lambda s: (y, x + s * shear * y),
        "shear_y": lambda s: (y + s * shear * x, x),
        "translate_x": lambda s: (y, x + round(s * shift * width)),
        "translate_y": lambda s: (y + round(s * shift * height), x),
    }
    places = np.tile(np.arange(height * width, dtype=np.int32), (2 * len(OPERATIONS), 1))
    for name, move in moves.items():
        for side in (0, 1):
            rows, columns = move(-share if side else share)
            # Not to depend on the last digit of a sine where a pixel lies on an edge.
            rows = np.floor(np.round(rows + (height - 1) / 2, 9) + 0.5).astype(np.int32)
            columns = np.floor(np.round(columns + (width - 1) / 2, 9) + 0.5).astype(np.int32)
            inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
            source = np.where(inside, rows * width + columns, -1)
            places[2 * OPERATIONS.index(name) + side] = source
    return places


# ------------------------------------------------------------------------------- value by value


def _look_up(images: Any, drawn: Any, share: float) -> Any:
    """All that changes a pixel by its value alone: a table of 256 entries an image and channel."""
    height, width, channels = images.shape[1:]
    batch, pixels = tf.shape(images)[0], height * width
    # Channel by channel, so that one count has the values of all.
    offsets = np.tile(256 * np.arange(channels, dtype=np.int32), pixels)
    entries = tf.cast(tf.reshape(images, [-1, pixels * channels]), tf.int32) + offsets
    # As `tf.math.bincount` does, whose size is no constant for XLA.
    counts = tf.raw_ops.DenseBincount(
        input=entries, size=256 * channels, weights=tf.constant([], tf.int32)
    )
    counts = tf.reshape(counts, [-1, channels, 256])
    tables = tf.gather(tf.constant(_fixed_tables(share)), drawn)[:, None, :]
    tables += tf.zeros_like(counts)
    for name, table in (
        ("contrast", _contrast_table(counts, drawn, pixels, share)),
        ("autocontrast", _autocontrast_table(counts)),
        ("equalize", _equalize_table(counts)),
    ):
        tables = tf.where(_is(drawn, name)[:, None, None], table, tables)
    entries += (256 * channels) * tf.range(batch)[:, None]
    found = tf.gather(tf.reshape(tf.cast(tables, tf.uint8), [-1]), entries)
    return tf.ensure_shape(tf.reshape(found, tf.shape(images)), images.shape)


@functools.lru_cache(maxsize=32)
def _fixed_tables(share: float) -> np.ndarray:
    """Tables that do not depend on the image, [28, 256] int32: of each drawn number."""
    values = np.arange(256, dtype=np.int32)
    tables = np.tile(values, (2 * len(OPERATIONS), 1))
    bits = round(_MOST_BITS * share)
    # At a threshold of 256 no pixel is inverted.
    threshold = 256 - round(256 * share)
    for side, factor in enumerate(_factors(share)):
        tables[2 * OPERATIONS.index("posterize") + side] = values >> bits << bits
        inverted = np.where(values >= threshold, 255 - values, values)
        tables[2 * OPERATIONS.index("solarize") + side] = inverted
        brighter = (values * factor + UNITS // 2) // UNITS
        tables[2 * OPERATIONS.index("brightness") + side] = np.minimum(brighter, 255)
    return tables


def _factors(share: float) -> tuple[int, int]:
    """What multiplies the distance from the degenerate image, in 4096ths, to either side."""
    change = round(_MOST_CHANGE * share * UNITS)
    return UNITS + change, UNITS - change


def _contrast_table(counts: Any, drawn: Any, pixels: int, share: float) -> Any:
    channels, values = counts.shape[1], tf.range(256)
    # An image may have so many pixels that their sum needs 64 bits.
    sums = tf.reduce_sum(tf.cast(counts * values, tf.int64), 2)
    weights = tf.constant(_GREY if channels == 3 else (256,), tf.int64)
    mean = (tf.reduce_sum(sums * weights, 1) + 128 * pixels) // (256 * pixels)
    mean = tf.cast(mean, tf.int32)[:, None, None]
    factor = tf.gather(tf.constant(_factors(share)), drawn % 2)[:, None, None]
    return _stretched(tf.broadcast_to(values, tf.shape(counts)), mean, factor)


def _autocontrast_table(counts: Any) -> Any:
    """The smallest value becomes 0, the largest 255; a channel of one value stays as it is."""
    values = tf.range(256)
    low = tf.reduce_min(tf.where(counts > 0, values, 255), 2, keepdims=True)
    high = tf.reduce_max(tf.where(counts > 0, values, 0), 2, keepdims=True)
    distance = tf.maximum(high - low, 1)
    stretched = ((values - low) * 255 + distance // 2) // distance
    return tf.where(high > low, tf.clip_by_value(stretched, 0, 255), values)


def _equalize_table(counts: Any) -> Any:
    """Each value becomes the share of pixels below it, of those that are not of the largest."""
    values = tf.range(256)
    total = tf.cumsum(counts, axis=2)
    largest = tf.reduce_max(tf.where(counts > 0, values, 0), 2, keepdims=True)
    last = tf.reduce_sum(tf.where(values == largest, counts, 0), 2, keepdims=True)
    step = (total[:, :, -1:] - last) // 255
    spread = (total - counts + step // 2) // tf.maximum(step, 1)
    return tf.where(step > 0, tf.clip_by_value(spread, 0, 255), values)


# ---------------------------------------------------------------------------- color and sharpness


def _blend(images: Any, drawn: Any, share: float) -> Any:
    """Color and sharpness: what an image differs by from its grey or its smooth version, scaled."""
    pixels = tf.cast(images, tf.int32)
    # Two dimensions: broadcasting along four takes longer.
    shape = [-1, math.prod(images.shape[1:])]
    color, sharpness = (_is(drawn, name)[:, None] for name in ("color", "sharpness"))
    grey, smooth = (tf.reshape(plain(pixels), shape) for plain in (_grey, _smooth))
    factor = tf.gather(tf.constant(_factors(share)), drawn % 2)[:, None]
    factor = tf.where(color | sharpness, factor, UNITS)
    blended = _stretched(tf.reshape(pixels, shape), tf.where(color, grey, smooth), factor)
    blended = tf.reshape(tf.cast(blended, tf.uint8), tf.shape(images))
    return tf.ensure_shape(blended, images.shape)


def _stretched(values: Any, middle: Any, factor: Any) -> Any:
    """The distance from the middle times factor / 4096, rounded half up, within 0..255."""
    found = middle * UNITS + factor * (values - middle) + UNITS // 2
    return tf.clip_by_value(tf.bitwise.right_shift(found, UNITS.bit_length() - 1), 0, 255)


def _grey(pixels: Any) -> Any:
    if pixels.shape[3] == 1:
        return pixels
    # A plane a channel: to sum along an axis of three takes several times as long.
    planes = tf.unstack(pixels, axis=3)
    total = tf.add_n([weight * plane for weight, plane in zip(_GREY, planes, strict=True)])
    return tf.stack([tf.bitwise.right_shift(total + 128, 8)] * 3, axis=3)


def _smooth(pixels: Any) -> Any:
    """The mean of 3 by 3 pixels in which the middle counts five times; the edge as it is."""
    inner = pixels[:, 1:-1, 1:-1]
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    # (total + 6) // 13, which this is up to 6,553: a division takes long.
    mean = tf.bitwise.right_shift((total + 6) * 5042, 16)
    # Padded by what is added to an edge, nothing.
    return pixels + tf.pad(mean - inner, [[0, 0], [1, 1], [1, 1], [0, 0]])
