"""Lookahead and the moving average of weights, against NumPy."""

import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.pipeline import evaluation_batches
from cifarflow.errors import CheckpointError, ConfigError
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.sgd import SGD
from cifarflow.training import loop, runner
from cifarflow.training.averaging import Averaging, Lookahead, WeightEMA
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.history import History
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted, make_evaluate, train
from cifarflow.training.step import make_eval_step, make_train_step

STEPS = 20


def net(**kwargs):
    """A model with BatchNorm, whose dropout has a random generator among the variables."""
    return tiny.tiny_cnn(**{"batch_norm_momentum": 0.8, "dropout": 0.2, **kwargs})


def sgd():
    return SGD(0.05, momentum=0.9, nesterov=True)


def floats(model):
    return [np.asarray(v) for v in model.variables if "float" in v.dtype]


def averages(averaging):
    return [np.asarray(each) for each in averaging.variables[1:]]


def count(averaging):
    return int(averaging.variables[0].value)


def validation(images=20):
    data = tiny.split(images, 1)
    return evaluation_batches(data.images, data.labels, batch_size=8)


def run_tiny(model=None, **kwargs):
    """Trains for 20 steps; also returns the float variables that hooks saw after each step."""
    model = model if model is not None else net()
    seen = []
    note = Hook(Every(steps=1), lambda state: seen.append(floats(state.model)))
    options = {"batches": tiny.batches(), "total_steps": STEPS, "hooks": [note], **kwargs}
    return train(model, options.pop("optimizer", None) or sgd(), **options), seen


def assert_close(ours, theirs, rtol=1e-5, atol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def numpy_lookahead(model, *, every_steps, decay, power, optimizer=None):
    """Trains by plain steps with the averages taken by NumPy between them."""
    step = make_train_step(model, optimizer or sgd())
    variables = [v for v in model.variables if "float" in v.dtype]
    mean = [w.astype(np.float64) for w in floats(model)]
    for t, (images, labels) in enumerate(tiny.batches().dataset(0, STEPS), 1):
        step(images, labels)
        if t % every_steps == 0:
            d = decay * (t / STEPS) ** power
            mean = [d * m + (1 - d) * w for m, w in zip(mean, floats(model), strict=True)]
            for variable, value in zip(variables, mean, strict=True):
                variable.assign(value.astype(np.float32))
    return mean


def numpy_ema(start, seen, *, decay, every_steps, warmup):
    mean = [w.astype(np.float64) for w in start]
    for t, weights in enumerate(seen, 1):
        if t % every_steps == 0:
            n = t // every_steps
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            mean = [d * m + (1 - d) * w for m, w in zip(mean, weights, strict=True)]
    return mean


@pytest.fixture(scope="module")
def plain():
    """A run without averages: its model's first weights, those after each step, its rows."""
    model = net()
    start = floats(model)
    run, seen = run_tiny(model, validation=validation())
    return start, seen, run


@pytest.mark.parametrize(
    "options",
    [
        {"every_steps": 5, "decay": 0.95**5, "power": 3},
        # 20 is no multiple: the last two steps are dropped.
        {"every_steps": 3, "decay": 0.9, "power": 0.5},
        {"every_steps": 1, "decay": 0.7, "power": 0},
    ],
)
def test_lookahead_against_numpy(options):
    expected = numpy_lookahead(net(), **options)
    averaging = Lookahead(**options)
    run, seen = run_tiny(averaging=averaging)
    assert_close(floats(run.model), expected)
    assert_equal(floats(run.model), averages(averaging))
    assert count(averaging) == STEPS
    assert run.summary["step_traces"] == 1
    # The model itself was pulled back on the way, except where steps were left over.
    left_over = STEPS % options["every_steps"]
    assert_equal(seen[-1 - left_over], floats(run.model))
    assert left_over == 0 or np.abs(seen[-1][0] - seen[-1 - left_over][0]).max() > 0


def test_lookahead_is_that_of_airbench_by_default():
    averaging = Lookahead()
    assert averaging.every_steps == 5
    steps = np.arange(1, 486)
    ours = [float(averaging.decay_at(step, total_steps=485)) for step in steps]
    np.testing.assert_allclose(ours, 0.95**5 * (steps / 485) ** 3, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.999, "every_steps": 1, "warmup": True},
        {"decay": 0.9, "every_steps": 1, "warmup": False},
        {"decay": 0.3, "every_steps": 3, "warmup": True},
    ],
)
def test_the_moving_average_against_numpy(plain, options):
    start, plain_seen, plain_run = plain
    averaging = WeightEMA(**options)
    run, seen = run_tiny(averaging=averaging)
    # Training is the same, bit for bit.
    for weights, theirs in zip(seen, plain_seen, strict=True):
        assert_equal(weights, theirs)
    train_rows = [row for row in plain_run.history.rows if row["split"] == "train"]
    for key in ("loss", "accuracy", "step"):
        assert [row[key] for row in run.history.rows] == [row[key] for row in train_rows]
    assert_close(floats(run.model), numpy_ema(start, plain_seen, **options))
    assert_equal(floats(run.model), averages(averaging))
    assert run.summary["step_traces"] == 1


