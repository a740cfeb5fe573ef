"""Random augmentation: pure functions of a seed, a whole batch at a time.

    seed = tf.constant([0, 17], tf.int64)          # (the run's seed, the step)
    images = random_flip(images, seed)
    images = random_crop(images, seed, padding=4)
    images = random_brightness(images, seed, strength=0.14)
    images = random_contrast(images, seed, strength=0.13)
    images = cutout(images, seed, size=8)
    images = random_erasing(images, seed, probability=0.25)

    augment = make_augment("flip,crop:4,cutout:8")  # three of them, flip and crop in one pass
    images = augment(images, seed)

Every function takes images [B, H, W, C] of any dtype and a seed [2] int64, and returns images of
the same shape and dtype (`make_augment`'s with light, color or mixup: float32).  The same arguments
always give the same result, so that any batch of the past can be drawn again: for uint8 images the
same bytes on every device.  Only where `make_augment` multiplies by several of contrast,
saturation, hue and mixup, the last digit of float32 may be another one on another device.

`alternating_flip` takes each image's place in the training arrays and the epoch as well.  Color is
in `cifarflow.data.color`, RandAugment in `randaugment`; what changes labels too is in `mixing`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cifarflow.data.color import MOST_HUE, MOST_SATURATION, compute_dtype, recolor
from cifarflow.data.draws import (
    ALTFLIP,
    BRIGHTNESS,
    CONTRAST,
    CROP,
    CUTOUT_COLUMN,
    CUTOUT_ROW,
    ERASE,
    ERASE_CORNER,
    ERASE_NOISE,
    ERASE_SIZE,
    FLIP,
    UNITS,
    draw,
    draw_bytes,
    image_sides,
)
from cifarflow.data.mixing import MOST_ALPHA, mix
from cifarflow.data.randaugment import MOST_MAGNITUDE, MOST_OPS, rand_augment
from cifarflow.errors import ConfigError, DataError, check_float, check_int
from cifarflow.lazy import tf

AugmentFn = Callable[..., Any]

# A quarter of the scale is about the standard deviation of CIFAR-10's pixels.
_PIXEL_STD = 0.25 * 255
# In units of 1/4096 and with a strength of at most 4, pixel * factor + shift of uint8 images is
# exact in float32: less than 4096, hence 24 bits.  So it comes out the same whether a device rounds
# between the two or not.
_MOST_STRENGTH = 4
# Of the image's area, and of height over width.
_ERASE_SHARE, _ERASE_RATIO = (0.02, 1 / 3), (0.3, 3.3)


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
    return draw(seed, FLIP, [tf.shape(images)[0], 1], 2) == 1


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
    keys = tf.cast(draw(run_seed, ALTFLIP, [2], 2**31 - 1), tf.int64)
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
    height, width = image_sides(images)
    if padding >= min(height, width):
        raise ConfigError(
            f"crop padding must be smaller than the image side {min(height, width)}, not {padding}"
        )
    shift = draw(seed, CROP, [tf.shape(images)[0], 2], 2 * padding + 1) - padding
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
    height, width = image_sides(images)
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
    top = draw(seed, CUTOUT_ROW, [batch, 1], height) - size // 2
    left = draw(seed, CUTOUT_COLUMN, [batch, 1], width) - size // 2
    row, column = tf.range(height)[None, :], tf.range(width)[None, :]
    in_rows = (row >= top) & (row < top + size)
    in_columns = (column >= left) & (column < left + size)
    inside = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    return tf.where(inside, tf.cast(fill, dtype), images)


def random_erasing(images: Any, seed: Any, *, probability: float = 0.25) -> Any:
    """Paints one rectangle of some of the images over with noise, each pixel with bytes of its own.

    It has 2 to 33 % of the image's area and is 0.3 to 3.3 times as high as wide, but no higher or
    wider than the image, in which it lies wholly.

    Args:
      images: [B, H, W, C], any dtype that holds 0..255.
      seed: [2] int64.
      probability: of an image to be painted, 0..1, in steps of 1/4096; 0 changes nothing.

    Returns:
      [B, H, W, C] of the same dtype.

    Raises:
      ConfigError: if probability is not a number within that range.
      DataError: as `random_flip`.

    Source: Zhong et al., "Random Erasing Data Augmentation" (2017).
    """
    probability = check_float("erase probability", probability, maximum=1)
    height, width = image_sides(images)
    batch, channels = tf.shape(images)[0], images.shape[3]
    table = _erase_sizes(height, width)
    sides = tf.gather(tf.constant(table), draw(seed, ERASE_SIZE, [batch], len(table)))
    # A corner among as many as there are for that size.
    room = tf.cast(tf.constant([height, width]) - sides + 1, tf.int64)
    corner = tf.cast(draw(seed, ERASE_CORNER, [batch, 2], 2**30), tf.int64) * room // 2**30
    end = corner + tf.cast(sides, tf.int64)
    row, column = (tf.range(size, dtype=tf.int64)[None, :] for size in (height, width))
    in_rows = (row >= corner[:, :1]) & (row < end[:, :1])
    in_columns = (column >= corner[:, 1:]) & (column < end[:, 1:])
    in_rows &= draw(seed, ERASE, [batch, 1], UNITS) < round(probability * UNITS)
    inside = in_rows[:, :, None, None] & in_columns[:, None, :, None]
    noise = draw_bytes(seed, ERASE_NOISE, batch * (height * width * channels))
    return tf.where(inside, tf.cast(tf.reshape(noise, tf.shape(images)), images.dtype), images)


@functools.lru_cache(maxsize=32)
def _erase_sizes(height: int, width: int) -> np.ndarray:
    """Heights and widths that fit into the image, [N, 2] int32, each row equally likely.

    Areas are uniform and so are the ratios' logarithms, 64 of each.
    """
    middles = (np.arange(64) + 0.5) / 64
    area = height * width * np.interp(middles, [0, 1], _ERASE_SHARE)[:, None]
    ratio = np.exp(np.interp(middles, [0, 1], np.log(_ERASE_RATIO)))[None, :]
    sides = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], axis=-1).reshape(-1, 2)
    whole = np.maximum(np.round(sides), 1).astype(np.int32)
    return whole[(whole <= [height, width]).all(axis=1)]


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
    height, width = image_sides(images)
    channels, batch, dtype = images.shape[3], tf.shape(images)[0], tf.as_dtype(images.dtype)
    compute = compute_dtype(dtype)
    # Two dimensions: broadcasting along four takes longer.
    pixels = tf.cast(tf.reshape(images, [-1, height * width * channels]), compute)

    def drawn(stream: int, strength: float) -> Any:
        most = round(strength * UNITS)
        return tf.cast(draw(seed, stream, [batch, 1], 2 * most + 1) - most, tf.float64) / UNITS

    offset = tf.zeros([batch, 1], tf.float64)
    if brightness:
        offset += drawn(BRIGHTNESS, brightness * _PIXEL_STD)
    if contrast:
        change = drawn(CONTRAST, contrast)
        # Sums of rows of bytes are exact in float32, and those of an image in float64.
        rows = tf.reduce_sum(tf.reshape(pixels, [-1, width * channels]), 1)
        total = tf.reduce_sum(tf.reshape(tf.cast(rows, tf.float64), [-1, height]), 1)
        mean = total[:, None] * (1 / (height * width * channels))
        if dtype.is_integer:
            mean = tf.round(mean * UNITS) / UNITS
        # mean + (1 + change) * (pixels - mean)
        offset -= mean * change
        pixels *= tf.cast(1 + change, compute)
    if dtype.is_integer:
        offset = tf.round(offset * UNITS) / UNITS
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
        written: "flip" or "altflip"; "crop" or "crop:PADDING" (pixels, default 4); "randaugment" or
        "randaugment:MAGNITUDE" or "randaugment:OPSxMAGNITUDE" (default 2x9, of at most 10x30);
        "saturation:STRENGTH" (default 0.4), "hue:STRENGTH" (0.1), "brightness:STRENGTH" (0.14) and
        "contrast:STRENGTH" (0.13); "cutout:SIZE" (pixels, 8); "erase:PROBABILITY" (0.25);
        "mixup:ALPHA" (0.2) and "cutmix:ALPHA" (1), of which each image takes one if both are there.
        "" or "none" is no augmentation.

    Returns:
      A function of (images [B, H, W, C], seed [2] int64) that returns augmented images, and that
      needs more where `needs_examples` or `needs_labels` says so; or None if there is nothing to
      do.

    Raises:
      ConfigError: if a part is unknown or repeated, its number is not one that the part can have,
        or if flip and altflip are both there.
    """
    parts = parse_augment(spec)
    return Augment(parts) if parts else None


