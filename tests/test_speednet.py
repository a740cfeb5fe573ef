"""speednet: its sizes, its initial values, its whitening, and that it trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import ConfigError, DataError
from cifarflow.models.cnn import cnn
from cifarflow.models.layers import CIFAR10_MEAN, CIFAR10_STD
from cifarflow.models.speednet import set_whitening, speednet, whitening_kernel
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.build import build_model
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted
from cifarflow.training.step import make_train_step

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def small(**options):
    return speednet(**{"widths": (30, 8, 40), "seed": 0, **options})


def images_of(shape=(32, 32, 3), count=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def convolutions(model):
    """The trained ones: all but the whitening layer."""
    found = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert found[0].name == "whitening"
    return found[1:]


def norms(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def size_of(variables):
    return sum(int(np.prod(variable.shape)) for variable in variables)


def normalised(images):
    """As the model does; [N, H, W, C] float64."""
    colour = images.shape[-1] == 3
    return (images / 255 - (CIFAR10_MEAN if colour else 0.5)) / (CIFAR10_STD if colour else 0.25)


def patches_of(images, size=2):
    """[n, size * size * C] float64, one patch after the other."""
    scaled = normalised(images)
    height, width = images.shape[1:3]
    return np.array(
        [
            image[row : row + size, column : column + size].ravel()
            for image in scaled
            for row in range(height - size + 1)
            for column in range(width - size + 1)
        ]
    )


# ------------------------------------------------------------------------------- sizes and layers


def test_it_has_its_documented_size():
    model = speednet()
    kernels = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    shifts = 2 * (64 + 256 + 256)
    trained = 24 + kernels + shifts + 256 * 10
    assert size_of(model.trainable_variables) == trained == 1_971_352
    # Not trained: the whitening kernel, and BatchNorm's running means and variances.
    assert model.count_params() == trained + 2 * 2 * 3 * 24 + 2 * shifts == 1_973_944
    assert model.output_shape == (None, 10)


def test_shapes_at_each_stage():
    model = speednet()
    seen = [
        (type(layer).__name__, *layer.output.shape[1:])
        for layer in model.layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.MaxPooling2D))
    ]
    assert seen == [
        ("Conv2D", 31, 31, 24),
        ("Conv2D", 31, 31, 64),
        ("MaxPooling2D", 15, 15, 64),
        ("Conv2D", 15, 15, 64),
        ("Conv2D", 15, 15, 256),
        ("MaxPooling2D", 7, 7, 256),
        ("Conv2D", 7, 7, 256),
        ("Conv2D", 7, 7, 256),
        ("MaxPooling2D", 3, 3, 256),
        ("Conv2D", 3, 3, 256),
        ("MaxPooling2D", 1, 1, 256),
    ]
    assert model.layers[-2].output.shape == model.layers[-1].output.shape == (None, 10)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("convs", "residual"), [(2, False), (1, False), (3, True)])
def test_it_computes_what_it_says(convs, residual, training):
    model = small(logit_scale=0.3, convs_per_block=convs, residual=residual)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * rng.standard_normal(variable.shape))
    weights = {variable.path: variable.numpy() for variable in model.variables}
    images = images_of()

    def norm(x, layer):
        if not training:
            return x + weights[f"{layer.name}/beta"]  # nothing has been seen: mean 0, variance 1
        mean, variance = tf.nn.moments(x, [0, 1, 2])
        return (x - mean) / tf.sqrt(variance) + weights[f"{layer.name}/beta"]

    def conv(x, layer, padding="SAME"):
        return tf.nn.conv2d(x, weights[f"{layer.name}/kernel"], 1, padding)

    def gelu(x):
        return x * (1 + tf.math.erf(x / np.sqrt(2))) / 2

    whitening = model.get_layer("whitening")
    x = conv(normalised(images).astype(np.float32), whitening, "VALID")
    x = gelu(x + weights["whitening/bias"])
    layers = list(zip(convolutions(model), norms(model), strict=True))
    for start in range(0, len(layers), convs):
        (first, first_norm), *others = layers[start : start + convs]
        x = tf.nn.max_pool2d(conv(x, first), 2, 2, "VALID")
        kept = x = gelu(norm(x, first_norm))
        for layer, layer_norm in others:
            x = norm(conv(x, layer), layer_norm)
            if residual and layer is others[-1][0]:
                x += kept
            x = gelu(x)
    x = tf.nn.max_pool2d(x, 3, 3, "VALID")[:, 0, 0]
    expected = (x @ weights["classifier/kernel"]) * 0.3
    np.testing.assert_allclose(model(images, training=training), expected, rtol=1e-4, atol=1e-4)


def test_options_of_the_builder():
    model = small(widths=16, whitening_size=3, batch_norm_momentum=0.9, dropout=0.2, num_classes=7)
    assert model.get_layer("whitening").kernel.shape == (3, 3, 3, 54)
    assert [layer.filters for layer in convolutions(model)] == [16, 16]
    assert [layer.momentum for layer in norms(model)] == [0.9, 0.9]
    assert [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)] == [
        0.2
    ]
    assert model.output_shape == (None, 7)
    assert {layer.momentum for layer in norms(small())} == {0.6}


def test_the_classifier_starts_with_the_standard_deviation_asked_for():
    kernel = small(widths=(500,), logit_stddev=1.5).get_layer("classifier").kernel.numpy()
    assert kernel.std() == pytest.approx(1.5, rel=0.05)
    assert np.abs(kernel).max() <= 1.5 * 3**0.5 + 1e-6


def test_the_scale_of_the_logits():
    images = images_of()
    plain, scaled = small(logit_scale=1.0), small(logit_scale=0.25)
    assert (plain.layers[-1].name, type(plain.layers[-1]).__name__) == ("logits", "Dense")
    np.testing.assert_allclose(scaled(images), plain(images) * 0.25, rtol=1e-6)
    np.testing.assert_allclose(small()(images), plain(images) / 9, rtol=1e-5)


def test_l2_leaves_the_frozen_kernel_alone():
    model = small(l2=0.01)
    kernels = [layer.kernel for layer in convolutions(model)] + [model.layers[-2].kernel]
    expected = 0.01 * sum(float(tf.reduce_sum(kernel**2)) for kernel in kernels)
    assert sum(float(loss) for loss in model.losses) == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------- initial values


def test_convolutions_pass_their_first_channels_through():
    model = small()
    images = images_of()
    for layer in convolutions(model):
        probe = keras.Model(model.input, [layer.input, layer.output])
        before, after = (x.numpy() for x in probe(images))
        count = min(before.shape[-1], layer.filters)
        np.testing.assert_array_equal(after[..., :count], before[..., :count])
        # And nothing else does.
        kernel = layer.kernel.numpy()
        assert kernel[..., :count].sum() == np.abs(kernel[..., :count]).sum() == count


def test_the_other_initial_values_are_uniform():
    model = small(widths=(200,))
    first, second = convolutions(model)
    assert (np.unique(second.kernel.numpy()) == [0, 1]).all()
    for values, fan_in in (
        (first.kernel.numpy()[..., 24:], 9 * 24),
        (model.get_layer("classifier").kernel.numpy(), 200),
    ):
        limit = fan_in**-0.5
        assert 0.99 * limit < np.abs(values).max() <= limit
        assert values.std() == pytest.approx(limit / 3**0.5, rel=0.05)
        assert abs(values.mean()) < 0.05 * limit
    for layer in norms(model):
        assert layer.gamma is None
        np.testing.assert_array_equal(layer.beta, 0)
    bias, limit = model.get_layer("whitening").bias.numpy(), 12**-0.5
    assert 0.9 * limit < np.abs(bias).max() <= limit
    # Of 24 values the mean is good to an eighth of the limit.
    assert abs(bias.mean()) < 0.4 * limit
    assert len(np.unique(bias)) == len(bias)


@pytest.mark.parametrize("shape", [(32, 32, 3), (9, 12, 1)])
def test_unset_whitening_filters_keep_the_length_of_a_patch(shape):
    model = small(image_shape=shape)
    kernel = model.get_layer("whitening").kernel.numpy().reshape(4 * shape[-1], -1)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(len(kernel)), atol=1e-5)
    other = small(image_shape=shape, seed=1).get_layer("whitening").kernel
    assert (other.numpy().ravel() != kernel.ravel()).all()


# -------------------------------------------------------------------------------------- whitening


@pytest.mark.parametrize("policy", POLICIES[:2])
def test_whitened_patches_are_uncorrelated_and_of_size_1(some_images, policy):
    images = some_images[0][:1000]
    model = small(dtype_policy=policy)
    layer = model.get_layer("whitening")

    def covariance(**options):
        set_whitening(model, images, **options)
        responses = keras.Model(model.input, layer.output).predict(images, verbose=0)
        responses = responses.astype(np.float64).reshape(-1, 24) - layer.bias.numpy()
        return responses.T @ responses / len(responses)

    tolerance = 1e-3 if policy == "float32" else 0.15
    np.testing.assert_allclose(
        covariance(epsilon=1e-9)[:12, :12], np.eye(12), atol=tolerance, err_msg=policy
    )
    # The default epsilon holds the directions back in which patches hardly differ.
    whitened = covariance()
    variances = np.diag(whitened)[:12]
    assert (variances < 1 + tolerance).all()
    assert variances[0] == pytest.approx(1, abs=max(0.01, tolerance / 10))
    np.testing.assert_allclose(whitened[:12, :12], np.diag(variances), atol=tolerance)
    np.testing.assert_allclose(whitened[12:, :12], -whitened[:12, :12], atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.data(),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([5e-4, 1e-2, 1.0]),
)
def test_filters_are_scaled_eigenvectors_and_then_their_negatives(data, size, channels, epsilon):
    shape = (data.draw(st.integers(5, 9)), size + 3, size + 4, channels)
    images = data.draw(arrays.arrays(np.uint8, shape))
    kernel = whitening_kernel(images, kernel_size=size, epsilon=epsilon)
    length = size * size * channels
    assert kernel.shape == (size, size, channels, 2 * length)
    assert kernel.dtype == np.float32
    filters, negatives = np.split(kernel.reshape(length, -1).astype(np.float64), 2, axis=1)
    np.testing.assert_array_equal(negatives, -filters)
    assert (filters[np.abs(filters).argmax(0), np.arange(length)] > 0).all()
    patches = patches_of(images, size)
    covariance = patches.T @ patches / len(patches)
    # F'(C + epsilon)F = 1, and F'F is diagonal and rises, as eigenvalues fall.
    scaled = filters.T @ (covariance + epsilon * np.eye(length)) @ filters
    np.testing.assert_allclose(scaled, np.eye(length), atol=2e-3)
    gram = filters.T @ filters
    lengths = np.diag(gram)
    relative = gram / np.sqrt(np.outer(lengths, lengths))
    np.testing.assert_allclose(relative, np.eye(length), atol=1e-4)
    assert (np.diff(lengths) >= -1e-4 * lengths[1:]).all()


def test_whitening_by_hand():
    # A pixel is 2 or -2 once normalised, so its mean square is 4.
    grey = np.array([0, 255, 255, 255], np.uint8).reshape(4, 1, 1, 1)
    kernel = whitening_kernel(grey, kernel_size=1, epsilon=5.0)
    np.testing.assert_allclose(kernel.ravel(), [1 / 3, -1 / 3], rtol=1e-6)
    # Two channels that are the same, 2, -2, 2/3 and 2/3: the mean square is 20/9, so the eigenvalue
    # of (1, 1) / sqrt(2) is 40/9, and of (1, -1) / sqrt(2) it is 0.
    pairs = np.array([255, 0, 170, 170], np.uint8).reshape(4, 1, 1, 1).repeat(2, axis=-1)
    kernel = whitening_kernel(pairs, kernel_size=1, epsilon=0.25)
    first, second = kernel[0, 0, :, 0], kernel[0, 0, :, 1]
    np.testing.assert_allclose(first, 0.5**0.5 / (40 / 9 + 0.25) ** 0.5, rtol=1e-5)
    np.testing.assert_allclose(np.abs(second), 0.5**0.5 / 0.5, rtol=1e-5)
    assert second[0] == pytest.approx(-second[1])


def test_only_the_first_images_count():
    images = images_of((4, 4, 3), count=1300)
    kernel = whitening_kernel(images, num_images=1100)
    np.testing.assert_array_equal(kernel, whitening_kernel(images[:1100]))
    assert (kernel != whitening_kernel(images)).any()
    patches = patches_of(images[:1100])
    eigenvalues = np.linalg.eigvalsh(patches.T @ patches / len(patches))[::-1]
    lengths = (kernel.reshape(12, 24)[:, :12].astype(np.float64) ** 2).sum(0)
    np.testing.assert_allclose(lengths, 1 / (eigenvalues + 5e-4), rtol=1e-4)
    many = images_of((3, 3, 1), count=5001)
    np.testing.assert_array_equal(whitening_kernel(many), whitening_kernel(many[:5000]))


@pytest.mark.parametrize("value", [0, 128, 255])
def test_images_without_contrast_give_finite_filters(value):
    kernel = whitening_kernel(np.full((5, 8, 8, 3), value, np.uint8))
    assert np.isfinite(kernel).all()
    assert np.abs(kernel).max() <= 5e-4**-0.5 + 1e-3


def test_set_whitening_changes_the_whitening_kernel_alone():
    model, images = small(whitening_size=3), images_of(count=20)
    before = {variable.path: variable.numpy() for variable in model.variables}
    assert set_whitening(model, images, num_images=10, epsilon=0.1) is None
    expected = whitening_kernel(images, kernel_size=3, num_images=10, epsilon=0.1)
    for variable in model.variables:
        if variable.path == "whitening/kernel":
            np.testing.assert_array_equal(variable.numpy(), expected)
        else:
            np.testing.assert_array_equal(variable.numpy(), before[variable.path])


@pytest.mark.parametrize("shape", [(10, 12, 1), (9, 9, 4), (16, 16, 3), (64, 64, 3)])
def test_other_images(shape):
    model, images = small(image_shape=shape), images_of(shape)
    set_whitening(model, images)
    assert model.get_layer("classifier").input.shape == (None, 40)
    assert np.isfinite(model(images).numpy()).all()


# --------------------------------------------------------------------------- precision and saving


@pytest.mark.parametrize("policy", POLICIES)
def test_precision(policy):
    model, images = small(dtype_policy=policy), images_of()
    set_whitening(model, images)
    assert {variable.dtype for variable in model.weights} == {"float32"}
    compute = "float32" if policy == "float32" else policy.removeprefix("mixed_")
    # The filters of the first layer would enlarge a rounding.
    assert {layer.output.dtype for layer in model.layers[:3]} == {"float32"}
    assert model.layers[2].name == "whitening"
    assert {layer.output.dtype for layer in model.layers[3:]} == {compute}
    expected = small()
    set_whitening(expected, images)
    expected = expected(images).numpy()
    np.testing.assert_allclose(
        model(images).numpy().astype(np.float32), expected, atol=0.05 * np.abs(expected).max()
    )


def test_statistics_are_float32_whatever_the_precision():
    model, images = small(dtype_policy="mixed_bfloat16", batch_norm_momentum=0.0), images_of()
    probe = keras.Model(model.input, norms(model)[0].input)
    features = probe(images).numpy().astype(np.float64)
    model(images, training=True)
    norm = norms(model)[0]
    mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
    np.testing.assert_allclose(mean, features.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, features.var((0, 1, 2)), rtol=1e-4)
    # That is closer than bfloat16 could come.
    rounded = tf.cast(tf.cast(mean, tf.bfloat16), tf.float32).numpy()
    assert (np.abs(rounded - mean) > 1e-4 * np.abs(mean)).any()


# Keras reads its variables in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_saved_and_loaded(tmp_path):
    model, images = small(dtype_policy="mixed_bfloat16", dropout=0.1), images_of()
    set_whitening(model, images)
    model(images, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images).numpy(), model(images).numpy())
    # The kernel is still frozen, and the bias with it.
    frozen = {v.path for v in model.trainable_variables} - {
        v.path for v in loaded.trainable_variables
    }
    assert frozen == {"whitening/bias"}
    set_whitening(loaded, images[:4])
    assert (loaded(images).numpy() != model(images).numpy()).any()


def test_the_seed_decides_everything():
    images = images_of()
    first, again, other = (small(seed=seed, dropout=0.3) for seed in (3, 3, 4))
    for one, same in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(first(images, training=True), again(images, training=True))
    differ = {
        one.path
        for one, two in zip(first.variables, other.variables, strict=True)
        if (one.numpy() != two.numpy()).any()
    }
    # Where each filter passes a channel through, nothing is drawn.
    wide = [layer for layer in convolutions(first) if layer.filters > layer.kernel.shape[2]]
    assert len(wide) == 2
    assert {f"{layer.name}/kernel" for layer in wide} < differ
    assert {"whitening/kernel", "classifier/kernel"} < differ


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("policy", POLICIES)
def test_it_trains_all_but_the_whitening_kernel(policy):
    model = small(dtype_policy=policy)
    data = learnable(32)
    set_whitening(model, data.images)
    before = {variable.path: variable.numpy() for variable in model.variables}
    optimizer = scale_for(policy, SGD(0.05, momentum=0.85, nesterov=True))
    train_step = make_train_step(model, optimizer)
    images, labels = tf.constant(data.images), tf.constant(data.labels)
    losses = [float(train_step(images, labels).loss) / 32 for _ in range(12)]
    assert losses[-1] < 0.85 * losses[0]
    same = {v.path for v in model.variables if (v.numpy() == before[v.path]).all()}
    assert same == {"whitening/kernel"}


def test_it_trains_in_keras_fit_too():
    model, data = small(), learnable(32)
    model.compile(SGD(0.05, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(True))
    bias = model.get_layer("whitening").bias.numpy()
    kernel = model.get_layer("whitening").kernel.numpy()
    history = model.fit(data.images, data.labels, epochs=4, batch_size=32, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert (model.get_layer("whitening").bias.numpy() != bias).any()
    np.testing.assert_array_equal(model.get_layer("whitening").kernel, kernel)


def learnable(count, seed=0, side=16):
    """Small pictures whose brightness tells the class, in noise."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.int32)
    images = rng.integers(0, 60, (count, side, side, 3)) + labels[:, None, None, None] * 19
    images = np.repeat(np.repeat(images, 32 // side, 1), 32 // side, 2)
    return Split(images.astype(np.uint8), labels)


def a_recipe(**options):
    return Recipe(
        "x",
        model="speednet",
        model_options={"widths": (8, 8, 8), "dropout": 0.1},
        epochs=2,
        batch_size=8,
        precision="float32",
        **options,
    )


@pytest.fixture
def dataset():
    splits = [learnable(32), learnable(10, 1), learnable(10, 2)]
    return Dataset("tiny", *splits, tiny.NAMES, "generated")


def test_a_recipe_takes_the_whitening_from_its_training_images(dataset, tmp_path):
    recipe = a_recipe()
    expected = whitening_kernel(dataset.train.images)
    whole = train_recipe(recipe, dataset=dataset, workdir=tmp_path / "whole")
    np.testing.assert_array_equal(whole.model.get_layer("whitening").kernel, expected)
    assert whole.summary["step_traces"] == 1

    # A run that was cut, and one that is finished already.
    def stop(state):
        if state.step == 5:
            raise TrainingInterrupted(5, None)

    cut = {"dataset": dataset, "workdir": tmp_path / "cut"}
    with pytest.raises(TrainingInterrupted):
        train_recipe(recipe, hooks=[Hook(Every(steps=5), stop)], **cut)
    nothing = Hook(Every(steps=1000))
    resumed = train_recipe(recipe, hooks=[nothing], resume=True, **cut)
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    again = train_recipe(recipe, hooks=[nothing], resume=True, **cut)
    for one, same in zip(again.model.variables, whole.model.variables, strict=True):
        np.testing.assert_array_equal(one, same)


def test_build_model_needs_no_images(dataset):
    shape = {"image_shape": (32, 32, 3), "num_classes": 10}
    without = build_model(a_recipe(), **shape)
    kernel = without.get_layer("whitening").kernel.numpy()
    np.testing.assert_array_equal(
        kernel, speednet(widths=(8,), seed=0).get_layer("whitening").kernel
    )
    with_images = build_model(a_recipe(), images=dataset.train.images, **shape)
    assert (with_images.get_layer("whitening").kernel.numpy() != kernel).any()
    # To other families they are nothing.
    plain = build_model(Recipe("y", model="mlp"), images=dataset.train.images, **shape)
    assert plain.count_params() == 1_707_274


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths must hold at least one size, not \(\)"),
        ({"widths": (64, 0)}, "widths must be a whole number >= 1, not 0"),
        ({"widths": (64, 2.5)}, "widths must be a whole number >= 1, not 2.5"),
        ({"convs_per_block": 0}, "convs_per_block must be a whole number >= 1, not 0"),
        ({"residual": 1}, "residual must be False, or True with .* not 1 with 2"),
        ({"residual": True, "convs_per_block": 1}, "residual must be .* not True with 1"),
        ({"logit_stddev": 0}, "logit_stddev must be a finite number > 0, not 0"),
        ({"whitening_size": 0}, "whitening_size must be a whole number >= 1, not 0"),
        ({"whitening_size": (2, 2)}, r"whitening_size must be .* not \(2, 2\)"),
        ({"whitening_size": 33}, "the image is 32x32 pixels before a 33x33 convolution"),
        ({"batch_norm_momentum": 1.0}, "batch_norm_momentum must be .* < 1, not 1.0"),
        ({"batch_norm_momentum": None}, "batch_norm_momentum must be .* not None"),
        ({"logit_scale": 0}, "logit_scale must be a finite number > 0, not 0"),
        ({"logit_scale": float("nan")}, "logit_scale must be .* not nan"),
        ({"logit_scale": "1/9"}, "logit_scale must be .* not '1/9'"),
        ({"dropout": (0.1,)}, r"dropout must be .* not \(0.1,\)"),
        ({"image_shape": (8, 32, 3)}, "the image is 1x7 pixels before a 2x2 pool"),
        ({"image_shape": (1, 32, 3)}, "the image is 1x32 pixels before a 2x2 convolution"),
        ({"widths": (4,) * 5}, "the image is 1x1 pixels before a 2x2 pool: give fewer blocks"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        speednet(**options)
    assert "\n" not in str(caught.value)


IMAGES = images_of((4, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((IMAGES, {"kernel_size": 0}), ConfigError, "kernel_size must be .* not 0"),
        ((IMAGES, {"kernel_size": 2.0}), ConfigError, "kernel_size must be .* not 2.0"),
        ((IMAGES, {"num_images": 0}), ConfigError, "num_images must be .* not 0"),
        ((IMAGES, {"epsilon": 0}), ConfigError, "epsilon must be a finite number > 0, not 0"),
        ((IMAGES, {"epsilon": float("inf")}), ConfigError, "epsilon must be .* not inf"),
        ((IMAGES / 255, {}), DataError, r"images must be a uint8 array .* not float64 \(8, 4"),
        ((IMAGES[0], {}), DataError, r"images must be a uint8 array .* not uint8 \(4, 4, 3\)"),
        ((IMAGES.tolist(), {}), DataError, "images must be a uint8 array .* not list"),
        ((None, {}), DataError, "images must be a uint8 array .* not NoneType"),
        ((IMAGES[:0], {}), DataError, "images must hold at least 12 patches of 2x2 .* not 0"),
        ((IMAGES[:1], {}), DataError, "images must hold at least 12 patches of 2x2 .* not 9"),
        ((IMAGES, {"num_images": 1}), DataError, "at least 12 patches of 2x2 .* not 9"),
        ((IMAGES, {"kernel_size": 5}), DataError, "at least 75 patches of 5x5 .* not 0"),
        (
            (IMAGES[..., :0], {}),
            DataError,
            r"images must be a uint8 array .* not uint8 \(8, 4, 4, 0",
        ),
    ],
)
def test_bad_images_to_whiten_by(arguments, error, message):
    images, options = arguments
    with pytest.raises(error, match=message) as caught:
        whitening_kernel(images, **options)
    assert "\n" not in str(caught.value)


def test_bad_models_to_whiten():
    images = images_of(count=4)
    for model, name in ((cnn(), "'cnn'"), (None, "None"), ("speednet", "'speednet'")):
        with pytest.raises(ConfigError, match=f"model must be a speednet, .*, not {name}$"):
            set_whitening(model, images)
    model = small(image_shape=(32, 32, 1))
    before = model.get_weights()
    with pytest.raises(DataError, match=r"must have the 1 channels of model 'speednet', not the"):
        set_whitening(model, images)
    with pytest.raises(DataError, match=r"at least 4 patches of 2x2 .* not 0"):
        set_whitening(model, images[:0, ..., :1])
    with pytest.raises(
        DataError, match=r"pixels of 0\.\.255 to whiten by, and the largest here is 1"
    ):
        set_whitening(model, (images[..., :1] > 128).astype(np.uint8))
    for one, same in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, same)


def test_a_recipe_whose_images_are_too_few_is_refused():
    train = Split(images_of((10, 10, 3), count=8), np.arange(8, dtype=np.int32))
    dataset = Dataset(
        "tiny", train, Split(train.images[:0], train.labels[:0]), train, tiny.NAMES, "x"
    )
    options = {"model": "speednet", "epochs": 1, "batch_size": 8, "precision": "float32"}
    options["model_options"] = {"widths": (4,), "whitening_size": 8}
    with pytest.raises(DataError, match="at least 192 patches of 8x8 pixels to whiten by, not 72"):
        train_recipe(Recipe("x", **options), dataset=dataset)
