"""What a run keeps beside the model: log, sums since the last row, clock, checkpoints.

books = Books(state, checkpoints, hooks, variables, watch=watch, say=print)
with books.settled():
    ...
    books.pending = books.pending.plus(sums)
    books.log_train()
    books.save()
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cifarflow.errors import CheckpointError, ConfigError, WorkdirError
from cifarflow.training.checkpoints import Checkpoints
from cifarflow.training.clock import Clock
from cifarflow.training.hooks import Hook, LoopState, Metrics
from cifarflow.training.nonfinite import Watch
from cifarflow.training.step import Sums


class Total(NamedTuple):
    """Sums of many calls, in Python's 64 bits."""

    loss: float = 0.0
    correct: float = 0.0
    examples: float = 0.0
    skipped: float = 0.0

    def plus(self, sums: Sums | Total) -> Total:
        """The sums over these examples and others."""
        return Total(*(a + float(b) for a, b in zip(self, sums, strict=True)))

    def means(self) -> Metrics:
        """Means over the examples, of which there must be one."""
        return Metrics(self.loss / self.examples, self.correct / self.examples)


class Books:
    """What a run keeps beside the model.

    Args:
      state: the loop's.
      variables: all that a step changes.
      checkpoints: where they go; None for nowhere.
      hooks: those whose state is kept with them.
      watch: that of the run's numbers; its counts are kept too.
      say: told what goes wrong and is no end.

    Attributes:
      clock: the run's.
      pending: sums since the last train row.
    """

    def __init__(
        self,
        state: LoopState,
        variables: Sequence[Any],
        *,
        checkpoints: Checkpoints | None,
        hooks: Sequence[Hook],
        watch: Watch,
        say: Callable[[str], object],
    ) -> None:
        self.clock = Clock()
        self.pending = Total()
        self._state, self._variables, self._checkpoints = state, variables, checkpoints
        self._hooks, self._watch, self._say = hooks, watch, say
        self._saved_step: int | None = None

    def log_train(self) -> None:
        """Logs the means over the steps since the last train row."""
        state = self._state
        if self.pending.examples:
            state.train = self.pending.means()
            state.history.add(
                step=state.step,
                epoch=state.epoch,
                split="train",
                loss=state.train.loss,
                accuracy=state.train.accuracy,
                learning_rate=float(state.optimizer.learning_rate),
                images_per_second=self.clock.lap(),
            )
        self.pending = Total()

    def log_validation(self) -> None:
        """Logs the newest validation means."""
        state = self._state
        assert state.validation is not None
        state.history.add(
            step=state.step,
            epoch=state.epoch,
            split="validation",
            loss=state.validation.loss,
            accuracy=state.validation.accuracy,
        )

    def save(self, *, due: Sequence[int] = ()) -> None:
        """Begins to save all that `restore` needs, if the run keeps checkpoints.

        A file before it that could not be written is no reason to stop: this one may be.

        Args:
          due: places of the events that are still to be run at this step.

        Raises:
          NonFiniteError: if a number is not finite: a run that goes on from it would be lost.
        """
        state = self._state
        if self._checkpoints is None or (self._saved_step == state.step and not due):
            return
        self._watch.look(state.step)
        extra = {
            "pending": list(self.pending),
            "hooks": [hook.get_state() for hook in self._hooks],
            "clock": self.clock.get_state(),
            "skips": self._watch.get_state(),
            "validation": state.validation and [*state.validation, state.validation_step],
            "stop_reason": state.stop_reason,
            "due": list(due),
            "rows": len(state.history.rows),
        }
        score = None
        if state.validation is not None and state.validation_step == state.step:
            score = state.validation.loss if math.isfinite(state.validation.loss) else None
        try:
            self._checkpoints.wait()
        except WorkdirError as error:
            self._say(f"{error}; trying again with the checkpoint of step {state.step}")
        self._checkpoints.begin_save(state.step, self._variables, extra=extra, score=score)
        # With events left there will be another of this step.
        self._saved_step = None if due else state.step

    def finish(self) -> None:
        """Returns when all is in files.

        Raises:
          WorkdirError: if the last checkpoint, or rows of the log, cannot be written.
        """
        if self._checkpoints is not None:
            self._checkpoints.wait()
        self._state.history.flush()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Leaves no file half-way: waits at the end of the block, after an exception too."""
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except WorkdirError as error:
                self._say(str(error))
            raise
        self.finish()

    def restore(self, num_events: int) -> list[int]:
        """Takes everything back to the newest whole checkpoint; to the start if there is none.

        Returns:
          Places of the events that are still to be run at that step.
        """
        state, checkpoints = self._state, self._checkpoints
        assert checkpoints is not None
        newest = checkpoints.latest_whole(report=self._say)
        due: list[int] = []
        rows = None
        if newest is not None:
            if newest > state.total_steps:
                raise ConfigError(
                    f"total_steps must be at least the checkpoint's {newest}, "
                    f"not {state.total_steps}"
                )
            extra = checkpoints.restore(newest, self._variables)
            try:
                due = self._take(extra, num_events)
                rows = int(extra["rows"])
            except (KeyError, TypeError, ValueError, AttributeError):
                raise CheckpointError(
                    f"checkpoint {str(checkpoints.path(newest))!r} is of a run with other hooks, "
                    "or was not saved by train: give the same hooks in the same order"
                ) from None
            state.step = newest
        # Rows from after the checkpoint, or of a run that died before its first one.
        state.history.rewind(state.step, most=rows)
        return due

    def _take(self, extra: dict[str, Any], num_events: int) -> list[int]:
        """Takes back what `save` kept beside the variables."""
        state = self._state
        if len(extra["hooks"]) != len(self._hooks):
            raise ValueError
        due = [int(index) for index in extra["due"]]
        if not all(0 <= index < num_events for index in due):
            raise ValueError
        state.stop_reason = str(extra["stop_reason"])
        if extra["validation"]:
            *means, state.validation_step = extra["validation"]
            state.validation = Metrics(*means)
        self.pending = Total(*extra["pending"])
        self.clock.set_state(extra["clock"])
        self._watch.set_state(extra["skips"])
        for hook, kept in zip(self._hooks, extra["hooks"], strict=True):
            hook.set_state(kept)
        return due
