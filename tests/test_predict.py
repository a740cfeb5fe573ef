"""A model's outputs for arrays of images, against Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.predict import Predictor, predict, softmax
from cifarflow.models.cnn import cnn

L = keras.layers


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


@pytest.mark.parametrize(("tta", "share"), [("none", 1.0), ("mirror", 1.0), ("multicrop", 0.4)])
def test_outputs_without_and_with_other_views_at_once(tta, share, model, some_images):
    images = some_images[0][:30]
    plain, mean = Predictor(model, tta=tta, tta_share=share).plain_and_mean(images)
    np.testing.assert_array_equal(plain, predict(model, images))
    np.testing.assert_array_equal(mean, predict(model, images, tta=tta, tta_share=share))
    assert plain is not mean


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


def views_of(images, tta):
    """The views [N, H, W, C] and their weights, pixel by pixel."""
    height, width = images.shape[1:3]
    around = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], "reflect")
    shifts = {"none": [], "mirror": [(1.0, 1)], "multicrop": [(0.5, 1), (0.25, 0), (0.25, 2)]}[tta]
    for weight, corner in shifts:
        crop = around[:, corner : corner + height, corner : corner + width]
        yield weight / 2, crop
        yield weight / 2, crop[:, :, ::-1]
    if tta == "none":
        yield 1.0, images


def mean_of_views(model, images, tta):
    return sum(weight * keras_outputs(model, view) for weight, view in views_of(images, tta))


def keras_outputs(model, images):
    return model.predict(images.astype(np.float32), verbose=0)


@pytest.fixture(scope="module")
def wide():
    """A model that minds where things are, of images that are not square, without a dense layer."""
    inputs = keras.Input((6, 9, 3))
    x = L.Conv2D(8, 3, activation="gelu", kernel_initializer=keras.initializers.HeNormal(0))(
        L.Rescaling(1 / 128, -1)(inputs)
    )
    return keras.Model(
        inputs, L.Dense(4, kernel_initializer=keras.initializers.HeNormal(1))(L.Flatten()(x))
    )


@pytest.fixture(scope="module")
def wide_images():
    return np.random.default_rng(0).integers(0, 256, (23, 6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("tta", ["none", "mirror", "multicrop"])
@pytest.mark.parametrize("batch_size", [5, 23, 500])
def test_outputs_are_the_weighted_mean_over_the_views(tta, batch_size, wide, wide_images):
    outputs = predict(wide, wide_images, batch_size=batch_size, tta=tta)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, mean_of_views(wide, wide_images, tta), atol=2e-5)
    others = {"none", "mirror", "multicrop"} - {tta}
    for other in others:
        assert np.abs(outputs - mean_of_views(wide, wide_images, other)).max() > 0.01


def test_views_of_real_images(model, some_images):
    images = some_images[0][:40]
    outputs = predict(model, images, tta="multicrop", batch_size=16)
    np.testing.assert_allclose(outputs, mean_of_views(model, images, "multicrop"), atol=1e-5)


@pytest.mark.parametrize("tta", ["none", "mirror", "multicrop"])
def test_by_xla_the_outputs_are_the_same(tta, model, some_images):
    options = {"batch_size": 16, "tta": tta, "tta_share": 0.3}
    plain, by_xla = (
        predict(model, some_images[0][:50], **options, jit_compile=jit) for jit in (False, True)
    )
    np.testing.assert_allclose(by_xla, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", ["auto", None, 1])
def test_jit_compile_must_be_true_or_false(bad, model):
    with pytest.raises(ConfigError, match=f"jit_compile must be True or False, not {bad!r}"):
        Predictor(model, jit_compile=bad)


@pytest.mark.parametrize("tta", ["mirror", "multicrop"])
@pytest.mark.parametrize(
    ("share", "count"), [(0.25, 6), (0.5, 12), (1e-9, 1), (0.999, 23), (np.float32(0.5), 12)]
)
def test_only_the_least_confident_share_gets_all_views(tta, share, count, wide, wide_images):
    outputs = predict(wide, wide_images, tta=tta, tta_share=share, batch_size=7)
    plain = keras_outputs(wide, wide_images)
    exponentials = np.exp(plain)
    confidence = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)
    unsure = np.argsort(confidence)[:count]
    expected = plain.copy()
    expected[unsure] = mean_of_views(wide, wide_images, tta)[unsure]
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    changed = np.abs(outputs - plain).max(axis=1) > 1e-3
    assert set(np.flatnonzero(changed)) == set(unsure)


def test_of_equally_confident_images_the_first_get_all_views(wide, wide_images):
    images = np.repeat(wide_images[:1], 10, axis=0)
    outputs = predict(wide, images, tta="mirror", tta_share=0.3)
    plain, mean = predict(wide, images[:1])[0], predict(wide, images[:1], tta="mirror")[0]
    assert np.abs(plain - mean).max() > 0.01
    np.testing.assert_allclose(outputs[:3], [mean] * 3, atol=1e-5)
    np.testing.assert_allclose(outputs[3:], [plain] * 7, atol=1e-5)


def test_without_tta_the_share_changes_nothing(wide, wide_images):
    np.testing.assert_array_equal(
        predict(wide, wide_images, tta_share=0.1), predict(wide, wide_images)
    )


def test_a_model_that_ends_in_probabilities_has_them_for_its_confidence():
    # The left pixel, in percent, is what the model says of the image.
    inputs = keras.Input((1, 2, 3))
    model = keras.Model(
        inputs, L.Rescaling(1 / 100)(L.Flatten()(L.Cropping2D(((0, 0), (0, 1)))(inputs)))
    )
    # The softmax of these would have its least confident first: it minds the other two.
    pixels = [[51, 49, 0], [50, 25, 25]]
    images = np.array([[[pixel, [0, 0, 100]]] for pixel in pixels], np.uint8)
    outputs = predict(model, images, tta="mirror", tta_share=0.5)
    np.testing.assert_allclose(outputs, [[0.51, 0.49, 0], [0.25, 0.125, 0.625]], atol=1e-6)
    shown = softmax(np.array(pixels) / 100).max(axis=1)
    assert shown[0] < shown[1]


@pytest.mark.parametrize("tta", ["none", "mirror", "multicrop"])
def test_one_trace_for_all_batches_and_views(tta, wide_images):
    traced = []

    class Average(keras.Model):
        def call(self, images, training=False):
            traced.append((images.dtype, images.shape, training))
            return keras.ops.mean(keras.ops.cast(images, "float32"), axis=(1, 2))

    predict(Average(), wide_images, tta=tta, tta_share=0.5, batch_size=4)
    assert [(dtype, tuple(shape), training) for dtype, shape, training in traced] == [
        ("uint8", (None, 6, 9, 3), False)
    ]


class Traced(keras.Model):
    """Means over the image; notes each trace, and each size of batch that it runs."""

    def __init__(self):
        super().__init__()
        self.traced, self.sizes = [], []

    def call(self, images, training=False):
        self.traced.append(tuple(images.shape))
        size = tf.numpy_function(self._note, [tf.shape(images)[0]], tf.int32, stateful=True)
        with tf.control_dependencies([size]):
            return tf.reduce_mean(tf.cast(images, tf.float32), axis=(1, 2))

    def _note(self, size):
        self.sizes.append(int(size))
        return np.int32(size)


@pytest.mark.parametrize("tta", ["none", "mirror", "multicrop"])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_predictor_is_predict_again_and_again(tta, share, wide, wide_images):
    options = {"tta": tta, "tta_share": share, "batch_size": 7}
    predictor = Predictor(wide, **options)
    for images in (wide_images, wide_images[:3], wide_images):
        np.testing.assert_array_equal(predictor(images), predict(wide, images, **options))


def test_a_predictor_takes_the_weights_of_the_moment(wide, wide_images):
    model = keras.models.clone_model(wide)
    predictor = Predictor(model)
    predictor.compile((6, 9, 3), num_images=23)
    for scale in (1.0, -0.5):
        model.set_weights([scale * value for value in wide.get_weights()])
        np.testing.assert_array_equal(predictor(wide_images), predict(model, wide_images))
    assert np.abs(predictor(wide_images) - predict(wide, wide_images)).max() > 0.01


@pytest.mark.parametrize(
    ("tta", "share", "batch_size", "count", "sizes"),
    [
        ("none", 0.3, 7, 23, {2, 7}),
        ("none", 0.3, 7, 21, {7}),
        ("none", 1.0, 500, 23, {23}),
        # Of 23 images 7 get all views, of 15 it is 4, of 10 it is 3, and 1 of 1.
        ("mirror", 0.3, 7, 23, {2, 7}),
        ("mirror", 0.3, 7, 15, {1, 4, 7}),
        ("multicrop", 0.3, 7, 10, {3, 7}),
        ("multicrop", 0.3, 7, 1, {1}),
        ("multicrop", 1.0, 7, 10, {3, 7}),
    ],
)
def test_what_is_compiled_is_all_that_a_call_needs(
    tta, share, batch_size, count, sizes, wide_images
):
    model = Traced()
    predictor = Predictor(model, tta=tta, tta_share=share, batch_size=batch_size)
    predictor.compile((6, 9, 3), num_images=count)
    assert model.traced == [(None, 6, 9, 3)]
    assert sorted(model.sizes) == sorted(sizes)
    model.sizes.clear()
    predictor(wide_images[:count])
    predictor(wide_images[:count])
    assert model.traced == [(None, 6, 9, 3)]
    assert set(model.sizes) == sizes


def test_images_of_another_shape_are_another_trace(wide_images):
    model = Traced()
    predictor = Predictor(model)
    for images in (wide_images, wide_images[:, :5], wide_images[:4], wide_images[:, :5]):
        expected = images.astype(np.float32).mean((1, 2))
        np.testing.assert_allclose(predictor(images), expected, rtol=1e-5)
    assert model.traced == [(None, 6, 9, 3), (None, 5, 9, 3)]


def test_bad_input_of_a_predictor(wide):
    with pytest.raises(ConfigError, match=r"^tta must be one of none, mirror, multicrop, not 'x'$"):
        Predictor(wide, tta="x")
    with pytest.raises(ConfigError, match=r"^batch_size must be .*, not 0$"):
        Predictor(wide, batch_size=0)
    with pytest.raises(ConfigError, match=r"^tta_share must be .*, not 2$"):
        Predictor(wide, tta_share=2)
    predictor = Predictor(wide, tta="multicrop")
    with pytest.raises(DataError, match=r"^images must be \[N, 6, 9, 3\] uint8 .* float32$"):
        predictor(np.zeros((1, 6, 9, 3), np.float32))
    with pytest.raises(ConfigError, match=r"^num_images must be a whole number >= 1, not 0$"):
        predictor.compile((6, 9, 3), num_images=0)
    with pytest.raises(DataError, match=r"^image_shape must be .*, not \(6, 9\)$"):
        predictor.compile((6, 9), num_images=1)
    with pytest.raises(DataError, match=r"^images must be \[N, 6, 9, 3\] .* \[4, 9, 6, 3\] uint8$"):
        predictor.compile((9, 6, 3), num_images=4)
    with pytest.raises(DataError, match=r"^images must be 2 pixels or more in height and width"):
        Predictor(Traced(), tta="multicrop").compile((1, 9, 3), num_images=4)


def test_tta_of_images_of_any_size_and_a_subclassed_model():
    class Corner(keras.Model):
        def call(self, images, training=False):
            return keras.ops.cast(images[:, 0, 0], "float32")

    images = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(1, 2, 2, 3)
    # Top left of: the image, its mirror image; shifted by (-1, -1) and (1, 1), each with its own.
    # The pixels are numbered 0 1 / 2 3; reflected around: 3 2 3 2 / 1 0 1 0 / 3 2 3 2 / 1 0 1 0.
    pixels = images.reshape(4, 3).astype(np.float32)
    expected = (
        (pixels[0] + pixels[1]) / 4 + (pixels[3] + pixels[2]) / 8 + (pixels[3] + pixels[2]) / 8
    )
    np.testing.assert_allclose(predict(Corner(), images, tta="multicrop"), [expected])


@pytest.mark.parametrize("shape", [(3, 1, 4, 3), (3, 4, 1, 3), (3, 1, 1, 3)])
def test_one_pixel_cannot_be_reflected(shape):
    inputs = keras.Input((None, None, 3))
    average = keras.Model(inputs, L.GlobalAveragePooling2D()(inputs))
    images = np.full(shape, 9, np.uint8)
    with pytest.raises(DataError) as caught:
        predict(average, images, tta="multicrop")
    assert str(caught.value) == (
        "images must be 2 pixels or more in height and width for tta='multicrop', "
        f"not {list(shape)}"
    )
    np.testing.assert_allclose(predict(average, images, tta="mirror"), np.full((3, 3), 9))


@pytest.mark.parametrize("bad", ["flip", "Mirror", "", None, True, 2])
def test_tta_must_be_known(bad, model):
    with pytest.raises(ConfigError) as caught:
        predict(model, np.zeros((2, 32, 32, 3), np.uint8), tta=bad)
    assert str(caught.value) == f"tta must be one of none, mirror, multicrop, not {bad!r}"


@pytest.mark.parametrize("bad", [0, -0.5, 1.001, 25, float("nan"), float("inf"), "0.5", None, True])
@pytest.mark.parametrize("tta", ["none", "multicrop"])
def test_tta_share_must_be_above_zero_and_at_most_one(bad, tta, model):
    with pytest.raises(ConfigError) as caught:
        predict(model, np.zeros((2, 32, 32, 3), np.uint8), tta=tta, tta_share=bad)
    assert str(caught.value) == f"tta_share must be a finite number > 0 and <= 1, not {bad!r}"


@pytest.mark.parametrize("tta", ["mirror", "multicrop"])
def test_tta_wants_images_that_the_model_takes(tta, model):
    with pytest.raises(DataError) as caught:
        predict(model, np.zeros((2, 34, 34, 3), np.uint8), tta=tta)
    assert str(caught.value) == (
        "images must be [N, 32, 32, 3] uint8 for this model, not [2, 34, 34, 3] uint8"
    )


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