@dataclasses.dataclass(frozen=True, eq=False)
class Augment:
    """Any of the augmentations in one function, as `make_augment` returns.

    Attributes:
      parts: what to do, as `parse_augment` returns.
    """

    parts: Mapping[str, Any]

    @property
    def needs_examples(self) -> bool:
        """Whether a call needs examples and epoch."""
        return "altflip" in self.parts

    @property
    def needs_labels(self) -> bool:
        """Whether a call needs labels and num_classes, and returns labels too."""
        return "mixup" in self.parts or "cutmix" in self.parts

    def __call__(
        self,
        images: Any,
        seed: Any,
        *,
        examples: Any = None,
        epoch: Any = None,
        labels: Any = None,
        num_classes: int | None = None,
    ) -> Any:
        """Augments a batch.

        Flip and crop are one gather, brightness and contrast one multiplication and addition.

        Args:
          images: [B, H, W, C], any dtype; with randaugment uint8.
          seed: [2] int64, (the run's seed, the step).
          examples: [B] integers, as `alternating_flip`; for others it does not matter.
          epoch: scalar, as `alternating_flip`; for others it does not matter.
          labels: [B] integers or [B, num_classes] probabilities, as `mixup`; for others they do not
            matter.
          num_classes: as `mixup`; for others it does not matter.

        Returns:
          [B, H, W, C] of the same dtype; but of integers, with saturation, hue, brightness,
          contrast or mixup among the parts, float32, not rounded and not clipped.  With mixup or
          cutmix, these and labels [B, num_classes] float32.

        Raises:
          ConfigError: if a number does not fit the images, or something that the parts need is
            missing.
          DataError: as `random_flip`, `alternating_flip`, `rand_augment` and `mixup`.
        """
        parts = self.parts
        image_sides(images)
        mixing = {name: parts[name] for name in ("mixup", "cutmix") if name in parts}
        if mixing and (labels is None or num_classes is None):
            raise ConfigError(
                f"{' and '.join(mixing)} must be given labels and num_classes, as ArrayBatches "
                "does, not only images and seed"
            )
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
        if "randaugment" in parts:
            ops, magnitude = parts["randaugment"]
            images = rand_augment(images, seed, magnitude=magnitude, ops=ops)
        # Rounded to bytes again, images would differ from real ones by just what a whitening layer
        # enlarges most.
        color = {name: parts[name] for name in ("saturation", "hue") if name in parts}
        if color:
            images = recolor(images, seed, rounded=False, **color)
        light = {name: parts[name] for name in ("brightness", "contrast") if name in parts}
        if light:
            images = _relight(images, seed, rounded=False, **light)
        if "cutout" in parts:
            images = cutout(images, seed, size=parts["cutout"])
        if "erase" in parts:
            images = random_erasing(images, seed, probability=parts["erase"])
        if num_classes is not None and mixing:
            return mix(images, labels, seed, num_classes=num_classes, alphas=mixing, rounded=False)
        return images


