"""The builders: the lab's sizes and layers, every option, saving, and bad arguments."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from cifarflow.errors import ConfigError, DataError
from cifarflow.models.cnn import cnn, final
from cifarflow.models.layers import CIFAR10_MEAN, CIFAR10_STD
from cifarflow.models.mlp import mlp
from cifarflow.models.resnet import resnet
from cifarflow.models.speednet import speednet

LAB = {
    "mlp": (mlp, {}, 1_707_274, 0),
    "cnn": (cnn, {}, 714_202, 0),
    "dropout": (cnn, {"dropout": (0.25, 0.25, 0.5)}, 714_202, 0),
    "batchnorm": (
        cnn,
        {"dropout": (0.25, 0.25, 0.5), "batch_norm_momentum": 0.75},
        715_930,
        864,
    ),
    "final": (final, {}, 1_856_650, 1_408),
}
# The same families, small enough to be built by the dozen.
SMALL = {
    "mlp": (mlp, {"units": (6, 5)}),
    "cnn": (cnn, {"filters": (4, 3), "dense_units": 5}),
    "final": (final, {"filters": (4, 3), "dense_units": 5}),
    "resnet": (resnet, {"depth": 6, "widths": (4, 6)}),
    "speednet": (speednet, {"widths": (28, 30)}),
}
each_family = pytest.mark.parametrize("family", SMALL)
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def build(family, **options):
    builder, small = SMALL[family]
    return builder(**{**small, **options})


def an_image_batch(shape=(32, 32, 3), count=6):
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def outputs(model, images=None, *, training=False):
    images = an_image_batch() if images is None else images
    return model(images, training=training).numpy().astype(np.float32)


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def kinds(model):
    """The layers in order, without the activations' names."""
    return [type(layer).__name__ for layer in model.layers]


def same_weights(model, other):
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return [bool((a == b).all()) for a, b in pairs]


def is_drawn(weight):
    """Whether it is a kernel, and not one that starts as the identity throughout."""
    return weight.ndim > 1 and not np.isin(weight, [0, 1]).all()


# -------------------------------------------------------------------------------- the lab's models


@pytest.mark.parametrize("name", LAB)
def test_parameter_counts_are_the_labs(name):
    builder, options, parameters, not_trainable = LAB[name]
    model = builder(**options)
    assert model.count_params() == parameters
    assert sum(int(np.prod(w.shape)) for w in model.non_trainable_weights) == not_trainable
    assert model.input_shape == (None, 32, 32, 3)
    assert model.output_shape == (None, 10)


def test_mlp_has_the_labs_layers():
    model = mlp()
    assert kinds(model) == ["InputLayer", "Rescaling", "Flatten", "Dense", "Dense", "Dense"]
    dense = layers_of(model, keras.layers.Dense)
    assert [layer.units for layer in dense] == [512, 256, 10]
    assert [layer.activation.__name__ for layer in dense] == ["tanh", "tanh", "linear"]


def test_cnn_has_the_labs_layers():
    model = cnn()
    block = ["Conv2D", "MaxPooling2D"]
    assert kinds(model) == ["InputLayer", "Rescaling", *block, *block, "Flatten", "Dense", "Dense"]
    convolutions = layers_of(model, keras.layers.Conv2D)
    assert [layer.filters for layer in convolutions] == [96, 80]
    assert all(layer.kernel_size == (5, 5) for layer in convolutions)
    assert all(layer.strides == (1, 1) for layer in convolutions)
    assert all(layer.padding == "valid" for layer in convolutions)
    assert all(layer.activation.__name__ == "relu" for layer in convolutions)
    assert [layer.output.shape[1:] for layer in model.layers[2:7]] == [
        (28, 28, 96),
        (14, 14, 96),
        (10, 10, 80),
        (5, 5, 80),
        (2000,),
    ]
    hidden, logits = layers_of(model, keras.layers.Dense)
    assert (hidden.units, hidden.activation.__name__) == (256, "relu")
    assert (logits.units, logits.activation.__name__) == (10, "linear")


