"""The training loop: compiled calls of many steps, and Python only at events between them.

    run = train(
        model,
        SGD(0.01, momentum=0.9, nesterov=True),
        batches=ArrayBatches(images, labels, batch_size=32),
        epochs=5,
        validation=evaluation_batches(validation_images, validation_labels),
    )
    print(run.history.rows[-1], run.summary["images_per_second"])

The loop knows steps and events; epochs and seconds are turned into steps at its edge.  How many
steps share a compiled call is a matter of time only: the same steps in longer or shorter calls
give bit for bit the same weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import Batches, DatasetBatches
from cifarflow.data.splits import Dataset
from cifarflow.device import prepare_gpus
from cifarflow.errors import (
    ON_NONFINITE,
    ConfigError,
    DataError,
    WorkdirError,
    check_choice,
    check_float,
    check_int,
    check_micro_batches,
)
from cifarflow.training.averaging import Averaging
from cifarflow.training.books import Books, Total
from cifarflow.training.capsule import make_examine
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.clock import Clock
from cifarflow.training.distribution import Team
from cifarflow.training.history import History
from cifarflow.training.hooks import EventSchedule, Every, Hook, LoopState, Metrics, epochs_to_steps
from cifarflow.training.nonfinite import Capsules, Watch
from cifarflow.training.runner import StepRunner, make_run_steps
from cifarflow.training.signals import TrainingInterrupted, noted_signals
from cifarflow.training.step import (
    LossFn,
    Sums,
    make_eval_step,
    make_train_step,
)

# Long enough that Python's share of the time is nothing, short enough for a live progress bar and
# for Ctrl-C to be answered at once.
_SECONDS_A_CALL = 0.3


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training run leaves.

    Attributes:
      model: the trained Keras model.
      history: its log.
      summary: JSON values: steps, epochs, train_seconds, images_per_second and more.
      workdir: the run's folder, None if it has none.
      test_outputs: the model's outputs for the test set, [N, num_classes] float32; None where it
        has not been read.
      dataset: what a recipe was trained and tested on; None after `train`.
    """

    model: Any
    history: History
    summary: dict[str, Any]
    workdir: pathlib.Path | None = None
    test_outputs: np.ndarray | None = None
    dataset: Dataset | None = None


class ProgressView(Protocol):
    """Shows how far training is."""

    def update(self, step: int, *, loss: float, accuracy: float, images_per_second: float) -> None:
        """Shows the state after a compiled call."""

    def line(self, text: str) -> None:
        """Prints a line that stays."""


def make_evaluate(model: Any, eval_step: Any) -> Any:
    """Compiles an evaluation of a whole dataset into a few calls.

    Args:
      model: the model, for messages.
      eval_step: a `tf.function` as `make_eval_step` returns.

    Returns:
      A function of a finite dataset of (images, labels) that returns its `Metrics`; or None, if
      its second argument, a function of nothing, says so between two calls.

    Raises (the returned function):
      ConfigError: if the dataset is empty.
      DataError: if a label is out of range.
    """
    run_some = make_run_steps(eval_step)

    @tf.function
    def run_all(iterator: Any) -> Sums:
        sums = Sums.zero()
        for images, labels in iterator:
            sums += eval_step(images, labels)
        return sums

    compiled: list[Any] = []

    def evaluate(dataset: Any, stopped: Callable[[], object] = lambda: False) -> Metrics | None:
        iterator, clock, total = iter(dataset), Clock(), Total()
        left = int(dataset.cardinality())
        if left < 0:  # nobody knows how many: all in one call
            total = Total().plus(run_all(iterator))
        while left > 0:
            if not compiled:
                count = tf.TensorSpec([], tf.int64)
                compiled.append(run_some.get_concrete_function(iterator, count))
            some = min(left, clock.steps_in(_SECONDS_A_CALL))
            with clock.measure(some), explained(model):
                total = total.plus(compiled[0](iterator, tf.constant(some, tf.int64)))
            left -= some
            if stopped():
                return None
        if not total.examples:
            raise ConfigError("the data to evaluate on is empty: give at least one example")
        return total.means()

    return evaluate


