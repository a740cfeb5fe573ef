"""Two models on the same test set: is one better, or is it chance?

    found = mcnemar(labels, first.argmax(-1), second.argmax(-1), names=("small", "large"))
    print(found.verdict)  # 'large' is better than 'small': accuracy 0.7831 against 0.7702, ...

Only the examples that one gets right and the other wrong tell the two apart.  NumPy only.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike

from cifarflow.errors import DataError
from cifarflow.evaluation.metrics import check_classes

# A p below this is taken for a difference.
LEVEL = 0.05
# With fewer discordant examples the chi-square distribution is a poor likeness.
_EXACT_BELOW = 25


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What McNemar's test says of two models on the same examples.

    Attributes:
      names: of the first and the second.
      examples: how many, n.
      accuracies: of the first and the second, 0..1.
      both_right: examples that both get right.
      first_only: examples that only the first gets right.
      second_only: examples that only the second gets right.
      neither_right: examples that both get wrong.
      is_exact: whether p is of the binomial distribution, not of the chi-square one.
      p: how probable it is that equally good models differ by as much, or more, by chance.
    """

    names: tuple[str, str]
    examples: int
    accuracies: tuple[float, float]
    both_right: int
    first_only: int
    second_only: int
    neither_right: int
    is_exact: bool
    p: float

    @property
    def discordant(self) -> int:
        """How many examples one gets right and the other wrong."""
        return self.first_only + self.second_only

    @property
    def least_difference(self) -> float | None:
        """The difference in accuracy from which on so many discordant examples show one.

        None if they are too few to show any, even if all spoke for the same model.
        """
        count = self.discordant
        for excess in range(count % 2, count + 1, 2):
            if _p_of((count - excess) // 2, (count + excess) // 2) < LEVEL:
                return excess / self.examples
        return None

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        first, second = self.accuracies
        figures = (
            f"accuracy {first:.4f} against {second:.4f} on {self.examples:,} images, "
            f"{self.first_only:,} right by {self.names[0]!r} alone and {self.second_only:,} by "
            f"{self.names[1]!r} alone, p = {self.p:.2g}"
        )
        least = self.least_difference
        if least is None:
            return (
                f"too few images to say which is better: the two differ in only "
                f"{self.discordant} ({figures})"
            )
        if self.p >= LEVEL:
            return (
                f"no difference that chance could not make: a difference of {least:.4f} or more "
                f"would be one ({figures})"
            )
        better, worse = self.names if self.first_only > self.second_only else self.names[::-1]
        return f"{better!r} is better than {worse!r} ({figures})"


def mcnemar(
    labels: ArrayLike,
    first: ArrayLike,
    second: ArrayLike,
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """McNemar's test of two models' predictions for the same examples.

    With b and c examples that only one of the two gets right: for b + c < 25 p is exact, that of a
    fair coin that b + c times falls at least as unevenly, on either side; else that of chi-square
    with one degree of freedom and the continuity correction, (|b - c| - 1)**2 / (b + c).

    It speaks of these two trained models.  Whether one recipe is better than another takes runs of
    several seeds, see `summarise`.

    Args:
      labels: [N] integers from 0: the true classes.
      first: [N] integers from 0: the classes that the first model predicts.
      second: [N], those of the second.
      names: of the two, for the verdict.

    Returns:
      The `Comparison`.

    Raises:
      DataError: if the three are not equally many integers from 0, at least one.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions
      or percentages" (1947), with Edwards's correction (1948); for classifiers Dietterich,
      "Approximate statistical tests for comparing supervised classification learning algorithms"
      (1998).
    """
    arrays = {"labels": labels, "first": first, "second": second}
    count = len(np.atleast_1d(np.asarray(labels)))
    true, *predicted = (
        check_classes(name, values, num_classes=_MOST_CLASSES, count=count)
        for name, values in arrays.items()
    )
    if not count:
        raise DataError("labels must hold at least one example, not 0")
    right, other = (values == true for values in predicted)
    only, other_only = int((right & ~other).sum()), int((other & ~right).sum())
    return Comparison(
        names=names,
        examples=count,
        accuracies=(float(right.mean()), float(other.mean())),
        both_right=int((right & other).sum()),
        first_only=only,
        second_only=other_only,
        neither_right=int((~right & ~other).sum()),
        is_exact=only + other_only < _EXACT_BELOW,
        p=_p_of(only, other_only),
    )


# Labels are 32-bit integers.
_MOST_CLASSES = 2**31


def _p_of(first_only: int, second_only: int) -> float:
    """The two-sided p of so many discordant examples either way."""
    count = first_only + second_only
    if count < _EXACT_BELOW:
        tail = sum(math.comb(count, k) for k in range(min(first_only, second_only) + 1))
        return min(1.0, 2 * tail / 2**count)
    statistic = max(0, abs(first_only - second_only) - 1) ** 2 / count
    # The tail of chi-square with one degree of freedom is that of a normal distribution, twice.
    return math.erfc(math.sqrt(statistic / 2))
