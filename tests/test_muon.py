"""Muon: `orthogonalize` by singular values, the update against NumPy, the rest against SGD."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.errors import ConfigError
from cifarflow.optimizers.muon import Muon, orthogonalize
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.schedules import OneCycle, Piecewise
from cifarflow.optimizers.sgd import SGD

MODES = ("eager", "graph", "xla")
A, B, C = 3.4445, -4.7750, 2.0315


def polynomial(values, steps):
    """What `steps` iterations make of singular values."""
    for _ in range(steps):
        values = A * values + B * values**3 + C * values**5
    return values


def newton_schulz(matrix, steps=3):
    """The source's own order of operations, in float64."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def reference(kernel, gradients, *, rates, momentum=0.6, steps=3):
    """Kernel [H, W, C_in, C_out] after each step, as [C_out, C_in * H * W] like the source."""
    velocity = np.zeros_like(kernel)
    filters = kernel.shape[-1]
    after = []
    for rate, gradient in zip(rates, gradients, strict=True):
        velocity = momentum * velocity + gradient
        direction = np.transpose(gradient + momentum * velocity, (3, 2, 0, 1))
        update = newton_schulz(direction.reshape(filters, -1), steps).reshape(direction.shape)
        kernel = kernel * filters**0.5 / np.linalg.norm(kernel)
        kernel = kernel - rate * np.transpose(update, (2, 3, 1, 0))
        after.append(kernel)
    return after


def apply_steps(optimizer, weights, gradients, *, mode="graph", dtype="float32"):
    """Values of the variables after each step: `weights` an array a name."""
    variables = [keras.Variable(weight, dtype=dtype, name=name) for name, weight in weights.items()]
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


TALL, WIDE, SQUARE = (3, 3, 4, 6), (1, 1, 4, 12), (2, 2, 3, 12)
FALL = Piecewise([2], [0.24, 0.1])
RATES = [0.24, 0.24, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE], ids=str)
def test_steps_equal_the_reference(shape, mode):
    rng = np.random.default_rng(0)
    kernel, gradients = rng.normal(size=shape), rng.normal(size=(5, *shape))
    after = apply_steps(Muon(FALL), {"kernel": kernel}, gradients[:, np.newaxis], mode=mode)
    expected = reference(kernel, gradients, rates=RATES)
    for (mine,), other in zip(after, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-4)


def test_settings_of_muon_count():
    rng = np.random.default_rng(1)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(5, *TALL))
    optimizer = Muon(0.1, muon_momentum=0.9, newton_schulz_steps=5)
    after = apply_steps(optimizer, {"kernel": kernel}, gradients[:, np.newaxis])
    expected = reference(kernel, gradients, rates=[0.1] * 5, momentum=0.9, steps=5)
    np.testing.assert_allclose([step[0] for step in after], expected, rtol=1e-3, atol=1e-4)


def test_bfloat16_products_are_near():
    rng = np.random.default_rng(2)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(5, *TALL))
    after = apply_steps(
        Muon(FALL, newton_schulz_dtype="bfloat16"), {"kernel": kernel}, gradients[:, np.newaxis]
    )
    expected = reference(kernel, gradients, rates=RATES)
    errors = np.abs([step[0] for step in after] - np.array(expected))
    assert 1e-5 < errors.max() < 0.02  # not equal: bfloat16 has 8 bits


