"""A folder of pictures as a data set, each class a folder of its own.

    dataset = load_folder("~/flowers")                  # 32 x 32; its name is "flowers"
    dataset = load_folder("~/flowers", image_size=64)

Either the folder holds `train` and perhaps `test` and `val` (or `validation`), and each of these a
folder a class; or it holds the folders of the classes themselves.  Where there is no `test`, a
fifth of each class is held out for it, by one fixed draw; `source` says so.  A `val` that is there
is the validation split, whatever `validation_fraction` is.

What begins with a dot is passed over.  Every other file in the folder of a class must be a picture.
Images are in one fixed random order, so that the last ones are of all classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifarflow.data import copies
from cifarflow.data.cache import cache_folder
from cifarflow.data.formats import Arrays
from cifarflow.data.pictures import (
    DECODER_VERSION,
    PICTURE_BYTES_LIMIT,
    check_image_size,
    check_room,
    decode_pictures,
)
from cifarflow.data.sources import check_folders
from cifarflow.data.splits import Dataset, Split, check_split_options, split_validation
from cifarflow.errors import ConfigError, DataError, DataNotFoundError
from cifarflow.untrusted import read_bytes, reading, shown

# Of each class, where there is no test folder.
TEST_FRACTION = 0.2
_VALIDATION_NAMES = ("val", "validation")


class _Listing(NamedTuple):
    """The pictures of a split and their labels, in the order of the images."""

    paths: list[Path]
    labels: np.ndarray


def load_folder(
    data_dir: str | os.PathLike[str] | None,
    *,
    image_size: int = 32,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a folder of pictures.

    Args:
      data_dir: the folder.
      image_size: the side of the images; other pictures are cropped in the middle and resized.
      validation_fraction: share of the training set held out, from 0 to below 1; of no effect where
        there is a folder `val`.
      validation_split: "last" of a fixed random order, or "stratified".
      seed: for "stratified"; neither the order nor the test split depends on it.
      cache_dir: the project's cache, which keeps a decoded copy.

    Returns:
      The data set: images [N, image_size, image_size, 3] uint8, labels by the sorted names of the
      classes' folders; its name is that of the folder.

    Raises:
      ConfigError: if an argument is out of range, or a split would have no images.
      DataNotFoundError: if there is no such folder, or none of classes in it.
      DataError: if a file is no picture, a class has none, or one of `test` is not in `train`.
    """
    options = check_split_options(validation_fraction, validation_split, seed)
    size = check_image_size(image_size)
    check_folders(data_dir, cache_dir)
    if data_dir is None:
        raise ConfigError("data=folder needs data_dir, the folder of the pictures: --data_dir=PATH")
    folder = Path(os.path.expanduser(data_dir))
    if not folder.is_dir():
        raise DataNotFoundError(f"data_dir={os.fspath(data_dir)!r} is no folder")
    class_names, splits = _list(folder)
    # In the copy, the validation images stand at the end of the training images.
    train, validation, _ = splits
    paths = [path for split in splits for path in split.paths]
    held = len(train.paths) + len(validation.paths)
    check_room(repr(str(folder)), len(paths), size)
    labels = np.concatenate([split.labels for split in splits])

    def read(place: int) -> tuple[bytes, object]:
        name = repr(str(paths[place]))
        with reading(name):
            return read_bytes(paths[place], limit=PICTURE_BYTES_LIMIT), name

    def decode() -> Arrays:
        images = decode_pictures(read, len(paths), name=repr(str(folder)), size=size)
        return Arrays(images[:held], labels[:held], images[held:], labels[held:])

    def key() -> str:
        with reading(repr(str(folder))):
            return copies.fingerprint_of(paths, class_names, labels.tolist(), size, DECODER_VERSION)

    arrays = copies.read_or_decode(
        f"{folder.resolve()} at {size}",
        key,
        decode,
        folder=cache_folder(cache_dir),
        shape=(size, size, 3),
        examples=(held, len(paths) - held),
        num_classes=len(class_names),
    )
    count = len(train.paths)
    images, targets = arrays.train_images[:count], arrays.train_labels[:count]
    source = str(folder)
    test_split = Split(arrays.test_images, arrays.test_labels)
    if not len(test_split):
        rest, test_split = split_validation(
            images, targets, fraction=TEST_FRACTION, how="stratified"
        )
        images, targets = rest
        source += f" ({TEST_FRACTION:.0%} of each class held out for the test)"
    if validation.paths:
        train_split = Split(images, targets)
        validation_part = Split(arrays.train_images[count:], arrays.train_labels[count:])
    else:
        train_split, validation_part = split_validation(images, targets, **options)
    name = folder.resolve().name or "folder"
    return Dataset(name, train_split, validation_part, test_split, class_names, source)


def _list(folder: Path) -> tuple[tuple[str, ...], tuple[_Listing, _Listing, _Listing]]:
    """Returns the classes, and what is there to train on, validate on and test on."""
    with reading(repr(str(folder))):
        inside = _folders(folder)
        # A class may be called train; then there are pictures in it, and no folders.
        is_split = "train" in inside and bool(_folders(folder / "train"))
    if not is_split:
        names = _check_classes(folder, inside)
        # One of each class to train on and one to test on.
        train = _list_split(folder, names, names, least=2)
        return names, (train, _nothing(), _nothing())
    allowed = ("train", "test", *_VALIDATION_NAMES)
    others = [name for name in inside if name not in allowed]
    if others:
        raise DataError(
            f"{str(folder)!r} holds {shown(others[0])} beside train; expected {', '.join(allowed)}"
        )
    validations = [name for name in _VALIDATION_NAMES if name in inside]
    if len(validations) > 1:
        raise DataError(f"{str(folder)!r} holds val and validation, expected one of them")
    with reading(repr(str(folder))):
        names = _check_classes(folder / "train", _folders(folder / "train"))
    least = 1 if "test" in inside else 2
    listings = [_list_split(folder / "train", names, names, least=least)]
    for part in (validations[0] if validations else "", "test"):
        if part not in inside:
            listings.append(_nothing())
            continue
        with reading(repr(str(folder / part))):
            there = _folders(folder / part)
        unknown = [name for name in there if name not in names]
        if unknown:
            raise DataError(
                f"{str(folder / part)!r} holds the class {shown(unknown[0])}, which is not in train"
            )
        listing = _list_split(folder / part, there, names)
        if not listing.paths:
            raise DataError(f"{str(folder / part)!r} holds no pictures")
        listings.append(listing)
    train, validation, test = listings
    return names, (train, validation, test)


def _nothing() -> _Listing:
    return _Listing([], np.zeros(0, np.int32))


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )


def _check_classes(folder: Path, names: list[str]) -> tuple[str, ...]:
    if len(names) < 2:
        found = f"only {shown(names[0])}" if names else "none"
        raise DataNotFoundError(
            f"{str(folder)!r} should hold a folder a class, at least two, and has {found}"
        )
    return tuple(names)


def _list_split(
    folder: Path, there: Sequence[str], names: tuple[str, ...], *, least: int = 0
) -> _Listing:
    """Lists the pictures of the classes that are there, each of which has at least so many."""
    paths: list[Path] = []
    labels: list[int] = []
    for name in there:
        place = folder / name
        with reading(repr(str(place))):
            files = sorted(entry for entry in os.listdir(place) if entry[0] != ".")
        if len(files) < least:
            raise DataError(f"{str(place)!r} holds {len(files)} pictures, expected {least} or more")
        paths += [place / entry for entry in files]
        labels += [names.index(name)] * len(files)
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(paths))
    return _Listing([paths[row] for row in order], np.array(labels, np.int32)[order])
