"""Inputs that `fuzz_readers.py` tries first: what once broke a rule, or claims the most.

for make in KEPT["npz"]:
    data = make()
"""

from __future__ import annotations

import gzip
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

from fuzz_bytes import npy, tar_header, tar_member, zip_of
from fuzz_inputs import capsule_files, official_pickle, signed

Makers = Sequence[Callable[[], bytes]]
_TEN_GB = 10**10
_DEEP = b"[" * 100_000


def _shared_label(levels: int = 60) -> bytes:
    """A label that is a list which holds another twice, and so on: its repr has 2**60 figures."""
    opcodes = [b"]q\x40"]
    for level in range(levels):
        below, this = 0x40 + level % 2, 0x40 + (level + 1) % 2
        opcodes.append(b"]q%c(h%ch%ce" % (this, below, below))
    labels = b"U\x06labelsq\x0c]q\r(K\x01K\x02e"
    hostile = b"U\x04more](%beU\x06labels](K\x01h%ce" % (b"".join(opcodes), 0x40 + levels % 2)
    return official_pickle().replace(labels, hostile)


def _hashed_tuples(levels: int) -> bytes:
    """A tuple of tuples as a dictionary's key, hashed anew each time."""
    tuples = b")q\0" + b"h\0h\0\x86q\0" * levels
    return b"\x80\x02}q\x01" + tuples + b"h\x01(" + b"h\0N" * 40_000 + b"u."


_PICKLES: Makers = (
    _shared_label,
    lambda: _hashed_tuples(15),
    lambda: _hashed_tuples(8),
    # Millions of lists, a byte each.
    lambda: b"\x80\x02" + b"]" * 2_000_000 + b".",
    lambda: b"\x80\x02c" + b"x" * 100_000 + b"\x1b[31m\nx\n.",
    lambda: b"\x80\x02B\xff\xff\xff\xff.",
    lambda: b"\x80\x04\x8e" + struct.pack("<Q", _TEN_GB) + b".",
    lambda: b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    lambda: b"\x80\x02Nr\xff\xff\xff\xff.",
    lambda: b"\x80\x02cos\nsystem\nU\x04true\x85R.",
    lambda: b"(" * 100_000,
)


def _packed(*members: bytes) -> bytes:
    return gzip.compress(b"".join(members), 1, mtime=0)


_ARCHIVES: Makers = (
    lambda: _packed(
        tar_header(b"x", 0, kind=b"x", size_field=b"\x80" + _TEN_GB.to_bytes(11, "big")),
        bytes(64_000_000),
    ),
    lambda: _packed(tar_member("data_batch_1", bytes(32_000_000)), bytes(64_000_000)),
    lambda: _packed(bytes(64_000_000)),
    # A name in the gzip header, which Python's reader takes byte by byte.
    lambda: b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"x" * 6_000_000,
    lambda: _packed(b"") * 100_000,
    lambda: _packed(*(tar_member(f"file_{number}", b"") for number in range(20_000))),
    # Extended headers: a record of no length, records that are hard to find, one of a megabyte.
    lambda: _packed(tar_member("x", b"0 path=x\n", kind=b"x") * 3),
    lambda: _packed(tar_member("x", b"5 555" * 100_000 + b"=", kind=b"x")),
    lambda: _packed(tar_member("x", b"x" * 1_100_000, kind=b"L")),
    lambda: _packed(tar_member("data_batch_1", b"", size_field=b"\xff" * 12) * 3),
    lambda: _packed(tar_member("data_batch_1", b"", size_field=b"\x80" + b"\xff" * 11)),
    # What nobody wants is skipped, by Python's `tarfile` a megabyte at a time.
    lambda: _packed(tar_member("readme.html", b"", size_field=b"\x80" + b"\xff" * 11)),
    lambda: _packed(tar_member("x", b"\1" * 500_000, kind=b"S")),
    lambda: _packed(tar_member("../data_batch_1", official_pickle())),
    lambda: _packed(tar_member("data_batch_1", b"", kind=b"2")),
)


def _overlapping(name: str, times: int = 5000) -> bytes:
    """A zip file of 1.4 MB whose members, each the same megabyte, claim five thousand."""
    data = zip_of([(name, bytes(1_000_000))])
    end = data[-22:]
    start = struct.unpack("<I", end[16:20])[0]
    directory = data[start:-22] * times
    counts = struct.pack("<HHII", times, times, len(directory), start)
    return data[:start] + directory + end[:8] + counts + end[20:]


def _npz_with(name: str, content: bytes) -> bytes:
    members = {"x_train": b"", "y_train": b"", "x_test": b"", "y_test": b"", name: content}
    return zip_of([(f"{n}.npy", c) for n, c in members.items()], method=zipfile.ZIP_DEFLATED)


