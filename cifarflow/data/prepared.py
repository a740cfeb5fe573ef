"""Any set of TensorFlow Datasets that has images and labels, from its prepared directory.

    dataset = load_prepared("mnist")                      # $TFDS_DATA_DIR, ~/tensorflow_datasets
    dataset = load_prepared("svhn_cropped", "~/tfds")     # this directory
    dataset.name                                          # "tfds:mnist"

The tfrecord files are read directly: TFDS would first import whatever class the directory's own
`features.json` names.  Images are RGB of one size, see `pictures`; they come in the order in which
TFDS prepared them, which is a random one.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cifarflow.data import copies
from cifarflow.data import download as download_lib
from cifarflow.data.cache import cache_folder
from cifarflow.data.formats import Arrays, check_labels, find_shards, read_records
from cifarflow.data.pictures import (
    DECODER_VERSION,
    PICTURE_BYTES_LIMIT,
    check_image_size,
    check_room,
    decode_pictures,
)
from cifarflow.data.sources import check_folders, tfds_folder
from cifarflow.data.splits import Dataset, Split, check_split_options, split_validation
from cifarflow.errors import ConfigError, DataError, DataNotFoundError, check_float
from cifarflow.untrusted import one_line, parse_json, read_bytes, reading, shown

_NAME = re.compile(r"[a-z0-9_]+(/[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_VERSION = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}")
_TEXT_BYTES_LIMIT = 1_000_000
# Of all shards together, which are kept in memory while they are decoded.
_SHARDS_BYTES_LIMIT = 4_000_000_000
_MOST_CLASSES = 10_000


class _Description(NamedTuple):
    """What the files of a prepared directory say of it."""

    name: str
    image_key: str
    label_key: str
    class_names: tuple[str, ...]
    examples: dict[str, int]


def load_prepared(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a prepared set of TensorFlow Datasets.

    Args:
      name: what TFDS calls it, such as "mnist", or "imagenette/160px-v2" for one configuration.
      data_dir: TFDS's directory, or that of one version of the set; None takes $TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      image_size: the side of the images; others are cropped in the middle and resized.
      validation_fraction: share of the training set held out, from 0 to below 1; of no effect where
        the set has a split "validation".
      validation_split: "last" in the order of the files, or "stratified".
      seed: for "stratified".
      download: whether TFDS may download and prepare the set if it is not there.
      download_timeout_seconds: how long its host may take to answer.
      cache_dir: the project's cache, which keeps a decoded copy.

    Returns:
      The data set: images [N, image_size, image_size, 3] uint8, labels and class names as the set
      has them; its name is "tfds:" and that of the set.

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if the set is not there and cannot be had.
      DataError: if it is damaged, or has no images, labels, training or test split.
    """
    options = check_split_options(validation_fraction, validation_split, seed)
    size = check_image_size(image_size)
    check_float("download_timeout_seconds", download_timeout_seconds, above_minimum=True)
    check_folders(data_dir, cache_dir)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"a TFDS set must be NAME or NAME/CONFIG, such as mnist, not {name!r}")
    root = tfds_folder() if data_dir is None else Path(os.path.expanduser(data_dir))
    folder = _find(name, root)
    if folder is None:
        folder = _prepare(name, root, download and data_dir is None, download_timeout_seconds)
    about = _describe(folder)
    shards = {split: _shards(folder, about, split) for split in about.examples}
    held = sum(count for split, count in about.examples.items() if split != "test")
    check_room(repr(str(folder)), held + about.examples["test"], size)

    def decode() -> Arrays:
        parts = [_read_split(folder, about, split, shards[split], size) for split in about.examples]
        *train_parts, (test_images, test_labels) = parts
        images, labels = (np.concatenate(part) for part in zip(*train_parts, strict=True))
        return Arrays(images, labels, test_images, test_labels)

    def key() -> str:
        paths = [path for split in shards.values() for path in split]
        with reading(repr(str(folder))):
            return copies.fingerprint_of(paths, about, size, DECODER_VERSION)

    arrays = copies.read_or_decode(
        f"{folder.resolve()} at {size}",
        key,
        decode,
        folder=cache_folder(cache_dir),
        shape=(size, size, 3),
        examples=(held, about.examples["test"]),
        num_classes=len(about.class_names),
    )
    count = about.examples["train"]
    train = Split(arrays.train_images[:count], arrays.train_labels[:count])
    validation = Split(arrays.train_images[count:], arrays.train_labels[count:])
    if "validation" not in about.examples:
        train, validation = split_validation(*train, **options)
    test = Split(arrays.test_images, arrays.test_labels)
    return Dataset(f"tfds:{name}", train, validation, test, about.class_names, str(folder))