def test_scale_is_on_the_rate():
    rng = np.random.default_rng(3)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(5, *TALL))
    scales = {"kernel": Piecewise([1, 3], [0.5, 2.0, 0.0])}
    after = apply_steps(
        Muon(0.1, learning_rate_scales=scales), {"kernel": kernel}, gradients[:, np.newaxis]
    )
    expected = reference(kernel, gradients, rates=[0.05, 0.2, 0.2, 0.0, 0.0])
    np.testing.assert_allclose([step[0] for step in after], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("filters", [1, 6, 40])
def test_norm_is_set_before_the_update(filters):
    rng = np.random.default_rng(4)
    kernel, gradient = rng.normal(size=(2, 3, 3, 3, filters))
    (still,) = apply_steps(Muon(0.0), {"kernel": kernel}, [[gradient]])[-1]
    assert np.linalg.norm(still) == pytest.approx(filters**0.5, rel=1e-5)
    np.testing.assert_allclose(still / kernel, (still / kernel).flat[0], rtol=1e-4)
    (moved,) = apply_steps(Muon(0.1), {"kernel": kernel}, [[gradient]])[-1]
    # The update's singular values are near 1, and it has min(27, filters) of them.
    update = np.linalg.norm(still - moved) / 0.1
    assert 0.6 < update / min(27, filters) ** 0.5 < 1.25


def test_size_of_the_gradient_does_not_count():
    rng = np.random.default_rng(5)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(3, 1, *TALL))
    small, large = (
        apply_steps(Muon(), {"kernel": kernel}, factor * gradients)[-1] for factor in (1, 1000)
    )
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_zeros_stay_finite():
    zeros, ones = np.zeros(TALL), np.ones(TALL)
    (kernel,) = apply_steps(Muon(0.1), {"kernel": ones}, [[zeros]])[-1]
    np.testing.assert_allclose(kernel, ones * 6**0.5 / 216**0.5, rtol=1e-5)
    (kernel,) = apply_steps(Muon(0.1), {"kernel": zeros}, [[ones]])[-1]
    np.testing.assert_allclose(kernel, -0.1 * newton_schulz(np.ones((36, 6))).reshape(TALL), 1e-3)


# Everything but the first is left to SGD: rank 2, rank 4 of another name, a vector.
OTHERS = {"kernel": TALL, "dense_kernel": (5, 4), "table": TALL, "bias": (6,)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"momentum": 0.5, "nesterov": False, "scaled_velocity": True},
        {"momentum": 0.0, "nesterov": False},
        {"l2": 0.1, "weight_decay": 0.1, "no_decay": ["bias"]},
        {"clipnorm": 1.0, "learning_rate_scales": {"bias": 3.0}},
    ],
    ids=lambda arguments: "-".join(arguments) or "defaults",
)
def test_other_variables_equal_sgd(arguments, mode):
    rng = np.random.default_rng(6)
    weights = {name: rng.normal(size=shape) for name, shape in OTHERS.items()}
    gradients = [[rng.normal(size=w.shape) for w in weights.values()] for _ in range(5)]
    same = {"momentum": 0.85, "nesterov": True, "scaled_velocity": False, **arguments}
    ours = apply_steps(Muon(FALL, **arguments), weights, gradients, mode=mode)[-1]
    theirs = apply_steps(SGD(FALL, **same), weights, gradients, mode=mode)[-1]
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7)
    # The kernel sees nothing of all this, but that clipping weighs its gradients anew.
    if "clipnorm" not in arguments:
        expected = reference(weights["kernel"], [step[0] for step in gradients], rates=RATES)
        np.testing.assert_allclose(ours[0], expected[-1], rtol=1e-3, atol=1e-4)


def test_muon_variables_choose():
    rng = np.random.default_rng(7)
    weights = {name: rng.normal(size=shape) for name, shape in OTHERS.items()}
    gradients = [[rng.normal(size=w.shape) for w in weights.values()]]
    optimizer = Muon(FALL, muon_variables=["^tab", "bias"])
    (after,) = apply_steps(optimizer, weights, gradients)
    expected = reference(weights["table"], [gradients[0][2]], rates=[0.24])
    np.testing.assert_allclose(after[2], expected[0], rtol=1e-3, atol=1e-4)
    # The look ahead of the first step: 1 + .85.
    plain = weights["kernel"] - 0.24 * 1.85 * gradients[0][0]
    np.testing.assert_allclose(after[0], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_variable_dtypes(dtype):
    rng = np.random.default_rng(8)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(2, 1, *TALL))
    after = apply_steps(Muon(FALL), {"kernel": kernel}, gradients, dtype=dtype)
    assert after[-1][0].dtype.name == dtype
    expected = reference(kernel, gradients[:, 0], rates=RATES[:2])[-1]
    assert np.abs(np.float64(after[-1][0]) - expected).max() < 0.02


