"""Numbers gone bad: a run stops at the very step, or goes on without it, and keeps its capsule."""

import os
import re
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.data.pipeline import DatasetBatches
from cifarflow.errors import ConfigError, NonFiniteError
from cifarflow.optimizers.schedules import Piecewise
from cifarflow.optimizers.sgd import SGD
from cifarflow.training import loop, nonfinite
from cifarflow.training.averaging import Lookahead
from cifarflow.training.capsule import Findings, examine_step, load_capsule
from cifarflow.training.checkpoints import Checkpoints
from cifarflow.training.history import History
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted, train
from cifarflow.training.nonfinite import Capsules
from cifarflow.training.snapshot import Snapshot, all_finite, not_finite
from cifarflow.training.step import cross_entropy, is_float, make_train_step

STEPS = 20
L = keras.layers


@pytest.fixture(autouse=True)
def _long_calls(monkeypatch):
    """Calls that end with an event only, but for the first."""
    monkeypatch.setattr(loop, "_SECONDS_A_CALL", 1e9)


def bits(variables):
    return [np.asarray(variable).tobytes() for variable in variables]


def arrays(*bad_steps, label=None):
    """Images of floats and labels; in some batches of 8 a pixel is NaN, or all labels the same."""
    data = tiny.split(8 * STEPS)
    images, labels = data.images.astype(np.float32) / 255, data.labels.copy()
    for step in bad_steps:
        if label is None:
            images[8 * step + 3, 1, 1, 1] = np.nan
        else:
            labels[8 * step : 8 * step + 8] = label
    return images, labels


def poisoned(*bad_steps, label=None):
    return DatasetBatches(
        tf.data.Dataset.from_tensor_slices(arrays(*bad_steps, label=label)).batch(8)
    )


def rough(labels, outputs):
    """Cross-entropy, finite always; its gradient is NaN where all labels of the batch are 9."""
    is_rough = tf.cast(tf.reduce_all(labels == 9), tf.float32)
    root = tf.sqrt(tf.reduce_sum(outputs**2) * (1 - is_rough))
    return cross_entropy()(labels, outputs) + 1e-3 * root


def model_of(*, dropout=0.25, precision="float32"):
    inputs = keras.Input(tiny.SHAPE)
    x = L.Dense(8, activation="tanh", dtype=precision)(L.Flatten()(inputs))
    x = L.BatchNormalization(momentum=0.8)(x)
    x = L.Dropout(dropout, seed=1)(x)
    return keras.Model(inputs, L.Dense(10)(x), name="net")


class Training:
    """A run: its model, its optimiser, what it said and what it came to."""

    def __init__(self, batches, *, model=None, optimizer=None, **options):
        keras.utils.set_random_seed(0)
        self.model = model or model_of()
        self.optimizer = optimizer or SGD(0.05, momentum=0.9)
        self.said, self.updates, self.run, self.error = [], [], None, None
        averaging = options.get("averaging")
        options = {"log_every": Every(steps=5), "total_steps": STEPS, **options}
        try:
            self.run = train(self.model, self.optimizer, batches=batches, progress=self, **options)
        except NonFiniteError as error:
            self.error = str(error)
            assert "\n" not in self.error
        self.state = bits([*self.model.variables, *self.optimizer.variables])
        self.state += bits(averaging.variables) if averaging is not None else []

    def update(self, step, *, loss, accuracy, images_per_second):
        assert np.isfinite([loss, accuracy]).all()
        self.updates.append(step)

    def line(self, text):
        self.said.append(text)


def untimed(history):
    return [{**row, "images_per_second": None} for row in history.rows]


@pytest.mark.parametrize(("bad_step", "by_xla"), [(0, False), (7, False), (9, False), (7, True)])
def test_a_bad_image_stops_the_run_before_its_step(bad_step, by_xla):
    stopped = Training(poisoned(bad_step), jit_compile=by_xla)
    assert f"the training loss became nan, which began in step {bad_step}, " in stopped.error
    assert "the first being 0: loss nan; gradients not finite: 'dense" in stopped.error
    assert stopped.error.endswith("try a smaller learning_rate than 0.05")
    if bad_step:
        undisturbed = Training(poisoned(), total_steps=bad_step, jit_compile=by_xla)
        assert stopped.state == undisturbed.state


