"""Several models' outputs for the same images made one: by vote, and by average of probabilities.

    found = combine_outputs([first_outputs, second_outputs, third_outputs])
    found.by_vote           # [N], the class that most of them predict
    found.by_average        # [N], the class of the largest mean probability

The outputs may come one after the other, as from a generator: they are added up, not kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarflow.errors import DataError
from cifarflow.evaluation.metrics import check_outputs
from cifarflow.evaluation.predict import softmax


class Combined(NamedTuple):
    """What several models say of the same images.

    Attributes:
      members: how many models.
      probabilities: [N, C] float32, the means of theirs.
      votes: [N, C] int32, how many of them predict each class.
    """

    members: int
    probabilities: NDArray[np.float32]
    votes: NDArray[np.int32]

    @property
    def by_average(self) -> NDArray[np.int64]:
        """The class [N] of the largest mean probability."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def by_vote(self) -> NDArray[np.int64]:
        """The class [N] of the most votes; of equally many that of the larger mean probability."""
        is_first = self.votes == self.votes.max(axis=1, keepdims=True)
        return np.asarray(np.where(is_first, self.probabilities, -1.0).argmax(axis=1))


def combine_outputs(outputs: Iterable[np.ndarray]) -> Combined:
    """Adds up the probabilities and the votes of several models.

    Args:
      outputs: of each model [N, C] logits for the same images, at least one model.

    Returns:
      The `Combined`.

    Raises:
      DataError: if there is none, the shapes differ, or a value is not finite.

    Source: Hansen and Salamon, "Neural Network Ensembles" (1990), for the vote; the average is
      that of Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using
      Deep Ensembles" (2017).
    """
    members = 0
    for logits in outputs:
        values = check_outputs(logits)
        if not members:
            total = np.zeros(values.shape)
            votes = np.zeros(values.shape, np.int32)
        elif values.shape != total.shape:
            raise DataError(
                f"outputs must be of the same shape for every model, not {list(total.shape)} and "
                f"{list(values.shape)}"
            )
        members += 1
        if len(values):
            total += softmax(values)
            votes[np.arange(len(values)), values.argmax(axis=1)] += 1
    if not members:
        raise DataError("outputs must be those of at least one model, not 0")
    return Combined(members, (total / members).astype(np.float32), votes)
