"""`learning_rate_scales` and `scaled_velocity` of SGD: by hand, and against a NumPy reference."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.errors import ConfigError
from cifarflow.optimizers import sgd
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.schedules import Constant, OneCycle, Piecewise
from cifarflow.optimizers.sgd import SGD

MODES = ("eager", "graph", "xla")


def apply_steps(optimizer, weights, gradients, *, mode="graph", dtype="float32", names=None):
    """Values of the variables after each step: `weights` an array a variable, by `names`."""
    variables = [
        keras.Variable(weight, dtype=dtype, name=name)
        for weight, name in zip(weights, names or ["kernel", "bias"], strict=False)
    ]
    optimizer.build(variables)

    def step(gradients):
        optimizer.apply(gradients, variables)

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    after = []
    for gradient in gradients:
        step([tf.constant(part, tf.float32) for part in gradient])
        after.append([variable.numpy() for variable in variables])
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1
    return after


FALL = Piecewise([1], [0.1, 0.01])  # the learning rate: 0.1 at the first update, then 0.01

# Weight 1.0, gradients 1, 2, -1, learning rate 0.1: worked out by hand.
HAND = {
    # A constant rate: the numbers of Keras's rule, test_sgd.py.
    "momentum": ({"momentum": 0.5}, [0.9, 0.65, 0.625]),
    "nesterov": ({"momentum": 0.5, "nesterov": True}, [0.85, 0.525, 0.6125]),
    # v: 1, 2.5, .25; w: - .1, - .025, - .0025
    "fall": ({"learning_rate": FALL, "momentum": 0.5}, [0.9, 0.875, 0.8725]),
    # the same v; w: - .1 * (1 + .5), - .01 * (2 + 1.25), - .01 * (-1 + .125)
    "fall_nesterov": (
        {"learning_rate": FALL, "momentum": 0.5, "nesterov": True},
        [0.85, 0.8175, 0.82625],
    ),
    # g: 1.5, 2.425, -1 + .5 * .81825; v: 1.5, 3.175, .996625
    "fall_l2": (
        {"learning_rate": FALL, "momentum": 0.5, "l2": 0.5},
        [0.85, 0.81825, 0.80828375],
    ),
    # w * .95 first, then * .995: .95 - .1, .84575 - .025, .81664625 - .0025
    "fall_weight_decay": (
        {"learning_rate": FALL, "momentum": 0.5, "weight_decay": 0.5},
        [0.85, 0.82075, 0.81414625],
    ),
    "plain": ({"learning_rate": FALL}, [0.9, 0.88, 0.89]),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "fallback"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", HAND)
def test_unscaled_velocity_by_hand(case, mode, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(sgd, "_can_fuse", lambda gradient, variable: False)
    arguments, expected = HAND[case]
    optimizer = SGD(**{"learning_rate": 0.1, "scaled_velocity": False, **arguments})
    after = apply_steps(optimizer, [[1.0]], [[[1.0]], [[2.0]], [[-1.0]]], mode=mode)
    np.testing.assert_allclose([step[0][0] for step in after], expected, rtol=1e-6)


# Two variables with weight 1.0 and gradients 1, 2, -1; "bias" is scaled.  The kernel's are those
# of test_sgd.py.
SCALED = {
    # - .2, - .4, + .2
    "number": ({}, 2.0, [0.8, 0.4, 0.6]),
    "zero": ({}, 0.0, [1.0, 1.0, 1.0]),
    # scales 3, 3, .5
    "schedule": ({}, Piecewise([2], [3.0, 0.5]), [0.7, 0.1, 0.15]),
    # L2 is not scaled.  g: 2 + .5, 4 + .375, -2 + .15625
    "l2": ({"l2": 0.5}, 2.0, [0.75, 0.3125, 0.49687500]),
    # nor is the decoupled one: .95 - .2, .7125 - .4, .296875 + .2
    "weight_decay": ({"weight_decay": 0.5}, 2.0, [0.75, 0.3125, 0.496875]),
    # after clipping: 2, 3, -2
    "clipvalue": ({"clipvalue": 1.5}, 2.0, [0.8, 0.5, 0.7]),
    # g: 2, 4, 0; v: -.2, -.5, -.25
    "momentum": ({"momentum": 0.5}, Piecewise([2], [2.0, 0.0]), [0.8, 0.3, 0.05]),
    # g: 2, 4, 0; v: 2, 5, 2.5
    "unscaled_velocity": (
        {"momentum": 0.5, "scaled_velocity": False, "learning_rate": FALL},
        Piecewise([2], [2.0, 0.0]),
        [0.8, 0.75, 0.725],
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SCALED)
def test_scale_by_hand(case, mode):
    arguments, scale, expected = SCALED[case]
    arguments = {"learning_rate": 0.1, **arguments}
    gradients = [[[value], [value]] for value in (1.0, 2.0, -1.0)]
    scaled = SGD(**arguments, learning_rate_scales={"bi.s$": scale})
    after = apply_steps(scaled, [[1.0], [1.0]], gradients, mode=mode)
    np.testing.assert_allclose([step[1][0] for step in after], expected, rtol=1e-6, atol=1e-7)
    # The other variable sees nothing of it.
    plain = apply_steps(SGD(**arguments), [[1.0], [1.0]], gradients, mode=mode)
    np.testing.assert_array_equal([step[0] for step in after], [step[0] for step in plain])


def reference(weights, gradients, *, lr, momentum, nesterov, l2, scaled_velocity, scale):
    """The docstring's rule, in float64; `lr` and `scale` hold a value a step."""
    velocity = np.zeros_like(weights)
    after = []
    for rate, factor, gradient in zip(lr, scale, gradients, strict=True):
        gradient = factor * gradient + l2 * weights
        if scaled_velocity:
            velocity = momentum * velocity - rate * gradient
            weights = weights + (momentum * velocity - rate * gradient if nesterov else velocity)
        else:
            velocity = momentum * velocity + gradient
            weights = weights - rate * (gradient + momentum * velocity if nesterov else velocity)
        after.append(weights)
    return after


