"""The learning rate found by trying: a ramp of rates over some steps, and where the loss fell.

    found = find_learning_rate(model, optimizer, batches=batches)
    print(found.steepest, found.tenth_of_minimum)
    plot_learning_rates(found, path="rates.png")

Nothing is trained: model and optimiser have the same bits afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import Batches
from cifarflow.device import prepare_gpus
from cifarflow.errors import ConfigError, check_float, check_int, check_micro_batches
from cifarflow.training.loop import as_batches, check_fits, explained
from cifarflow.training.runner import StepRunner
from cifarflow.training.snapshot import Snapshot
from cifarflow.training.step import LossFn, make_train_step

# Fewer have no slope that could be told from noise.
_FEWEST_STEPS = 10
# The first steps of a ramp say more of where the weights began than of their rate.
_SHARE_LEFT_OUT = 0.1
# A fall of the smoothed loss that is no more than so many of its standard deviations is noise.
_DEVIATIONS = 5


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """What a ramp of learning rates came to.

    Attributes:
      rates: of each step, rising.
      losses: mean over the step's batch, from before its update.
      smoothed: their moving average.
      diverged: whether the ramp was cut short, as the loss had become many times its least.
      steepest: the rate at which the smoothed loss fell fastest over the logarithm of the rate,
        on its way to the least; None where it did not fall by more than the noise in it.
      tenth_of_minimum: a tenth of the rate at which the smoothed loss was least; None likewise.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool
    steepest: float | None
    tenth_of_minimum: float | None

    def scaled(self, factor: float) -> LearningRates:
        """The same with every rate multiplied by a factor, > 0."""
        check_float("factor", factor, above_minimum=True)
        return dataclasses.replace(
            self,
            rates=tuple(factor * rate for rate in self.rates),
            steepest=None if self.steepest is None else factor * self.steepest,
            tenth_of_minimum=(
                None if self.tenth_of_minimum is None else factor * self.tenth_of_minimum
            ),
        )

    def table(self, *, lines: int = 12) -> str:
        """Some of the steps in so many lines, evenly spread, and a heading."""
        check_int("lines", lines)
        places = np.linspace(0, len(self.rates) - 1, min(lines, len(self.rates))).round()
        rows = [
            f"{int(place) + 1:>5}  {self.rates[int(place)]:>13.4g}  "
            f"{self.losses[int(place)]:>10.4f}  {self.smoothed[int(place)]:>10.4f}"
            for place in places
        ]
        return "\n".join([" step  learning rate        loss    smoothed", *rows])


