"""Sets of TensorFlow Datasets: a real one, small, as TFDS itself prepares it; and damaged ones."""

import json
import os
import shutil
from unittest import mock

import numpy as np
import pytest

import cifarflow
from cifarflow.data import download, prepared
from cifarflow.data.dataset import load_data
from cifarflow.data.prepared import load_prepared
from cifarflow.errors import ConfigError, DataError, DataNotFoundError

TRAIN, TEST = 60, 20
NAMES = ("zero", "one", "two")


def images_of(count):
    """Grey 28x28 images, whose brightness says their place."""
    return np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 28, 28, 1)
    )


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """What TFDS wrote; `own_grey` has one version, `own_many` two configurations."""
    import tensorflow_datasets as tfds

    data_dir = tmp_path_factory.mktemp("tfds")

    class OwnGrey(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Grey images in three classes."""

        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(28, 28, 1)),
                        "label": tfds.features.ClassLabel(names=NAMES),
                        "other": tfds.features.Text(),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            splits = {"train": TRAIN, "test": TEST, "validation": 9}
            return {name: self._generate_examples(count) for name, count in splits.items()}

        def _generate_examples(self, count):
            for row, image in enumerate(images_of(count)):
                yield row, {"image": image, "label": row % 3, "other": "x"}

    tfds.disable_progress_bar()
    config = tfds.download.DownloadConfig(num_shards=2, try_download_gcs=False)
    OwnGrey(data_dir=data_dir).download_and_prepare(download_config=config)
    return data_dir


@pytest.fixture
def own(tfds_dir, tmp_path):
    """A copy to change: the directory of the version."""
    shutil.copytree(tfds_dir / "own_grey", tmp_path / "copy" / "own_grey")
    return tmp_path / "copy" / "own_grey" / "1.2.0"


@pytest.mark.parametrize("place", ["", "own_grey/1.2.0"])
def test_a_set_of_ones_own(tfds_dir, place):
    data = load_prepared("own_grey", tfds_dir / place)
    assert data.name == "tfds:own_grey"
    assert data.class_names == NAMES
    assert data.source == str(tfds_dir / "own_grey" / "1.2.0")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [60, 9, 20]
    assert data.image_shape == (32, 32, 3)
    # Grey became RGB, and each image kept its label.
    places = data.train.images[:, 5, 5, 0]
    assert (data.train.images == places[:, None, None, None]).all()
    assert sorted(places) == list(range(TRAIN))
    assert np.array_equal(places % 3, data.train.labels)


def test_the_size_and_the_copy(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    with mock.patch.object(prepared, "_read_split", wraps=prepared._read_split) as read:
        first = load_data("tfds:own_grey", image_size=28)
        assert first.image_shape == (28, 28, 3)
        assert read.call_count == 3
        again = load_data("tfds:own_grey", image_size=28)
        assert read.call_count == 3
        # One of a decoder that made other pixels is not taken.
        monkeypatch.setattr(prepared, "DECODER_VERSION", 1)
        load_data("tfds:own_grey", image_size=28)
        assert read.call_count == 6
    for split in ("train", "validation", "test"):
        one, other = getattr(first, split), getattr(again, split)
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)
    assert len(list((tmp_path / "cache").glob("decoded-*.npz"))) == 1
    assert cifarflow.load_prepared is load_prepared


def change_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def test_without_a_validation_split_one_is_taken(own):
    info = json.loads((own / "dataset_info.json").read_text())
    splits = [split for split in info["splits"] if split["name"] != "validation"]
    change_json(own / "dataset_info.json", splits=splits)
    (own / "label.labels.txt").unlink()
    data = load_prepared("own_grey", own, validation_fraction=0.5)
    assert (len(data.train), len(data.validation)) == (30, 30)
    assert data.class_names == ("0", "1", "2")


def test_the_newest_version_and_configurations(own):
    root = own.parents[1]
    (own.parent / "1.10.0").mkdir()
    (own.parent / "incomplete.9.9.9").mkdir()
    assert prepared._find("own_grey", root) == own
    shutil.copytree(own, own.parent / "1.10.0", dirs_exist_ok=True)
    assert prepared._find("own_grey", root) == own.parent / "1.10.0"
    for config in ("big", "small"):
        shutil.copytree(own, root / "many" / config / "1.0.0")
        found = root / "many" / "big" / "1.0.0"
        assert config == "small" or prepared._find("many", root) == found
    assert prepared._find("many/big", root) == found
    with pytest.raises(
        DataNotFoundError, match="several configurations: give one, as in tfds:many/b"
    ):
        prepared._find("many", root)


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../b", "A b", "x/", "a/b/c", "\x1b[31m", 3, "x/.."]
)
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(ConfigError, match="a TFDS set must be NAME or NAME/CONFIG, such as mnist"):
        load_prepared(name, tmp_path)


def test_not_there(tmp_path, tfds_dir):
    for options in ({"download": False}, {"data_dir": tmp_path}):
        with pytest.raises(DataNotFoundError) as caught:
            load_prepared("mnist", **options)
        text = str(caught.value)
        assert "the TFDS set 'mnist' is not prepared in" in text
        assert "no download was allowed" in text
        assert "tensorflow_datasets.load('mnist') prepares it" in text
    with pytest.raises(DataNotFoundError, match="holds the TFDS set 'own_grey', not 'mnist'"):
        load_prepared("mnist", tfds_dir / "own_grey" / "1.2.0")
    with pytest.raises(ConfigError, match="data must be one of"):
        load_data("tfds:")


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("dataset_info.json", {"fileFormat": "riegeli"}, "files of 'riegeli', expected 'tfrecord'"),
        ("dataset_info.json", {"splits": []}, "must have the splits train and test, and has none"),
        ("dataset_info.json", {"splits": [{"name": "train", "shardLengths": ["5"]}]}, "has train"),
        (
            "dataset_info.json",
            {"splits": [{"name": "a", "shardLengths": "x"}]},
            "a split of 'x' ex",
        ),
        (
            "dataset_info.json",
            {"splits": [{"name": name, "shardLengths": ["9" * 12]} for name in ("train", "test")]},
            "take .* GB, expected at most 8 GB",
        ),
        (
            "dataset_info.json",
            {"splits": [{"name": name, "shardLengths": ["19"]} for name in ("train", "test")]},
            r"holds more than the 19 records|holds 60 records",
        ),
        (
            "dataset_info.json",
            {"splits": [{"name": name, "shardLengths": ["70"]} for name in ("train", "test")]},
            r"\(train\) holds 60 records, expected 70",
        ),
        ("features.json", {"featuresDict": {}}, "one feature of kind image, and has none"),
        ("features.json", {"featuresDict": [1]}, "one feature of kind image, and has none"),
        (
            "features.json",
            {"featuresDict": {"features": {"image": {"image": {}}, "a": {"text": {}}}}},
            "one feature of kind classLabel, and has none",
        ),
        (
            "features.json",
            {
                "featuresDict": {
                    "features": {"image": {"image": {}}, "label": {"classLabel": {"numClasses": 0}}}
                }
            },
            "has 0 classes, expected 2 to",
        ),
        (
            "features.json",
            {
                "featuresDict": {
                    "features": {"image": {"image": {}}, "label": {"classLabel": {"numClasses": 2}}}
                }
            },
            "names 3 classes, expected 2",
        ),
        (
            "features.json",
            {
                "featuresDict": {
                    "features": {"other": {"image": {}}, "label": {"classLabel": {"numClasses": 3}}}
                }
            },
            "image 0 of .* is no picture that can be read",
        ),
        (
            "features.json",
            {
                "featuresDict": {
                    "features": {"none": {"image": {}}, "label": {"classLabel": {"numClasses": 3}}}
                }
            },
            r"\(train\) cannot be read: ",
        ),
    ],
)
def test_wrong_descriptions(own, file, changes, match):
    change_json(own / file, **changes)
    with pytest.raises(DataError, match=match) as caught:
        load_prepared("own_grey", own)
    assert str(caught.value).isprintable()


def test_damaged_files(own):
    shard = own / "own_grey-train.tfrecord-00001-of-00002"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="cut short"):
        load_prepared("own_grey", own)
    shard.write_bytes(whole.replace(b"IHDR", b"XHDR"))
    with pytest.raises(DataError, match=r"image \d+ of .*\(train\) is no picture"):
        load_prepared("own_grey", own)
    shard.unlink()
    with pytest.raises(DataError, match=r"lacks own_grey-train\.tfrecord-00001-of-00002"):
        load_prepared("own_grey", own)
    (own / "own_grey-train.tfrecord-00000-of-00002").unlink()
    with pytest.raises(DataError, match="lacks the train tfrecord files"):
        load_prepared("own_grey", own)
    for content in ("", "[1]", "[" * 10_000, '{"name": "../x"}'):
        (own / "dataset_info.json").write_text(content)
        with pytest.raises((DataError, DataNotFoundError)):
            load_prepared("own_grey", own)


# --- the download, by a TFDS that is none -------------------------------------------------

CHILD = """
import json, os, sys
act, name, folder = sys.argv[1:]
if act == "say":
    print(json.dumps([]))
else:
    import shutil
    shutil.copytree({source!r}, os.path.join(folder, name, "1.2.0"))
"""


def test_what_tfds_prepares_is_taken(tfds_dir, tmp_path, monkeypatch, capsys):
    child = CHILD.format(source=str(tfds_dir / "own_grey" / "1.2.0"))
    monkeypatch.setattr(download, "_PREPARING_CHILD", child)
    data = load_prepared("own_grey")
    assert data.source == str(tmp_path / "tfds" / "own_grey" / "1.2.0")
    assert os.listdir(tmp_path / "tfds") == ["own_grey"]
    assert "TFDS prepares own_grey (0 MB)" in capsys.readouterr().err
    monkeypatch.setattr(download, "prepare", None)  # not called again
    load_prepared("own_grey")


@pytest.mark.parametrize(
    ("child", "match"),
    [
        ("import sys; sys.exit('it knows no such set')", "not download own_grey: it knows no such"),
        ("print('nonsense')", "TFDS did not say what own_grey needs"),
        ("print('3')", "TFDS did not say what own_grey needs"),
        ("print('[[\"http://127.0.0.1:9/x\", 5]]')", "127.0.0.1:9/x cannot be reached"),
        ("import time; time.sleep(60)", "the download stood still for 0.5 s"),
    ],
)
def test_a_download_that_fails(tmp_path, monkeypatch, child, match):
    monkeypatch.setattr(download, "_PREPARING_CHILD", child)
    with pytest.raises(download.DownloadError, match=match):
        download.prepare("own_grey", tmp_path / "tfds", timeout_seconds=5, stall_seconds=0.5)
    assert os.listdir(tmp_path / "tfds") == []
    with (
        mock.patch.object(download, "_PREPARING_CHILD", "import sys; sys.exit('no')"),
        pytest.raises(DataNotFoundError, match="and the download failed: TFDS could not"),
    ):
        load_prepared("own_grey")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(download.DownloadError, match="cannot be written"):
        download.prepare("own_grey", tmp_path / "file")


def test_a_set_that_tfds_does_not_know(tmp_path):
    with pytest.raises(download.DownloadError, match=r"DatasetNotFoundError: .*no_such_set"):
        download.prepare("no_such_set", tmp_path / "tfds")