def test_a_signal_ends_the_hunt(monkeypatch):
    fail = nonfinite.Watch._fail

    def fail_after_signal(self, *args):
        signal.raise_signal(signal.SIGTERM)
        fail(self, *args)

    monkeypatch.setattr(nonfinite.Watch, "_fail", fail_after_signal)
    stopped = Training(poisoned(7))
    assert stopped.error.startswith("the training loss became nan within steps 5 to 9; which it")
    assert stopped.error.endswith("is not known, as a signal came first")
    assert all(np.isfinite(v).all() for v in stopped.model.get_weights())


@pytest.mark.parametrize("bad_step", [6, 9])
def test_a_bad_gradient_is_found_where_it_came_and_not_where_it_shows(bad_step):
    # That of step 9 shows first in the loss of step 10, which is in the next call.
    stopped = Training(poisoned(bad_step, label=9), loss_fn=rough)
    assert f"the training loss became nan, which began in step {bad_step}, " in stopped.error
    assert re.search(r"the first being 0: loss [234]\.\d+; gradients not finite", stopped.error)
    undisturbed = Training(poisoned(bad_step, label=9), loss_fn=rough, total_steps=bad_step)
    assert stopped.state == undisturbed.state


def test_a_bad_gradient_of_the_last_step_shows_in_no_loss():
    stopped = Training(poisoned(STEPS - 1, label=9), loss_fn=rough)
    assert f"became infinite or NaN, which began in step {STEPS - 1}, " in stopped.error


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_the_state_is_remembered_every_few_seconds(monkeypatch, seconds):
    monkeypatch.setattr(nonfinite, "_SECONDS_A_SNAPSHOT", seconds)
    made = []

    class Counted(Snapshot):
        def __init__(self, variables):
            made.append(1)
            super().__init__(variables)

    monkeypatch.setattr(nonfinite, "Snapshot", Counted)
    trained = Training(poisoned())
    assert trained.error is None
    calls = trained.updates
    # One before the first step, and one after each call.
    assert len(made) == (1 if seconds else 1 + len(calls))
    assert "began in step 12, " in Training(poisoned(12)).error


def test_averages_and_frozen_variables_go_back_too():
    def run(batches, **options):
        averaging = Lookahead(every_steps=2)
        return Training(batches, averaging=averaging, freeze={"dense": 3}, **options)

    stopped = run(poisoned(7))
    assert "began in step 7, " in stopped.error
    # The share of an average depends on how long the whole run is.
    stop = Hook(Every(steps=7), lambda state: state.stop("enough"))
    undisturbed = run(poisoned(), hooks=[stop])
    # But for the model's own variables, which have taken the averages at the end.
    own = len(stopped.model.variables)
    assert len(stopped.state) > own + 10
    assert stopped.state[own:] == undisturbed.state[own:]


def test_what_a_hook_has_changed_is_remembered():
    def halve(state):
        state.model.layers[-1].kernel.assign(state.model.layers[-1].kernel * 0.5)

    stopped = Training(poisoned(12), hooks=[Hook(Every(steps=3), halve)])
    assert "began in step 12, " in stopped.error
    # The hook runs at the last step too, as it did here.
    undisturbed = Training(poisoned(), hooks=[Hook(Every(steps=3), halve)], total_steps=12)
    assert stopped.state == undisturbed.state


def test_what_does_not_come_again_is_told_as_well(tmp_path):
    def spoil(state):
        state.model.layers[3].moving_mean.assign(np.full(8, np.nan))

    checkpoints = Checkpoints(tmp_path)
    options = {
        "hooks": [Hook(Every(steps=6), spoil)],
        "checkpoints": checkpoints,
        "checkpoint_every": Every(steps=3),
    }
    stopped = Training(poisoned(), **options)
    assert "moving_mean' became infinite or NaN within steps 0 to 5, and did not" in stopped.error
    # No file holds it.
    assert checkpoints.latest_whole() == 3


