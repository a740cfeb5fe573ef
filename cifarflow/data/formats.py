"""Decoders: every format in which people keep CIFAR-10 or CIFAR-100, to the same arrays.

    from cifarflow.data import formats

    found = formats.locate(pathlib.Path("~/data").expanduser())  # None if nothing known is there
    found = formats.locate(pathlib.Path("/data"), CIFAR100)      # the other set, by its layout
    arrays = formats.read(found)
    arrays.train_images  # [50000, 32, 32, 3] uint8, in the order of the official files

Known are the folder of the python version, that of the binary version, the `.tar.gz` of either
(read as a stream, nothing is unpacked to disk), an `.npz` with the keys x_train, y_train, x_test,
y_test, and a directory prepared by TensorFlow Datasets.

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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cifarflow.data.layouts import CIFAR10, IMAGE_SHAPE, LAYOUTS, PIXELS, Layout
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

# An official python batch has 3.11 kB an image, a binary one 3.07 kB, an archive 187 MB unpacked.
_BATCH_BYTES_LIMIT = 32_000_000
_EXAMPLE_BYTES_LIMIT = 3_200
_ARCHIVE_BYTES_LIMIT = 200_000_000
# A 32x32 RGB image needs 3.1 kB in the worst case as PNG; a TFDS record adds a hundred bytes.
_RECORD_BYTES_LIMIT = 8_192

_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Arrays(NamedTuple):
    """A whole data set as it lies in the files, before any validation split.

    Attributes:
      train_images: [N, H, W, 3] uint8, 0..255.
      train_labels: [N] int32, from 0.
      test_images: [M, H, W, 3] uint8, 0..255.
      test_labels: [M] int32, from 0.
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
      layout: of the set.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    layout: Layout = CIFAR10


class OtherSetError(DataError):
    """A data set was found where another was asked for."""


# --- finding ------------------------------------------------------------------------------


def locate(path: Path, layout: Layout = CIFAR10) -> Found | None:
    """Finds a data set at `path`: a file, the folder itself, or the folder that holds it.

    Nothing is decoded here; a folder counts as found as soon as one batch file lies in it.

    Args:
      path: file or folder; it need not exist.
      layout: of the set to find.

    Returns:
      What was found, or None if nothing known is there.

    Raises:
      DataError: if `path` is a file of no known format, or files are missing from a folder
        that otherwise matches.
    """
    if os.path.isfile(path):
        return _locate_file(path, layout)
    if not os.path.isdir(path):
        return None
    found = _locate_folder(path, layout)
    for name in layout.known_names:
        if found is not None:
            break
        child = path / name
        locate_child = _locate_file if os.path.isfile(child) else _locate_folder
        found = locate_child(child, layout)
    return found


def _locate_file(path: Path, layout: Layout) -> Found:
    # By content, not by name: Keras calls its archive `cifar-10-batches-py-target_archive`.
    with reading(path), open_file(path) as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return Found("archive", path, (path,), layout)
    if magic[:2] == b"PK":
        return Found("npz", path, (path,), layout)
    raise DataError(f"{path} is neither a .tar.gz archive nor an .npz file: it starts {magic!r}")


def _locate_folder(folder: Path, layout: Layout) -> Found | None:
    for kind, names in (("python", layout.python), ("binary", layout.binary)):
        missing = [name for name in names if not os.path.isfile(folder / name)]
        if len(missing) < len(names):
            if missing:
                raise DataError(
                    f"{folder} lacks {', '.join(missing)}; "
                    f"a complete folder holds {', '.join(names)}"
                )
            files = [folder / name for name in names]
            if kind == "python":
                meta = (folder / name for name in layout.python_meta)
                files += [path for path in meta if os.path.isfile(path)]
            return Found(kind, folder, tuple(files), layout)
    train, test = (find_shards(folder, layout.name, split) for split in ("train", "test"))
    if train or test:
        if not (train and test):
            raise DataError(f"{folder} lacks the {'test' if train else 'train'} tfrecord files")
        return Found("tfds", folder, (*train, *test), layout)
    return None


