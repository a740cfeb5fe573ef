"""Decoders: every format in which people keep CIFAR-10, to the same arrays in the same order.

    from cifarflow.data import formats

    found = formats.locate(pathlib.Path("~/data").expanduser())  # None if nothing known is there
    arrays = formats.read(found)
    arrays.train_images  # [50000, 32, 32, 3] uint8, in the order of the official files

Known are the `cifar-10-batches-py` folder, the `cifar-10-batches-bin` folder, the `.tar.gz` of
either (read as a stream, nothing is unpacked to disk), an `.npz` with the keys x_train, y_train,
x_test, y_test, and a directory prepared by TensorFlow Datasets.

Every file is taken for hostile until it is read: sizes that a file claims are checked before
anything is allocated, pickles can build nothing but the two arrays that belong there, and
whatever is wrong ends in one `DataError` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cifarflow.errors import DataError
from cifarflow.files import replacing
from cifarflow.untrusted import (
    one_line,
    open_file,
    open_npz,
    read_array,
    read_array_header,
    reading,
    shown,
)

TRAIN_EXAMPLES = 50_000
TEST_EXAMPLES = 10_000
BATCH_EXAMPLES = 10_000
IMAGE_SHAPE = (32, 32, 3)
PIXELS = 32 * 32 * 3
NUM_CLASSES = 10

# The md5 sums of the official files, training batches in order and the test batch last.
PYTHON_BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
PYTHON_META = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
BINARY_BATCHES = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
# Of the decoded arrays (see `digest`): what npz and TFDS files, which have no official
# checksum of their own, are held against.
ARRAYS_SHA256 = "9bb26ea52d5b395389569734654d923ce7ba78a18a63b56115e3cecfb33f114d"

# The official archives, for the message about one that is cut short.
PYTHON_ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
BINARY_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"

# An official python batch has 31.04 MB, a binary one 30.73 MB, either archive 187 MB unpacked.
_BATCH_BYTES_LIMIT = 32_000_000
_ARCHIVE_BYTES_LIMIT = 200_000_000
_BINARY_BATCH_BYTES = BATCH_EXAMPLES * (1 + PIXELS)
# A 32x32 RGB image needs 3.1 kB in the worst case as PNG; a TFDS record adds a hundred bytes.
_RECORD_BYTES_LIMIT = 8_192

_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_TFDS_VERSION = "3.0.2"

# Under these names Keras (`-target`, `_archive`, `-py.tar.gz`), torchvision, TFDS and people
# leave CIFAR-10 in a folder; a folder comes before an archive because it is read faster.
_KNOWN_NAMES = (
    "cifar10.npz",
    "cifar-10-batches-py",
    "cifar-10-batches-py-target/cifar-10-batches-py",
    "cifar-10-batches-bin",
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py.tar.gz",
    "cifar-10-batches-py-target_archive",
    "cifar-10-binary.tar.gz",
    "cifar-10-batches-bin.tar.gz",
    f"cifar10/{_TFDS_VERSION}",
    _TFDS_VERSION,
)


class Arrays(NamedTuple):
    """A whole data set as it lies in the files, before any validation split.

    Attributes:
      train_images: [N, 32, 32, 3] uint8, 0..255.
      train_labels: [N] int32, 0..9.
      test_images: [M, 32, 32, 3] uint8, 0..255.
      test_labels: [M] int32, 0..9.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Found(NamedTuple):
    """Where a data set was found.

    Attributes:
      kind: "python", "binary", "archive", "npz" or "tfds".
      path: the file or folder.
      files: every file whose content counts, in a fixed order.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]


# --- finding ------------------------------------------------------------------------------


def locate(path: Path) -> Found | None:
    """Finds CIFAR-10 at `path`: a file, the folder itself, or the folder that holds it.

    Nothing is decoded here; a folder counts as found as soon as one batch file lies in it.

    Args:
      path: file or folder; it need not exist.

    Returns:
      What was found, or None if nothing known is there.

    Raises:
      DataError: if `path` is a file of no known format, or files are missing from a folder
        that otherwise matches.
    """
    if os.path.isfile(path):
        return _locate_file(path)
    if not os.path.isdir(path):
        return None
    found = _locate_folder(path)
    for name in _KNOWN_NAMES:
        if found is not None:
            break
        child = path / name
        found = _locate_file(child) if os.path.isfile(child) else _locate_folder(child)
    return found


def _locate_file(path: Path) -> Found:
    # By content, not by name: Keras calls its archive `cifar-10-batches-py-target_archive`.
    with reading(path), open_file(path) as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return Found("archive", path, (path,))
    if magic[:2] == b"PK":
        return Found("npz", path, (path,))
    raise DataError(f"{path} is neither a .tar.gz archive nor an .npz file: it starts {magic!r}")


def _locate_folder(folder: Path) -> Found | None:
    for kind, names in (("python", PYTHON_BATCHES), ("binary", BINARY_BATCHES)):
        missing = [name for name in names if not os.path.isfile(folder / name)]
        if len(missing) < len(names):
            if missing:
                raise DataError(
                    f"{folder} lacks {', '.join(missing)}; "
                    f"a complete folder holds {', '.join(names)}"
                )
            files = [folder / name for name in names]
            if kind == "python" and os.path.isfile(folder / "batches.meta"):
                files.append(folder / "batches.meta")
            return Found(kind, folder, tuple(files))
    train, test = _tfds_shards(folder, "train"), _tfds_shards(folder, "test")
    if train or test:
        if not (train and test):
            raise DataError(f"{folder} lacks the {'test' if train else 'train'} tfrecord files")
        return Found("tfds", folder, (*train, *test))
    return None


def _tfds_shards(folder: Path, split: str) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError:  # not there, no folder, or not ours to read
        return []
    pattern = re.compile(rf"cifar10-{split}\.tfrecord-(\d{{5}})-of-(\d{{5}})")
    matches = [match for name in names if (match := pattern.fullmatch(name))]
    if not matches:
        return []
    count = int(matches[0].group(2))
    # At 60,000 images nobody has more shards; the claim in a name must not make a long list.
    expected = [f"cifar10-{split}.tfrecord-{i:05d}-of-{count:05d}" for i in range(min(count, 1000))]
    missing = sorted(set(expected) - {match.group(0) for match in matches})
    if missing or len(matches) != len(expected):
        what = f"lacks {missing[0]}" if missing else f"holds two sets of {split} tfrecord files"
        raise DataError(f"{folder} {what}")
    return [folder / name for name in expected]


# --- reading ------------------------------------------------------------------------------


def read(found: Found, *, verify: bool = True) -> Arrays:
    """Decodes what `locate` found.

    Args:
      found: the place.
      verify: whether to hold the content against the official checksums: md5 of each batch
        file, or sha256 of the decoded arrays for the formats that have no official file.

    Returns:
      The arrays, the same bytes in the same order from every format.

    Raises:
      DataError: if a file is unreadable, damaged, unsafe or, with `verify`, altered.
    """
    if found.kind == "npz":
        return read_npz(found.path, sha256=ARRAYS_SHA256 if verify else None)
    reader = {
        "python": _read_folder,
        "binary": _read_folder,
        "archive": _read_archive,
        "tfds": _read_tfds,
    }[found.kind]
    return reader(found, verify)


def expected_of(found: Found) -> dict[Path, str]:
    """Returns what `read` verifies of each file: what it must be to be in its place.

    That is the md5 of a batch, of which each has its own; of the others the sha256 of all arrays
    together, and with it a shard's name, which says what of them is in it.
    """
    if found.kind in ("python", "binary"):
        table = {**PYTHON_BATCHES, **PYTHON_META, **BINARY_BATCHES}
        return {path: table[path.name] for path in found.files}
    if found.kind == "tfds":
        return {path: f"{ARRAYS_SHA256} {path.name}" for path in found.files}
    return dict.fromkeys(found.files, ARRAYS_SHA256)


def digest(arrays: Arrays) -> str:
    """Returns the sha256 of the images and labels of both splits, in hexadecimal."""
    sha256 = hashlib.sha256()
    for array in arrays:
        # Labels little-endian, so that the sum does not depend on the machine.
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        sha256.update(np.ascontiguousarray(little).data)
    return sha256.hexdigest()


def _check_digest(path: Path, arrays: Arrays, expected: str) -> None:
    found = digest(arrays)
    if found != expected:
        raise DataError(
            f"{path} is damaged or altered: the sha256 of its decoded arrays is {found}, "
            f"expected {expected}"
        )


def _check_md5(name: str, data: bytes, expected: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"{name} is damaged, cut short or altered: its md5 is {found}, expected {expected} "
            f"({len(data)} bytes)"
        )


def _read_file(path: Path, limit: int) -> bytes:
    with reading(path), open_file(path) as file:
        size = _check_size(path, file, limit)
        return file.read(size)


def _check_size(path: Path, file: BinaryIO, limit: int) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise DataError(f"{path} has {size} bytes, expected at most {limit}")
    return size


def _empty_arrays() -> Arrays:
    return Arrays(
        np.empty((TRAIN_EXAMPLES, *IMAGE_SHAPE), np.uint8),
        np.empty(TRAIN_EXAMPLES, np.int32),
        np.empty((TEST_EXAMPLES, *IMAGE_SHAPE), np.uint8),
        np.empty(TEST_EXAMPLES, np.int32),
    )


def _check_labels(name: object, labels: np.ndarray) -> None:
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < NUM_CLASSES:
        raise DataError(f"{name} has labels from {labels.min()} to {labels.max()}, expected 0 to 9")


def _store_batch(
    arrays: Arrays, index: int, name: str, pixels: np.ndarray, labels: np.ndarray
) -> None:
    """Puts one decoded batch in its place: batches 0 to 4 are the training set, 5 the test set."""
    _check_labels(name, labels)
    if index < 5:
        rows = slice(index * BATCH_EXAMPLES, (index + 1) * BATCH_EXAMPLES)
        images, targets = arrays.train_images[rows], arrays.train_labels[rows]
    else:
        images, targets = arrays.test_images, arrays.test_labels
    targets[:] = labels
    # Plane by plane: several times as fast as one transposed copy.
    flat = images.reshape(-1, 1024, 3)
    for channel in range(3):
        flat[:, :, channel] = pixels[:, channel * 1024 : (channel + 1) * 1024]


def _read_folder(found: Found, verify: bool) -> Arrays:
    arrays = _empty_arrays()
    table = PYTHON_BATCHES if found.kind == "python" else BINARY_BATCHES
    decode = decode_python_batch if found.kind == "python" else decode_binary_batch

    def read_batch(index: int) -> None:
        path = found.files[index]
        data = _read_file(path, _BATCH_BYTES_LIMIT)
        if verify:
            _check_md5(str(path), data, table[path.name])
        _store_batch(arrays, index, str(path), *decode(data, str(path)))

    # Reading, md5 and the copies release the GIL, so two threads halve the time.
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(read_batch, range(len(table))))
    for path in found.files[len(table) :]:  # batches.meta: checked, but nothing in it is needed
        if verify:
            _check_md5(str(path), _read_file(path, 1_000_000), PYTHON_META[path.name])
    return arrays


# --- the python version: pickles ----------------------------------------------------------


class _PickledDtype:
    """Stands in for `numpy.dtype` while a batch is unpickled: only uint8 gets through."""

    def __init__(self, name: object = None, *flags: object) -> None:
        if name not in (b"u1", "u1"):
            raise DataError(f"dtype {shown(name)}, expected uint8")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment: without meaning for one-byte numbers


class _PickledArray:
    """Stands in for `numpy.ndarray`: takes exactly the pixels of one batch, allocates nothing."""

    def __init__(self, *claims: object) -> None:
        self.pixels: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        if shape != (BATCH_EXAMPLES, PIXELS) or not isinstance(dtype, _PickledDtype) or is_fortran:
            raise DataError(
                f"pixels of shape {shown(shape)}, expected ({BATCH_EXAMPLES}, {PIXELS})"
            )
        if not isinstance(data, bytes) or len(data) != BATCH_EXAMPLES * PIXELS:
            raise DataError(f"pixel data that is not {BATCH_EXAMPLES * PIXELS} bytes")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape)


class _BatchUnpickler(pickle.Unpickler):
    """Admits the names by which numpy pickles an array, as stand-ins, and nothing else."""

    _ADMITTED = {  # noqa: RUF012 - a constant of the class
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,  # numpy 2
        ("numpy", "ndarray"): "ndarray",
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        admitted = self._ADMITTED.get((module, name))
        if admitted is None:
            asked = one_line(f"{module}.{name}", length=100)
            raise DataError(
                f"the pickle asks for {asked}; only numpy arrays are admitted, "
                f"and nothing of it was run"
            )
        return admitted


# What the official files (protocol 2) and the same written by today's Python (up to
# protocol 5) are made of.
_ADMITTED_OPCODES = frozenset(
    (
        *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"),
        *("APPEND", "APPENDS", "SETITEM", "SETITEMS", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
        *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"),
        *("SHORT_BINUNICODE", "BINUNICODE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
        *("BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "MEMOIZE"),
    )
)
# The official files have 30,098 opcodes, 6 of which make a tuple.
_OPCODES_LIMIT = 100_000
_MEMO_LIMIT = 1_000_000
_TUPLES_LIMIT = 8


def _check_opcodes(data: bytes) -> None:
    """Refuses what makes an unpickler itself use much memory or time.

    One opcode, a byte long, makes a list of 56 bytes or can claim a memo of 4 billion slots;
    `genops` refuses a string longer than the data; a few dozen tuples of tuples used as a
    dictionary key take 2**n steps to hash.
    """
    tuples = 0
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(data), 1):
        if count > _OPCODES_LIMIT:
            raise DataError(f"the pickle holds more than {_OPCODES_LIMIT} opcodes")
        name = opcode.name
        if name not in _ADMITTED_OPCODES:
            raise DataError(f"the pickle holds {name}, which a CIFAR-10 batch never does")
        if name == "LONG_BINPUT" and int(argument or 0) > _MEMO_LIMIT:
            raise DataError(f"the pickle claims {argument} memo slots")
        tuples += name.startswith("TUPLE")
    if tuples > _TUPLES_LIMIT:
        raise DataError(f"the pickle holds {tuples} tuples, expected at most {_TUPLES_LIMIT}")


def decode_python_batch(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one file of the python version.

    Args:
      data: the file's bytes, a pickled dictionary.
      name: what to call it in messages.

    Returns:
      pixels: [10000, 3072] uint8, the planes red, green, blue of each image.
      labels: [10000] int32.

    Raises:
      DataError: if it is no such pickle, or holds anything else.
    """
    with reading(name):
        try:
            _check_opcodes(data)
            batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        except DataError as error:
            raise DataError(f"{name} is refused: {error}") from None
    if not isinstance(batch, dict):
        raise DataError(f"{name} holds a pickled {type(batch).__name__}, expected a dictionary")
    array, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(array, _PickledArray) or array.pixels is None:
        raise DataError(f"{name} has no array under the key b'data'")
    if not isinstance(labels, list) or len(labels) != BATCH_EXAMPLES:
        raise DataError(f"{name} has no list of {BATCH_EXAMPLES} labels under the key b'labels'")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < NUM_CLASSES]
    if wrong:
        # No plain repr: that of a list which holds another twice, and so on, has no end.
        raise DataError(f"{name} has the label {shown(wrong[0], length=40)}, expected 0 to 9")
    return array.pixels, np.array(labels, np.int32)


