"""Random flips, crops, light and cutouts: pure functions of a seed, a whole batch at a time.

    seed = tf.constant([0, 17], tf.int64)          # (the run's seed, the step)
    images = random_flip(images, seed)
    images = random_crop(images, seed, padding=4)
    images = random_brightness(images, seed, strength=0.14)
    images = random_contrast(images, seed, strength=0.13)
    images = cutout(images, seed, size=8)

    augment = make_augment("flip,crop:4,cutout:8")  # three of them, flip and crop in one pass
    images = augment(images, seed)

Every function takes images [B, H, W, C] of any dtype and a seed [2] int64, and returns images of
the same shape and dtype (`make_augment`'s with light: float32).  The same arguments always give the
same result, so that any batch of the past can be drawn again: for uint8 images the same bytes on
every device.

`alternating_flip` takes each image's place in the training arrays and the epoch as well.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from cifarflow.errors import ConfigError, DataError, check_float, check_int

AugmentFn = Callable[..., Any]

# Each kind of draw has its own stream: adding a transform to a recipe leaves the others' draws
# as they were.
_FLIP, _CROP, _CUTOUT_ROW, _CUTOUT_COLUMN, _BRIGHTNESS, _CONTRAST, _ALTFLIP = range(1, 8)

# A quarter of the scale is about the standard deviation of CIFAR-10's pixels.
_PIXEL_STD = 0.25 * 255
# Factors and shifts are multiples of 1/4096.  With a strength of at most 4, pixel * factor + shift
# of uint8 images is then exact in float32: less than 4096, hence 24 bits.  So it comes out the same
# whether a device rounds between the two or not.
_UNITS = 4096
_MOST_STRENGTH = 4


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


def _all_columns(images: Any) -> Any:
    return tf.tile(tf.range(images.shape[2])[None, :], [tf.shape(images)[0], 1])


def _all_rows(images: Any) -> Any:
    return tf.tile(tf.range(images.shape[1])[None, :], [tf.shape(images)[0], 1])


def _mirror(images: Any, mirrored: Any, columns: Any) -> Any:
    """The columns [B, W], counted from the right where mirrored [B, 1] bool says so."""
    return tf.where(mirrored, images.shape[2] - 1 - columns, columns)


def _mirrored_at_random(images: Any, seed: Any) -> Any:
    return _draw(seed, _FLIP, [tf.shape(images)[0], 1], 2) == 1


def _mirrored_by_turns(images: Any, seed: Any, examples: Any, epoch: Any) -> Any:
    examples = tf.convert_to_tensor(examples)
    batch = tf.TensorShape(images.shape)[:1]
    if not (examples.dtype.is_integer and batch.is_compatible_with(examples.shape)):
        raise DataError(
            f"examples must be one integer an image, {batch}, not {examples.dtype.name} "
            f"{examples.shape}"
        )
    run_seed = tf.stack([tf.cast(seed, tf.int64)[0], tf.constant(0, tf.int64)])
    # Two keys of the run, and a round of mixing after each: that leaves no relation between the
    # bits of two examples or of two runs.
    keys = tf.cast(_draw(run_seed, _ALTFLIP, [2], 2**31 - 1), tf.int64)
    bits = _mix(_mix(tf.cast(examples, tf.int64) ^ keys[0]) ^ keys[1])
    return ((bits + tf.cast(epoch, tf.int64)) % 2 == 1)[:, None]


def _mix(numbers: Any) -> Any:
    """A permutation of 0..2**32-1 in which each bit depends on all bits of the number.

    Both factors are below 2**31, so that int64 holds the products and nothing overflows.

    Source: C. Wellons, "Prospecting for Hash Functions" (2018).
    """
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        numbers = numbers ^ tf.bitwise.right_shift(numbers, tf.constant(shift, tf.int64))
        numbers = (numbers * factor) & 0xFFFFFFFF
    return numbers ^ tf.bitwise.right_shift(numbers, tf.constant(15, tf.int64))


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
    return Augment({"flip": 1})(images, seed)


def alternating_flip(images: Any, seed: Any, *, examples: Any, epoch: Any) -> Any:
    """Mirrors each image left to right in every other epoch, so that both views are seen in two.

    Which epochs, the even or the odd ones, is drawn once an example, from the run's seed alone.

    Args:
      images: [B, H, W, C], any dtype.
      seed: [2] int64, of which only the first, the run's, counts.
      examples: [B] integers >= 0, the index of each image in the training arrays.
      epoch: scalar, 0 for the first; a number or an integer tensor.

    Returns:
      [B, H, W, C] of the same dtype.

    Raises:
      DataError: as `random_flip`, or if examples are not one integer an image.

    Source: K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024); there the first
    epoch's views are drawn and the whole epoch is flipped at once.
    """
    return Augment({"altflip": 1})(images, seed, examples=examples, epoch=epoch)


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


def random_brightness(images: Any, seed: Any, *, strength: float = 0.14) -> Any:
    """Makes each image brighter or darker as a whole.

    What is added to the pixels of an image is uniform within +- strength * 63.75, in steps of
    1/4096: a quarter of the 0..255 scale is about the standard deviation of CIFAR-10's pixels,
    so `strength` is that of normalised pixels.

    Args:
      images: [B, H, W, C], any dtype, on the 0..255 scale.
      seed: [2] int64.
      strength: 0..4; 0 changes nothing.

    Returns:
      [B, H, W, C] of the same dtype; integers are rounded, half up, and clipped to the range of
      their dtype.

    Raises:
      ConfigError: if strength is not a number within that range.
      DataError: as `random_flip`.
    """
    return _relight(images, seed, brightness=_check_strength("brightness", strength))


def random_contrast(images: Any, seed: Any, *, strength: float = 0.13) -> Any:
    """Stretches or shrinks the distance of each image's pixels from their mean.

    The factor of an image is uniform within 1 +- strength, in steps of 1/4096.

    Args:
      images: [B, H, W, C], any dtype.
      seed: [2] int64.
      strength: 0..4; 0 changes nothing.

    Returns:
      [B, H, W, C] of the same dtype, rounded and clipped as `random_brightness` does.

    Raises:
      ConfigError: if strength is not a number within that range.
      DataError: as `random_flip`.
    """
    return _relight(images, seed, contrast=_check_strength("contrast", strength))


def _check_strength(name: str, strength: object) -> float:
    return check_float(f"{name} strength", strength, maximum=_MOST_STRENGTH)


def _relight(
    images: Any, seed: Any, *, brightness: float = 0, contrast: float = 0, rounded: bool = True
) -> Any:
    """Brightness and contrast in one multiplication and one addition.

    Integers are rounded and clipped once; or not, and become float32.
    """
    height, width = _image_sides(images)
    channels, batch, dtype = images.shape[3], tf.shape(images)[0], tf.as_dtype(images.dtype)
    # One byte, or half a float, is exact in float32; anything else may need all of float64.
    compute = tf.float32 if dtype.size == 1 or dtype in (tf.float16, tf.bfloat16) else tf.float64
    compute = tf.float32 if dtype == tf.float32 else compute
    # Two dimensions: broadcasting along four takes longer.
    pixels = tf.cast(tf.reshape(images, [-1, height * width * channels]), compute)

    def draw(stream: int, strength: float) -> Any:
        most = round(strength * _UNITS)
        return tf.cast(_draw(seed, stream, [batch, 1], 2 * most + 1) - most, tf.float64) / _UNITS

    offset = tf.zeros([batch, 1], tf.float64)
    if brightness:
        offset += draw(_BRIGHTNESS, brightness * _PIXEL_STD)
    if contrast:
        change = draw(_CONTRAST, contrast)
        # Sums of rows of bytes are exact in float32, and those of an image in float64.
        rows = tf.reduce_sum(tf.reshape(pixels, [-1, width * channels]), 1)
        total = tf.reduce_sum(tf.reshape(tf.cast(rows, tf.float64), [-1, height]), 1)
        mean = total[:, None] * (1 / (height * width * channels))
        if dtype.is_integer:
            mean = tf.round(mean * _UNITS) / _UNITS
        # mean + (1 + change) * (pixels - mean)
        offset -= mean * change
        pixels *= tf.cast(1 + change, compute)
    if dtype.is_integer:
        offset = tf.round(offset * _UNITS) / _UNITS
        if rounded:
            # Rounded down by the cast, so half up with the half.
            offset += 0.5
        else:
            dtype = tf.float32
    pixels += tf.cast(offset, compute)
    if dtype.is_integer:
        pixels = tf.clip_by_value(
            tf.floor(pixels) if dtype.min < 0 else pixels, dtype.min, dtype.max
        )
    return tf.ensure_shape(tf.reshape(tf.cast(pixels, dtype), tf.shape(images)), images.shape)


def make_augment(spec: str) -> Augment | None:
    """Builds one augmentation from its description.

    Args:
      spec: parts joined by commas, each at most once, applied in this order whatever the order
        written: "flip" or "altflip", "crop" or "crop:PADDING" (pixels, default 4), "brightness" or
        "brightness:STRENGTH" (default 0.14), "contrast" or "contrast:STRENGTH" (default 0.13),
        "cutout" or "cutout:SIZE" (pixels, default 8).  "" or "none" is no augmentation.

    Returns:
      A function of (images [B, H, W, C], seed [2] int64) that returns augmented images, and that
      needs examples and epoch too where `needs_examples` says so; or None if there is nothing to
      do.

    Raises:
      ConfigError: if a part is unknown or repeated, its number is not a whole number >= 1, or its
        strength not a number in 0..4, or if flip and altflip are both there.
    """
    parts = parse_augment(spec)
    return Augment(parts) if parts else None


@dataclasses.dataclass(frozen=True, eq=False)
class Augment:
    """Flips, crops, light and cutouts in one function, as `make_augment` returns.

    Attributes:
      parts: what to do, as `parse_augment` returns.
    """

    parts: Mapping[str, Any]

    @property
    def needs_examples(self) -> bool:
        """Whether a call needs examples and epoch."""
        return "altflip" in self.parts

    def __call__(self, images: Any, seed: Any, *, examples: Any = None, epoch: Any = None) -> Any:
        """Augments a batch.

        Flip and crop are one gather, brightness and contrast one multiplication and addition.

        Args:
          images: [B, H, W, C], any dtype.
          seed: [2] int64, (the run's seed, the step).
          examples: [B] integers, as `alternating_flip`; for others it does not matter.
          epoch: scalar, as `alternating_flip`; for others it does not matter.

        Returns:
          [B, H, W, C] of the same dtype; but of integers, with brightness or contrast among the
          parts, float32, not rounded and not clipped.

        Raises:
          ConfigError: if a number does not fit the images, or examples or epoch are missing.
          DataError: as `random_flip` and `alternating_flip`.
        """
        parts = self.parts
        _image_sides(images)
        mirrored = None
        if "flip" in parts:
            mirrored = _mirrored_at_random(images, seed)
        elif self.needs_examples:
            if examples is None or epoch is None:
                raise ConfigError(
                    "altflip must be given examples and epoch, as ArrayBatches does, not only "
                    "images and seed"
                )
            mirrored = _mirrored_by_turns(images, seed, examples, epoch)
        if "crop" in parts:
            rows, columns = _crop_rows_and_columns(images, seed, parts["crop"])
        elif mirrored is not None:
            rows, columns = _all_rows(images), _all_columns(images)
        if mirrored is not None:
            # The crop's window is laid over the mirrored image.
            columns = _mirror(images, mirrored, columns)
        if mirrored is not None or "crop" in parts:
            images = _take_pixels(images, rows, columns)
        light = {name: parts[name] for name in ("brightness", "contrast") if name in parts}
        if light:
            # Rounded to bytes again, images would differ from real ones by just what a whitening
            # layer enlarges most.
            images = _relight(images, seed, rounded=False, **light)
        if "cutout" in parts:
            images = cutout(images, seed, size=parts["cutout"])
        return images


def parse_augment(spec: str) -> dict[str, Any]:
    """Reads a description such as "flip,crop:4" into {"flip": 1, "crop": 4}.

    Returns:
      The parts by name: pixels as int, strengths as float, and 1 for a flip.

    Raises:
      ConfigError: as `make_augment`.
    """
    defaults = {
        "flip": 1,
        "altflip": 1,
        "crop": 4,
        "brightness": 0.14,
        "contrast": 0.13,
        "cutout": 8,
    }
    good = (
        'parts of "flip (or altflip),crop:PIXELS,brightness:STRENGTH,contrast:STRENGTH,'
        'cutout:PIXELS", or "none"'
    )
    if not isinstance(spec, str):
        raise ConfigError(f"augment must be {good}, not {spec!r}")
    parts: dict[str, Any] = {}
    for text in [] if spec.strip() in ("", "none") else spec.split(","):
        name, colon, number = text.strip().partition(":")
        if name not in defaults or name in parts or (colon and name in ("flip", "altflip")):
            raise ConfigError(f"augment must be {good}, not {spec!r}")
        parts[name] = _parse_number(name, number) if colon else defaults[name]
    if "flip" in parts and "altflip" in parts:
        raise ConfigError(f"augment must have flip or altflip, not both as {spec!r}")
    return parts


def _parse_number(name: str, number: str) -> float:
    if name in ("brightness", "contrast"):
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number) or (
            float(number) > _MOST_STRENGTH
        ):
            raise ConfigError(
                f"augment {name} must be a number in 0..{_MOST_STRENGTH}, not {number!r}"
            )
        return float(number)
    # Python does not read numbers of thousands of figures.
    if not (re.fullmatch(r"[0-9]{1,9}", number) and int(number) >= 1):
        raise ConfigError(f"augment {name} must be a whole number >= 1, not {number!r}")
    return int(number)
