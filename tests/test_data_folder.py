"""Folders of pictures: what is taken for a data set, how a picture is read, what is refused."""

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import cifarflow
from cifarflow.data import folder as folder_lib
from cifarflow.data import pictures
from cifarflow.data.dataset import load_data
from cifarflow.data.folder import load_folder
from cifarflow.data.pictures import decode_picture
from cifarflow.errors import ConfigError, DataError, DataNotFoundError

COLOURS = {"ash": (200, 30, 30), "beech": (30, 200, 30), "cedar": (30, 30, 200)}


def picture(colour=(1, 2, 3), size=(32, 32), kind="PNG", mode="RGB"):
    image = Image.new("RGB", size, colour).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def put_classes(folder, counts, kind="png"):
    """A folder a class with so many pictures, each of its class's colour and its own brightness."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            colour = tuple(value + number for value in COLOURS.get(name, (9, 9, 9)))
            (folder / name / f"{number:02d}.{kind}").write_bytes(picture(colour))
    return folder


def counts_of(split, classes=3):
    return np.bincount(split.labels, minlength=classes).tolist()


# --- layouts ------------------------------------------------------------------------------


def test_classes_alone(tmp_path):
    place = put_classes(tmp_path / "trees", dict.fromkeys(COLOURS, 10))
    data = load_folder(place)
    assert data.name == "trees"
    assert data.class_names == ("ash", "beech", "cedar")
    assert data.source == f"{place} (20% of each class held out for the test)"
    assert counts_of(data.test) == [2, 2, 2]
    assert (len(data.train), len(data.validation)) == (19, 5)
    # Right pictures, right labels, none twice.
    seen = set()
    for split in (data.train, data.validation, data.test):
        for image, label in zip(*split, strict=True):
            base = COLOURS[data.class_names[label]]
            assert (image == image[0, 0]).all()
            number = int(image[0, 0, 0]) - base[0]
            assert image[0, 0].tolist() == [value + number for value in base]
            seen.add((int(label), number))
    assert len(seen) == 30
    # The last ones in file order are no class of their own.
    assert len(set(data.validation.labels)) > 1
    again = load_folder(place, seed=5)
    assert np.array_equal(again.test.images, data.test.images)
    assert np.array_equal(again.train.labels, data.train.labels)


@pytest.mark.parametrize("validation", ["val", "validation", None])
def test_splits(tmp_path, validation):
    place = tmp_path / "trees"
    put_classes(place / "train", dict.fromkeys(COLOURS, 5))
    put_classes(place / "test", {"beech": 3, "cedar": 1})
    if validation:
        put_classes(place / validation, {"ash": 2})
    (place / "README.txt").write_text("beside the classes, of no account")
    data = load_folder(place, validation_fraction=0.4)
    assert counts_of(data.test) == [0, 3, 1]
    assert data.source == str(place)
    if validation:
        assert counts_of(data.validation) == [2, 0, 0]
        assert counts_of(data.train) == [5, 5, 5]
    else:
        assert (len(data.train), len(data.validation)) == (9, 6)
        stratified = load_folder(place, validation_fraction=0.4, validation_split="stratified")
        assert counts_of(stratified.validation) == [2, 2, 2]


def test_validation_without_a_test_folder(tmp_path):
    put_classes(tmp_path / "train", dict.fromkeys(COLOURS, 5))
    put_classes(tmp_path / "val", dict.fromkeys(COLOURS, 2))
    data = load_folder(tmp_path)
    sizes = [len(split) for split in (data.train, data.validation, data.test)]
    assert sizes == [12, 6, 3]
    assert "20% of each class held out" in data.source


def test_a_class_called_train(tmp_path):
    put_classes(tmp_path, {"bus": 5, "train": 5})
    assert load_folder(tmp_path).class_names == ("bus", "train")


def test_odd_names_links_and_hidden_files(tmp_path):
    store = put_classes(tmp_path / "store", {"ash": 5})
    place = tmp_path / "träume und\nmehr"
    place.mkdir()
    (place / "ash").symlink_to(store / "ash")
    (place / "$x_{1}$ ½").mkdir()
    for number in range(5):
        (place / "$x_{1}$ ½" / f"a b\t{number}").symlink_to(store / "ash" / f"{number:02d}.png")
    (place / "ash" / ".DS_Store").write_bytes(b"no picture")
    (place / ".git").mkdir()
    data = load_folder(place)
    assert data.class_names == ("$x_{1}$ ½", "ash")
    assert len(data.train) + len(data.validation) + len(data.test) == 10


def test_through_load_data(tmp_path):
    place = put_classes(tmp_path / "trees", dict.fromkeys(COLOURS, 5))
    data = load_data("folder", place, image_size=16)
    assert (data.name, data.image_shape) == ("trees", (16, 16, 3))
    assert load_data("folder:trees", place).image_shape == (32, 32, 3)
    with pytest.raises(DataNotFoundError, match=r"data=folder:herbs is not in the folder '.*trees"):
        load_data("folder:herbs", place)
    with pytest.raises(ConfigError, match="data=folder needs data_dir, the folder of the pictures"):
        load_data("folder")
    with pytest.raises(ConfigError, match=r"data must be one of .*, not 'folder:'"):
        load_data("folder:", place)
    assert cifarflow.load_folder is load_folder


# --- what is refused ----------------------------------------------------------------------


def two(tmp_path):
    return put_classes(tmp_path / "trees", {"ash": 5, "beech": 5})


def test_no_folder_or_no_classes(tmp_path):
    with pytest.raises(DataNotFoundError, match="nowhere' is no folder"):
        load_folder(str(tmp_path / "nowhere"))
    with pytest.raises(DataNotFoundError, match="a folder a class, at least two, and has none"):
        load_folder(tmp_path)
    put_classes(tmp_path, {"ash": 5})
    with pytest.raises(DataNotFoundError, match="at least two, and has only 'ash'"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture\x1b[31m", picture()[:60], picture(kind="JPEG")[:300], b"\x89PNG\r\n\x1a\n"],
)
def test_a_file_that_is_no_picture_is_named(tmp_path, content):
    place = two(tmp_path)
    (place / "ash" / "bad.png").write_bytes(content)
    with pytest.raises(
        DataError, match=r"ash/bad\.png' is no picture that can be read: "
    ) as caught:
        load_folder(place)
    assert str(caught.value).isprintable()


def test_what_is_no_file(tmp_path):
    place = two(tmp_path)
    odd = place / "ash" / "odd\n.png"
    odd.symlink_to(odd)
    with pytest.raises(DataError, match=r"trees' cannot be read: "):
        load_folder(place)
    odd.unlink()
    os.mkfifo(odd)
    with pytest.raises(DataError, match=r"ash/odd\\n\.png' cannot be read: it is no ordinary file"):
        load_folder(place)
    odd.unlink()
    odd.mkdir()
    with pytest.raises(DataError, match=r"ash/odd\\n\.png' cannot be read: .*directory"):
        load_folder(place)


def test_classes_that_do_not_fit(tmp_path):
    put_classes(tmp_path / "train", {"ash": 2, "beech": 2})
    put_classes(tmp_path / "test", {"ash": 2, "cedar": 1})
    with pytest.raises(DataError, match="test' holds the class 'cedar', which is not in train"):
        load_folder(tmp_path)
    (tmp_path / "test" / "cedar").rename(tmp_path / "more")
    with pytest.raises(
        DataError, match="holds 'more' beside train; expected train, test, val, val"
    ):
        load_folder(tmp_path)
    (tmp_path / "more").rename(tmp_path / "val")
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match="holds val and validation, expected one"):
        load_folder(tmp_path)
    (tmp_path / "validation").rmdir()
    with pytest.raises(DataError, match="val' holds no pictures"):
        load_folder(tmp_path)
    for path in (tmp_path / "train" / "beech").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="beech' holds 0 pictures, expected 1 or more"):
        load_folder(tmp_path)


def test_a_class_needs_two_where_the_test_set_is_drawn(tmp_path):
    put_classes(tmp_path, {"ash": 5, "beech": 1})
    with pytest.raises(DataError, match="beech' holds 1 pictures, expected 2 or more"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 0}, "image_size must be a whole number >= 1, not 0"),
        ({"image_size": 1025}, "image_size must be at most 1024, not 1025"),
        ({"image_size": 1.5}, "image_size must be .* not 1.5"),
        ({"validation_fraction": -1}, "validation_fraction must be .* not -1"),
        ({"validation_split": "first"}, "not 'first'"),
        ({"seed": -1}, "seed must be"),
        ({"data_dir": ""}, "data_dir must be the path of a file or folder, not ''"),
        ({"cache_dir": 3}, "cache_dir must be"),
    ],
)
def test_bad_options(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        load_folder(**{"data_dir": tmp_path, **options})


def test_too_many_for_memory(tmp_path, monkeypatch):
    place = two(tmp_path)
    monkeypatch.setattr(pictures, "_IMAGES_BYTES_LIMIT", 30_000)
    with pytest.raises(
        DataError, match=r"has 10 images, which at 32 x 32 take .*smaller image_siz"
    ):
        load_folder(place)
    load_folder(place, image_size=16)


# --- the decoded copy ---------------------------------------------------------------------


def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    place = two(tmp_path)
    with mock.patch.object(folder_lib, "decode_pictures", wraps=pictures.decode_pictures) as decode:
        first = load_folder(place)
        assert decode.call_count == 1
        second = load_folder(place)
        assert decode.call_count == 1
        assert np.array_equal(first.train.images, second.train.images)
        load_folder(place, image_size=16)  # its own copy
        load_folder(place)
        assert decode.call_count == 2
        # One picture is another now.
        (place / "ash" / "00.png").write_bytes(picture((7, 7, 7)))
        changed = load_folder(place)
        assert decode.call_count == 3
        everything = np.concatenate([changed.train.images, changed.validation.images])
        assert (np.concatenate([everything, changed.test.images]) == 7).all(axis=(1, 2, 3)).any()
        (place / "ash" / "00.png").rename(place / "beech" / "more.png")
        assert counts_of(load_folder(place, validation_fraction=0).train, 2) == [3, 4]
        assert decode.call_count == 4
        # A copy that was tampered with is not read.
        for copy in (tmp_path / "cache").glob("decoded-*.npz"):
            copy.write_bytes(copy.read_bytes()[:-100])
        load_folder(place)
        assert decode.call_count == 5
        load_folder(place)
        assert decode.call_count == 5
        # Nor is one of a decoder that made other pixels.
        monkeypatch.setattr(folder_lib, "DECODER_VERSION", 1)
        load_folder(place)
        assert decode.call_count == 6
    assert len(list((tmp_path / "cache").glob("decoded-*.npz"))) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert len(load_folder(two(tmp_path), cache_dir=tmp_path / "file" / "cache").test) == 2


# --- one picture --------------------------------------------------------------------------


def test_a_picture_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for kind in ("PNG", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind)
        assert np.array_equal(decode_picture(buffer.getvalue(), "x", shape=(32, 32, 3)), pixels)


KINDS = {
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "JPEG": ("RGB", "L", "CMYK"),
    "BMP": ("RGB", "L", "P", "1"),
    "GIF": ("RGB", "L", "P"),
    "WEBP": ("RGB", "RGBA"),
}


@pytest.mark.parametrize(("kind", "mode"), [(k, mode) for k in KINDS for mode in KINDS[k]])
def test_kinds(kind, mode):
    image = decode_picture(picture((250, 250, 250), (50, 70), kind, mode), "x", shape=(8, 8, 3))
    assert (image.shape, image.dtype) == ((8, 8, 3), np.uint8)
    # A palette has few greys.
    assert (image > 225).all()


def test_resizing_crops_the_middle_and_does_not_alias():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 20:80] = 200
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    assert (decode_picture(buffer.getvalue(), "x", shape=(10, 10, 3)) == 200).all()
    # Stripes of one pixel become their mean.
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    assert abs(decode_picture(buffer.getvalue(), "x", shape=(8, 8, 3)).astype(int) - 100).max() < 12


def png(width, height, *, depth=8, colour=2, more=b""):
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + body + chunk(b"IEND", b"")


def test_bombs_are_refused_before_they_are_decoded():
    # A compressed text of 100 MB.
    packer = zlib.compressobj(9)
    text = b"x\0\0" + b"".join(packer.compress(bytes(10**6)) for _ in range(100)) + packer.flush()
    check = struct.pack(">I", zlib.crc32(b"zTXt" + text))
    bomb = struct.pack(">I", len(text)) + b"zTXt" + text + check
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data, match in (
            (png(9_000, 9_000), "claims 9000 x 9000 pixels, expected at most 64000000"),
            (png(60_000, 60_000), "x is no picture"),
            (png(2**31 - 1, 2**31 - 1), "x is no picture"),
            (png(32, 32, more=bomb), "x is no picture that can be read"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x is no picture"),
            (b"II*\0" + bytes(100), "x is no picture"),
            (bytes(64_000_001), "x has 64000001 bytes, expected at most 64000000"),
        ):
            with pytest.raises(DataError, match=match):
                decode_picture(data, "x", shape=(32, 32, 3))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


def test_warnings_of_pillow_are_no_errors(tmp_path):
    place = two(tmp_path)
    image = Image.new("P", (32, 32))
    image.info["transparency"] = bytes(range(10))
    image.save(place / "ash" / "palette.png")
    load_folder(place)