# --- finding ------------------------------------------------------------------------------


def _find(name: str, root: Path) -> Path | None:
    """The directory of the newest version of a set, in TFDS's directory or as it is."""
    if (root / "dataset_info.json").is_file():
        described = _read_json(root / "dataset_info.json").get("name")
        if described != name.partition("/")[0]:
            raise DataNotFoundError(
                f"{str(root)!r} holds the TFDS set {shown(described)}, not {name!r}"
            )
        return root
    place = root / name
    with reading(repr(str(place))):
        inside = sorted(entry.name for entry in os.scandir(place)) if place.is_dir() else []
    versions = [entry for entry in inside if _VERSION.fullmatch(entry)]
    versions = [entry for entry in versions if (place / entry / "dataset_info.json").is_file()]
    if versions:
        return place / max(versions, key=lambda entry: tuple(map(int, entry.split("."))))
    configs = [entry for entry in inside if "/" not in name and _NAME.fullmatch(f"{name}/{entry}")]
    configs = [entry for entry in configs if (place / entry).is_dir()]
    found = [entry for entry in configs if _find(f"{name}/{entry}", root) is not None]
    if len(found) > 1:
        raise DataNotFoundError(
            f"{str(place)!r} holds several configurations: give one, as in tfds:{name}/{found[0]}"
        )
    return _find(f"{name}/{found[0]}", root) if found else None


def _prepare(name: str, root: Path, allowed: bool, timeout_seconds: float) -> Path:
    reason = "no download was allowed"
    if allowed:
        try:
            download_lib.prepare(name, root, timeout_seconds=timeout_seconds)
            folder = _find(name, root)
            if folder is not None:
                return folder
            reason = "TFDS prepared it elsewhere"
        except download_lib.DownloadError as error:
            reason = f"the download failed: {error}"
    raise DataNotFoundError(
        f"the TFDS set {name!r} is not prepared in {str(root)!r}, and {reason}. Where there is a "
        f"network, tensorflow_datasets.load({name!r}) prepares it; then name the directory with "
        f"--data_dir=PATH or TFDS_DATA_DIR=PATH"
    )


# --- what the directory says of itself ------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    with reading(repr(str(path))):
        value = parse_json(read_bytes(path, limit=_TEXT_BYTES_LIMIT))
    if not isinstance(value, dict):
        raise DataError(f"{str(path)!r} holds no JSON object")
    return value


def _describe(folder: Path) -> _Description:
    info = _read_json(folder / "dataset_info.json")
    name = info.get("name")
    if not isinstance(name, str) or not re.fullmatch("[a-z0-9_]+", name):
        raise DataError(f"{str(folder)!r} is of a set called {shown(name)}")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise DataError(f"{str(folder)!r} has files of {shown(file_format)}, expected 'tfrecord'")
    features = _read_json(folder / "features.json")
    for holder in ("featuresDict", "features"):
        inner = features.get(holder)
        features = inner if isinstance(inner, dict) else {}
    image_key = _feature(folder, features, "image", "image")
    label_key = _feature(folder, features, "classLabel", "label")
    return _Description(
        name,
        image_key,
        label_key,
        _class_names(folder, label_key, features[label_key]["classLabel"]),
        _counts(folder, info.get("splits")),
    )