def test_what_was_not_finite_from_the_start_may_stay_so():
    model = model_of()
    model.layers[3].moving_mean.assign(np.full(8, np.inf))
    ran = Training(poisoned(), model=model)
    assert ran.error is None
    assert ran.run.summary["skipped_steps"] == ran.run.summary["loss_scale_skips"] == 0


@pytest.mark.parametrize("kind", ["image", "gradient", "image, by XLA"])
def test_a_skipped_step_leaves_everything_as_it_was(kind):
    options = {"label": 9 if kind == "gradient" else None}
    loss_fn = rough if kind == "gradient" else None
    jit_compile = kind.endswith("XLA")
    bad = (7, 8, 12)
    skipping = Training(
        poisoned(*bad, **options),
        model=model_of(dropout=0),
        loss_fn=loss_fn,
        on_nonfinite="skip",
        jit_compile=jit_compile,
    )
    assert skipping.run.summary["skipped_steps"] == 3
    assert skipping.run.summary["steps"] == STEPS
    assert skipping.said == [
        "2 of the steps 5 to 9 were skipped: loss or gradients not finite",
        "1 of the steps 10 to 14 were skipped: loss or gradients not finite",
    ]
    assert all(np.isfinite(row["loss"]) for row in skipping.run.history.rows)
    # As if these batches had not been there.
    keras.utils.set_random_seed(0)
    model, optimizer = model_of(dropout=0), SGD(0.05, momentum=0.9)
    step = make_train_step(model, optimizer, loss_fn=loss_fn, jit_compile=jit_compile)
    losses = []
    for number, batch in enumerate(poisoned(*bad, **options).dataset(0, STEPS)):
        if number not in bad:
            losses.append(float(step(*batch).loss))
    assert bits([*model.variables, *optimizer.variables]) == skipping.state
    rows = [row["loss"] for row in skipping.run.history.rows]
    np.testing.assert_allclose(rows[1], sum(losses[5:8]) / 24, rtol=1e-6)


def test_the_choice_changes_nothing_while_all_is_well():
    def run(on_nonfinite):
        return Training(poisoned(), on_nonfinite=on_nonfinite)

    stopping, skipping = run("stop"), run("skip")
    assert stopping.state == skipping.state
    assert untimed(stopping.run.history) == untimed(skipping.run.history)


def test_first_steps_that_are_skipped():
    ran = Training(poisoned(*range(7)), on_nonfinite="skip")
    assert ran.run.summary["skipped_steps"] == 7
    # The first five have nothing to log.
    assert [row["step"] for row in ran.run.history.rows] == [10, 15, 20]


def test_some_skipped_steps_are_kept(tmp_path):
    capsules = Capsules(tmp_path, keep=2)
    keeping = Training(poisoned(3, 7, 8, 12), on_nonfinite="skip", capsules=capsules)
    assert [line.partition(": ")[0] for line in keeping.said] == [
        "step 3 was skipped",
        "step 7 was skipped",
        "1 of the steps 5 to 9 were skipped",
        "1 of the steps 10 to 14 were skipped",
    ]
    folders = sorted(tmp_path.iterdir())
    assert [folder.name for folder in folders] == ["step_00000003", "step_00000007"]
    assert keeping.said[0].startswith("step 3 was skipped: loss nan; gradients not finite: 'dense")
    assert keeping.said[0].endswith(f"; the step is kept in {folders[0]}")
    # Looking back has changed nothing.
    assert keeping.state == Training(poisoned(3, 7, 8, 12), on_nonfinite="skip").state
    assert np.isnan(load_capsule(folders[1]).images[3, 1, 1, 1])


def test_weights_that_are_lost_are_not_skipped():
    def steep(labels, outputs):
        return cross_entropy()(labels, outputs) * tf.where(tf.reduce_all(labels == 9), 1e36, 1.0)

    images, labels = arrays(7, label=9)
    images[8 * 3] = np.nan
    ran = Training(
        DatasetBatches(tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)),
        optimizer=SGD(Piecewise([6], [0.05, 1e5])),
        loss_fn=steep,
        on_nonfinite="skip",
    )
    # The third was skipped, and is not to blame.
    # How many steps share a call is a matter of their time.
    [said] = ran.said
    which = r"(1 of the steps \d to \d were|step 2 was)"
    assert re.fullmatch(f"{which} skipped: loss or gradients not finite", said)
    assert "became infinite or NaN, which began in step 7, " in ran.error
    assert "weights after the step not finite" in ran.error
    assert "gradients not finite" not in ran.error
    assert ran.error.endswith("try a smaller learning_rate than 100000")


