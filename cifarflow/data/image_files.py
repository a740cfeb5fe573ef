"""Ordinary image files of any size, as a model takes them.

    image = read_image("holiday.jpg", image_shape=(32, 32, 3))  # [32, 32, 3] uint8

The middle of the picture is cut out in the model's proportions and made small with antialiasing, as
the images of CIFAR-10 were.  Nothing a file claims is believed: a picture of too many pixels is
refused before it is unpacked.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cifarflow.errors import ConfigError, DataError
from cifarflow.untrusted import open_file, reading

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
# A camera has 50 million; they take four bytes each while they are read.
_MOST_PIXELS = 100_000_000


def read_image(
    path: str | os.PathLike[str], *, image_shape: tuple[int, int, int] = (32, 32, 3)
) -> np.ndarray:
    """Reads a picture, turned as its camera says, cropped to its middle and resized.

    Transparent parts become white; of an animation the first picture counts.

    Args:
      path: a PNG, JPEG, BMP, GIF or WebP file.
      image_shape: (H, W, C) to make of it; C is 3 for colours or 1 for grey.

    Returns:
      [H, W, C] uint8.

    Raises:
      ConfigError: if C is neither 3 nor 1.
      DataError: if there is no such file, or it is no such picture, damaged or too large.
    """
    height, width, channels = image_shape
    if channels not in (1, 3):
        raise ConfigError(f"a picture has 3 channels, or 1 if grey, and the model wants {channels}")
    file = pathlib.Path(os.path.expanduser(path))
    with reading(f"image {str(file)!r}"), warnings.catch_warnings():
        # Pillow's own warning of too many pixels, which the size below refuses; and those of
        # odd metadata, which say nothing about the picture.
        warnings.simplefilter("ignore")
        try:
            opened = open_file(file)
        except FileNotFoundError:
            raise DataError(f"there is no image {str(file)!r}") from None
        with opened:
            try:
                picture: Any = Image.open(opened, formats=FORMATS)
            except Image.UnidentifiedImageError:
                raise ValueError(f"it is no picture; {', '.join(FORMATS)} are read") from None
            except Image.DecompressionBombError:
                raise ValueError(f"it has more than {_MOST_PIXELS} pixels") from None
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(
                    f"it has {picture.width}x{picture.height} pixels, "
                    f"expected at most {_MOST_PIXELS} together"
                )
            picture = _as_colours(ImageOps.exif_transpose(picture))
        picture = picture.convert("RGB" if channels == 3 else "L")
        # Pillow takes all the pixels that become one into account.
        fitted = ImageOps.fit(picture, (width, height), method=Image.Resampling.BICUBIC)
        return np.asarray(fitted, np.uint8).reshape(height, width, channels)


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