# The parts of a description, in the order in which they are applied, each with what it is unless
# said otherwise.
PARTS: Mapping[str, Any] = {
    "flip": 1,
    "altflip": 1,
    "crop": 4,
    "randaugment": (2, 9),
    "saturation": 0.4,
    "hue": 0.1,
    "brightness": 0.14,
    "contrast": 0.13,
    "cutout": 8,
    "erase": 0.25,
    "mixup": 0.2,
    "cutmix": 1.0,
}
# The largest number of each part that has a fraction.
_MOST = {
    "saturation": MOST_SATURATION,
    "hue": MOST_HUE,
    "brightness": _MOST_STRENGTH,
    "contrast": _MOST_STRENGTH,
    "erase": 1,
    "mixup": MOST_ALPHA,
    "cutmix": MOST_ALPHA,
}


def parse_augment(spec: str) -> dict[str, Any]:
    """Reads a description such as "flip,crop:4" into {"flip": 1, "crop": 4}.

    Returns:
      The parts by name: pixels as int, strengths as float, RandAugment as (ops, magnitude), and 1
      for a flip.

    Raises:
      ConfigError: as `make_augment`.
    """
    good = (
        'parts of "flip (or altflip),crop:PIXELS,randaugment:MAGNITUDE,saturation:STRENGTH,'
        "hue:STRENGTH,brightness:STRENGTH,contrast:STRENGTH,cutout:PIXELS,erase:PROBABILITY,"
        'mixup:ALPHA,cutmix:ALPHA", or "none"'
    )
    if not isinstance(spec, str):
        raise ConfigError(f"augment must be {good}, not {spec!r}")
    parts: dict[str, Any] = {}
    for text in [] if spec.strip() in ("", "none") else spec.split(","):
        name, colon, number = text.strip().partition(":")
        if name not in PARTS or name in parts or (colon and name in ("flip", "altflip")):
            raise ConfigError(f"augment must be {good}, not {spec!r}")
        parts[name] = _parse_number(name, number) if colon else PARTS[name]
    if "flip" in parts and "altflip" in parts:
        raise ConfigError(f"augment must have flip or altflip, not both as {spec!r}")
    return parts


def _parse_number(name: str, number: str) -> Any:
    if name == "randaugment":
        ops, _, magnitude = number.rpartition("x")
        is_whole = re.fullmatch(r"([0-9]{1,9}x)?[0-9]{1,9}", number)
        if not is_whole or int(magnitude) > MOST_MAGNITUDE or not 1 <= int(ops or 2) <= MOST_OPS:
            raise ConfigError(
                f"augment randaugment must be a magnitude in 0..{MOST_MAGNITUDE}, or with a number "
                f"of operations in 1..{MOST_OPS} before it, such as 2x9, not {number!r}"
            )
        return int(ops or 2), int(magnitude)
    if name in _MOST:
        if not re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", number) or float(number) > _MOST[name]:
            raise ConfigError(
                f"augment {name} must be a number in 0..{_MOST[name]:g}, not {number!r}"
            )
        return float(number)
    # Python does not read numbers of thousands of figures.
    if not (re.fullmatch(r"[0-9]{1,9}", number) and int(number) >= 1):
        raise ConfigError(f"augment {name} must be a whole number >= 1, not {number!r}")
    return int(number)
