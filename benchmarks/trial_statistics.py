"""Whether two recipes differ, or their runs do so by chance: Welch's test, and what it says.

    print(compare({"ours": [25.1, 24.8, 25.6], "theirs": [31.0, 30.2, 30.9]}, SECONDS).sentence)

Every interval is of 95 %, every test is two-sided and at the level of 5 %.  Both take the runs for
independent draws of a normal distribution, as runs that differ in their seed about are.  What the
runs of one recipe come to is `cifarflow.evaluation.statistics.summarise`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cifarflow.evaluation.statistics import LEVEL, student_quantile, student_tail

# How likely a test is to find a difference that is there, in `Verdict.runs_needed`.
_POWER = 0.8
_MOST_RUNS = 10_000


class Welch(NamedTuple):
    """What Welch's test finds.

    Attributes:
      difference: mean of the first less that of the second.
      interval: its 95 % confidence interval.
      t: the difference over its standard error.
      degrees: of freedom, by Welch and Satterthwaite.
      p: the probability of so large a difference, either way, if there is none.
    """

    difference: float
    interval: tuple[float, float]
    t: float
    degrees: float
    p: float


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """Tests whether two means differ, by runs whose variances may differ too.

    Args:
      first: one value a run.
      second: those of the other.

    Returns:
      The `Welch`; None where there is nothing to test with: fewer than two runs of one of them, or
      no variance in either.

    Source: B. L. Welch, The generalization of "Student's" problem when several different population
      variances are involved, Biometrika 34 (1947).
    """
    if min(len(first), len(second)) < 2:
        return None
    # Squared errors of the two means.
    errors = [statistics.variance(values) / len(values) for values in (first, second)]
    total = sum(errors)
    if not total:
        return None
    difference = statistics.fmean(first) - statistics.fmean(second)
    t = difference / math.sqrt(total)
    # By shares, so that no fourth power of a small deviation becomes 0.
    shares = [error / total for error in errors]
    degrees = 1 / sum(
        share**2 / (len(values) - 1) for share, values in zip(shares, (first, second), strict=True)
    )
    half = student_quantile(LEVEL, degrees) * math.sqrt(total)
    interval = (difference - half, difference + half)
    return Welch(difference, interval, t, degrees, student_tail(t, degrees))


def runs_needed(first: Sequence[float], second: Sequence[float]) -> int | None:
    """About how many runs of each would show a difference as large as the one between the means.

    By the normal approximation, for a test that finds such a difference in 80 of 100 cases.

    Args:
      first: one value a run, at least two.
      second: those of the other.

    Returns:
      The number, more than there are; None if the means are equal.
    """
    difference = statistics.fmean(first) - statistics.fmean(second)
    if not difference:
        return None
    normal = statistics.NormalDist()
    wanted = normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(_POWER)
    deviations = math.hypot(statistics.stdev(first), statistics.stdev(second))
    # Where the means are as good as equal the square might be infinite.
    runs = min(wanted * deviations / abs(difference), _MOST_RUNS) ** 2
    return max(math.ceil(runs), len(first) + 1, len(second) + 1)


class Measure(NamedTuple):
    """What is compared.

    Attributes:
      name: of the figure.
      better: what the one with the better mean is called.
      lower_is_better: which that is.
      show: a value as text.
      show_difference: a difference as text.
      times: what the ratio of the means is called, "" where it is of no use.
    """

    name: str
    better: str
    lower_is_better: bool
    show: Callable[[float], str]
    show_difference: Callable[[float], str]
    times: str = ""


def _show_seconds(seconds: float) -> str:
    # Whole seconds from 1000 on: no digits that say nothing.
    return f"{seconds:,.0f} s" if abs(seconds) >= 999.5 else f"{seconds:.3g} s"


SECONDS = Measure("seconds", "faster", True, _show_seconds, _show_seconds, "times as fast")
ACCURACY = Measure(
    "accuracy", "more accurate", False, "{:.4f}".format, lambda d: f"{100 * d:.2f} points"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What can be said of two recipes.

    Attributes:
      measure: the name of what was compared.
      winner: the name of the better one; None if that cannot be said, or neither is.
      sentence: the same in words, with the figures.
      test: Welch's, None where there was nothing to test with.
      runs_needed: about how many runs of each would tell, where they did not and others could.
    """

    measure: str
    winner: str | None
    sentence: str
    test: Welch | None = None
    runs_needed: int | None = None


def compare(runs: Mapping[str, Sequence[float]], measure: Measure) -> Verdict:
    """Says which of two is better, or why that cannot be said.

    Args:
      runs: the name of each of the two, and its figure in each run; at least one run of each.
      measure: what the figure is.
    """
    (one, first), (other, second) = runs.items()
    means = {name: statistics.fmean(values) for name, values in runs.items()}
    ordered = sorted(means, key=lambda name: means[name], reverse=not measure.lower_is_better)
    best, worst = ordered
    against = f"mean {measure.show(means[best])} against {measure.show(means[worst])}"
    counts = f"n = {len(first)} of {one} and {len(second)} of {other}"
    unknown = f"which is {measure.better} cannot be said"
    gap = measure.show_difference(abs(means[best] - means[worst]))
    if min(len(first), len(second)) < 2:
        sentence = (
            f"{unknown}: n is too small ({counts}; 2 of each are the least); {best} came out "
            f"ahead, {against}, by {gap}"
        )
        return Verdict(measure.name, None, sentence)
    test = welch(first, second)
    if test is None and means[best] == means[worst]:
        sentence = f"neither is {measure.better}: every run came to {measure.show(means[best])}"
        return Verdict(measure.name, None, f"{sentence} ({counts})")
    if test is None:
        sentence = (
            f"{best} is {measure.better} in every run: {against}, by {gap} ({counts}; neither "
            "varies at all, so there is nothing to test)"
        )
        return Verdict(measure.name, best, sentence)
    # As seen from the better one, so that the difference that is shown is above 0.
    sign = 1 if test.difference > 0 else -1
    low, high = sorted(sign * end for end in test.interval)
    figures = (
        f"95 % interval {measure.show_difference(low)} to {measure.show_difference(high)}; Welch's "
        f"t = {abs(test.t):.2f}, {test.degrees:.1f} degrees of freedom, {_show_p(test.p)}; {counts}"
    )
    if test.p < LEVEL:
        ratio = f", {means[worst] / means[best]:.3g} {measure.times}" if measure.times else ""
        sentence = f"{best} is {measure.better}: {against}, by {gap}{ratio} ({figures})"
        return Verdict(measure.name, best, sentence, test)
    sentence = (
        f"{unknown}: {best} came out ahead, {against}, but {gap} are within chance ({figures})"
    )
    needed = runs_needed(first, second)
    if needed is not None:
        most = f"more than {_MOST_RUNS:,}" if needed > _MOST_RUNS else f"about {needed:,}"
        sentence += f"; to tell a difference of that size takes {most} runs of each"
    return Verdict(measure.name, None, sentence, test, needed)


def _show_p(p: float) -> str:
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"
