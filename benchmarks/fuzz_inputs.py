"""Hostile files for `fuzz_readers.py`: small valid ones, changed where it hurts.

    rng = random.Random("npz 0 17")
    data = BUILDERS["npz"](rng, 2)

Each builder makes so many changes that know the format: of fields, members, opcodes, nodes of a
JSON value.  With none of them the file is valid.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import pathlib
import pickle
import pickletools
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fuzz_bytes import (
    HOSTILE_NAMES,
    change_members,
    changed_npy,
    mutate,
    npy,
    number_bytes,
    pax,
    tar_member,
    zip_of,
    zipped,
)
from PIL import Image

from cifarflow.training.checkpoints import Checkpoints

# Of the data set that the readers are told to expect.
BATCH_EXAMPLES = 2
TRAIN_EXAMPLES, TEST_EXAMPLES = 5 * BATCH_EXAMPLES, BATCH_EXAMPLES
PIXELS = 3072
# Of the run that they are told to go on with.
RUN_STEP = 7


# --- pickles --------------------------------------------------------------------------------

RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
_HOSTILE_OPCODES = (
    *(b"]", b"}", b")", b"(", b"0", b"1", b"2", b"N", b"a", b"e", b"s", b"u", b"d", b"l", b"t"),
    *(b"\x85", b"\x86", b"\x87", b"R", b"b", b"o", b"\x81", b"\x92", b"\x93", b"\x94", b"Q", b"."),
    *(b"q\0", b"h\0", b"h\x05", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\xff", b"K\x05", b"M\xff\xff"),
    *(b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8, b"\x8b\xff\xff\xff\x7f", b"G" + b"\x7f" * 8),
    *(b"I" + b"9" * 5000 + b"\n", b"L99L\n", b"F1e999\n", b"P1\n", b"S'x'\n", b"V\\ud800\n"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"),
    *(b"c\x1b[31m\n\x07\n", b"ios\nsystem\n", RECONSTRUCT, b"\x8c\x02os", b"\x82\x01", b"\x97"),
    *(b"T\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"U\xff", b"C\xff"),
    *(code + struct.pack("<Q", 10**10) for code in (b"\x8e", b"\x8d", b"\x95", b"\x96")),
)


def official_pickle(labels: Sequence[int] = (1, 2), *, shade: int = 9) -> bytes:
    """A batch as Python 2 wrote it, which Python 3 does not any more."""
    pixels = bytes([shade]) * (BATCH_EXAMPLES * PIXELS)
    return (
        b"\x80\x02}q\x01(U\x04dataq\x02" + RECONSTRUCT + b"q\x03cnumpy\nndarray\nq\x04K\0\x85"
        b"U\x01bq\x05\x87Rq\x06(K\x01K"
        + bytes([BATCH_EXAMPLES])
        + b"M\0\x0c\x86cnumpy\ndtype\nq\x07U\x02u1q\x08K\0K\x01\x87Rq\x09(K\x03U\x01|q\n"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"q\x0btbU\x06labelsq\x0c]q\r("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eU\x0bbatch_labelq\x0eU\x06a nameq\x0fU\x09filenamesq\x10]q\x11(U\x01aU\x01beu."
    )


def _build_pickle(rng: random.Random, changes: int) -> bytes:
    data = official_pickle()
    if not changes:
        return data
    if rng.random() < 0.3:
        data = pickle.dumps({b"labels": [1, 2], b"data": b"x" * 90, b"more": [(1,)] * 3}, 4)
    places = [place for _, _, place in pickletools.genops(data)]
    pieces = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(changes):
        change_members(rng, pieces, lambda: rng.choice(_HOSTILE_OPCODES))
    return b"".join(pieces)


# --- the binary version ---------------------------------------------------------------------


def _build_binary(rng: random.Random, changes: int) -> bytes:
    records = bytearray(BATCH_EXAMPLES * (1 + PIXELS))
    for _ in range(changes):
        records[rng.choice((0, 1 + PIXELS, rng.randrange(len(records))))] = rng.choice((9, 10, 255))
    return bytes(records)


# --- archives -------------------------------------------------------------------------------

_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")


def _hostile_member(rng: random.Random) -> bytes:
    name = rng.choice(HOSTILE_NAMES)[:100]
    kind = rng.choice(
        (b"0", b"\0", b"5", b"1", b"2", b"3", b"6", b"7", b"S", b"x", b"g", b"L", b"V")
    )
    content = rng.choice((b"", official_pickle(), bytes(700), b"0 x=\n", b"99 path=x\n"))
    if kind in (b"x", b"g", b"L"):
        key = rng.choice(("path", "size", "linkpath", "GNU.sparse.map", "hdrcharset"))
        value = rng.choice((*HOSTILE_NAMES, "10000000000", "-1", "9" * 5000, "0"))
        content = rng.choice((pax({key: value}), value.encode(), content))
    size_field = rng.choice(
        (b"", b"", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-1")
    )
    return tar_member(name, content, kind=kind, size_field=size_field)


def _build_archive(rng: random.Random, changes: int) -> bytes:
    members = [
        tar_member(f"cifar-10-batches-py/{name}", official_pickle(shade=number))
        for number, name in enumerate(_BATCHES)
    ]
    members.insert(0, tar_member("cifar-10-batches-py/", b"", kind=b"5"))
    for _ in range(changes):
        if rng.random() < 0.6 or not members:
            change_members(rng, members, lambda: _hostile_member(rng))
        else:
            place = rng.randrange(len(members))
            members[place : place + 1] = [mutate(rng, b"".join(members[place : place + 1]))]
    return gzip.compress(b"".join(members) + bytes(1024), 1, mtime=0)


# --- a folder of batch files ----------------------------------------------------------------

# What `fuzz_ways` does to one of the six files, by the first byte.
FOLDER_ACTS = ("replace", "delete", "swap", "loop", "folder", "pipe", "extra")


def _build_folder(rng: random.Random, changes: int) -> bytes:
    act = rng.randrange(len(FOLDER_ACTS)) if changes > 1 else 0
    which = rng.randrange(len(_BATCHES))
    return bytes([act, which]) + _build_pickle(rng, changes)


# --- npz ------------------------------------------------------------------------------------


def _build_npz(rng: random.Random, changes: int) -> bytes:
    arrays = {
        "x_train": (f"({TRAIN_EXAMPLES}, 32, 32, 3)", bytes(TRAIN_EXAMPLES * PIXELS), "|u1"),
        "y_train": (f"({TRAIN_EXAMPLES},)", bytes(8 * TRAIN_EXAMPLES), "<i8"),
        "x_test": (f"({TEST_EXAMPLES}, 32, 32, 3)", bytes(TEST_EXAMPLES * PIXELS), "|u1"),
        "y_test": (f"({TEST_EXAMPLES}, 1)", bytes(TEST_EXAMPLES), "|u1"),
    }
    damaged = rng.choice(tuple(arrays)) if changes and rng.random() < 0.7 else None
    members = [
        (
            f"{name}.npy",
            changed_npy(rng, *array)
            if name == damaged
            else npy(array[0], array[1], description=f"'{array[2]}'"),
        )
        for name, array in arrays.items()
    ]
    return zipped(rng, members, changes)


# --- tfrecords ------------------------------------------------------------------------------


def _record(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + bytes(4) + content + bytes(4)


def _build_records(rng: random.Random, changes: int) -> bytes:
    records = [_record(rng.randbytes(rng.randrange(60))) for _ in range(5)]
    for _ in range(changes):
        change_members(rng, records, lambda: number_bytes(rng, 8) + rng.randbytes(20))
    return b"".join(records)


def _png(rng: random.Random, changes: int) -> bytes:
    """A black picture; some of its chunks may lie, their checksums do not."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(32 * (1 + 3 * 32)))),
        (b"IEND", b""),
    ]
    for _ in range(changes):
        kind = rng.choice((b"zTXt", b"iCCP", b"PLTE", b"tRNS", b"IDAT", b"IHDR", b"acTL"))
        content = rng.choice((b"x\0\0" + zlib.compress(bytes(1_000_000)), rng.randbytes(30), b""))
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, content))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        check = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + check
    return data