def train(
    model: Any,
    optimizer: Any,
    *,
    batches: Batches | tf.data.Dataset,
    epochs: float | None = None,
    total_steps: int | None = None,
    validation: Any = None,
    validate_every: Every | None = None,
    log_every: Every | None = None,
    hooks: Sequence[Hook] = (),
    loss_fn: LossFn | None = None,
    freeze: Mapping[str, int] | None = None,
    averaging: Averaging | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
    history: History | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: Every | None = None,
    resume: bool = False,
    on_nonfinite: str = "stop",
    capsules: Capsules | None = None,
    progress: ProgressView | None = None,
    team: Team | None = None,
) -> Run:
    """Trains a model.

    Args:
      model: a Keras model: images [B, H, W, C], 0..255 -> outputs [B, num_classes].
      optimizer: a Keras optimiser; under mixed_float16 wrapped by `scale_for`.
      batches: `ArrayBatches`, `DatasetBatches`, or a `tf.data.Dataset` of your own, which then
        gets `DatasetBatches` around it.
      epochs: how long, in passes over the data (a part of one is fine).
      total_steps: the same in steps; give one of the two.
      validation: a finite `tf.data.Dataset` of (images, labels), or None.
      validate_every: when to evaluate on it, every epoch by default.
      log_every: when to log training means; by default every quarter of an epoch, in a run shorter
        than five epochs every twentieth of the run.
      hooks: what else to run, and when.
      loss_fn: function of (labels, outputs) that returns losses [B]; cross-entropy by default.
      freeze: part of a variable's path -> after how many steps it stops to train, see
        `make_train_step`.
      averaging: `Lookahead` or `WeightEMA`: what is validated, and what the model holds at the
        end, are then averages of its weights; hooks see it with the weights in training, and
        after an interruption it has those.
      jit_compile: whether XLA compiles the steps.
      fused: whether the model trains by fused kernels, see `make_train_step`.
      accumulate_steps: micro-batches that each batch is cut into, to save memory, see there.
      history: where to log; a new one in memory by default.
      checkpoints: where to keep the state; None keeps none.
      checkpoint_every: when to save it, by default every epoch and every half minute; always at
        the end.
      resume: go on from the newest checkpoint, if there is one.
      on_nonfinite: what a step is whose loss or gradients are not finite: "stop" ends the run, with
        the weights from before that step; "skip" leaves the step out, counts it and says so, see
        `make_train_step`.  Until there is such a step the choice changes nothing but the time.
      capsules: where to keep what it takes to run such a step again; None keeps nothing.
      progress: shows how far training is.
      team: the replicas that train the model together, as `open_team` returns; each of them draws
        the same batches and trains on its share.  With several processes each calls this, with
        the same arguments but those that write: `history`, `checkpoints` and `capsules` are the
        chief's alone, and so is `resume`.  Accumulation cuts each share.

    Returns:
      The `Run`; its summary holds steps, epochs, train_seconds (in compiled calls, without the
      first, which compiles), compile_seconds (that first call), images_per_second, stop_reason,
      skipped_steps and, apart from them, loss_scale_skips: steps at which a float16 loss scale was
      found too high, which is no error.

    Raises:
      ConfigError: if an argument is out of range.
      DataError: if images or labels are not of the shape that the model takes and gives, a label
        is out of range, or images are 0..1 where the model itself scales them.
      NonFiniteError: if the loss, a gradient or a weight is not finite; or, if such steps are
        skipped, none of the last few hundred steps could be done.
      CheckpointError: if the checkpoint to resume from does not fit.
      WorkerError: if a worker of the team is lost, or has other data.
      WorkdirError: if there are checkpoints and resume is False, or a file cannot be written.
      TrainingInterrupted: after Ctrl-C or SIGTERM, when the step is done and the state saved.
        A second one stops at once.
    """
    every = (Every, "an Every(steps=, epochs= or seconds=)")
    _check_kinds(
        optimizer=(optimizer, keras.optimizers.Optimizer, "a Keras optimizer"),
        validation=(validation, tf.data.Dataset, "a tf.data.Dataset of (images, labels)"),
        validate_every=(validate_every, *every),
        averaging=(averaging, Averaging, "a Lookahead or a WeightEMA"),
        log_every=(log_every, *every),
        history=(history, History, "a History"),
        checkpoints=(checkpoints, Checkpoints, "a Checkpoints"),
        checkpoint_every=(checkpoint_every, *every),
        capsules=(capsules, Capsules, "a Capsules"),
        team=(team, Team, "what open_team returns"),
        **{f"hooks[{i}]": (hook, Hook, "a Hook") for i, hook in enumerate(hooks)},
    )
    check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    batches = as_batches(batches)
    prepare_gpus()
    steps = _total_steps(epochs, total_steps, batches.steps_per_epoch)
    if validation is None and any(hook.needs_validation for hook in hooks):
        raise ConfigError("a hook, such as early stopping, needs a validation set: there is none")
    if checkpoints is not None and not resume and checkpoints.latest() is not None:
        raise WorkdirError(
            f"{str(checkpoints.directory)!r} holds checkpoints of another run: "
            "go on with it by resume=True, or give another folder"
        )
    history = history if history is not None else History()
    options: dict[str, Any] = {"loss_fn": loss_fn, "jit_compile": jit_compile, "fused": fused}
    step_options = {"freeze": freeze, "accumulate_steps": accumulate_steps, **options}
    train_step = make_train_step(
        model,
        optimizer,
        skip_nonfinite=on_nonfinite == "skip",
        spread=team.spread if team is not None else None,
        **step_options,
    )
    variables = [*model.variables, *optimizer.variables]
    if averaging is not None:
        train_step = averaging.around(train_step, model, total_steps=steps)
        variables += averaging.variables
    evaluate = make_evaluate(model, make_eval_step(model, **options))
    state = LoopState(model, optimizer, history, 0, batches.steps_per_epoch, steps)
    say = warnings.warn if progress is None else progress.line
    watch = Watch(
        model,
        optimizer,
        variables=variables,
        batches=batches,
        make_examine=functools.partial(make_examine, model, optimizer, **step_options),
        capsules=capsules,
        say=say,
        stopped=lambda: came(),
        team=team,
    )
    first_labels = None
    if (checkpoints is not None or team is not None) and hasattr(batches, "batch_at"):
        # Not the images: augmentation may round otherwise on another machine.
        first_labels = hash_arrays(batches.batch_at(0)[1:])
    books = Books(
        state,
        variables,
        checkpoints=checkpoints,
        hooks=hooks,
        watch=watch,
        say=say,
        first_labels=first_labels,
        team=team,
    )

    came: Callable[[], int]  # says which signal has come; set below

    def validate(state: LoopState) -> None:
        watch.look(state.step)
        with averaging.averaged() if averaging is not None else contextlib.nullcontext():
            found = evaluate(validation, lambda: came())
        if found is None:
            raise _CutShortError  # nothing of it is kept
        state.validation, state.validation_step = found, state.step
        books.log_validation()
        if progress is not None:
            progress.line(_epoch_line(state))

    if log_every is None:
        is_short = steps < 5 * batches.steps_per_epoch
        log_every = Every(steps=max(1, steps // 20)) if is_short else Every(epochs=0.25)
    events = [Hook(log_every, lambda _: books.log_train())]
    if validation is not None:
        events.append(Hook(validate_every or Every(epochs=1), validate))
    events.extend(hooks)
    if books.keeps:
        moments = [checkpoint_every] if checkpoint_every else [Every(epochs=1), Every(seconds=30)]
        events.extend(Hook(moment, lambda _: books.save()) for moment in moments)
    left = books.restore(len(events)) if resume and checkpoints is not None else []
    if team is not None:
        left = books.follow(left, len(events))

    runner = StepRunner(
        train_step,
        batches,
        first_step=state.step,
        last_step=steps,
        # Replicas do not meet within a program of XLA's.
        jit_compile=jit_compile and team is None,
    )
    check_fits(model, runner.element_spec)
    check_micro_batches(runner.element_spec[0].shape[0], accumulate_steps)
    if runner.element_spec[0].dtype.is_floating:
        _check_pixels(model, batches)
    if validation is not None:
        check_fits(model, validation.element_spec)
    if team is not None:
        batch_size = runner.element_spec[0].shape[0]
        team.check_batch_size(batch_size, accumulate_steps=accumulate_steps)
        team.begin(model)
    now = team.now if team is not None else time.monotonic
    schedule, clock = EventSchedule(events, state, now=now), books.clock
    with clock.compiling():
        # Traced here and never again: a concrete function cannot be.
        runner.compile()
    watch.begin(runner, state.step)

    def run_events(only: Sequence[int] | None = None) -> None:
        """Runs what is due at this step; stops between two of them if a signal has come."""
        schedule.begin(only)
        while True:
            due = schedule.unfinished()
            if came():
                try:
                    books.save(due=due)
                    books.finish()
                except WorkdirError as error:
                    path, trouble = books.newest(), str(error)
                    raise TrainingInterrupted(state.step, path, came(), trouble=trouble) from error
                path = checkpoints.path(state.step) if checkpoints is not None else None
                is_chief = team is None or team.is_chief
                raise TrainingInterrupted(state.step, path, came(), is_chief=is_chief)
            if not due:
                return
            with contextlib.suppress(_CutShortError):
                events[due[0]].run(state)
                schedule.finish(due[0])
                if events[due[0]] in hooks:
                    # It may have changed the weights, or the learning rate.
                    watch.remember(state.step)

    def next_count() -> int:
        """How many steps share the next call; 0 when training is over."""
        count = 0
        if state.step < steps and not state.stop_reason:
            count = min(schedule.next_step() - state.step, clock.steps_in(_SECONDS_A_CALL))
        if team is not None:
            count = team.agree(count, signal_number=noted())
            if came():
                run_events([])
        return count

    noticing = team.noticing if team is not None else contextlib.nullcontext
    with books.settled(), noted_signals() as noted:
        came = noted if team is None else lambda: team.signal
        if left:
            run_events(left)
        while count := next_count():
            with clock.measure(count), explained(model), noticing():
                # Reading the sums waits until the device has finished.
                total = Total().plus(runner.run(count))
                clock.add_images(total.examples)
            watch.after_call(state.step, count, loss=total.loss, skipped=total.skipped)
            state.step += count
            books.pending = books.pending.plus(total)
            if progress is not None and books.pending.examples:
                means = books.pending.means()
                progress.update(
                    state.step,
                    loss=means.loss,
                    accuracy=means.accuracy,
                    images_per_second=clock.images_per_second(),
                )
            run_events()
        watch.look(state.step)
    if averaging is not None:
        averaging.finish()
    summary = {
        "steps": state.step,
        "epochs": round(state.epoch, 4),
        "train_seconds": round(clock.seconds, 3),
        "compile_seconds": round(clock.compile_seconds, 3),
        "images_per_second": round(clock.images_per_second(), 1),
        "stop_reason": state.stop_reason,
        **watch.get_state(),
        "step_traces": train_step.experimental_get_tracing_count(),
    }
    return Run(model, history, summary)


class _CutShortError(Exception):
    """An event was left unfinished, because a signal has come."""


def _total_steps(epochs: float | None, total_steps: int | None, steps_per_epoch: int) -> int:
    if (epochs is None) == (total_steps is None):
        raise ConfigError(f"give one of epochs and total_steps, not {epochs!r} and {total_steps!r}")
    if total_steps is not None:
        return check_int("total_steps", total_steps)
    epochs = check_float("epochs", epochs, above_minimum=True)
    return epochs_to_steps(epochs, steps_per_epoch=steps_per_epoch)


def as_batches(batches: Any) -> Batches:
    """Returns the batches, a `tf.data.Dataset` as `DatasetBatches`.

    Raises:
      ConfigError: if they are neither.
      DataError: if the dataset holds no batches.
    """
    if isinstance(batches, tf.data.Dataset):
        return DatasetBatches(batches)
    if not hasattr(batches, "steps_per_epoch"):
        raise ConfigError(
            f"batches must be ArrayBatches or a tf.data.Dataset of batches, not {batches!r:.80}"
        )
    return batches


def check_fits(model: Any, element_spec: Any) -> None:
    """Says in one line what Keras would say in a traceback through the compiler.

    Raises:
      DataError: if images or labels of such `tf.TensorSpec` do not fit the model.
    """
    images, labels = element_spec
    wanted = tf.TensorShape(model.input_shape)
    if not wanted.is_compatible_with(images.shape):
        raise DataError(
            f"images must be {list(wanted)} for model {model.name!r}, not {list(images.shape)}"
        )
    if labels.shape.rank == 1 and not labels.dtype.is_integer:
        raise DataError(f"labels of shape [B] must be integers, not {labels.dtype.name}")
    outputs = model.output_shape[-1]
    if labels.shape.rank not in (1, 2) or labels.shape[1:] not in ([], [None], [outputs]):
        raise DataError(
            f"labels must be [B] integers or [B, {outputs}] probabilities, not {labels.shape}"
        )


def _check_pixels(model: Any, batches: Batches) -> None:
    """Refuses images that are scaled before a model that scales them: it would see almost black."""
    if not any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers):
        return
    images, _ = next(iter(batches.dataset(0, 1)))
    largest = float(tf.reduce_max(images))
    if largest <= 1:
        raise DataError(
            f"images must be 0..255 for model {model.name!r}, which scales them itself, and the "
            f"largest value of the first batch is {largest:g}: leave out the scaling before it"
        )


@contextlib.contextmanager
def explained(model: Any) -> Iterator[None]:
    """Says in one line what TensorFlow says of a label that the model has no output for.

    Raises:
      DataError: in place of TensorFlow's error.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"label value of (-?\d+)", str(error))
        if found is None:
            raise
        raise DataError(
            f"labels must be from 0 to {model.output_shape[-1] - 1} for model {model.name!r}, "
            f"not {found[1]}"
        ) from None


def _check_kinds(**values: tuple[Any, type, str]) -> None:
    """Refuses an argument of another kind before it fails somewhere deep."""
    for name, (value, kind, good) in values.items():
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} must be {good}, not {value!r:.80}")


def _epoch_line(state: LoopState) -> str:
    text = f"epoch {state.epoch:.4g}"
    if state.validation is not None:
        text += f"  validation loss {state.validation.loss:.4g}"
        text += f" accuracy {state.validation.accuracy:.3f}"
    if state.train is not None:
        # Since the last row of the log, not since the last epoch.
        text += f"  train of late: {state.train.loss:.4g}, {state.train.accuracy:.3f}"
    return text
