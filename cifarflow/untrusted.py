"""Files that anybody may have written: each ends in a value, or in one line that says why not.

    with reading(path):                              # whatever is wrong: DataError, naming the path
        value = parse_json(read_bytes(path, limit=1_000_000))

    with reading(path), open_npz(path) as archive, archive.open("x.npy") as file:
        header = read_array_header(file)             # to be checked: nothing is allocated yet
        array = read_array(file, header, size=archive.getinfo("x.npy").file_size)

Nothing in a file is run, and nothing that it claims is allocated before it is checked against what
there is.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from cifarflow.errors import CifarflowError, DataError

# Our own files have five levels.  Python's functions that call themselves end at several hundred.
_MOST_LEVELS = 50
# A zip file's directory takes about 70 bytes a member, and Python 15 times as much.
_READ_BYTES_LIMIT = 1 << 20
# Python's own limit of a header, which it otherwise takes for a program.
_HEADER_BYTES_LIMIT = 10_000
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?[a-zA-Z][0-9]{0,4})',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(([0-9, ]{0,160})\)\s*,?\s*\}\s*"
)


# --- messages -----------------------------------------------------------------------------


@contextmanager
def reading(
    name: object, *, failing: str = "cannot be read", error: type[CifarflowError] = DataError
) -> Iterator[None]:
    """Turns whatever goes wrong inside into one error with one line.

    The standard library's decoders raise a dozen types on hostile bytes (struct.error, zlib.error,
    UnicodeDecodeError, RecursionError, ...).  To the caller each means the same: this file cannot
    be used.

    Args:
      name: what is read, for the message.
      failing: what is said of it.
      error: what is raised.

    Raises:
      CifarflowError: `error`, or an error of ours as it came.
    """
    try:
        yield
    except CifarflowError:
        raise
    except Exception as cause:
        raise error(f"{name} {failing}: {one_line(str(cause)) or type(cause).__name__}") from cause


def one_line(text: str, *, length: int = 300) -> str:
    """Text that a message may hold: in one line, not long, nothing that a terminal would obey."""
    line = " ".join(text[: 4 * length].split())
    if len(line) > length:
        line = f"{line[: length - 4]} ..."
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in line)


class _Repr(reprlib.Repr):
    """`repr` in a time that does not depend on the value, which may be nested or shared."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = 10
        self.maxstring = self.maxother = self.maxlong = 100

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[: self.maxother])


def shown(value: object, *, length: int = 300) -> str:
    """`repr` of what a file holds, as a message may quote it."""
    return one_line(_Repr().repr(value), length=length)


# --- files --------------------------------------------------------------------------------


def open_file(path: Path) -> BinaryIO:
    """Opens an ordinary file for reading; does not wait at a pipe, as `open` does.

    Raises:
      OSError: if it cannot be opened.
      ValueError: if it is no ordinary file.
    """

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=without_waiting)  # noqa: SIM115 - it is the caller's to close
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("it is no ordinary file")
    return file


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Reads a whole file of at most `limit` bytes.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is larger, or no ordinary file.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, expected at most {limit}")
        # No more than its size: room for all that is asked for is taken first.
        return file.read(size)


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """Parses JSON: UTF-8, nested at most 50 deep, and no infinity and no NaN, which JSON has not.

    Args:
      data: the text.
      finite: False takes infinity and NaN as Python writes them.

    Raises:
      ValueError: if it is anything else.
    """
    try:
        value = json.loads(data.decode(), parse_constant=refuse_constant if finite else None)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    # Level by level, as what calls itself could end as above.
    level: list[Any] = [[value]]
    for _ in range(_MOST_LEVELS + 1):
        inner = []
        for holder in level:
            for node in holder.values() if isinstance(holder, dict) else holder:
                if isinstance(node, (dict, list)):
                    inner.append(node)
                elif finite and isinstance(node, float) and not math.isfinite(node):
                    raise ValueError("it holds a number that is too large")
        level = inner
    if level:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} deep")
    return value


def refuse_constant(text: str) -> None:
    """For `parse_constant` of `json.loads`, which otherwise takes NaN and Infinity.

    Raises:
      ValueError: in any case.
    """
    raise ValueError(f"it holds {text}, which JSON has not")


# --- arrays -------------------------------------------------------------------------------


