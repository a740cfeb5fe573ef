"""Splits, the checks of a user's arrays, and load_data with its banner."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data import dataset, download
from cifarflow.data.dataset import (
    Dataset,
    Split,
    check_images_and_labels,
    load_data,
    split_validation,
)
from cifarflow.data.layouts import CIFAR10
from cifarflow.errors import ConfigError, DataError, DataNotFoundError


def images_and_labels(count, classes=10):
    images = np.zeros((count, 4, 5, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count) % 256
    return images, np.arange(count, dtype=np.int32) % classes


def make_dataset(train=10, validation=4, test=5):
    splits = [Split(*images_and_labels(count)) for count in (train, validation, test)]
    return Dataset("mine", *splits, class_names=tuple("abcdefghij"), source="here")


# --- checks -------------------------------------------------------------------------------

IMAGES, LABELS = images_and_labels(3)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (IMAGES[0], LABELS, r"images must have the shape .* not \(4, 5, 3\)"),
        (IMAGES.astype(np.float32), LABELS, "images must be uint8 .* not float32"),
        (
            np.eye(60, dtype=np.uint8)[None, ..., None].repeat(3, 0),
            LABELS,
            "pixels of 0 .* here is 1",
        ),
        (IMAGES.tolist(), LABELS, "images must be a numpy array, not list"),
        (IMAGES, [0, 1, 2], "labels must be a numpy array, not list"),
        (IMAGES, LABELS[:, None], r"labels must have the shape \[N\], not \(3, 1\)"),
        (IMAGES, LABELS.astype(float), "labels must be integers, not float64"),
        (IMAGES, LABELS[:2], "equally many, not 3 and 2"),
        (IMAGES, LABELS - 1, "labels must be from 0 to 9, not -1"),
        (IMAGES, LABELS + 9, "labels must be from 0 to 9, not 11"),
    ],
)
def test_wrong_images_and_labels(images, labels, match):
    with pytest.raises(DataError, match=match):
        check_images_and_labels(images, labels, num_classes=10)


def test_right_images_and_labels():
    check_images_and_labels(IMAGES, LABELS, num_classes=3)
    check_images_and_labels(IMAGES, LABELS + 1000)
    check_images_and_labels(IMAGES[:0], LABELS[:0], num_classes=10)
    with pytest.raises(DataError, match="labels must be from 0, not -2"):
        check_images_and_labels(IMAGES, LABELS - 2)


def test_split():
    split = Split(IMAGES, LABELS.astype(np.uint8))
    assert split.labels.dtype == np.int32
    assert len(split) == 3
    with pytest.raises(DataError, match="uint8"):
        Split(IMAGES / 255, LABELS)


def test_dataset():
    data = make_dataset()
    assert data.num_classes == 10
    assert data.image_shape == (4, 5, 3)
    assert not data.is_standin
    with pytest.raises(DataError, match="labels must be from 0 to 4, not 9"):
        Dataset("mine", data.train, data.validation, data.test, tuple("abcde"), "here")
    other = Split(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, np.int32))
    with pytest.raises(DataError, match=r"one shape, not \(4, 5, 3\) and \(8, 8, 3\)"):
        Dataset("mine", data.train, other, data.test, data.class_names, "here")


def test_limit():
    data = make_dataset(train=100, validation=20, test=30)
    small = data.limit(10)
    assert [len(split) for split in (small.train, small.validation, small.test)] == [10, 2, 3]
    assert np.array_equal(small.train.images, data.train.images[:10])
    tiny = data.limit(1)
    assert [len(split) for split in (tiny.train, tiny.validation, tiny.test)] == [1, 1, 1]
    same = data.limit(100)
    assert [len(split) for split in (same.train, same.validation, same.test)] == [100, 20, 30]
    assert len(make_dataset(validation=0).limit(3).validation) == 0
    for bad in (0, -1, 1.5, "3", True):
        with pytest.raises(ConfigError, match="limit_examples must be a whole number >= 1, not"):
            data.limit(bad)
    with pytest.raises(ConfigError, match="at most the 100 training images, not 101"):
        data.limit(101)


# --- validation ---------------------------------------------------------------------------


@settings(deadline=None, database=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_last_is_what_keras_takes(count, fraction):
    from keras.src.trainers.data_adapters.array_slicing import train_validation_split

    images, labels = images_and_labels(count)
    split_at = math.floor(count * (1.0 - fraction))
    if split_at in (0, count):
        with pytest.raises(ConfigError, match="both need at least 1"):
            split_validation(images, labels, fraction=fraction)
        return
    train, validation = split_validation(images, labels, fraction=fraction)
    (keras_train, _), (keras_validation, keras_labels) = train_validation_split(
        (images, labels), fraction
    )
    assert np.array_equal(train.images, keras_train)
    assert np.array_equal(validation.images, keras_validation)
    assert np.array_equal(validation.labels, keras_labels)


def test_no_validation():
    for how in ("last", "stratified"):
        train, validation = split_validation(*images_and_labels(5), fraction=0, how=how)
        assert (len(train), len(validation)) == (5, 0)
        assert validation.images.shape == (0, 4, 5, 3)


def test_stratified():
    images, labels = images_and_labels(200)
    options = {"fraction": 0.25, "how": "stratified"}
    train, validation = split_validation(images, labels, **options, seed=3)
    assert np.bincount(validation.labels).tolist() == [5] * 10
    assert np.bincount(train.labels).tolist() == [15] * 10
    rows = np.concatenate([train.images[:, 0, 0, 0], validation.images[:, 0, 0, 0]])
    assert sorted(rows) == list(range(200))
    assert (np.diff(train.images[:, 0, 0, 0].astype(int)) > 0).all()  # the order stays
    same = split_validation(images, labels, **options, seed=3)[1]
    other = split_validation(images, labels, **options, seed=4)[1]
    assert np.array_equal(same.images, validation.images)
    assert not np.array_equal(other.images, validation.images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fraction": 1.0}, "validation_fraction must be a finite number >= 0 and < 1, not 1.0"),
        ({"fraction": -0.1}, "not -0.1"),
        ({"fraction": float("nan")}, "not nan"),
        ({"how": "random"}, "validation_split must be one of last, stratified, not 'random'"),
        ({"how": "stratified", "seed": -1}, "seed must be a whole number >= 0, not -1"),
        ({"fraction": 0.999, "how": "stratified"}, "leaves 0 to train on and 5 to validate on"),
    ],
)
def test_bad_split_options(options, match):
    with pytest.raises(ConfigError, match=match):
        split_validation(*images_and_labels(5), **options)
    with pytest.raises(DataError, match="uint8"):
        split_validation(IMAGES / 2, LABELS)


# --- load_data ----------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def fail(path, **options):
        raise download.DownloadError("no network in this test")

    monkeypatch.setattr(download, "download_archive", fail)


@pytest.fixture
def quick_standin(monkeypatch):
    """Fewer drawn images: how they are drawn is another file's concern."""
    from cifarflow.data import standin

    monkeypatch.setattr(standin, "TRAIN_EXAMPLES", 50)
    monkeypatch.setattr(standin, "TEST_EXAMPLES", 20)