@pytest.mark.parametrize("mirrored", [False, True])
def test_under_a_strategy(mirrored):
    strategy = (
        tf.distribute.MirroredStrategy(["/cpu:0"])
        if mirrored
        else tf.distribute.OneDeviceStrategy("/cpu:0")
    )
    rng = np.random.default_rng(9)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(3, *TALL))
    with strategy.scope():
        variable = keras.Variable(kernel, name="kernel")
        optimizer = Muon(FALL)

    def replica_step(gradient):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * gradient)
        optimizer.apply(tape.gradient(loss, [variable.value]), [variable])

    @tf.function
    def step(gradient):
        strategy.run(replica_step, args=(gradient,))

    for gradient in gradients:
        step(tf.constant(gradient, tf.float32))
    expected = reference(kernel, gradients, rates=RATES[:3])[-1]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_loss_scale_optimizer_skips_and_goes_on():
    rng = np.random.default_rng(10)
    kernel, gradients = rng.normal(size=TALL), rng.normal(size=(2, *TALL))
    variable = keras.Variable(kernel, name="kernel")
    optimizer = scale_for("mixed_float16", Muon(FALL))
    optimizer.build([variable])
    step = tf.function(lambda gradient: optimizer.apply([gradient], [variable]))
    step(tf.constant(2.0**15 * gradients[0], tf.float32))
    step(tf.constant(np.full(TALL, np.inf), tf.float32))  # lost; the scale is halved
    step(tf.constant(2.0**14 * gradients[1], tf.float32))
    expected = reference(kernel, gradients, rates=RATES[:2])[-1]
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert step.experimental_get_tracing_count() == 1


# --- orthogonalize ---


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("shape", [(24, 27), (27, 24), (16, 144), (10, 10)])
def test_singular_values_follow_the_polynomial(shape, steps):
    """And the singular vectors stay: the strongest statement there is."""
    matrix = np.random.default_rng(11).normal(size=shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    expected = (left * polynomial(values / np.linalg.norm(matrix), steps)) @ right
    result = orthogonalize(matrix, steps=steps)
    assert result.dtype == tf.float64
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(24, 27), (27, 24)])
def test_many_steps_of_a_matrix_of_rank_1(shape, dtype):
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(shape[0], 1)) @ rng.normal(size=(1, shape[1]))).astype(np.float32)
    result = orthogonalize(matrix, steps=12, dtype=dtype).numpy()
    expected = polynomial(np.ones(1), 12)[0]
    # What is not 0 by rounding alone grows too, but never beyond what the polynomial leaves.
    values = np.linalg.svd(result, compute_uv=False)
    assert values.max() < 1.3
    left, _, right = np.linalg.svd(matrix)
    assert left[:, 0] @ result @ right[0] == pytest.approx(expected, abs=0.1)


def test_singular_values_of_random_gradients():
    """Three steps bring the usual kernel into the documented band; more reach smaller values."""
    matrix = np.random.default_rng(12).normal(size=(64, 576)).astype(np.float32)
    values = np.linalg.svd(orthogonalize(matrix).numpy(), compute_uv=False)
    assert 0.68 < values.min() < values.max() < 1.21
    # A square one, whose smallest values are far down, needs more steps.
    square = np.random.default_rng(12).normal(size=(48, 48)).astype(np.float32)
    spread = {}
    for steps in (1, 3, 5):
        values = np.linalg.svd(orthogonalize(square, steps=steps).numpy(), compute_uv=False)
        spread[steps] = np.mean(np.abs(values - 1))
        assert values.max() < 1.21
    assert spread[5] < spread[3] < spread[1]


