"""The stand-in set: the same on every machine, balanced, cached, and not too easy."""

import hashlib
import os
import time

import numpy as np
import pytest

from cifarflow.data import formats, standin
from cifarflow.data.standin import load_standin, make_standin
from cifarflow.errors import ConfigError


@pytest.fixture(scope="module")
def arrays():
    return make_standin()


def test_same_bytes_everywhere(arrays):
    sha256 = "6b37629d2e8cb123111b7cd25e1583c5d83bc97ee57ab8545e28ca42c9dde0a9"
    assert standin.VERSION == 1
    assert formats.digest(arrays) == standin.ARRAYS_SHA256 == sha256


def test_shapes_and_balance(arrays):
    assert arrays.train_images.shape == (10000, 32, 32, 3)
    assert arrays.test_images.shape == (2000, 32, 32, 3)
    assert arrays.train_images.dtype == arrays.test_images.dtype == np.uint8
    assert arrays.train_labels.dtype == arrays.test_labels.dtype == np.int32
    assert np.bincount(arrays.train_labels).tolist() == [1000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [200] * 10
    assert (np.diff(arrays.train_labels) != 0).any()
    every = np.concatenate([arrays.train_images, arrays.test_images]).reshape(12000, -1)
    assert len({hashlib.sha256(image).digest() for image in every}) == 12000


def test_made_in_seconds():
    start = time.process_time()
    other = make_standin(seed=1)
    assert time.process_time() - start < 5
    assert formats.digest(other) != standin.ARRAYS_SHA256


def test_not_too_easy(arrays):
    """The mean image of each class, the simplest of classifiers, must know little."""
    flat = arrays.train_images.reshape(10000, -1).astype(np.float32)
    means = np.stack([flat[arrays.train_labels == label].mean(0) for label in range(10)])
    test = arrays.test_images.reshape(2000, -1).astype(np.float32)
    distance = (means**2).sum(1) - 2 * test @ means.T
    assert 0.1 < (distance.argmin(1) == arrays.test_labels).mean() < 0.35


def test_seed_is_checked():
    with pytest.raises(ConfigError, match="seed must be a whole number >= 0, not -1"):
        make_standin(seed=-1)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(standin, "TRAIN_EXAMPLES", 50)
    monkeypatch.setattr(standin, "TEST_EXAMPLES", 20)


def test_cache(few, tmp_path, monkeypatch):
    first = load_standin()
    path = tmp_path / "cache" / "standin-v1.npz"
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(standin, "make_standin", None)  # must not be called
        assert np.array_equal(load_standin().test.images, first.test.images)
    for damaged in (b"", b"PK damaged", whole[:5000], bytes(len(whole))):
        path.write_bytes(damaged)
        assert np.array_equal(load_standin().test.images, first.test.images)
        assert path.read_bytes() == whole
    assert os.listdir(path.parent) == [path.name]

    load_standin(cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / path.name).is_file()


def test_cache_that_cannot_be_written_is_no_error(few, tmp_path):
    (tmp_path / "file").write_text("x")
    assert load_standin(cache_dir=tmp_path / "file" / "cache").is_standin


def test_dataset(few):
    dataset = load_standin(validation_fraction=0.4, validation_split="stratified", seed=3)
    assert dataset.name == "standin"
    assert dataset.class_names == standin.CLASS_NAMES
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [30, 20, 20]
    assert np.bincount(dataset.validation.labels).tolist() == [2] * 10
    with pytest.raises(ConfigError, match="validation_fraction"):
        load_standin(validation_fraction=1)
