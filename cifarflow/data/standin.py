"""The stand-in set: ten classes of drawn 32x32 images for machines without CIFAR-10.

    arrays = make_standin(seed=0)  # 10,000 training and 2,000 test images
    dataset = load_standin()       # the same with a validation split, kept in the cache
    CLASS_NAMES                    # ("disk", "ring", "square", ...)

Each image is one shape or pattern of random place, size, angle and colours before a cluttered
background, partly covered, in noise.  What makes it hard is what makes photographs hard, not false
labels: low contrast, small and covered shapes, in-between builds (a bent square is nearly a star).

`python examples/train.py --data=standin --recipe=lab_mlp` ends at a test accuracy of 0.427,
`--recipe=lab_cnn` at 0.813 (seed 0, float32 and bfloat16).
"""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np

from cifarflow.data import formats
from cifarflow.data.cache import cache_folder
from cifarflow.data.splits import Dataset, Split, split_validation
from cifarflow.errors import DataError, check_int

TRAIN_EXAMPLES = 10_000
TEST_EXAMPLES = 2_000
CLASS_NAMES = (
    "disk",
    "ring",
    "square",
    "triangle",
    "cross",
    "star",
    "crescent",
    "stripes",
    "checks",
    "dots",
)

# Part of the cached file's name: to be raised whenever the images change.
VERSION = 1
FILE_NAME = f"standin-v{VERSION}.npz"
# Of the arrays of seed 0, see `formats.digest`.
ARRAYS_SHA256 = "6b37629d2e8cb123111b7cd25e1583c5d83bc97ee57ab8545e28ca42c9dde0a9"

# Everything is drawn in whole numbers, so that each machine draws the same bytes: lengths in
# 1/64 pixel on the image, and in 1/256 of its radius within a shape.
_PIXEL = 64
_RADIUS = 256
_SIZE = 32
_PART = 1000  # examples drawn at a time

_MIN_RADIUS, _MAX_RADIUS = 6.5, 12.5  # pixels
_MAX_TURN = 32  # of 256, either way
_REACH = 14.0  # pixels
_MIN_CONTRAST, _MAX_CONTRAST = 30, 120  # of 255
_MIN_NOISE, _MAX_NOISE = 10, 60  # of 255
_CLUTTER, _COVERS = 2, 2  # boxes behind and before the shape


def make_standin(seed: int = 0) -> formats.Arrays:
    """Draws the stand-in set.

    Args:
      seed: another seed gives other images of the same kind.

    Returns:
      Images [10000, 32, 32, 3] and [2000, 32, 32, 3] uint8, labels int32; each class equally
      often in both, in random order.

    Raises:
      ConfigError: if `seed` is not a whole number of at least 0.
    """
    seed = check_int("seed", seed, minimum=0)
    generator = np.random.Generator(np.random.PCG64(seed))
    train_labels = _balanced_labels(generator, TRAIN_EXAMPLES)
    test_labels = _balanced_labels(generator, TEST_EXAMPLES)
    # In parts, to need 50 MB and not 600.
    labels = np.concatenate([train_labels, test_labels])
    parts = np.split(labels, range(_PART, len(labels), _PART))
    images = np.concatenate([_draw(generator, part) for part in parts])
    return formats.Arrays(
        images[:TRAIN_EXAMPLES], train_labels, images[TRAIN_EXAMPLES:], test_labels
    )


