"""Random flips, crops and cutouts: pure functions of (images, seed), a whole batch at a time.

    seed = tf.constant([0, 17], tf.int64)          # (the run's seed, the step)
    images = random_flip(images, seed)
    images = random_crop(images, seed, padding=4)
    images = cutout(images, seed, size=8)

    augment = make_augment("flip,crop:4,cutout:8")  # the same three, flip and crop in one pass
    images = augment(images, seed)

Every function takes images [B, H, W, C] of any dtype and a seed [2] int64, and returns images of
the same shape and dtype.  The same arguments always give the same result, on every device, so
that any batch of the past can be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from cifarflow.errors import ConfigError, DataError, check_int

AugmentFn = Callable[[Any, Any], Any]

# Each kind of draw has its own stream: adding a transform to a recipe leaves the others' draws
# as they were.
_FLIP, _CROP, _CUTOUT_ROW, _CUTOUT_COLUMN = 1, 2, 3, 4


def _draw(seed: Any, stream: int, shape: list[Any], limit: int) -> Any:
    """Uniform int32 in [0, limit), a pure function of (seed, stream)."""
    seed = tf.cast(seed, tf.int64) + tf.constant([stream << 40, 0], tf.int64)
    # The generator is named because "auto" differs from device to device.
    return tf.random.stateless_uniform(shape, seed, 0, limit, tf.int32, alg="philox")


def _image_sides(images: Any) -> tuple[int, int]:
    """Height and width of a batch of images, which must be known when a graph is made."""
    shape = tf.TensorShape(images.shape)
    if shape.rank != 4 or not shape[1:].is_fully_defined():
        raise DataError(
            f"images must be [B, H, W, C] with known height, width and channels, not {shape}"
        )
    return shape[1], shape[2]


def _reflect(index: Any, size: int) -> Any:
    """Mirrors an index that left [0, size) back inside, the edge itself not repeated."""
    return (size - 1) - tf.abs((size - 1) - tf.abs(index))


def _take_pixels(images: Any, rows: Any, columns: Any) -> Any:
    """Returns images whose pixel (r, c) is the input's (rows[r], columns[c]), image by image.

    One gather of whole pixels does any mixture of shifts and mirrors, several times as fast as
    padding, slicing rows and grouping images by their column shift.

    Args:
      images: [B, H, W, C].
      rows: [B, H] int32, within 0..H-1.
      columns: [B, W] int32, within 0..W-1.
    """
    shape = tf.shape(images)
    height, width, channels = images.shape[1:]
    first = tf.range(shape[0]) * (height * width)
    index = first[:, None, None] + rows[:, :, None] * width + columns[:, None, :]
    pixels = tf.gather(tf.reshape(images, [-1, channels]), index)
    return tf.ensure_shape(pixels, images.shape)


def _flip_columns(images: Any, seed: Any, columns: Any) -> Any:
    flip = _draw(seed, _FLIP, [tf.shape(images)[0], 1], 2)
    return tf.where(flip == 1, images.shape[2] - 1 - columns, columns)


def _crop_rows_and_columns(images: Any, seed: Any, padding: int) -> tuple[Any, Any]:
    height, width = _image_sides(images)
    if padding >= min(height, width):
        raise ConfigError(
            f"crop padding must be smaller than the image side {min(height, width)}, not {padding}"
        )
    shift = _draw(seed, _CROP, [tf.shape(images)[0], 2], 2 * padding + 1) - padding
    rows = _reflect(tf.range(height)[None, :] + shift[:, :1], height)
    columns = _reflect(tf.range(width)[None, :] + shift[:, 1:], width)
    return rows, columns


def random_flip(images: Any, seed: Any) -> Any:
    """Mirrors each image left to right with probability one half.

    Args:
      images: [B, H, W, C], any dtype.
      seed: [2] int64.

    Returns:
      [B, H, W, C] of the same dtype.

    Raises:
      DataError: if images are not of that rank, or a side is unknown.
    """
    height, width = _image_sides(images)
    batch = tf.shape(images)[0]
    rows = tf.tile(tf.range(height)[None, :], [batch, 1])
    columns = tf.tile(tf.range(width)[None, :], [batch, 1])
    return _take_pixels(images, rows, _flip_columns(images, seed, columns))


def random_crop(images: Any, seed: Any, *, padding: int = 4) -> Any:
    """Pads each image by reflection and cuts a window of its own size out at a random place.

    Args:
      images: [B, H, W, C], any dtype.
      seed: [2] int64.
      padding: pixels on each side, 1..min(H, W)-1.

    Returns:
      [B, H, W, C] of the same dtype.

    Raises:
      ConfigError: if padding is not a whole number within that range.
      DataError: as `random_flip`.
    """
    check_int("crop padding", padding)
    return _take_pixels(images, *_crop_rows_and_columns(images, seed, padding))


def cutout(images: Any, seed: Any, *, size: int = 8, fill: float = 128) -> Any:
    """Paints one square of each image over, its centre anywhere in the image.

    A square that reaches over the edge is cut off there.

    Args:
      images: [B, H, W, C], any dtype.
      seed: [2] int64.
      size: side of the square in pixels, 1..min(H, W).
      fill: value of the painted pixels, on the images' own scale.

    Returns:
      [B, H, W, C] of the same dtype.

    Raises:
      ConfigError: if size is not a whole number within that range, or the images are of an
        integer type that cannot hold fill.
      DataError: as `random_flip`.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
    Cutout" (2017); there the fill is the mean of the data, zero after normalisation.
    """
    check_int("cutout size", size)
    height, width = _image_sides(images)
    if size > min(height, width):
        raise ConfigError(
            f"cutout size must be at most the image side {min(height, width)}, not {size}"
        )
    dtype = tf.as_dtype(images.dtype)
    # A cast would wrap around: 300 would become 44.
    if dtype.is_integer and not (dtype.min <= fill <= dtype.max and fill == int(fill)):
        raise ConfigError(
            f"cutout fill must be a whole number in {dtype.min}..{dtype.max} for images of "
            f"{dtype.name}, not {fill!r}"
        )
    batch = tf.shape(images)[0]
    top = _draw(seed, _CUTOUT_ROW, [batch, 1], height) - size // 2
    left = _draw(seed, _CUTOUT_COLUMN, [batch, 1], width) - size // 2
    row, column = tf.range(height)[None, :], tf.range(width)[None, :]
    in_rows = (row >= top) & (row < top + size)
    in_columns = (column >= left) & (column < left + size)
    inside = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    return tf.where(inside, tf.cast(fill, dtype), images)


def make_augment(spec: str) -> AugmentFn | None:
    """Builds one augmentation from its description.

    Args:
      spec: parts joined by commas, each at most once, applied in this order whatever the order
        written: "flip", "crop" or "crop:PADDING" (pixels, default 4), "cutout" or "cutout:SIZE"
        (pixels, default 8).  "" or "none" is no augmentation.

    Returns:
      A function of (images [B, H, W, C], seed [2] int64) that returns augmented images, or None
      if there is nothing to do.

    Raises:
      ConfigError: if a part is unknown, repeated, or its number is not a whole number >= 1.
    """
    parts = parse_augment(spec)
    if not parts:
        return None

    def augment(images: Any, seed: Any) -> Any:
        if "crop" in parts:
            rows, columns = _crop_rows_and_columns(images, seed, parts["crop"])
            if "flip" in parts:
                # The crop's window is laid over the mirrored image.
                columns = _flip_columns(images, seed, columns)
            images = _take_pixels(images, rows, columns)
        elif "flip" in parts:
            images = random_flip(images, seed)
        if "cutout" in parts:
            images = cutout(images, seed, size=parts["cutout"])
        return images

    return augment


def parse_augment(spec: str) -> dict[str, int]:
    """Reads a description such as "flip,crop:4" into {"flip": 1, "crop": 4}.

    Raises:
      ConfigError: as `make_augment`.
    """
    defaults = {"flip": 1, "crop": 4, "cutout": 8}
    good = 'parts of "flip,crop:PIXELS,cutout:PIXELS", or "none"'
    if not isinstance(spec, str):
        raise ConfigError(f"augment must be {good}, not {spec!r}")
    parts: dict[str, int] = {}
    for text in [] if spec.strip() in ("", "none") else spec.split(","):
        name, colon, number = text.strip().partition(":")
        if name not in defaults or name in parts or (colon and name == "flip"):
            raise ConfigError(f"augment must be {good}, not {spec!r}")
        if colon and not (number.isascii() and number.isdigit() and int(number) >= 1):
            raise ConfigError(f"augment {name} must be a whole number >= 1, not {number!r}")
        parts[name] = int(number) if colon else defaults[name]
    return parts
