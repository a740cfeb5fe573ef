"""Ordinary image files of any size, as a model takes them.

    image = read_image("holiday.jpg", image_shape=(32, 32, 3))  # [32, 32, 3] uint8

The pixels are those that `load_folder` trains on, see `cifarflow.data.pictures`.
"""

from __future__ import annotations

import os
import pathlib
import warnings

import numpy as np

from cifarflow.data.pictures import PICTURE_BYTES_LIMIT, decode_picture
from cifarflow.errors import ConfigError, DataError
from cifarflow.untrusted import read_bytes, reading


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
    channels = image_shape[2]
    if channels not in (1, 3):
        raise ConfigError(f"a picture has 3 channels, or 1 if grey, and the model wants {channels}")
    file = pathlib.Path(os.path.expanduser(path))
    name = f"image {str(file)!r}"
    with reading(name):
        try:
            data = read_bytes(file, limit=PICTURE_BYTES_LIMIT)
        except FileNotFoundError:
            raise DataError(f"there is no image {str(file)!r}") from None
    with warnings.catch_warnings():
        # Those of odd palettes and metadata, which say nothing about the picture.
        warnings.simplefilter("ignore")
        return decode_picture(data, name, shape=image_shape)
