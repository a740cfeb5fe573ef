"""Changes of bytes, and the containers that hostile files come in: `.npy`, zip, tar.

data = zip_of([("x.npy", npy("(10000000000,)", b""))])  # claims what it likes
data = mutate(random.Random(0), data)
"""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

# Where programs go wrong: around powers of two, and what is far more than there is.
NUMBERS = (
    *(0, 1, 2, 7, 127, 128, 255, 256, 511, 512, 65_535, 65_536, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 10**10, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
HOSTILE_NAMES = (
    *("../data_batch_1", "/etc/passwd", "a/../../test_batch", "..", "", ".", "x" * 300, "\x1b[31m"),
    *("data_batch_1", "data_batch_1.bin", "batches.meta", "C:\\x", "data_batch_2/", "a\nb"),
)

# --- changes that know nothing --------------------------------------------------------------


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Changes bytes anywhere, a few times."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        start = rng.randrange(len(found) + 1)
        end = min(len(found), start + rng.choice((1, 2, 4, 8, 30, 512, 4000)))
        piece = bytes(found[start:end])
        kind = rng.randrange(9)
        if kind == 0:
            del found[start:]
        elif kind == 1 and piece:
            found[start] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[start:end] = rng.randbytes(len(piece))
        elif kind == 3:
            number = number_bytes(rng, rng.choice((1, 2, 4, 8)))
            found[start : start + len(number)] = number
        elif kind == 4:
            del found[start:end]
        elif kind == 5:
            found[start:end] = piece * rng.choice((2, 3, 50))
        elif kind == 6:
            other = rng.randrange(len(found) + 1)
            found[other : other + len(piece)] = piece
        elif kind == 7:
            found[start:start] = rng.randbytes(rng.choice((1, 4, 60)))
        else:
            # Numbers in figures, as many headers have them.
            places = list(re.finditer(rb"[0-9]+", found[:100_000]))
            if places:
                place = rng.choice(places)
                found[place.start() : place.end()] = b"%d" % rng.choice(NUMBERS)
    return bytes(found)


def number_bytes(rng: random.Random, width: int) -> bytes:
    number = rng.choice(NUMBERS) & (256**width - 1)
    return number.to_bytes(width, "little" if rng.random() < 0.5 else "big")


def change_members(rng: random.Random, members: list[Any], hostile: Callable[[], Any]) -> None:
    """Drops, doubles, swaps or adds one entry of a list."""
    place = rng.randrange(len(members) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        members[place : place + 1] = []
    elif kind == 1:
        members[place:place] = members[:1] if rng.random() < 0.5 else members[place : place + 1]
    elif kind == 2 and len(members) > 1:
        one, other = rng.sample(range(len(members)), 2)
        members[one], members[other] = members[other], members[one]
    else:
        members.insert(place, hostile())


# --- containers -----------------------------------------------------------------------------

_DESCRIPTIONS = (
    *("|u1", "<i8", ">i4", "|O", "<f4", "<V2", "|V0", "|S0", "<U9999", "<m8[ns]", "O8", "u1,O"),
    *("(1000000000,)u1", "|Z9", "", "|b1", "<c16", "\x1b[31m", "|u9", "<i99999"),
)
_SHAPES = (
    *("()", "(0,)", "(2,)", "(10,)", "(12, 10)", "(10, 32, 32, 3)", "(10000000000,)", "(-1,)"),
    *("(4294967296, 4294967296)", "(2, 0, 9999999999)", "(1e9,)", "(1,) * 9**9", "((2,),)", "[2]"),
    *("(9999999999999999999999,)", "(" + "1, " * 60 + ")", "(" * 3000, "None", "(True,)", "(2"),
)


def npy(
    shape: str,
    data: bytes,
    *,
    description: str = "'|u1'",
    fortran: str = "False",
    version: int = 1,
    length: int | None = None,
) -> bytes:
    """An `.npy` file whose header says anything."""
    header = f"{{'descr': {description}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    text = header.encode("utf-8", "surrogateescape") + b"\n"
    form = "<H" if version == 1 else "<I"
    claimed = (len(text) if length is None else length) & (256 ** struct.calcsize(form) - 1)
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(form, claimed) + text + data


def changed_npy(rng: random.Random, shape: str, data: bytes, description: str) -> bytes:
    fields: dict[str, Any] = {"description": f"'{description}'"}
    kind = rng.randrange(7)
    if kind == 0:
        shape = rng.choice(_SHAPES)
    elif kind == 1:
        fields["description"] = f"'{rng.choice(_DESCRIPTIONS)}'"
    elif kind == 2:
        fields["fortran"] = rng.choice(("True", "None", "1", "__import__('os')", "-" * 5000))
    elif kind == 3:
        fields["version"] = rng.choice((0, 2, 2, 2, 3, 255))
    elif kind == 4:
        fields["length"] = rng.choice(NUMBERS)
    elif kind == 5:
        data = data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 0, 1, 5000)))
    else:
        return rng.choice((b"", pickle.dumps([1]), b"PK\3\4", b"\x93NUMPY"))
    return npy(shape, data, **fields)


