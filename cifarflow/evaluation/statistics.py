"""What runs that differ in their seed come to: mean, standard deviation and 95 % interval.

    found = summarise([0.781, 0.786, 0.779])
    print(found.mean, found.deviation, found.interval)

Runs are taken for independent draws of a normal distribution, as runs that differ in their seed
about are.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import tensorflow as tf

from cifarflow.errors import ConfigError

# What a 95 % interval leaves out.
LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Summary:
    """What runs came to together.

    Attributes:
      n: how many runs.
      mean: their mean.
      deviation: their standard deviation, of a sample (n - 1); None for one run.
      interval: the 95 % confidence interval of the mean; None for one run.
    """

    n: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and confidence interval of the mean.

    Args:
      values: one a run, at least one, all finite.

    Raises:
      ConfigError: if there is none, or one is not a finite number.
    """
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"values must be finite numbers, at least one, not {values!r}")
    mean = statistics.fmean(numbers)
    if len(numbers) < 2:
        return Summary(len(numbers), mean, None, None)
    deviation = statistics.stdev(numbers)
    half = student_quantile(LEVEL, len(numbers) - 1) * deviation / math.sqrt(len(numbers))
    return Summary(len(numbers), mean, deviation, (mean - half, mean + half))


def student_tail(t: float, degrees: float) -> float:
    """The probability that Student's t is as far from 0 as `t`, on either side, or farther.

    Args:
      t: any number; of an infinite one the probability is 0.
      degrees: the degrees of freedom, above 0; need not be whole.

    Returns:
      The two-sided p, 0..1.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.1 and 26.5.27.
    """
    # In float64, which not every GPU kernel has.
    with tf.device("CPU"):
        x = tf.constant(degrees / (degrees + t * t), tf.float64)
        half = tf.constant(0.5, tf.float64)
        return float(tf.math.betainc(tf.constant(degrees / 2, tf.float64), half, x))


def student_quantile(tail: float, degrees: float) -> float:
    """The t at which `student_tail` is `tail`: for 0.05 that of a 95 % interval.

    Args:
      tail: the two-sided probability, above 0, at most 1.
      degrees: the degrees of freedom, above 0.
    """
    low, high = 0.0, 1.0
    while student_tail(high, degrees) > tail:
        low, high = high, 2 * high
    # A double has 53 bits: the interval has no number inside by then.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, degrees) > tail else (low, middle)
    return (low + high) / 2