@pytest.mark.parametrize("steps", [3, 4])
def test_documented_band_and_slope(steps):
    values = np.geomspace(0.02, 1.0, 20001)
    assert 0.68 < polynomial(values, steps).min() < polynomial(values, steps).max() < 1.21
    assert polynomial(1e-6, 3) / 1e-6 == pytest.approx(41, abs=0.5)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    steps=st.integers(1, 5),
    exponent=st.integers(-3, 6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_follows_the_source(rows, columns, steps, exponent, seed):
    matrix = 10.0**exponent * np.random.default_rng(seed).normal(size=(rows, columns))
    result = orthogonalize(matrix.astype(np.float32), steps=steps).numpy()
    assert result.dtype == np.float32
    assert result.shape == matrix.shape
    np.testing.assert_allclose(result, newton_schulz(matrix, steps), atol=2e-3)
    np.testing.assert_allclose(
        orthogonalize(matrix.T.astype(np.float32), steps=steps).numpy().T, result, atol=2e-3
    )
    assert np.linalg.norm(result, 2) < 1.22


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orthogonalize_compiles(dtype, jit_compile):
    matrix = np.random.default_rng(13).normal(size=(8, 20)).astype(np.float32)
    compiled = tf.function(lambda x: orthogonalize(x, dtype=dtype), jit_compile=jit_compile)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    result = compiled(tf.constant(matrix))
    assert result.dtype == tf.float32
    np.testing.assert_allclose(result, newton_schulz(matrix), atol=tolerance)


# --- in Keras ---


def make_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, use_bias=False, name="one"),
            keras.layers.BatchNormalization(scale=False),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 3, use_bias=False, name="two"),
            keras.layers.BatchNormalization(scale=False),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="head"),
        ]
    )


def make_data(n=48):
    rng = np.random.default_rng(14)
    images = rng.normal(size=(n, 6, 6, 2)).astype("float32")
    return images, rng.integers(0, 3, size=n)


def make_muon():
    return Muon(
        OneCycle(0.2, 30),
        l2=0.01,
        muon_momentum=0.7,
        learning_rate_scales={"beta": Piecewise([4], [2.0, 0.5]), "head/kernel": 3.0},
    )


def compile_and_fit(optimizer, *, epochs=2, jit_compile=False):
    model = make_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, jit_compile=jit_compile)
    history = model.fit(*make_data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0)
    return model, history.history["loss"]


def test_fit_learns_the_same_with_and_without_xla():
    _, plain = compile_and_fit(make_muon(), epochs=4)
    _, compiled = compile_and_fit(make_muon(), epochs=4, jit_compile=True)
    np.testing.assert_allclose(plain, compiled, rtol=1e-3)
    assert plain[-1] < 0.8 * plain[0]