def test_keep_last(plain):
    start, plain_seen, _ = plain
    averaging = WeightEMA(decay=0.9, warmup=False, keep_last=True)
    run, seen = run_tiny(averaging=averaging, validation=validation())
    # Nor does validation change anything.
    for weights, theirs in zip(seen, plain_seen, strict=True):
        assert_equal(weights, theirs)
    assert_equal(floats(run.model), plain_seen[-1])
    evaluate = make_evaluate(run.model, make_eval_step(run.model))
    own = evaluate(validation())
    with averaging.averaged():
        assert_close(
            floats(run.model),
            numpy_ema(start, plain_seen, decay=0.9, every_steps=1, warmup=False),
        )
        inside = evaluate(validation())
    assert_equal(floats(run.model), plain_seen[-1])
    assert inside.loss == run.history.rows[-1]["loss"] != own.loss


def test_validation_sees_the_averages_and_leaves_training_alone():
    expected, seen = [], []
    model, averaging = net(), Lookahead(decay=0.9)
    evaluate = make_evaluate(model, make_eval_step(model))

    def note(state):
        with averaging.averaged():
            expected.append(evaluate(validation()))

    hooks = [Hook(Every(steps=6), note), Hook(Every(steps=1), lambda s: seen.append(floats(model)))]
    run, _ = run_tiny(model, averaging=averaging, validation=validation(), hooks=hooks)
    rows = [row for row in run.history.rows if row["split"] == "validation"]
    assert [row["step"] for row in rows] == [8, 16, 20]
    _, unvalidated = run_tiny(averaging=averaging)
    for ours, theirs in zip(seen, unvalidated, strict=True):
        assert_equal(ours, theirs)
    # The last row is of the model that the run leaves.
    final = evaluate(validation())
    assert (rows[-1]["loss"], rows[-1]["accuracy"]) == final == expected[-1]
    # So is each row of a run that ends there with averages of the same kind.
    middle = next(row for row in rows if row["step"] == 8)
    stop = Hook(Every(steps=8), lambda state: state.stop("seen enough"))
    stopped, _ = run_tiny(averaging=averaging, validation=validation(), hooks=[stop])
    assert stopped.summary["steps"] == 8
    assert stopped.history.rows[-1]["loss"] == middle["loss"]
    evaluate = make_evaluate(stopped.model, make_eval_step(stopped.model))
    assert evaluate(validation()).loss == middle["loss"]


def test_an_error_within_the_block_leaves_the_own_weights():
    averaging = WeightEMA(keep_last=True)
    run, _ = run_tiny(tiny.tiny_mlp(), averaging=averaging)
    before = hash_arrays(run.model.variables)

    def fail():
        with averaging.averaged():
            assert hash_arrays(run.model.variables) != before
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert hash_arrays(run.model.variables) == before


