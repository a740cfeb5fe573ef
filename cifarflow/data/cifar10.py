"""CIFAR-10, wherever it is on this machine: find, verify, decode, remember, or download.

    dataset = load_cifar10()            # searches, and downloads if nothing is found
    dataset = load_cifar10("~/data")    # this folder, archive, .npz or TFDS directory, or an error
    dataset.train.images                # [40000, 32, 32, 3] uint8
    dataset.validation.labels           # [10000] int32

Sources, in order: the argument; $CIFARFLOW_DATA; the project's cache; Keras's cache; a directory
prepared by TensorFlow Datasets; a download through TensorFlow Datasets.  A source that somebody
named (the first two) and that holds nothing is an error, and so is damaged data anywhere: only
what is not there at all is passed over.

Checksums are computed once.  The result is remembered in the project's cache by each file's number
(inode), size, times of change and what it was found to be, whatever names or links lead to it; and
formats that are slow to read leave a decoded copy there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cifarflow.data import cache as cache_lib
from cifarflow.data import download as download_lib
from cifarflow.data import formats
from cifarflow.data.splits import SPLIT_METHODS, Dataset, Split, split_validation
from cifarflow.errors import (
    ConfigError,
    DataNotFoundError,
    check_choice,
    check_float,
    check_int,
)

CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# Unpacking and decoding takes seconds; of these a decoded copy is kept, read in a moment.
_SLOW_KINDS = ("archive", "tfds")
_COPY_NAME = "cifar10.npz"
_DOWNLOAD_NAME = "cifar-10-binary.tar.gz"


def load_cifar10(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    verify: bool = True,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads CIFAR-10 from the first source that has it.

    Args:
      data_dir: a file or folder that holds CIFAR-10 in any known format; None searches.
      validation_fraction: share of the training set held out, from 0 to below 1.
      validation_split: "last" holds out the last images in file order (what Keras's
        `validation_split` does), "stratified" the same share of each class.
      seed: for "stratified".
      verify: whether to hold the data against the official checksums.
      download: whether a download may be tried when nothing is found.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache; None takes $CIFARFLOW_CACHE, else
        $XDG_CACHE_HOME/cifarflow, else ~/.cache/cifarflow.

    Returns:
      The data set: images [N, 32, 32, 3] uint8, labels [N] int32, always in the same order.

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if no source has the data, or one that was named holds none.
      DataError: if data was found and is damaged, incomplete, altered or unsafe.
    """
    check_float("validation_fraction", validation_fraction, maximum=1.0, below_maximum=True)
    check_choice("validation_split", validation_split, SPLIT_METHODS)
    check_int("seed", seed, minimum=0)
    check_float("download_timeout_seconds", download_timeout_seconds, above_minimum=True)
    for name, value in (("data_dir", data_dir), ("cache_dir", cache_dir)):
        if value is not None and not (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
            raise ConfigError(f"{name} must be the path of a file or folder, not {value!r}")

    cache = cache_lib.cache_folder(cache_dir)
    found = _find(data_dir, cache)
    if found is None:
        found = _download(cache, download, download_timeout_seconds)
    arrays = _read(found, cache, verify)
    train, validation = split_validation(
        arrays.train_images,
        arrays.train_labels,
        fraction=validation_fraction,
        how=validation_split,
        seed=seed,
    )
    test = Split(arrays.test_images, arrays.test_labels)
    return Dataset("cifar10", train, validation, test, CLASS_NAMES, str(found.path))


def _find(data_dir: str | os.PathLike[str] | None, cache: Path) -> formats.Found | None:
    named = [("data_dir", data_dir), ("CIFARFLOW_DATA", os.environ.get("CIFARFLOW_DATA"))]
    for name, value in named:
        if not value:
            continue
        found = formats.locate(Path(os.path.expanduser(value)))
        if found is None:
            raise DataNotFoundError(
                f"{name}={os.fspath(value)!r} holds no CIFAR-10; it should be the folder "
                f"cifar-10-batches-py or cifar-10-batches-bin, the .tar.gz of one, an .npz, a TFDS "
                f"directory, or the folder that holds one of them"
            )
        return found
    for _name, folder in _searched(cache):
        found = formats.locate(folder)
        if found is not None:
            return found
    return None


def _searched(cache: Path) -> Iterator[tuple[str, Path]]:
    """Yields the places to search when none was named, in order."""
    yield "the project's cache", cache
    keras_home = os.environ.get("KERAS_HOME") or "~/.keras"
    yield "Keras's cache", Path(os.path.expanduser(keras_home)) / "datasets"
    tfds_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    yield "the TFDS directory", Path(os.path.expanduser(tfds_dir))


def _download(cache: Path, allowed: bool, timeout_seconds: float) -> formats.Found:
    reason = "no download was allowed"
    if allowed:
        path = cache / _DOWNLOAD_NAME
        try:
            download_lib.download_archive(
                path, timeout_seconds=timeout_seconds, remote=download_lib.ARCHIVE
            )
            return formats.Found("archive", path, (path,))
        except download_lib.DownloadError as error:
            reason = f"the download failed: {error}"
    places = ", ".join(f"{name} ({folder})" for name, folder in _searched(cache))
    raise DataNotFoundError(
        f"CIFAR-10 was not found in {places}, and {reason}. To get it, either (1) name its place "
        f"with --data_dir=PATH or CIFARFLOW_DATA=PATH, (2) put cifar-10-python.tar.gz from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html into {cache}, or (3) run again "
        f"where there is a network. To try everything without CIFAR-10, use the "
        f"generated images: --data=standin"
    )


def _read(found: formats.Found, cache: Path, verify: bool) -> formats.Arrays:
    if not verify:
        return formats.read(found, verify=False)
    marks = _marks(found)
    is_known = cache_lib.is_verified(cache, marks)
    copy = formats.Found("npz", cache / _COPY_NAME, (cache / _COPY_NAME,))
    is_slow = found.kind in _SLOW_KINDS
    if is_slow and is_known:
        # Everything that passed verification has the same bytes, so the copy stands for it.
        # A copy that is gone or no longer as it was written is made anew below.
        with suppress(OSError):
            if cache_lib.is_verified(cache, _marks(copy)):
                return formats.read(copy, verify=False)
    arrays = formats.read(found, verify=not is_known)
    is_same = False
    with suppress(OSError):
        is_same = _marks(found) == marks
    # What was changed meanwhile may not be what was read, or not what was known.
    if is_known and not is_same:
        return formats.read(found)
    if not is_known and is_same:
        cache_lib.remember_verified(cache, marks)
    if is_slow:
        with suppress(OSError):  # no room or no right to write: the next load is slower, no more
            formats.write_npz(copy.path, arrays)
            cache_lib.remember_verified(cache, _marks(copy))
    return arrays


def _marks(found: formats.Found) -> list[cache_lib.Mark]:
    return cache_lib.fingerprint(formats.expected_of(found))