def load_standin(
    *,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads the stand-in set (of seed 0), from the cache if it was drawn before.

    Args:
      validation_fraction: share of the training set held out, from 0 to below 1.
      validation_split: "last" or "stratified".
      seed: for "stratified"; the images do not depend on it.
      cache_dir: the project's cache.

    Raises:
      ConfigError: if an argument is out of range.
    """
    path = cache_folder(cache_dir) / FILE_NAME
    try:
        arrays = formats.read_npz(path, train_examples=TRAIN_EXAMPLES, test_examples=TEST_EXAMPLES)
    except DataError:  # not drawn yet, or damaged
        arrays = make_standin()
        with suppress(OSError):  # a cache that cannot be written costs two seconds a run
            formats.write_npz(path, arrays)
    train, validation = split_validation(
        arrays.train_images,
        arrays.train_labels,
        fraction=validation_fraction,
        how=validation_split,
        seed=seed,
    )
    test = Split(arrays.test_images, arrays.test_labels)
    return Dataset("standin", train, validation, test, CLASS_NAMES, "generated images")


def _balanced_labels(generator: np.random.Generator, count: int) -> np.ndarray:
    labels = np.arange(count, dtype=np.int32) % len(CLASS_NAMES)
    return generator.permutation(labels)


def _uniform(generator: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    """Whole numbers from `low` to `high`, both included, as int32."""
    return generator.integers(int(low), int(high), shape, np.int32, endpoint=True)


def _draw(generator: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Draws one image a label: [N] int32 to [N, 32, 32, 3] uint8."""
    count = len(labels)
    canvas = _background(generator, count)
    contrast = _uniform(generator, _MIN_CONTRAST, _MAX_CONTRAST, count, 1, 1, 1)
    middle = _uniform(generator, 70, 185, count, 1, 1, 3)
    wobble = _uniform(generator, -30, 30, count, 1, 1, 3)
    # The shape is always the lighter one. With both ways by chance the MLP stays at 19 % and
    # the CNN needs more than its five epochs to find a first edge.
    canvas += (middle - contrast // 2).astype(np.int16)
    colour = (middle + contrast // 2 + wobble).astype(np.int16)
    _boxes(generator, canvas, _CLUTTER)
    cover = _coverage(generator, labels)[..., np.newaxis]
    canvas += ((colour - canvas).astype(np.int32) * cover // _PIXEL).astype(np.int16)
    _boxes(generator, canvas, _COVERS)
    _add_noise(generator, canvas)
    return np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)


def _background(generator: np.random.Generator, count: int) -> np.ndarray:
    """A colour ramp of random direction and strength: [N, 32, 32, 3] int16 around 0."""
    ramp = np.arange(_SIZE, dtype=np.int16) * 2 - (_SIZE - 1)
    slope_x = _uniform(generator, -16, 16, count, 1, 1, 3).astype(np.int16)
    slope_y = _uniform(generator, -16, 16, count, 1, 1, 3).astype(np.int16)
    return (slope_x * ramp[:, np.newaxis] + slope_y * ramp[:, np.newaxis, np.newaxis]) // 16


def _boxes(generator: np.random.Generator, canvas: np.ndarray, boxes: int) -> None:
    """Paints small boxes of random colours over every image."""
    count = len(canvas)
    grid = np.arange(_SIZE, dtype=np.int8)
    for _ in range(boxes):
        left, top = (_uniform(generator, -2, 31, count, 1).astype(np.int8) for _ in range(2))
        width, height = (_uniform(generator, 2, 8, count, 1).astype(np.int8) for _ in range(2))
        in_x = (grid >= left) & (grid < left + width)
        in_y = (grid >= top) & (grid < top + height)
        inside = (in_y[:, :, np.newaxis] & in_x[:, np.newaxis, :])[..., np.newaxis]
        colour = _uniform(generator, 20, 235, count, 1, 1, 3).astype(np.int16)
        np.copyto(canvas, colour, where=inside)


def _add_noise(generator: np.random.Generator, canvas: np.ndarray) -> None:
    """Adds noise of a strength drawn for each image."""
    strength = _uniform(generator, _MIN_NOISE, _MAX_NOISE, len(canvas), 1, 1, 1).astype(np.int16)
    # The sum of two bytes is triangular, near enough to a bell, and the same on every machine
    # (a normal draw goes through the platform's exp and log).
    bell = np.zeros(canvas.shape, np.int16)
    for _ in range(2):
        noise = np.frombuffer(generator.bytes(canvas.size), np.uint8)
        bell += (noise.reshape(canvas.shape) >> 1).astype(np.int16)
    canvas += ((bell - 127) * strength) >> 7


def _coverage(generator: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers: [N, 32, 32] int32, 0..64."""
    count = len(labels)
    radius = _uniform(generator, _MIN_RADIUS * _PIXEL, _MAX_RADIUS * _PIXEL, count)
    reach = int(_REACH * _PIXEL) - radius  # how far the centre may be off, so that most is in sight
    centre_x, centre_y = (
        _uniform(generator, -(1 << 15), 1 << 15, count) * reach >> 15 for _ in range(2)
    )
    turn = 2 * np.pi * _uniform(generator, -_MAX_TURN, _MAX_TURN, count) / 256
    scale = 1024 * _RADIUS / radius
    across = np.rint(np.cos(turn) * scale).astype(np.int32)
    along = np.rint(np.sin(turn) * scale).astype(np.int32)
    variant = _uniform(generator, 0, 255, count)

    grid = (2 * np.arange(_SIZE, dtype=np.int32) - (_SIZE - 1)) * (_PIXEL // 2)
    coverage = np.empty((count, _SIZE, _SIZE), np.int32)
    for label, distance_fn in enumerate(_SHAPES):
        rows = np.flatnonzero(labels == label)
        column = (slice(None), np.newaxis, np.newaxis)
        x = grid - centre_x[rows][column]
        y = grid[:, np.newaxis] - centre_y[rows][column]
        a, b = across[rows][column], along[rows][column]
        u, v = (a * x + b * y) >> 10, (a * y - b * x) >> 10
        depth = distance_fn(u, v, variant[rows][column])
        in_pixels = (depth * radius[rows][column]) // _RADIUS
        coverage[rows] = np.clip(in_pixels + _PIXEL // 2, 0, _PIXEL)
    return coverage


# --- the shapes: how deep a point lies inside, in 1/256 of the radius, negative outside -------
#
# u and v are the point in the shape's own turned frame, `variant` (0..255) its random build.


def _length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # The square root is exact by IEEE 754, so the same on every machine.
    return np.sqrt((u * u + v * v).astype(np.float64)).astype(np.int32)


def _disk(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    squeeze = 256 + variant // 2  # up to an ellipse of 3 : 2
    return 240 - _length(u, v * squeeze // 256)


def _ring(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    length = _length(u, v)
    return np.minimum(250 - length, length - (70 + variant // 2))


def _square(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    squeeze = 256 + variant // 2
    return 200 - np.maximum(np.abs(u), np.abs(v) * squeeze // 256)


def _triangle(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    sides = np.abs(u) * 887 // 1024 - v // 2
    return np.minimum(130 - sides, 130 - v)


def _cross(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    u, v, arm = np.abs(u), np.abs(v), 50 + variant // 4
    return np.maximum(np.minimum(arm - u, 250 - v), np.minimum(arm - v, 250 - u))


def _star(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    bend = np.sqrt((u * v).astype(np.float64)).astype(np.int32)
    return (280 - u - v - bend * (160 + variant) // 256) // 2


def _crescent(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    bite = _length(u - 110 - variant // 4, v) - 190
    return np.minimum(250 - _length(u, v), bite)


def _wave(u: np.ndarray, variant: np.ndarray) -> np.ndarray:
    """A triangle wave between -period / 4 and period / 4."""
    period = 130 + variant // 2
    return np.abs(u % period - period // 2) - period // 4


def _patch(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    """The outline of a pattern: round or square by chance, so that it tells nothing."""
    return np.where(variant % 2 == 0, 256 - _length(u, v), 225 - np.maximum(np.abs(u), np.abs(v)))


def _stripes(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    return np.minimum(_patch(u, v, variant), _wave(u, variant))


def _checks(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    wave_u, wave_v = _wave(u, variant), _wave(v, variant)
    both = np.minimum(np.abs(wave_u), np.abs(wave_v))
    return np.minimum(_patch(u, v, variant), np.where((wave_u < 0) == (wave_v < 0), both, -both))


def _dots(u: np.ndarray, v: np.ndarray, variant: np.ndarray) -> np.ndarray:
    period = 130 + variant // 2
    dot = period * 3 // 10 - _length(u % period - period // 2, v % period - period // 2)
    return np.minimum(_patch(u, v, variant), dot)


# In the order of CLASS_NAMES.
_SHAPES = (
    _disk,
    _ring,
    _square,
    _triangle,
    _cross,
    _star,
    _crescent,
    _stripes,
    _checks,
    _dots,
)