def find_learning_rate(
    model: Any,
    optimizer: Any,
    *,
    batches: Batches | tf.data.Dataset,
    steps: int = 300,
    low: float = 1e-5,
    high: float = 10.0,
    smoothing: float = 0.95,
    diverged_at: float = 4.0,
    loss_fn: LossFn | None = None,
    freeze: Mapping[str, int] | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
) -> LearningRates:
    """Trains for some steps at ever higher learning rates, and takes it all back.

    At step i of n the rate is low * (high / low)**(i / (n - 1)), whatever the optimiser's own rate
    or schedule; `learning_rate_scales` hold as ever.  The loss is smoothed as

        average = smoothing * average + (1 - smoothing) * loss
        smoothed = average / (1 - smoothing**(i + 1))

    and the ramp ends where that is over `diverged_at` times its least, or is not finite.

    Args:
      model: as in `make_train_step`.
      optimizer: as there; it is built if it is not.
      batches: as in `train`; the first ones are drawn.
      steps: how many rates are tried, >= 10; the noisier the loss of a batch, the more it takes.
      low: the first, > 0.
      high: the last, more than that.
      smoothing: in [0, 1); 0 smooths nothing.
      diverged_at: how many times the least smoothed loss is too much, > 1.
      loss_fn: as in `make_train_step`.
      freeze: as there.
      jit_compile: as there.
      fused: as there.
      accumulate_steps: as there.

    Returns:
      The rates, the losses, and two that suggest themselves; both take no note of the first tenth
      of the steps.  They are for the start of training: at the peak of a schedule that warms up,
      more may do.

    Raises:
      ConfigError: if an argument is out of range, or the loss was not finite before there was
        anything to see.
      DataError: if the batches do not fit the model.

    Source: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (2017); the two
      suggestions, the debiased average and the factor of 4 are fastai's.  Different here: the slope
      is taken over a tenth of the steps, not from step to step, and noise suggests nothing.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"optimizer must be a Keras optimizer, not {optimizer!r:.80}")
    steps = check_int("steps", steps, minimum=_FEWEST_STEPS)
    low = check_float("low", low, above_minimum=True)
    high = check_float("high", high, minimum=low, above_minimum=True)
    smoothing = check_float("smoothing", smoothing, maximum=1.0, below_maximum=True)
    diverged_at = check_float("diverged_at", diverged_at, minimum=1.0, above_minimum=True)
    batches = as_batches(batches)
    prepare_gpus()
    rates, losses, smoothed = [], [], []
    average, least, diverged = 0.0, math.inf, False
    with _ramped(optimizer) as set_rate:
        train_step = make_train_step(
            model,
            optimizer,
            loss_fn=loss_fn,
            freeze=freeze,
            jit_compile=jit_compile,
            fused=fused,
            accumulate_steps=accumulate_steps,
        )
        runner = StepRunner(
            train_step, batches, first_step=0, last_step=steps, jit_compile=jit_compile
        )
        check_fits(model, runner.element_spec)
        check_micro_batches(runner.element_spec[0].shape[0], accumulate_steps)
        state = Snapshot([*model.variables, *optimizer.variables])
        try:
            for step in range(steps):
                rate = low * (high / low) ** (step / (steps - 1))
                set_rate(rate)
                with explained(model):
                    sums = runner.run(1)
                    loss = float(sums.loss) / float(sums.examples)
                average = smoothing * average + (1 - smoothing) * loss
                now = average / (1 - smoothing ** (step + 1))
                if not math.isfinite(now) or now > diverged_at * least:
                    diverged = True
                    break
                least = min(least, now)
                rates.append(rate)
                losses.append(loss)
                smoothed.append(now)
        finally:
            state.restore()
    if len(rates) < _FEWEST_STEPS:
        raise ConfigError(
            f"the loss became {loss:g} at step {len(rates) + 1} of {steps}, before there is "
            f"anything to see: try a smaller low than {low:g}"
        )
    steepest, tenth = _suggest(
        np.array(rates), np.array(losses), np.array(smoothed), smoothing=smoothing
    )
    return LearningRates(tuple(rates), tuple(losses), tuple(smoothed), diverged, steepest, tenth)


def _suggest(
    rates: np.ndarray, losses: np.ndarray, smoothed: np.ndarray, *, smoothing: float
) -> tuple[float | None, float | None]:
    """The rate of the steepest fall, and a tenth of that of the least loss."""
    first = int(len(rates) * _SHARE_LEFT_OUT)
    least = first + int(smoothed[first:].argmin())
    noise = float(np.std((losses - smoothed)[: least + 1]))
    # A moving average has so much less of it.
    noise *= math.sqrt((1 - smoothing) / (1 + smoothing))
    reach = max(1, len(rates) // 20)
    fall = smoothed[first] - smoothed[least]
    if least - first < 2 * reach or fall <= _DEVIATIONS * noise:
        return None, None
    logs, falling = np.log(rates[first : least + 1]), smoothed[first : least + 1]
    width = 2 * reach
    slopes = (falling[width:] - falling[:-width]) / (logs[width:] - logs[:-width])
    return float(rates[first + reach + slopes.argmin()]), float(rates[least] / 10)


class _Given(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is told its rate."""

    def __init__(self) -> None:
        self.rate = tf.Variable(0.0, trainable=False)

    def __call__(self, step: Any) -> Any:
        return tf.convert_to_tensor(self.rate)

    def get_config(self) -> dict[str, Any]:
        raise NotImplementedError("a ramp is not kept")


@contextlib.contextmanager
def _ramped(optimizer: Any) -> Iterator[Any]:
    """Lets the learning rate be set within the block; a schedule comes back after it.

    Yields:
      A function of the rate.
    """
    # The one whose rate it is; the one around it only scales.
    is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    rule = optimizer.inner_optimizer if is_scaled else optimizer
    schedule = rule._learning_rate
    if isinstance(schedule, keras.Variable):
        # One of the optimiser's own variables, which whoever restores them restores.
        yield schedule.assign
        return
    given = _Given()
    rule.learning_rate = given
    try:
        yield given.rate.assign
    finally:
        rule.learning_rate = schedule