def _field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes."""
    size, length = len(content), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def tfds_example(split: str, index: int, png: bytes, *, more: bytes = b"") -> bytes:
    """An example as TFDS writes it."""
    features = {
        b"id": _field(1, _field(1, f"{split}_{index:05d}".encode())),
        b"image": _field(1, _field(1, png)),
        b"label": _field(3, _field(1, bytes([index % 10]))),
    }
    entries = (_field(1, _field(1, name) + _field(2, value)) for name, value in features.items())
    return _field(1, b"".join(entries) + more)


def tfds_shard(split: str, count: int) -> bytes:
    """A valid shard."""
    png = _png(random.Random(0), 0)
    return b"".join(_record(tfds_example(split, index, png)) for index in range(count))


def _build_tfds(rng: random.Random, changes: int) -> bytes:
    if not changes:
        return tfds_shard("train", TRAIN_EXAMPLES)
    png = _png(random.Random(0), 0)
    examples = [tfds_example("train", index, png) for index in range(TRAIN_EXAMPLES)]
    place = rng.randrange(TRAIN_EXAMPLES)
    kind = rng.randrange(4)
    if kind == 0:
        examples[place] = tfds_example("train", place, _png(rng, changes))
    elif kind == 1:
        more = _field(1, _field(1, b"label") + _field(2, rng.randbytes(8)))
        examples[place] = tfds_example("train", place, png, more=more)
    elif kind == 2:
        examples[place] = mutate(rng, examples[place])
    else:
        change_members(rng, examples, lambda: rng.randbytes(50))
    return b"".join(map(_record, examples))


# --- JSON -----------------------------------------------------------------------------------

# Text that takes the place of a value.
_HOSTILE_JSON = (
    *("1e999", "-1e999", "NaN", "Infinity", "1" * 5000, "99999999999999999999", "1.5", "-1", "0"),
    *("null", "true", "[]", "{}", '""', "tru", "[1,2", "[[[]]]", '{"a": {"b": [1]}}', "2e308"),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[31m\\n"', '"<script>alert(1)</script>"'),
    *('"' + "x" * 20_000 + '"', "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 50_000),
    "[" + "[]," * 30_000 + "0]",
)


def _change_json(rng: random.Random, value: Any, changes: int) -> str:
    """Puts something hostile in place of some nodes, and returns the text."""
    holder = [json.loads(json.dumps(value))]
    texts = {}
    for number in range(changes):
        nodes: list[tuple[Any, Any]] = [(holder, 0)]
        for node, key in nodes:
            inner = node[key]
            if isinstance(inner, dict):
                nodes += [(inner, name) for name in inner]
            elif isinstance(inner, list):
                nodes += [(inner, place) for place in range(len(inner))]
        node, key = rng.choice(nodes)
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[key]
            continue
        mark = f"@{number}@"
        if rng.random() < 0.1 and isinstance(node, dict):
            node[rng.choice(("", "\x1b[31m", "x" * 5000, "step", "__class__"))] = mark
        else:
            node[key] = mark
        texts[f'"{mark}"'] = rng.choice(_HOSTILE_JSON)
    text = json.dumps(holder[0])
    for mark, hostile in texts.items():
        text = text.replace(mark, hostile)
    return text


RECIPE: dict[str, Any] = {
    "name": "mine",
    "model": "mlp",
    "model_options": {"units": [8], "activation": "relu"},
    "epochs": 2.0,
    "batch_size": 32,
    "schedule": "piecewise",
    "drop_epochs": [1.0, 1.5],
    "learning_rate_scales": {"bias": 2.0},
    "freeze": {"bias": 0.5},
    "augment": "flip,crop:4",
    "nesterov": True,
    "precision": "float32",
    "seed": 3,
}
SUMMARY: dict[str, Any] = {
    "recipe": "mine",
    "dataset": "standin",
    "parameters": 100,
    "steps": 20,
    "epochs": 2.0,
    "seed": 3,
    "precision": "float32",
    "device": "cpu",
    "train_seconds": 1.5,
    "images_per_second": 1000.0,
    "examples": {"train": 10, "validation": 2, "test": 2},
    "test_loss": 1.5,
    "test_accuracy": 0.5,
    "confusion_matrix": [[1, 0], [0, 1]],
    "scores": {
        "top_2_accuracy": 1.0,
        "expected_calibration_error": None,
        "calibration_bins": [[None, None, 0], [0.75, 0.5, 2]],
        "f1": [0.5, None],
    },
    "class_names": ["a", "b"],
    "weights_sha256": "0" * 64,
}
_ROW: dict[str, Any] = {
    "step": 5,
    "epoch": 0.5,
    "split": "train",
    "loss": 1.5,
    "accuracy": 0.25,
    "learning_rate": None,
    "images_per_second": 1000.0,
    "dataset": "standin",
}
_VERIFIED = {"version": 2, "files": [[1, 10, 20, 30, 40, "a"], [1, 50, 60, 70, 80, "b c"]]}


def _build_json(value: Any) -> Callable[[random.Random, int], bytes]:
    def build(rng: random.Random, changes: int) -> bytes:
        return _change_json(rng, value, changes).encode("utf-8", "surrogateescape")

    return build


def _build_history(rng: random.Random, changes: int) -> bytes:
    rows = [json.dumps({**_ROW, "step": step}) for step in range(5, 50, 5)]
    for _ in range(changes):
        change_members(rng, rows, lambda: _change_json(rng, _ROW, rng.choice((1, 1, 2))))
    between = rng.choice(("\n", "\n", "\n", "\r\n", "\n\n", "")) if changes else "\n"
    return (between.join(rows) + rng.choice(("\n", "\n", ""))).encode("utf-8", "surrogateescape")


def _build_npy(rng: random.Random, changes: int) -> bytes:
    data = struct.pack("<20f", *range(20))
    if not changes:
        return npy("(2, 10)", data, description="'<f4'")
    return changed_npy(rng, "(2, 10)", data, "<f4")


def _build_mistakes(rng: random.Random, changes: int) -> bytes:
    arrays = {
        "images": ("(2, 2, 2, 3)", bytes(24), "|u1"),
        "labels": ("(2,)", struct.pack("<2i", 0, 1), "<i4"),
        "predicted": ("(2,)", struct.pack("<2i", 1, 0), "<i4"),
        "probabilities": ("(2, 2)", struct.pack("<4f", 0.25, 0.75, 1.0, 0.0), "<f4"),
        "indices": ("(2,)", struct.pack("<2i", 5, 3), "<i4"),
    }
    damaged = rng.choice(tuple(arrays)) if changes and rng.random() < 0.7 else None
    members = [
        (
            f"{name}.npy",
            changed_npy(rng, *array)
            if name == damaged
            else npy(array[0], array[1], description=f"'{array[2]}'"),
        )
        for name, array in arrays.items()
    ]
    return zip_of(members) if rng.random() < 0.5 else zipped(rng, members, changes)


# --- checkpoints ----------------------------------------------------------------------------


class Variable:
    """As much of a Keras variable as a checkpoint needs."""

    def __init__(self, path: str, value: np.ndarray) -> None:
        self.path, self.value = path, value
        self.shape, self.dtype = value.shape, value.dtype

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.value

    def assign(self, value: np.ndarray) -> None:
        """Takes the value of a variable of this shape."""
        self.value = np.broadcast_to(value, self.shape)


def make_variables() -> list[Variable]:
    """What the checkpoint is of; without TensorFlow, which takes seconds to load."""
    shapes = {"mine/kernel": (2, 3), "mine/bias": (3,), "sgd/step": ()}
    return [Variable(path, np.ones(shape, np.float32)) for path, shape in shapes.items()]


@functools.cache
def _checkpoint() -> bytes:
    """A valid one; what it looks like is the business of `Checkpoints` alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Checkpoints(folder).save(RUN_STEP, make_variables(), extra={"pending": [1.5, None]})
        return path.read_bytes()


