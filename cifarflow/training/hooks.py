"""When to run something during training, and what to run, apart.

    def show(state):
        print(state.step, state.validation.loss)

    hooks = [Hook(Every(epochs=1), show), EarlyStopping(patience_epochs=5)]
    train(model, optimizer, batches=batches, epochs=20, validation=validation, hooks=hooks)

Between two events the loop stays inside one compiled call, so a hook costs nothing until it runs.
Every hook runs at the last step too.  At one step the order is: log, validate, hooks as listed,
checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cifarflow.errors import ConfigError, check_choice, check_float, check_int


class Metrics(NamedTuple):
    """Means over examples.

    Attributes:
      loss: mean loss, regularisation included.
      accuracy: share of correct examples, 0..1.
    """

    loss: float
    accuracy: float


@dataclasses.dataclass
class LoopState:
    """What a hook sees of the loop.

    Attributes:
      model: the model in training.
      optimizer: its optimiser.
      history: the run's log, this step's rows included.
      step: steps done.
      steps_per_epoch: steps in one epoch.
      total_steps: steps the run will do unless it is stopped.
      train: means since the last train row, None before the first.
      validation: means over the validation set at its last event, None before the first.
      validation_step: the step of that event, 0 before the first.
      stop_reason: why training stops after this step, or "".
    """

    model: Any
    optimizer: Any
    history: Any
    step: int
    steps_per_epoch: int
    total_steps: int
    train: Metrics | None = None
    validation: Metrics | None = None
    validation_step: int = 0
    stop_reason: str = ""

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch

    def stop(self, reason: str) -> None:
        """Ends training after this step.

        Args:
          reason: a few words for the log and the summary.
        """
        self.stop_reason = reason


class Every:
    """A moment that returns: every so many steps, epochs or seconds.

    Args:
      steps: whole number of steps, >= 1.
      epochs: epochs, > 0; a part of one is fine, and is rounded to steps.
      seconds: wall-clock seconds, > 0; checked whenever the loop is between two compiled calls.

    Raises:
      ConfigError: if not exactly one is given, or it is out of range.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        seconds: float | None = None,
    ) -> None:
        given = {"steps": steps, "epochs": epochs, "seconds": seconds}
        if sum(value is not None for value in given.values()) != 1:
            raise ConfigError(f"give exactly one of steps, epochs and seconds, not {given}")
        self._steps = check_int("steps", steps) if steps is not None else None
        if epochs is not None:
            check_float("epochs", epochs, above_minimum=True)
        if seconds is not None:
            check_float("seconds", seconds, above_minimum=True)
        self._epochs, self.seconds = epochs, seconds

    def next_step(self, step: int, *, steps_per_epoch: int) -> int | None:
        """The first step after `step` at which this moment comes; None for seconds."""
        if self._steps is not None:
            return (step // self._steps + 1) * self._steps
        if self._epochs is None:
            return None
        interval = self._epochs * steps_per_epoch
        if interval <= 1:
            return step + 1
        count = math.floor(step / interval)
        # Rounding may land on the step itself.
        while round(count * interval) <= step:
            count += 1
        return round(count * interval)


class Hook:
    """Something to run at certain moments of training.

    Args:
      when: at which moments.
      run: called with the `LoopState` at each.

    Attributes:
      needs_validation: whether training without a validation set is refused.
    """

    needs_validation = False

    def __init__(self, when: Every, run: Callable[[LoopState], None] | None = None) -> None:
        self.when = when
        self._run = run

    def run(self, state: LoopState) -> None:
        """Does the work at one moment."""
        if self._run is not None:
            self._run(state)

    def get_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps for this hook; a hook with none returns {}."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes back what `get_state` gave."""


class EarlyStopping(Hook):
    """Stops training when the validation metric has not improved for some epochs.

    Args:
      patience_epochs: epochs without improvement before training stops.
      monitor: "loss" (less is better) or "accuracy" (more is better).
      min_delta: the least change that counts as an improvement, >= 0.

    Raises:
      ConfigError: if an argument is out of range; by `train`, if there is no validation set.
    """

    needs_validation = True

    def __init__(
        self, *, patience_epochs: int = 3, monitor: str = "loss", min_delta: float = 0.0
    ) -> None:
        super().__init__(Every(epochs=1))
        self._patience = check_int("patience_epochs", patience_epochs)
        self._monitor = check_choice("monitor", monitor, ("loss", "accuracy"))
        self._min_delta = check_float("min_delta", min_delta)
        self._best = math.inf
        self._best_epoch = 0.0
        self._seen_step = 0

    def run(self, state: LoopState) -> None:
        """Compares the newest validation metric with the best so far."""
        # Where validation is rarer than an epoch, the same value must not count twice.
        if state.validation is None or state.validation_step == self._seen_step:
            return
        self._seen_step = state.validation_step
        value = getattr(state.validation, self._monitor)
        # Lower is better for both from here on.
        value = -value if self._monitor == "accuracy" else value
        if value < self._best - self._min_delta:
            self._best, self._best_epoch = value, state.epoch
        elif state.epoch - self._best_epoch >= self._patience:
            state.stop(
                f"validation {self._monitor} has not improved since epoch {self._best_epoch:g}"
            )

    def get_state(self) -> dict[str, Any]:
        """The best value and its epoch; no value yet is None."""
        best = self._best if math.isfinite(self._best) else None
        return {"best": best, "best_epoch": self._best_epoch, "seen_step": self._seen_step}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes back the best value and its epoch."""
        self._best = math.inf if state["best"] is None else state["best"]
        self._best_epoch = state["best_epoch"]
        self._seen_step = state["seen_step"]


class EventSchedule:
    """Which hooks are due at which step.

    Args:
      hooks: in the order in which they run.
      state: the loop's, whose step moves on.
      now: the time in seconds.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        state: LoopState,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hooks, self._state, self._clock = hooks, state, now
        self._next = [self._after(hook) for hook in self._hooks]
        self._last_seconds = [now()] * len(self._hooks)
        self.begin()

    def _after(self, hook: Hook) -> int | None:
        return hook.when.next_step(self._state.step, steps_per_epoch=self._state.steps_per_epoch)

    def next_step(self) -> int:
        """The next step at which something is due."""
        return min([self._state.total_steps, *(step for step in self._next if step is not None)])

    def begin(self, only: Sequence[int] | None = None) -> None:
        """Looks at the step just reached.

        Args:
          only: what `unfinished` returned at this step before, to go on with: these, and no others.
        """
        self._now = self._clock()
        self._only = only is not None
        self._left = list(range(len(self._hooks)) if only is None else only)

    def unfinished(self) -> list[int]:
        """The hooks still due at this step, in order, as places in the list of hooks.

        A hook that stops training makes the current step the last one, so all other hooks are due
        after it, whether or not their own moment has come; the last of them stays the last.
        """
        return [index for index in self._left if self._only or self._is_due(index, self._now)]

    def finish(self, index: int) -> None:
        """Notes that a hook has run at this step."""
        self._left.remove(index)
        self._last_seconds[index] = self._now
        self._next[index] = self._after(self._hooks[index])

    def _is_due(self, index: int, now: float) -> bool:
        state, seconds = self._state, self._hooks[index].when.seconds
        if state.step >= state.total_steps or state.stop_reason:
            return True
        if seconds is not None:
            return now - self._last_seconds[index] >= seconds
        return state.step == self._next[index]


def epochs_to_steps(epochs: float, *, steps_per_epoch: int) -> int:
    """Passes over the data as a whole number of steps, at least one."""
    return max(1, round(epochs * steps_per_epoch))
