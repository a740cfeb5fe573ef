"""The training loop: events, chunks, resuming, stopping."""

import dataclasses
import os
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.data.augment import make_augment
from cifarflow.data.pipeline import ArrayBatches, DatasetBatches, evaluation_batches
from cifarflow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    WorkdirError,
)
from cifarflow.optimizers.precision import scale_for
from cifarflow.optimizers.schedules import Piecewise
from cifarflow.optimizers.sgd import SGD
from cifarflow.training import loop
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.history import History
from cifarflow.training.hooks import EarlyStopping, Every, Hook
from cifarflow.training.loop import (
    TrainingInterrupted,
    make_evaluate,
    train,
)
from cifarflow.training.step import make_eval_step

PER_EPOCH = 8


def validation(count=20, batch_size=8):
    data = tiny.split(count, 1)
    return evaluation_batches(data.images, data.labels, batch_size=batch_size)


def train_tiny(model=None, optimizer=None, **kwargs):
    model = model if model is not None else tiny.tiny_mlp()
    optimizer = optimizer if optimizer is not None else SGD(0.05, momentum=0.9)
    return train(model, optimizer, **{"batches": tiny.batches(), **kwargs})


def steps_of(run, split="train"):
    return [row["step"] for row in run.history.rows if row["split"] == split]


def untimed(history):
    return [{**row, "images_per_second": None} for row in history.rows]


