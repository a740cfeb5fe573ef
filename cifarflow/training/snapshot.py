"""The values of variables at one moment, to go back to.

before = Snapshot([*model.variables, *optimizer.variables])
train_step(images, labels)
before.changed()  # the variables that the step has changed
before.restore()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.training.step import is_float


class Snapshot:
    """The values of some variables, as they were when it was made.

    It costs next to nothing until a variable changes: the first change after it makes the copy.

    Args:
      variables: Keras variables.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        # Tensors, which no assignment changes: bit for bit the same values come back.
        self._values = [(variable, tf.identity(variable.value)) for variable in variables]

    def restore(self) -> None:
        """Sets the variables to these values."""
        for variable, value in self._values:
            variable.value.assign(value)

    def changed(self) -> list[Any]:
        """The variables that have other values now, in order; one bit is enough."""
        return [v for v, old in self._values if _bytes(v.value) != _bytes(old)]

    def value_of(self, variable: Any) -> np.ndarray:
        """The value that a variable had.

        Args:
          variable: one of those given.
        """
        return next(value.numpy() for kept, value in self._values if kept is variable)


def not_finite(variables: Sequence[Any]) -> list[str]:
    """The paths of the variables that hold an infinity or a NaN, in order.

    Args:
      variables: Keras variables; those of integers are finite.
    """
    return [v.path for v in variables if is_float(v) and not all_finite(v.value)]


def all_finite(values: Any) -> bool:
    """Whether a floating-point tensor holds neither an infinity nor a NaN."""
    return bool(tf.reduce_all(tf.math.is_finite(values)))


def _bytes(values: Any) -> bytes:
    return np.asarray(values).tobytes()
