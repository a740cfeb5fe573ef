"""A model's outputs for arrays of images, against Keras's own."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.predict import predict, softmax
from cifarflow.models.cnn import cnn


@pytest.fixture(scope="module")
def model():
    """A small model whose dropout and BatchNorm behave differently in training."""
    options = {"filters": (4,), "dense_units": 8, "dropout": 0.5, "batch_norm_momentum": 0.5}
    return cnn(**options, seed=0)


@pytest.fixture(scope="module")
def expected(model, some_images):
    return model.predict(some_images[0][:100].astype(np.float32), verbose=0)


@pytest.mark.parametrize("batch_size", [1, 7, 25, 99, 100, 101, np.int64(50)])
def test_outputs_equal_keras_predict_whether_or_not_the_sizes_divide(
    batch_size, model, some_images, expected
):
    count = 5 if batch_size == 1 else 100
    outputs = predict(model, some_images[0][:count], batch_size=batch_size)
    assert outputs.shape == (count, 10)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, expected[:count], atol=1e-5)


def test_the_default_batch_size_covers_more_than_one_batch(model, some_images):
    images = some_images[0][:1234]
    outputs = predict(model, images)
    np.testing.assert_allclose(outputs[1000:], predict(model, images[1000:]), atol=1e-5)
    np.testing.assert_array_equal(outputs, predict(model, images))


def test_outputs_are_float32_under_mixed_precision(some_images):
    half = cnn(filters=(4,), dense_units=8, dtype_policy="mixed_bfloat16", seed=0)
    images = some_images[0][:30]
    outputs = predict(half, images, batch_size=20)
    assert outputs.dtype == np.float32
    full = cnn(filters=(4,), dense_units=8, seed=0)
    np.testing.assert_allclose(outputs, predict(full, images), atol=0.1)


def test_the_model_and_the_images_stay_as_they_were(model, some_images):
    weights = model.get_weights()
    images = some_images[0][:10].copy()
    predict(model, images)
    np.testing.assert_array_equal(images, some_images[0][:10])
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_model_for_any_size_takes_any_size():
    inputs = keras.Input((None, None, 3))
    average = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs))
    images = np.full((3, 5, 7, 3), 9, np.uint8)
    np.testing.assert_allclose(predict(average, images), np.full((3, 3), 9))
    with pytest.raises(DataError, match=r"\[N, any, any, 3\] uint8 .* not \[3, 5, 7, 1\]"):
        predict(average, images[..., :1])


def test_a_subclassed_model_works_too():
    class Average(keras.Model):
        def call(self, images, training=False):
            return keras.ops.mean(keras.ops.cast(images, "float32"), axis=(1, 2))

    images = np.full((3, 5, 7, 2), 9, np.uint8)
    np.testing.assert_allclose(predict(Average(), images), np.full((3, 2), 9))
    with pytest.raises(DataError, match=r"\[N, any, any, any\] uint8"):
        predict(Average(), images[0])


@pytest.mark.parametrize("bad", [0, -1, 2.5, "10", None, True])
def test_batch_size_must_be_a_whole_number(bad, model):
    with pytest.raises(ConfigError, match=f"batch_size .* not {bad!r}"):
        predict(model, np.zeros((2, 32, 32, 3), np.uint8), batch_size=bad)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((2, 32, 31, 3), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((2, 3, 32, 32), np.uint8),
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 32, 32, 3), np.int64),
        "images",
        None,
    ],
)
def test_images_must_be_what_the_model_takes(images, model):
    with pytest.raises(DataError) as caught:
        predict(model, images)
    array = np.asarray(images)
    assert str(caught.value) == (
        f"images must be [N, 32, 32, 3] uint8 for this model, not {list(array.shape)} {array.dtype}"
    )


def test_there_must_be_an_image(model):
    with pytest.raises(DataError, match="at least one image, not 0"):
        predict(model, np.zeros((0, 32, 32, 3), np.uint8))


def test_a_model_of_something_else_is_refused():
    vectors = keras.Sequential([keras.Input((12,)), keras.layers.Dense(2)])
    with pytest.raises(DataError, match=r"images must be \[N, 12\] uint8 for this model"):
        predict(vectors, np.zeros((2, 2, 2, 3), np.uint8))


@settings(deadline=None, max_examples=100)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_softmax_is_a_distribution_for_any_finite_logits(logits):
    probabilities = softmax(logits)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == logits.shape
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    reference = [[1 / sum(_exp(other - mine) for other in row) for mine in row] for row in logits]
    np.testing.assert_allclose(probabilities, reference, atol=1e-6)


def _exp(difference):
    """exp, with infinity where it is too large."""
    return np.exp(np.float64(difference)) if difference < 700 else np.inf


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_softmax_of_a_known_row_in_any_dtype(dtype):
    logits = np.array([[0, 1, 2], [100, 100, 0]], dtype)
    total = 1 + np.e + np.e**2
    expected = [[1 / total, np.e / total, np.e**2 / total], [0.5, 0.5, 0]]
    result = softmax(logits)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_softmax_of_large_logits_neither_overflows_nor_warns():
    np.testing.assert_array_equal(
        softmax(np.array([[1e4, -1e4, 0], [-1e4, -1e4, -2e4]])), [[1, 0, 0], [0.5, 0.5, 0]]
    )


def test_softmax_equals_the_models_own(some_images):
    options = {"filters": (4,), "dense_units": 8, "seed": 0}
    images = some_images[0][:50]
    np.testing.assert_allclose(
        softmax(predict(cnn(**options), images)),
        predict(cnn(softmax=True, **options), images),
        atol=1e-6,
    )
