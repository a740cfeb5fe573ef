"""Gradient accumulation: a step in micro-batches is the step on the whole batch."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import ConfigError
from cifarflow.optimizers.muon import Muon
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.training.capsule import examine_step
from cifarflow.training.contract import check_step
from cifarflow.training.gradients import make_gradients
from cifarflow.training.loop import train
from cifarflow.training.profile import profile
from cifarflow.training.step import Sums, make_train_step
from cifarflow.trials import Trials

BATCH = tuple(map(tf.constant, tiny.split(16)))
L = keras.layers


def trained(build, optimizer, steps=2, **options):
    """The sums of the last step, and all variables after it."""
    model = build()
    step = make_train_step(model, optimizer, **options)
    for _ in range(steps):
        sums = step(*BATCH)
    return Sums(*map(float, sums)), tiny.weights(model)


def close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("count", [2, 16])
def test_it_is_the_step_on_the_whole_batch(count):
    # The penalty is counted once, and clipping sees the mean.
    build = functools.partial(tiny.tiny_cnn, l2=0.01)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "global_clipnorm": 0.5}
    whole, theirs = trained(build, SGD(0.05, **options))
    sums, ours = trained(build, SGD(0.05, **options), accumulate_steps=count)
    close(ours, theirs, atol=1e-6)
    close(sums, whole, rtol=1e-6)
    assert sums.examples == 16


@pytest.mark.parametrize("by_xla", [True, False])
def test_by_xla_and_by_keras_with_something_frozen(by_xla):
    options = {"freeze": {"conv": 1}, "jit_compile": by_xla, "fused": by_xla}
    whole, theirs = trained(tiny.tiny_cnn, SGD(0.05, momentum=0.9), **options)
    sums, ours = trained(tiny.tiny_cnn, SGD(0.05, momentum=0.9), accumulate_steps=4, **options)
    close(ours, theirs, atol=1e-6)
    close(sums, whole, rtol=1e-6)


def test_muon():
    whole, theirs = trained(tiny.tiny_cnn, Muon(0.02, momentum=0.9))
    sums, ours = trained(tiny.tiny_cnn, Muon(0.02, momentum=0.9), accumulate_steps=4)
    # Newton and Schulz's iteration makes more of a difference.
    close(ours, theirs, atol=1e-3)
    close(sums, whole, rtol=1e-4)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_half_precision(precision):
    build = functools.partial(tiny.tiny_mlp, dtype_policy=precision)

    def make():
        return SGD(0.05) if precision == "bfloat16" else scale_for(precision, SGD(0.05))

    whole, theirs = trained(build, make(), steps=1)
    sums, ours = trained(build, make(), steps=1, accumulate_steps=4)
    close(ours, theirs, rtol=0.02, atol=2e-3)
    close(sums, whole, rtol=0.02)


def odd_model():
    """A model with an embedding, whose gradient is sparse, and a weight that nothing needs."""

    class Unneeded(L.Layer):
        def build(self, _):
            self.unneeded = self.add_weight(shape=(2,), name="unneeded")

        def call(self, x):
            return x

    inputs = keras.Input(tiny.SHAPE)
    x = L.Embedding(256, 2)(L.Flatten()(inputs))
    outputs = L.Dense(10)(Unneeded()(L.Flatten()(x)))
    return keras.Model(inputs, outputs)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
def test_sparse_gradients_and_none():
    keras.utils.set_random_seed(1)
    _, theirs = trained(odd_model, SGD(0.05))
    keras.utils.set_random_seed(1)
    _, ours = trained(odd_model, SGD(0.05), accumulate_steps=4)
    close(ours, theirs, atol=1e-6)


def test_batch_norm_takes_the_statistics_of_micro_batches():
    def build():
        inputs = keras.Input(tiny.SHAPE)
        norm = L.BatchNormalization(momentum=0.75, name="norm")
        x = L.Flatten()(norm(L.Rescaling(1 / 255)(inputs)))
        return keras.Model(inputs, L.Dense(10)(x))

    model = build()
    make_train_step(model, SGD(0.0), accumulate_steps=2)(*BATCH)
    mean = np.zeros(3)
    for part in np.split(BATCH[0].numpy() / 255, 2):
        mean = 0.75 * mean + 0.25 * part.mean((0, 1, 2))
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, mean, rtol=1e-5)


def test_dropout_differs_between_micro_batches():
    model = tiny.tiny_mlp(units=(64,), dropout=0.5)
    same = [tf.repeat(part[:1], 16, 0) for part in BATCH]
    seeds = [v for v in model.variables if "seed" in v.path]
    before = tiny.weights(model)
    make_train_step(model, SGD(0.0), accumulate_steps=4)(*same)
    assert seeds
    moved = [not np.array_equal(a, b) for a, b in zip(before, tiny.weights(model), strict=True)]
    assert sum(moved) == len(seeds)


def test_a_step_that_is_not_finite_is_left_out_whole():
    images = BATCH[0].numpy().astype(np.float32)
    images[9] = np.nan  # in the second half

    def build():
        inputs = keras.Input(tiny.SHAPE)
        x = L.Flatten()(L.BatchNormalization()(inputs))
        return keras.Model(inputs, L.Dense(10)(x))

    model = build()
    before = tiny.weights(model)
    step = make_train_step(model, SGD(0.1), accumulate_steps=2, skip_nonfinite=True)
    sums = step(tf.constant(images), BATCH[1])
    assert (float(sums.skipped), float(sums.examples), float(sums.loss)) == (1, 0, 0)
    close(tiny.weights(model), before, rtol=0)
    assert float(step(*BATCH).skipped) == 0


def test_the_loss_of_ones_own_may_decide_by_tensors():
    def loss_fn(labels, outputs):
        losses = tf.reduce_sum((outputs - tf.one_hot(labels, 10)) ** 2, -1)
        if tf.reduce_mean(losses) > 1e9:
            losses *= 0
        return losses

    whole, theirs = trained(tiny.tiny_mlp, SGD(0.01), loss_fn=loss_fn)
    sums, ours = trained(tiny.tiny_mlp, SGD(0.01), loss_fn=loss_fn, accumulate_steps=4)
    close(ours, theirs, atol=1e-6)
    close(sums, whole, rtol=1e-5)


def test_gradients_and_findings():
    model = tiny.tiny_cnn(l2=0.1)
    whole, parts = (make_gradients(model, accumulate_steps=k)(*BATCH) for k in (1, 4))
    close(parts.values, whole.values, atol=1e-6)
    np.testing.assert_allclose(parts[:2], whole[:2], rtol=1e-6)
    found = examine_step(model, SGD(0.1), *BATCH, accumulate_steps=4)
    assert found.is_sound
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-6)


def test_the_contract():
    batches = tiny.batches(128, batch_size=64)
    for count in (8, 64):
        check_step(tiny.tiny_cnn(l2=0.1), SGD(0.1), batches=batches, accumulate_steps=count)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", None, True])
def test_bad_counts(count):
    with pytest.raises(ConfigError, match="accumulate_steps must be a whole number >= 1") as caught:
        make_train_step(tiny.tiny_mlp(), SGD(0.1), accumulate_steps=count)
    assert repr(count) in str(caught.value)


def test_batches_that_cannot_be_cut():
    batches = tiny.batches(batch_size=8)
    message = r"^accumulate_steps must divide the batch size of 8, not 3$"
    for call in (functools.partial(train, epochs=1), profile, check_step):
        with pytest.raises(ConfigError, match=message):
            call(tiny.tiny_mlp(), SGD(0.1), batches=batches, accumulate_steps=3)
    with pytest.raises(ConfigError, match=message):
        get_recipe("lab_mlp", batch_size=8, accumulate_steps=3)
    # AutoGraph makes an error of its own of it.
    with pytest.raises(Exception, match="ConfigError: accumulate_steps must divide the batch size"):
        make_train_step(tiny.tiny_mlp(), SGD(0.1), accumulate_steps=3)(*BATCH)
    uneven = tf.data.Dataset.from_tensor_slices(tuple(tiny.split(20))).batch(8)
    with pytest.raises(ConfigError, match=r"must be 1, not 2, where batches differ in size: batch"):
        train(tiny.tiny_mlp(), SGD(0.1), batches=uneven, epochs=1, accumulate_steps=2)


RECIPE = get_recipe("lab_mlp", **tiny.MLP, epochs=1.0, batch_size=8, accumulate_steps=4)


def test_a_run_a_trial_and_a_profile(tmp_path):
    data = tiny.dataset()
    run = train_recipe(RECIPE, dataset=data, workdir=tmp_path / "run", profile=str, check=True)
    whole = train_recipe(RECIPE, dataset=data, accumulate_steps=1)
    assert run.summary["steps"] == whole.summary["steps"] == 8
    close(tiny.weights(run.model), tiny.weights(whole.model), atol=1e-5)
    rates = [[row["learning_rate"] for row in each.history.rows] for each in (run, whole)]
    assert rates[0] == rates[1]
    trial = Trials(RECIPE, data).run(0)
    assert trial.weights_sha256 == run.summary["weights_sha256"]
