"""Random saturation and hue: pure functions of a seed, a whole batch at a time.

    images = random_saturation(images, seed, strength=0.4)
    images = random_hue(images, seed, strength=0.1)

Both are made of differences, products and the larger of two, exact for uint8 images: the same
bytes on every device.
"""

from __future__ import annotations

from typing import Any

from cifarflow.data.draws import HUE, SATURATION, draw, image_sides
from cifarflow.errors import ConfigError, check_float
from cifarflow.lazy import tf

# A saturation is in steps of 1/256 and a hue in steps of a 384th of the circle.  Both together of
# bytes, (1 + saturation) * (hue - grey), are then less than 2**9 in units of 2**-14: float32 holds
# them as they are.
_SATURATION_UNITS, _HUE_UNITS = 256, 384
MOST_SATURATION, MOST_HUE = 1.0, 0.5


def random_saturation(images: Any, seed: Any, *, strength: float = 0.4) -> Any:
    """Makes the colours of each image paler or stronger.

    A pixel's distance from its grey is multiplied by a factor that is uniform within 1 +- strength,
    in steps of 1/256, one an image.  The grey of integers is rounded.

    Args:
      images: [B, H, W, 3], any dtype, on the 0..255 scale.
      seed: [2] int64.
      strength: 0..1; 0 changes nothing.

    Returns:
      [B, H, W, 3] of the same dtype; integers are rounded, half up, and clipped to the range of
      their dtype.

    Raises:
      ConfigError: if strength is not a number within that range, or there are not 3 channels.
      DataError: as `random_flip`.
    """
    strength = check_float("saturation strength", strength, maximum=MOST_SATURATION)
    return recolor(images, seed, saturation=strength)


def random_hue(images: Any, seed: Any, *, strength: float = 0.1) -> Any:
    """Turns the colours of each image around the circle of hues.

    The angle is uniform within +- strength of the whole circle, in 384ths of it, one an image; the
    largest and the smallest of a pixel's three values stay what they are, as in HSV.

    Args:
      images: [B, H, W, 3], any dtype, on the 0..255 scale.
      seed: [2] int64.
      strength: 0..0.5; 0 changes nothing.

    Returns:
      [B, H, W, 3] of the same dtype, rounded and clipped as `random_saturation` does.

    Raises:
      ConfigError: if strength is not a number within that range, or there are not 3 channels.
      DataError: as `random_flip`.
    """
    return recolor(images, seed, hue=check_float("hue strength", strength, maximum=MOST_HUE))


def recolor(
    images: Any, seed: Any, *, saturation: float = 0, hue: float = 0, rounded: bool = True
) -> Any:
    """Saturation and hue in one.

    Args:
      images: [B, H, W, 3].
      seed: [2] int64.
      saturation: as `random_saturation`.
      hue: as `random_hue`.
      rounded: whether integers are rounded and clipped, once; or not, and become float32.
    """
    height, width = image_sides(images)
    if images.shape[3] != 3:
        raise ConfigError(
            f"saturation and hue need images of 3 channels, red, green and blue, "
            f"not {images.shape[3]}"
        )
    batch, dtype = tf.shape(images)[0], tf.as_dtype(images.dtype)
    compute = compute_dtype(dtype)
    # A plane a channel: an axis of three numbers is slow to broadcast along.
    flat = tf.reshape(images, [-1, height * width, 3])
    red, green, blue = planes = [tf.cast(plane, compute) for plane in tf.unstack(flat, axis=2)]

    def drawn(stream: int, strength: float, units: int) -> Any:
        most = round(strength * units)
        return tf.cast(draw(seed, stream, [batch, 1], 2 * most + 1) - most, compute)

    grey = (77 * red + 150 * green + 29 * blue) / 256
    if dtype.is_integer:
        grey = tf.floor(grey + 0.5)
    if hue:
        planes = _turn(red, green, blue, drawn(HUE, hue, _HUE_UNITS) * (6 / _HUE_UNITS))
    if saturation:
        # About the grey from before the turn: to turn what is stretched comes to the same.
        factor = 1 + drawn(SATURATION, saturation, _SATURATION_UNITS) / _SATURATION_UNITS
        planes = [grey + factor * (plane - grey) for plane in planes]
    pixels = tf.reshape(tf.stack(planes, axis=2), tf.shape(images))
    if dtype.is_integer and rounded:
        pixels = tf.clip_by_value(tf.floor(pixels + 0.5), dtype.min, dtype.max)
    elif dtype.is_integer:
        dtype = tf.float32
    return tf.ensure_shape(tf.cast(pixels, dtype), images.shape)


def compute_dtype(dtype: Any) -> Any:
    """In which dtype pixels of another are computed with."""
    # One byte, or half a float, is exact in float32; anything else may need all of float64.
    if dtype.size == 1 or dtype in (tf.float16, tf.bfloat16, tf.float32):
        return tf.float32
    return tf.float64


def _turn(red: Any, green: Any, blue: Any, sixths: Any) -> list[Any]:
    """Turns the hue by so many sixths of the circle, -3..3.

    With H the hue in sixths, V the largest and c = V - smallest, HSV has a channel as
    V - c * clip(2 - distance(H + n, 2), 0, 1), n = 5, 3, 1, the distance being along the circle.
    All of it is multiplied by c here, so that there is no division by it.
    """
    high = tf.maximum(tf.maximum(red, green), blue)
    chroma = high - tf.minimum(tf.minimum(red, green), blue)
    hue = tf.where(
        high == red,
        green - blue,
        tf.where(high == green, blue - red + 2 * chroma, red - green - 2 * chroma),
    )
    hue += sixths * chroma
    turned = []
    for offset in (3, 1, -1):
        way = tf.abs(hue + offset * chroma)  # up to 9 sixths: once around at most
        way = tf.minimum(way, tf.abs(way - 6 * chroma))
        turned.append(high - tf.clip_by_value(2 * chroma - way, 0, chroma))
    return turned