def test_dropout_comes_after_each_pool_and_after_the_hidden_layer():
    model = cnn(dropout=(0.25, 0.2, 0.5))
    block = ["Conv2D", "MaxPooling2D", "Dropout"]
    ends = ["Flatten", "Dense", "Dropout", "Dense"]
    assert kinds(model) == ["InputLayer", "Rescaling", *block, *block, *ends]
    assert [layer.rate for layer in layers_of(model, keras.layers.Dropout)] == [0.25, 0.2, 0.5]


@pytest.mark.parametrize(
    ("model", "momentum", "rates", "widths"),
    [
        (
            lambda: LAB["batchnorm"][0](**LAB["batchnorm"][1]),
            0.75,
            [0.25, 0.25, 0.5],
            (96, 80, 256),
        ),
        (final, 0.8, [0.25, 0.3, 0.5], (64, 128, 512)),
    ],
    ids=["section 4.2", "section 5"],
)
def test_batch_norm_comes_before_each_activation(model, momentum, rates, widths):
    model = model()
    block = ["Conv2D", "BatchNormalization", "Activation", "MaxPooling2D", "Dropout"]
    ends = ["Flatten", "Dense", "BatchNormalization", "Activation", "Dropout", "Dense"]
    assert kinds(model) == ["InputLayer", "Rescaling", *block, *block, *ends]
    norms = layers_of(model, keras.layers.BatchNormalization)
    assert [layer.momentum for layer in norms] == [momentum] * 3
    assert [layer.epsilon for layer in norms] == [1e-3] * 3
    assert [layer.output.shape[-1] for layer in norms] == list(widths)
    assert [layer.rate for layer in layers_of(model, keras.layers.Dropout)] == rates
    activations = layers_of(model, keras.layers.Activation)
    assert [layer.activation.__name__ for layer in activations] == ["relu"] * 3
    # Nothing is activated twice.
    for layer in layers_of(model, (keras.layers.Conv2D, keras.layers.Dense)):
        assert layer.activation.__name__ == "linear"


def test_initial_weights_are_kerass_defaults():
    model = cnn(seed=0)
    for layer in layers_of(model, (keras.layers.Conv2D, keras.layers.Dense)):
        kernel = layer.kernel.numpy()
        receptive = np.prod(kernel.shape[:-2], dtype=int)
        limit = np.sqrt(6 / (receptive * sum(kernel.shape[-2:])))
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert abs(kernel.std() / (limit / np.sqrt(3)) - 1) < 0.05
        np.testing.assert_array_equal(layer.bias, 0)


def test_mlp_computes_what_the_lab_says():
    model = mlp(units=(7,), seed=0)
    kernel, bias, last, offset = model.get_weights()
    images = an_image_batch()
    hidden = np.tanh((images / 255).reshape(len(images), -1) @ kernel + bias)
    np.testing.assert_allclose(outputs(model), hidden @ last + offset, atol=1e-5)


def test_final_is_cnn_with_other_defaults_each_of_which_can_be_overridden():
    assert final().name == "final"
    model = final(filters=(4,), dropout=(0.1, 0.2), batch_norm_momentum=None, dense_units=3)
    other = cnn(filters=(4,), dropout=(0.1, 0.2), dense_units=3)
    assert kinds(model) == kinds(other)
    assert model.count_params() == other.count_params()
    with pytest.raises(TypeError, match="nonsense"):
        final(nonsense=1)


# ----------------------------------------------------------------------- options of all families


@each_family
def test_logits_unless_softmax_is_asked_for(family):
    model, with_softmax = build(family, seed=0), build(family, seed=0, softmax=True)
    logits, probabilities = outputs(model), outputs(with_softmax)
    assert (logits < 0).any()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, exp / exp.sum(axis=1, keepdims=True), atol=1e-6)
    assert with_softmax.layers[-1].name == "probabilities"
    assert model.layers[-1].name == with_softmax.layers[-2].name == "logits"


