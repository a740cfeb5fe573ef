"""Picture files of any size and kind, to small RGB images of one size.

    image = decode_picture(data, "cat.png", size=32)   # [32, 32, 3] uint8
    images = decode_pictures(read, names, size=32)     # [N, 32, 32, 3], two at a time

A picture that has the size already keeps its pixels; any other is cropped to the square in its
middle and resized to it by bicubic interpolation with antialiasing.  Grey becomes RGB, an alpha
channel is dropped, of an animation the first frame is taken.

Whoever wrote the file may be an enemy: what its header claims is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.untrusted import reading

# What `Image.open` may take a file for: formats of few surprises.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
MOST_SIZE = 1024
# What a good camera makes: 6000 x 6000 pixels, which take a second to decode.
PICTURE_BYTES_LIMIT = 64_000_000
_PIXELS_LIMIT = 36_000_000
# All images of a set, which are kept in memory.
_IMAGES_BYTES_LIMIT = 8_000_000_000
_PART = 100
# Of 8 bits a channel; what has more would have to be scaled by somebody who knows it.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")


def check_image_size(value: object) -> int:
    """Returns `value` if images can have that side.

    Raises:
      ConfigError: if it is no whole number from 1 to 1024.
    """
    size = check_int("image_size", value)
    if size > MOST_SIZE:
        raise ConfigError(f"image_size must be at most {MOST_SIZE}, not {value!r}")
    return size


def decode_picture(data: bytes, name: object, *, size: int) -> np.ndarray:
    """Decodes one picture.

    Args:
      data: the file's bytes.
      name: what to call it in messages.
      size: the side of the image to make.

    Returns:
      [size, size, 3] uint8.

    Raises:
      DataError: if it is no picture, damaged, cut short, or larger than a picture should be.
    """
    if len(data) > PICTURE_BYTES_LIMIT:
        raise DataError(f"{name} has {len(data)} bytes, expected at most {PICTURE_BYTES_LIMIT}")
    with reading(name, failing="is no picture that can be read"):
        # Only the header is read here.
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > _PIXELS_LIMIT:
                raise DataError(
                    f"{name} claims {width} x {height} pixels, expected at most {_PIXELS_LIMIT}"
                )
            if picture.mode not in _MODES:
                raise DataError(f"{name} has pixels of kind {picture.mode!r}, expected 8 bits each")
            rgb = picture.convert("RGB")
        if rgb.size != (size, size):
            side = min(rgb.size)
            left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
            square = (left, top, left + side, top + side)
            # Not as the box of `resize`, which looks at pixels beside it too.
            rgb = rgb.crop(square).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(rgb)


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
            images[place] = decode_picture(data, picture, size=size)

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