# Keras 3.15 itself calls NumPy 2 in a way that NumPy warns about whenever it saves a model.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "loss_scale"])
def test_saved_model_goes_on_the_same(tmp_path, wrapped):
    precision = "mixed_float16" if wrapped else "float32"
    model, _ = compile_and_fit(scale_for(precision, make_muon()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    inner = loaded.optimizer.inner_optimizer if wrapped else loaded.optimizer
    assert type(inner) is Muon
    assert int(inner.iterations) == 12
    for each in (model, loaded):
        each.fit(*make_data(), batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    "optimizer",
    [
        Muon(),
        make_muon(),
        Muon(
            0.1,
            muon_momentum=0.5,
            newton_schulz_steps=np.int64(5),
            newton_schulz_dtype="bfloat16",
            muon_variables=["one/", "two/"],
            momentum=0.5,
            nesterov=False,
            scaled_velocity=True,
            weight_decay=0.1,
            no_decay=["beta"],
            clipnorm=1.0,
        ),
    ],
    ids=["defaults", "schedules", "every_option"],
)
def test_config_round_trip(optimizer):
    config = json.loads(json.dumps(optimizer.get_config()))
    again = Muon.from_config(config)
    assert again.get_config() == optimizer.get_config()
    serialized = keras.optimizers.serialize(optimizer)
    assert serialized["registered_name"] == "cifarflow>Muon"
    assert keras.optimizers.deserialize(serialized).get_config() == optimizer.get_config()


@pytest.mark.parametrize("momentum", [0.0, 0.85])
def test_checkpoint_goes_on_the_same(tmp_path, momentum):
    rng = np.random.default_rng(15)
    weights = [rng.normal(size=shape) for shape in OTHERS.values()]
    gradients = [[rng.normal(size=w.shape).astype("float32") for w in weights] for _ in range(4)]

    def make():
        variables = [keras.Variable(w, name=name) for w, name in zip(weights, OTHERS, strict=True)]
        optimizer = Muon(FALL, momentum=momentum, nesterov=momentum > 0)
        optimizer.build(variables)
        values = [variable.value for variable in variables]
        return optimizer, variables, tf.train.Checkpoint(optimizer=optimizer, variables=values)

    optimizer, variables, checkpoint = make()
    for gradient in gradients[:2]:
        optimizer.apply(gradient, variables)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    again, others, checkpoint = make()
    checkpoint.read(path).assert_consumed()
    for gradient in gradients[2:]:
        optimizer.apply(gradient, variables)
        again.apply(gradient, others)
    for a, b in zip(variables, others, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


BAD = [
    *[
        ({"muon_momentum": value}, "muon_momentum", value)
        for value in (-0.1, 1, 1.5, math.nan, "0.6", None)
    ],
    *[
        ({"newton_schulz_steps": value}, "newton_schulz_steps", value)
        for value in (0, -1, 2.5, "3", None, True)
    ],
    *[
        ({"newton_schulz_dtype": value}, "newton_schulz_dtype", value)
        for value in ("float16", None, 32)
    ],
    *[
        ({"muon_variables": value}, "muon_variables", value)
        for value in ("kernel", (), 5, None, {"kernel": 1})
    ],
    *[({"muon_variables": [value]}, "muon_variables", value) for value in ("", "(", 5, None)],
    # SGD's own
    ({"learning_rate": -1}, "learning_rate", -1),
    ({"momentum": 1.5}, "momentum", 1.5),
    ({"momentum": 0.0}, "nesterov", True),
    ({"scaled_velocity": "no"}, "scaled_velocity", "no"),
    ({"learning_rate_scales": {"bias": -2}}, "learning_rate_scales", -2),
    ({"dampening": 0.5}, "dampening", 0.5),
]


@pytest.mark.parametrize(("arguments", "name", "value"), BAD, ids=lambda part: str(part)[:40])
def test_bad_arguments_are_quoted(arguments, name, value):
    with pytest.raises(ConfigError) as error:
        Muon(**arguments)
    assert name in str(error.value)
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patterns", [["kernel"], ["table", "bias"]])
def test_no_variable_for_muon_is_refused(patterns):
    optimizer = Muon(muon_variables=patterns)
    variables = [keras.Variable(np.ones((2, 2)), name="kernel")]
    with pytest.raises(ConfigError, match="muon_variables") as error:
        optimizer.build(variables)
    assert repr(patterns) in str(error.value)
    assert "'kernel'" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_expression_found_nowhere_is_refused():
    optimizer = Muon(learning_rate_scales={"gamma": 2.0})
    with pytest.raises(ConfigError, match=r"learning_rate_scales.*'gamma'"):
        optimizer.build([keras.Variable(np.ones(TALL), name="kernel")])


@pytest.mark.parametrize(
    ("matrix", "arguments", "quoted"),
    [
        (np.ones(3), {}, "(3,)"),
        (np.ones((2, 2, 2)), {}, "(2, 2, 2)"),
        (np.ones((2, 2), int), {}, "int64"),
        (np.ones((2, 2)), {"steps": 0}, "0"),
        (np.ones((2, 2)), {"dtype": "float16"}, "'float16'"),
    ],
)
def test_orthogonalize_refuses(matrix, arguments, quoted):
    with pytest.raises(ConfigError, match="must") as error:
        orthogonalize(matrix, **arguments)
    assert f"not {quoted}" in str(error.value)


def test_orthogonalize_refuses_unknown_sizes():
    with pytest.raises(ConfigError, match=r"known size, not \(None, 3\)"):
        tf.function(orthogonalize, autograph=False).get_concrete_function(tf.TensorSpec((None, 3)))


def test_arguments_after_the_first_are_keyword_only():
    with pytest.raises(TypeError):
        Muon(0.1, 0.6)
    with pytest.raises(TypeError):
        orthogonalize(np.ones((2, 2)), 3)