_ZIP_FIELDS = {
    b"PK\3\4": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": (
        *((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2)),
        (42, 4),
    ),
    b"PK\5\6": ((4, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


def zip_of(members: Sequence[tuple[str, bytes]], *, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of these members, which may have the same name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
        for name, content in members:
            # Not `writestr` of a name: it warns of one that is there already.
            info = zipfile.ZipInfo(name.replace("\0", "") or "x")
            info.compress_type = method
            archive.NameToInfo.pop(info.filename, None)
            archive.writestr(info, content)
    return buffer.getvalue()


def _change_zip(rng: random.Random, data: bytes) -> bytes:
    """Puts a number into a field of one of the headers."""
    signature = rng.choice(tuple(_ZIP_FIELDS))
    places = [match.start() for match in re.finditer(re.escape(signature), data)]
    if not places:
        return data
    offset, width = rng.choice(_ZIP_FIELDS[signature])
    place = rng.choice(places) + offset
    number = rng.choice((*NUMBERS, 12, 14, len(data))) & (256**width - 1)
    return data[:place] + number.to_bytes(width, "little") + data[place + width :]


def zipped(rng: random.Random, members: list[tuple[str, bytes]], changes: int) -> bytes:
    usual = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
    methods = [*usual, *usual, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    if changes and rng.random() < 0.3:
        change_members(rng, members, lambda: (rng.choice(HOSTILE_NAMES), rng.randbytes(40)))
    data = zip_of(members, method=rng.choice(methods) if changes else zipfile.ZIP_STORED)
    for _ in range(changes if rng.random() < 0.5 else 0):
        data = _change_zip(rng, data)
    return data


def tar_header(
    name: bytes, size: int, *, kind: bytes = b"0", size_field: bytes = b"", prefix: bytes = b""
) -> bytes:
    """A header of a tar archive with the right checksum, whatever is in it.

    Args:
      name: at most 100 bytes.
      size: of the member.
      kind: its type.
      size_field: in place of the size, 12 bytes.
      prefix: before the name.
    """
    header, name, prefix = bytearray(512), name[:100], prefix[:155]
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = (size_field or b"%011o\0" % (size & (8**11 - 1)))[:12].ljust(12, b"\0")
    header[136:148] = b"00000000000\0"
    header[156:157] = kind[:1]
    header[257:265] = b"ustar\x0000"
    header[345 : 345 + len(prefix)] = prefix
    header[148:156] = b"%06o\0 " % (sum(header) + sum(b" " * 8))
    return bytes(header)


def pax(records: dict[str, str]) -> bytes:
    """The content of an extended header."""
    lines = []
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        lines.append(str(length).encode() + rest)
    return b"".join(lines)


def tar_member(name: str, content: bytes, **fields: Any) -> bytes:
    """A whole member: header, content, and zeros up to the next."""
    header = tar_header(name.encode("utf-8", "surrogateescape"), len(content), **fields)
    return header + content + bytes(-len(content) % 512)
