"""Random whole numbers for augmentation: pure functions of a seed and of what they are for.

    seed = tf.constant([0, 17], tf.int64)  # (the run's seed, the step)
    shifts = draw(seed, CROP, [512, 2], 9) - 4

They are integers because those come out the same on every device.
"""

from __future__ import annotations

from typing import Any

from cifarflow.errors import DataError
from cifarflow.lazy import tf

# Each kind of draw has its own stream: adding a transform to a recipe leaves the others' draws
# as they were.
FLIP, CROP, CUTOUT_ROW, CUTOUT_COLUMN, BRIGHTNESS, CONTRAST, ALTFLIP = range(1, 8)
SATURATION, HUE, RANDAUGMENT, ERASE, ERASE_SIZE, ERASE_CORNER, ERASE_NOISE = range(8, 15)
MIX, MIX_KIND, MIX_ROW, MIX_COLUMN = range(15, 19)

# Factors and shifts are multiples of 1/4096.
UNITS = 4096


def draw(seed: Any, stream: int, shape: list[Any], limit: int) -> Any:
    """Uniform int32 in [0, limit), a pure function of (seed, stream).

    Args:
      seed: [2] int64.
      stream: what for, one of the constants above.
      shape: of the numbers.
      limit: 1..2**31-1.
    """
    # The generator is named because "auto" differs from device to device.
    seed = stream_seed(seed, stream)
    return tf.random.stateless_uniform(shape, seed, 0, limit, tf.int32, alg="philox")


def draw_bytes(seed: Any, stream: int, count: Any) -> Any:
    """Uniform uint8, [count], a pure function of (seed, stream)."""
    # Four in each number that the generator makes.
    words = tf.random.stateless_uniform(
        [(count + 3) // 4], stream_seed(seed, stream), None, None, tf.int32, alg="philox"
    )
    return tf.reshape(tf.bitcast(words, tf.uint8), [-1])[:count]


def stream_seed(seed: Any, stream: int) -> Any:
    """The seed [2] int64 of one stream of draws."""
    return tf.cast(seed, tf.int64) + tf.constant([stream << 40, 0], tf.int64)


def image_sides(images: Any) -> tuple[int, int]:
    """Height and width of a batch of images, which must be known when a graph is made.

    Raises:
      DataError: if images are not [B, H, W, C], or one of H, W and C is unknown.
    """
    shape = tf.TensorShape(getattr(images, "shape", None))
    if shape.rank != 4 or not shape[1:].is_fully_defined():
        raise DataError(
            f"images must be [B, H, W, C] with known height, width and channels, not {shape}"
        )
    return shape[1], shape[2]