@pytest.mark.parametrize("averaging", [Lookahead(), WeightEMA(every_steps=5)])
def test_without_an_update_the_model_keeps_its_own_weights(averaging, plain):
    _, plain_seen, _ = plain
    stop = Hook(Every(steps=4), lambda state: state.stop("too early"))
    run, _ = run_tiny(averaging=averaging, hooks=[stop], validation=validation())
    assert run.summary["steps"] == 4
    assert_equal(floats(run.model), plain_seen[3])
    evaluate = make_evaluate(run.model, make_eval_step(run.model))
    assert evaluate(validation()).loss == run.history.rows[-1]["loss"]


def test_frozen_weights_stay_to_the_bit():
    model = net()
    model.layers[-1].trainable = False
    frozen = [np.asarray(w) for w in model.layers[-1].weights]
    run_tiny(model, averaging=Lookahead(every_steps=3, power=1))
    assert_equal([np.asarray(w) for w in model.layers[-1].weights], frozen)


def test_one_trace_of_either_step(monkeypatch):
    made = []

    def noting(*args, **kwargs):
        made.append(make_train_step(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(loop, "make_train_step", noting)
    # Calls of many lengths: a row every 3 steps, a pull every 4.
    run, _ = run_tiny(tiny.tiny_mlp(), averaging=Lookahead(every_steps=4), log_every=Every(steps=3))
    assert made[0].experimental_get_tracing_count() == 1
    assert run.summary["step_traces"] == 1


def test_how_many_steps_share_a_call_changes_nothing(monkeypatch):
    results = []
    for seconds in (1e-12, 1e9):
        monkeypatch.setattr(loop, "_SECONDS_A_CALL", seconds)
        averaging = Lookahead(every_steps=3)
        run, _ = run_tiny(tiny.tiny_mlp(), averaging=averaging, hooks=[], log_every=Every(epochs=9))
        results.append(hash_arrays([*run.model.variables, *averaging.variables]))
    assert results[0] == results[1]


@pytest.mark.parametrize("whole_loop", [False, True])
@pytest.mark.parametrize("make", [lambda: Lookahead(every_steps=3, power=1), lambda: WeightEMA()])
def test_xla_gives_the_same(make, whole_loop, monkeypatch):
    # As on a GPU, where XLA compiles the loop over the steps too.
    monkeypatch.setattr(runner, "has_gpu", lambda: whole_loop)
    runs = [
        run_tiny(tiny.tiny_mlp(), averaging=make(), jit_compile=jit_compile, hooks=[])[0]
        for jit_compile in (False, True)
    ]
    assert_close(floats(runs[0].model), floats(runs[1].model), rtol=1e-4, atol=1e-5)
    assert runs[1].summary["step_traces"] == 1


AVERAGINGS = {
    "lookahead": lambda: Lookahead(every_steps=4, power=1),
    "weight_ema": lambda: WeightEMA(decay=0.8, every_steps=3),
}


@pytest.mark.parametrize(
    ("kind", "precision"), [("lookahead", "float32"), ("weight_ema", "mixed_float16")]
)
def test_a_resumed_run_is_the_same_run(tmp_path, kind, precision):
    def run_part(**kwargs):
        averaging = AVERAGINGS[kind]()
        run, _ = run_tiny(
            net(dtype_policy=precision),
            optimizer=scale_for(precision, sgd()),
            averaging=averaging,
            validation=validation(),
            **kwargs,
        )
        rows = [{**row, "images_per_second": None} for row in run.history.rows]
        return hash_arrays([*run.model.variables, *averaging.variables]), rows

    whole = run_part(hooks=[Hook(Every(steps=99))])
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    history = History(tmp_path / "metrics.jsonl")
    # Between two updates of either kind.
    interrupt = Hook(Every(steps=10), lambda state: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted, match="after step 10: all is saved"):
        run_part(hooks=[interrupt], checkpoints=checkpoints, history=history)
    assert checkpoints.latest() == 10
    for _ in range(2):
        # The second time there is nothing left to do but to take the averages.
        history = History.load(tmp_path / "metrics.jsonl")
        resumed = run_part(
            hooks=[Hook(Every(steps=99))], checkpoints=checkpoints, history=history, resume=True
        )
        assert resumed == whole


def test_a_finished_run_read_back(tmp_path):
    averaging = WeightEMA(decay=0.8)
    run, seen = run_tiny(averaging=averaging, checkpoints=Checkpoints(tmp_path))
    model, optimizer, averaging = net(seed=5), sgd(), WeightEMA(decay=0.8)
    optimizer.build(model.trainable_variables)
    averaging.build(model)
    variables = [*model.variables, *optimizer.variables, *averaging.variables]
    Checkpoints(tmp_path).restore(STEPS, variables)
    # The checkpoint has both: training could go on from it.
    assert_equal(floats(model), seen[-1])
    averaging.finish()
    assert hash_arrays(model.variables) == hash_arrays(run.model.variables)


@pytest.mark.parametrize("other", [None, Lookahead()])
def test_checkpoints_of_a_run_with_other_averages_are_refused(tmp_path, other):
    checkpoints = Checkpoints(tmp_path)
    run_tiny(tiny.tiny_mlp(), averaging=WeightEMA(), total_steps=2, checkpoints=checkpoints)
    with pytest.raises(CheckpointError, match=r"it has (\d+ variables|\['weight_ema_steps)"):
        run_tiny(tiny.tiny_mlp(), averaging=other, checkpoints=checkpoints, resume=True)


def test_a_skipped_update_counts_as_a_step():
    options = {"every_steps": 5, "decay": 0.9, "power": 1}

    def scaled(inner):
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=2.0**21)

    expected = numpy_lookahead(
        net(dtype_policy="mixed_float16"), **options, optimizer=scaled(sgd())
    )
    inner, averaging = sgd(), Lookahead(**options)
    run, _ = run_tiny(
        net(dtype_policy="mixed_float16"), optimizer=scaled(inner), averaging=averaging
    )
    assert 0 < int(inner.iterations) < STEPS
    assert count(averaging) == STEPS
    assert_close(floats(run.model), expected, rtol=1e-3, atol=1e-4)


def test_two_seeds_by_one_compiled_step():
    def run_alone(seed):
        model, averaging = net(seed=seed), Lookahead(every_steps=3, power=1)
        run, _ = run_tiny(model, averaging=averaging, hooks=[])
        return hash_arrays([*run.model.variables, *averaging.variables])

    model, optimizer, averaging = net(), sgd(), Lookahead(every_steps=3, power=1)
    step = averaging.around(make_train_step(model, optimizer), model, total_steps=STEPS)
    start = [np.asarray(v) for v in optimizer.variables]
    hashes = []
    for seed in (1, 2, 1):
        for variable, value in zip(model.variables, net(seed=seed).variables, strict=True):
            variable.assign(value)
        for variable, value in zip(optimizer.variables, start, strict=True):
            variable.assign(value)
        averaging.reset()
        assert_equal(averages(averaging), floats(model))
        assert count(averaging) == 0
        for images, labels in tiny.batches().dataset(0, STEPS):
            step(images, labels)
        averaging.finish()
        hashes.append(hash_arrays([*model.variables, *averaging.variables]))
    assert hashes[0] == hashes[2] == run_alone(1)
    assert hashes[1] == run_alone(2) != hashes[0]
    assert step.experimental_get_tracing_count() == 1


def test_one_object_for_run_after_run():
    averaging = WeightEMA(decay=0.9)
    first, _ = run_tiny(tiny.tiny_mlp(), averaging=averaging)
    kept = hash_arrays(first.model.variables)
    again, _ = run_tiny(tiny.tiny_mlp(), averaging=averaging)
    assert hash_arrays(again.model.variables) == kept
    # The first run's model has no part in the second.
    assert hash_arrays(first.model.variables) == kept
    assert count(averaging) == STEPS


def test_averages_of_bfloat16_weights_are_in_float32():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, dtype="bfloat16")])
    kernel = model.variables[0]
    kernel.assign([[1.0]])

    @tf.function
    def train_step(images, labels):
        kernel.assign([[2.0]])
        return images

    averaging = WeightEMA(decay=0.999, warmup=False)
    step = averaging.around(train_step, model, total_steps=300)
    for _ in range(300):
        step(tf.zeros([]), tf.zeros([]))
    # In bfloat16 the average would still be 1.
    np.testing.assert_allclose(averages(averaging)[0], [[2 - 0.999**300]], rtol=1e-5)
    averaging.finish()
    assert kernel.dtype == "bfloat16"
    np.testing.assert_allclose(float(kernel.value[0, 0]), 2 - 0.999**300, rtol=1e-2)