def _build_checkpoint(rng: random.Random, changes: int) -> bytes:
    if not changes:
        return _checkpoint()
    with zipfile.ZipFile(io.BytesIO(_checkpoint())) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = rng.randrange(len(members))
    name, content = members[place]
    if name == "header.npy":
        _, _, text = content.partition(b"\n")
        text = _change_json(rng, json.loads(text), rng.choice((1, 1, 2))).encode("utf-8")
        content = npy(f"({len(text)},)", text)
    elif rng.random() < 0.5:
        content = changed_npy(rng, "(2, 3)", struct.pack("<6f", *range(6)), "<f4")
    members[place] = (name, content)
    if rng.random() < 0.7:
        return zip_of(members)
    return zipped(rng, members, changes)


# --- capsules -------------------------------------------------------------------------------


@functools.cache
def capsule_files() -> dict[str, bytes]:
    """A valid capsule: its files by their paths in the folder."""
    # TensorFlow takes seconds to load.
    from cifarflow.training.capsule import Findings, save_capsule

    with tempfile.TemporaryDirectory() as name:
        folder = save_capsule(
            pathlib.Path(name) / "capsule",
            images=np.zeros((2, 4, 4, 3), np.uint8),
            labels=np.zeros(2, np.int32),
            variables=make_variables(),
            step=RUN_STEP,
            num_classes=10,
            steps_per_epoch=3,
            found=Findings(float("nan"), ("mine/kernel",)),
            recipe=RECIPE,
            seed=1,
        )
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def signed(values: dict[str, Any]) -> bytes:
    """A capsule's JSON with the sum that fits what it says."""
    values = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(values, sort_keys=True)
    return json.dumps({**values, "sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def _build_capsule(rng: random.Random, changes: int) -> bytes:
    data = capsule_files()["capsule.json"]
    if not changes:
        return data
    text = _change_json(rng, json.loads(data), changes).encode("utf-8", "surrogateescape")
    if rng.random() < 0.8:
        # Whoever changes it can sign it too.
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            return signed(json.loads(text))
    return text


# --- pictures and prepared sets -------------------------------------------------------------


@functools.cache
def picture(kind: str) -> bytes:
    """A valid picture of 40 x 30 pixels."""
    buffer = io.BytesIO()
    shades = np.arange(3600, dtype=np.uint16).reshape(30, 40, 3).astype(np.uint8)
    Image.fromarray(shades).save(buffer, kind)
    return buffer.getvalue()


def _build_picture(rng: random.Random, changes: int) -> bytes:
    if rng.random() < 0.4:
        return _png(rng, changes)
    data = bytearray(picture(rng.choice(("PNG", "JPEG", "GIF", "BMP", "WEBP"))))
    for _ in range(changes):
        # Most of what a decoder believes stands at the beginning.
        place = rng.randrange(rng.choice((40, len(data))))
        width = rng.choice((1, 2, 4))
        data[place : place + width] = number_bytes(rng, width)
    return bytes(data)


PREPARED: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "dataset_info.json",
        {
            "name": "cifar10",
            "fileFormat": "tfrecord",
            "splits": [
                {"name": "train", "shardLengths": [str(TRAIN_EXAMPLES)]},
                {"name": "test", "shardLengths": [str(TEST_EXAMPLES)]},
            ],
        },
    ),
    (
        "features.json",
        {
            "featuresDict": {
                "features": {
                    "image": {"image": {"shape": {"dimensions": ["32", "32", "3"]}}},
                    "label": {"classLabel": {"numClasses": "10"}},
                }
            }
        },
    ),
)


def _build_prepared(rng: random.Random, changes: int) -> bytes:
    """One of the two files, after its number."""
    which = rng.randrange(2)
    text = _change_json(rng, PREPARED[which][1], changes)
    return bytes([which]) + text.encode("utf-8", "surrogateescape")


BUILDERS: dict[str, Callable[[random.Random, int], bytes]] = {
    "pickle": _build_pickle,
    "binary": _build_binary,
    "folder": _build_folder,
    "archive": _build_archive,
    "npz": _build_npz,
    "tfrecord": _build_records,
    "verified": _build_json(_VERIFIED),
    "workdir": _build_json(RECIPE),
    "summary": _build_json(SUMMARY),
    "history": _build_history,
    "outputs": _build_npy,
    "mistakes": _build_mistakes,
    "checkpoint": _build_checkpoint,
    "recipe": _build_json(RECIPE),
    "capsule": _build_capsule,
    "tfds": _build_tfds,
    "picture": _build_picture,
    "prepared": _build_prepared,
}
