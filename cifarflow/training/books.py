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
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from cifarflow.errors import CheckpointError, ConfigError, WorkdirError
from cifarflow.training.checkpoints import Checkpoints
from cifarflow.training.clock import Clock
from cifarflow.training.distribution import Team
from cifarflow.training.hooks import Hook, LoopState, Metrics
from cifarflow.training.nonfinite import Watch
from cifarflow.training.step import Sums
from cifarflow.untrusted import shown

# More are not kept in a checkpoint, whose header they are in.
_MOST_UNWRITTEN = 1000


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
      checkpoints: where they go; None for nowhere, as on all workers but the chief.
      hooks: those whose state is kept with them.
      watch: that of the run's numbers; its counts are kept too.
      say: told what goes wrong and is no end.
      first_labels: a hash of the run's first labels, which must be those of the checkpoint that is
        restored; None where they are not known.
      team: that of the run.

    Attributes:
      clock: the run's.
      pending: sums since the last train row.
      keeps: whether the run keeps checkpoints, be it the chief alone.
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
        first_labels: str | None = None,
        team: Team | None = None,
    ) -> None:
        self.clock = Clock()
        self.pending = Total()
        self._state, self._variables, self._checkpoints = state, variables, checkpoints
        self._hooks, self._watch, self._say = hooks, watch, say
        self._first_labels = first_labels
        self._team = team if team is not None else Team()
        self.keeps: bool = self._team.tell(checkpoints is not None)
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

        Each worker of a team calls it at the same steps: the numbers that the chief alone writes
        are looked at by all, who run steps again together if one is bad.  A file before it that
        could not be written is no reason to stop: this one may be.

        Args:
          due: places of the events that are still to be run at this step.

        Raises:
          NonFiniteError: if a number is not finite: a run that goes on from it would be lost.
        """
        state = self._state
        if not self.keeps or (self._saved_step == state.step and not due):
            return
        self._watch.look(state.step)
        if self._checkpoints is not None:
            self._begin_save(self._checkpoints, due)
        # With events left there will be another of this step.
        self._saved_step = None if due else state.step

    def _begin_save(self, checkpoints: Checkpoints, due: Sequence[int]) -> None:
        state = self._state
        # What cannot be written is kept in the checkpoint; `add` has said it.
        with contextlib.suppress(WorkdirError):
            state.history.sync()
        extra = {
            **self._state_beside(due),
            "replicas": self._team.replicas,
            "first_labels": self._first_labels,
            "rows": len(state.history.rows),
            "unwritten": state.history.unwritten()[-_MOST_UNWRITTEN:],
        }
        score = None
        if state.validation is not None and state.validation_step == state.step:
            score = state.validation.loss if math.isfinite(state.validation.loss) else None
        try:
            checkpoints.wait()
        except WorkdirError as error:
            self._say(f"{error}; trying again with the checkpoint of step {state.step}")
        checkpoints.begin_save(state.step, self._variables, extra=extra, score=score)

    def _state_beside(self, due: Sequence[int]) -> dict[str, Any]:
        """What `_take` takes back."""
        state = self._state
        return {
            "pending": list(self.pending),
            "hooks": [hook.get_state() for hook in self._hooks],
            "hook_kinds": [type(hook).__qualname__ for hook in self._hooks],
            "clock": self.clock.get_state(),
            "skips": self._watch.get_state(),
            "train": state.train and [*state.train],
            "validation": state.validation and [*state.validation, state.validation_step],
            "stop_reason": state.stop_reason,
            "due": list(due),
        }

    def finish(self) -> None:
        """Returns when all is in files.

        Raises:
          WorkdirError: if the last checkpoint, or rows of the log, cannot be written.
        """
        if self._checkpoints is not None:
            self._checkpoints.wait()
        self._state.history.flush()

    def newest(self) -> pathlib.Path | None:
        """The newest whole checkpoint, if there is one."""
        if self._checkpoints is None:
            return None
        with contextlib.suppress(CheckpointError, WorkdirError):
            # One that was begun may have failed, which is known.
            with contextlib.suppress(WorkdirError):
                self._checkpoints.wait()
            step = self._checkpoints.latest_whole(report=self._say)
            return None if step is None else self._checkpoints.path(step)
        return None

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Leaves no file half-way: waits at the end of the block, after an exception too."""
        try:
            yield
        except BaseException as cause:
            try:
                self.finish()
            except WorkdirError as error:
                # Once is enough.
                if str(error) not in str(cause):
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
        name = ""
        log: dict[str, Any] = {}
        if newest is not None:
            if newest > state.total_steps:
                raise ConfigError(
                    f"total_steps must be at least the checkpoint's {newest}, "
                    f"not {state.total_steps}"
                )
            extra = checkpoints.restore(newest, self._variables)
            name = f"checkpoint {str(checkpoints.path(newest))!r}"
            try:
                self._check_labels(name, extra["first_labels"])
                self._check_kinds(name, extra["hook_kinds"])
                # Before there were teams every run had one.
                self._compare_replicas(name, int(extra.get("replicas", 1)))
                due = self._take(extra, num_events)
                log = {"most": int(extra["rows"]), "unwritten": extra["unwritten"]}
            except CheckpointError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError):
                raise CheckpointError(
                    f"{name} is of a run with other hooks, or was not saved by train: give the "
                    "same hooks in the same order"
                ) from None
            state.step = newest
        # Rows from after the checkpoint, or of a run that died before its first one.
        try:
            lost = state.history.rewind(state.step, **log)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{name} keeps rows of the log that are none") from None
        if lost:
            self._say(
                f"the log lacks {lost} of the {log['most']} rows that were there at step "
                f"{state.step}: going on without them"
            )
        return due

    def follow(self, due: Sequence[int], num_events: int) -> list[int]:
        """Takes everything to where the chief is, which has restored it or begins.

        Args:
          due: what `restore` returned to this worker.
          num_events: the same on all workers.

        Returns:
          Places of the events that are still to be run at that step.

        Raises:
          WorkerError: if this worker has other data, seed or batch size than the chief, or one is
            lost.
        """
        state, team = self._state, self._team
        team.check_same("batches", {"first_labels": self._first_labels})
        told = team.tell([state.step, self._state_beside(due)])
        team.hand_out(self._variables)
        if not team.is_chief:
            state.step = told[0]
            due = self._take(told[1], num_events)
        return list(due)

    def _check_labels(self, name: str, theirs: str | None) -> None:
        """Refuses another seed or other data, where both are known."""
        ours = self._first_labels
        if None not in (ours, theirs) and ours != theirs:
            raise CheckpointError(
                f"{name} is of another run: its first batch is another: give the same data, seed "
                "and batch size"
            )

    def _compare_replicas(self, name: str, theirs: int) -> None:
        """Says that the run goes on with more replicas, or with fewer."""
        ours = self._team.replicas
        if ours != theirs:
            self._say(
                f"{name} is of a run with replicas={theirs}, which goes on with {ours}: BatchNorm "
                "and dropout act on each replica's share of a batch, so with them the end is "
                "another"
            )

    def _check_kinds(self, name: str, kinds: Sequence[str]) -> None:
        """Refuses hooks of other kinds, which would take another's state for theirs."""
        ours = [type(hook).__qualname__ for hook in self._hooks]
        for place, (kind, our) in enumerate(zip(kinds, ours, strict=True)):
            if kind != our:
                raise CheckpointError(
                    f"{name} is of a run with other hooks: hooks[{place}] was of kind "
                    f"{shown(kind)}, not {our!r}: give the same hooks in the same order"
                )

    def _take(self, extra: dict[str, Any], num_events: int) -> list[int]:
        """Takes back what `save` kept beside the variables."""
        state = self._state
        if len(extra["hooks"]) != len(self._hooks):
            raise ValueError
        due = [int(index) for index in extra["due"]]
        if not all(0 <= index < num_events for index in due):
            raise ValueError
        state.stop_reason = str(extra["stop_reason"])
        if extra["train"]:
            state.train = Metrics(*extra["train"])
        if extra["validation"]:
            *means, state.validation_step = extra["validation"]
            state.validation = Metrics(*means)
        self.pending = Total(*extra["pending"])
        self.clock.set_state(extra["clock"])
        self._watch.set_state(extra["skips"])
        for hook, kept in zip(self._hooks, extra["hooks"], strict=True):
            hook.set_state(kept)
        return due