def find_shards(folder: Path, name: str, split: str) -> list[Path]:
    """Returns the tfrecord files of a split in a prepared TFDS directory, in order.

    Args:
      folder: the directory of one version; it need not exist.
      name: of the data set.
      split: "train" or "test".

    Raises:
      DataError: if one is missing, or there are two sets of them.
    """
    try:
        names = os.listdir(folder)
    except OSError:  # not there, no folder, or not ours to read
        return []
    pattern = re.compile(rf"{name}-{split}\.tfrecord-(\d{{5}})-of-(\d{{5}})")
    matches = [match for entry in names if (match := pattern.fullmatch(entry))]
    if not matches:
        return []
    count = int(matches[0].group(2))
    # At 60,000 images nobody has more shards; the claim in a name must not make a long list.
    expected = [f"{name}-{split}.tfrecord-{i:05d}-of-{count:05d}" for i in range(min(count, 1000))]
    missing = sorted(set(expected) - {match.group(0) for match in matches})
    if missing or len(matches) != len(expected):
        what = f"lacks {missing[0]}" if missing else f"holds two sets of {split} tfrecord files"
        raise DataError(f"{folder} {what}")
    return [folder / entry for entry in expected]


# --- reading ------------------------------------------------------------------------------


def read(found: Found, *, verify: bool = True) -> Arrays:
    """Decodes what `locate` found.

    Args:
      found: the place.
      verify: whether to hold the content against the official checksums: md5 of each batch
        file, or what the decoded arrays come to for the formats that have no official file.

    Returns:
      The arrays, the same bytes in the same order from every format.

    Raises:
      DataError: if a file is unreadable, damaged, unsafe or, with `verify`, altered.
    """
    reader = {
        "python": _read_folder,
        "binary": _read_folder,
        "archive": _read_archive,
        "npz": _read_whole_npz,
        "tfds": _read_tfds,
    }[found.kind]
    return reader(found, verify)


def expected_of(found: Found) -> dict[Path, str]:
    """Returns what `read` verifies of each file: what it must be to be in its place.

    That is the md5 of a batch, of which each has its own; of the others the checksum of all arrays
    together, and with it a shard's name, which says what of them is in it.
    """
    layout = found.layout
    if found.kind in ("python", "binary"):
        table = {**layout.python, **layout.python_meta, **layout.binary}
        return {path: table[path.name] for path in found.files}
    whole = layout.arrays_sha256 or " ".join(layout.binary.values())
    if found.kind == "tfds":
        return {path: f"{whole} {path.name}" for path in found.files}
    return dict.fromkeys(found.files, whole)


def digest(arrays: Arrays) -> str:
    """Returns the sha256 of the images and labels of both splits, in hexadecimal."""
    sha256 = hashlib.sha256()
    for array in arrays:
        # Labels little-endian, so that the sum does not depend on the machine.
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        sha256.update(np.ascontiguousarray(little).data)
    return sha256.hexdigest()