# --- the binary version -------------------------------------------------------------------


def decode_binary_batch(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one file of the binary version: 1 label byte, then 3072 pixel bytes, a record.

    Args:
      data: the file's bytes.
      name: what to call it in messages.

    Returns:
      pixels: [10000, 3072] uint8, the planes red, green, blue of each image.
      labels: [10000] int32.

    Raises:
      DataError: if the size is wrong or a label is out of range.
    """
    if len(data) != _BINARY_BATCH_BYTES:
        raise DataError(f"{name} has {len(data)} bytes, expected {_BINARY_BATCH_BYTES}")
    records = np.frombuffer(data, np.uint8).reshape(BATCH_EXAMPLES, 1 + PIXELS)
    labels = records[:, 0].astype(np.int32)
    _check_labels(name, labels)
    return records[:, 1:], labels


# --- archives -----------------------------------------------------------------------------


class _BoundedReader(io.RawIOBase):
    """A stream that refuses to deliver more than it may: a gzip bomb ends here."""

    def __init__(self, stream: Any, limit: int, name: object = "it") -> None:
        self._stream = stream
        self._left = limit
        self._limit = limit
        self._name = name

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._name} unpacks to more than {self._limit} bytes")
        return data


class _Gunzip:
    """What a gzip file holds, as a stream; `gzip` would read a long name in its header for minutes.

    Args:
      file: the packed file, of one member.
    """

    _PIECE = 1 << 18

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inflate = zlib.decompressobj(wbits=31)  # a gzip header and checksum

    def read(self, size: int) -> bytes:
        """Returns `size` bytes, fewer only at the end."""
        parts = []
        while size > 0 and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._file.read(self._PIECE)
            part = self._inflate.decompress(packed, size)
            if not packed and not part:
                raise EOFError("it is cut short: the packed data have no end")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _read_archive(found: Found, verify: bool) -> Arrays:
    path = found.path
    try:
        with reading(path), open_file(path) as file:
            # Packed as little as can be it is hardly longer than unpacked.
            _check_size(path, file, _ARCHIVE_BYTES_LIMIT)
            stream = _BoundedReader(_Gunzip(file), _ARCHIVE_BYTES_LIMIT, path)
            return _read_tar(stream, verify, path)
    except DataError as error:
        if not verify:
            raise
        # Say at once whether the download is to blame; only the message costs this md5.
        with reading(path), open_file(path) as file:
            md5 = hashlib.md5(usedforsecurity=False)
            while block := file.read(1 << 20):
                md5.update(block)
        raise DataError(
            f"{error} (the archive's md5 is {md5.hexdigest()}, expected {PYTHON_ARCHIVE_MD5} for "
            f"the python version or {BINARY_ARCHIVE_MD5} for the binary one)"
        ) from error


def _read_tar(stream: Any, verify: bool, path: Path) -> Arrays:
    arrays = _empty_arrays()
    seen: dict[str, set[str]] = {"python": set(), "binary": set()}
    decoders: dict[str, tuple[dict[str, str], Callable[..., Any]]] = {
        "python": (PYTHON_BATCHES, decode_python_batch),
        "binary": (BINARY_BATCHES, decode_binary_batch),
    }
    # Members are only ever read into memory, never extracted.
    for member, data in _tar_files(stream, path):
        name = Path(member).name
        kind = "binary" if name in BINARY_BATCHES else "python"
        table, decode = decoders[kind]
        if name not in (*table, *PYTHON_META):
            continue
        label = f"{name} in {path}"
        if name in seen[kind]:
            raise DataError(f"{path} holds {name} twice")
        if verify:
            _check_md5(label, data, {**table, **PYTHON_META}[name])
        if name in table:
            seen[kind].add(name)
            _store_batch(arrays, list(table).index(name), label, *decode(data, label))
    if seen["python"] and seen["binary"]:
        raise DataError(f"{path} mixes the python and the binary version")
    kind = "binary" if seen["binary"] else "python"
    missing = [name for name in decoders[kind][0] if name not in seen[kind]]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return arrays


# The official archives have 8 and 9 members; who packs one on a Mac may double them.
_MEMBERS_LIMIT = 100
_EXTENDED_BYTES_LIMIT = 1 << 20


def _tar_files(stream: Any, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a tar archive, strictly forward.

    Python's `tarfile` would read extended headers and maps of sparse files of any length, keep
    every member in memory, and step through one that claims 10**26 bytes without an end.

    Source: POSIX.1-2001, pax interchange format; GNU tar's manual, "Basic Tar Format".

    Args:
      stream: unpacked; its `read` returns what is asked for, less only at the end.
      path: of the archive, for messages.

    Raises:
      DataError: if it is damaged, or holds anything but files and folders inside.
    """
    extended: dict[bytes, bytes] = {}
    for _ in range(_MEMBERS_LIMIT):
        header = stream.read(512)
        if not header.strip(b"\0"):
            return
        # The checksum counts its own eight bytes as spaces.
        check = sum(header[:148]) + sum(b" " * 8) + sum(header[156:])
        if len(header) < 512 or _tar_number(header[148:156]) != check:
            raise DataError(f"{path} is damaged or cut short: it has a wrong tar header")
        kind, size = header[156:157], _tar_number(header[124:136])
        name = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].partition(b"\0")[0] + b"/" + name
        if kind in (b"x", b"g", b"L"):
            # These say more of the next member, or of all: of a file we want name and size.
            if not 0 <= size <= _EXTENDED_BYTES_LIMIT:
                raise DataError(f"{path} holds an extended header that claims {size} bytes")
            content = _tar_content(stream, size)
            if kind == b"L":
                extended[b"path"] = content.partition(b"\0")[0]
            elif kind == b"x":
                extended.update(_pax_records(content))
            continue
        name = extended.get(b"path", name)
        size = int(extended.get(b"size", size))
        extended = {}
        member = os.fsdecode(name)
        if member.startswith("/") or ".." in Path(member).parts:
            raise DataError(f"{path} holds a member with the unsafe name {shown(member)}")
        if kind == b"5" or (kind == b"\0" and member.endswith("/")):
            continue
        if kind not in (b"0", b"\0"):
            raise DataError(f"{path} holds {shown(member)}, which is no ordinary file")
        if not 0 <= size <= _BATCH_BYTES_LIMIT:
            raise DataError(f"{one_line(Path(member).name)} in {path} claims {size} bytes")
        yield member, _tar_content(stream, size)
    raise DataError(f"{path} holds more than {_MEMBERS_LIMIT} members")


