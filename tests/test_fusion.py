"""The fused passes are Keras's own up to rounding: outputs, gradients, statistics."""

import functools
import math
import runpy

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.models import fusion
from cifarflow.models.cnn import cnn, final
from cifarflow.models.fusion import fuse
from cifarflow.models.mlp import mlp
from cifarflow.models.resnet import resnet
from cifarflow.models.speednet import speednet
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.step import make_eval_step, make_train_step

L = keras.layers


def images_of(shape=tiny.SHAPE, count=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def pass_of(model, fused):
    """A function of images: outputs, gradients and variables afterwards, from the same start."""
    start = tiny.weights(model)
    forward = fuse(model) if fused else lambda x: model(x, training=True)

    @tf.function
    def run(images):
        with tf.GradientTape() as tape:
            outputs = forward(images)
            # A loss that tells every output apart.
            wave = tf.sin(tf.range(tf.size(outputs), dtype=tf.float32))
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) * tf.reshape(wave, tf.shape(outputs)))
        return outputs, tape.gradient(loss, model.trainable_variables)

    def one_pass(images):
        outputs, gradients = run(tf.constant(images))
        gradients = [tf.convert_to_tensor(g).numpy() for g in gradients]
        after = tiny.weights(model)
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        return tf.cast(outputs, tf.float32).numpy(), gradients, after

    return one_pass


