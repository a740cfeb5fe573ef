"""Learning-rate schedules: pure functions of the step, each with a linear warm-up.

    from cifarflow.optimizers.schedules import Cosine
    from cifarflow.optimizers.sgd import SGD

    schedule = Cosine(0.1, 3900, warmup_steps=100)  # peak, total steps
    float(schedule(0)), float(schedule(100)), float(schedule(3900))  # 0.0, 0.1, 0.0
    optimizer = SGD(schedule, momentum=0.9, nesterov=True)

A step is the number of updates made so far: 0 at the first update, a Python int or a scalar
integer tensor.  The result is a float32 scalar tensor, in a `tf.function` and under XLA too.
Past the last step of a schedule its last value holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from cifarflow.errors import ConfigError, check_choice, check_float, check_int


class WarmedSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that first rises linearly to its first value: the base of those below.

    With `after_warmup(n)` the schedule proper, `n` steps after the warm-up::

        step <  warmup_steps: start + (after_warmup(0) - start) * step / warmup_steps,
                              start = warmup_start * learning_rate
        step >= warmup_steps: after_warmup(step - warmup_steps)

    A subclass defines `after_warmup` and adds its own arguments to `get_config`.

    Args:
      learning_rate: the peak, > 0.
      warmup_steps: length of the warm-up in steps, >= 0; 0 for none.
      warmup_start: where the warm-up starts, as a fraction of the peak, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds.
    """

    def __init__(self, learning_rate: float, *, warmup_steps: int, warmup_start: float) -> None:
        super().__init__()
        self.learning_rate = check_float("learning_rate", learning_rate, above_minimum=True)
        self.warmup_steps = check_int("warmup_steps", warmup_steps, minimum=0)
        self.warmup_start = check_float("warmup_start", warmup_start, maximum=1.0)

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """Learning rate `steps` after the warm-up.

        Args:
          steps: float32 scalar, >= 0.

        Returns:
          float32 scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must define after_warmup(steps)")

    def __call__(self, step: Any) -> tf.Tensor:
        """Learning rate at `step` (Python int or scalar tensor, >= 0): a float32 scalar."""
        # float32 counts exactly up to 2**24 steps: 13,000 epochs of the lab.
        steps = tf.cast(step, tf.float32)
        if not self.warmup_steps:
            return self.after_warmup(steps)
        start = self.warmup_start * self.learning_rate
        first = self.after_warmup(tf.zeros((), tf.float32))
        rising = start + (first - start) * (steps / self.warmup_steps)
        after = self.after_warmup(tf.maximum(steps - self.warmup_steps, 0.0))
        return tf.where(steps < self.warmup_steps, rising, after)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "warmup_start": self.warmup_start,
        }


@keras.saving.register_keras_serializable(package="cifarflow")
class Constant(WarmedSchedule):
    """`learning_rate` at every step after the warm-up.

    Args:
      learning_rate: the constant, > 0.
      warmup_steps: steps of linear warm-up, >= 0.
      warmup_start: where the warm-up starts, as a fraction of `learning_rate`, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds.
    """

    def __init__(
        self, learning_rate: float, *, warmup_steps: int = 0, warmup_start: float = 0.0
    ) -> None:
        super().__init__(learning_rate, warmup_steps=warmup_steps, warmup_start=warmup_start)

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """See the base class."""
        del steps
        return tf.constant(self.learning_rate, tf.float32)


@keras.saving.register_keras_serializable(package="cifarflow")
class InverseTime(WarmedSchedule):
    """The `decay` argument of Keras 2, as a schedule.

    With `n` the number of steps since the end of the warm-up::

        learning_rate / (1 + decay * n)

    Args:
      learning_rate: the peak, > 0.
      decay: >= 0; after `1 / decay` steps the learning rate has halved.
      warmup_steps: steps of linear warm-up, >= 0.
      warmup_start: where the warm-up starts, as a fraction of the peak, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds.

    Source:
      The lab's `decay=1e-6` in every section; without warm-up equal to
      `keras.optimizers.schedules.InverseTimeDecay(learning_rate, 1, decay)`.
    """

    def __init__(
        self,
        learning_rate: float,
        decay: float,
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
    ) -> None:
        super().__init__(learning_rate, warmup_steps=warmup_steps, warmup_start=warmup_start)
        self.decay = check_float("decay", decay)

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """See the base class."""
        return self.learning_rate / (1.0 + self.decay * steps)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return {**super().get_config(), "decay": self.decay}


class _BoundedSchedule(WarmedSchedule):
    """A schedule that ends at `total_steps`, the warm-up included."""

    def __init__(
        self, learning_rate: float, total_steps: int, *, warmup_steps: int, warmup_start: float
    ) -> None:
        super().__init__(learning_rate, warmup_steps=warmup_steps, warmup_start=warmup_start)
        self.total_steps = check_int("total_steps", total_steps)
        if self.warmup_steps > self.total_steps:
            raise ConfigError(
                f"warmup_steps must be at most total_steps ({self.total_steps}),"
                f" not {self.warmup_steps}"
            )
        # A warm-up as long as the total leaves nothing to divide by, and nothing to see.
        self.after_warmup_steps = max(1, self.total_steps - self.warmup_steps)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "total_steps": self.total_steps}


@keras.saving.register_keras_serializable(package="cifarflow")
class Cosine(_BoundedSchedule):
    """Half a cosine from the peak down to `final_fraction` of it.

    With `n` the number of steps since the end of the warm-up and
    `x = min(1, n / (total_steps - warmup_steps))`::

        learning_rate * (final_fraction + (1 - final_fraction) * (1 + cos(pi * x)) / 2)

    Args:
      learning_rate: the peak, > 0.
      total_steps: the step at which the end is reached, warm-up included, >= 1.
      final_fraction: the end as a fraction of the peak, in [0, 1].
      warmup_steps: steps of linear warm-up, 0..total_steps.
      warmup_start: where the warm-up starts, as a fraction of the peak, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds.

    Source:
      Loshchilov and Hutter, "SGDR" (2017), one cycle of it.
    """

    def __init__(
        self,
        learning_rate: float,
        total_steps: int,
        *,
        final_fraction: float = 0.0,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate, total_steps, warmup_steps=warmup_steps, warmup_start=warmup_start
        )
        self.final_fraction = check_float("final_fraction", final_fraction, maximum=1.0)

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """See the base class."""
        progress = tf.minimum(steps / self.after_warmup_steps, 1.0)
        final = self.final_fraction * self.learning_rate
        return _between(self.learning_rate, final, progress, "cosine")

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return {**super().get_config(), "final_fraction": self.final_fraction}


@keras.saving.register_keras_serializable(package="cifarflow")
class OneCycle(_BoundedSchedule):
    """Up from `start_fraction` of the peak to the peak, then down to `end_fraction` of it.

    With `n` the number of steps since the end of the warm-up, `T = total_steps - warmup_steps`,
    `P = floor(peak_fraction * T)` and `anneal="linear"`::

        n <  P: learning_rate * (start_fraction + (1 - start_fraction) * n / P)
        n >= P: learning_rate * (1 + (end_fraction - 1) * min(1, (n - P) / (T - P)))

    With `anneal="cosine"` both pieces go between the same ends along half a cosine:
    `x` becomes `(1 - cos(pi * x)) / 2`.

    The rise is already a warm-up; `warmup_steps` puts another before it, up to
    `start_fraction * learning_rate`, and is 0 in the recipes this comes from.

    Args:
      learning_rate: the peak, > 0.
      total_steps: the step at which the end is reached, warm-up included, >= 1.
      start_fraction: where the rise starts, as a fraction of the peak, in [0, 1].
      peak_fraction: length of the rise as a fraction of the steps, in [0, 1]; 0 for none.
      end_fraction: where the fall ends, as a fraction of the peak, in [0, 1].
      anneal: "linear" or "cosine".
      warmup_steps: steps of linear warm-up before the rise, 0..total_steps.
      warmup_start: where the warm-up starts, as a fraction of the peak, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds, or `anneal` is
        not one of the two.

    Source:
      Smith, "Super-Convergence" (2018); the defaults are the triangle of Jordan's airbench94
      (2024): 0.2 -> 1 over the first 23 % of the steps, then down to 0.07.
    """

    def __init__(
        self,
        learning_rate: float,
        total_steps: int,
        *,
        start_fraction: float = 0.2,
        peak_fraction: float = 0.23,
        end_fraction: float = 0.07,
        anneal: str = "linear",
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate, total_steps, warmup_steps=warmup_steps, warmup_start=warmup_start
        )
        self.start_fraction = check_float("start_fraction", start_fraction, maximum=1.0)
        self.peak_fraction = check_float("peak_fraction", peak_fraction, maximum=1.0)
        self.end_fraction = check_float("end_fraction", end_fraction, maximum=1.0)
        self.anneal = check_choice("anneal", anneal, ("linear", "cosine"))

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """See the base class."""
        peak, peak_step = self.learning_rate, int(self.peak_fraction * self.after_warmup_steps)
        # A piece without length is never entered: 1 keeps its division harmless.
        rise = tf.minimum(steps / max(1, peak_step), 1.0)
        fall = tf.minimum((steps - peak_step) / max(1, self.after_warmup_steps - peak_step), 1.0)
        return tf.where(
            steps < peak_step,
            _between(self.start_fraction * peak, peak, rise, self.anneal),
            _between(peak, self.end_fraction * peak, fall, self.anneal),
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        return {
            **super().get_config(),
            "start_fraction": self.start_fraction,
            "peak_fraction": self.peak_fraction,
            "end_fraction": self.end_fraction,
            "anneal": self.anneal,
        }


@keras.saving.register_keras_serializable(package="cifarflow")
class Piecewise(WarmedSchedule):
    """Constant pieces: a new value from each boundary on.

    The value at `step` after the warm-up is::

        values[number of boundaries <= step]

    Boundaries count from the start of training, so a warm-up does not move them.  Keras's
    `PiecewiseConstantDecay` changes one step later: there the boundary itself still has the
    value before it.

    Args:
      boundaries: whole numbers >= 1, increasing; at least one.
      values: learning rates >= 0, one more than boundaries, the first > 0.
      warmup_steps: steps of linear warm-up to `values[0]`, 0..boundaries[0] - 1.
      warmup_start: where the warm-up starts, as a fraction of `values[0]`, in [0, 1].

    Raises:
      ConfigError: if an argument is not a finite number within these bounds, boundaries do not
        increase, or the lengths do not fit.
    """

    def __init__(
        self,
        boundaries: Sequence[int],
        values: Sequence[float],
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
    ) -> None:
        boundaries, values = list(boundaries), list(values)
        if not boundaries or len(values) != len(boundaries) + 1:
            raise ConfigError(
                "values must have one entry more than boundaries, and boundaries at least one,"
                f" not {len(values)} values {values} for {len(boundaries)} boundaries {boundaries}"
            )
        super().__init__(values[0], warmup_steps=warmup_steps, warmup_start=warmup_start)
        self.boundaries = [check_int("boundaries", boundary) for boundary in boundaries]
        self.values = [check_float("values", value) for value in values]
        if self.boundaries != sorted(set(self.boundaries)):
            raise ConfigError(f"boundaries must increase, not {self.boundaries}")
        # At the first boundary the second value holds: the first would never be reached.
        if self.warmup_steps >= self.boundaries[0]:
            raise ConfigError(
                f"warmup_steps must be less than the first boundary ({self.boundaries[0]}),"
                f" not {self.warmup_steps}"
            )

    def after_warmup(self, steps: tf.Tensor) -> tf.Tensor:
        """See the base class."""
        passed = steps + self.warmup_steps >= tf.constant(self.boundaries, tf.float32)
        piece = tf.reduce_sum(tf.cast(passed, tf.int32))
        return tf.gather(tf.constant(self.values, tf.float32), piece)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON."""
        config = super().get_config()
        del config["learning_rate"]  # it is values[0]
        return {**config, "boundaries": self.boundaries, "values": self.values}


def _between(start: float, end: float, progress: tf.Tensor, anneal: str) -> tf.Tensor:
    """From `start` at progress 0 to `end` at progress 1, in a line or along half a cosine."""
    if anneal == "cosine":
        progress = (1.0 - tf.cos(math.pi * progress)) / 2.0
    return start + (end - start) * progress