def _tar_content(stream: Any, size: int) -> bytes:
    """Reads what follows a header, up to the next."""
    data: bytes = stream.read(size)
    if len(data) < size:
        raise ValueError(f"it ends after {len(data)} of a member's {size} bytes")
    stream.read(-size % 512)
    return data


def _tar_number(field: bytes) -> int:
    """Reads a number in octal digits, or in 256ths if the first bit is set; -1 if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(b"[0-7]*", digits) else -1


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Reads the records `LENGTH KEY=VALUE`, each on a line, and returns the path and the size."""
    found, place = {}, 0
    start = re.compile(rb"([0-9]{1,7}) ([^=\n]{1,200})=")
    while place < len(data):
        match = start.match(data, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data):
            raise ValueError("it has a wrong record in an extended header")
        key, value = match[2], data[match.end() : end - 1]
        if key == b"path" or (key == b"size" and re.fullmatch(b"[0-9]{1,18}", value)):
            found[key] = value
        place = end
    return found


# --- npz ----------------------------------------------------------------------------------


def read_npz(
    path: Path,
    *,
    train_examples: int = TRAIN_EXAMPLES,
    test_examples: int = TEST_EXAMPLES,
    sha256: str | None = None,
) -> Arrays:
    """Reads an `.npz` with the keys x_train, y_train, x_test, y_test.

    Args:
      path: the file, compressed or not.
      train_examples: how many training images it must hold.
      test_examples: how many test images it must hold.
      sha256: what `digest` must give, or None not to check.

    Returns:
      The arrays. Labels may be any integers in the file and of shape [N] or [N, 1] (as Keras
      gives them); they come back as [N] int32.

    Raises:
      DataError: if a key is missing, or a shape, dtype, label or checksum is wrong.
    """
    with reading(path), open_npz(path) as archive:
        names = archive.namelist()
        missing = [key for key in _NPZ_KEYS if f"{key}.npy" not in names]
        if missing:
            raise DataError(f"{path} lacks the arrays {', '.join(missing)}")
        arrays = Arrays(
            _read_npy(archive, path, "x_train", train_examples),
            _read_npy(archive, path, "y_train", train_examples),
            _read_npy(archive, path, "x_test", test_examples),
            _read_npy(archive, path, "y_test", test_examples),
        )
    if sha256 is not None:
        _check_digest(path, arrays, sha256)
    return arrays