@each_family
@pytest.mark.parametrize("policy", POLICIES)
def test_every_layer_has_the_policy_and_the_global_one_stays(family, policy):
    before = keras.config.dtype_policy()
    model = build(family, dtype_policy=policy, softmax=True, dropout=0.5)
    assert keras.config.dtype_policy() == before
    # The input is scaled in float32 for the whitening of speednet, which would enlarge a rounding.
    exact = 2 if family == "speednet" else 0
    policies = [layer.dtype_policy.name for layer in model.layers[1:-1]]
    assert policies == ["float32"] * exact + [policy] * (len(policies) - exact)
    compute = "float32" if policy == "float32" else policy.removeprefix("mixed_")
    assert model.layers[-2].output.dtype == compute
    # Weights stay float32, and so do probabilities: half precision has too few digits.
    assert {variable.dtype for variable in model.weights} == {"float32"}
    assert model.layers[-1].dtype_policy.name == "float32"
    probabilities = model(an_image_batch()).numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


@each_family
def test_a_policy_object_will_do_as_well(family):
    model = build(family, dtype_policy=keras.DTypePolicy("mixed_bfloat16"))
    assert model.layers[-1].dtype_policy.name == "mixed_bfloat16"


@each_family
def test_the_global_policy_does_not_reach_in(family):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = build(family, dtype_policy="float32", dropout=0.5)
    finally:
        keras.config.set_dtype_policy(before)
    assert {layer.dtype_policy.name for layer in model.layers[1:]} == {"float32"}


@each_family
def test_mixed_outputs_are_close_to_float32(family):
    expected = outputs(build(family, seed=0))
    for policy in POLICIES[1:]:
        mixed = outputs(build(family, seed=0, dtype_policy=policy)).astype(np.float32)
        np.testing.assert_allclose(mixed, expected, atol=0.05 * np.abs(expected).max())


@each_family
def test_uint8_and_float_images_give_the_same_outputs(family):
    model = build(family, seed=0)
    images = an_image_batch()
    np.testing.assert_array_equal(outputs(model, images.astype(np.float32)), outputs(model, images))


@each_family
def test_the_seed_decides_weights_and_dropout_masks(family):
    options = {"dropout": 0.5}
    first, again = build(family, seed=3, **options), build(family, seed=3, **options)
    assert all(same_weights(first, again))
    # The masks too, one after the other.
    for _ in range(2):
        mine = outputs(first, training=True)
        np.testing.assert_array_equal(mine, outputs(again, training=True))
    assert (mine != outputs(first, training=True)).any()

    other = build(family, seed=4, **options)
    kernels = [i for i, w in enumerate(first.get_weights()) if is_drawn(w)]
    assert not any(same_weights(first, other)[i] for i in kernels)
    other.set_weights(first.get_weights())
    fresh = build(family, seed=3, **options)
    assert (outputs(other, training=True) != outputs(fresh, training=True)).any()


@each_family
def test_the_seed_leaves_no_two_kernels_alike(family):
    model = build(family, seed=0)
    kernels = [w for w in model.get_weights() if is_drawn(w)]
    assert len({kernel.ravel()[-4:].tobytes() for kernel in kernels}) == len(kernels)


@each_family
def test_without_a_seed_every_model_differs(family):
    first, second = build(family), build(family)
    assert not all(same_weights(first, second))
    # Keras's own seed still reaches them.
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(1)
        models.append(build(family))
    assert all(same_weights(*models))


@each_family
def test_building_with_a_seed_leaves_the_global_generators_alone(family):
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    build(family, seed=5)
    assert np.random.random() == expected


@each_family
def test_l2_is_in_the_models_losses(family):
    model = build(family, l2=0.01)
    kernels = [w.numpy() for w in model.trainable_weights if len(w.shape) > 1]
    assert len(model.losses) == len(kernels)
    expected = 0.01 * sum((kernel.astype(np.float64) ** 2).sum() for kernel in kernels)
    np.testing.assert_allclose(sum(float(loss) for loss in model.losses), expected, rtol=1e-5)
    assert build(family).losses == []
    assert build(family, l2=0).losses == []


@each_family
@pytest.mark.parametrize("activation", ["elu", "gelu", keras.activations.silu, lambda x: x * 2])
def test_any_activation(family, activation):
    model = build(family, activation=activation)
    wanted = keras.activations.get(activation)
    used = [
        layer.activation
        for layer in model.layers
        if getattr(layer, "activation", keras.activations.linear) is not keras.activations.linear
    ]
    count = {"mlp": 2, "cnn": 3, "final": 3, "resnet": 5, "speednet": 5}[family]
    assert used == [wanted] * count