# A directory of a hundred thousand members without a name.
_DIRECTORY = struct.pack("<IIH", 4_600_000, 0, 0)
_ZIPS: Makers = (
    lambda: (b"PK\1\2" + bytes(42)) * 100_000 + b"PK\5\6" + bytes(8) + _DIRECTORY,
    lambda: _overlapping("header.npy"),
    lambda: _overlapping("x_train.npy"),
    lambda: b"PK\5\6" + bytes(18),
)
_NPZ: Makers = (
    *_ZIPS,
    # NumPy would read all of this header before it looks how long it is.
    lambda: _npz_with("x_train", npy("(2, 3)", bytes(64_000_000), version=2, length=2**32 - 1)),
    lambda: _npz_with("x_train", npy("(10, 32, 32, 3)", bytes(64_000_000))),
    lambda: _npz_with("x_train", npy("(10000000000, 32, 32, 3)", b"")),
    lambda: _npz_with("x_train", npy("(1,)", pickle.dumps(print), description="'|O'")),
    lambda: _npz_with("x_train", npy("(" * 9000, b"")),
    lambda: _npz_with("x_train", npy("()", b"", fortran="-" * 9000 + "1")),
)
_OUTPUTS: Makers = (
    lambda: npy("(10000000000, 10)", b"", description="'<f4'"),
    lambda: npy("(2, 10)", bytes(80), description="'<f4'", version=2, length=2**32 - 1),
    lambda: npy("(2, 0, 99999999999)", b"", description="'<f4'"),
    lambda: pickle.dumps(print),
    lambda: zip_of([("a.npy", npy("(2,)", b"12"))]),
)

_JSON: Makers = (
    lambda: _DEEP,
    lambda: _DEEP + b"]" * len(_DEEP),
    lambda: b'{"a":' * 900 + b"0" + b"}" * 900,
    lambda: b'{"model_options": ' + b"[" * 400 + b"]" * 400 + b"}",
    lambda: b"{" + b'"a":1,' * 500_000 + b'"b":2}',
    lambda: b'{"step": NaN, "epochs": 1e999}',
    lambda: b'{"seed": ' + b"9" * 100_000 + b"}",
    lambda: b"\xff\xfe{\0}\0",
    lambda: bytes(4_000_000),
    # As many lists as a file of this size can hold, of 56 bytes each.
    lambda: b'{"name":[' + b"[]," * 330_000 + b"0]}",
    lambda: b'{"name":[' + b"[]," * 1_000_000 + b"0]}",
    lambda: b'{"\\u001b[31m\\n": "\\ud800"}',
)
_ROWS: Makers = (
    *_JSON,
    # One endless line.
    lambda: b'{"step": 1, "loss": "' + b"x" * 8_000_000,
    lambda: b'{"step": 1, "loss": NaN}\n{"step": 2}\n',
    lambda: b'{"step": 1, "loss": [[1]]}\n{"step": 2}\n',
    lambda: b'{"step": true}\n{"step": 2}\n',
    lambda: b'{"step": 1, "epoch": ' + b"9" * 400 + b"}\n\n",
    lambda: b'{"step": 1}\n' * 20_000,
    lambda: b"\n" * 200_000,
)


def _checkpoint_of(header: bytes) -> bytes:
    return zip_of([("header.npy", npy(f"({len(header)},)", header))])


_CHECKPOINTS: Makers = (
    *_ZIPS,
    lambda: _checkpoint_of(_DEEP),
    lambda: _checkpoint_of(b'{"variables": ' + b"[" * 900 + b"]" * 900 + b"}"),
    lambda: _checkpoint_of(b'{"format": 2, "step": 7, "variables": {}, "score": 0, "extra": {}}'),
    lambda: _checkpoint_of(b"[" + b"[]," * 1_000_000 + b"0]"),
    lambda: _checkpoint_of(b"[" + b"[]," * 300_000 + b"0]"),
    lambda: zip_of([("header.npy", npy("(10000000000,)", b""))]),
    lambda: zip_of([("header.npy", npy("(1,)", pickle.dumps(print), description="'|O'"))]),
    lambda: zip_of([("header.npy", npy("(1,)", bytes(9), version=2, length=2**32 - 1))]),
)


def _capsule_of(dtype: str) -> bytes:
    """A capsule whose batch has another type than any array."""
    values = json.loads(capsule_files()["capsule.json"])
    return signed({**values, "batch": [[[2, 4, 4, 3], dtype], [[2], "int32"]]})


_CAPSULES: Makers = (
    *_JSON,
    lambda: _capsule_of("i8," * 300_000 + "i8"),
    lambda: _capsule_of("O"),
    lambda: _capsule_of("(1000000,1000000)f8"),
    lambda: _capsule_of("\x1b[31m"),
)


def _png_of(width: int, height: int, *, text: int = 0) -> bytes:
    """A grey picture of one bit a pixel, all black, and a comment that unpacks to so many bytes."""
    rows = zlib.compress(bytes(height * (1 + -(-width // 8))) if width < 10**5 else b"", 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    if text:
        chunks.insert(1, (b"zTXt", b"x\0\0" + zlib.compress(bytes(text), 9)))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        check = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + check
    return data


_PICTURES: Makers = (
    lambda: _png_of(6_000, 6_000),
    lambda: _png_of(6_001, 6_001),
    lambda: _png_of(2**31 - 1, 2**31 - 1),
    lambda: _png_of(32, 32, text=50_000_000),
    lambda: b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(100),
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
)

KEPT: dict[str, Makers] = {
    "pickle": _PICKLES,
    "archive": _ARCHIVES,
    "npz": _NPZ,
    "tfrecord": (lambda: bytes(16) * 200_000, lambda: b"\xff" * 8 + bytes(100)),
    "verified": _JSON,
    "workdir": _JSON,
    "summary": _JSON,
    "history": _ROWS,
    "outputs": _OUTPUTS,
    "checkpoint": _CHECKPOINTS,
    "recipe": _JSON,
    "capsule": _CAPSULES,
    "picture": _PICTURES,
}
