"""Flips, crops, light and cutouts against plain NumPy, as pure functions of (images, seed)."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.augment import (
    PARTS,
    alternating_flip,
    cutout,
    make_augment,
    parse_augment,
    random_brightness,
    random_contrast,
    random_crop,
    random_erasing,
    random_flip,
)
from cifarflow.data.color import random_hue, random_saturation
from cifarflow.data.randaugment import rand_augment
from cifarflow.errors import ConfigError, DataError

SEED = (3, 17)
SPEC = "flip,crop:4,cutout:8"
FUNCTIONS = {
    "flip": random_flip,
    "crop": functools.partial(random_crop, padding=2),
    "cutout": functools.partial(cutout, size=3, fill=0),
    "erase": functools.partial(random_erasing, probability=0.5),
    "all": make_augment("flip,crop:2,cutout:3"),
}
LIGHT = {
    "brightness": random_brightness,
    "contrast": random_contrast,
    "both": make_augment("brightness:0.3,contrast:0.5"),
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def numbered(count, height, width, channels=1, dtype=np.int32):
    """Images whose every value tells its own place; the images are the same, none has a 0."""
    image = np.arange(1, height * width * channels + 1).reshape(height, width, channels)
    return np.tile(image.astype(dtype), (count, 1, 1, 1))


def random_images(count, height=32, width=32, channels=3, dtype=np.uint8):
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, height, width, channels)).astype(dtype)


def windows(image, padding):
    """Every crop that may come out, by its corner, row by row."""
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)], mode="reflect")
    height, width = image.shape[:2]
    corners = range(2 * padding + 1)
    return [padded[r : r + height, c : c + width] for r in corners for c in corners]


def which(candidates, images):
    """For each image the number of the one candidate that it equals."""
    number = {candidate.tobytes(): index for index, candidate in enumerate(candidates)}
    assert len(number) == len(candidates)
    return np.array([number[image.tobytes()] for image in images])


def paint(image, row, column, size, fill):
    """The image with a square of `size` around (row, column), as far as it lies inside."""
    result = image.copy()
    top, left = row - size // 2, column - size // 2
    for r in range(max(top, 0), min(top + size, image.shape[0])):
        for c in range(max(left, 0), min(left + size, image.shape[1])):
            result[r, c] = fill
    return result


def assert_uniform(values, kinds):
    """A chi-square test; the seeds are fixed, so it never fails by chance."""
    counts = np.bincount(values, minlength=kinds)
    assert len(counts) == kinds
    expected = len(values) / kinds
    statistic = ((counts - expected) ** 2 / expected).sum()
    # The mean is kinds - 1; five standard deviations above it is no accident.
    assert statistic < kinds - 1 + 5 * np.sqrt(2 * (kinds - 1)), counts


def test_flip_mirrors_about_half_of_the_images():
    images = random_images(2000, 4, 5)
    result = random_flip(images, SEED).numpy()
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (result == images).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored, ~kept)
    assert_uniform(mirrored.astype(int), 2)


@pytest.mark.parametrize("shape", [(6, 6, 3), (5, 9, 1), (9, 5, 2)])
@pytest.mark.parametrize("padding", [1, 3])
def test_crop_takes_every_window_of_the_reflected_image_equally_often(shape, padding):
    images = numbered(4000, *shape)
    result = random_crop(images, SEED, padding=padding).numpy()
    assert_uniform(which(windows(images[0], padding), result), (2 * padding + 1) ** 2)


def test_crop_shifts_rows_and_columns_independently():
    # 5 x 5 windows, equally often (above), would also come from a walk through them.
    images = numbered(4000, 6, 6)
    corner = which(windows(images[0], 2), random_crop(images, SEED, padding=2).numpy())
    assert_uniform((corner[1:] - corner[:-1]) % 25, 25)


# ---------------------------------------------------------------------------- alternating flip


def turns(seed, examples, epoch):
    """Which examples are mirrored."""
    images = np.tile(np.array([0, 1], np.uint8)[None, None, :, None], (len(examples), 1, 1, 1))
    result = alternating_flip(images, (seed, 5), examples=examples, epoch=epoch).numpy()
    return result[:, 0, 0, 0]


def test_an_alternating_flip_shows_both_views_in_any_two_epochs():
    images = random_images(200, 4, 5)
    examples = np.random.default_rng(1).permutation(50000)[:200]
    views = [alternating_flip(images, (3, e), examples=examples, epoch=e) for e in range(4)]
    for first, second in itertools.pairwise(views):
        np.testing.assert_array_equal(second, first.numpy()[:, :, ::-1])
    np.testing.assert_array_equal(views[0], views[2])
    mirrored = (views[0].numpy() != images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(views[0].numpy()[mirrored], images[mirrored][:, :, ::-1])
    assert_uniform(mirrored.astype(int), 2)


def test_an_alternating_flip_is_the_examples_own_and_not_the_steps():
    order = np.random.default_rng(0).permutation(1000)
    whole = turns(3, np.arange(1000), 0)
    np.testing.assert_array_equal(turns(3, order, 0), whole[order])
    np.testing.assert_array_equal(turns(3, order[:7], tf.constant(6, tf.int64)), whole[order[:7]])
    images = random_images(9, 4, 5)
    about = {"examples": np.arange(9), "epoch": 1}
    first = alternating_flip(images, (3, 1), **about)
    np.testing.assert_array_equal(first, alternating_flip(images, (3, 2**40), **about))


def test_the_bits_of_examples_and_of_seeds_are_fair_and_unrelated():
    count, seeds = 3 * 2**12, [*range(40), 2**31 - 1]
    bits = np.array([turns(seed, np.arange(count), 0) for seed in seeds]).astype(int)
    # Five standard deviations: the seeds are fixed, so none of this ever fails by chance.
    assert np.abs(bits.mean(axis=1) - 0.5).max() < 2.5 / np.sqrt(count)
    for distance in 2 ** np.arange(12):
        # Numbers that differ in one bit only; each pair comes twice.
        same = (bits[:, np.arange(count) ^ distance] == bits).mean(axis=1)
        assert np.abs(same - 0.5).max() < 2.5 / np.sqrt(count / 2)
    for row in bits:
        assert_uniform(row.reshape(-1, 3) @ [4, 2, 1], 8)
    # A fair coin for each example too, over the seeds.
    ones = bits.sum(axis=0)
    assert np.bincount(ones, minlength=42)[[0, 1, 40, 41]].sum() == 0
    assert abs(ones.var() / (len(seeds) / 4) - 1) < 0.1
    # No two seeds agree, nor are one a shifted copy of the other.
    signs = 2 * bits - 1
    agreement = (signs @ signs.T)[np.triu_indices(len(seeds), 1)]
    assert np.abs(agreement).max() < 5 * np.sqrt(count)
    for shift in (1, 2, 3, 64):
        shifted = signs @ np.roll(signs, shift, axis=1).T
        assert np.abs(shifted).max() < 5 * np.sqrt(count)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("altflip", ["altflip"]),
        ("altflip,crop", ["altflip", "crop"]),
        ("cutout,altflip", ["altflip", "cutout"]),
        ("crop,cutout,altflip", ["altflip", "crop", "cutout"]),
    ],
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_altflip_is_the_first_of_the_parts(spec, steps, epoch, some_images):
    images = some_images[0][:64]
    about = {"examples": np.arange(64) * 7, "epoch": epoch}
    parts = {
        "altflip": functools.partial(alternating_flip, **about),
        "crop": random_crop,
        "cutout": cutout,
    }
    expected = images
    for step in steps:
        expected = parts[step](expected, SEED)
    augment = make_augment(spec)
    assert augment.needs_examples
    np.testing.assert_array_equal(augment(images, SEED, **about), expected)


def test_xla_and_graphs_alternate_as_eager_code_does():
    images = tf.constant(random_images(64, 7, 9))
    augment = make_augment("altflip,crop:2,brightness,contrast,cutout:3")
    examples, epoch = tf.range(64) * 781, tf.constant(3, tf.int64)
    seed = tf.constant((2**31 - 1, 2**40), tf.int64)
    expected = augment(images, seed, examples=examples, epoch=epoch)
    for jit_compile in (True, False):
        graph = tf.function(
            lambda images, seed, examples, epoch: augment(
                images, seed, examples=examples, epoch=epoch
            ),
            jit_compile=jit_compile,
        )
        np.testing.assert_array_equal(graph(images, seed, examples, epoch), expected)


def test_only_altflip_needs_examples():
    assert not make_augment("flip,crop,brightness,contrast,cutout").needs_examples
    augment = make_augment("altflip,crop:2")
    images = random_images(4, 8, 8)
    for missing in ({}, {"examples": [0, 1, 2, 3]}, {"epoch": 0}):
        with pytest.raises(ConfigError, match="altflip must be given examples and epoch"):
            augment(images, SEED, **missing)


@pytest.mark.parametrize("bad", [[0, 1], 3, [[0, 1, 2, 3]], [0.0, 1.0, 2.0, 3.0]])
def test_examples_must_be_one_integer_an_image(bad):
    with pytest.raises(DataError, match=r"examples must be one integer an image, \(4,\), not "):
        alternating_flip(random_images(4, 8, 8), SEED, examples=bad, epoch=0)


# ------------------------------------------------------------------------ brightness and contrast


def lit(images, factor, shift):
    """What the light makes of uint8 images, in exact arithmetic."""
    pixels = images.astype(np.float64)
    mean = pixels.mean(axis=(1, 2, 3), keepdims=True)
    result = mean + (pixels - mean) * factor + shift
    return np.clip(np.floor(result + 0.5), 0, 255).astype(np.uint8)


def drawn_light(function):
    """Factor and shift of 2000 images, read off float ones, which are neither rounded nor cut."""
    images = np.tile(np.array([100, 0, 200, 100], np.float32), (2000, 1))[:, :, None, None]
    result = function(images, SEED).numpy()[:, :, 0, 0].astype(np.float64)
    shift = result[:, 0] - 100
    return (result[:, 2] - result[:, 1]) / 200, shift, result


def test_brightness_shifts_by_up_to_its_strength_in_quarters_of_the_scale():
    for strength in (0.14, 2):
        factor, shift, _ = drawn_light(functools.partial(random_brightness, strength=strength))
        np.testing.assert_array_equal(factor, 1)
        most = strength * 63.75
        assert 0.99 * most < np.abs(shift).max() <= most + 1 / 4096
        assert_uniform(((shift / most + 1) * 4.999).astype(int), 10)


def test_contrast_stretches_by_up_to_its_strength_around_the_mean():
    for strength in (0.13, 1):
        factor, shift, _ = drawn_light(functools.partial(random_contrast, strength=strength))
        np.testing.assert_allclose(shift, 0, atol=1e-4)
        assert 0.99 * strength < np.abs(factor - 1).max() <= strength + 1 / 4096
        assert_uniform((((factor - 1) / strength + 1) * 4.999).astype(int), 10)


@pytest.mark.parametrize(
    ("spec", "brightness", "contrast"),
    [
        ("brightness:0.3", 0.3, 0),
        ("contrast:0.5", 0, 0.5),
        ("contrast:4", 0, 4),
        ("contrast:1.5,brightness:.9", 0.9, 1.5),
        ("brightness:4,contrast:4", 4, 4),
        ("brightness,contrast", 0.14, 0.13),
    ],
)
def test_uint8_images_become_floats_that_round_to_the_bytes_by_hand(spec, brightness, contrast):
    images = random_images(2000, 3, 2, 2)
    draws = (np.ones(2000), np.zeros(2000))
    if contrast:
        factor = drawn_light(functools.partial(random_contrast, strength=contrast))[0]
        draws = (np.round(factor * 4096) / 4096, draws[1])
    if brightness:
        shift = drawn_light(functools.partial(random_brightness, strength=brightness))[1]
        draws = (draws[0], np.round(shift * 4096) / 4096)
    factor, shift = (each[:, None, None, None] for each in draws)
    result = make_augment(spec)(images, SEED).numpy()
    # Left as it is for a net, which is nearer to the truth than bytes are.
    assert result.dtype == np.float32
    result = np.clip(np.floor(result + 0.5), 0, 255)
    expected = lit(images, factor, shift)
    # Within 1/4096 of a half the two may round apart, when the shift is rounded itself.
    assert (result != expected).mean() < 0.002
    assert np.abs(result.astype(int) - expected).max() <= 1


def test_brightness_and_contrast_draw_independently_of_each_other_and_of_the_rest():
    factor, _, _ = drawn_light(random_contrast)
    _, shift, _ = drawn_light(random_brightness)
    images = numbered(2000, 6, 6)
    draws = {
        "factor": (factor > 1).astype(int),
        "shift": (shift > 0).astype(int),
        "flip": (random_flip(images, SEED).numpy()[:, 0, 0, 0] != 1).astype(int),
        "crop": which(windows(images[0], 1), random_crop(images, SEED, padding=1).numpy()),
        "cutout": which(
            [paint(images[0], r, c, 1, 0) for r in range(6) for c in range(6)],
            cutout(images, SEED, size=1, fill=0).numpy(),
        ),
    }
    for name in ("factor", "shift"):
        for other in draws.keys() - {name}:
            kinds = draws[other].max() + 1
            assert_uniform(draws[name] * kinds + draws[other], 2 * kinds)


def test_light_leaves_the_places_of_crop_flip_and_cutout_as_they_were():
    images = numbered(300, 9, 9, dtype=np.float64)
    plain = make_augment("flip,crop:2,cutout:3")(images, SEED).numpy()
    bright = make_augment("flip,crop:2,cutout:3,brightness")(images, SEED).numpy()
    painted = plain == 128
    assert painted.any()
    np.testing.assert_array_equal(bright == 128, painted)
    shift = np.where(painted, np.nan, bright - plain)
    assert np.nanmax(np.nanmax(shift, (1, 2, 3)) - np.nanmin(shift, (1, 2, 3))) < 1e-9
    assert len(np.unique(np.nanmax(shift, (1, 2, 3)))) > 250


def test_light_comes_after_the_crop_and_before_the_cutout(some_images):
    images = some_images[0][:64]
    result = make_augment("cutout:12,contrast:0.4,crop:2")(images, SEED)
    cropped = random_crop(images, SEED, padding=2)
    expected = cutout(random_contrast(cropped, SEED, strength=0.4), SEED, size=12)
    rounded = np.clip(np.floor(result.numpy() + 0.5), 0, 255)
    np.testing.assert_array_equal(rounded, expected)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.float16, np.float32, np.float64])
def test_light_keeps_every_dtype(name, dtype):
    images = random_images(32, 7, 9) // 2
    result = LIGHT[name](images.astype(dtype), SEED)
    is_integer = np.issubdtype(dtype, np.integer)
    assert result.dtype == (np.float32 if is_integer and name == "both" else dtype)
    assert result.shape == images.shape
    reference = LIGHT[name](images.astype(np.float64), SEED).numpy()
    if is_integer and name != "both":
        reference = np.clip(reference, np.iinfo(dtype).min, np.iinfo(dtype).max)
    np.testing.assert_allclose(result.numpy().astype(np.float64), reference, atol=0.51)


def test_float_images_are_not_clipped():
    images = np.concatenate([np.zeros((50, 4, 4, 1)), np.full((50, 4, 4, 1), 255)])
    result = random_brightness(images.astype(np.float32), SEED).numpy()
    assert result.min() < -5
    assert result.max() > 260


@pytest.mark.parametrize("name", LIGHT)
def test_light_in_graphs_of_an_unknown_batch_size_and_in_xla(name):
    function = LIGHT[name]
    signature = [tf.TensorSpec([None, 7, 9, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    graph = tf.function(function, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 7, 9, 3]
    compiled = tf.function(function, jit_compile=True)
    for count in (300, 1, 0):
        images = tf.constant(random_images(count, 7, 9))
        expected = function(images, SEED)
        np.testing.assert_array_equal(graph(images, tf.constant(SEED, tf.int64)), expected)
        if count:
            assert (expected.numpy() != images.numpy()).any()
            np.testing.assert_array_equal(compiled(images, tf.constant(SEED, tf.int64)), expected)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_no_strength_changes_nothing(name):
    images = random_images(32, 7, 9)
    np.testing.assert_array_equal(LIGHT[name](images, SEED, strength=0), images)
    np.testing.assert_array_equal(make_augment(f"{name}:0")(images, SEED), images)
    # A flat image has no contrast.
    flat = np.full((8, 4, 4, 3), 77, np.uint8)
    np.testing.assert_array_equal(random_contrast(flat, SEED, strength=4), flat)


@pytest.mark.parametrize("bad", [-0.1, 4.1, float("nan"), float("inf"), "1", None, True])
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_a_strength_must_be_in_range(name, bad):
    message = f"{name} strength must be a finite number >= 0 and <= 4, not {bad!r}"
    with pytest.raises(ConfigError, match=message):
        LIGHT[name](random_images(2, 8, 8), SEED, strength=bad)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("shape", [(8, 8, 3), [None, None, 8, 3]])
def test_light_needs_images_of_known_sides(name, shape):
    images = np.zeros(shape, np.uint8) if None not in shape else tf.TensorSpec(shape, tf.uint8)
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\]"):
        LIGHT[name](images, SEED)


@pytest.mark.parametrize(
    "number", ["", "-1", "+1", " 3", "4.1", "1e-1", "x", "1,5", ".", "\u0662", "nan", "inf"]
)
@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_a_bad_strength_in_a_spec_is_quoted(name, number):
    with pytest.raises(ConfigError, match="augment ") as caught:
        make_augment(f"flip,{name}:{number}")
    if number != "1,5":
        assert str(caught.value) == f"augment {name} must be a number in 0..4, not {number!r}"


@pytest.mark.parametrize("spec", ["flip,altflip", "altflip,crop:2,flip"])
@pytest.mark.parametrize("function", [make_augment, parse_augment])
def test_one_kind_of_flip_only(function, spec):
    with pytest.raises(ConfigError, match="must have flip or altflip, not both as ") as caught:
        function(spec)
    assert repr(spec) in str(caught.value)


# --------------------------------------------------------------------------- crop, cutout and all


def test_the_speed_recipes_crop_and_cutout():
    images = numbered(3000, 32, 32)
    cropped = make_augment("crop:2")(images, SEED).numpy()
    assert set(which(windows(images[0], 2), cropped)) == set(range(25))
    painted = make_augment("cutout:12")(np.zeros((500, 32, 32, 3), np.uint8), SEED).numpy()
    area = (painted[..., 0] == 128).sum(axis=(1, 2))
    assert area.max() == 144
    assert 36 <= area.min() < 144


def test_crop_pads_by_four_unless_told_otherwise():
    images = numbered(3000, 12, 10)
    default = random_crop(images, SEED).numpy()
    np.testing.assert_array_equal(default, random_crop(images, SEED, padding=4).numpy())
    assert set(which(windows(images[0], 4), default)) == set(range(81))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_cutout_paints_one_square_around_any_pixel(size):
    height, width = 7, 5
    images = numbered(3000, height, width, 2)
    result = cutout(images, SEED, size=size, fill=0).numpy()
    centres = [(r, c) for r in range(height) for c in range(width)]
    squares = [paint(images[0], r, c, size, 0) for r, c in centres]
    # Near the edge, different centres may leave the same pixels painted.
    distinct, kind = np.unique(squares, axis=0, return_inverse=True)
    found = np.bincount(which(distinct, result), minlength=len(distinct)) / len(images)
    share = np.bincount(kind.ravel()) / len(centres)
    np.testing.assert_allclose(found, share, atol=5 * np.sqrt(share.max() / len(images)))
    assert (found > 0).all()
    if size == 1:
        assert_uniform(which(squares, result), len(centres))


def test_cutout_paints_eight_pixels_grey_unless_told_otherwise():
    images = np.zeros((500, 32, 32, 3), np.uint8)
    painted = cutout(images, SEED).numpy()
    assert set(np.unique(painted)) == {0, 128}
    area = (painted[..., 0] == 128).sum(axis=(1, 2))
    assert area.max() == 64  # wholly inside
    assert 16 <= area.min() < 64  # cut off at an edge or a corner
    np.testing.assert_array_equal(painted, cutout(images, SEED, size=8, fill=128).numpy())


def test_cutout_fills_float_images_on_their_own_scale():
    images = np.zeros((2, 4, 4, 1), np.float32)
    assert cutout(images, SEED, size=4, fill=0.25).numpy().max() == 0.25


# --------------------------------------------------------------------------------------- erasing


def erased(images, result):
    """Of each image that is painted: (top, left, height, width, painted pixels)."""
    found = []
    for before, after in zip(images, result, strict=True):
        rows, columns = np.nonzero((before != after).any(axis=2))
        if len(rows):
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            found.append((rows.min(), columns.min(), height, width, len(rows)))
    return np.array(found)


def test_erasing_paints_whole_rectangles_of_the_sources_areas_and_ratios():
    # 256 is no byte: each painted pixel differs.
    images = np.full((4000, 32, 32, 3), 256, np.int32)
    result = random_erasing(images, SEED, probability=1).numpy()
    top, left, height, width, painted = erased(images, result).T
    assert len(top) == 4000
    np.testing.assert_array_equal(height * width, painted)
    share, ratio = painted / 1024, height / width
    # Sides are whole: a little beyond the bounds and off the mean of the areas.
    assert 0.015 < share.min() < 0.025
    assert 0.3 < share.max() < 0.36
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.01
    assert 0.25 < ratio.min() < 0.35
    assert 2.9 < ratio.max() < 3.7
    assert abs(np.log(ratio).mean() - np.log(0.3 * 3.3) / 2) < 0.05
    # Every place that it fits into is as likely, which shows where their number divides by four.
    rows, columns = 33 - height, 33 - width
    even = (rows % 4 == 0) & (columns % 4 == 0)
    assert even.sum() > 150
    assert_uniform((top * 4 // rows * 4 + left * 4 // columns)[even], 16)


@pytest.mark.parametrize("probability", [0, 0.25, 0.7])
def test_erasing_paints_a_share_of_the_images_with_fair_bytes(probability):
    images = np.full((3000, 8, 8, 1), 256, np.int32)
    result = random_erasing(images, SEED, probability=probability).numpy()
    painted = (result != images).any(axis=(1, 2, 3)).mean()
    assert abs(painted - probability) < 5 * np.sqrt(0.25 / 3000) * bool(probability) + 1e-9
    noise = result[result != images]
    if probability:
        assert_uniform(noise.ravel(), 256)


def test_erasing_fits_any_image_and_refuses_no_probability():
    for height, width in ((1, 1), (1, 9), (3, 2)):
        images = np.full((50, height, width, 1), 256, np.int32)
        result = random_erasing(images, SEED, probability=1).numpy()
        assert (result != images).any(axis=(1, 2, 3)).all()
    images = random_images(64)
    np.testing.assert_array_equal(
        random_erasing(images, SEED), random_erasing(images, SEED, probability=0.25)
    )
    for bad in (-0.1, 1.1, "1", None, float("nan")):
        with pytest.raises(ConfigError, match="erase probability must be a finite number"):
            random_erasing(images, SEED, probability=bad)


def test_the_new_parts_come_in_their_order(some_images):
    images = some_images[0][:64]
    spec = "erase:0.5,cutout:4,randaugment:3x12,crop:2,flip"
    expected = random_crop(random_flip(images, SEED), SEED, padding=2)
    expected = rand_augment(expected, SEED, ops=3, magnitude=12)
    expected = random_erasing(cutout(expected, SEED, size=4), SEED, probability=0.5)
    np.testing.assert_array_equal(make_augment(spec)(images, SEED), expected)
    for name, function in (("saturation", random_saturation), ("hue", random_hue)):
        found = make_augment(f"{name}:0.3,flip")(images, SEED)
        assert found.dtype == tf.float32
        rounded = np.floor(np.clip(found.numpy(), 0, 255) + 0.5)
        np.testing.assert_array_equal(
            rounded, function(random_flip(images, SEED), SEED, strength=0.3)
        )


def test_color_and_light_together_are_the_same_by_xla_but_for_the_last_digit(some_images):
    images, seed = tf.constant(some_images[0][:64]), tf.constant(SEED, tf.int64)
    augment = make_augment("saturation,hue,brightness:0.3,contrast:0.5")
    compiled = tf.function(augment, jit_compile=True)(images, seed)
    np.testing.assert_allclose(compiled, augment(images, seed), rtol=1e-6, atol=1e-4)


def test_flip_crop_and_cutout_draw_independently():
    images = numbered(4000, 6, 6)
    flipped = random_flip(images, SEED).numpy()[:, 0, 0, 0] != 1
    corner = which(windows(images[0], 1), random_crop(images, SEED, padding=1).numpy())
    assert_uniform(corner * 2 + flipped, 18)
    point = which(
        [paint(images[0], r, c, 1, 0) for r in range(6) for c in range(6)],
        cutout(images, SEED, size=1, fill=0).numpy(),
    )
    # Row and column of a square image, from one draw for both, would stay on the diagonal.
    assert_uniform(point, 36)
    assert_uniform(point // 6 * 2 + flipped, 12)
    assert_uniform(point % 6 * 9 + corner, 54)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        (SPEC, ["flip", "crop", "cutout"]),
        ("cutout:8,crop:4,flip", ["flip", "crop", "cutout"]),
        (" flip , crop ", ["flip", "crop"]),
        ("crop", ["crop"]),
        ("flip", ["flip"]),
        ("cutout", ["cutout"]),
        ("flip,cutout", ["flip", "cutout"]),
        ("crop,cutout", ["crop", "cutout"]),
    ],
)
def test_make_augment_equals_its_parts_one_after_another(spec, steps, some_images):
    parts = {"flip": random_flip, "crop": random_crop, "cutout": cutout}
    images = some_images[0][:256]
    expected = images
    for step in steps:
        expected = parts[step](expected, SEED)
    result = make_augment(spec)(images, SEED)
    np.testing.assert_array_equal(result, expected)
    assert (result.numpy() != images).any()


def test_make_augment_passes_its_numbers_on():
    images = random_images(64)
    expected = cutout(random_crop(images, SEED, padding=1), SEED, size=20)
    np.testing.assert_array_equal(make_augment("crop:1,cutout:20")(images, SEED), expected)


@pytest.mark.parametrize("spec", ["", "none", "  ", " none "])
def test_no_augmentation_is_none(spec):
    assert make_augment(spec) is None
    assert parse_augment(spec) == {}


@each_function
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name):
    images = random_images(128, 8, 8)
    function = FUNCTIONS[name]
    first = function(images, SEED).numpy()
    np.testing.assert_array_equal(function(images, tf.constant(SEED, tf.int64)), first)
    for other in [(SEED[0] + 1, SEED[1]), (SEED[0], SEED[1] + 1), SEED[::-1]]:
        assert (function(images, other).numpy() != first).any()


@pytest.mark.parametrize("seed", [(0, 0), (2**31 - 1, 2**62)])
def test_seeds_at_the_ends_of_their_range_work(seed):
    images = numbered(2000, 5, 5)
    corner = which(windows(images[0], 1), random_crop(images, seed, padding=1).numpy())
    assert_uniform(corner, 9)


@each_function
def test_the_input_is_not_modified(name):
    images = random_images(16, 8, 8)
    before = images.copy()
    FUNCTIONS[name](images, SEED)
    np.testing.assert_array_equal(images, before)


@each_function
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float32])
def test_every_dtype_is_kept_and_gets_the_same_draws(name, dtype):
    images = random_images(32, 7, 9)
    result = FUNCTIONS[name](images.astype(dtype), SEED)
    assert result.dtype == dtype
    assert result.shape == images.shape
    np.testing.assert_array_equal(result.numpy().astype(np.uint8), FUNCTIONS[name](images, SEED))


@each_function
def test_unknown_batch_size_and_a_smaller_last_batch(name):
    function = FUNCTIONS[name]
    signature = [tf.TensorSpec([None, 7, 9, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    graph = tf.function(function, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 7, 9, 3]
    for count in (5, 2, 1, 0):
        images = random_images(count, 7, 9)
        seed = tf.constant(SEED, tf.int64)
        np.testing.assert_array_equal(graph(images, seed), function(images, seed))


@each_function
def test_xla_gives_the_same_bytes(name):
    images = tf.constant(random_images(8, 7, 9))
    seed = tf.constant(SEED, tf.int64)
    compiled = tf.function(FUNCTIONS[name], jit_compile=True)
    np.testing.assert_array_equal(compiled(images, seed), FUNCTIONS[name](images, seed))


def test_parallel_maps_are_deterministic():
    images = random_images(16, 8, 8)
    augment = FUNCTIONS["all"]
    dataset = tf.data.Dataset.range(40).map(
        lambda step: augment(tf.constant(images), tf.stack([tf.constant(7, tf.int64), step])),
        num_parallel_calls=8,
    )
    assert dataset.element_spec.shape.as_list() == [16, 8, 8, 3]
    for step, result in enumerate(dataset):
        np.testing.assert_array_equal(result, augment(images, (7, step)))


sides = st.integers(3, 10)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 4),
    sides,
    sides,
    st.integers(1, 4),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**40),
    st.data(),
)
def test_any_shape_any_number(count, height, width, channels, seed, step, data):
    shape = count, height, width, channels
    padding = data.draw(st.integers(1, min(height, width) - 1))
    size = data.draw(st.integers(1, min(height, width)))
    images = numbered(*shape)
    cropped = random_crop(images, (seed, step), padding=padding).numpy()
    for before, after in zip(images, cropped, strict=True):
        assert any((after == window).all() for window in windows(before, padding))
    painted = cutout(images, (seed, step), size=size, fill=0).numpy()
    for result in painted:
        rows, columns = np.nonzero((result == 0).all(axis=2))
        assert (result == 0).sum() == len(rows) * channels
        # One filled rectangle, at most `size` a side and at least what a corner leaves.
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert tall * wide == len(rows)
        assert size - size // 2 <= tall <= size
        assert size - size // 2 <= wide <= size
    fused = make_augment(f"flip,crop:{padding},cutout:{size}")(images, (seed, step))
    expected = random_crop(random_flip(images, (seed, step)), (seed, step), padding=padding)
    np.testing.assert_array_equal(fused, cutout(expected, (seed, step), size=size))
    assert fused.shape == shape


@settings(deadline=None, max_examples=100)
@given(
    st.permutations(["flip", "crop", "cutout"]),
    st.integers(0, 3),
    st.integers(1, 10**6),
    st.sampled_from(["", " ", "  "]),
)
def test_parse_reads_back_what_is_written(names, count, number, space):
    names = names[:count]
    expected = {name: 1 if name == "flip" else number for name in names}
    parts = [name if name == "flip" else f"{name}:{number}" for name in names]
    assert parse_augment(f"{space},{space}".join(parts)) == expected


def test_parse_fills_in_the_defaults():
    assert parse_augment("flip,crop,cutout") == {"flip": 1, "crop": 4, "cutout": 8}
    light = parse_augment("altflip,brightness,contrast")
    assert light == {"altflip": 1, "brightness": 0.14, "contrast": 0.13}
    numbers = parse_augment("crop:2,brightness:0,contrast:.5")
    assert numbers == {"crop": 2, "brightness": 0.0, "contrast": 0.5}
    assert [type(number) for number in numbers.values()] == [int, float, float]
    assert parse_augment(",".join(name for name in PARTS if name != "flip")) == {
        "altflip": 1,
        "crop": 4,
        "randaugment": (2, 9),
        "saturation": 0.4,
        "hue": 0.1,
        "brightness": 0.14,
        "contrast": 0.13,
        "cutout": 8,
        "erase": 0.25,
        "mixup": 0.2,
        "cutmix": 1.0,
    }
    for text, expected in (("5", (2, 5)), ("0", (2, 0)), ("3x30", (3, 30)), ("10x1", (10, 1))):
        assert parse_augment(f"randaugment:{text}") == {"randaugment": expected}


@pytest.mark.parametrize(
    ("part", "line"),
    [
        *(
            (f"randaugment:{text}", "must be a magnitude in 0..30, or with a number of operations")
            for text in ("", "31", "-1", "1.5", "x", "x9", "0x9", "11x9", "2x", "2x31", "2x9x1")
        ),
        ("saturation:1.1", "must be a number in 0..1, not '1.1'"),
        ("hue:.6", "must be a number in 0..0.5, not '.6'"),
        ("erase:2", "must be a number in 0..1, not '2'"),
        ("mixup:10.5", "must be a number in 0..10, not '10.5'"),
        ("cutmix:", "must be a number in 0..10, not ''"),
    ],
)
def test_a_number_that_a_part_cannot_have_is_quoted(part, line):
    name, _, number = part.partition(":")
    with pytest.raises(ConfigError, match=f"augment {name} {line}") as caught:
        make_augment(f"flip,{part}")
    assert repr(number) in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet="flipcrotubghnesa:,0123.- ", max_size=20))
def test_parse_takes_any_text_or_raises_a_config_error(text):
    try:
        parts = parse_augment(text)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert set(parts) <= set(PARTS)
        assert all(np.min(number) >= 0 for number in parts.values())


@pytest.mark.parametrize(
    "spec",
    [
        "flop",
        "Flip",
        "flip,",
        ",",
        "flip,flip",
        "crop:4,crop:4",
        "none,flip",
        "flip:1",
        "altflip:1",
        "altflip,altflip",
        "contrast,contrast:1",
        "Brightness",
        "flip;crop",
        None,
        5,
        ["flip"],
    ],
)
@pytest.mark.parametrize("function", [make_augment, parse_augment])
def test_a_bad_spec_is_quoted(function, spec):
    with pytest.raises(ConfigError, match="augment must be parts of") as caught:
        function(spec)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize(
    "number", ["", "0", "-1", "+1", " 3", "2.5", "x", "\u0662", "\u00b2", "nan"]
)
@pytest.mark.parametrize("name", ["crop", "cutout"])
def test_a_bad_number_in_a_spec_is_quoted(name, number):
    with pytest.raises(ConfigError, match=f"augment {name} must be a whole number >= 1") as caught:
        make_augment(f"flip,{name}:{number}")
    assert repr(number) in str(caught.value)


@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", None, True])
def test_padding_and_size_must_be_whole_numbers(bad):
    images = random_images(2, 8, 8)
    with pytest.raises(ConfigError, match=f"crop padding .* not {bad!r}"):
        random_crop(images, SEED, padding=bad)
    with pytest.raises(ConfigError, match=f"cutout size .* not {bad!r}"):
        cutout(images, SEED, size=bad)


def test_padding_and_size_must_fit_the_smaller_side():
    images = random_images(2, 9, 6)
    assert random_crop(images, SEED, padding=5).shape == images.shape
    assert cutout(images, SEED, size=6).shape == images.shape
    for call in (functools.partial(random_crop, padding=6), make_augment("flip,crop:6")):
        with pytest.raises(ConfigError, match="smaller than the image side 6, not 6"):
            call(images, SEED)
    for call in (functools.partial(cutout, size=7), make_augment("cutout:7")):
        with pytest.raises(ConfigError, match="at most the image side 6, not 7"):
            call(images, SEED)


@pytest.mark.parametrize("fill", [-1, 256, 0.5, float("nan")])
def test_a_fill_that_the_images_cannot_hold_is_an_error(fill):
    with pytest.raises(ConfigError, match=rf"whole number in 0\.\.255 .* not {fill!r}"):
        cutout(random_images(2), SEED, fill=fill)


@each_function
@pytest.mark.parametrize("shape", [(8, 8, 3), (2, 8), (1, 2, 8, 8, 3)])
def test_images_must_have_four_dimensions(name, shape):
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\]"):
        FUNCTIONS[name](np.zeros(shape, np.uint8), SEED)


@each_function
@pytest.mark.parametrize("shape", [None, [2, None, 8, 3], [2, 8, 8, None]])
def test_the_sides_must_be_known(name, shape):
    images = tf.TensorSpec(shape, tf.uint8)
    with pytest.raises(DataError, match="known height, width and channels"):
        FUNCTIONS[name](images, SEED)