def test_activations_change_the_outputs():
    weights = cnn(filters=(4,), dense_units=5, seed=0).get_weights()
    results = []
    for activation in ("relu", "tanh", "gelu"):
        model = cnn(filters=(4,), dense_units=5, activation=activation)
        model.set_weights(weights)
        results.append(outputs(model))
    assert (results[0] != results[1]).any()
    assert (results[0] != results[2]).any()


@each_family
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 24, 4), (17, 21, 3)])
def test_other_images_and_other_class_counts(family, shape):
    model = build(family, image_shape=shape, num_classes=7)
    assert model.input_shape == (None, *shape)
    result = outputs(model, an_image_batch(shape))
    assert result.shape == (6, 7)
    assert np.isfinite(result).all()


@each_family
def test_names(family):
    assert build(family).name == family
    assert build(family, name="mine").name == "mine"
    assert build(family).input.name == "images"


@each_family
def test_two_models_share_nothing(family):
    first, second = build(family, seed=0), build(family, seed=0)
    first.set_weights([w + 1 for w in first.get_weights()])
    assert not any(same_weights(first, second))


# ------------------------------------------------------------------------------- mlp's and cnn's


def test_one_dropout_rate_serves_all_places():
    assert [d.rate for d in layers_of(mlp(units=(4, 3), dropout=0.2), keras.layers.Dropout)] == [
        0.2,
        0.2,
    ]
    assert [d.rate for d in layers_of(build("cnn", dropout=0.1), keras.layers.Dropout)] == [0.1] * 3
    # A rate of 0 adds no layer.
    model = mlp(units=(4, 3), dropout=[0, 0.3])
    assert [layer.rate for layer in layers_of(model, keras.layers.Dropout)] == [0.3]
    assert kinds(model)[3:] == ["Dense", "Dense", "Dropout", "Dense"]


def test_a_single_size_need_not_be_a_tuple():
    assert [d.units for d in layers_of(mlp(units=9), keras.layers.Dense)] == [9, 10]
    assert [c.filters for c in layers_of(cnn(filters=9), keras.layers.Conv2D)] == [9]
    assert [d.units for d in layers_of(mlp(units=[9, 8]), keras.layers.Dense)] == [9, 8, 10]


@pytest.mark.parametrize(
    ("pooling", "reduce"),
    [
        ("average", lambda x: x.mean(axis=(1, 2))),
        ("max", lambda x: x.max(axis=(1, 2))),
        ("flatten", lambda x: x.reshape(len(x), -1)),
    ],
)
def test_pooling_turns_the_image_into_a_vector(pooling, reduce):
    model = cnn(filters=(4, 3), dense_units=0, pooling=pooling, seed=0)
    place = [index for index, kind in enumerate(kinds(model)) if "Pooling" in kind]
    before = model.layers[kinds(model).index("MaxPooling2D", place[0] + 1)]
    features = outputs(keras.Model(model.input, before.output))
    assert features.shape == (6, 5, 5, 3)
    kernel, bias = model.layers[-1].get_weights()
    np.testing.assert_allclose(outputs(model), reduce(features) @ kernel + bias, atol=1e-5)


def test_padding_same_keeps_the_size_of_the_image():
    model = cnn(filters=(4, 3), kernel_size=3, padding="same")
    convolutions = layers_of(model, keras.layers.Conv2D)
    assert [layer.output.shape[1:3] for layer in convolutions] == [(32, 32), (16, 16)]
    assert all(layer.kernel_size == (3, 3) for layer in convolutions)


def test_without_the_hidden_layer_the_image_goes_to_the_classifier():
    model = cnn(filters=(4, 3), dense_units=0, dropout=(0.1, 0.2), batch_norm_momentum=0)
    assert kinds(model)[-2:] == ["Flatten", "Dense"]
    assert [layer.rate for layer in layers_of(model, keras.layers.Dropout)] == [0.1, 0.2]
    assert [n.momentum for n in layers_of(model, keras.layers.BatchNormalization)] == [0, 0]


