"""CIFAR-100: the readers of CIFAR-10 by another layout, and each set told from the other."""

import dataclasses
import hashlib
import pickle
import re
import struct
import tarfile
from unittest import mock

import numpy as np
import pytest

import cifarflow
from cifarflow.data import download, formats, layouts
from cifarflow.data.cifar10 import load_cifar10
from cifarflow.data.cifar100 import load_cifar100
from cifarflow.data.dataset import load_data
from cifarflow.errors import ConfigError, DataError, DataNotFoundError

TRAIN, TEST = 300, 100


def make_arrays():
    """Each class equally often; the first pixel of an image says its place."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (TRAIN + TEST, 32, 32, 3), np.uint8)
    labels = np.concatenate([rng.permutation(TRAIN) % 100, rng.permutation(TEST)]).astype(np.int32)
    return formats.Arrays(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


ARRAYS = make_arrays()
SPLITS = {"train": ARRAYS[:2], "test": ARRAYS[2:]}


def py2_pickle(images, labels):
    """A batch as Python 2 wrote the official ones, with protocol 2."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def numbers(values):
        return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"

    pixels = images.transpose(0, 3, 1, 2).tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01M"
        + struct.pack("<H", len(labels))
        + b"M\0\x0c\x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T"
        + struct.pack("<I", len(pixels))
        + pixels
        + b"tb"
    )
    names = b"](" + b"".join(text(b"image_%d.png" % i) for i in range(len(labels))) + b"e"
    coarse = [layouts.CIFAR100.coarse[label] for label in labels]
    return (
        b"\x80\x02}("
        + (text(b"filenames") + names + text(b"batch_label") + text(b"batch 1 of 1"))
        + (text(b"fine_labels") + numbers(labels) + text(b"coarse_labels") + numbers(coarse))
        + (text(b"data") + array + b"u.")
    )


def md5(data):
    return hashlib.md5(data).hexdigest()


PYTHON = {name: py2_pickle(*split) for name, split in SPLITS.items()}
META = pickle.dumps({"fine_label_names": []}, 2)
BINARY = {
    f"{name}.bin": formats.as_records(*split, layouts.CIFAR100).tobytes()
    for name, split in SPLITS.items()
}
SMALL = dataclasses.replace(
    layouts.CIFAR100,
    train_examples=TRAIN,
    test_examples=TEST,
    python={name: md5(data) for name, data in PYTHON.items()},
    python_meta={"meta": md5(META)},
    binary={name: md5(data) for name, data in BINARY.items()},
)


@pytest.fixture
def small(monkeypatch):
    """Makes the generated files count as the official ones."""
    monkeypatch.setitem(layouts.LAYOUTS, "cifar100", SMALL)


def put_files(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def put_archive(path, folder):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    return path


def put(kind, folder):
    """Writes the set in one format; returns where it is."""
    if kind == "python":
        return put_files(folder / "cifar-100-python", {**PYTHON, "meta": META})
    if kind == "binary":
        return put_files(folder / "cifar-100-binary", {**BINARY, "fine_label_names.txt": b"x\n"})
    if kind == "npz":
        formats.write_npz(folder / "cifar100.npz", ARRAYS)
        return folder / "cifar100.npz"
    if kind == "tfds":
        return put_tfds(folder)
    inner = kind.partition(" ")[0]
    source = put(inner, folder / "source")
    return put_archive(folder / f"cifar-100-{inner}.tar.gz", source)


def put_tfds(folder):
    """As TFDS prepares it: shuffled, each example with its place."""
    import tensorflow as tf

    target = folder / "cifar100" / "3.0.2"
    target.mkdir(parents=True)
    for name, (images, labels) in SPLITS.items():
        path = str(target / f"cifar100-{name}.tfrecord-00000-of-00001")
        with tf.io.TFRecordWriter(path) as writer:
            for row in np.random.default_rng(1).permutation(len(labels)):
                png = tf.io.encode_png(images[row]).numpy()
                values = {
                    "id": tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[f"{name}_{row:05d}".encode()])
                    ),
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])),
                    "label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[int(labels[row])])
                    ),
                }
                example = tf.train.Example(features=tf.train.Features(feature=values))
                writer.write(example.SerializeToString())
    return target


