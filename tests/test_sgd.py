"""The optimiser against hand-computed steps, a NumPy reference and `keras.optimizers.SGD`."""

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
from cifarflow.optimizers.schedules import Cosine, InverseTime, Piecewise
from cifarflow.optimizers.sgd import SGD

MODES = ("eager", "graph", "xla")


def apply_steps(optimizer, weights, gradients, *, mode="graph", dtype="float32", names=None):
    """Values of the variables after each step.

    `weights` holds one array a variable, `gradients` one such list a step.
    """
    names = names or [f"kernel{i}" for i in range(len(weights))]
    variables = [
        keras.Variable(weight, dtype=dtype, name=name)
        for weight, name in zip(weights, names, strict=True)
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
    return after


def three_steps(mode="graph", **arguments):
    """The weight after each of three steps from 1.0 with gradients 1, 2, -1 at lr 0.1."""
    arguments = {"learning_rate": 0.1, **arguments}
    after = apply_steps(SGD(**arguments), [[1.0]], [[[1.0]], [[2.0]], [[-1.0]]], mode=mode)
    return [float(weights[0][0]) for weights in after]


# Weight 1.0, gradients 1, 2, -1, learning rate 0.1: worked out by hand.
HAND = {
    # 1 - .1, .9 - .2, .7 + .1
    "plain": ({}, [0.9, 0.7, 0.8]),
    # v: -.1, -.05 - .2 = -.25, -.125 + .1 = -.025; w adds v
    "momentum": ({"momentum": 0.5}, [0.9, 0.65, 0.625]),
    # the same v; w adds .5 v - .1 g: -.05 - .1, -.125 - .2, -.0125 + .1
    "nesterov": ({"momentum": 0.5, "nesterov": True}, [0.85, 0.525, 0.6125]),
    # lr: .1, .1 / 2, .1 / 3
    "decay": ({"decay": 1.0}, [0.9, 0.8, 0.8 + 0.1 / 3]),
    # v: -.1, -.05 - .1 = -.15, -.075 + .1 / 3
    "decay_momentum": ({"decay": 1.0, "momentum": 0.5}, [0.9, 0.75, 0.675 + 0.1 / 3]),
    # g: 1 + .5, 2 + .425, -1 + .30375
    "l2": ({"l2": 0.5}, [0.85, 0.6075, 0.677125]),
    # g: 1.5, 2.425, -1 + .26625; v: -.15, -.075 - .2425, -.15875 + .073375
    "l2_momentum": ({"l2": 0.5, "momentum": 0.5}, [0.85, 0.5325, 0.447125]),
    # w * .95 first: .95 - .1, .8075 - .2, .577125 + .1; without momentum the same as L2
    "weight_decay": ({"weight_decay": 0.5}, [0.85, 0.6075, 0.677125]),
    # with momentum not: .95 - .1, .8075 - .25, .529625 - .025
    "weight_decay_momentum": ({"weight_decay": 0.5, "momentum": 0.5}, [0.85, 0.5575, 0.504625]),
    # g: 1, 1.5, -1
    "clipvalue": ({"clipvalue": 1.5}, [0.9, 0.75, 0.85]),
    # g: 1, 1, -1
    "clipnorm": ({"clipnorm": 1.0}, [0.9, 0.8, 0.9]),
    "global_clipnorm": ({"global_clipnorm": 1.0}, [0.9, 0.8, 0.9]),
    # clipping does not see L2: 1 + .5, 1.5 + .425, -1 + .32875
    "clipvalue_l2": ({"clipvalue": 1.5, "l2": 0.5}, [0.85, 0.6575, 0.724625]),
    # lr-scaled velocity: -.1, -.05 - .02 = -.07, -.035 + .01 = -.025.
    # PyTorch's buffer 1, 2.5, .25 would give .9, .875, .8725.
    "schedule": (
        {"learning_rate": Piecewise([1], [0.1, 0.01]), "momentum": 0.5},
        [0.9, 0.83, 0.805],
    ),
    # half the gradients
    "loss_scale_factor": ({"loss_scale_factor": 2.0}, [0.95, 0.85, 0.9]),
    # nothing, then lr * (1 + 2) / 2, then nothing
    "accumulation": ({"gradient_accumulation_steps": 2}, [1.0, 0.85, 0.85]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", HAND)
def test_three_steps_by_hand(case, mode):
    arguments, expected = HAND[case]
    np.testing.assert_allclose(three_steps(mode, **arguments), expected, rtol=1e-6)


@pytest.mark.parametrize("case", ["clipnorm", "global_clipnorm"])
def test_clipping_norm_over_several_variables(case):
    # Norms 5 and 12, together 13.
    (after,) = apply_steps(SGD(1.0, **{case: 1.0}), [[0.0, 0.0], [0.0]], [[[3.0, 4.0], [12.0]]])
    norms = {"clipnorm": (5, 12), "global_clipnorm": (13, 13)}[case]
    np.testing.assert_allclose(after[0], [-3 / norms[0], -4 / norms[0]], rtol=1e-6)
    np.testing.assert_allclose(after[1], [-12 / norms[1]], rtol=1e-6)


def test_l2_is_twice_the_coefficient_of_a_keras_regularizer():
    weight = keras.Variable([1.0, -2.0])
    regularizer = keras.regularizers.L2(0.25)
    with tf.GradientTape() as tape:
        loss = regularizer(weight.value)
    SGD(0.1).apply([tape.gradient(loss, weight.value)], [weight])
    (after,) = apply_steps(SGD(0.1, l2=0.5), [[1.0, -2.0]], [[[0.0, 0.0]]])
    np.testing.assert_allclose(weight.numpy(), after[0], rtol=1e-6)


def reference(weights, gradients, *, lr, momentum, nesterov, decay, l2, weight_decay, clipvalue):
    """The docstring's rule, in float64."""
    velocity = np.zeros_like(weights)
    after = []
    for step, gradient in enumerate(gradients):
        rate = lr / (1 + decay * step)
        if clipvalue is not None:
            gradient = np.clip(gradient, -clipvalue, clipvalue)
        weights = weights - rate * weight_decay * weights
        gradient = gradient + l2 * weights
        velocity = momentum * velocity - rate * gradient
        ahead = momentum * velocity - rate * gradient
        weights = weights + (ahead if nesterov else velocity)
        after.append(weights)
    return after


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(0.001, 1),
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    nesterov=st.booleans(),
    decay=st.floats(0, 2),
    l2=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    clipvalue=st.one_of(st.none(), st.floats(0.01, 10)),
    seed=st.integers(0, 2**31),
)
def test_any_setting_follows_the_reference(seed, **arguments):
    arguments["nesterov"] = arguments["nesterov"] and arguments["momentum"] > 0
    rng = np.random.default_rng(seed)
    weights, gradients = rng.normal(size=(4,)), rng.normal(size=(5, 4))
    expected = reference(weights, gradients, **arguments)
    optimizer = SGD(arguments.pop("lr"), **arguments)
    after = apply_steps(optimizer, [weights], gradients[:, np.newaxis], mode="eager")
    np.testing.assert_allclose([step[0] for step in after], expected, rtol=2e-5, atol=2e-6)


MANY = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "global_clipnorm": 1.0},
    {"momentum": 0.9, "use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3},
    {"momentum": 0.9, "nesterov": True, "gradient_accumulation_steps": 3},
]


@pytest.mark.parametrize("mode", ["graph", "xla"])
@pytest.mark.parametrize("arguments", MANY, ids=lambda a: "-".join(a) or "plain")
@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
def test_equals_keras_over_many_steps(arguments, schedule, mode):
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(7, 5)), rng.normal(size=(5,))]
    gradients = [[rng.normal(size=w.shape) for w in weights] for _ in range(20)]
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5) if schedule else 0.1
    ours = apply_steps(SGD(rate, **arguments), weights, gradients, mode=mode)
    theirs = apply_steps(keras.optimizers.SGD(rate, **arguments), weights, gradients)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_decay_equals_keras_inverse_time_decay():
    rng = np.random.default_rng(2)
    weights, gradients = [rng.normal(size=6)], rng.normal(size=(60, 1, 6))
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, decay_steps=1, decay_rate=0.03)
    lab = {"momentum": 0.9, "nesterov": True}
    ours = apply_steps(SGD(0.1, decay=0.03, **lab), weights, gradients)
    theirs = apply_steps(keras.optimizers.SGD(schedule, **lab), weights, gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def count_ops(function, *arguments):
    graph = function.get_concrete_function(*arguments).graph
    types = [operation.type for operation in graph.get_operations()]
    return {kind: types.count(kind) for kind in set(types)}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_update_is_one_kernel_a_variable(momentum):
    variables = [keras.Variable(np.ones(3)), keras.Variable(np.ones((2, 2)))]
    optimizer = SGD(0.1, momentum=momentum)
    optimizer.build(variables)
    step = tf.function(lambda: optimizer.apply([tf.ones(3), tf.ones((2, 2))], variables))
    ops = count_ops(step)
    kernel = "ResourceApplyKerasMomentum" if momentum else "ResourceApplyGradientDescent"
    assert ops[kernel] == 2
    assert ops["AssignVariableOp"] == 1  # the step counter
    assert not {"AssignAddVariableOp", "AssignSubVariableOp", "Mul", "Sub"} & set(ops)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_value_read_before_the_update_stays(momentum, mode):
    """The kernel writes in place; a tensor that shares the buffer must not see that."""
    variable = keras.Variable(np.ones(1000))
    optimizer = SGD(0.1, momentum=momentum)
    optimizer.build([variable])

    def step():
        before = variable.value.read_value()
        optimizer.apply([before], [variable])
        return before, variable.value.read_value()

    step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    before, after = step()
    second, _ = step()
    np.testing.assert_array_equal(before, np.ones(1000))
    np.testing.assert_allclose(after, np.full(1000, 0.9), rtol=1e-6)
    np.testing.assert_array_equal(second, after)


@pytest.mark.parametrize(
    "arguments", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "l2": 0.1}]
)
def test_fall_back_gives_the_same_numbers(monkeypatch, arguments):
    rng = np.random.default_rng(3)
    weights, gradients = [rng.normal(size=(4, 3))], rng.normal(size=(20, 1, 4, 3))
    fused = apply_steps(SGD(0.1, **arguments), weights, gradients)
    monkeypatch.setattr(sgd, "_can_fuse", lambda gradient, variable: False)
    plain = apply_steps(SGD(0.1, **arguments), weights, gradients)
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_under_a_strategy_the_parent_updates(mirrored):
    strategy = (
        tf.distribute.MirroredStrategy(["/cpu:0"])
        if mirrored
        else tf.distribute.OneDeviceStrategy("/cpu:0")
    )
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = SGD(0.1, momentum=0.5, nesterov=True)

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
    np.testing.assert_allclose(values, HAND["nesterov"][1], rtol=1e-6)
    assert "ResourceApplyKerasMomentum" not in count_ops(step, tf.constant([1.0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_variable_dtypes(dtype):
    after = apply_steps(
        SGD(0.1, momentum=0.5, nesterov=True, l2=0.25), [[1.0]], [[[1.0]], [[2.0]]], dtype=dtype
    )
    # g: 1.25, 2 + .25 * .8125; v: -.125, -.0625 - .2203125; w adds .5 v - .1 g
    assert after[0][0].dtype.name == dtype
    np.testing.assert_allclose(
        np.float64(after[-1][0]), [0.8125 - 0.14140625 - 0.2203125], rtol=2e-2
    )


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("arguments", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize("l2", [0.0, 0.5])
def test_sparse_gradients(arguments, l2, mode):
    """A lookup's gradient (one row twice, one never) against the same gradient made dense."""
    table = np.arange(8.0).reshape(4, 2)
    ids = tf.constant([0, 2, 2])
    dense = np.zeros((4, 2))
    np.add.at(dense, ids.numpy(), 1.0)
    expected = apply_steps(SGD(0.1, l2=l2, **arguments), [table], [[dense]] * 3)[-1][0]

    embedding = keras.layers.Embedding(4, 2)
    embedding.build()
    embedding.embeddings.assign(table)
    optimizer = SGD(0.1, l2=l2, **arguments)
    optimizer.build(embedding.trainable_variables)

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(embedding(ids))
        gradients = tape.gradient(loss, embedding.trainable_variables)
        assert isinstance(gradients[0], tf.IndexedSlices)
        optimizer.apply(gradients, embedding.trainable_variables)

    step = tf.function(step) if mode == "graph" else step
    for _ in range(3):
        step()
    np.testing.assert_allclose(embedding.embeddings.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "weight_decay"])
@pytest.mark.parametrize("how", ["argument", "names", "variables"])
def test_exclusions_hold_for_both_decays(kind, how):
    variables = [keras.Variable([1.0], name="kernel"), keras.Variable([1.0], name="bias")]
    optimizer = SGD(0.1, **{kind: 0.5}, no_decay=["bias"] if how == "argument" else [])
    if how == "names":
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
        assert optimizer.no_decay == ("bias", "gamma")
    elif how == "variables":
        optimizer.exclude_from_weight_decay(var_list=[variables[1]])
    optimizer.apply([tf.zeros(1), tf.zeros(1)], variables)
    np.testing.assert_allclose(np.concatenate([v.numpy() for v in variables]), [0.95, 1.0])
    with pytest.raises(ConfigError, match="before the first update"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def make_model(dtype=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="tanh", dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dense(3, dtype=dtype),
        ]
    )


def make_data(n=48):
    rng = np.random.default_rng(4)
    inputs = rng.normal(size=(n, 6)).astype("float32")
    return inputs, np.argmax(inputs[:, :3], axis=1)


def compile_and_fit(optimizer, *, epochs=2, jit_compile=False, dtype=None):
    model = make_model(dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=jit_compile)
    history = model.fit(*make_data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history["loss"]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_equals_keras(jit_compile):
    lab = {"momentum": 0.9, "nesterov": True}
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.05, 1, 0.01)
    _, ours = compile_and_fit(SGD(0.05, decay=0.01, **lab), epochs=3, jit_compile=jit_compile)
    _, theirs = compile_and_fit(keras.optimizers.SGD(schedule, **lab), epochs=3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] < ours[0]


def test_own_loop_equals_fit():
    fitted, _ = compile_and_fit(SGD(0.05, momentum=0.9, nesterov=True, l2=0.01))
    model, optimizer = make_model(), SGD(0.05, momentum=0.9, nesterov=True, l2=0.01)
    optimizer.build(model.trainable_variables)
    inputs, labels = (tf.constant(part) for part in make_data())
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train(steps):
        for step in tf.range(steps):
            rows = (step % 6) * 8 + tf.range(8)
            with tf.GradientTape() as tape:
                loss = loss_fn(
                    tf.gather(labels, rows), model(tf.gather(inputs, rows), training=True)
                )
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

    train(tf.constant(12))
    assert int(optimizer.iterations) == 12
    for a, b in zip(model.weights, fitted.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=1e-6)


def test_loss_scale_optimizer_skips_and_goes_on():
    variable = keras.Variable([1.0])
    inner = SGD(0.1, momentum=0.5, decay=1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    optimizer.build([variable])
    step = tf.function(lambda gradient: optimizer.apply([gradient], [variable]))
    values = []
    for gradient in (4.0, math.inf, 4.0, -2.0):  # scaled by 4, lost, then scaled by 2
        step(tf.constant([gradient]))
        values.append(variable.numpy().item())
    expected = HAND["decay_momentum"][1]
    np.testing.assert_allclose(values, [expected[0], expected[0], *expected[1:]], rtol=1e-6)
    assert int(inner.iterations) == 3


@pytest.mark.parametrize("jit_compile", [False, True])
def test_mixed_float16_fit(jit_compile):
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.05, momentum=0.9, nesterov=True))
    _, half = compile_and_fit(optimizer, epochs=3, dtype="mixed_float16", jit_compile=jit_compile)
    _, full = compile_and_fit(SGD(0.05, momentum=0.9, nesterov=True), epochs=3)
    np.testing.assert_allclose(half, full, rtol=0.02)


EVERY_OPTION = {
    "momentum": 0.9,
    "nesterov": True,
    "decay": 0.01,
    "l2": 0.01,
    "weight_decay": 0.001,
    "no_decay": ("bias", "gamma", "beta"),
    "clipnorm": 0.5,
    "use_ema": True,
    "ema_momentum": 0.9,
    "ema_overwrite_frequency": 4,
    "name": "mine",
}


# Keras 3.15 itself calls NumPy 2 in a way that NumPy warns about whenever it saves a model.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "loss_scale"])
def test_saved_model_goes_on_the_same(tmp_path, wrapped):
    def make_optimizer():
        optimizer = SGD(0.05, **EVERY_OPTION)
        return keras.optimizers.LossScaleOptimizer(optimizer) if wrapped else optimizer

    model, _ = compile_and_fit(make_optimizer())
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    inner = loaded.optimizer.inner_optimizer if wrapped else loaded.optimizer
    assert type(inner) is SGD
    assert inner.no_decay == EVERY_OPTION["no_decay"]
    assert int(inner.iterations) == 12
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    for each in (model, loaded):
        each.fit(*make_data(), batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    ("learning_rate", "arguments"),
    [
        (0.05, EVERY_OPTION),
        (0.05, {"clipvalue": 1.0, "loss_scale_factor": 8.0}),
        (0.05, {"global_clipnorm": 1.0, "gradient_accumulation_steps": 2}),
        (Cosine(0.1, 100, warmup_steps=5), {"momentum": 0.9}),
    ],
)
def test_config_round_trip(learning_rate, arguments):
    optimizer = SGD(learning_rate, **arguments)
    config = json.loads(json.dumps(optimizer.get_config()))
    again = SGD.from_config(config)
    assert again.get_config() == optimizer.get_config()
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "cifarflow>SGD"
    assert keras.optimizers.deserialize(serialized).get_config() == optimizer.get_config()


def test_learning_rate_can_be_read_and_set():
    optimizer = SGD(1)  # an int will do
    optimizer.learning_rate = 0.5
    variable = keras.Variable([1.0])
    optimizer.apply([tf.ones(1)], [variable])
    assert variable.numpy().item() == 0.5
    decaying = SGD(0.5, decay=1.0)
    assert float(decaying.learning_rate) == 0.5
    decaying.apply([tf.ones(1)], [keras.Variable([1.0])])
    assert float(decaying.learning_rate) == 0.25
    with pytest.raises(TypeError, match="not settable"):
        decaying.learning_rate = 0.1


def test_zero_learning_rate_moves_nothing():
    assert three_steps(learning_rate=0, momentum=0.5) == [1.0, 1.0, 1.0]


def test_learning_rate_may_be_any_callable():
    np.testing.assert_allclose(three_steps(learning_rate=lambda: 0.1), HAND["plain"][1], rtol=1e-6)


BAD_NUMBERS = (-1, -1e-9, math.nan, math.inf, "0.1", None, True)
BAD = [
    *[({"learning_rate": value}, "learning_rate", value) for value in BAD_NUMBERS],
    *[({"momentum": value}, "momentum", value) for value in (*BAD_NUMBERS, 1, 1.5)],
    *[({"decay": value}, "decay", value) for value in BAD_NUMBERS],
    *[({"l2": value}, "l2", value) for value in BAD_NUMBERS],
    *[({"weight_decay": value}, "weight_decay", value) for value in (-1, math.nan, math.inf)],
    *[
        ({clip: value}, clip, value)
        for clip in ("clipnorm", "clipvalue", "global_clipnorm")
        for value in (-1, 0, math.nan, math.inf)
    ],
    ({"learning_rate": 0.0, "decay": 0.1}, "learning_rate", 0.0),
    ({"nesterov": True}, "nesterov", True),
    ({"nesterov": "yes", "momentum": 0.9}, "nesterov", "yes"),
    ({"learning_rate": InverseTime(0.1, 0.1), "decay": 0.25}, "decay", 0.25),
    ({"no_decay": "bias"}, "no_decay", "bias"),
    ({"no_decay": ["bias", ""]}, "no_decay", ["bias", ""]),
    ({"no_decay": [1]}, "no_decay", [1]),
    ({"no_decay": 5}, "no_decay", 5),
    ({"no_decay": ["("]}, "no_decay", ["("]),
    ({"clipnorm": 1.5, "clipvalue": 2.5}, "Only one of", 2.5),
    ({"ema_momentum": 7.0, "use_ema": True}, "ema_momentum", 7.0),
    ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps", 1),
    ({"dampening": 0.5}, "dampening", 0.5),
]


@pytest.mark.parametrize(("arguments", "name", "value"), BAD, ids=lambda part: str(part)[:40])
def test_bad_arguments_are_quoted(arguments, name, value):
    with pytest.raises(ConfigError) as error:
        SGD(**arguments)
    message = str(error.value)
    assert name in message
    assert repr(value) in message
    assert "\n" not in message


def test_zero_weight_decay_is_none():
    assert SGD(weight_decay=0.0).weight_decay is None


def test_arguments_after_the_first_are_keyword_only():
    with pytest.raises(TypeError):
        SGD(0.1, 0.9)