def _check_arrays(path: Path, arrays: Arrays, layout: Layout) -> None:
    """Holds decoded arrays against the official checksums."""
    if layout.arrays_sha256:
        found = digest(arrays)
        if found != layout.arrays_sha256:
            raise DataError(
                f"{path} is damaged or altered: the sha256 of its decoded arrays is {found}, "
                f"expected {layout.arrays_sha256}"
            )
        return
    for (name, expected), images, labels in zip(
        layout.binary.items(), arrays[::2], arrays[1::2], strict=True
    ):
        md5 = hashlib.md5(usedforsecurity=False)
        for start in range(0, len(labels), 10_000):  # 31 MB at a time
            rows = slice(start, start + 10_000)
            md5.update(as_records(images[rows], labels[rows], layout))
        if md5.hexdigest() != expected:
            raise DataError(
                f"{path} is damaged or altered: as {name} its arrays have the md5 "
                f"{md5.hexdigest()}, expected {expected}"
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


def _empty_arrays(layout: Layout) -> Arrays:
    return Arrays(
        np.empty((layout.train_examples, *IMAGE_SHAPE), np.uint8),
        np.empty(layout.train_examples, np.int32),
        np.empty((layout.test_examples, *IMAGE_SHAPE), np.uint8),
        np.empty(layout.test_examples, np.int32),
    )


def check_labels(name: object, labels: np.ndarray, num_classes: int) -> None:
    """Checks the labels that a file holds.

    Args:
      name: of the file, for the message.
      labels: [N] integers.
      num_classes: how many classes there are.

    Raises:
      DataError: if one is no class.
    """
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise DataError(
            f"{name} has labels from {labels.min()} to {labels.max()}, "
            f"expected 0 to {num_classes - 1}"
        )


def _store_batch(
    arrays: Arrays, layout: Layout, index: int, pixels: np.ndarray, labels: np.ndarray
) -> None:
    """Puts one decoded batch in its place: the last is the test set, all others train."""
    if index < len(layout.python) - 1:
        examples = layout.examples_in(index)
        rows = slice(index * examples, (index + 1) * examples)
        images, targets = arrays.train_images[rows], arrays.train_labels[rows]
    else:
        images, targets = arrays.test_images, arrays.test_labels
    targets[:] = labels
    # Plane by plane: several times as fast as one transposed copy.
    flat = images.reshape(-1, 1024, 3)
    for channel in range(3):
        flat[:, :, channel] = pixels[:, channel * 1024 : (channel + 1) * 1024]


def _read_folder(found: Found, verify: bool) -> Arrays:
    layout = found.layout
    arrays = _empty_arrays(layout)
    table = layout.python if found.kind == "python" else layout.binary
    decode = decode_python_batch if found.kind == "python" else decode_binary_batch

    def read_batch(index: int) -> None:
        path = found.files[index]
        data = _read_file(path, _most_bytes(layout))
        if verify:
            _check_md5(str(path), data, table[path.name])
        _store_batch(arrays, layout, index, *decode(data, str(path), layout, index=index))

    # Reading, md5 and the copies release the GIL, so two threads halve the time.
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(read_batch, range(len(table))))
    for path in found.files[len(table) :]:  # batches.meta: checked, but nothing in it is needed
        if verify:
            _check_md5(str(path), _read_file(path, 1_000_000), layout.python_meta[path.name])
    return arrays


def _most_bytes(layout: Layout) -> int:
    """The bytes that no batch file of the set has."""
    most = max(map(layout.examples_in, range(len(layout.python))))
    return max(_BATCH_BYTES_LIMIT, _EXAMPLE_BYTES_LIMIT * most)


# --- the python version: pickles ----------------------------------------------------------


class _PickledDtype:
    """Stands in for `numpy.dtype` while a batch is unpickled: only uint8 gets through."""

    def __init__(self, name: object = None, *flags: object) -> None:
        if name not in (b"u1", "u1"):
            raise DataError(f"dtype {shown(name)}, expected uint8")

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment: without meaning for one-byte numbers


class _PickledArray:
    """Stands in for `numpy.ndarray`: takes the pixels of a batch as they lie, allocates nothing."""

    def __init__(self, *claims: object) -> None:
        self.pixels: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        examples = len(data) // PIXELS if isinstance(data, bytes) else -1
        if shape != (examples, PIXELS) or not isinstance(dtype, _PickledDtype) or is_fortran:
            raise DataError(f"pixels of shape {shown(shape)}, expected (N, {PIXELS})")
        if len(data) != examples * PIXELS:
            raise DataError(f"pixel data that is not {examples * PIXELS} bytes")
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
# The official files have 3 to 4 opcodes an image, 6 of which make a tuple.
_OPCODES_AN_EXAMPLE = 10
_MEMO_LIMIT = 1_000_000
_TUPLES_LIMIT = 8