def _read_npy(archive: zipfile.ZipFile, path: Path, key: str, examples: int) -> np.ndarray:
    is_images = key.startswith("x_")
    name, member = f"{key} in {path}", f"{key}.npy"
    with reading(name), archive.open(member) as file:
        # The header is checked before a byte of the array is allocated or read; an array of
        # dtype object, the only kind that would need a pickle, fails here as well.
        header = read_array_header(file)
        dtype, shape, is_fortran = header
        if is_images:
            good = shape == (examples, *IMAGE_SHAPE) and dtype == np.uint8
            expected = f"uint8 of shape {(examples, *IMAGE_SHAPE)}"
        else:
            good = shape in ((examples,), (examples, 1)) and dtype.kind in "iu"
            expected = f"integers of shape ({examples},) or ({examples}, 1)"
        if not good or is_fortran:
            order = " in Fortran order" if is_fortran else ""
            raise DataError(f"{name} is {dtype} of shape {shape}{order}, expected {expected}")
        array = read_array(file, header, size=archive.getinfo(member).file_size)
    if is_images:
        return array
    labels = array.reshape(-1)
    _check_labels(name, labels)
    return labels.astype(np.int32)


def write_npz(path: Path, arrays: Arrays) -> None:
    """Writes `arrays` as an uncompressed `.npz` that `read_npz` reads, all of it or nothing.

    Args:
      path: where to; the folder is made if need be.
      arrays: what to write.

    Raises:
      OSError: if the disk is full or the folder is not writable; nothing is left behind then.
    """
    with replacing(path) as file:
        np.savez(file, **dict(zip(_NPZ_KEYS, arrays, strict=True)))


