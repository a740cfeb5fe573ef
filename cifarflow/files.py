"""Files written whole or not at all.

    with replacing(path) as file:
    file.write(data)

Whoever reads the file sees the old one or the new one, never half of one.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cifarflow.errors import WorkdirError


@contextmanager
def replacing(path: Path, *, what: str = "file") -> Iterator[BinaryIO]:
    """Opens a temporary file for writing that takes the place of `path` when all went well.

    The file is flushed to disk before it gets its name, so that not even a power cut leaves a cut
    file under it.

    Args:
      path: the file to write; its folder is made if need be.
      what: what to call it in the error.

    Yields:
      The open file.  After an exception it is deleted and `path` is as it was.

    Raises:
      WorkdirError: if the file or its folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise WorkdirError(f"cannot write {what} {str(path)!r}: {reason}") from error
        raise
