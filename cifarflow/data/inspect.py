"""What data is on this machine, where, and in what state.

    for source in find_data():  # every place, for CIFAR-10, CIFAR-100 and the stand-in set
        print(source.data, source.place, source.state, source.path)

Everything is read and its checksums are computed, whatever is remembered of an earlier time.
Nothing is written, nothing is downloaded, and damaged data is reported, not raised.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from cifarflow.data import formats, standin
from cifarflow.data.cache import cache_folder
from cifarflow.data.layouts import LAYOUTS, Layout
from cifarflow.data.sources import Place, check_folders, look_into, places
from cifarflow.errors import CifarflowError, DataNotFoundError

NOT_FOUND, VERIFIED, DAMAGED = "not found", "verified", "damaged"


@dataclasses.dataclass(frozen=True)
class DataSource:
    """What there is of a data set in one place.

    Attributes:
      data: "cifar10", "cifar100" or "standin", as `load_data` calls it.
      place: what the place is called, such as "CIFARFLOW_DATA" or "the project's cache".
      path: the file or folder with the data; where it was looked for, if nothing is there.
      state: "not found", "verified" (its checksums are right) or "damaged".
      format: "python", "binary", "archive", "npz" or "tfds"; "" if nothing is there.
      examples: how many images, training and test set together; 0 unless verified.
      is_taken: whether `load_data(data)` goes by this place, be it to an error.
      reason: what is wrong, in a line.
    """

    data: str
    place: str
    path: Path
    state: str
    format: str = ""
    examples: int = 0
    is_taken: bool = False
    reason: str = ""


def find_data(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[DataSource]:
    """Looks for every data set in every place, in the order in which `load_data` does.

    Args:
      data_dir: a place to look into first.
      cache_dir: the project's cache.

    Returns:
      A source for each data set and place, and one for the stand-in set, which is made when it is
      not there.

    Raises:
      ConfigError: if data_dir or cache_dir is no path.
    """
    check_folders(data_dir, cache_dir)
    cache = cache_folder(cache_dir)
    found = []
    for layout in LAYOUTS.values():
        is_open = True
        for place in places(data_dir, cache):
            source = _examine(place, layout)
            # A place that was named is gone by, whatever is in it.
            is_taken = is_open and (place.is_named or source.state != NOT_FOUND)
            found.append(dataclasses.replace(source, is_taken=is_taken))
            is_open = is_open and not is_taken
    return [*found, _examine_standin(cache)]


def _examine(place: Place, layout: Layout) -> DataSource:
    path, kind = place.path, ""
    try:
        found = look_into(place, layout)
        if found is None:
            return DataSource(layout.name, place.name, path, NOT_FOUND)
        path, kind = found.path, found.kind
        arrays = formats.read(found)
    except DataNotFoundError as error:
        return DataSource(layout.name, place.name, path, NOT_FOUND, reason=str(error))
    except (CifarflowError, OSError) as error:
        return DataSource(layout.name, place.name, path, DAMAGED, kind, reason=str(error))
    examples = len(arrays.train_labels) + len(arrays.test_labels)
    return DataSource(layout.name, place.name, path, VERIFIED, kind, examples)


def _examine_standin(cache: Path) -> DataSource:
    path = cache / standin.FILE_NAME
    about = ("standin", "the project's cache", path)
    if not path.exists():
        return DataSource(*about, NOT_FOUND, is_taken=True, reason="is drawn when it is asked for")
    counts = standin.TRAIN_EXAMPLES, standin.TEST_EXAMPLES
    try:
        arrays = formats.read_npz(path, train_examples=counts[0], test_examples=counts[1])
    except CifarflowError as error:
        reason = f"is drawn anew when it is asked for: {error}"
        return DataSource(*about, DAMAGED, "npz", is_taken=True, reason=reason)
    if formats.digest(arrays) != standin.ARRAYS_SHA256:
        reason = "is not as it was drawn: remove it, and it is drawn anew"
        return DataSource(*about, DAMAGED, "npz", is_taken=True, reason=reason)
    return DataSource(*about, VERIFIED, "npz", sum(counts), is_taken=True)