def test_a_run_that_skips_for_ever_ends(monkeypatch):
    monkeypatch.setattr(nonfinite, "_MOST_IDLE_STEPS", 10)
    ran = Training(poisoned(*range(3, STEPS)), on_nonfinite="skip")
    # Of the call of steps 1 to 4 some were done.
    assert ran.error == (
        "none of the 10 steps 5 to 14 could be done, as their loss or gradients are not finite: "
        "try a smaller learning_rate than 0.05"
    )


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_skips_of_a_loss_scale_are_counted_apart(on_nonfinite):
    def scaled(bad_steps, scale):
        optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.05), initial_scale=scale)
        model = model_of(precision="mixed_float16")
        batches = poisoned(*bad_steps)
        return Training(batches, model=model, optimizer=optimizer, on_nonfinite=on_nonfinite)

    ran = scaled((), 2.0**30)
    assert (ran.error, ran.said) == (None, [])
    assert 3 < ran.run.summary["loss_scale_skips"] < STEPS
    assert ran.run.summary["skipped_steps"] == 0
    assert int(ran.optimizer.iterations) == STEPS - ran.run.summary["loss_scale_skips"]
    bad = scaled((7,), 2.0**4)
    if on_nonfinite == "stop":
        assert "began in step 7, the first being 0: loss nan; " in bad.error
        assert "; loss scale 16; " in bad.error
    else:
        # The scale has nothing to do with it, and stays.
        assert (bad.run.summary["skipped_steps"], bad.run.summary["loss_scale_skips"]) == (1, 0)
        assert float(bad.optimizer.dynamic_scale) == 16


def test_a_run_that_has_stopped_goes_on_by_skipping(tmp_path):
    log, checkpoints = tmp_path / "log", Checkpoints(tmp_path / "checkpoints")

    def run(on_nonfinite, *, interrupted=False, **options):
        def interrupt(state):
            if interrupted and state.step == 9:
                os.kill(os.getpid(), signal.SIGINT)

        hooks = [Hook(Every(steps=9), interrupt)]
        return Training(poisoned(3, 10), on_nonfinite=on_nonfinite, hooks=hooks, **options)

    def go_on(on_nonfinite, **options):
        return run(
            on_nonfinite,
            history=History.load(log) if log.exists() else History(log),
            checkpoints=checkpoints,
            checkpoint_every=Every(steps=4),
            resume=True,
            **options,
        )

    whole = run("skip")
    # Again and again at the same step.
    for _ in range(2):
        assert "began in step 3, " in go_on("stop").error
    # What was skipped before an interruption counts in the end.
    with pytest.raises(TrainingInterrupted, match="after step 9"):
        go_on("skip", interrupted=True)
    assert "began in step 10, " in go_on("stop").error
    resumed = go_on("skip")
    assert resumed.state == whole.state
    assert resumed.run.summary["skipped_steps"] == whole.run.summary["skipped_steps"] == 2
    assert untimed(resumed.run.history) == untimed(whole.run.history)


def test_batches_of_arrays_go_back_within_the_same_call():
    data = tiny.split(8 * STEPS)

    def blown(labels, outputs):
        # The first image of the set is in one batch an epoch.
        return cross_entropy()(labels, outputs) * tf.where(tf.reduce_all(labels < 9), 1.0, np.nan)

    labels = np.where(np.arange(8 * STEPS) == 100, 9, data.labels % 9).astype(np.int32)
    batches = loop.as_batches(tiny.ArrayBatches(data.images, labels, batch_size=8, seed=3))
    assert batches.resident
    bad_step = int(np.flatnonzero((np.asarray(batches.order(0)) == 100).any(1))[0])
    stopped = Training(batches, loss_fn=blown, model=tiny.tiny_cnn(dropout=0.2), total_steps=50)
    assert f"became nan, which began in step {bad_step}, " in stopped.error
    skipping = Training(
        batches,
        loss_fn=blown,
        model=tiny.tiny_cnn(dropout=0.2),
        total_steps=50,
        on_nonfinite="skip",
    )
    # In the third epoch it may not have come.
    assert skipping.run.summary["skipped_steps"] in (2, 3)
    assert skipping.run.summary["step_traces"] == 1