@pytest.fixture
def one_step_a_call(monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_A_CALL", 1e-12)


@dataclasses.dataclass
class Recorder:
    """Progress that only notes what it is told."""

    steps: list = dataclasses.field(default_factory=list)
    lines: list = dataclasses.field(default_factory=list)

    def update(self, step, *, loss, accuracy, images_per_second):
        assert np.isfinite([loss, accuracy, images_per_second]).all()
        self.steps.append(step)

    def line(self, text):
        self.lines.append(text)


def test_rows_of_a_long_run():
    # A quarter of an epoch, and no more often.
    run = train_tiny(total_steps=6 * PER_EPOCH)
    assert steps_of(run) == list(range(PER_EPOCH // 4, 6 * PER_EPOCH + 1, PER_EPOCH // 4))


def test_rows_by_default():
    run = train_tiny(total_steps=20, validation=validation())
    assert steps_of(run) == list(range(1, 21))
    assert steps_of(run, "validation") == [8, 16, 20]
    assert [row["epoch"] for row in run.history.rows] == [
        row["step"] / PER_EPOCH for row in run.history.rows
    ]
    assert run.summary["steps"] == 20
    assert run.summary["epochs"] == 2.5
    assert run.summary["step_traces"] == 1
    assert run.summary["stop_reason"] == ""
    assert run.summary["images_per_second"] > 0
    assert run.summary["compile_seconds"] > 0
    assert run.workdir is None


@pytest.mark.parametrize(
    ("log", "validate", "train_steps", "validation_steps"),
    [
        (Every(steps=6), Every(steps=5), [6, 12, 18, 20], [5, 10, 15, 20]),
        (Every(epochs=1), Every(epochs=0.5), [8, 16, 20], [4, 8, 12, 16, 20]),
        (Every(epochs=1.25), Every(epochs=100), [10, 20], [20]),
        (Every(seconds=3600), Every(seconds=3600), [20], [20]),
    ],
)
def test_rows_as_asked_for(log, validate, train_steps, validation_steps):
    run = train_tiny(
        total_steps=20, validation=validation(), log_every=log, validate_every=validate
    )
    assert steps_of(run) == train_steps
    assert steps_of(run, "validation") == validation_steps


def test_rows_every_so_many_seconds(one_step_a_call):
    run = train_tiny(total_steps=9, log_every=Every(seconds=1e-9))
    assert steps_of(run) == list(range(1, 10))


def test_a_row_is_the_mean_since_the_last_one():
    each = train_tiny(total_steps=12, log_every=Every(steps=1)).history.rows
    means = train_tiny(total_steps=12, log_every=Every(steps=4)).history.rows
    for number, row in enumerate(means):
        part = each[4 * number : 4 * number + 4]
        for key in ("loss", "accuracy"):
            np.testing.assert_allclose(row[key], np.mean([one[key] for one in part]), rtol=1e-6)


def test_rows_hold_the_schedule():
    optimizer = SGD(Piecewise([4], [0.1, 0.01]))
    run = train_tiny(optimizer=optimizer, total_steps=8, log_every=Every(steps=2))
    rates = [row["learning_rate"] for row in run.history.rows]
    np.testing.assert_allclose(rates[0], 0.1, rtol=1e-6)
    np.testing.assert_allclose(rates[-1], 0.01, rtol=1e-6)


def test_a_smaller_last_batch_counts_by_its_examples():
    model = tiny.tiny_cnn(l2=0.01)
    run = train_tiny(model, total_steps=1, validation=validation(20, 8))
    row = run.history.rows[-1]
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    data = tiny.split(20, 1)
    loss, accuracy = model.evaluate(data.images, data.labels, batch_size=20, verbose=0)
    np.testing.assert_allclose([row["loss"], row["accuracy"]], [loss, accuracy], rtol=1e-5)


def test_evaluate_alone():
    model = tiny.tiny_mlp()
    evaluate = make_evaluate(model, make_eval_step(model))
    whole, parts = evaluate(validation(20, 20)), evaluate(validation(20, 7))
    np.testing.assert_allclose(whole, parts, rtol=1e-5)
    with pytest.raises(ConfigError, match="the data to evaluate on is empty"):
        evaluate(validation().take(0))


def test_labels_without_an_output_are_named():
    data = tiny.split(64)
    wrong = ArrayBatches(data.images, data.labels + 3, batch_size=8)
    with pytest.raises(DataError, match=r"labels must be from 0 to 9 for .*, not 1[0-2]"):
        train_tiny(batches=wrong, epochs=1)
    bad = evaluation_batches(data.images, data.labels + 3)
    with pytest.raises(DataError, match=r"labels must be from 0 to 9 for .*, not 1[0-2]"):
        train_tiny(validation=bad, epochs=1)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"batches": (1, 2)}, r"batches must be ArrayBatches or .*, not \(1, 2\)"),
        ({"optimizer": "sgd"}, "optimizer must be a Keras optimizer, not 'sgd'"),
        ({"validation": (1, 2)}, r"validation must be a tf.data.Dataset .*, not \(1, 2\)"),
        ({"validate_every": 3}, r"validate_every must be an Every\(.*, not 3"),
        ({"log_every": 10}, r"log_every must be an Every\(.*, not 10"),
        ({"checkpoint_every": 2.5}, r"checkpoint_every must be an Every\(.*, not 2.5"),
        ({"checkpoints": "folder"}, "checkpoints must be a Checkpoints, not 'folder'"),
        ({"history": []}, r"history must be a History, not \[\]"),
        ({"hooks": [print]}, r"hooks\[0\] must be a Hook, not"),
    ],
)
def test_arguments_of_another_kind(option, expected):
    with pytest.raises(ConfigError, match=expected):
        train_tiny(epochs=1, **option)


def test_nothing_is_traced_twice_in_a_run(monkeypatch):
    made = []

    def noting(make):
        def wrapped(*args, **kwargs):
            made.append(make(*args, **kwargs))
            return made[-1]

        return wrapped

    for name in ("make_train_step", "make_eval_step"):
        monkeypatch.setattr(loop, name, noting(getattr(loop, name)))
    run = train_tiny(total_steps=23, validation=validation(16), log_every=Every(steps=5))
    assert len(made) == 2
    assert [each.experimental_get_tracing_count() for each in made] == [1, 1]
    assert run.summary["step_traces"] == 1


def test_how_many_steps_share_a_call_changes_nothing(monkeypatch):
    results = []
    for seconds in (1e-12, 1e9):
        monkeypatch.setattr(loop, "_SECONDS_A_CALL", seconds)
        progress = Recorder()
        run = train_tiny(
            tiny.tiny_mlp(dropout=0.3),
            batches=tiny.batches(augment=make_augment("flip,crop:2,cutout:3")),
            total_steps=20,
            log_every=Every(steps=10),
            validation=validation(),
            progress=progress,
        )
        results.append((hash_arrays(run.model.variables), untimed(run.history)))
        assert progress.steps[-1] == 20
        assert len(progress.steps) == 20 if seconds < 1 else len(progress.steps) < 10
        assert len(progress.lines) == 3
        assert "validation loss" in progress.lines[-1]
    assert results[0] == results[1]