@settings(max_examples=25, deadline=None)
@given(
    lr=st.lists(st.floats(0.001, 1), min_size=4, max_size=4),
    scale=st.lists(st.floats(0.01, 64), min_size=4, max_size=4),
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    nesterov=st.booleans(),
    l2=st.floats(0, 1),
    scaled_velocity=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_setting_follows_the_reference(seed, lr, scale, **arguments):
    arguments["nesterov"] = arguments["nesterov"] and arguments["momentum"] > 0
    rng = np.random.default_rng(seed)
    weights, gradients = rng.normal(size=(4,)), rng.normal(size=(4, 4))
    expected = reference(weights, gradients, lr=lr, scale=scale, **arguments)
    optimizer = SGD(
        Piecewise([1, 2, 3], lr),
        learning_rate_scales={"kernel": Piecewise([1, 2, 3], scale)},
        **arguments,
    )
    after = apply_steps(optimizer, [weights], gradients[:, np.newaxis], mode="eager")
    size = np.abs(expected).max()
    np.testing.assert_allclose([step[0] for step in after], expected, rtol=2e-5, atol=2e-6 * size)


def test_a_scale_is_pytorchs_group_with_its_decay_divided():
    """airbench: biases at 64 times the rate, with weight_decay / 64."""
    rng = np.random.default_rng(0)
    weights, gradients = [rng.normal(size=3)], rng.normal(size=(10, 1, 3))
    common = {"momentum": 0.85, "nesterov": True, "scaled_velocity": False}
    cycle = {"total_steps": 10, "peak_fraction": 0.23}
    ours = SGD(OneCycle(0.01, **cycle), l2=0.1, learning_rate_scales={"kernel": 64}, **common)
    group = SGD(OneCycle(0.64, **cycle), l2=0.1 / 64, **common)
    after = [apply_steps(each, weights, gradients) for each in (ours, group)]
    np.testing.assert_allclose(*after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_variable_dtypes(dtype):
    optimizer = SGD(
        FALL, momentum=0.5, scaled_velocity=False, learning_rate_scales={"kernel": Constant(1.0)}
    )
    after = apply_steps(optimizer, [[1.0]], [[[1.0]], [[2.0]]], dtype=dtype)
    assert after[0][0].dtype.name == dtype
    np.testing.assert_allclose(np.float64(after[-1][0]), [0.875], rtol=1e-2)


@pytest.mark.parametrize("scaled_velocity", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sparse_gradients(nesterov, scaled_velocity):
    table = np.arange(8.0).reshape(4, 2)
    dense = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]])

    def make():
        return SGD(
            FALL,
            momentum=0.5,
            nesterov=nesterov,
            scaled_velocity=scaled_velocity,
            learning_rate_scales={"kernel": 3.0},
        )

    expected = apply_steps(make(), [table], [[dense]] * 3)[-1][0]
    variable, optimizer = keras.Variable(table, name="kernel"), make()
    sparse = tf.IndexedSlices(tf.ones((3, 2)), tf.constant([0, 2, 2]), tf.constant([4, 2]))
    for _ in range(3):
        optimizer.apply([sparse], [variable])
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_under_a_strategy(mirrored):
    strategy = (
        tf.distribute.MirroredStrategy(["/cpu:0"])
        if mirrored
        else tf.distribute.OneDeviceStrategy("/cpu:0")
    )
    with strategy.scope():
        variable = keras.Variable([1.0], name="bias")
        optimizer = SGD(
            FALL, momentum=0.5, nesterov=True, scaled_velocity=False, learning_rate_scales={"b": 1}
        )

    def replica_step(gradient):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * gradient)
        optimizer.apply(tape.gradient(loss, [variable.value]), [variable])

    @tf.function
    def step(gradient):
        strategy.run(replica_step, args=(gradient,))

    values = []
    for gradient in (1.0, 2.0, -1.0):
        step(tf.constant([gradient]))
        values.append(variable.numpy().item())
    np.testing.assert_allclose(values, HAND["fall_nesterov"][1], rtol=1e-6)