def test_the_state_is_named_after_the_variables():
    averaging = Lookahead()
    assert averaging.variables == []
    model = net()
    averaging.build(model)
    names = [variable.path for variable in averaging.variables]
    assert names[0] == "lookahead_steps"
    paths = [v.path.replace("/", "_") for v in model.variables if "float" in v.dtype]
    assert names[1:] == [f"lookahead_{path}" for path in paths]
    assert len(paths) < len(model.variables)  # the generator's state is not averaged
    assert not any(variable.trainable for variable in averaging.variables)


@settings(max_examples=40)
@given(
    decay=st.floats(0, 0.9999),
    power=st.floats(0, 10),
    total_steps=st.integers(1, 10**6),
    data=st.data(),
)
def test_the_decay_of_lookahead(decay, power, total_steps, data):
    step = data.draw(st.integers(1, total_steps))
    averaging = Lookahead(decay=decay, power=power)
    found = float(averaging.decay_at(step, total_steps=total_steps))
    np.testing.assert_allclose(found, decay * (step / total_steps) ** power, rtol=1e-5, atol=1e-30)
    end = float(averaging.decay_at(total_steps, total_steps=total_steps))
    np.testing.assert_allclose(end, decay, rtol=1e-6, atol=1e-30)
    assert found <= end < 1


