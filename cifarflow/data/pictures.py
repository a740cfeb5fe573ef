"""Picture files of any size and kind, to small images of one size.

    image = decode_picture(data, "cat.png", shape=(32, 32, 3))  # [32, 32, 3] uint8
    images = decode_pictures(read, names, size=32)              # [N, 32, 32, 3], two at a time

The one way from a picture to pixels: a model that was trained on a folder is given by `read_image`
what it was trained on.  A picture is turned as its camera says, transparent parts become white, of
16 bits the upper eight are taken, of an animation the first frame.  One that has the size already
keeps its pixels; of any other the middle is cut out in the proportions wanted and resized by
bicubic interpolation with antialiasing, as the images of CIFAR-10 were.

Whoever wrote the file may be an enemy: what its header claims is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.untrusted import reading

# Raised whenever other pixels come of the same file, so that no copy of the old ones is taken.
DECODER_VERSION = 2
# What `Image.open` may take a file for: formats of few surprises.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
MOST_SIZE = 1024
# What a very good camera makes; 64 million pixels take a second or two to decode.
PICTURE_BYTES_LIMIT = 64_000_000
_PIXELS_LIMIT = 64_000_000
# All images of a set, which are kept in memory.
_IMAGES_BYTES_LIMIT = 8_000_000_000
_PART = 100
# By EXIF's orientation, what brings a picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_image_size(value: object) -> int:
    """Returns `value` if images can have that side.

    Raises:
      ConfigError: if it is no whole number from 1 to 1024.
    """
    size = check_int("image_size", value)
    if size > MOST_SIZE:
        raise ConfigError(f"image_size must be at most {MOST_SIZE}, not {value!r}")
    return size


def decode_picture(data: bytes, name: object, *, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes one picture.

    Args:
      data: the file's bytes.
      name: what to call it in messages.
      shape: (H, W, C) of the image to make; C is 3 for colours or 1 for grey.

    Returns:
      [H, W, C] uint8.

    Raises:
      DataError: if it is no picture, damaged, cut short, or larger than a picture should be.
    """
    if len(data) > PICTURE_BYTES_LIMIT:
        raise DataError(f"{name} has {len(data)} bytes, expected at most {PICTURE_BYTES_LIMIT}")
    height, width, channels = shape
    with reading(name, failing="is no picture that can be read"):
        try:
            # Only the header is read here.
            picture: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
        with picture:
            if picture.width * picture.height > _PIXELS_LIMIT:
                raise DataError(
                    f"{name} claims {picture.width} x {picture.height} pixels, "
                    f"expected at most {_PIXELS_LIMIT}"
                )
            picture.load()
            upright = _as_colours(_turned(picture))
        # Pillow takes all the pixels that become one into account.
        fitted = ImageOps.fit(
            upright.convert("RGB" if channels == 3 else "L"),
            (width, height),
            method=Image.Resampling.BICUBIC,
        )
        return np.asarray(fitted, np.uint8).reshape(shape)


def _turned(picture: Any) -> Any:
    """The picture as it was seen, where its camera noted how it was held."""
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:
        # Damaged notes, for which Pillow has many errors, say nothing about the picture.
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _as_colours(picture: Any) -> Any:
    """The picture in 8 bits a channel, on white where it is transparent."""
    if picture.mode.startswith("I"):
        # Grey in 16 bits, of which Pillow would keep the lower eight.
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture)


def decode_pictures(
    read: Callable[[int], tuple[bytes, object]], count: int, *, name: object, size: int
) -> np.ndarray:
    """Decodes many pictures.

    Args:
      read: returns the bytes of the picture at a place, and what to call it.
      count: how many there are.
      name: what to call them all.
      size: the side of the images to make.

    Returns:
      [count, size, size, 3] uint8.

    Raises:
      DataError: see `decode_picture`; or if there are more than memory should hold.
    """
    check_room(name, count, size)
    images = np.empty((count, size, size, 3), np.uint8)

    def decode_part(start: int) -> None:
        for place in range(start, min(start + _PART, count)):
            data, picture = read(place)
            images[place] = decode_picture(data, picture, shape=(size, size, 3))

    # Pillow warns of odd palettes and broken EXIF, which do no harm here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Decoding releases the GIL, so two threads halve the time.
        with ThreadPoolExecutor(max_workers=2) as pool:
            # In parts: a task a picture would take as long as a small one.
            starts = range(0, count, _PART)
            list(pool.map(decode_part, starts))
    return images


def check_room(name: object, count: int, size: int) -> None:
    """Checks that so many images are no more than memory should hold.

    Raises:
      DataError: if they are.
    """
    needed = count * size * size * 3
    if needed > _IMAGES_BYTES_LIMIT:
        raise DataError(
            f"{name} has {count} images, which at {size} x {size} take {needed / 1e9:.1f} GB, "
            f"expected at most {_IMAGES_BYTES_LIMIT / 1e9:.0f} GB: give a smaller image_size"
        )
