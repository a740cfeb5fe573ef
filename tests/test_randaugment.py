"""RandAugment against a plain reference that works image by image, operation by operation."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data import randaugment
from cifarflow.data.draws import RANDAUGMENT, draw
from cifarflow.data.randaugment import OPERATIONS, rand_augment
from cifarflow.errors import ConfigError, DataError

SEED = (3, 17)
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def operate(images, name, side, magnitude):
    """One operation on all images, by the function under test."""
    drawn = tf.fill([len(images)], 2 * OPERATIONS.index(name) + side)
    return randaugment._operate(tf.constant(images), drawn, magnitude).numpy()


# --- the reference, one image at a time


def rounded(value):
    return np.clip(np.floor(value + 0.5), 0, 255).astype(np.uint8)


def grey_of(image):
    if image.shape[2] == 1:
        return image.astype(float)
    grey = np.floor(image.astype(float) @ [77, 150, 29] / 256 + 0.5)
    return np.repeat(grey[:, :, None], 3, axis=2)


def smooth_of(image):
    result = image.astype(float)
    for row in range(1, image.shape[0] - 1):
        for column in range(1, image.shape[1] - 1):
            near = image[row - 1 : row + 2, column - 1 : column + 2].astype(float)
            total = near.sum(axis=(0, 1)) + 4 * near[1, 1]
            result[row, column] = np.floor(total / 13 + 0.5)
    return result


def moved(image, source):
    """`source` of a place relative to the middle is the place it comes from."""
    height, width = image.shape[:2]
    result = np.full_like(image, 128)
    for row in range(height):
        for column in range(width):
            y, x = source(row - (height - 1) / 2, column - (width - 1) / 2)
            y = math.floor(round(y + (height - 1) / 2, 9) + 0.5)
            x = math.floor(round(x + (width - 1) / 2, 9) + 0.5)
            if 0 <= y < height and 0 <= x < width:
                result[row, column] = image[y, x]
    return result


def autocontrasted(channel):
    low, high = int(channel.min()), int(channel.max())
    return channel if low == high else rounded((channel.astype(float) - low) * 255 / (high - low))


def equalized(channel):
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (counts.sum() - counts[channel.max()]) // 255
    if not step:
        return channel
    below = [int(counts[:value].sum()) for value in range(256)]
    return np.minimum([(n + step // 2) // step for n in below], 255).astype(np.uint8)[channel]


def reference(image, name, side, magnitude):
    height, width = image.shape[:2]
    share = (-1 if side else 1) * magnitude / 30
    factor = round((1 + 0.9 * share) * 4096) / 4096
    values = image.astype(float)
    if name == "identity":
        return image
    if name in ("autocontrast", "equalize"):
        one = autocontrasted if name == "autocontrast" else equalized
        return np.stack([one(image[:, :, c]) for c in range(image.shape[2])], axis=2)
    if name == "rotate":
        cos, sin = math.cos(share * math.pi / 6), math.sin(share * math.pi / 6)
        return moved(image, lambda y, x: (cos * y + sin * x, cos * x - sin * y))
    if name == "shear_x":
        return moved(image, lambda y, x: (y, x + share * 0.3 * y))
    if name == "shear_y":
        return moved(image, lambda y, x: (y + share * 0.3 * x, x))
    if name == "translate_x":
        return moved(image, lambda y, x: (y, x + round(share * 0.45 * width)))
    if name == "translate_y":
        return moved(image, lambda y, x: (y + round(share * 0.45 * height), x))
    if name == "solarize":
        return np.where(image >= 256 - round(256 * magnitude / 30), 255 - image, image)
    if name == "posterize":
        kept = 8 - round(4 * magnitude / 30)
        return image & np.uint8(256 - 2 ** (8 - kept))
    if name == "brightness":
        return rounded(values * factor)
    if name == "contrast":
        mean = image.astype(int).sum(axis=(0, 1))
        weights = [256] if len(mean) == 1 else [77, 150, 29]
        plain = math.floor(
            sum(m * w for m, w in zip(mean, weights, strict=True)) / 256 / height / width + 0.5
        )
    else:
        plain = grey_of(image) if name == "color" else smooth_of(image)
    return rounded(plain + factor * (values - plain))


@each_operation
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_each_operation_on_real_images(name, magnitude, some_images):
    images = some_images[0][:6]
    for side in (0, 1):
        found = operate(images, name, side, magnitude)
        for image, ours in zip(images, found, strict=True):
            np.testing.assert_array_equal(ours, reference(image, name, side, magnitude))
    if magnitude == 0 and name not in ("autocontrast", "equalize"):
        np.testing.assert_array_equal(found, images)
    if magnitude == 30 and name != "identity":
        assert (found != images).any()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(OPERATIONS),
    st.integers(0, 1),
    st.integers(0, 30),
    st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.sampled_from([1, 3])),
    st.integers(0, 2**16),
    st.integers(1, 256),
)
def test_each_operation_on_any_image(name, side, magnitude, shape, seed, values):
    # Few values or many, so that a channel may have one alone.
    images = np.random.default_rng(seed).integers(0, values, shape).astype(np.uint8)
    found = operate(images, name, side, magnitude)
    for image, ours in zip(images, found, strict=True):
        np.testing.assert_array_equal(ours, reference(image, name, side, magnitude))


@pytest.mark.parametrize("ops", [1, 2, 3])
def test_each_image_gets_the_operations_that_are_drawn_one_after_another(ops, some_images):
    images = some_images[0][:24]
    drawn = draw(SEED, RANDAUGMENT, [24, ops], 28).numpy()
    found = rand_augment(images, SEED, magnitude=14, ops=ops).numpy()
    for image, numbers, ours in zip(images, drawn, found, strict=True):
        for number in numbers:
            image = reference(image, OPERATIONS[number // 2], number % 2, 14)
        np.testing.assert_array_equal(ours, image)


def test_every_operation_and_side_is_as_likely():
    drawn = draw(SEED, RANDAUGMENT, [14_000, 2], 28).numpy()
    for column in drawn.T:
        counts = np.bincount(column, minlength=28)
        assert ((counts - 500) ** 2 / 500).sum() < 27 + 5 * np.sqrt(54)
    pairs = np.bincount(drawn[:, 0] // 2 * 14 + drawn[:, 1] // 2, minlength=196)
    expected = 14_000 / 196
    assert ((pairs - expected) ** 2 / expected).sum() < 195 + 5 * np.sqrt(390)


def test_two_operations_of_magnitude_nine_unless_told_otherwise(some_images):
    images = some_images[0][:32]
    expected = rand_augment(images, SEED, magnitude=9, ops=2)
    np.testing.assert_array_equal(rand_augment(images, SEED), expected)


def test_pure_and_the_same_in_every_way(some_images):
    images, seed = tf.constant(some_images[0][:32]), tf.constant(SEED, tf.int64)
    first = rand_augment(images, seed).numpy()
    assert first.dtype == np.uint8
    assert (first != images.numpy()).any(axis=(1, 2, 3)).mean() > 0.8
    compiled = tf.function(rand_augment, jit_compile=True)
    np.testing.assert_array_equal(compiled(images, seed), first)
    signature = [tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    graph = tf.function(rand_augment, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 32, 32, 3]
    for count in (32, 1, 0):
        found = graph(images[:count], seed)
        np.testing.assert_array_equal(found, rand_augment(images[:count], seed))
    np.testing.assert_array_equal(rand_augment(images, SEED), first)
    for other in ((4, 17), (3, 18)):
        assert (rand_augment(images, other).numpy() != first).any()


@pytest.mark.parametrize("bad", [-1, 31, 2.5, "9", None, True])
def test_a_bad_magnitude(bad):
    with pytest.raises(ConfigError, match=f"randaugment magnitude must be .* not {bad!r}"):
        rand_augment(np.zeros((1, 4, 4, 3), np.uint8), SEED, magnitude=bad)


@pytest.mark.parametrize("bad", [0, 11, 2.5, "2", None])
def test_a_bad_number_of_operations(bad):
    with pytest.raises(ConfigError, match=f"randaugment ops must be .* not {bad!r}"):
        rand_augment(np.zeros((1, 4, 4, 3), np.uint8), SEED, ops=bad)


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (
            np.zeros((1, 4, 4, 3), np.float32),
            "must be uint8 of 1 or 3 channels .* not float32 of 3",
        ),
        (np.zeros((1, 4, 4, 2), np.uint8), "must be uint8 of 1 or 3 channels .* not uint8 of 2"),
        (np.zeros((4, 4, 3), np.uint8), r"images must be \[B, H, W, C\]"),
    ],
)
def test_bad_images(images, line):
    with pytest.raises(DataError, match=line):
        rand_augment(images, SEED)


def test_a_list_is_no_batch_of_images():
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\] with known height"):
        rand_augment([1, 2], [0, 0])
