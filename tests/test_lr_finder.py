"""The learning-rate finder: what it suggests, and that it leaves nothing behind."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import ConfigError, DataError
from cifarflow.optimizers.muon import Muon
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.schedules import Cosine
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.build import build_optimizer
from cifarflow.recipes.find import find_recipe_learning_rate
from cifarflow.recipes.named import get_recipe
from cifarflow.training import lr_finder
from cifarflow.training.lr_finder import find_learning_rate
from cifarflow.training.step import make_train_step

QUICK = {"steps": 20, "low": 1e-3, "high": 1.0}


def bits(variables):
    return [np.asarray(variable).tobytes() for variable in variables]


def quadratic():
    """A model of one number, and the loss (number - 1)**2 / 2: all can be computed by hand."""
    inputs = keras.Input((2, 2, 3))
    zero = keras.layers.Flatten()(inputs) * 0
    outputs = keras.layers.Dense(2, kernel_initializer="zeros", name="only")(zero)
    model = keras.Model(inputs, outputs)

    def loss_fn(labels, outputs):
        return (outputs[:, 0] - 1) ** 2 / 2

    data = tf.data.Dataset.from_tensors((np.ones((4, 2, 2, 3), np.float32), np.zeros(4, np.int32)))
    return model, data, loss_fn


def test_the_ramp_by_hand():
    model, data, loss_fn = quadratic()
    found = find_learning_rate(
        model,
        SGD(Cosine(0.5, 10), momentum=0.9),
        batches=data,
        steps=30,
        low=1e-3,
        high=100.0,
        smoothing=0.5,
        loss_fn=loss_fn,
    )
    weight, velocity, average, least = 0.0, 0.0, 0.0, math.inf
    for step in range(30):
        rate = 1e-3 * 1e5 ** (step / 29)
        loss = (weight - 1) ** 2 / 2
        average = 0.5 * average + 0.5 * loss
        smoothed = average / (1 - 0.5 ** (step + 1))
        if smoothed > 4 * least:
            break
        least = min(least, smoothed)
        np.testing.assert_allclose(found.rates[step], rate, rtol=1e-6)
        np.testing.assert_allclose(found.losses[step], loss, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(found.smoothed[step], smoothed, rtol=1e-3, atol=1e-7)
        velocity = 0.9 * velocity - rate * (weight - 1)
        weight += velocity
    assert found.diverged
    assert len(found.rates) == step
    minimum = found.rates[3 + int(np.argmin(found.smoothed[3:]))]
    assert found.tenth_of_minimum == pytest.approx(minimum / 10)
    assert found.rates[3] < found.steepest < minimum


def test_suggestions():
    rates = np.logspace(-4, 0, 101)
    # It falls by a straight line from 1e-3 to 1e-2, then climbs, then falls as steeply once more.
    x = np.log10(rates)
    smoothed = 3 - np.clip(x + 3, 0, 1) + 2 * np.clip(x + 2, 0, 1) - np.clip(x + 1, 0, 1)
    steepest, tenth = lr_finder._suggest(rates, smoothed, smoothed, smoothing=0.9)
    assert 1e-3 < steepest < 1e-2
    assert tenth == pytest.approx(1e-3)
    # Of noise, and of a loss that only rises, nothing is suggested.
    noise = np.random.default_rng(0).normal(2.3, 0.1, 101)
    average = np.convolve(np.pad(noise, (18, 0), "edge"), np.full(19, 1 / 19), "valid")
    for losses, smoothed in ((noise, average), (x, x)):
        assert lr_finder._suggest(rates, losses, smoothed, smoothing=0.9) == (None, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(0.1, momentum=0.9),
        lambda: Muon(Cosine(0.1, 50), momentum=0.9, learning_rate_scales={"bias": 2.0}),
        lambda: scale_for("mixed_float16", SGD(Cosine(0.1, 50))),
        lambda: keras.optimizers.SGD(lambda: 0.1),
    ],
    ids=["number", "muon", "half precision", "callable"],
)
def test_all_is_as_it_was_to_the_bit(make):
    optimizer = make()
    policy = "mixed_float16" if hasattr(optimizer, "inner_optimizer") else "float32"
    if isinstance(optimizer, Muon):
        model = tiny.tiny_cnn(dropout=(0.5, 0.5), batch_norm_momentum=0.75)
    else:
        model = tiny.tiny_mlp(dropout=0.5, dtype_policy=policy)
    step = make_train_step(model, optimizer)
    step(*tiny.split(8))
    before = bits([*model.variables, *optimizer.variables])
    paths = [variable.path for variable in optimizer.variables]
    rate = float(optimizer.learning_rate)
    found = find_learning_rate(model, optimizer, batches=tiny.batches(), **QUICK)
    assert len(found.rates) == 20
    assert len(set(found.losses)) > 10  # it did train
    assert bits([*model.variables, *optimizer.variables]) == before
    assert [variable.path for variable in optimizer.variables] == paths
    assert float(optimizer.learning_rate) == rate
    # The same again: random generators went back too.
    again = find_learning_rate(model, optimizer, batches=tiny.batches(), **QUICK)
    assert again == found


def test_it_is_as_it_was_after_an_error(monkeypatch):
    model, optimizer = tiny.tiny_mlp(), SGD(Cosine(0.1, 50))
    optimizer.build(model.trainable_variables)
    before = bits([*model.variables, *optimizer.variables])
    schedule = optimizer._learning_rate
    run = lr_finder.StepRunner.run
    calls = []

    def failing(self, count):
        calls.append(count)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(self, count)

    monkeypatch.setattr(lr_finder.StepRunner, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(model, optimizer, batches=tiny.batches(), **QUICK)
    assert bits([*model.variables, *optimizer.variables]) == before
    assert optimizer._learning_rate is schedule


def test_options_reach_the_step(monkeypatch):
    seen = {}

    def make(model, optimizer, **options):
        seen.update(options)
        return make_train_step(model, optimizer, **options)

    monkeypatch.setattr(lr_finder, "make_train_step", make)
    options = {"freeze": {"bias": 0}, "jit_compile": True, "fused": False, "accumulate_steps": 2}
    find_learning_rate(tiny.tiny_mlp(), SGD(0.1), batches=tiny.batches(), **options, **QUICK)
    assert seen == {"loss_fn": None, **options}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("steps", value) for value in (9, 0, 1.5, None)],
        *[("low", value) for value in (0, -1, math.nan, "1")],
        *[("high", value) for value in (1e-3, 1e-4, math.inf)],
        *[("smoothing", value) for value in (-0.1, 1.0, None)],
        *[("diverged_at", value) for value in (1.0, 0, math.nan)],
        ("accumulate_steps", 3),
    ],
)
def test_bad_arguments(option, value):
    model, optimizer = tiny.tiny_mlp(), SGD(0.1)
    with pytest.raises(ConfigError, match=option) as caught:
        find_learning_rate(model, optimizer, batches=tiny.batches(), **{**QUICK, option: value})
    assert repr(value) in str(caught.value)


def test_bad_input():
    with pytest.raises(ConfigError, match="optimizer must be a Keras optimizer, not 'sgd'"):
        find_learning_rate(tiny.tiny_mlp(), "sgd", batches=tiny.batches())
    model = tiny.tiny_mlp(image_shape=(9, 9, 3))
    with pytest.raises(DataError, match=r"images must be \[None, 9, 9, 3\]"):
        find_learning_rate(model, SGD(0.1), batches=tiny.batches(), **QUICK)
    options = {"steps": 20, "low": 1e30, "high": 1e31}
    message = r"the loss became \S+ at step \d+ of 20, before .* 1e\+30"
    with pytest.raises(ConfigError, match=message):
        find_learning_rate(tiny.tiny_cnn(), SGD(0.1), batches=tiny.batches(), **options)


def test_scaled_and_as_a_table():
    found = find_learning_rate(tiny.tiny_mlp(), SGD(0.1), batches=tiny.batches(), **QUICK)
    double = found.scaled(2)
    np.testing.assert_allclose(double.rates, 2 * np.array(found.rates))
    assert double.losses == found.losses
    for name in ("steepest", "tenth_of_minimum"):
        value = getattr(found, name)
        assert getattr(double, name) == (None if value is None else 2 * value)
    with pytest.raises(ConfigError, match="factor must be a finite number > 0, not 0"):
        found.scaled(0)
    lines = found.table(lines=5).splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "6", "11", "15", "20"]
    assert lines[-1].split()[1] == "1"
    with pytest.raises(ConfigError, match="lines must be a whole number >= 1, not 0"):
        found.table(lines=0)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_recipes_rates_are_in_its_own_terms(optimizer):
    model = {"model": "cnn", "model_options": {"filters": [4], "kernel_size": 3, "dense_units": 4}}
    model["precision"] = "float32"
    recipe = get_recipe("lab_mlp", batch_size=8, optimizer=optimizer, **model)
    plain = find_recipe_learning_rate(recipe, dataset=tiny.dataset(), **QUICK)
    # The rate of an example is a fourth of that of a batch of 8, given for 2.
    other = get_recipe(recipe, learning_rate_examples=2, learning_rate=3.0)
    found = find_recipe_learning_rate(other, dataset=tiny.dataset(), **QUICK)
    np.testing.assert_allclose(found.rates, plain.rates)
    if optimizer == "muon":
        np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-5)
    else:
        assert found.losses[-1] != plain.losses[-1]
        four = {**QUICK, "low": 4e-3, "high": 4.0}
        scaled = find_recipe_learning_rate(recipe, dataset=tiny.dataset(), **four)
        np.testing.assert_allclose(found.losses, scaled.losses, rtol=1e-4)
    assert isinstance(build_optimizer(other, steps_per_epoch=8), SGD)
    with pytest.raises(ConfigError, match=r"high must be .* > 0.1, not 0.01"):
        find_recipe_learning_rate(recipe, dataset=tiny.dataset(), low=0.1, high=0.01)


def test_a_ramp_is_not_saved():
    with pytest.raises(NotImplementedError):
        lr_finder._Given().get_config()