@pytest.mark.parametrize("scaled_velocity", [True, False])
def test_update_is_one_kernel_a_variable(scaled_velocity):
    variables = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    optimizer = SGD(0.1, momentum=0.9, scaled_velocity=scaled_velocity)
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply([tf.ones(3), tf.ones((2, 2))], variables))
    types = [operation.type for operation in step.get_concrete_function().graph.get_operations()]
    kernel = "ResourceApplyKerasMomentum" if scaled_velocity else "ResourceApplyMomentum"
    assert types.count(kernel) == 2
    assert types.count("AssignVariableOp") == 1  # the step counter
    assert not {"AssignAddVariableOp", "AssignSubVariableOp", "Mul", "Sub"} & set(types)


def test_the_first_expression_found_counts():
    names = ["whitening_bias", "bias", "dense_kernel", "kernel"]
    optimizer = SGD(
        1.0, learning_rate_scales={"^whitening": 2.0, "bias": 3.0, "dense|whitening": 4.0}
    )
    (after,) = apply_steps(optimizer, [[0.0]] * 4, [[[-1.0]] * 4], names=names)
    np.testing.assert_array_equal(np.concatenate(after), [2.0, 3.0, 4.0, 1.0])


def test_the_layers_name_is_part_of_the_path():
    model = make_model()
    optimizer = SGD(1.0, learning_rate_scales={"first/bias": 2.0})
    optimizer.build(model.trainable_variables)
    scales = {v.path: optimizer.learning_rate_scale(v.value) for v in model.trainable_variables}
    assert [path for path, scale in scales.items() if scale] == [model.layers[0].bias.path]


def make_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3, name="last"),
        ]
    )


def make_data(n=48):
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(n, 6)).astype("float32")
    return inputs, np.argmax(inputs[:, :3], axis=1)


def make_optimizer():
    return SGD(
        OneCycle(0.1, 20),
        momentum=0.85,
        nesterov=True,
        l2=0.01,
        scaled_velocity=False,
        # Overlapping, so that a lost order would show; the last one's name sorts first.
        learning_rate_scales={"last/bias": Piecewise([5], [2.0, 0.0]), "bias": 8.0, "beta": 4},
    )


def compile_and_fit(optimizer):
    model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=False)
    model.fit(*make_data(), batch_size=8, epochs=2, shuffle=False, verbose=0)
    return model