def test_the_same_seed_gives_the_same_weights():
    hashes = [
        hash_arrays(
            train_tiny(
                tiny.tiny_mlp(dropout=0.3), batches=tiny.batches(seed=seed), total_steps=10
            ).model.variables
        )
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_order_of_events(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    seen = []

    def note(name):
        def run(state):
            splits = [r["split"] for r in state.history.rows if r["step"] == state.step]
            checkpoints.wait()  # it is written meanwhile
            seen.append((name, state.step, splits, checkpoints.latest()))
            assert state.total_steps == 8
            assert state.train is not None
            assert state.validation is not None
            assert state.validation_step == state.step

        return run

    train_tiny(
        total_steps=8,
        validation=validation(),
        log_every=Every(steps=4),
        validate_every=Every(steps=4),
        hooks=[Hook(Every(steps=4), note("a")), Hook(Every(steps=4), note("b"))],
        checkpoints=checkpoints,
        checkpoint_every=Every(steps=4),
    )
    both = ["train", "validation"]
    assert seen == [
        ("a", 4, both, None),
        ("b", 4, both, None),
        ("a", 8, both, 4),
        ("b", 8, both, 4),
    ]
    assert checkpoints.steps() == [4, 8]


def test_a_hook_that_stops_makes_its_step_the_last(tmp_path):
    ran = []

    def note(name):
        return Hook(Every(steps=1000), lambda state: ran.append((name, state.step)))

    def stop(state):
        ran.append(("stop", state.step))
        state.stop("seen enough")

    checkpoints = Checkpoints(tmp_path)
    hooks = [note("before"), Hook(Every(steps=5), stop), note("after")]
    options = {
        "total_steps": 20,
        "validation": validation(),
        "hooks": hooks,
        "log_every": Every(steps=4),
        "checkpoints": checkpoints,
    }
    run = train_tiny(**options)
    assert run.summary["steps"] == 5
    assert run.summary["stop_reason"] == "seen enough"
    assert steps_of(run) == [4, 5]
    assert steps_of(run, "validation") == [5]
    assert sorted(ran) == [("after", 5), ("before", 5), ("stop", 5)]
    assert checkpoints.steps() == [5]
    # A run that has stopped stays stopped.
    again = train_tiny(**options, resume=True)
    assert again.summary["steps"] == 5
    assert again.summary["stop_reason"] == "seen enough"
    assert hash_arrays(again.model.variables) == hash_arrays(run.model.variables)


def test_early_stopping():
    # Without learning nothing improves after the first epoch.
    run = train_tiny(
        optimizer=SGD(0.0),
        epochs=10,
        validation=validation(),
        hooks=[EarlyStopping(patience_epochs=2)],
    )
    assert run.summary["epochs"] == 3
    assert "has not improved since epoch 1" in run.summary["stop_reason"]


def test_early_stopping_with_a_rarer_validation():
    run = train_tiny(
        optimizer=SGD(0.0),
        epochs=10,
        validation=validation(),
        validate_every=Every(epochs=2),
        hooks=[EarlyStopping(patience_epochs=2)],
    )
    assert run.summary["epochs"] == 4


def test_early_stopping_without_validation_is_refused_at_once():
    model = tiny.tiny_mlp()
    before = hash_arrays(model.variables)
    with pytest.raises(ConfigError, match="needs a validation set"):
        train_tiny(model, epochs=1, hooks=[EarlyStopping()])
    assert hash_arrays(model.variables) == before


def test_everything_runs_at_the_last_step(tmp_path):
    ran = []
    run = train_tiny(
        total_steps=3,
        validation=validation(),
        log_every=Every(steps=100),
        validate_every=Every(epochs=100),
        hooks=[Hook(Every(seconds=3600), lambda state: ran.append(state.step))],
        checkpoints=Checkpoints(tmp_path),
        checkpoint_every=Every(steps=100),
    )
    assert steps_of(run) == [3]
    assert steps_of(run, "validation") == [3]
    assert ran == [3]
    assert Checkpoints(tmp_path).steps() == [3]


def test_epochs_and_parts_of_them():
    assert train_tiny(epochs=1.5).summary["steps"] == 12
    assert train_tiny(epochs=0.01).summary["steps"] == 1


@pytest.mark.parametrize("both", [{}, {"epochs": 1, "total_steps": 8}])
def test_one_of_epochs_and_total_steps(both):
    with pytest.raises(ConfigError, match="give one of epochs and total_steps, not"):
        train_tiny(**both)


@pytest.mark.parametrize("name", ["epochs", "total_steps"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", True])
def test_bad_durations(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be") as caught:
        train_tiny(**{name: value})
    assert repr(value) in str(caught.value)


def test_a_loss_that_is_not_finite_names_its_steps():
    with pytest.raises(NonFiniteError, match=r"became nan, which began in step 1, ") as c:
        train_tiny(tiny.tiny_mlp(activation="relu"), SGD(1e30), total_steps=50)
    assert "try a smaller learning_rate than 1e+30" in str(c.value)


def test_a_dataset_of_ones_own():
    data = tiny.split(60)
    images = data.images.astype(np.float32)
    labels = np.eye(10, dtype=np.float32)[data.labels]
    own = tf.data.Dataset.from_tensor_slices((images, labels)).batch(16)
    model = tiny.tiny_mlp()
    run = train_tiny(
        model,
        SGD(0.0),
        batches=DatasetBatches(own),
        epochs=2,
        log_every=Every(epochs=1),
        validation=own,
    )
    assert run.summary["steps"] == 8
    rows = run.history.rows
    assert [row["split"] for row in rows] == ["train", "validation"] * 2
    # With a rate of 0 training sees what evaluation sees; the last batch has 12 examples.
    for row in rows:
        np.testing.assert_allclose(row["loss"], rows[1]["loss"], rtol=1e-6)
        assert row["accuracy"] == rows[1]["accuracy"]
    assert run.summary["step_traces"] == 1


@pytest.mark.parametrize(
    ("images", "labels", "quoted"),
    [
        (np.zeros((8, 9, 9, 3)), np.zeros(8, int), r"images must be \[None, 8, 8, 3\].*9, 9"),
        (np.zeros((8, 8, 8, 3)), np.zeros(8), r"labels of shape \[B\] must be integers"),
        (np.zeros((8, 8, 8, 3)), np.zeros((8, 1), int), r"labels must be \[B\] integers or"),
        (np.zeros((8, 8, 8, 3)), np.zeros((8, 4)), r"labels must be \[B\] integers or"),
    ],
)
def test_data_that_does_not_fit_the_model(images, labels, quoted):
    own = tf.data.Dataset.from_tensor_slices((images, labels)).batch(4)
    with pytest.raises(DataError, match=quoted):
        train_tiny(batches=DatasetBatches(own), epochs=1)
    with pytest.raises(DataError, match=quoted):
        train_tiny(validation=own, epochs=1)


def test_images_scaled_before_a_model_that_scales_them():
    data = tiny.split(16)
    scaled = tf.data.Dataset.from_tensor_slices((data.images / 255, data.labels)).batch(8)
    raw = tf.data.Dataset.from_tensor_slices((data.images * 1.0, data.labels)).batch(8)
    with pytest.raises(DataError, match=r"images must be 0\.\.255 for model 'cnn', which scales"):
        train(tiny.tiny_cnn(), SGD(0.01), batches=scaled, epochs=1)
    train(tiny.tiny_cnn(), SGD(0.01), batches=raw, epochs=1)
    # One's own model may well want them like this.
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(10)(keras.layers.Flatten()(inputs))
    train(keras.Model(inputs, outputs), SGD(0.01), batches=scaled, epochs=1)


RESUMING = {
    "float32": {"precision": "float32"},
    "mixed_bfloat16": {"precision": "mixed_bfloat16"},
    "mixed_float16": {"precision": "mixed_float16"},
    "own_dataset": {"precision": "float32", "own": True},
}


def resumable(*, precision, own=False, **kwargs):
    """A run with all that has a state: dropout, BatchNorm, momentum, augmentation, a schedule."""
    model = tiny.tiny_cnn(dropout=0.25, batch_norm_momentum=0.8, l2=1e-4, dtype_policy=precision)
    schedule = Piecewise([9, 15], [0.05, 0.02, 0.01])
    optimizer = scale_for(precision, SGD(schedule, momentum=0.9, nesterov=True))
    batches = tiny.batches(seed=3, augment=make_augment("flip,crop:2,cutout:3"))
    if own:
        data = tiny.split(64)
        own_data = tf.data.Dataset.from_tensor_slices((data.images, data.labels))
        batches = DatasetBatches(own_data.shuffle(64, 1, reshuffle_each_iteration=False).batch(8))
    hooks = [EarlyStopping(patience_epochs=50), *kwargs.pop("hooks", [])]
    run = train(
        model,
        optimizer,
        batches=batches,
        total_steps=21,
        validation=validation(),
        log_every=Every(steps=5),
        hooks=hooks,
        **kwargs,
    )
    return run, optimizer, hooks


@pytest.mark.parametrize("case", RESUMING)
def test_a_resumed_run_is_the_same_run(tmp_path, case):
    options = RESUMING[case]
    nothing = Hook(Every(steps=1000))
    whole, whole_optimizer, whole_hooks = resumable(**options, hooks=[nothing])

    # Ctrl-C in the middle of an epoch, and between two rows of the log.
    log = tmp_path / "metrics.jsonl"
    for step in (11, 19):
        at = Hook(Every(steps=step), lambda state: os.kill(os.getpid(), signal.SIGINT))
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        history = History.load(log) if log.exists() else History(log)
        if step == 19:
            history = History.load(log)
        with pytest.raises(TrainingInterrupted, match=f"after step {step}: all is saved") as c:
            resumable(**options, hooks=[at], history=history, checkpoints=checkpoints, resume=True)
        assert c.value.step == step
        assert c.value.checkpoint == checkpoints.path(step)
    resumed, optimizer, hooks = resumable(
        **options,
        hooks=[nothing],
        history=History.load(log),
        checkpoints=checkpoints,
        resume=True,
    )

    assert resumed.summary["steps"] == 21
    assert hash_arrays(resumed.model.variables) == hash_arrays(whole.model.variables)
    assert hash_arrays(optimizer.variables) == hash_arrays(whole_optimizer.variables)
    assert untimed(resumed.history) == untimed(whole.history)
    assert untimed(History.load(log)) == untimed(whole.history)
    assert hooks[0].get_state() == whole_hooks[0].get_state()


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    log = tmp_path / "metrics.jsonl"
    history = History(log)
    # A run that was killed before its first checkpoint.
    history.add(step=2, epoch=0.25, split="train", loss=9.0, accuracy=0.0)
    run = train_tiny(
        total_steps=4,
        history=History.load(log),
        checkpoints=Checkpoints(tmp_path / "checkpoints"),
        resume=True,
    )
    assert steps_of(run) == [1, 2, 3, 4]
    assert run.history.rows[0]["loss"] != 9.0
    fresh = train_tiny(total_steps=4)
    assert untimed(run.history) == untimed(fresh.history)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    options = {"total_steps": 4, "checkpoints": Checkpoints(tmp_path)}
    first = train_tiny(**options)
    second = train_tiny(**options, resume=True)
    assert second.summary["steps"] == 4
    assert hash_arrays(second.model.variables) == hash_arrays(first.model.variables)


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
    train_tiny(total_steps=4, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(WorkdirError, match=r"holds checkpoints of another run: .*resume=True"):
        train_tiny(total_steps=4, checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match="other hooks"):
        train_tiny(
            total_steps=8,
            checkpoints=Checkpoints(tmp_path),
            resume=True,
            hooks=[Hook(Every(steps=1))],
        )
    with pytest.raises(ConfigError, match="total_steps must be at least the checkpoint's 4, not 3"):
        train_tiny(total_steps=3, checkpoints=Checkpoints(tmp_path), resume=True)
    with pytest.raises(CheckpointError, match="is of another model"):
        train_tiny(
            tiny.tiny_mlp(units=(9,)),
            total_steps=8,
            checkpoints=Checkpoints(tmp_path),
            resume=True,
        )
    assert Checkpoints(tmp_path).steps() == [4]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    train_tiny(total_steps=4, checkpoints=checkpoints)
    checkpoints.path(4).write_bytes(checkpoints.path(4).read_bytes()[:-100])
    model = tiny.tiny_mlp()
    before = hash_arrays(model.variables)
    with pytest.raises(CheckpointError, match="is damaged"):
        train_tiny(model, total_steps=8, checkpoints=checkpoints, resume=True)
    assert hash_arrays(model.variables) == before


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path):
    whole = train_tiny(total_steps=8)
    checkpoints = Checkpoints(tmp_path)
    train_tiny(total_steps=6, checkpoints=checkpoints, checkpoint_every=Every(steps=2))
    checkpoints.path(6).write_bytes(checkpoints.path(6).read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step_00000006.npz' is damaged.*of step 4"):
        run = train_tiny(total_steps=8, checkpoints=checkpoints, resume=True)
    assert hash_arrays(run.model.variables) == hash_arrays(whole.model.variables)


def test_the_best_checkpoint_is_that_of_the_least_validation_loss(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    data = tiny.split(16, 1)
    run = train_tiny(
        tiny.tiny_mlp(),
        SGD(1.0),
        total_steps=5,
        validation=evaluation_batches(data.images, data.labels),
        validate_every=Every(steps=1),
        checkpoints=checkpoints,
        checkpoint_every=Every(steps=1),
    )
    losses = [row["loss"] for row in run.history.rows if row["split"] == "validation"]
    model = tiny.tiny_mlp()
    assert checkpoints.restore_best(model.variables) == 1 + int(np.argmin(losses))
    assert min(losses) < losses[-1]


def test_a_full_disk_is_a_warning_and_another_try(tmp_path, monkeypatch):
    checkpoints, full = Checkpoints(tmp_path), []
    fsync = os.fsync

    def disk(number):
        if full:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", disk)

    def fill(state):
        for thread in threading.enumerate():
            if thread.name == "cifarflow checkpoint":
                thread.join()
        full[:] = [1] * (state.step == 4)

    with pytest.warns(UserWarning, match="No space left on device; trying again .* of step 6"):
        train_tiny(
            total_steps=8,
            hooks=[Hook(Every(steps=1), fill)],
            checkpoints=checkpoints,
            checkpoint_every=Every(steps=2),
        )
    assert checkpoints.steps() == [6, 8]
    # At the end there is no later: what is in the folder stays.
    full.append(1)
    with pytest.raises(WorkdirError, match="No space left on device"):
        train_tiny(
            total_steps=9, hooks=[Hook(Every(steps=100))], checkpoints=checkpoints, resume=True
        )
    assert checkpoints.steps() == [6, 8]


@pytest.mark.parametrize("is_first", [False, True])
def test_a_signal_while_the_disk_is_full(tmp_path, monkeypatch, is_first):
    checkpoints = Checkpoints(tmp_path)
    fsync, full = os.fsync, []

    def disk(number):
        if full:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", disk)

    def stop(state):
        if state.step == 5:
            checkpoints.wait()
            full.append(1)
            os.kill(os.getpid(), signal.SIGTERM)

    options = {
        "total_steps": 8,
        "checkpoints": checkpoints,
        "checkpoint_every": Every(steps=6 if is_first else 2),
    }
    with pytest.raises(TrainingInterrupted, match=r"step 5: .*No space left on device; ") as caught:
        train_tiny(hooks=[Hook(Every(steps=1), stop)], **options)
    assert (caught.value.step, caught.value.signal) == (5, signal.SIGTERM)
    if is_first:
        assert str(caught.value).endswith("nothing was saved")
        assert caught.value.checkpoint is None
        return
    assert str(caught.value).endswith(f"what is saved is {checkpoints.path(4)}")
    assert caught.value.checkpoint == checkpoints.path(4)
    full.clear()
    nothing = Hook(Every(steps=100))
    again = train_tiny(hooks=[nothing], resume=True, **options)
    assert hash_arrays(again.model.variables) == hash_arrays(
        train_tiny(total_steps=8).model.variables
    )


@pytest.mark.parametrize("cut", [0, 2])
def test_rows_that_the_log_has_lost(tmp_path, cut):
    """Those that could not be written come back, others are told of."""
    log, checkpoints = tmp_path / "log" / "metrics.jsonl", Checkpoints(tmp_path / "checkpoints")

    def fill(state):
        if state.step == 3:
            log.parent.rename(tmp_path / "away")
            (tmp_path / "log").write_text("in its way")
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    log.parent.mkdir()
    with (
        pytest.warns(UserWarning, match="cannot write log .* after that of step 4"),
        pytest.raises(TrainingInterrupted, match=r"step 6: cannot write log .*step_0*6\.npz$"),
    ):
        train_tiny(
            total_steps=9,
            log_every=Every(steps=1),
            history=History(log),
            hooks=[Hook(Every(steps=1), fill)],
            checkpoints=checkpoints,
        )
    (tmp_path / "log").unlink()
    (tmp_path / "away").rename(log.parent)
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    log.write_text("".join(lines[: 3 - cut]))

    def resume():
        return train_tiny(
            total_steps=9,
            log_every=Every(steps=1),
            history=History.load(log),
            hooks=[Hook(Every(steps=100))],
            checkpoints=checkpoints,
            resume=True,
        )

    if cut:
        with pytest.warns(UserWarning, match="the log lacks 2 of the 6 rows .* at step 6"):
            run = resume()
    else:
        run = resume()
    assert steps_of(run) == [*range(1, 4 - cut), *range(4, 10)]
    assert untimed(History.load(log)) == untimed(run.history)


@pytest.mark.parametrize("rows", [[{"step": "four"}], [4], "four", 4])
def test_rows_in_a_checkpoint_that_are_none_are_refused(tmp_path, monkeypatch, rows):
    options = {"total_steps": 4, "checkpoints": Checkpoints(tmp_path), "log_every": Every(steps=2)}
    train_tiny(**options)
    take = Checkpoints.restore
    monkeypatch.setattr(
        Checkpoints, "restore", lambda *args: {**take(*args), "rows": 9, "unwritten": rows}
    )
    with pytest.raises(CheckpointError, match="keeps rows of the log that are none"):
        train_tiny(**options, resume=True)


def test_a_hook_of_the_step_that_is_resumed_sees_the_means(tmp_path):
    seen = []

    def run(**kwargs):
        return train_tiny(
            total_steps=8, log_every=Every(steps=2), checkpoints=Checkpoints(tmp_path), **kwargs
        )

    def stop(state):
        if state.step == 4:
            seen.append(state.train)
            os.kill(os.getpid(), signal.SIGTERM)

    def look(state):
        if state.step == 4:
            seen.append(state.train)

    with pytest.raises(TrainingInterrupted):
        run(hooks=[Hook(Every(steps=4), stop), Hook(Every(steps=4))])
    run(hooks=[Hook(Every(steps=4)), Hook(Every(steps=4), look)], resume=True)
    assert seen[0] is not None
    assert seen == [seen[0]] * 2
    assert type(seen[0]) is type(seen[1])


def test_other_batches_are_refused(tmp_path):
    options = {"total_steps": 4, "checkpoints": Checkpoints(tmp_path), "resume": True}
    train_tiny(**options, batches=tiny.batches(seed=3))
    with pytest.raises(CheckpointError, match="is of another run: its first batch is another"):
        train_tiny(**options, batches=tiny.batches(seed=4))
    train_tiny(**options, batches=tiny.batches(seed=3))
    # Of one's own dataset nothing is known.
    data = tiny.split(64)
    own = tf.data.Dataset.from_tensor_slices((data.images, data.labels)).batch(8)
    train_tiny(**options, batches=own)


def test_hooks_of_another_kind_are_refused(tmp_path):
    options = {"total_steps": 8, "validation": validation(), "checkpoints": Checkpoints(tmp_path)}
    train_tiny(hooks=[EarlyStopping(patience_epochs=50)], **options)
    with pytest.raises(
        CheckpointError, match=r"hooks\[0\] was of kind 'EarlyStopping', not 'Hook'"
    ):
        train_tiny(hooks=[Hook(Every(epochs=1))], resume=True, **options)


@pytest.mark.parametrize("moment", ["before the events", "in a hook", "in validation"])
def test_a_run_goes_on_in_the_middle_of_its_events(tmp_path, monkeypatch, moment):
    data = tiny.split(64, 1)
    ran = []

    def run(checkpoints=None, *, history=None, resume=False, stop_at=None):
        def kill(state):
            ran.append(state.step)
            if stop_at == state.step:
                os.kill(os.getpid(), signal.SIGTERM)

        return train_tiny(
            total_steps=9,
            validation=evaluation_batches(data.images, data.labels, batch_size=4),
            validate_every=Every(steps=3),
            log_every=Every(steps=2),
            hooks=[Hook(Every(steps=3), kill), EarlyStopping(patience_epochs=50)],
            checkpoints=checkpoints,
            checkpoint_every=Every(steps=3),
            history=history,
            resume=resume,
        )

    whole = run()
    hooks_of_the_whole, checkpoints = list(ran), Checkpoints(tmp_path)
    log = tmp_path / "metrics.jsonl"
    ran.clear()
    if moment == "in a hook":
        with pytest.raises(TrainingInterrupted) as caught:
            run(checkpoints, history=History(log), stop_at=6)
    else:
        # The signal comes in the sixth step, or after the first batches of its validation.
        name = "make_train_step" if moment == "before the events" else "make_eval_step"
        real = getattr(loop, name)
        calls = []

        def counting(*args, **kwargs):
            step = real(*args, **kwargs)

            def count():
                calls.append(1)
                first = 6 if name == "make_train_step" else 16 + 3
                if len(calls) == first:
                    os.kill(os.getpid(), signal.SIGTERM)

            @tf.function
            def counted(images, labels):
                tf.py_function(count, [], [])
                return step(images, labels)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(loop, name, counting)
            with pytest.raises(TrainingInterrupted) as caught:
                run(checkpoints, history=History(log))
    assert (caught.value.step, caught.value.signal) == (6, signal.SIGTERM)
    assert checkpoints.latest() == 6
    again = run(Checkpoints(tmp_path), history=History.load(log), resume=True)
    assert hash_arrays(again.model.variables) == hash_arrays(whole.model.variables)
    assert ran == hooks_of_the_whole
    assert untimed(again.history) == untimed(whole.history)


def test_rows_of_events_that_are_run_twice_are_in_the_log_once(tmp_path, monkeypatch):
    def run(**kwargs):
        return train_tiny(
            total_steps=9, validation=validation(), log_every=Every(steps=3), **kwargs
        )

    class Ending(Recorder):
        def update(self, step, **means):
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    def resume(**kwargs):
        log = tmp_path / "metrics.jsonl"
        history = History.load(log) if log.exists() else History(log)
        return run(history=history, checkpoints=Checkpoints(tmp_path), resume=True, **kwargs)

    # Stopped after a step whose row is still to be logged, and killed before the next checkpoint.
    with pytest.raises(TrainingInterrupted, match="after step 6"):
        resume(progress=Ending())
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "begin_save", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                resume()
    assert untimed(resume().history) == untimed(run().history)


def test_interrupted_without_checkpoints():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = Hook(Every(steps=3), lambda state: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="after step 3: nothing was saved") as caught:
        train_tiny(total_steps=20, hooks=[hook])
    assert caught.value.checkpoint is None
    # Whoever catches Ctrl-C catches this too.
    assert isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_stops_at_once():
    after = []

    def twice(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        after.append(state.step)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        train_tiny(total_steps=20, hooks=[Hook(Every(steps=3), twice)])
    assert caught.type is KeyboardInterrupt
    assert after == []
    assert signal.getsignal(signal.SIGINT) == handler


def test_in_another_thread():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train_tiny(total_steps=5)))
    thread.start()
    thread.join()
    assert hash_arrays(runs[0].model.variables) == hash_arrays(
        train_tiny(total_steps=5).model.variables
    )


def test_a_hooks_error_comes_through():
    def fail(state):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train_tiny(total_steps=5, hooks=[Hook(Every(steps=2), fail)])


def test_a_loss_of_ones_own():
    def halved(labels, outputs):
        losses = keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)
        return losses / 2

    plain = train_tiny(optimizer=SGD(0.0), epochs=1, validation=validation())
    run = train_tiny(optimizer=SGD(0.0), epochs=1, validation=validation(), loss_fn=halved)
    for ours, theirs in zip(run.history.rows, plain.history.rows, strict=True):
        np.testing.assert_allclose(ours["loss"], theirs["loss"] / 2, rtol=1e-5)
    assert run.summary["step_traces"] == 1
