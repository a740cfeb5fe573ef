"""CIFAR-10 or CIFAR-100, wherever it is on this machine: find, read, remember, or download.

    found = search(CIFAR10, data_dir=None, cache=cache_folder())    # None if it is nowhere
    arrays, source = load(CIFAR100, "~/data", verify=True)

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
from typing import NamedTuple

from cifarflow.data import cache as cache_lib
from cifarflow.data import download as download_lib
from cifarflow.data import formats
from cifarflow.data.layouts import LAYOUTS, Layout
from cifarflow.errors import ConfigError, DataError, DataNotFoundError, check_float

# Unpacking and decoding takes seconds; of these a decoded copy is kept, read in a moment.
_SLOW_KINDS = ("archive", "tfds")


class Place(NamedTuple):
    """Where a data set is looked for.

    Attributes:
      name: what to call it.
      path: the file or folder.
      is_named: whether somebody named it: then there is no looking further.
    """

    name: str
    path: Path
    is_named: bool


def places(data_dir: str | os.PathLike[str] | None, cache: Path) -> Iterator[Place]:
    """Yields the places where a data set is looked for, in order.

    Args:
      data_dir: what the caller named.
      cache: the project's cache.
    """
    named = [("data_dir", data_dir), ("CIFARFLOW_DATA", os.environ.get("CIFARFLOW_DATA"))]
    for name, value in named:
        if value:
            yield Place(name, Path(os.path.expanduser(value)), True)
    yield Place("the project's cache", cache, False)
    keras_home = os.environ.get("KERAS_HOME") or "~/.keras"
    yield Place("Keras's cache", Path(os.path.expanduser(keras_home)) / "datasets", False)
    yield Place("the TFDS directory", tfds_folder(), False)


def tfds_folder() -> Path:
    """Returns where TFDS keeps what it has prepared."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def check_folders(
    data_dir: str | os.PathLike[str] | None, cache_dir: str | os.PathLike[str] | None
) -> None:
    """Checks paths that a caller gives.

    Raises:
      ConfigError: if one is no path.
    """
    for name, value in (("data_dir", data_dir), ("cache_dir", cache_dir)):
        if value is not None and not (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
            raise ConfigError(f"{name} must be the path of a file or folder, not {value!r}")


def load(
    layout: Layout,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    verify: bool = True,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[formats.Arrays, str]:
    """Loads a data set from the first source that has it.

    Args:
      layout: of the set.
      data_dir: a file or folder that holds it in any known format; None searches.
      verify: whether to hold the data against the official checksums.
      download: whether a download may be tried when nothing is found.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache; None takes $CIFARFLOW_CACHE, else
        $XDG_CACHE_HOME/cifarflow, else ~/.cache/cifarflow.

    Returns:
      The arrays, and where they come from.

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if no source has the data, or one that was named holds none.
      DataError: if data was found and is damaged, incomplete, altered, unsafe or of another set.
    """
    check_float("download_timeout_seconds", download_timeout_seconds, above_minimum=True)
    check_folders(data_dir, cache_dir)
    cache = cache_lib.cache_folder(cache_dir)
    found = search(layout, data_dir, cache)
    if found is None:
        found = _download(layout, cache, download, download_timeout_seconds)
    return _read(found, cache, verify), str(found.path)


def search(
    layout: Layout, data_dir: str | os.PathLike[str] | None, cache: Path
) -> formats.Found | None:
    """Finds a data set in the first place that has it; nothing is read yet.

    Args:
      layout: of the set.
      data_dir: what the caller named.
      cache: the project's cache.

    Returns:
      What was found, or None if it is nowhere.

    Raises:
      DataNotFoundError: if a place that was named holds none.
      DataError: if one holds another set, or files of the set are missing.
    """
    for place in places(data_dir, cache):
        found = look_into(place, layout)
        if found is not None:
            return found
    return None


def look_into(place: Place, layout: Layout) -> formats.Found | None:
    """Looks for a data set in one place.

    Raises:
      DataNotFoundError: if the place was named and holds none.
      DataError: if it holds another set, or files of the set are missing.
    """
    found = formats.locate(place.path, layout)
    if found is not None or not place.is_named:
        return found
    given = f"{place.name}={str(place.path)!r}"
    for other in LAYOUTS.values():
        with suppress(DataError):
            if formats.locate(place.path, other) is not None:
                raise DataNotFoundError(formats.mistaken(given, other, layout))
    raise DataNotFoundError(
        f"{given} holds no {layout.title}; it should be the folder {layout.python_folder} or "
        f"{layout.binary_folder}, the .tar.gz of one, an .npz, a TFDS directory, or the folder "
        f"that holds one of them"
    )


def _download(layout: Layout, cache: Path, allowed: bool, timeout_seconds: float) -> formats.Found:
    python_archive, binary_archive = layout.archive_names
    reason = "no download was allowed"
    if allowed:
        path = cache / binary_archive
        try:
            download_lib.download_archive(
                path, remote=layout.remote, title=layout.title, timeout_seconds=timeout_seconds
            )
            return formats.Found("archive", path, (path,), layout)
        except download_lib.DownloadError as error:
            reason = f"the download failed: {error}"
    searched = ", ".join(f"{place.name} ({place.path})" for place in places(None, cache))
    raise DataNotFoundError(
        f"{layout.title} was not found in {searched}, and {reason}. To get it, either (1) name its "
        f"place with --data_dir=PATH or CIFARFLOW_DATA=PATH, (2) put {python_archive} from "
        f"https://www.cs.toronto.edu/~kriz/cifar.html into {cache}, or (3) run again "
        f"where there is a network. To try everything without {layout.title}, use the "
        f"generated images: --data=standin"
    )


def _read(found: formats.Found, cache: Path, verify: bool) -> formats.Arrays:
    if not verify:
        return formats.read(found, verify=False)
    marks = _marks(found)
    is_known = cache_lib.is_verified(cache, marks)
    copy_path = cache / f"{found.layout.name}.npz"
    copy = formats.Found("npz", copy_path, (copy_path,), found.layout)
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
