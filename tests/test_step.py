"""One step of training and of evaluation, against hand computation."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import ConfigError
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.step import (
    Sums,
    count_correct,
    cross_entropy,
    make_eval_step,
    make_train_step,
)

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 2, 2, 3)).astype(np.float32)
LABELS = np.array([0, 2, 1, 1, 2], np.int32)
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]


def numpy_softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def numpy_losses(logits, targets):
    return -(targets * np.log(numpy_softmax(logits))).sum(-1)


def logits_of(model, images=IMAGES):
    kernel, bias = tiny.weights(model)[:2]
    return images.reshape(len(images), -1).astype(np.float64) @ kernel + bias


def tiny_batch(count=8):
    data = tiny.split(count)
    return tf.constant(data.images), tf.constant(data.labels)


def test_one_step_against_numpy():
    l2, rate = 0.03, 0.1
    model = tiny.linear(kernel_regularizer=keras.regularizers.L2(l2))
    kernel, bias = tiny.weights(model)
    logits = logits_of(model)
    error = (numpy_softmax(logits) - ONE_HOT) / 5
    expected_loss = numpy_losses(logits, ONE_HOT).mean() + l2 * (kernel**2).sum()

    sums = make_train_step(model, SGD(rate))(IMAGES, LABELS)

    flat = IMAGES.reshape(5, -1)
    np.testing.assert_allclose(float(sums.loss) / 5, expected_loss, rtol=1e-6)
    assert float(sums.correct) == (logits.argmax(-1) == LABELS).sum()
    assert float(sums.examples) == 5
    # The penalty is in the gradient as well as in the loss.
    new_kernel, new_bias = tiny.weights(model)
    np.testing.assert_allclose(
        new_kernel, kernel - rate * (flat.T @ error + 2 * l2 * kernel), atol=1e-6
    )
    np.testing.assert_allclose(new_bias, bias - rate * error.sum(0), atol=1e-6)


def test_steps_with_momentum_against_an_eager_loop():
    ours, theirs = tiny.tiny_cnn(l2=0.01), tiny.tiny_cnn(l2=0.01)
    step = make_train_step(ours, SGD(0.05, momentum=0.9, nesterov=True))
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True)
    for seed in range(3):
        data = tiny.split(8, seed)
        loss = step(data.images, data.labels).loss / 8
        with tf.GradientTape() as tape:
            outputs = theirs(data.images, training=True)
            expected = tf.reduce_mean(
                keras.losses.sparse_categorical_crossentropy(data.labels, outputs, from_logits=True)
            )
            expected += sum(theirs.losses)
        gradients = tape.gradient(expected, theirs.trainable_variables)
        optimizer.apply_gradients(zip(gradients, theirs.trainable_variables, strict=True))
        np.testing.assert_allclose(float(loss), float(expected), rtol=1e-5)
    for a, b in zip(tiny.weights(ours), tiny.weights(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_evaluation_includes_the_regularisation_and_changes_nothing():
    model = tiny.linear(kernel_regularizer=keras.regularizers.L2(0.5))
    before = tiny.weights(model)
    sums = make_eval_step(model)(IMAGES, LABELS)
    expected = numpy_losses(logits_of(model), ONE_HOT).sum() + 5 * 0.5 * (before[0] ** 2).sum()
    np.testing.assert_allclose(float(sums.loss), expected, rtol=1e-6)
    assert float(sums.examples) == 5
    for a, b in zip(before, tiny.weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batch_norm_moves_in_training_and_not_in_evaluation():
    inputs = keras.Input((2, 2, 3))
    norm = keras.layers.BatchNormalization(momentum=0.75)
    outputs = keras.layers.Dense(3)(keras.layers.Flatten()(norm(inputs)))
    model = keras.Model(inputs, outputs)
    make_eval_step(model)(IMAGES, LABELS)
    np.testing.assert_array_equal(norm.moving_mean, np.zeros(3))
    make_train_step(model, SGD(0.1))(IMAGES, LABELS)
    mean, variance = IMAGES.mean((0, 1, 2)), IMAGES.var((0, 1, 2))
    np.testing.assert_allclose(norm.moving_mean, 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, 0.75 + 0.25 * variance, rtol=1e-5)


def test_dropout_only_in_training():
    model = tiny.tiny_mlp(units=(32,), dropout=0.5)
    images, labels = tiny_batch()
    # A rate of 0 leaves the weights, so that nothing but the masks can change the loss.
    train_step, eval_step = make_train_step(model, SGD(0.0)), make_eval_step(model)
    trained = {float(train_step(images, labels).loss) for _ in range(3)}
    evaluated = {float(eval_step(images, labels).loss) for _ in range(3)}
    assert len(trained) == 3
    assert len(evaluated) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing(smoothing):
    logits = RNG.normal(size=(5, 3)).astype(np.float32)
    targets = (1 - smoothing) * ONE_HOT + smoothing / 3
    loss_fn = cross_entropy(label_smoothing=smoothing)
    for labels in (LABELS, ONE_HOT):
        losses = loss_fn(tf.constant(labels), tf.constant(logits))
        np.testing.assert_allclose(losses, numpy_losses(logits, targets), rtol=1e-5)
    theirs = keras.losses.categorical_crossentropy(
        ONE_HOT, logits, from_logits=True, label_smoothing=smoothing
    )
    np.testing.assert_allclose(losses, theirs, rtol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "0.1", None, True])
def test_label_smoothing_out_of_range(value):
    with pytest.raises(ConfigError, match=r"label_smoothing must be .*not") as caught:
        cross_entropy(label_smoothing=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_integer_labels_of_any_type(dtype):
    model = tiny.linear()
    sums = make_eval_step(model)(IMAGES, LABELS.astype(dtype))
    expected = numpy_losses(logits_of(model), ONE_HOT).sum()
    np.testing.assert_allclose(float(sums.loss), expected, rtol=1e-5)
    one_hot = make_eval_step(model)(IMAGES, ONE_HOT)
    np.testing.assert_allclose(float(one_hot.loss), expected, rtol=1e-5)
    assert float(one_hot.correct) == float(sums.correct)


def test_soft_labels():
    model = tiny.linear()
    soft = numpy_softmax(RNG.normal(size=(5, 3)) * 3).astype(np.float32)
    logits = logits_of(model)
    sums = make_eval_step(model)(IMAGES, soft)
    np.testing.assert_allclose(float(sums.loss), numpy_losses(logits, soft).sum(), rtol=1e-5)
    assert float(sums.correct) == (logits.argmax(-1) == soft.argmax(-1)).sum()


def test_probabilities_in_place_of_logits():
    images, labels = tiny_batch()
    logits = make_eval_step(tiny.tiny_mlp())(images, labels)
    model = tiny.tiny_mlp(softmax=True)
    loss_fn = cross_entropy(from_logits=False)
    probabilities = make_eval_step(model, loss_fn=loss_fn)(images, labels)
    np.testing.assert_allclose(float(probabilities.loss), float(logits.loss), rtol=1e-4)
    # A probability of exactly 0 must not make an infinite loss.
    losses = loss_fn(tf.constant([1]), tf.constant([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(losses, [-np.log(1e-7)], rtol=1e-5)


def test_a_loss_of_ones_own():
    def squares(labels, outputs):
        return tf.reduce_sum((outputs - tf.one_hot(labels, 3)) ** 2, -1)

    model = tiny.linear()
    kernel = tiny.weights(model)[0]
    error = logits_of(model) - ONE_HOT
    evaluated = make_eval_step(model, loss_fn=squares)(IMAGES, LABELS)
    sums = make_train_step(model, SGD(0.1), loss_fn=squares)(IMAGES, LABELS)
    np.testing.assert_allclose(float(sums.loss), (error**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(float(evaluated.loss), (error**2).sum(), rtol=1e-5)
    gradient = IMAGES.reshape(5, -1).T @ (2 * error / 5)
    np.testing.assert_allclose(tiny.weights(model)[0], kernel - 0.1 * gradient, atol=1e-5)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_trains_like_float32(precision):
    images, labels = tiny_batch(32)
    trained = {}
    for policy in ("float32", precision):
        model = tiny.tiny_mlp(units=(16,), dtype_policy=policy)
        start = tiny.weights(model)
        step = make_train_step(model, scale_for(policy, SGD(0.1, momentum=0.9)))
        for _ in range(5):
            sums = step(images, labels)
        assert sums.loss.dtype == tf.float32
        trained[policy] = tiny.weights(model)
    assert {w.dtype for w in trained[precision]} == {np.dtype("float32")}
    for before, exact, half in zip(start, *trained.values(), strict=True):
        moved = np.abs(exact - before).max()
        # Gradients left scaled would be thousands of times too large, a lost update 100 % off.
        assert moved > 1e-3
        assert np.abs(exact - half).max() < 0.1 * moved


def test_an_overflow_is_skipped_and_the_scale_halved():
    images, labels = tiny_batch()
    model = tiny.tiny_mlp(dtype_policy="mixed_float16")
    inner = SGD(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**24)
    step = make_train_step(model, optimizer)
    before = tiny.weights(model)
    first = float(step(images, labels).loss)
    assert float(optimizer.dynamic_scale) == 2.0**23
    assert int(inner.iterations) == 0
    for a, b in zip(before, tiny.weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    for _ in range(30):
        last = float(step(images, labels).loss)
    assert 2.0**8 < float(optimizer.dynamic_scale) < 2.0**23
    assert int(inner.iterations) >= 10
    assert last < first
    assert step.experimental_get_tracing_count() == 1


def test_xla_gives_the_same():
    images, labels = tiny_batch()
    results = []
    for jit_compile in (False, True):
        model = tiny.tiny_mlp(l2=0.01)
        step = make_train_step(model, SGD(0.1, momentum=0.9), jit_compile=jit_compile)
        losses = [float(step(images, labels).loss) for _ in range(4)]
        losses.append(float(make_eval_step(model, jit_compile=jit_compile)(images, labels).loss))
        results.append((losses, tiny.weights(model)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_two_models_each_with_its_own_step():
    images, labels = tiny_batch()
    alone = tiny.tiny_mlp()
    step = make_train_step(alone, SGD(0.1))
    expected = [float(step(images, labels).loss) for _ in range(3)]

    first, second = tiny.tiny_mlp(), tiny.tiny_cnn()
    first_step, second_step = (make_train_step(m, SGD(0.1)) for m in (first, second))
    losses = []
    for _ in range(3):
        losses.append(float(first_step(images, labels).loss))
        second_step(images, labels)
    assert losses == expected
    for step in (first_step, second_step):
        assert step.experimental_get_tracing_count() == 1


def test_the_step_in_a_loop_of_ones_own():
    model = tiny.tiny_mlp()
    step = make_train_step(model, SGD(0.02, momentum=0.9))
    total, means = Sums.zero(), []
    for number, (images, labels) in enumerate(tiny.batches().dataset(0, 160), 1):
        total += step(images, labels)
        if number % 8 == 0:
            assert float(total.examples) == 64
            means.append(float(total.loss / total.examples))
            total = Sums.zero()
    assert means[-1] < 0.8 * means[0]
    assert step.experimental_get_tracing_count() == 1


def test_sums_add():
    one = Sums(*map(tf.constant, (1.0, 2.0, 3.0)))
    assert [float(value) for value in one + one + Sums.zero()] == [2.0, 4.0, 6.0, 0.0]


def test_count_correct():
    outputs = tf.constant([[0.1, 0.9], [0.8, 0.2], [0.7, 0.3]])
    assert float(count_correct(tf.constant([1, 0, 1]), outputs)) == 2
    assert float(count_correct(tf.constant([[0.4, 0.6], [0.0, 1.0], [1.0, 0.0]]), outputs)) == 2


def test_a_model_with_nothing_to_train_is_refused():
    model = tiny.linear()
    model.trainable = False
    with pytest.raises(ConfigError, match="has no trainable variable"):
        make_train_step(model, SGD(0.1))


def test_frozen_layers_stay():
    model = tiny.tiny_mlp()
    model.layers[-1].trainable = False
    frozen = [np.asarray(w) for w in model.layers[-1].weights]
    images, labels = tiny_batch()
    before = tiny.weights(model)
    make_train_step(model, SGD(0.1))(images, labels)
    for a, b in zip(frozen, model.layers[-1].weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(before[0] - tiny.weights(model)[0]).max() > 0


def test_a_model_that_ends_in_a_softmax_gets_the_loss_of_probabilities():
    data = tiny.split(16)
    sums = {}
    for softmax in (False, True):
        step = make_eval_step(tiny.tiny_mlp(softmax=softmax))
        sums[softmax] = step(tf.constant(data.images), tf.constant(data.labels))
    np.testing.assert_allclose(float(sums[True].loss), float(sums[False].loss), rtol=1e-4)


def test_float16_without_loss_scaling_is_refused():
    model = tiny.tiny_mlp(dtype_policy="mixed_float16")
    with pytest.raises(ConfigError, match=r"computes in float16, .* not SGD alone"):
        make_train_step(model, SGD(0.1))


# Variables of the tiny net in order: kernel and bias of conv, dense and logits.
CONV_KERNEL, CONV_BIAS, DENSE = "conv2d[^/]*/kernel", "conv2d[^/]*/bias", "dense[^/]*/"


def frozen_run(freeze, *, steps=4, **options):
    """Values of all variables after each step of a net whose parts stop to train."""
    model = tiny.tiny_cnn()
    optimizer = SGD(0.05, momentum=0.9, nesterov=True)
    step = make_train_step(model, optimizer, freeze=freeze, **options)
    states = [tiny.weights(model)]
    for seed in range(steps):
        data = tiny.split(8, seed)
        step(data.images, data.labels)
        states.append(tiny.weights(model))
    assert step.experimental_get_tracing_count() == 1
    return states, optimizer


def moves(states):
    """[step][variable]: whether the step changed it."""
    pairs = itertools.pairwise(states)
    return [[bool((a != b).any()) for a, b in zip(*pair, strict=True)] for pair in pairs]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_frozen_variable_stops_and_the_others_go_on(jit_compile):
    plain, _ = frozen_run(None, jit_compile=jit_compile)
    states, optimizer = frozen_run({CONV_BIAS: 2}, jit_compile=jit_compile)
    assert moves(plain) == [[True] * 6] * 4
    assert moves(states) == [[True] * 6] * 2 + [[True, False, *[True] * 4]] * 2
    for before, after in zip(plain[:3], states[:3], strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    # Momentum would have carried it on.
    assert np.abs(np.asarray(optimizer.momentums[1])).max() > 0


def test_frozen_from_the_start_and_in_stages():
    states, _ = frozen_run({CONV_KERNEL: 0, CONV_BIAS: 3, "conv2d": 4, DENSE: 1})
    assert moves(states) == [
        [False, True, True, True, True, True],
        [False, True, False, False, True, True],
        [False, True, False, False, True, True],
        [False, False, False, False, True, True],
    ]
    assert moves(frozen_run({CONV_BIAS: 0})[0]) == [[True, False, *[True] * 4]] * 4


def test_freezing_follows_the_updates_that_count():
    """A step that float16 skips for an overflow is no update."""
    model = tiny.tiny_cnn(dtype_policy="mixed_float16")
    optimizer = scale_for("mixed_float16", SGD(0.05))
    step = make_train_step(model, optimizer, freeze={CONV_BIAS: 1})
    data = tiny.split(8)
    optimizer.dynamic_scale.assign(2.0**60)
    states = [tiny.weights(model)]
    for scale in (2.0**60, 2.0**10, 2.0**10):
        optimizer.dynamic_scale.assign(scale)
        step(data.images, data.labels)
        states.append(tiny.weights(model))
    assert [bool((a[1] != b[1]).any()) for a, b in itertools.pairwise(states)] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("freeze", "text"),
    [
        ("bias", r"freeze must be parts of variables' paths .* not 'bias'"),
        ({"": 1}, r"freeze's keys must be non-empty regular expressions, not ''"),
        ({"(": 1}, r"freeze's keys must be non-empty regular expressions, not '\('"),
        ({"gamma": 1}, r"freeze must match trainable variables, not 'gamma': there are 'con"),
        ({"bias": -1}, r"freeze\['bias'\] must be .* not -1"),
        ({"bias": 1.5}, r"freeze\['bias'\] must be .* not 1.5"),
        ({".": 3}, r"freeze must leave a variable to train, not \{'.': 3\}"),
    ],
)
def test_what_cannot_be_frozen(freeze, text):
    with pytest.raises(ConfigError, match=text):
        make_train_step(tiny.tiny_cnn(), SGD(0.1), freeze=freeze)
