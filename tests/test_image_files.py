"""Ordinary image files: what a model gets to see of them, and files that are none."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from cifarflow.data.folder import load_folder
from cifarflow.data.image_files import read_image
from cifarflow.errors import ConfigError, DataError

HALVES = np.zeros((40, 40, 3), np.uint8)
HALVES[:, 20:] = (200, 100, 50)


def saved(path, pixels=HALVES, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.gif", "a b.jpg", "a.webp", "a.x.PNG"])
def test_each_format(tmp_path, name):
    image = read_image(str(saved(tmp_path / name)), image_shape=(4, 4, 3))
    assert (image.shape, image.dtype) == ((4, 4, 3), np.uint8)
    assert np.abs(image[:, 0].astype(int)).max() <= 12
    assert np.abs(image[:, 3].astype(int) - (200, 100, 50)).max() <= 12


def test_the_middle_is_taken_and_edges_are_smooth(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255
    # The pixels just outside count a little at the edge, as they do for any other pixel.
    white = read_image(saved(tmp_path / "a.png", wide), image_shape=(8, 8, 3))
    assert (white[:, 1:-1] == 255).all()
    assert white.min() > 220
    tall = read_image(saved(tmp_path / "a.png", wide.swapaxes(0, 1)), image_shape=(8, 16, 3))
    assert (tall.shape, tall.min()) == ((8, 16, 3), 255)
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 200
    # Without antialiasing lines would stay lines, or vanish.
    smooth = read_image(saved(tmp_path / "a.png", lines), image_shape=(8, 8, 3))
    assert np.abs(smooth[:, 1:-1].astype(int) - 100).max() <= 2
    same = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(read_image(saved(tmp_path / "a.png", same)), same)


def test_every_kind_of_pixel(tmp_path):
    path = tmp_path / "a.png"
    deep = np.full((9, 9), 51_400, np.uint16)
    for pixels, expected in (
        (deep, [200] * 3),
        (np.full((9, 9), 77, np.uint8), [77] * 3),
        (np.full((9, 9, 4), (10, 20, 30, 0), np.uint8), [255] * 3),
        (np.full((9, 9, 4), (10, 20, 30, 255), np.uint8), [10, 20, 30]),
    ):
        image = read_image(saved(path, pixels), image_shape=(3, 3, 3))
        assert np.array_equal(image, np.broadcast_to(expected, (3, 3, 3)))
    grey = read_image(saved(path, HALVES), image_shape=(4, 4, 1))
    assert grey.shape == (4, 4, 1)
    assert abs(grey[0, 3, 0] - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) < 4
    palette = Image.fromarray(HALVES).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    palette.save(path, transparency=palette.getpixel((0, 0)))
    assert (read_image(path, image_shape=(4, 4, 3))[:, 0] == 255).all()


def held(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def test_the_camera_says_which_side_is_up(tmp_path):
    turned = read_image(saved(tmp_path / "a.jpg", exif=held(6)), image_shape=(4, 4, 3))
    assert turned[0].max() <= 12
    assert turned[3].min() >= 38


@pytest.mark.parametrize("orientation", range(10))
def test_every_way_to_hold_a_camera(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3)).astype(np.uint8)
    path = saved(tmp_path / "a.png", pixels, exif=held(orientation))
    with Image.open(path) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(read_image(path, image_shape=expected.shape), expected)


def test_damaged_notes_of_a_camera_say_nothing(tmp_path):
    whole = saved(tmp_path / "a.png")
    plain = read_image(whole)
    for exif in (
        b"Exif\0\0nothing",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x09\0",
    ):
        assert np.array_equal(read_image(saved(tmp_path / "b.png", exif=exif)), plain)


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_pictures():
    """Kinds of which two decoders may make two things."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (41, 60, 4)).astype(np.uint8)
    colours = Image.fromarray(noise[..., :3])
    deep = random.integers(0, 1 << 16, (41, 60)).astype(np.uint16)
    return {
        "rotated": encoded(colours, "JPEG", exif=held(6)),
        "transparent": encoded(Image.fromarray(noise), "PNG"),
        "deep": encoded(Image.fromarray(deep), "PNG"),
        "odd size": encoded(colours, "BMP"),
        "grey": encoded(colours.convert("L"), "PNG"),
        "palette": encoded(colours.convert("P"), "GIF", transparency=3),
    }


def test_a_folder_to_train_on_has_the_same_pixels(tmp_path):
    pictures = odd_pictures()
    for name, data in pictures.items():
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        (tmp_path / "set" / "train" / name / "a").write_bytes(data)
    (tmp_path / "set" / "test" / "grey").mkdir(parents=True)
    (tmp_path / "set" / "test" / "grey" / "a").write_bytes(pictures["grey"])
    for size in (8, 32):
        train = load_folder(tmp_path / "set", image_size=size, validation_fraction=0).train
        assert sorted(train.labels) == list(range(len(pictures)))
        for image, label in zip(train.images, train.labels, strict=True):
            path = tmp_path / "set" / "train" / sorted(pictures)[label] / "a"
            assert np.array_equal(image, read_image(path, image_shape=(size, size, 3))), path


def test_files_that_are_none(tmp_path):
    def refused(path, match):
        with pytest.raises(DataError, match=match) as caught:
            read_image(path)
        assert str(caught.value).isprintable()
        assert repr(str(path)) in str(caught.value)

    refused(tmp_path / "x.png", "there is no image")
    refused(tmp_path, "cannot be read: .*(directory|no ordinary file)")
    for data in (b"", b"text\x1b[31m", b"\x89PNG\r\n\x1a\n", b"II*\0" + bytes(100)):
        (tmp_path / "x").write_bytes(data)
        refused(tmp_path / "x", "is no picture that can be read: it is none of PNG, JPEG, BMP")
    noise = np.random.default_rng(0).integers(0, 256, (99, 99, 3)).astype(np.uint8)
    for name in ("a.png", "a.jpg", "a.bmp"):
        whole = saved(tmp_path / name, noise).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, "is no picture that can be read: ")
    with (tmp_path / "x").open("wb") as file:
        file.truncate(64_000_001)
    refused(tmp_path / "x", "cannot be read: it has 64000001 bytes, expected at most 64000000")


@pytest.mark.parametrize("side", [8_001, 11_000, 100_000])
def test_pictures_of_too_many_pixels(tmp_path, side):
    data = bytearray(saved(tmp_path / "a.bmp").read_bytes())
    data[18:26] = side.to_bytes(4, "little") * 2
    (tmp_path / "a.bmp").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.bmp' .* pixels"):
        read_image(tmp_path / "a.bmp")


def test_models_of_other_channels(tmp_path):
    with pytest.raises(ConfigError, match="3 channels, or 1 if grey, and the model wants 4"):
        read_image(saved(tmp_path / "a.png"), image_shape=(8, 8, 4))