class _ShortReads:
    """A file of which nobody takes much at once: `zipfile` reads a directory as long as it says."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size if 0 <= size <= _READ_BYTES_LIMIT else _READ_BYTES_LIMIT + 1)
        if len(data) > _READ_BYTES_LIMIT:
            raise ValueError(f"it has a directory of more than {_READ_BYTES_LIMIT} bytes")
        return data


@contextmanager
def open_npz(path: Path, *, packed: bool = True) -> Iterator[zipfile.ZipFile]:
    """Opens an `.npz`, whose members are arrays; each must be read in pieces, as `read_array` does.

    Args:
      path: the file.
      packed: whether members may be compressed.  If not, all together have no more bytes than the
        file, whatever it says.

    Raises:
      OSError: if it cannot be opened.
      Exception: of many kinds if it is damaged, see `reading`.
    """
    with open_file(path) as file:
        reads: Any = _ShortReads(file)
        with zipfile.ZipFile(reads) as archive:
            members = archive.infolist()
            # The others, which NumPy never writes, claim memory before they are read.
            known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if packed else (zipfile.ZIP_STORED,)
            methods = {member.compress_type for member in members} - set(known)
            if methods and not packed:
                raise ValueError("a member is compressed, and none should be")
            if methods:
                raise ValueError(f"it has members packed by method {min(methods)}")
            size = os.fstat(file.fileno()).st_size
            # Members may overlap, so that each fits and all together do not.
            claimed = sum(member.file_size for member in members)
            if not packed and claimed > size:
                raise ValueError(f"its members claim {claimed} bytes, it has {size}")
            yield archive


class ArrayHeader(NamedTuple):
    """What an `.npy` file says of its array.

    Attributes:
      dtype: of its elements.
      shape: of the array; the claim may be of any size.
      is_fortran: whether the first index runs fastest.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool

    @property
    def nbytes(self) -> int:
        """The bytes of the array."""
        return int(math.prod(self.shape) * self.dtype.itemsize)


def read_array_header(file: IO[bytes]) -> ArrayHeader:
    """Reads the header of an `.npy` file, without running it as NumPy does.

    Args:
      file: at its beginning.

    Raises:
      ValueError: if it is no such header, or the array has elements of no plain type.
    """
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ValueError(f"it begins {magic!r}, which no .npy file does")
    if magic[6:] not in (b"\1\0", b"\2\0"):
        raise ValueError(f"it has the npy version {tuple(magic[6:])}, expected (1, 0) or (2, 0)")
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > _HEADER_BYTES_LIMIT:
        raise ValueError(f"its header claims {length} bytes")
    text = file.read(length).decode("latin-1")
    match = _HEADER.fullmatch(text)
    sides = [side.strip() for side in match[3].split(",")] if match else []
    # (3,) ends in a comma, and () holds nothing.
    sides = sides[:-1] if sides[-1:] == [""] else sides
    are_good = all(side.isdecimal() and len(side) < 19 for side in sides)
    if match is None or len(sides) > 8 or not are_good:
        raise ValueError(f"its header is {shown(text, length=80)}")
    try:
        dtype = np.dtype(match[1])
    except TypeError:
        raise ValueError(f"its elements are {match[1]!r}, which is no type") from None
    return ArrayHeader(dtype, tuple(map(int, sides)), match[2] == "True")


def read_array(file: IO[bytes], header: ArrayHeader, *, size: int) -> np.ndarray:
    """Reads the array after its header.

    Args:
      file: where `read_array_header` left it.
      header: what that returned.  What it claims is allocated, once there are as many bytes: in a
        packed member, whose `size` is a claim too, that is to be checked before.
      size: the bytes of the whole file or member.

    Returns:
      The array; it can be written to.

    Raises:
      ValueError: if the array does not end where the file does, is in Fortran order, or has
        elements of no plain type.
    """
    if header.dtype.hasobject or not header.dtype.itemsize or header.is_fortran:
        order = " in Fortran order" if header.is_fortran else ""
        raise ValueError(f"it is {header.dtype}{order}, expected plain numbers in C order")
    there, claimed = size - file.tell(), header.nbytes
    if there > claimed:
        raise ValueError(f"it goes on after its {claimed} bytes")
    if there < claimed:
        raise ValueError(f"it ends after {there} of {claimed} bytes")
    buffer = np.empty(claimed, np.uint8)
    view = memoryview(buffer)
    filled = 0
    while filled < claimed:
        block = file.read(min(claimed - filled, _READ_BYTES_LIMIT))
        if not block:
            raise ValueError(f"it ends after {filled} of {claimed} bytes")
        view[filled : filled + len(block)] = block
        filled += len(block)
    return buffer.view(header.dtype).reshape(header.shape)
