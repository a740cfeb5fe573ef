"""What data is where: each place and state, what load_data would take, and the table."""

import dataclasses

import numpy as np
import pytest

import cifarflow
from cifarflow.data import formats, layouts, sources, standin
from cifarflow.data.cifar10 import load_cifar10
from cifarflow.data.inspect import DataSource, find_data
from cifarflow.errors import ConfigError, DataError, DataNotFoundError

TRAIN, TEST = 200, 100


def arrays(classes):
    labels = np.arange(TRAIN, dtype=np.int32) % classes
    images = np.zeros((TRAIN, 32, 32, 3), np.uint8)
    return formats.Arrays(images, labels, images[:TEST], labels[:TEST])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes small sets count as the official ones, and a small stand-in set as drawn."""
    for layout in (layouts.CIFAR10, layouts.CIFAR100):
        sha256 = formats.digest(arrays(layout.num_classes))
        sizes = {"train_examples": TRAIN, "test_examples": TEST}
        other = dataclasses.replace(layout, arrays_sha256=sha256, **sizes)
        monkeypatch.setitem(layouts.LAYOUTS, layout.name, other)
    monkeypatch.setattr(standin, "TRAIN_EXAMPLES", TRAIN)
    monkeypatch.setattr(standin, "TEST_EXAMPLES", TEST)
    monkeypatch.setattr(standin, "ARRAYS_SHA256", formats.digest(arrays(10)))


def put(path, classes=10):
    formats.write_npz(path, arrays(classes))
    return path


def by_place(found, data):
    return {source.place: source for source in found if source.data == data}


def test_nothing_anywhere(tmp_path):
    found = find_data()
    assert [(source.data, source.place) for source in found] == [
        *(("cifar10", place) for place in PLACES),
        *(("cifar100", place) for place in PLACES),
        ("standin", PLACES[0]),
    ]
    assert {source.state for source in found} == {"not found"}
    assert [source.is_taken for source in found] == [False] * 6 + [True]
    assert found[1].path == tmp_path / "keras" / "datasets"
    assert not (tmp_path / "cache").exists()


PLACES = ["the project's cache", "Keras's cache", "the TFDS directory"]


def test_each_state(tmp_path, monkeypatch):
    put(tmp_path / "keras" / "datasets" / "cifar10.npz")
    put(tmp_path / "tfds" / "cifar10.npz")
    (tmp_path / "tfds" / "cifar10.npz").write_bytes(b"PK damaged")
    put(tmp_path / "cache" / "cifar100.npz", 100)
    put(tmp_path / "cache" / standin.FILE_NAME)
    found = find_data()
    ten, hundred = by_place(found, "cifar10"), by_place(found, "cifar100")
    keras, tfds = ten["Keras's cache"], ten["the TFDS directory"]
    assert keras == DataSource(
        "cifar10",
        "Keras's cache",
        tmp_path / "keras" / "datasets" / "cifar10.npz",
        "verified",
        "npz",
        TRAIN + TEST,
        True,
    )
    assert (tfds.state, tfds.format, tfds.examples, tfds.is_taken) == ("damaged", "npz", 0, False)
    assert "cannot be read" in tfds.reason
    assert hundred["the project's cache"].state == "verified"
    assert hundred["the project's cache"].is_taken
    assert (found[-1].data, found[-1].state, found[-1].examples) == ("standin", "verified", 300)
    assert load_cifar10().source == str(keras.path)


def test_altered_data_is_damaged_though_it_was_known(tmp_path, monkeypatch):
    path = put(tmp_path / "cache" / "cifar10.npz")
    load_cifar10()
    monkeypatch.setitem(
        layouts.LAYOUTS,
        "cifar10",
        dataclasses.replace(layouts.LAYOUTS["cifar10"], arrays_sha256="0" * 64),
    )
    found = by_place(find_data(), "cifar10")["the project's cache"]
    assert (found.state, found.path, found.is_taken) == ("damaged", path, True)
    assert "is damaged or altered: the sha256" in found.reason
    # By what it holds is meant: load_data ends there too.
    with pytest.raises(DataError, match="damaged or altered"):
        load_cifar10()


def test_a_place_that_was_named_is_gone_by(tmp_path, monkeypatch):
    put(tmp_path / "cache" / "cifar10.npz")
    put(tmp_path / "data" / "cifar100.npz", 100)
    monkeypatch.setenv("CIFARFLOW_DATA", str(tmp_path / "data"))
    ten = by_place(find_data(), "cifar10")
    assert list(ten) == ["CIFARFLOW_DATA", *PLACES]
    named = ten["CIFARFLOW_DATA"]
    assert (named.state, named.is_taken) == ("not found", True)
    assert "holds CIFAR-100, not CIFAR-10: give --data=cifar100" in named.reason
    assert not ten["the project's cache"].is_taken
    with pytest.raises(DataNotFoundError, match="holds CIFAR-100, not CIFAR-10"):
        load_cifar10()
    found = find_data(tmp_path / "cache" / "cifar10.npz")
    first = by_place(found, "cifar10")["data_dir"]
    assert (first.state, first.is_taken) == ("verified", True)
    assert not by_place(found, "cifar10")["CIFARFLOW_DATA"].is_taken


def test_nothing_damaged_is_raised(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "data_batch_1.bin").write_bytes(b"x")
    (tmp_path / "cache" / "cifar-100-python.tar.gz").write_bytes(b"\x1f\x8b\x1b[31m")
    (tmp_path / "cache" / standin.FILE_NAME).write_bytes(b"PK")
    found = find_data()
    cache = [source for source in found if source.place == "the project's cache"]
    assert [source.state for source in cache] == ["damaged"] * 3
    assert "lacks data_batch_2.bin" in cache[0].reason
    assert "is drawn anew" in cache[2].reason
    put(tmp_path / "cache" / standin.FILE_NAME, 9)
    assert "is not as it was drawn" in find_data()[-1].reason
    monkeypatch.setattr(sources, "tfds_folder", lambda: tmp_path / "cache" / "x" / "\0")
    assert {source.state for source in find_data()} == {"damaged", "not found"}
    with pytest.raises(ConfigError, match="data_dir must be the path"):
        find_data(3)


def test_they_are_public():
    for name in ("DataSource", "find_data"):
        assert name in cifarflow.__all__


@pytest.mark.real_data
def test_real_data(cifar10_dir, monkeypatch):
    monkeypatch.setitem(layouts.LAYOUTS, "cifar10", layouts.CIFAR10)
    found = by_place(find_data(cifar10_dir), "cifar10")["data_dir"]
    assert (found.state, found.format, found.examples) == ("verified", "python", 60_000)