def test_auto_falls_back_with_a_banner(no_network, quick_standin, capsys):
    data = load_data()
    assert data.is_standin
    assert data.name == "standin"
    banner = capsys.readouterr().err
    assert "NOT CIFAR-10 results" in banner
    joined = " ".join(banner.replace("#", " ").split())
    for part in ("no network in this test", "--data_dir=PATH or CIFARFLOW_DATA", "(2)", "(3)"):
        assert part in joined
    lines = [line for line in banner.splitlines() if line]
    assert len({len(line) for line in lines if len(line) < 120}) == 1  # a box
    assert len(lines) >= 8


def test_standin_on_request_has_a_shorter_banner(no_network, quick_standin, capsys):
    load_data()
    longer = capsys.readouterr().err
    assert load_data("standin").is_standin
    shorter = capsys.readouterr().err
    assert "NOT CIFAR-10 results" in shorter
    assert "asks so" in shorter
    assert len(shorter) < len(longer)


def test_cifar10_never_falls_back(no_network, capsys):
    with pytest.raises(DataNotFoundError, match="not found in the project's cache"):
        load_data("cifar10")
    assert not capsys.readouterr().err


def test_auto_does_not_hide_what_is_wrong(no_network, tmp_path, monkeypatch, capsys):
    with pytest.raises(DataNotFoundError, match="holds no CIFAR-10"):
        load_data("auto", tmp_path / "nowhere")
    damaged = tmp_path / "cache" / "cifar-10-python.tar.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x1f\x8b cut short")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz cannot be read"):
        load_data()
    damaged.unlink()
    monkeypatch.setenv("CIFARFLOW_DATA", str(tmp_path / "empty"))
    with pytest.raises(DataNotFoundError, match="CIFARFLOW_DATA="):
        load_data()
    assert not capsys.readouterr().err


def test_load_data_rejects_an_unknown_choice():
    with pytest.raises(
        ConfigError, match=r"one of auto, cifar10, cifar100, .* folder, tfds:NAME, not 'mnist'"
    ):
        load_data("mnist")


def test_options_are_handed_on(monkeypatch, tmp_path):
    seen = {}
    options = {
        "validation_fraction": 0.3,
        "validation_split": "stratified",
        "seed": 5,
        "verify": False,
        "download": False,
        "download_timeout_seconds": 3.0,
        "cache_dir": tmp_path,
    }
    monkeypatch.setattr(dataset, "load_cifar10", lambda path, **given: seen.update(given))
    load_data("cifar10", tmp_path, **options)
    assert seen == options


@pytest.mark.real_data
def test_auto_takes_real_data_in_silence(cifar10_dir, capsys):
    data = load_data("auto", cifar10_dir)
    assert data.name == "cifar10"
    assert data.class_names == CIFAR10.class_names
    assert len(data.train) == CIFAR10.train_examples * 4 // 5
    assert not capsys.readouterr().err
