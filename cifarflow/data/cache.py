"""The project's cache: where it lies, and which checks are remembered in it.

    folder = cache.cache_folder()  # $CIFARFLOW_CACHE, $XDG_CACHE_HOME/cifarflow, ~/.cache/cifarflow
    marks = cache.fingerprint(files)
    if not cache.is_verified(folder, marks):
        ...  # compute checksums
        cache.remember_verified(folder, marks)

Nothing here is needed for a result: a cache that cannot be written costs time and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cifarflow.files import replacing
from cifarflow.untrusted import parse_json, read_bytes

_VERIFIED_NAME = "verified.json"
# Old entries, of files long gone, leave first.
_MOST_ENTRIES = 500
# Ten times what as many entries take.
_VERIFIED_BYTES_LIMIT = 1_000_000

Fingerprint = dict[str, list[int]]


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


def fingerprint(files: Iterable[Path]) -> Fingerprint:
    """Returns {real path: [size, mtime in ns]} of `files`: equal as long as nobody writes them.

    Raises:
      OSError: if a file is gone.
    """
    marks = {}
    for file in files:
        status = file.stat()
        marks[os.path.realpath(file)] = [status.st_size, status.st_mtime_ns]
    return marks


def is_verified(folder: Path, marks: Fingerprint) -> bool:
    """Tells whether all of `marks` were remembered, unchanged since."""
    known = _read_verified(folder)
    return bool(marks) and all(known.get(path) == mark for path, mark in marks.items())


def remember_verified(folder: Path, marks: Fingerprint) -> None:
    """Remembers that the content of these files was checked; a read-only cache is no error."""
    known = _read_verified(folder)
    for path in marks:
        known.pop(path, None)
    known.update(marks)
    kept = dict(list(known.items())[-_MOST_ENTRIES:])
    with suppress(OSError), replacing(folder / _VERIFIED_NAME) as file:
        file.write(json.dumps({"version": 1, "files": kept}, indent=1).encode())


def _read_verified(folder: Path) -> Fingerprint:
    try:
        content = parse_json(read_bytes(folder / _VERIFIED_NAME, limit=_VERIFIED_BYTES_LIMIT))
    except (OSError, ValueError):
        return {}  # not there, or damaged: everything is simply checked again
    if not isinstance(content, dict) or content.get("version") != 1:
        return {}
    files = content.get("files")
    if not isinstance(files, dict):
        return {}
    return {path: mark for path, mark in files.items() if _is_mark(mark)}


def _is_mark(mark: object) -> bool:
    """Whether this is a size and a time, and can be written again."""
    return isinstance(mark, list) and len(mark) == 2 and all(type(part) is int for part in mark)