KINDS = ["python", "binary", "python archive", "binary archive", "npz", "tfds"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_from_every_format(small, tmp_path, kind):
    place = put(kind, tmp_path / "data")
    for _ in range(2):  # decoded, then remembered
        dataset = load_cifar100(place, validation_fraction=0.0)
        assert np.array_equal(dataset.train.images, ARRAYS.train_images)
        assert np.array_equal(dataset.train.labels, ARRAYS.train_labels)
        assert np.array_equal(dataset.test.images, ARRAYS.test_images)
        assert np.array_equal(dataset.test.labels, ARRAYS.test_labels)
    assert (dataset.name, dataset.num_classes) == ("cifar100", 100)
    assert dataset.source == str(place)
    assert load_cifar100(tmp_path / "data").source.startswith(str(tmp_path))
    is_slow = "archive" in kind or kind == "tfds"
    assert (tmp_path / "cache" / "cifar100.npz").exists() == is_slow
    assert not (tmp_path / "cache" / "cifar10.npz").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_altered_is_refused(small, tmp_path, kind, monkeypatch):
    place = put(kind, tmp_path / "data")
    load_cifar100(place, cache_dir=tmp_path / "other")
    wrong = dict.fromkeys(SMALL.binary, "0" * 32)
    python = dict.fromkeys(SMALL.python, "0" * 32)
    layout = dataclasses.replace(SMALL, binary=wrong, python=python)
    monkeypatch.setitem(layouts.LAYOUTS, "cifar100", layout)
    with pytest.raises(DataError, match=r"damaged.* md5 .* expected 00000000"):
        load_cifar100(place, cache_dir=tmp_path / "other")
    assert len(load_cifar100(place, verify=False).test) == TEST


def test_an_archive_names_its_own_checksums(small, tmp_path):
    path = put("python archive", tmp_path)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError, match="eb9058c3a382ffc7106e4002c42a8d85 for the python version"):
        load_cifar100(path)


@pytest.mark.parametrize("place", ["cifar-100-python-target/cifar-100-python", "cifar-100-python"])
def test_where_keras_leaves_it(small, tmp_path, place):
    target = tmp_path / "keras" / "datasets" / place
    put_files(target, {**PYTHON, "meta": META})
    assert load_cifar100().source == str(target)


def test_the_official_layout():
    layout = layouts.CIFAR100
    assert (layout.num_classes, len(layout.coarse_names), layout.label_bytes) == (100, 20, 2)
    assert np.bincount(layout.coarse).tolist() == [5] * 20
    # As everybody has the table.
    assert layout.coarse[:10] == (4, 1, 14, 8, 0, 6, 7, 7, 18, 3)
    assert layout.coarse[90:] == (18, 1, 2, 15, 6, 0, 17, 8, 14, 13)
    assert list(layout.class_names) == sorted(layout.class_names)
    assert (layout.class_names[19], layout.coarse_names[11]) == (
        "cattle",
        "large_omnivores_and_herbivores",
    )
    assert [layout.examples_in(index) for index in range(2)] == [50_000, 10_000]
    assert [layouts.CIFAR10.examples_in(index) for index in (0, 4, 5)] == [10_000] * 3
    sums = [*layout.python.values(), *layout.binary.values(), *layout.python_meta.values()]
    assert all(re.fullmatch("[0-9a-f]{32}", value) for value in sums)


def test_coarse_labels(small, tmp_path):
    place = put("python", tmp_path)
    fine = load_data("cifar100", place)
    coarse = load_data("cifar100-coarse", place)
    assert (coarse.name, coarse.num_classes) == ("cifar100-coarse", 20)
    assert coarse.class_names[4] == "fruit_and_vegetables"
    for fine_label, label in zip(fine.train.labels, coarse.train.labels, strict=True):
        assert SMALL.coarse[fine_label] == label
    options = {"validation_fraction": 0.2, "validation_split": "stratified", "seed": 1}
    held = load_cifar100(place, coarse=True, **options).validation
    assert np.bincount(held.labels).tolist() == [3] * 20


def test_public_name():
    assert cifarflow.load_cifar100 is load_cifar100


# --- one set where the other was meant ----------------------------------------------------


def put_cifar10(folder):
    images = np.zeros((60, 32, 32, 3), np.uint8)
    labels = np.arange(60) % 10
    files = {}
    for index, name in enumerate(layouts.CIFAR10.binary):
        rows = slice(index * 10, index * 10 + 10)
        records = formats.as_records(images[rows], labels[rows], layouts.CIFAR10)
        files[name] = records.tobytes()
    return put_files(folder / "cifar-10-batches-bin", files)


@pytest.mark.parametrize("kind", ["python", "binary archive", "npz"])
def test_cifar100_where_cifar10_was_meant(small, monkeypatch, tmp_path, kind):
    ten = dataclasses.replace(layouts.CIFAR10, train_examples=TRAIN, test_examples=TEST)
    monkeypatch.setitem(layouts.LAYOUTS, "cifar10", ten)
    place = put(kind, tmp_path / "data")
    for data in ("cifar10", "auto"):
        with pytest.raises((DataError, DataNotFoundError)) as caught:
            load_data(data, place)
        text = str(caught.value)
        assert text.endswith("holds CIFAR-100, not CIFAR-10: give --data=cifar100 to take it")
        assert str(place) in text