def assert_same(model, images, tolerance=1e-4):
    plain, fused = (pass_of(model, fused)(images) for fused in (False, True))
    names = [variable.path for variable in model.trainable_variables]
    scale = max(np.abs(g).max() for g in plain[1])
    np.testing.assert_allclose(fused[0], plain[0], rtol=tolerance, atol=tolerance)
    for name, a, b in zip(names, fused[1], plain[1], strict=True):
        # Relative to the largest of all: a bias before batch norm has a gradient of rounding only.
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)
    for variable, a, b in zip(model.variables, fused[2], plain[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=variable.path)


def model_of(*layers, shape=tiny.SHAPE, policy="float32"):
    """The layers one after another, then a dense one, so that every path has a gradient."""
    inputs = keras.Input(shape)
    x = L.Rescaling(1 / 64, -2, dtype=policy)(inputs)
    for layer in layers:
        x = layer(x)
    outputs = L.Dense(3, dtype=policy)(L.Flatten(dtype=policy)(x))
    return keras.Model(inputs, outputs)


MODELS = {
    "mlp": lambda **k: mlp(image_shape=tiny.SHAPE, units=(8, 4), **k),
    "cnn": lambda **k: cnn(image_shape=(16, 16, 3), filters=(4, 6), kernel_size=3, **k),
    "batchnorm": lambda **k: cnn(
        image_shape=(16, 16, 3), filters=(4, 6), kernel_size=3, batch_norm_momentum=0.7, **k
    ),
    "final": lambda **k: final(
        image_shape=(16, 16, 3), filters=(4, 6), kernel_size=3, dropout=0.0, **k
    ),
    "resnet": lambda **k: resnet(image_shape=tiny.SHAPE, depth=10, widths=(4, 6), **k),
    "speednet": lambda **k: speednet(widths=(8, 8, 8), **k),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_train_as_keras_would_train_them(name):
    model = MODELS[name](seed=3)
    assert_same(model, images_of(model.input_shape[1:]))


def conv(policy, filters=4, size=3, **options):
    return L.Conv2D(filters, size, dtype=policy, **options)


# A model is deep enough that rounding hides a small mistake; of a layer or two it hides none.
HALF = {
    **{name: MODELS[name] for name in ("batchnorm", "speednet")},
    "convolutions": lambda dtype_policy: model_of(
        conv(dtype_policy, 64, 1), conv(dtype_policy, 64), policy=dtype_policy
    ),
    "pool": lambda dtype_policy: model_of(
        conv(dtype_policy, activation="relu"),
        L.MaxPooling2D(2, dtype=dtype_policy),
        policy=dtype_policy,
    ),
    "norm": lambda dtype_policy: model_of(
        conv(dtype_policy), L.BatchNormalization(dtype=dtype_policy), policy=dtype_policy
    ),
    "gelu": lambda dtype_policy: model_of(
        conv(dtype_policy, activation="gelu"), policy=dtype_policy
    ),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_as_near_as_half_precision_gets(name):
    keras.utils.set_random_seed(0)
    exact_model, model = (HALF[name](dtype_policy=p) for p in ("float32", "mixed_bfloat16"))
    rng = np.random.default_rng(0)
    for variable, other in zip(exact_model.variables, model.variables, strict=True):
        if variable.trainable:
            variable.assign(variable + rng.normal(0, 0.1, variable.shape))
        other.assign(variable)
    exact, plain, fused = pass_of(exact_model, False), pass_of(model, False), pass_of(model, True)
    names = ["outputs", *(variable.path for variable in model.trainable_variables)]
    # Sums over several batches, as a few numbers may come out well or badly rounded by chance.
    errors = np.zeros((2, len(names)))
    for seed in range(16):
        images = images_of(model.input_shape[1:], seed=seed)
        outputs, gradients, _ = exact(images)
        for sums, found in zip(errors, (plain(images), fused(images)), strict=True):
            pairs = zip([found[0], *found[1]], [outputs, *gradients], strict=True)
            sums += [np.sum((a - b) ** 2, dtype=np.float64) for a, b in pairs]
    ratios = dict(zip(names, np.sqrt(errors[1] / errors[0]), strict=True))
    # The fused pass rounds less often than Keras's, never much more.  In a whole model rounding
    # decides which pixel some pool takes, and thereby all gradients before it.
    most = 2.5 if name in MODELS else 1.2
    assert not {name: ratio for name, ratio in ratios.items() if not ratio < most}


def inferred(model, images, fused):
    forward = fuse(model, training=False) if fused else lambda x: model(x, training=False)
    return tf.cast(tf.function(forward)(tf.constant(images)), tf.float32).numpy()


def used(model):
    """The model with statistics and offsets as of one in the middle of its training."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if "moving_variance" in variable.path or variable.path.endswith("/gamma"):
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif "moving_mean" in variable.path or variable.path.endswith("/beta"):
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_models_infer_as_keras_would(name):
    model = used(MODELS[name](seed=3))
    images, before = images_of(model.input_shape[1:]), tiny.weights(model)
    expected = inferred(model, images, fused=False)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(inferred(model, images, True), expected, atol=1e-5 * scale)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


@pytest.mark.parametrize("name", MODELS)
def test_inference_in_half_precision_is_as_near_as_it_gets(name):
    reference = used(MODELS[name](seed=3))
    images = images_of(reference.input_shape[1:], count=64)
    exact = inferred(reference, images, fused=False)
    half = used(MODELS[name](seed=3, dtype_policy="mixed_bfloat16"))
    errors = [np.linalg.norm(inferred(half, images, fused) - exact) for fused in (False, True)]
    assert errors[1] < 1.2 * errors[0]
    assert 0 < errors[0] < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_infers_by_its_running_statistics_of_that_moment(scale, center, axis, trainable):
    layer = L.BatchNormalization(axis, scale=scale, center=center, epsilon=0.1, trainable=trainable)
    model = model_of(L.Conv2D(4, 3), layer)
    forward, images = tf.function(fuse(model, training=False)), images_of()
    first = forward(images).numpy()
    used(model)
    expected = model(images, training=False)
    np.testing.assert_allclose(forward(images), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(first - expected).max() > 0.1


def test_inference_is_by_fused_kernels():
    model = model_of(L.Conv2D(2, 3), L.BatchNormalization(), L.Activation("relu"), L.Dropout(0.5))
    spec = tf.TensorSpec([4, *tiny.SHAPE], tf.uint8)
    graph = tf.function(fuse(model, training=False)).get_concrete_function(spec).graph
    norms = [op for op in graph.get_operations() if op.type == "FusedBatchNormV3"]
    assert [op.get_attr("is_training") for op in norms] == [False]
    assert not [op for op in graph.get_operations() if "Random" in op.type]


def test_layers_of_ones_own_and_subclassed_models_infer():
    images = images_of()
    for model in (model_of(Block()), model_of(L.SpatialDropout2D(0.5)), Subclassed()):
        found, expected = (inferred(model, images / np.float32(64), fused) for fused in (1, 0))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_evaluation_step_is_keras_own_up_to_rounding(jit_compile):
    model = used(MODELS["speednet"](seed=3, l2=0.1))
    images, labels = images_of((32, 32, 3)), np.arange(16, dtype=np.int32) % 10
    options = {"jit_compile": jit_compile}
    fused, plain = (make_eval_step(model, fused=fused, **options) for fused in (True, False))
    np.testing.assert_allclose(fused(images, labels), plain(images, labels), rtol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [
        ([0.1, 1 / 3, -7.7], [0.3, -2.2, 0.0]),
        ([0.1, 1 / 3, -7.7], 0.25),
        (1 / 255, [0.3, -2.2, 0.0]),
        ([0.1], [0.3, -2.2, 0.0]),
        (np.full((4, 6, 3), 0.1), 0.3),
        (1 / 255, 0.3),
    ],
)
def test_rescaling_is_bit_for_bit_the_same(policy, scale, offset):
    inputs = keras.Input((4, 6, 3))
    model = keras.Model(inputs, L.Rescaling(scale, offset, dtype=policy)(inputs))
    images = images_of((4, 6, 3))
    outputs, expected = tf.function(fuse(model))(images), model(images, training=True)
    assert (outputs.dtype, outputs.shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(outputs, expected)
    graph = tf.function(fuse(model)).get_concrete_function(images).graph
    (product,) = (each for each in graph.get_operations() if each.type == "Mul")
    along_rows = 1 in (np.ndim(scale), np.ndim(offset))
    assert product.outputs[0].shape == ([16, 4, 18] if along_rows else [16, 4, 6, 3])


def test_rescaling_of_images_of_unknown_sides_and_of_vectors():
    for shape in ((None, None, 3), (3,)):
        inputs = keras.Input(shape)
        model = keras.Model(inputs, L.Rescaling([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])(inputs))
        forward = tf.function(fuse(model), input_signature=[tf.TensorSpec([None, *shape])])
        images = tf.constant(images_of((4, 6, 3) if len(shape) == 3 else shape), tf.float32)
        np.testing.assert_array_equal(forward(images), model(images))


@settings(max_examples=30, deadline=None)
@given(
    scale=st.booleans(),
    center=st.booleans(),
    momentum=st.floats(0, 0.99),
    epsilon=st.sampled_from([1e-12, 1e-5, 1e-3, 0.1]),
    count=st.integers(2, 9),
)
def test_batch_norm(scale, center, momentum, epsilon, count):
    layer = L.BatchNormalization(scale=scale, center=center, momentum=momentum, epsilon=epsilon)
    model = model_of(L.Conv2D(4, 3), layer)
    if scale:
        layer.gamma.assign([-1.5, 0.0, 0.5, 2.0])
    assert_same(model, images_of(count=count), 3e-4)


@pytest.mark.parametrize("axis", [-1, 3, 1])
@pytest.mark.parametrize("trainable", [True, False])
def test_batch_norm_that_is_frozen_or_over_another_axis(axis, trainable):
    layer = L.BatchNormalization(axis=axis, trainable=trainable)
    assert_same(model_of(L.Conv2D(4, 3), layer), images_of())


def test_batch_norm_of_vectors_is_left_to_keras():
    assert_same(model_of(L.Flatten(), L.Dense(5), L.BatchNormalization()), images_of(), 3e-4)


@pytest.mark.parametrize(
    "activation",
    ["relu", "relu6", "leaky_relu", "elu", "selu", "sigmoid", "softplus", "tanh", "gelu", "silu"],
)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_an_activation_before_a_pool(activation, inside, padding):
    layers = [L.Conv2D(5, 3, activation=activation if inside else None)]
    if not inside:
        layers.append(L.Activation(activation))
    assert_same(model_of(*layers, L.MaxPooling2D(2, padding=padding)), images_of(), 3e-4)


def test_only_rising_activations_change_places_with_a_pool():
    def operations(activation):
        model = model_of(L.Conv2D(2, 3), L.Activation(activation), L.MaxPooling2D(2))
        spec = tf.TensorSpec([4, *tiny.SHAPE], tf.uint8)
        graph = tf.function(fuse(model)).get_concrete_function(spec).graph
        return [operation.type for operation in graph.get_operations()]

    rising, other = operations("relu"), operations("hard_silu")
    assert rising.index("MaxPool") < rising.index("Relu")
    assert other.index("MaxPool") > other.index("Relu6")
    # Below its minimum at -1.28 silu rises as x falls: the other order would be another function.
    lowest = keras.activations.silu(tf.constant([-5.0, -1.3]))
    assert lowest[0] > lowest[1]
    assert keras.activations.silu not in fusion._RISING
    assert keras.activations.gelu not in fusion._RISING


def test_an_activation_that_is_read_twice_stays_where_it_is():
    inputs = keras.Input(tiny.SHAPE)
    x = L.Conv2D(4, 3, activation="relu")(L.Rescaling(1 / 64, -2)(inputs))
    both = [L.Flatten()(L.MaxPooling2D(2)(x)), L.Flatten()(x)]
    assert_same(keras.Model(inputs, L.Dense(3)(L.Concatenate()(both))), images_of())


def test_relu_layers_before_a_pool():
    for layer in (L.ReLU(), L.ReLU(max_value=1.0), L.ReLU(negative_slope=0.1)):
        assert_same(model_of(L.Conv2D(4, 3), layer, L.MaxPooling2D(2)), images_of())


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("pool", [2, 3, (2, 3), (1, 4), (4, 4), 1])
def test_a_pool_on_a_gpu_is_keras_own(pool, activation, policy, monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: True)
    conv = L.Conv2D(5, 5, activation=activation, dtype=policy)
    model = model_of(conv, L.MaxPooling2D(pool, dtype=policy), policy=policy)
    spec = tf.TensorSpec([4, *tiny.SHAPE], tf.uint8)
    graph = tf.function(fuse(model)).get_concrete_function(spec).graph
    assert "MaxPool" not in [operation.type for operation in graph.get_operations()]
    # bfloat16 makes many equals: all of the gradient goes to the first of them, as Keras has it.
    assert_same(model, images_of(), 3e-4 if policy == "float32" else 2e-2)


def test_of_equals_the_first_has_the_gradient_of_a_pool(monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: True)
    images = tf.constant(np.random.default_rng(0).integers(0, 2, (4, 7, 7, 3)), tf.float32)
    gradients = []
    for pool in (L.MaxPooling2D(2), fusion._tiling_pool(L.MaxPooling2D(2))):
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = pool(images)
        upstream = tf.reshape(tf.range(1.0, 1 + tf.size(outputs, tf.float32)), outputs.shape)
        gradients.append(tape.gradient(outputs, images, upstream).numpy())
    np.testing.assert_array_equal(*gradients)


def test_a_nan_has_the_gradient_of_its_window(monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: True)
    images = tf.constant([[[[1.0], [math.nan]], [[3.0], [2.0]]]])
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = fusion._tiling_pool(L.MaxPooling2D(2))(images)
    # On a CPU XLA's own maximum passes a NaN over.
    assert tape.gradient(outputs, images).numpy().ravel().tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_pool_on_a_gpu_of_another_kind_is_left_to_keras(monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: True)
    for pool in (L.MaxPooling2D(2, padding="same"), L.MaxPooling2D(3, strides=2)):
        assert_same(model_of(L.Conv2D(4, 3), pool), images_of())
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, L.GlobalMaxPooling2D()(L.MaxPooling2D(2)(inputs)))
    images = images_of((9, 8, 3)).astype("float32")
    np.testing.assert_array_equal(fuse(model)(images), model(images))


@pytest.mark.parametrize("options", [{"strides": 2}, {"groups": 2}, {"dilation_rate": 2}])
def test_convolutions_of_all_kinds(options):
    model = model_of(L.Conv2D(4, 3), L.Conv2D(4, 3, activation="relu", **options))
    assert_same(model, images_of())


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [(3, 3), (2, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("large", [False, True])
def test_the_gradient_of_filters_as_a_convolution(padding, size, large, monkeypatch):
    # Compared in float32, where both are exact.
    monkeypatch.setattr(fusion, "_LARGE", 1 if large else 2**40)
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(4, 7, 6, 64)), tf.float32)
    kernel = tf.constant(rng.normal(size=(*size, 64, 5)), tf.float32)
    assert fusion._is_slow_gradient(images.shape, kernel.shape, padding.upper())
    results = []
    own = functools.partial(fusion._convolve, as_convolution=True)
    for function in (own, lambda x, k, p: tf.nn.conv2d(x, k, 1, p)):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            outputs = function(images, kernel, padding.upper())
            loss = tf.reduce_sum(
                outputs
                * tf.sin(tf.reshape(tf.range(tf.size(outputs), dtype=tf.float32), outputs.shape))
            )
        results.append([outputs, *tape.gradient(loss, [images, kernel])])
    for own, plain in zip(*results, strict=True):
        np.testing.assert_allclose(own, plain, rtol=1e-4, atol=1e-3)


def conv_shapes(model):
    """Rows and columns of what each convolution of the training pass computes."""
    forward = tf.function(fuse(model)).get_concrete_function(tf.constant(images_of()))
    operations = forward.graph.get_operations()
    return [tuple(op.outputs[0].shape[1:3]) for op in operations if op.type == "Conv2D"]


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize(
    ("size", "pool", "shape"),
    [
        (3, 2, (6, 6)),
        ((5, 1), 2, (6, 7)),  # one column is as wide as the image: there is no padding to leave out
        (2, 2, (6, 6)),
        (4, (2, 3), (6, 6)),
        (5, 4, (5, 5)),  # as far as the padding goes
        (3, 7, (7, 7)),
    ],
)
def test_what_a_pool_leaves_out_is_not_computed(size, pool, shape, activation, monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: False)
    conv = L.Conv2D(5, size, padding="same", activation=activation)
    model = model_of(L.Conv2D(6, 2), conv, L.MaxPooling2D(pool))
    assert conv.output.shape[1:3] == (7, 7)
    assert conv_shapes(model) == [(7, 7), shape]
    assert_same(model, images_of(), 3e-4)


def test_what_else_is_read_of_a_convolution_is_computed(monkeypatch):
    monkeypatch.setattr(fusion, "has_gpu", lambda: False)

    def whole(*layers):
        return conv_shapes(model_of(L.Conv2D(6, 2), *layers))[1:]

    part = [L.Conv2D(4, 3, padding="same"), L.MaxPooling2D(2)]
    assert whole(*part) == [(6, 6)]
    assert whole(part[0], L.BatchNormalization(), part[1]) == [(7, 7)]
    assert whole(part[0], L.MaxPooling2D(2, padding="same")) == [(7, 7)]
    assert whole(L.Conv2D(4, 3), part[1]) == [(5, 5)]
    assert whole(L.Conv2D(4, 3, padding="same", strides=2), part[1]) == [(4, 4)]
    # A layer that is called twice has two sizes of image.
    twice = L.Conv2D(6, 3, padding="same")
    assert whole(twice, twice, L.ZeroPadding2D(1), twice, part[1]) == [(7, 7), (7, 7), (8, 8)]
    inputs = keras.Input(tiny.SHAPE)
    x = L.Conv2D(4, 3, padding="same")(L.Conv2D(6, 2)(inputs))
    twice = L.Add()([L.Flatten()(x)[:, :36], L.Flatten()(L.MaxPooling2D(2)(x))])
    assert conv_shapes(keras.Model(inputs, twice)) == [(7, 7), (7, 7)]
    monkeypatch.setattr(fusion, "has_gpu", lambda: True)
    assert whole(*part) == [(7, 7)]


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("sides", [(28, 28), (None, None)])
def test_part_of_a_convolution_in_batches_of_any_size(policy, sides):
    model = cnn(
        image_shape=(28, 28, 1),
        filters=(4, 4, 4),
        kernel_size=3,
        padding="same",
        dtype_policy=policy,
        seed=0,
    )
    train_step = make_train_step(model, SGD(0.01))
    signature = [tf.TensorSpec([None, *sides, 1], tf.uint8), tf.TensorSpec([None], tf.int32)]
    whole = train_step.get_concrete_function(*signature)
    before = tiny.weights(model)
    for count in (8, 3):
        sums = whole(tf.constant(images_of((28, 28, 1), count)), tf.zeros([count], tf.int32))
        assert float(sums.examples) == count
    moved = [(a != b).any() for a, b in zip(tiny.weights(model), before, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("as_convolution", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (2, 5), (4, 3)])
def test_part_of_a_convolution_in_bfloat16(as_convolution, size):
    # Of small whole numbers, which bfloat16 and its sums hold exactly.
    rng = np.random.default_rng(0)

    def whole_numbers(*shape):
        return tf.constant(rng.choice([-1, 0, 0, 0, 1], shape), tf.bfloat16)

    images, kernel = whole_numbers(2, 7, 7, 64), whole_numbers(*size, 64, 5)
    upstream = whole_numbers(2, 6, 6, 5)
    pads = fusion._pads_without(kernel.shape, (1, 1))
    part = functools.partial(fusion._convolve, padding=pads, as_convolution=as_convolution)

    def whole(x, k):
        return tf.nn.conv2d(x, k, 1, "SAME")[:, :6, :6]

    results = []
    for function in (part, whole):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            outputs = function(images, kernel)
        gradients = tape.gradient(outputs, [images, kernel], output_gradients=upstream)
        results.append([outputs, *gradients])
    for own, plain in zip(*results, strict=True):
        np.testing.assert_array_equal(tf.cast(own, tf.float32), tf.cast(plain, tf.float32))


@pytest.mark.parametrize("trainable", [False, True])
def test_the_gradient_of_a_bias_sums_in_more_than_bfloat16(trainable):
    # 61,504 ones: bfloat16 itself counts to 256.
    layer = L.Conv2D(4, 2, dtype="mixed_bfloat16")
    inputs = keras.Input((32, 32, 3), batch_size=64)
    model = keras.Model(inputs, layer(inputs))
    layer.trainable = trainable
    layer.bias.trainable = True
    forward = fuse(model)
    # As in a step: where the kernel trains, its gradient brings the bias's with it.
    trained = [variable.value for variable in layer.variables if variable.trainable]
    assert len(trained) == 1 + trainable

    @tf.function
    def gradients(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(forward(images), tf.float32))
        return tape.gradient(loss, trained)

    found = gradients(tf.zeros([64, 32, 32, 3]))[-1]
    np.testing.assert_allclose(found, np.full(4, 64 * 31 * 31), rtol=1e-2)


def test_a_slow_gradient_is_taken_for_one_in_bfloat16_only(monkeypatch):
    def convolutions(policy, amx=False):
        monkeypatch.setattr(fusion, "has_amx", lambda: amx)
        model = model_of(
            L.Conv2D(64, 1, dtype=policy), L.Conv2D(64, 3, dtype=policy), policy=policy
        )
        forward = fuse(model)

        @tf.function
        def gradients(images):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(forward(images))
            return tape.gradient(loss, model.trainable_variables)

        graph = gradients.get_concrete_function(tf.TensorSpec([4, *tiny.SHAPE], tf.uint8)).graph
        return [op.type for op in graph.get_operations()].count("Conv2DBackpropFilter")

    assert convolutions("float32") == 2
    assert convolutions("mixed_bfloat16") == 1
    assert convolutions("mixed_bfloat16", amx=True) == 2


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.3, 1 / 3, 0.999, 1e-4])
def test_dropout_drops_so_many_and_keeps_the_mean(rate):
    layer = L.Dropout(rate, seed=1)
    inputs = keras.Input((100, 30, 7))
    forward = tf.function(fuse(keras.Model(inputs, layer(inputs))))
    outputs = np.concatenate([forward(tf.ones([10, 100, 30, 7])).numpy() for _ in range(4)])
    values = np.unique(outputs)
    assert values[-1] == pytest.approx(1 / (1 - rate), rel=2e-2 if rate == 0.999 else 1e-4)
    assert set(values) <= {0.0, values[-1]}
    dropped = (outputs == 0).mean()
    # Five standard deviations of a fair draw.
    assert abs(dropped - rate) < 5 * math.sqrt(rate * (1 - rate) / outputs.size) + 2**-17
    # No two images, and no two calls, drop the same.
    kept = {image.tobytes() for image in outputs}
    assert len(kept) == len(outputs) or rate == 1e-4


def test_dropout_draws_by_its_own_seed_and_goes_on_from_its_state():
    def draws(layer, calls):
        inputs = keras.Input((4, 4, 3))
        forward = tf.function(fuse(keras.Model(inputs, layer(inputs))))
        return [forward(tf.ones([8, 4, 4, 3])).numpy().tobytes() for _ in range(calls)]

    whole = draws(L.Dropout(0.5, seed=7), 4)
    assert len(set(whole)) == 4
    assert draws(L.Dropout(0.5, seed=8), 1)[0] != whole[0]
    layer = L.Dropout(0.5, seed=7)
    assert draws(layer, 2) + draws(layer, 2) == whole


def test_dropout_of_an_odd_number_of_elements_and_its_gradient():
    for shape, rate in (((3, 3, 3), 0.5), ((5, 1, 3), 0.3)):
        inputs = keras.Input(shape)
        forward = fuse(keras.Model(inputs, L.Dropout(rate, seed=2)(inputs)))
        images = tf.ones([3, *shape])
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = forward(images)
            loss = tf.reduce_sum(outputs)
        # Ones in: what comes out is the mask, and so is the gradient.
        np.testing.assert_array_equal(tape.gradient(loss, images), outputs)


@pytest.mark.parametrize("name", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_by_xla(name, dtype):
    plain = keras.activations.get(name)
    own = fusion._XLA_ACTIVATIONS[plain]
    exact = tf.linspace(tf.constant(-12.0, tf.float64), 12.0, 4001)
    x = tf.cast(exact, dtype)
    with tf.GradientTape() as tape, tf.GradientTape() as reference_tape:
        tape.watch(x)
        reference = tf.cast(x, tf.float64)
        reference_tape.watch(reference)
        outputs, expected = own(x), plain(reference)
    assert outputs.dtype == dtype
    tolerance = 2e-6 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(
        tf.cast(outputs, tf.float64), expected, rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(
        tf.cast(tape.gradient(outputs, x), tf.float64),
        reference_tape.gradient(expected, reference),
        rtol=tolerance,
        atol=2 * tolerance,
    )


def test_a_sequential_model_is_looked_into(monkeypatch):
    model = keras.Sequential(
        [keras.Input(tiny.SHAPE), L.Conv2D(4, 3), L.BatchNormalization(), L.Flatten(), L.Dense(3)]
    )
    seen = []
    make = fusion._batch_norm
    monkeypatch.setattr(
        fusion, "_batch_norm", lambda layer, training: seen.append(layer) or make(layer, training)
    )
    assert_same(model, images_of() / np.float32(255), 3e-4)
    assert seen == [model.layers[1]]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(3)

    def call(self, images, training=False):
        return self.dense(tf.reshape(images, [-1, 192])) * (2.0 if training else 1.0)


def test_a_model_without_a_graph_runs_as_it_is():
    model = Subclassed()
    images = tf.ones([2, *tiny.SHAPE])
    model(images)
    np.testing.assert_array_equal(fuse(model)(images), model(images, training=True))


def test_activity_regularisation_is_left_to_keras():
    model = model_of(L.Conv2D(4, 3, activity_regularizer="l2"), L.BatchNormalization())
    step = make_train_step(model, SGD(0.0))
    plain = make_train_step(model, SGD(0.0), fused=False)
    images, labels = images_of(), np.zeros(16, np.int32)
    assert float(step(images, labels).loss) == pytest.approx(float(plain(images, labels).loss))
    assert float(step(images, labels).loss) > 16 * math.log(3) + 1


def test_weight_regularisation_is_in_the_loss():
    model = tiny.tiny_cnn(l2=0.1, batch_norm_momentum=0.5)
    images, labels = images_of(), np.zeros(16, np.int32)
    losses = [
        float(make_train_step(model, SGD(0.0), fused=fused)(images, labels).loss)
        for fused in (True, False)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_model_itself_is_not_changed(tmp_path):
    model = tiny.tiny_cnn(dropout=0.5, batch_norm_momentum=0.5, activation="gelu")
    before, images = model.get_config(), images_of().astype(np.float32)
    outputs = model(images, training=False)
    fuse(model)(images_of())
    assert model.get_config() == before
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    for variable in model.variables:
        if "moving" in variable.path:
            variable.assign(
                tf.zeros_like(variable) if "mean" in variable.path else tf.ones_like(variable)
            )
    np.testing.assert_array_equal(model(images, training=False), outputs)


def test_training_argument_of_a_call_is_overridden_as_keras_does():
    inputs = keras.Input(tiny.SHAPE)
    x = L.SpatialDropout2D(0.5, seed=1)(inputs, training=False)
    outputs = fuse(keras.Model(inputs, x))(np.ones((2, *tiny.SHAPE), np.uint8)).numpy()
    assert (outputs == 0).any()


class Block(L.Layer):
    """As many write a layer: its own call says nothing of training, the layers inside mind it."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = L.BatchNormalization(), L.Dropout(0.5, seed=1)

    def call(self, x):
        return self.drop(self.norm(x))


class Doubled(keras.Model):
    def call(self, images, training=None):
        return 2 * super().call(images, training=training)


def test_layers_inside_a_layer_that_says_nothing_of_training_train():
    block = Block()
    model = model_of(block)
    outputs = fuse(keras.Model(model.inputs[0], model.layers[-3].output))(images_of()).numpy()
    assert (outputs == 0).mean() == pytest.approx(0.5, abs=0.05)
    assert np.abs(block.norm.moving_mean).max() > 0


def test_a_call_of_ones_own_is_called():
    inputs = keras.Input(tiny.SHAPE)
    outputs = L.Dense(3)(L.Flatten()(inputs))
    model = Doubled(inputs, outputs)
    images = images_of().astype(np.float32)
    np.testing.assert_array_equal(fuse(model)(images), model(images, training=True))
    np.testing.assert_allclose(fuse(model)(images), 2 * keras.Model(inputs, outputs)(images))


class Unchanged(keras.Model):
    """Adds nothing to how a model is called."""


def test_whose_call_it_is():
    inputs = keras.Input(tiny.SHAPE)
    outputs = L.Dense(3)(L.Flatten()(inputs))
    for kind in (keras.Model, Unchanged):
        assert fusion._is_known(kind(inputs, outputs))
    assert fusion._is_known(keras.Sequential([inputs, L.Flatten()]))
    assert not fusion._is_known(Doubled(inputs, outputs))
    assert not fusion._is_known(Subclassed())


def test_importing_builds_nothing(monkeypatch):
    # It would take time, and numbers from the names that Keras gives.
    monkeypatch.setattr(L.Layer, "__call__", None)
    monkeypatch.setattr(keras, "Model", None)
    monkeypatch.setattr(keras, "Input", None)
    assert callable(runpy.run_path(fusion.__file__)["fuse"])


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_told_to_train_or_not(training):
    inputs = keras.Input(tiny.SHAPE)
    x = L.BatchNormalization()(L.Conv2D(4, 3)(L.Rescaling(1 / 64, -2)(inputs)), training=training)
    assert_same(keras.Model(inputs, L.Dense(3)(L.Flatten()(x))), images_of(), 3e-4)


def test_a_list_of_one_output_is_that_output():
    inputs = keras.Input(tiny.SHAPE)
    model = keras.Model(inputs, [L.Dense(3)(L.Flatten()(inputs))])
    assert fuse(model)(images_of()).shape == (16, 3)
    assert float(make_train_step(model, SGD(0.0))(images_of(), np.zeros(16, np.int32)).examples)


def test_images_of_unknown_sides():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, L.Dropout(0.5, seed=1)(L.Conv2D(3, 3)(inputs)))
    forward = tf.function(fuse(model), input_signature=[tf.TensorSpec([None, None, None, 3])])
    assert (forward(tf.ones([2, 8, 9, 3])).numpy() == 0).mean() == pytest.approx(0.5, abs=0.15)


def test_a_pool_in_another_precision_keeps_it():
    layers = [
        L.Conv2D(4, 3, activation="relu", dtype="mixed_bfloat16"),
        L.MaxPooling2D(2, dtype="float32"),
    ]
    model = model_of(*layers)
    pooled = keras.Model(model.inputs[0], layers[-1].output)
    assert fuse(pooled)(images_of()).dtype == pooled(images_of()).dtype


def test_float64_stays_float64():
    x = np.linspace(-3, 3, 100)
    exact = {
        "gelu": x * [0.5 * math.erfc(-each / math.sqrt(2)) for each in x],
        "silu": x / (1 + np.exp(-x)),
    }
    for name, expected in exact.items():
        own = fusion._XLA_ACTIVATIONS[keras.activations.get(name)]
        np.testing.assert_allclose(own(tf.constant(x)), expected, rtol=1e-12, atol=1e-15)