def _feature(folder: Path, features: dict[str, Any], kind: str, usual: str) -> str:
    """The name of the one feature of a kind, or of that with the usual name."""
    names = [
        key
        for key, value in features.items()
        if isinstance(value, dict) and isinstance(value.get(kind), dict)
    ]
    if usual in names:
        return usual
    if len(names) != 1:
        found = one_line(", ".join(names), length=100) or "none"
        raise DataError(f"{str(folder)!r} should have one feature of kind {kind}, and has {found}")
    return names[0]


def _class_names(folder: Path, label_key: str, feature: dict[str, Any]) -> tuple[str, ...]:
    number = feature.get("numClasses")
    if not isinstance(number, (str, int)) or not re.fullmatch(r"[0-9]{1,5}", str(number)):
        raise DataError(f"{str(folder)!r} has labels of {shown(number)} classes")
    count = int(number)
    if not 1 < count <= _MOST_CLASSES:
        raise DataError(f"{str(folder)!r} has {count} classes, expected 2 to {_MOST_CLASSES}")
    path = folder / f"{label_key}.labels.txt"
    if "/" in label_key or not path.is_file():
        return tuple(map(str, range(count)))
    with reading(repr(str(path))):
        lines = read_bytes(path, limit=_TEXT_BYTES_LIMIT).decode().splitlines()
    names = tuple(one_line(line, length=100) for line in lines if line.strip())
    if len(names) != count:
        raise DataError(f"{str(path)!r} names {len(names)} classes, expected {count}")
    return names


def _counts(folder: Path, splits: object) -> dict[str, int]:
    """Training, validation (if there is one) and test split, in this order, and their sizes."""
    found: dict[str, int] = {}
    for entry in splits if isinstance(splits, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            lengths = entry.get("shardLengths")
            texts = [str(length) for length in lengths] if isinstance(lengths, list) else ["none"]
            if not all(re.fullmatch(r"[0-9]{1,12}", text) for text in texts):
                raise DataError(f"{str(folder)!r} has a split of {shown(lengths)} examples")
            found[entry["name"]] = sum(map(int, texts))
    if not (found.get("train") and found.get("test")):
        there = one_line(", ".join(found), length=100) or "none"
        raise DataError(f"{str(folder)!r} must have the splits train and test, and has {there}")
    wanted = ("train", "validation", "test")
    return {split: found[split] for split in wanted if found.get(split)}


def _shards(folder: Path, about: _Description, split: str) -> list[Path]:
    shards = find_shards(folder, about.name, split)
    if not shards:
        raise DataError(f"{str(folder)!r} lacks the {split} tfrecord files")
    return shards


# --- reading ------------------------------------------------------------------------------


def _read_split(
    folder: Path, about: _Description, split: str, shards: list[Path], size: int
) -> tuple[np.ndarray, np.ndarray]:
    # TensorFlow takes seconds to import and is needed here only.
    import tensorflow as tf

    count = about.examples[split]
    features = {
        about.image_key: tf.io.FixedLenFeature([], tf.string),
        about.label_key: tf.io.FixedLenFeature([], tf.int64),
    }
    name = f"{str(folder)!r} ({split})"
    pictures: list[bytes] = []
    labels: list[np.ndarray] = []
    left = _SHARDS_BYTES_LIMIT
    for path in shards:
        records = read_records(path, left, record_limit=PICTURE_BYTES_LIMIT)
        left -= path.stat().st_size
        while part := list(itertools.islice(records, 1000)):
            if len(pictures) + len(part) > count:
                raise DataError(f"{name} holds more than the {count} records that it should")
            with reading(name), tf.device("CPU"):
                parsed = tf.io.parse_example(tf.constant(part), features)
                pictures += parsed[about.image_key].numpy().tolist()
                labels.append(parsed[about.label_key].numpy())
    if len(pictures) != count:
        raise DataError(f"{name} holds {len(pictures)} records, expected {count}")
    found = np.concatenate(labels)
    check_labels(name, found, len(about.class_names))

    def read(place: int) -> tuple[bytes, object]:
        return pictures[place], f"image {place} of {name}"

    images = decode_pictures(read, count, name=name, size=size)
    return images, found.astype(np.int32)