def test_batch_norm_uses_the_batch_in_training_and_its_memory_after():
    model = build("final", seed=0)
    images = an_image_batch()
    before = outputs(model, images)
    norm = layers_of(model, keras.layers.BatchNormalization)[0]
    assert (norm.moving_mean.numpy() == 0).all()
    outputs(model, images, training=True)
    features = outputs(keras.Model(model.input, norm.input), images)
    np.testing.assert_allclose(
        norm.moving_mean.numpy(), 0.2 * features.mean(axis=(0, 1, 2)), rtol=1e-3
    )
    assert (outputs(model, images) != before).any()


# ------------------------------------------------------------------------------------- resnet


def test_resnet_has_its_documented_size():
    model = resnet()
    assert model.count_params() == 274_042
    convolutions = layers_of(model, keras.layers.Conv2D)
    along = [layer for layer in convolutions if layer.kernel_size == (3, 3)]
    shortcuts = [layer for layer in convolutions if layer.kernel_size == (1, 1)]
    assert len(along) + 1 == 20  # and the classifier
    assert [layer.filters for layer in along] == [16] * 7 + [32] * 6 + [64] * 6
    assert [layer.strides for layer in along] == (
        [(1, 1)] * 7 + [(2, 2)] + [(1, 1)] * 5 + [(2, 2)] + [(1, 1)] * 5
    )
    assert [(s.filters, s.strides) for s in shortcuts] == [(32, (2, 2)), (64, (2, 2))]
    assert not any(layer.use_bias for layer in convolutions)
    assert len(layers_of(model, keras.layers.BatchNormalization)) == len(convolutions)
    assert len(layers_of(model, keras.layers.GlobalAveragePooling2D)) == 1
    # The size again, from the formula: kernels, BatchNorm's four numbers a filter, classifier.
    kernels = 9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2)
    kernels += 16 * 32 + 32 * 64
    norms = 4 * (7 * 16 + 7 * 32 + 7 * 64)
    assert kernels + norms + 64 * 10 + 10 == 274_042