def test_the_capsule_of_the_step(tmp_path):
    ran = Training(poisoned(7), capsules=Capsules(tmp_path / "a b"))
    folder = tmp_path / "a b" / "step_00000007"
    assert ran.error.endswith(f"; the step is kept in {folder}")
    capsule = load_capsule(folder)
    assert np.isnan(capsule.images[3, 1, 1, 1])
    assert np.isnan(capsule.found.loss)
    assert (capsule.step, capsule.steps_per_epoch, capsule.seed) == (7, STEPS, None)
    again = [model_of(), SGD(0.05, momentum=0.9)]
    again[1].build(again[0].trainable_variables)
    capsule.restore([*again[0].variables, *again[1].variables])
    assert bits([*again[0].variables, *again[1].variables]) == ran.state
    assert np.isnan(examine_step(*again, capsule.images, capsule.labels).loss)


def save(capsules):
    return capsules.save(
        7,
        Findings(1.0),
        images=np.zeros((1, 2, 2, 3), np.uint8),
        labels=[0],
        variables=[],
        num_classes=3,
        steps_per_epoch=9,
    )


def test_the_command_that_replays_it(tmp_path):
    text = save(Capsules(tmp_path / "a b", recipe={"name": "mine"}))
    python = Path(sys.executable).name
    assert text == f"to run it again: {python} -m cifarflow replay '{tmp_path}/a b/step_00000007'"
    assert load_capsule(tmp_path / "a b" / "step_00000007").recipe == {"name": "mine"}


def test_a_capsule_that_cannot_be_written_is_no_second_error(tmp_path):
    (tmp_path / "file").touch()
    assert save(Capsules(tmp_path / "file")).startswith("cannot write capsule ")


def test_bad_arguments():
    with pytest.raises(ConfigError, match="on_nonfinite must be one of stop, skip, not 'go'"):
        Training(poisoned(), on_nonfinite="go")
    with pytest.raises(ConfigError, match="capsules must be a Capsules, not 'x'"):
        Training(poisoned(), capsules="x")


def test_there_is_room_for_a_few(tmp_path):
    capsules = Capsules(tmp_path / "capsules", keep=2)
    for number in range(2):
        assert capsules.has_room()
        (tmp_path / "capsules" / f"step_{number:08d}").mkdir(parents=True)
        (tmp_path / "capsules" / f".step_{number:08d}.half").mkdir()
    assert not capsules.has_room()
    with pytest.raises(ConfigError, match="keep must be a whole number >= 1, not 0"):
        Capsules(tmp_path, keep=0)


def test_a_snapshot_comes_back_to_the_bit():
    values = np.array([0.0, -0.0, np.nan, np.inf, 1e-45], np.float32)
    values.view(np.uint32)[2] = 0x7FC12345  # a NaN of its own
    variables = [
        keras.Variable(values, name="odd"),
        keras.Variable(np.array([3], np.uint32), dtype="uint32", trainable=False, name="whole"),
    ]
    before = bits(variables)
    snapshot = Snapshot(variables)
    assert snapshot.changed() == []
    variables[0].assign(np.array([-0.0, -0.0, np.nan, np.inf, 0.0], np.float32))
    variables[1].assign([4])
    assert snapshot.changed() == variables
    assert snapshot.value_of(variables[0]).tobytes() == before[0]
    for _ in range(2):
        snapshot.restore()
        assert bits(variables) == before
        assert snapshot.changed() == []
        # In place, where the snapshot must not share memory with the variable.
        variables[0].value.assign_add(np.ones(5, np.float32))
    assert not_finite(variables) == [variables[0].path]
    assert [is_float(variable) for variable in variables] == [True, False]
    assert all_finite(tf.constant([1.0], tf.bfloat16))
    assert not all_finite(tf.constant([1.0, -np.inf], tf.float16))