# --- TensorFlow Datasets ------------------------------------------------------------------


def _read_tfds(found: Found, verify: bool) -> Arrays:
    """Reads the tfrecord files of a prepared directory, restored to the official order.

    TFDS shuffles when it prepares; each example keeps its place as `id`, such as
    `train_00042`. The files are read directly: the layout is three features, and TFDS would
    first import whatever class the directory's own `features.json` names.
    """
    arrays = _empty_arrays()
    for split, images, labels in (
        ("train", arrays.train_images, arrays.train_labels),
        ("test", arrays.test_images, arrays.test_labels),
    ):
        shards = [path for path in found.files if path.name.startswith(f"cifar10-{split}.")]
        _read_tfds_split(shards, split, images, labels)
    if verify:
        _check_digest(found.path, arrays, ARRAYS_SHA256)
    return arrays


def _records(path: Path, limit: int = _ARCHIVE_BYTES_LIMIT) -> Iterator[bytes]:
    """Yields the records of a tfrecord file: length (8 bytes), crc (4), the bytes, crc (4)."""
    data = _read_file(path, limit)
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        end = position + 12 + length
        if length > _RECORD_BYTES_LIMIT or end + 4 > len(data):
            raise DataError(
                f"{path} is damaged or cut short: at byte {position} a record claims {length} bytes"
            )
        yield data[position + 12 : end]
        position = end + 4