def _check_opcodes(data: bytes, layout: Layout) -> None:
    """Refuses what makes an unpickler itself use much memory or time.

    One opcode, a byte long, makes a list of 56 bytes or can claim a memo of 4 billion slots;
    `genops` refuses a string longer than the data; a few dozen tuples of tuples used as a
    dictionary key take 2**n steps to hash.
    """
    tuples = 0
    most = max(100_000, _OPCODES_AN_EXAMPLE * layout.train_examples // (len(layout.python) - 1))
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(data), 1):
        if count > most:
            raise DataError(f"the pickle holds more than {most} opcodes")
        name = opcode.name
        if name not in _ADMITTED_OPCODES:
            raise DataError(f"the pickle holds {name}, which a {layout.title} batch never does")
        if name == "LONG_BINPUT" and int(argument or 0) > _MEMO_LIMIT:
            raise DataError(f"the pickle claims {argument} memo slots")
        tuples += name.startswith("TUPLE")
    if tuples > _TUPLES_LIMIT:
        raise DataError(f"the pickle holds {tuples} tuples, expected at most {_TUPLES_LIMIT}")


def decode_python_batch(
    data: bytes, name: str, layout: Layout = CIFAR10, *, index: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one file of the python version.

    Args:
      data: the file's bytes, a pickled dictionary.
      name: what to call it in messages.
      layout: of the set.
      index: which file it is, in the layout's order.

    Returns:
      pixels: [N, 3072] uint8, the planes red, green, blue of each image.
      labels: [N] int32.

    Raises:
      DataError: if it is no such pickle, or holds anything else.
    """
    with reading(name):
        try:
            _check_opcodes(data, layout)
            batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        except DataError as error:
            raise DataError(f"{name} is refused: {error}") from None
    if not isinstance(batch, dict):
        raise DataError(f"{name} holds a pickled {type(batch).__name__}, expected a dictionary")
    examples, classes, key = layout.examples_in(index), layout.num_classes, layout.labels_key
    array, labels = batch.get(b"data"), batch.get(key)
    if not isinstance(array, _PickledArray) or array.pixels is None:
        raise DataError(f"{name} has no array under the key b'data'")
    if len(array.pixels) != examples:
        raise DataError(f"{name} holds {len(array.pixels)} images, expected {examples}")
    if not isinstance(labels, list) or len(labels) != examples:
        raise DataError(f"{name} has no list of {examples} labels under the key {key!r}")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < classes]
    if wrong:
        # No plain repr: that of a list which holds another twice, and so on, has no end.
        label = shown(wrong[0], length=40)
        raise DataError(f"{name} has the label {label}, expected 0 to {classes - 1}")
    return array.pixels, np.array(labels, np.int32)


# --- the binary version -------------------------------------------------------------------


def decode_binary_batch(
    data: bytes, name: str, layout: Layout = CIFAR10, *, index: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one file of the binary version: the label, then 3072 pixel bytes, a record.

    A record of CIFAR-100 has a byte for the coarse label before.

    Args:
      data: the file's bytes.
      name: what to call it in messages.
      layout: of the set.
      index: which file it is, in the layout's order.

    Returns:
      pixels: [N, 3072] uint8, the planes red, green, blue of each image.
      labels: [N] int32.

    Raises:
      DataError: if the size is wrong or a label is out of range.
    """
    examples, label_bytes = layout.examples_in(index), layout.label_bytes
    expected = examples * (label_bytes + PIXELS)
    if len(data) != expected:
        raise DataError(f"{name} has {len(data)} bytes, expected {expected}")
    records = np.frombuffer(data, np.uint8).reshape(examples, label_bytes + PIXELS)
    labels = records[:, label_bytes - 1].astype(np.int32)
    check_labels(name, labels, layout.num_classes)
    return records[:, label_bytes:], labels


def as_records(images: np.ndarray, labels: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns images and labels as the binary version has them, which `decode_binary_batch` reads.

    Args:
      images: [N, 32, 32, 3] uint8.
      labels: [N] integers.
      layout: of the set; a coarse label is that of the class.

    Returns:
      [N, 3073 or 3074] uint8.
    """
    records = np.empty((len(labels), layout.label_bytes + PIXELS), np.uint8)
    if layout.coarse:
        records[:, 0] = np.array(layout.coarse)[labels]
    records[:, layout.label_bytes - 1] = labels
    planes = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    records[:, layout.label_bytes :] = planes
    return records


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
            return _read_tar(stream, verify, found)
    except DataError as error:
        if not verify or isinstance(error, OtherSetError):
            raise
        # Say at once whether the download is to blame; only the message costs this md5.
        with reading(path), open_file(path) as file:
            md5 = hashlib.md5(usedforsecurity=False)
            while block := file.read(1 << 20):
                md5.update(block)
        raise DataError(
            f"{error} (the archive's md5 is {md5.hexdigest()}, expected "
            f"{found.layout.python_archive_md5} for the python version or "
            f"{found.layout.binary_archive_md5} for the binary one)"
        ) from error


def _read_tar(stream: Any, verify: bool, found: Found) -> Arrays:
    path, layout = found.path, found.layout
    arrays = _empty_arrays(layout)
    seen: dict[str, set[str]] = {"python": set(), "binary": set()}
    decoders: dict[str, tuple[Mapping[str, str], Callable[..., Any]]] = {
        "python": (layout.python, decode_python_batch),
        "binary": (layout.binary, decode_binary_batch),
    }
    others: set[str] = set()
    # Members are only ever read into memory, never extracted.
    for member, data in _tar_files(stream, path, _most_bytes(layout)):
        name = Path(member).name
        kind = "binary" if name in layout.binary else "python"
        table, decode = decoders[kind]
        if name not in (*table, *layout.python_meta):
            others.add(name)
            continue
        label = f"{name} in {path}"
        if name in seen[kind]:
            raise DataError(f"{path} holds {name} twice")
        if verify:
            _check_md5(label, data, {**table, **layout.python_meta}[name])
        if name in table:
            seen[kind].add(name)
            index = list(table).index(name)
            _store_batch(arrays, layout, index, *decode(data, label, layout, index=index))
    if seen["python"] and seen["binary"]:
        raise DataError(f"{path} mixes the python and the binary version")
    kind = "binary" if seen["binary"] else "python"
    missing = [name for name in decoders[kind][0] if name not in seen[kind]]
    if missing:
        for other in LAYOUTS.values():
            if others.issuperset(other.python) or others.issuperset(other.binary):
                raise OtherSetError(mistaken(path, other, layout))
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return arrays


def mistaken(path: object, found: Layout, wanted: Layout) -> str:
    """The message about a data set that is found where another was asked for.

    Args:
      path: where.
      found: what is there.
      wanted: what should be.
    """
    return f"{path} holds {found.title}, not {wanted.title}: give --data={found.name} to take it"


# The official archives have 8 and 9 members; who packs one on a Mac may double them.
_MEMBERS_LIMIT = 100
_EXTENDED_BYTES_LIMIT = 1 << 20


def _tar_files(
    stream: Any, path: Path, limit: int = _BATCH_BYTES_LIMIT
) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the files in a tar archive, strictly forward.

    Python's `tarfile` would read extended headers and maps of sparse files of any length, keep
    every member in memory, and step through one that claims 10**26 bytes without an end.

    Source: POSIX.1-2001, pax interchange format; GNU tar's manual, "Basic Tar Format".

    Args:
      stream: unpacked; its `read` returns what is asked for, less only at the end.
      path: of the archive, for messages.
      limit: the bytes that no member has.

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
        if not 0 <= size <= limit:
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


def _read_whole_npz(found: Found, verify: bool) -> Arrays:
    layout = found.layout
    arrays = read_npz(
        found.path,
        train_examples=layout.train_examples,
        test_examples=layout.test_examples,
        # Labels of the other set are read as well, to be told as such.
        num_classes=max(other.num_classes for other in LAYOUTS.values()),
    )
    classes = int(arrays.train_labels.max()) + 1
    if classes != layout.num_classes and classes == len(np.unique(arrays.train_labels)):
        for other in LAYOUTS.values():
            if other.num_classes == classes:
                raise OtherSetError(mistaken(found.path, other, layout))
    for labels in arrays[1::2]:
        check_labels(found.path, labels, layout.num_classes)
    if verify:
        _check_arrays(found.path, arrays, layout)
    return arrays


def read_npz(
    path: Path,
    *,
    train_examples: int = CIFAR10.train_examples,
    test_examples: int = CIFAR10.test_examples,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    num_classes: int = CIFAR10.num_classes,
) -> Arrays:
    """Reads an `.npz` with the keys x_train, y_train, x_test, y_test.

    Args:
      path: the file, compressed or not.
      train_examples: how many training images it must hold.
      test_examples: how many test images it must hold.
      image_shape: (H, W, C) that they must have.
      num_classes: above every label.

    Returns:
      The arrays. Labels may be any integers in the file and of shape [N] or [N, 1] (as Keras
      gives them); they come back as [N] int32.

    Raises:
      DataError: if a key is missing, or a shape, dtype or label is wrong.
    """
    with reading(path), open_npz(path) as archive:
        names = archive.namelist()
        missing = [key for key in _NPZ_KEYS if f"{key}.npy" not in names]
        if missing:
            raise DataError(f"{path} lacks the arrays {', '.join(missing)}")
        parts = []
        for split, examples in (("train", train_examples), ("test", test_examples)):
            shape = (examples, *image_shape)
            parts.append(_read_npy(archive, path, f"x_{split}", shape))
            labels = _read_npy(archive, path, f"y_{split}", (examples,))
            check_labels(f"y_{split} in {path}", labels, num_classes)
            parts.append(labels.astype(np.int32))
    return Arrays(*parts)


def _read_npy(
    archive: zipfile.ZipFile, path: Path, key: str, wanted: tuple[int, ...]
) -> np.ndarray:
    is_images = key.startswith("x_")
    name, member = f"{key} in {path}", f"{key}.npy"
    with reading(name), archive.open(member) as file:
        # The header is checked before a byte of the array is allocated or read; an array of
        # dtype object, the only kind that would need a pickle, fails here as well.
        header = read_array_header(file)
        dtype, shape, is_fortran = header
        if is_images:
            good = shape == wanted and dtype == np.uint8
            expected = f"uint8 of shape {wanted}"
        else:
            good = shape in (wanted, (*wanted, 1)) and dtype.kind in "iu"
            expected = f"integers of shape {wanted} or {(*wanted, 1)}"
        if not good or is_fortran:
            order = " in Fortran order" if is_fortran else ""
            raise DataError(f"{name} is {dtype} of shape {shape}{order}, expected {expected}")
        array = read_array(file, header, size=archive.getinfo(member).file_size)
    return array if is_images else array.reshape(-1)


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
    layout = found.layout
    arrays = _empty_arrays(layout)
    for split, images, labels in (
        ("train", arrays.train_images, arrays.train_labels),
        ("test", arrays.test_images, arrays.test_labels),
    ):
        prefix = f"{layout.name}-{split}."
        shards = [path for path in found.files if path.name.startswith(prefix)]
        _read_tfds_split(shards, split, images, labels)
        check_labels(found.path, labels, layout.num_classes)
    if verify:
        _check_arrays(found.path, arrays, layout)
    return arrays


def read_records(
    path: Path, limit: int = _ARCHIVE_BYTES_LIMIT, *, record_limit: int = _RECORD_BYTES_LIMIT
) -> Iterator[bytes]:
    """Yields the records of a tfrecord file: length (8 bytes), crc (4), the bytes, crc (4).

    Args:
      path: the file.
      limit: the most bytes that it may have.
      record_limit: the most bytes that a record may have.

    Raises:
      DataError: if it is damaged, cut short or too large.
    """
    data = _read_file(path, limit)
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        end = position + 12 + length
        if length > record_limit or end + 4 > len(data):
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
        found = list(itertools.islice(read_records(path, left), len(images) + 1 - len(records)))
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
    labels[order] = np.clip(found_labels, -1, np.iinfo(np.int32).max)


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
