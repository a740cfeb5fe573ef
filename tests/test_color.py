"""Saturation and hue against exact arithmetic and the standard library's HSV."""

import colorsys
from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.color import random_hue, random_saturation, recolor
from cifarflow.data.draws import HUE, SATURATION, draw
from cifarflow.errors import ConfigError, DataError

SEED = (3, 17)
FUNCTIONS = {"saturation": random_saturation, "hue": random_hue}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def drawn(stream, seed, count, most):
    return draw(tf.constant(seed, tf.int64), stream, [count, 1], 2 * most + 1).numpy()[:, 0] - most


def saturated(pixel, factor):
    """In exact fractions, rounded half up."""
    red, green, blue = map(int, pixel)
    grey = (77 * red + 150 * green + 29 * blue + 128) // 256
    values = [grey + factor * (value - grey) for value in (red, green, blue)]
    return [min(max((2 * v + 1) // 2, 0), 255) for v in values]


def turned(pixel, turn):
    hue, saturation, value = colorsys.rgb_to_hsv(*(int(v) / 255 for v in pixel))
    return np.array(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)) * 255


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=6),
    st.integers(0, 2**31 - 1),
    st.integers(0, 100),
)
def test_colours_are_those_of_plain_arithmetic(pixels, seed, percent):
    images = np.array(pixels, np.uint8)[:, None, None, :]
    strength = percent / 100
    changes = drawn(SATURATION, (seed, 5), len(pixels), round(strength * 256))
    found = random_saturation(images, (seed, 5), strength=strength).numpy()[:, 0, 0]
    expected = [
        saturated(p, 1 + Fraction(int(c), 256)) for p, c in zip(pixels, changes, strict=True)
    ]
    np.testing.assert_array_equal(found, expected)

    turns = drawn(HUE, (seed, 5), len(pixels), round(strength / 2 * 384)) / 384
    found = recolor(images, (seed, 5), hue=strength / 2, rounded=False).numpy()[:, 0, 0]
    expected = [turned(p, t) for p, t in zip(pixels, turns, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # Both together: what is stretched, turned.
    both = recolor(images, (seed, 5), hue=strength / 2, saturation=strength, rounded=False)
    grey = np.floor(images[:, 0, 0] @ np.array([77, 150, 29]) / 256 + 0.5)[:, None]
    np.testing.assert_array_equal(
        both.numpy()[:, 0, 0], grey + (1 + changes[:, None] / 256) * (found - grey)
    )


def test_real_images_turn_and_pale(some_images):
    images = some_images[0][:200]
    turns = drawn(HUE, SEED, 200, round(0.1 * 384)) / 384
    found = random_hue(images, SEED).numpy()
    np.testing.assert_array_equal(found.max(axis=3), images.max(axis=3))
    np.testing.assert_array_equal(found.min(axis=3), images.min(axis=3))
    for place in (0, 7, 199):
        expected = turned(images[place, 9, 5], turns[place])
        assert np.abs(found[place, 9, 5] - expected).max() <= 0.5 + 1e-6
    assert np.abs(turns).max() <= 0.1
    assert len(np.unique(turns)) > 50
    pale = random_saturation(images, SEED, strength=1).numpy()
    factor = 1 + drawn(SATURATION, SEED, 200, 256) / 256
    spread = [np.ptp(pale[i].astype(int), axis=2).mean() for i in np.argsort(factor)]
    assert np.mean(spread[:4]) < 2 < 20 < np.mean(spread[-20:])
    default = random_saturation(images, SEED).numpy()
    np.testing.assert_array_equal(default, random_saturation(images, SEED, strength=0.4))


@each_function
def test_pure_and_the_same_in_every_way(name, some_images):
    function, images = FUNCTIONS[name], tf.constant(some_images[0][:32])
    seed = tf.constant(SEED, tf.int64)
    first = function(images, seed).numpy()
    np.testing.assert_array_equal(tf.function(function, jit_compile=True)(images, seed), first)
    signature = [tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([2], tf.int64)]
    graph = tf.function(function, input_signature=signature)
    assert graph.get_concrete_function().structured_outputs.shape.as_list() == [None, 32, 32, 3]
    for count in (32, 0):
        np.testing.assert_array_equal(graph(images[:count], seed), function(images[:count], seed))
    for other in ((4, 17), (3, 18)):
        assert (function(images, other).numpy() != first).any()
    for dtype in (tf.int32, tf.float16, tf.float32, tf.float64):
        found = function(tf.cast(images, dtype), seed)
        assert found.dtype == dtype
        # The grey of numbers that are not whole is not rounded, and nothing is clipped.
        assert np.abs(np.clip(found.numpy().astype(float), 0, 255) - first).max() < 1.2
    np.testing.assert_array_equal(function(images, seed, strength=0), images)


@each_function
def test_bad_input(name, some_images):
    function, images = FUNCTIONS[name], some_images[0][:2]
    for bad in (-0.1, 1.1, "0.1", None, float("nan")):
        with pytest.raises(ConfigError, match=f"{name} strength must be .* not {bad!r}"):
            function(images, SEED, strength=bad)
    with pytest.raises(ConfigError, match="need images of 3 channels, red, green and blue, not 1"):
        function(images[..., :1], SEED)
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\]"):
        function(images[0], SEED)
