"""The project's cache: where it lies, and which checks are remembered in it.

    folder = cache.cache_folder()  # $CIFARFLOW_CACHE, $XDG_CACHE_HOME/cifarflow, ~/.cache/cifarflow
    marks = cache.fingerprint({path: md5})
    if not cache.is_verified(folder, marks):
        ...  # compute checksums
        cache.remember_verified(folder, marks)

Nothing here is needed for a result: a cache that cannot be written costs time and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cifarflow.files import replacing
from cifarflow.untrusted import parse_json, read_bytes

_VERIFIED_NAME = "verified.json"
# Old entries, of files long gone, leave first.
_MOST_ENTRIES = 500
# Five times what as many entries take.
_VERIFIED_BYTES_LIMIT = 1_000_000
_EXPECTED_LIMIT = 200


class Mark(NamedTuple):
    """A file as it was when it was checked, and what it was checked to be.

    Names and links may lead from one file to another, so it goes by none of them.  One that was
    found to be what belongs in one place is not thereby what belongs in another.

    Attributes:
      device: number of the file system.
      inode: number of the file there, the same under all its names.
      size: in bytes.
      mtime_ns: when its content was last changed; anybody may set it back.
      ctime_ns: when anything of it was, its mtime for one; nobody sets that.
      expected: what it was held against: the md5 of the batch that it is, for example.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    expected: str


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the project's cache folder, which need not exist yet.

    Args:
      cache_dir: the folder if it is given; else $CIFARFLOW_CACHE, else
        $XDG_CACHE_HOME/cifarflow, else ~/.cache/cifarflow.
    """
    if cache_dir is not None:
        return Path(os.path.expanduser(cache_dir))
    if os.environ.get("CIFARFLOW_CACHE"):
        return Path(os.path.expanduser(os.environ["CIFARFLOW_CACHE"]))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "cifarflow"


def fingerprint(expected: Mapping[Path, str]) -> list[Mark]:
    """Returns the marks of files: equal as long as nobody changes them, or puts others there.

    Args:
      expected: the files, and what each is to be, in words of at most 200 printable ASCII letters.

    Raises:
      OSError: if a file is gone.
    """
    marks = []
    for path, what in expected.items():
        found = path.stat()
        times = (found.st_mtime_ns, found.st_ctime_ns)
        marks.append(Mark(found.st_dev, found.st_ino, found.st_size, *times, what))
    return marks


def is_verified(folder: Path, marks: Iterable[Mark]) -> bool:
    """Tells whether all of `marks` were remembered, unchanged since."""
    wanted = set(marks)
    return bool(wanted) and wanted <= set(_read_verified(folder))


def remember_verified(folder: Path, marks: Iterable[Mark]) -> None:
    """Remembers that the content of these files was checked; a read-only cache is no error."""
    marks = list(marks)
    files = {(mark.device, mark.inode) for mark in marks}
    known = [mark for mark in _read_verified(folder) if (mark.device, mark.inode) not in files]
    kept = [*known, *marks][-_MOST_ENTRIES:]
    with suppress(OSError), replacing(folder / _VERIFIED_NAME) as file:
        file.write(json.dumps({"version": 2, "files": kept}, indent=1).encode())


def _read_verified(folder: Path) -> list[Mark]:
    try:
        content = parse_json(read_bytes(folder / _VERIFIED_NAME, limit=_VERIFIED_BYTES_LIMIT))
    except (OSError, ValueError):
        return []  # not there, or damaged: everything is simply checked again
    # Version 1 went by path, size and mtime: what it knew may since be another file.
    if not isinstance(content, dict) or content.get("version") != 2:
        return []
    files = content.get("files")
    if not isinstance(files, list):
        return []
    return [Mark(*values) for values in files if _is_mark(values)]


def _is_mark(values: object) -> bool:
    """Whether these are a mark's, and short enough to be written again."""
    if not isinstance(values, list) or len(values) != len(Mark._fields):
        return False
    *numbers, expected = values
    if not all(type(number) is int and abs(number) < 1 << 128 for number in numbers):
        return False
    return (
        isinstance(expected, str)
        and len(expected) <= _EXPECTED_LIMIT
        and expected.isascii()
        and expected.isprintable()
    )
