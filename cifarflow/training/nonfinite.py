"""Numbers gone bad: back to the very step at which they did, and a capsule of it.

    watch = Watch(model, optimizer, variables=variables, batches=batches, ...)
    watch.begin(runner, step)
    while step < last_step:
        sums = runner.run(count)
        watch.after_call(step, count, loss=float(sums.loss), skipped=float(sums.skipped))
        step += count
    watch.look(step)

Many steps share a compiled call, and looking at every number of every step would cost time in each
of them.  So none is looked at but the sum of the losses; when that has gone bad the steps of the
last seconds are run again one by one, from the values that the variables had before them.

Several workers run steps together, or not at all.  So each of them has a watch, and what makes it
run steps again is the same on all: sums of the whole batch, values that all have, the chief's clock
and whether the chief has room for another capsule.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn

import keras

from cifarflow.errors import NonFiniteError, WorkdirError, check_int
from cifarflow.training.capsule import Findings, save_capsule
from cifarflow.training.distribution import Team
from cifarflow.training.snapshot import Snapshot, not_finite
from cifarflow.untrusted import one_line

# Between two copies of the state, each of which takes the memory of weights and optimiser.  Up to
# so many seconds of steps, and one call, are run again when one was bad.
_SECONDS_A_SNAPSHOT = 5.0
# A float16 loss scale may be halved some forty times before it fits; after more, it never will.
_MOST_IDLE_STEPS = 300


class Watch:
    """Watches the numbers of a run.

    A gradient that is not finite spoils the weights, but the loss only of the step after it; what
    no loss shows, such as the statistics of BatchNorm, is found by `look`.

    Args:
      model: the model in training.
      optimizer: its optimiser.
      variables: Keras variables, all that a step changes: the model's, the optimiser's, averages.
        Such as are not finite from the start on may stay so.
      batches: those of the run, by which a batch is drawn again.
      make_examine: function of nothing that makes one of (images, labels), which runs one step,
        tells what is not finite and changes nothing; called when there is a step to examine.
      capsules: where to keep the steps that fail; None keeps none.
      say: told, in a line each, which steps were skipped.
      stopped: says whether a signal has come, which ends the hunt for a step; the same on all
        workers of a team.
      team: that of the run; by its clock the state is copied now and then.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        *,
        variables: Sequence[Any],
        batches: Any,
        make_examine: Callable[[], Callable[[Any, Any], Findings]],
        capsules: Capsules | None = None,
        say: Callable[[str], object],
        stopped: Callable[[], object] = lambda: False,
        team: Team | None = None,
    ) -> None:
        self._team = team if team is not None else Team()
        self._model, self._optimizer, self._variables = model, optimizer, list(variables)
        self._batches, self._capsules, self._say = batches, capsules, say
        self._make_examine, self._stopped = make_examine, stopped
        self._examine: Callable[[Any, Any], Findings] | None = None
        self._has_scale = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._skipped_steps, self._loss_scale_skips = 0, 0
        # Steps since the last one that has updated anything.
        self._idle = 0
        self._kept: list[tuple[int, Snapshot]] = []

    def begin(self, runner: Any, step: int) -> None:
        """Starts to watch.

        Args:
          runner: the `StepRunner` of the run.
          step: the step that it runs next.
        """
        self._runner = runner
        self._updates = int(self._optimizer.iterations)
        self._watched = [variable for variable in self._variables if not not_finite([variable])]
        self._begin_from(step)

    def remember(self, step: int) -> None:
        """Keeps the variables' values as they are now, before a step.

        To be called after anything but a step has changed one.
        """
        # If these turn out to be bad, those before them are good.
        self._kept = [*self._kept[-1:], (step, Snapshot(self._variables))]

    def after_call(self, first_step: int, count: int, *, loss: float, skipped: float) -> None:
        """Looks at what a call has come to.

        Args:
          first_step: the first of its steps.
          count: how many it has run.
          loss: sum over their examples.
          skipped: how many of them were left out.

        Raises:
          NonFiniteError: if the loss is not finite, or nothing has been updated for long.
        """
        last_step = first_step + count
        if not math.isfinite(loss):
            self._fail(f"the training loss became {loss}", first_step, last_step)
        self._count(first_step, count, int(skipped))
        if self._team.now() - self._good_at > _SECONDS_A_SNAPSHOT:
            self.look(last_step)
            self._begin_from(last_step)

    def look(self, step: int) -> None:
        """Looks at every number, which takes some milliseconds: before they are put to use.

        Args:
          step: the step that is run next.

        Raises:
          NonFiniteError: if one is not finite.
        """
        bad = not_finite(self._watched)
        if bad:
            self._fail(f"{bad[0]!r} became infinite or NaN", self._kept[0][0], step)

    def get_state(self) -> dict[str, int]:
        """What was skipped so far, of which a checkpoint keeps count."""
        return {"skipped_steps": self._skipped_steps, "loss_scale_skips": self._loss_scale_skips}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Takes back what `get_state` gave."""
        self._skipped_steps = int(state["skipped_steps"])
        self._loss_scale_skips = int(state["loss_scale_skips"])

    def _begin_from(self, step: int) -> None:
        """Forgets all but the values as they are now, which are good."""
        self._kept = [(step, Snapshot(self._variables))]
        self._good_at = self._team.now()

    def _count(self, first_step: int, count: int, skipped: int) -> None:
        updates = int(self._optimizer.iterations)
        done, self._updates = updates - self._updates, updates
        is_idle = not done and (skipped or self._has_scale)
        self._idle = self._idle + count if is_idle else 0
        self._skipped_steps += skipped
        if self._has_scale:
            self._loss_scale_skips += count - done - skipped
        if skipped:
            # With weights that are lost no step can be done.
            self.look(first_step + count)
            self._tell(first_step, count, skipped)
        if self._idle >= _MOST_IDLE_STEPS:
            last_step = first_step + count
            raise NonFiniteError(
                f"none of the {self._idle} steps {last_step - self._idle} to {last_step - 1} could "
                f"be done, as their loss or gradients are not finite: {self._advice()}"
            )

    def _tell(self, first_step: int, count: int, skipped: int) -> None:
        """Says which steps of a call were skipped, and keeps the first few of the run."""
        left = skipped
        if self._has_room():
            now = Snapshot(self._variables)
            with contextlib.closing(self._bad_steps(first_step + count)) as steps:
                for step, is_skipped in steps:
                    # Those of calls before this one have been told.
                    if is_skipped and step >= first_step:
                        found, kept = self._keep(step)
                        self._say(f"step {step} was skipped: {found}{kept}")
                        left -= 1
                    if not left or not self._has_room():
                        break
            now.restore()
        if left:
            which = f"step {first_step} was"
            if count > 1:
                which = f"{left} of the steps {first_step} to {first_step + count - 1} were"
            self._say(f"{which} skipped: loss or gradients not finite")

    def _has_room(self) -> bool:
        """Whether another capsule may be kept, by the chief."""
        has_room = self._capsules is not None and self._capsules.has_room()
        return bool(self._team.tell(has_room))

    def _fail(self, symptom: str, first_step: int, last_step: int) -> NoReturn:
        with contextlib.closing(self._bad_steps(last_step)) as steps:
            for step in (step for step, is_skipped in steps if not is_skipped):
                found, kept = self._keep(step)
                # The weights stay as they are now, from before the step.
                raise NonFiniteError(
                    f"{symptom}, which began in step {step}, the first being 0: "
                    f"{found}; {self._advice()}{kept}"
                )
        within = f"{symptom} within steps {first_step} to {last_step - 1}"
        if self._stopped():
            raise NonFiniteError(f"{within}; which it was is not known, as a signal came first")
        raise NonFiniteError(f"{within}, and did not when these were run again: {self._advice()}")

    def _advice(self) -> str:
        return f"try a smaller learning_rate than {float(self._optimizer.learning_rate):g}"

    def _bad_steps(self, last_step: int) -> Generator[tuple[int, bool], None, None]:
        """Runs the steps that are remembered again, one by one.

        Bad are those whose loss is not finite, that leave a variable that is not, or that are
        skipped.  None may be, on a device that rounds differently from time to time.

        Yields:
          The bad ones, and whether it is skipped; the variables are as they were before it.
        """
        for first_step, snapshot in reversed(self._kept):
            snapshot.restore()
            if not_finite(self._watched):
                continue
            with self._runner.visiting(first_step):
                for step in range(first_step, last_step):
                    if self._stopped():
                        snapshot.restore()
                        return
                    before = Snapshot(self._variables)
                    with self._team.noticing():
                        sums = self._runner.run(1)
                        loss, is_skipped = float(sums.loss), bool(float(sums.skipped))
                    is_lost = not math.isfinite(loss) or not_finite(self._watched)
                    if is_skipped or is_lost:
                        after = Snapshot(self._variables)
                        before.restore()
                        yield step, is_skipped
                        after.restore()
            return

    def _keep(self, step: int) -> tuple[str, str]:
        """Examines a step that is to be run next, and keeps its capsule.

        Returns:
          What was found, and where the capsule is or why it could not be written: what has failed
          is the step, and that is to be told in any case.
        """
        batches, model = self._batches, self._model
        images, labels = next(iter(batches.dataset(step, step + 1)))
        if self._examine is None:
            self._examine = self._make_examine()
        found = self._examine(images, labels)
        # Whatever the names in it, what follows it is to fit into the same line.
        text = one_line(found.describe(), length=500)
        if self._capsules is None:
            return text, ""
        kept = self._capsules.save(
            step,
            found,
            images=images,
            labels=labels,
            variables=[*model.variables, *self._optimizer.variables],
            num_classes=model.output_shape[-1],
            steps_per_epoch=batches.steps_per_epoch,
            seed=getattr(batches, "seed", None),
        )
        return text, f"; {kept}"


class Capsules:
    """Where a run keeps the capsules of its failed steps.

    Args:
      directory: the folder of their folders; made when there is something to keep.
      recipe: the values of the run's recipe, as JSON has them; by them a capsule is replayed.
      keep: how many skipped steps are kept, the first ones: a run may have many.

    Raises:
      ConfigError: if keep is not a whole number >= 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        recipe: Mapping[str, Any] | None = None,
        keep: int = 3,
    ) -> None:
        self.directory = pathlib.Path(directory)
        self._recipe = recipe
        self._keep = check_int("keep", keep)

    def has_room(self) -> bool:
        """Whether another capsule may be kept."""
        try:
            there = [entry for entry in self.directory.iterdir() if entry.name[0] != "."]
        except OSError:
            return True  # not made yet, or to be told of when it is written
        return len(there) < self._keep

    def save(self, step: int, found: Findings, **values: Any) -> str:
        """Writes the capsule of a step.

        Args:
          step: which, 0 for the first.
          found: what `examine_step` found.
          **values: the other arguments of `save_capsule`.

        Returns:
          How to replay it, or where it is, or why it could not be written.
        """
        folder = self.directory / f"step_{step:08d}"
        try:
            save_capsule(folder, step=step, found=found, recipe=self._recipe, **values)
        except WorkdirError as error:
            return str(error)
        if self._recipe is None:
            return f"the step is kept in {folder}"
        python = shlex.quote(pathlib.Path(sys.executable).name or "python")
        return f"to run it again: {python} -m cifarflow replay {shlex.quote(str(folder))}"