# Signature, then the header chunk: 32 by 32 pixels, 8 bits, colour type 2 (RGB).
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x20\0\0\0\x20\x08\x02"


def _read_tfds_split(
    shards: list[Path], split: str, images: np.ndarray, labels: np.ndarray
) -> None:
    # TensorFlow takes seconds to import and is needed for this format only.
    import tensorflow as tf

    folder = shards[0].parent
    records: list[bytes] = []
    left = _ARCHIVE_BYTES_LIMIT  # of all shards together
    for path in shards:
        # One too many is enough to know; records may be empty, and so as many as one likes.
        found = list(itertools.islice(_records(path, left), len(images) + 1 - len(records)))
        records += found
        left -= sum(map(len, found))
    if len(records) != len(images):
        count = "more" if len(records) > len(images) else str(len(records))
        raise DataError(f"{folder} holds {count} {split} records, expected {len(images)}")
    features = {
        "id": tf.io.FixedLenFeature([], tf.string),
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }
    with reading(f"{folder} ({split})"), tf.device("CPU"):
        examples = tf.io.parse_example(tf.constant(records), features)
        order = _places(folder, split, examples["id"].numpy())
        for png in examples["image"].numpy():
            # Checked before decoding, so that no header can claim a gigantic image.
            if not png.startswith(_PNG_START):
                raise DataError(f"{folder} holds a {split} image that is no 32x32 RGB PNG")
        decoded = tf.data.Dataset.from_tensor_slices(examples["image"]).map(
            lambda png: tf.io.decode_png(png, channels=3), num_parallel_calls=tf.data.AUTOTUNE
        )
        start = 0
        for batch in decoded.batch(1000).as_numpy_iterator():
            images[order[start : start + len(batch)]] = batch
            start += len(batch)
        found_labels = examples["label"].numpy()
    _check_labels(folder, found_labels)
    labels[order] = found_labels


def _places(folder: Path, split: str, identifiers: np.ndarray) -> np.ndarray:
    """Turns ids such as b"train_00042" into places, each of which must occur exactly once."""
    pattern = re.compile(rb"%b_(\d{5})" % split.encode())
    places = np.empty(len(identifiers), np.int64)
    for row, identifier in enumerate(identifiers):
        match = pattern.fullmatch(identifier)
        if match is None:
            raise DataError(
                f"{folder} has the id {shown(identifier, length=60)}, expected {split}_00000"
            )
        places[row] = int(match.group(1))
    if not np.array_equal(np.sort(places), np.arange(len(places))):
        raise DataError(f"{folder} does not hold each id from {split}_00000 on exactly once")
    return places