@settings(max_examples=40)
@given(decay=st.floats(0, 0.9999), every_steps=st.integers(1, 50), updates=st.integers(1, 10**6))
def test_the_decay_of_the_moving_average(decay, every_steps, updates):
    step = updates * every_steps
    warmed = WeightEMA(decay=decay, every_steps=every_steps)
    found = float(warmed.decay_at(step, total_steps=1))
    np.testing.assert_allclose(found, min(decay, (1 + updates) / (10 + updates)), 1e-6, 1e-30)
    constant = WeightEMA(decay=decay, every_steps=every_steps, warmup=False)
    np.testing.assert_allclose(float(constant.decay_at(step, total_steps=1)), decay, 1e-6, 1e-30)


@pytest.mark.parametrize("kind", [Lookahead, WeightEMA])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("every_steps", value) for value in (0, -1, 2.5, "5", None, True)),
        *(("decay", value) for value in (-0.1, 1.0, 1.5, float("nan"), "0.9", None, True)),
    ],
)
def test_bad_numbers(kind, name, value):
    with pytest.raises(ConfigError, match=f"{name} must be") as caught:
        kind(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [-1, float("inf"), "3", None])
def test_a_bad_power(value):
    with pytest.raises(ConfigError, match=r"power must be a finite number >= 0, not") as caught:
        Lookahead(power=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["warmup", "keep_last"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_bad_switches(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be True or False, not {value!r}"):
        WeightEMA(**{name: value})


def test_bad_use():
    with pytest.raises(ConfigError, match=r"must be a Lookahead or a WeightEMA, not 0\.9"):
        run_tiny(averaging=0.9)
    with pytest.raises(ConfigError, match="total_steps must be a whole number >= 1, not 0"):
        Lookahead().around(None, net(), total_steps=0)
    with pytest.raises(ConfigError, match="every_steps must be a whole number >= 1, not 0"):
        Averaging(every_steps=0, pulls_back=False)
    with pytest.raises(NotImplementedError, match="Averaging must define decay_at"):
        Averaging(every_steps=1, pulls_back=False).decay_at(1, total_steps=2)