@pytest.mark.parametrize(
    ("depth", "widths", "blocks"),
    [(8, (4, 6, 8), 3), (14, (4, 6, 8), 6), (4, 5, 1), (10, (4, 4), 4), (10, (3, 4, 5, 6), 4)],
)
def test_depth_and_widths_of_a_resnet(depth, widths, blocks):
    model = resnet(depth=depth, widths=widths)
    additions = layers_of(model, keras.layers.Add)
    assert len(additions) == blocks
    along = [c for c in layers_of(model, keras.layers.Conv2D) if c.kernel_size == (3, 3)]
    assert len(along) + 1 == depth
    sizes = widths if isinstance(widths, tuple) else (widths,)
    each = blocks // len(sizes)
    shapes = [(32 // 2**s, 32 // 2**s, w) for s, w in enumerate(sizes) for _ in range(each)]
    for addition, shape in zip(additions, shapes, strict=True):
        first, second = addition.input
        assert first.shape == second.shape == (None, *shape)


def test_the_shortcut_is_the_identity_where_shapes_allow():
    model = resnet(depth=4, widths=(4,), seed=0)
    [addition] = layers_of(model, keras.layers.Add)
    main, shortcut = addition.input
    # What goes round the block is what goes into it: the stem's activation.
    assert shortcut is layers_of(model, keras.layers.Activation)[0].output
    assert main is not shortcut


def test_resnet_normalises_by_the_statistics_of_cifar10(some_images):
    model = resnet(depth=4, widths=(4,))
    rescaled = keras.Model(model.input, model.layers[1].output)
    images = some_images[0][:500]
    expected = (images / 255 - CIFAR10_MEAN) / CIFAR10_STD
    np.testing.assert_allclose(outputs(rescaled, images), expected, atol=1e-5)
    grey = resnet(depth=4, widths=(4,), image_shape=(8, 8, 1))
    rescaled = keras.Model(grey.input, grey.layers[1].output)
    extremes = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(outputs(rescaled, extremes)[:, 0, 0, 0], [-2, 2], atol=1e-6)


def test_resnet_momentum_and_dropout():
    model = resnet(depth=4, widths=(4,), batch_norm_momentum=0.6, dropout=0.4)
    norms = layers_of(model, keras.layers.BatchNormalization)
    assert {norm.momentum for norm in norms} == {0.6}
    assert kinds(model)[-3:] == ["GlobalAveragePooling2D", "Dropout", "Dense"]
    assert model.layers[-2].rate == 0.4
    default = resnet(depth=4, widths=(4,))
    assert {norm.momentum for norm in layers_of(default, keras.layers.BatchNormalization)} == {0.9}
    assert not layers_of(default, keras.layers.Dropout)


# ------------------------------------------------------------------------------------- saving

LOAD = """
import pathlib, sys
import keras
import numpy as np

images = np.load("images.npy")
for path in sorted(pathlib.Path().glob("*.keras")):
    model = keras.saving.load_model(path)
    np.save(path.with_suffix(".loaded.npy"), model(images).numpy())
assert not any(name.partition(".")[0] == "cifarflow" for name in sys.modules)
"""


# Keras reads its variables in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_saved_model_loads_without_this_library(tmp_path):
    images = an_image_batch()
    np.save(tmp_path / "images.npy", images)
    expected = {}
    for family in SMALL:
        for policy in POLICIES[:2]:
            options = {"activation": "gelu", "dropout": 0.2, "l2": 1e-4, "softmax": True}
            model = build(family, dtype_policy=policy, seed=0, **options)
            name = f"{family}-{policy}"
            model.save(tmp_path / f"{name}.keras")
            expected[name] = outputs(model, images)
    # Isolated: neither this folder nor PYTHONPATH is where it could find the library.
    run = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(LOAD)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name, outputs_before in expected.items():
        loaded = np.load(tmp_path / f"{name}.loaded.npy")
        np.testing.assert_allclose(loaded, outputs_before, atol=1e-6, err_msg=name)


# ------------------------------------------------------------------------------- bad arguments

BAD_FOR_ALL = [
    ({"num_classes": 1}, ConfigError, "num_classes must be a whole number >= 2, not 1"),
    ({"num_classes": 10.0}, ConfigError, "num_classes must be a whole number >= 2, not 10.0"),
    ({"activation": "rulu"}, ConfigError, "activation must be .* not 'rulu'"),
    ({"activation": 3}, ConfigError, "activation must be .* not 3"),
    ({"dropout": 1.0}, ConfigError, "dropout must be .* >= 0 and < 1, not 1.0"),
    ({"dropout": -0.1}, ConfigError, "dropout must be .* >= 0 and < 1, not -0.1"),
    ({"dropout": float("nan")}, ConfigError, "dropout must be .* not nan"),
    ({"dropout": "0.5"}, ConfigError, "dropout must be .* not '0.5'"),
    ({"dropout": None}, ConfigError, "dropout must be .* not None"),
    ({"l2": -1e-9}, ConfigError, "l2 must be a finite number >= 0, not -1e-09"),
    ({"l2": float("inf")}, ConfigError, "l2 must be a finite number >= 0, not inf"),
    ({"dtype_policy": "float8"}, ConfigError, "dtype_policy must be .* not 'float8'"),
    ({"dtype_policy": "auto"}, ConfigError, "dtype_policy must be .* not 'auto'"),
    ({"dtype_policy": 16}, ConfigError, "dtype_policy must be .* not 16"),
    ({"seed": -1}, ConfigError, "seed must be .* not -1"),
    ({"seed": 2**31}, ConfigError, "seed must be .* not 2147483648"),
    ({"seed": 0.5}, ConfigError, "seed must be .* not 0.5"),
    ({"image_shape": (32, 32)}, DataError, r"image_shape must be .* not \(32, 32\)"),
    ({"image_shape": (32, 32, 3, 1)}, DataError, r"image_shape must be .* not \(32, 32, 3, 1\)"),
    ({"image_shape": (0, 32, 3)}, DataError, r"image_shape must be .* not \(0, 32, 3\)"),
    ({"image_shape": (32, 32.0, 3)}, DataError, r"image_shape must be .* not \(32, 32.0, 3\)"),
    ({"image_shape": None}, DataError, "image_shape must be .* not None"),
    ({"image_shape": 32}, DataError, "image_shape must be .* not 32"),
    ({"image_shape": ()}, DataError, r"image_shape must be .* not \(\)"),
]


@pytest.mark.parametrize("builder", [mlp, cnn, final, resnet, speednet])
@pytest.mark.parametrize(("options", "error", "message"), BAD_FOR_ALL)
def test_bad_arguments_of_every_builder(builder, options, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        builder(**options)


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        (mlp, {"units": ()}, r"units must hold at least one size, not \(\)"),
        (mlp, {"units": (4, 0)}, "units must be a whole number >= 1, not 0"),
        (mlp, {"units": "512"}, "units must be a whole number >= 1, not '512'"),
        (mlp, {"units": None}, "units must be a whole number >= 1, not None"),
        (mlp, {"units": np.array([4, 3])}, "units must be a whole number >= 1, not array"),
        (mlp, {"dropout": (0.1,)}, "dropout must be 2 rates, one for each block, not"),
        (mlp, {"dropout": (0.1, 1.5)}, "dropout must be .* not 1.5"),
        (cnn, {"filters": []}, r"filters must hold at least one size, not \[\]"),
        (cnn, {"filters": (8, -1)}, "filters must be a whole number >= 1, not -1"),
        (cnn, {"filters": 8.0}, "filters must be a whole number >= 1, not 8.0"),
        (cnn, {"kernel_size": 0}, "kernel_size must be a whole number >= 1, not 0"),
        (cnn, {"kernel_size": (3, 3)}, r"kernel_size must be .* not \(3, 3\)"),
        (cnn, {"padding": "full"}, "padding must be valid or same, not 'full'"),
        (cnn, {"padding": None}, "padding must be valid or same, not None"),
        (cnn, {"dense_units": -1}, "dense_units must be a whole number >= 0, not -1"),
        (cnn, {"dense_units": 2.5}, "dense_units must be a whole number >= 0, not 2.5"),
        (cnn, {"batch_norm_momentum": 1.0}, "batch_norm_momentum must be .* < 1, not 1.0"),
        (cnn, {"batch_norm_momentum": -0.5}, "batch_norm_momentum must be .* not -0.5"),
        (cnn, {"batch_norm_momentum": "0.9"}, "batch_norm_momentum must be .* not '0.9'"),
        (cnn, {"pooling": "mean"}, "pooling must be one of flatten, average, max, not 'mean'"),
        (cnn, {"pooling": None}, "pooling must be one of flatten, average, max, not None"),
        (cnn, {"pooling": ["max"]}, r"pooling must be one of .* not \['max'\]"),
        (cnn, {"dropout": (0.1, 0.2)}, "dropout must be 3 rates, one for each block, not"),
        (cnn, {"dropout": (0.1,) * 3, "dense_units": 0}, "dropout must be 2 rates, one for each"),
        (final, {"filters": (4,)}, "dropout must be 2 rates, one for each block, not"),
        (cnn, {"image_shape": (4, 32, 3)}, "the image is 4x32 pixels before a 5x5 convolution"),
        (cnn, {"filters": (4, 4, 4, 4)}, "the image is 1x1 pixels before a 2x2 pool"),
        (cnn, {"filters": (4, 4), "kernel_size": 14}, "9x9 pixels before a 14x14 convolution"),
        (cnn, {"filters": (4,) * 6, "padding": "same"}, "the image is 1x1 pixels before a 2x2"),
        (resnet, {"depth": 9}, "depth must be 6 . n . 2, such as 8, 14 or 20, not 9"),
        (resnet, {"depth": 2}, "depth must be 6 . n . 2, such as 8, 14 or 20, not 2"),
        (resnet, {"depth": 8, "widths": (4, 8)}, "depth must be 4 .* such as 6, 10 or 14, not 8"),
        (resnet, {"depth": 0}, "depth must be a whole number >= 1, not 0"),
        (resnet, {"depth": 8.0}, "depth must be a whole number >= 1, not 8.0"),
        (resnet, {"widths": ()}, r"widths must hold at least one size, not \(\)"),
        (resnet, {"widths": (16, 0, 64)}, "widths must be a whole number >= 1, not 0"),
        (resnet, {"batch_norm_momentum": 1}, "batch_norm_momentum must be .* < 1, not 1"),
        (resnet, {"batch_norm_momentum": None}, "batch_norm_momentum must be .* not None"),
        (resnet, {"dropout": (0.1,)}, r"dropout must be .* not \(0.1,\)"),
    ],
)
def test_bad_arguments_of_one_builder(builder, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        builder(**options)
    assert "\n" not in str(caught.value)