# Keras 3.15 itself calls NumPy 2 in a way that NumPy warns about whenever it saves a model.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "loss_scale"])
def test_saved_model_goes_on_the_same(tmp_path, wrapped):
    precision = "mixed_float16" if wrapped else "float32"
    model = compile_and_fit(scale_for(precision, make_optimizer()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    inner = loaded.optimizer.inner_optimizer if wrapped else loaded.optimizer
    assert list(inner.learning_rate_scales) == ["last/bias", "bias", "beta"]
    assert inner.scaled_velocity is False
    for each in (model, loaded):
        each.fit(*make_data(), batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_config_round_trip():
    optimizer = make_optimizer()
    config = json.loads(json.dumps(optimizer.get_config()))
    again = SGD.from_config(config)
    assert again.get_config() == optimizer.get_config()
    assert isinstance(again.learning_rate_scales["last/bias"], Piecewise)
    assert again.learning_rate_scales["beta"] == 4.0
    assert isinstance(config["learning_rate_scales"]["last/bias"], dict)  # from_config left it
    serialized = keras.optimizers.serialize(optimizer)
    assert keras.optimizers.deserialize(serialized).get_config() == optimizer.get_config()


def test_config_from_before_these_arguments():
    config = SGD(0.1, momentum=0.5).get_config()
    del config["learning_rate_scales"], config["scaled_velocity"]
    again = SGD.from_config(config)
    assert again.learning_rate_scales == {}
    assert again.scaled_velocity is True


def test_checkpoint_of_plain_sgd_fits(tmp_path):
    """The arguments add no state: a checkpoint holds the same objects with and without them."""

    def make(**arguments):
        variables = [keras.Variable([1.0], name="kernel"), keras.Variable([2.0], name="bias")]
        optimizer = SGD(0.1, momentum=0.5, **arguments)
        optimizer.build(variables)
        return optimizer, variables

    plain, variables = make()
    plain.apply([tf.ones(1), tf.ones(1)], variables)
    path = tf.train.Checkpoint(optimizer=plain).write(str(tmp_path / "checkpoint"))
    scales = {"bias": 2.0, "kernel": Constant(1.0)}
    other, _ = make(learning_rate_scales=scales, scaled_velocity=False)
    tf.train.Checkpoint(optimizer=other).read(path).assert_consumed()
    assert [v.numpy().item() for v in other.momentums] == pytest.approx([-0.1, -0.1])
    saved = tf.train.Checkpoint(optimizer=other).write(str(tmp_path / "other"))
    assert tf.train.list_variables(saved) == tf.train.list_variables(path)


BAD_SCALES = (-1, -1e-9, math.nan, math.inf, "0.1", None, True, [1.0], lambda step: 1.0)
BAD = [
    *[({"bias": value}, value) for value in BAD_SCALES],
    *[(value, value) for value in ("bias", 5, ["bias"], [("bias", 1.0)])],
    *[({key: 1.0}, key) for key in ("", "(", 5, None)],
]


@pytest.mark.parametrize(
    ("scales", "value"), BAD, ids=lambda part: str(part).partition(" at 0x")[0][:30]
)
def test_bad_scales_are_quoted(scales, value):
    with pytest.raises(ConfigError, match="learning_rate_scales") as error:
        SGD(learning_rate_scales=scales)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 0, 1, "no"])
def test_bad_scaled_velocity_is_quoted(value):
    with pytest.raises(ConfigError, match="scaled_velocity must be True or False") as error:
        SGD(scaled_velocity=value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("scales", [{"gamma": 1.0}, {"bias": 1.0, "gamma": 1.0}])
def test_an_expression_found_nowhere_is_refused(scales):
    variables = [keras.Variable([1.0], name=f"bias_{i}") for i in range(9)]
    optimizer = SGD(learning_rate_scales=scales)
    with pytest.raises(ConfigError, match="'gamma'") as error:
        optimizer.build(variables)
    assert "'bias_0', 'bias_1'" in str(error.value)
    assert "and 3 more" in str(error.value)
    assert "\n" not in str(error.value)
    # Nothing is half built: the first update says the same.
    with pytest.raises(ConfigError, match="'gamma'"):
        optimizer.apply([tf.ones(1)], variables[:1])


def test_the_scales_cannot_be_changed_behind_the_optimisers_back():
    scales = {"bias": 2.0}
    optimizer = SGD(1.0, learning_rate_scales=scales)
    scales["bias"] = optimizer.learning_rate_scales["bias"] = 5.0
    assert optimizer.learning_rate_scales == {"bias": 2.0}