def test_cifar10_where_cifar100_was_meant(small, monkeypatch, tmp_path):
    place = put_cifar10(tmp_path / "data")
    meant = "holds CIFAR-10, not CIFAR-100: give --data=cifar10"
    with pytest.raises(DataNotFoundError, match=f"data_dir='.*' {meant}"):
        load_cifar100(place)
    monkeypatch.setenv("CIFARFLOW_DATA", str(tmp_path / "data"))
    with pytest.raises(DataNotFoundError, match=f"CIFARFLOW_DATA='.*' {meant}"):
        load_cifar100()
    archive = put_archive(tmp_path / "x.tar.gz", place)
    with pytest.raises(DataError, match=meant):
        load_cifar100(archive)
    labels = ARRAYS.train_labels % 10
    path = tmp_path / "x.npz"
    formats.write_npz(path, ARRAYS._replace(train_labels=labels, test_labels=labels[:TEST]))
    with pytest.raises(DataError, match=meant):
        load_cifar100(path)
    # Labels of neither.
    formats.write_npz(path, ARRAYS._replace(train_labels=ARRAYS.train_labels + 1))
    with pytest.raises(DataError, match="labels from 1 to 100, expected 0 to 99"):
        load_cifar100(path)


def test_both_in_one_folder(small, tmp_path, monkeypatch):
    put("python", tmp_path / "data")
    put_cifar10(tmp_path / "data")
    ten = dataclasses.replace(layouts.CIFAR10, train_examples=50, test_examples=10)
    monkeypatch.setitem(layouts.LAYOUTS, "cifar10", ten)
    assert load_data("cifar100", tmp_path / "data").name == "cifar100"
    assert load_cifar10(tmp_path / "data", verify=False).name == "cifar10"


# --- nothing, or nonsense -----------------------------------------------------------------


def test_nothing_found(small, tmp_path):
    with pytest.raises(DataNotFoundError) as caught:
        load_cifar100(download=False)
    text = str(caught.value)
    assert text.startswith("CIFAR-100 was not found in the project's cache")
    assert "put cifar-100-python.tar.gz from https://www.cs.toronto.edu" in text
    with pytest.raises(
        DataNotFoundError, match="holds no CIFAR-100; it should be the folder cifar"
    ):
        load_cifar100(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="validation_fraction must be"):
        load_cifar100(validation_fraction=2)
    with (
        mock.patch.object(download, "download_archive") as fetch,
        pytest.raises(FileNotFoundError),
    ):
        load_cifar100()
    assert fetch.call_args.args == (tmp_path / "cache" / "cifar-100-binary.tar.gz",)
    assert fetch.call_args.kwargs["remote"] == layouts.CIFAR100.remote
    assert fetch.call_args.kwargs["title"] == "CIFAR-100"


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([*range(99), 100], "has the label 100, expected 0 to 99"),
        (list(range(99)), r"no list of 100 labels under the key b'fine_labels'"),
    ],
)
def test_wrong_labels_in_a_pickle(labels, match):
    data = pickle.dumps({b"data": np.zeros((100, 3072), np.uint8), b"fine_labels": labels}, 4)
    with pytest.raises(DataError, match=match):
        formats.decode_python_batch(data, "test", SMALL, index=1)


def test_wrong_binary():
    records = BINARY["test.bin"]
    pixels, labels = formats.decode_binary_batch(records, "test.bin", SMALL, index=1)
    assert pixels.shape == (100, 3072)
    assert np.array_equal(labels, ARRAYS.test_labels)
    with pytest.raises(DataError, match=r"test\.bin has 307399 bytes, expected 307400"):
        formats.decode_binary_batch(records[:-1], "test.bin", SMALL, index=1)
    with pytest.raises(DataError, match=r"labels from \d to 100, expected 0 to 99"):
        formats.decode_binary_batch(b"\0\x64" + records[2:], "test.bin", SMALL, index=1)


def test_room_for_the_official_sizes():
    """The limits that keep hostile files small let the official ones through."""
    most = formats._most_bytes(layouts.CIFAR100)
    # Of the official train file: its pixels, and a name and two labels an image.
    assert 50_000 * (3072 + 40) < most < 200_000_000
    assert formats._most_bytes(layouts.CIFAR10) == 32_000_000
    labels = b"](" + b"K\x01" * 50_000 + b"e"
    names = b"](" + b"U\x01a" * 50_000 + b"e"
    formats._check_opcodes(b"\x80\x02" + labels + labels + names + b".", layouts.CIFAR100)
    with pytest.raises(DataError, match="more than 500000 opcodes"):
        formats._check_opcodes(b"\x80\x02" + b"]" * 500_001 + b".", layouts.CIFAR100)
    with pytest.raises(DataError, match="more than 100000 opcodes"):
        formats._check_opcodes(b"\x80\x02" + b"]" * 100_001 + b".", layouts.CIFAR10)
