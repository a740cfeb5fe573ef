"""Every error that cifarflow raises on purpose, and the checks that raise the commonest one.

    from cifarflow.errors import CifarflowError

    try:
        cifarflow.train_recipe("lab_cnn", learning_rate=-1)
    except CifarflowError as error:
        print(error)  # learning_rate must be a finite number > 0, not -1

Each class also derives from the built-in exception a caller would expect, so `except ValueError`
works as well.  The runners turn a `CifarflowError` into one line and exit status 2; anything
else is a bug and keeps its traceback.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable


class CifarflowError(Exception):
    """Base of all errors that are the input's fault; the message is one line for a person."""


class ConfigError(CifarflowError, ValueError):
    """An argument, flag or recipe field has a value that cannot work."""


class DataError(CifarflowError, ValueError):
    """Data was found, but it is damaged, unsafe, or not of the shape, dtype or range asked for."""


class DataNotFoundError(CifarflowError, FileNotFoundError):
    """No source has the data set."""


class WorkdirError(CifarflowError, OSError):
    """A run's folder cannot be used: not writable, or it holds another recipe's run."""


class CheckpointError(CifarflowError, ValueError):
    """A checkpoint is damaged or does not fit the model."""


class NonFiniteError(CifarflowError, FloatingPointError):
    """The loss, a gradient or a weight became infinite or NaN."""


# What a run may do then: end with that error, or leave the step out.
ON_NONFINITE = ("stop", "skip")


def check_int(name: str, value: object, *, minimum: int = 1) -> int:
    """Returns `value` if it is a whole number of at least `minimum`.

    Raises:
      ConfigError: if it is not.
    """
    # bool is an int in Python; `batch_size=True` is a mistake all the same.
    # An array has `__index__` too, and raises in it unless it is a single whole number.
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < minimum:
        raise ConfigError(f"{name} must be a whole number >= {minimum}, not {value!r}")
    return number


def check_seed(seed: object) -> int:
    """Returns `seed` if it is a whole number in 0..2**31-1.

    Raises:
      ConfigError: if it is not.
    """
    number = check_int("seed", seed, minimum=0)
    if number >= 2**31:
        raise ConfigError(f"seed must be at most {2**31 - 1}, not {seed!r}")
    return number


def check_float(
    name: str,
    value: object,
    *,
    minimum: float = 0.0,
    maximum: float = math.inf,
    above_minimum: bool = False,
    below_maximum: bool = False,
) -> float:
    """Returns `value` as a float if it is finite and within the bounds.

    Args:
      name: what the value is called, for the message.
      value: the value to check.
      minimum: smallest value allowed.
      maximum: largest value allowed.
      above_minimum: whether `minimum` itself is excluded.
      below_maximum: whether `maximum` itself is excluded.

    Raises:
      ConfigError: if it is not a number, not finite, or out of bounds.
    """
    low = f"{'>' if above_minimum else '>='} {minimum:g}"
    high = "" if maximum == math.inf else f" and {'<' if below_maximum else '<='} {maximum:g}"
    good = f"a finite number {low}{high}"
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be {good}, not {value!r}") from None
    too_low = number <= minimum if above_minimum else number < minimum
    too_high = number >= maximum if below_maximum else number > maximum
    if not math.isfinite(number) or too_low or too_high:
        raise ConfigError(f"{name} must be {good}, not {value!r}")
    return number


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Returns `value` if it is one of `choices`.

    Raises:
      ConfigError: if it is not.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value


def check_micro_batches(batch_size: int | None, accumulate_steps: int) -> None:
    """Refuses a batch that cannot be cut into equal parts.

    Args:
      batch_size: examples a batch, None if that is not known.
      accumulate_steps: how many parts.

    Raises:
      ConfigError: if there is no such size of a part.
    """
    if accumulate_steps == 1:
        return
    if batch_size is None:
        raise ConfigError(
            f"accumulate_steps must be 1, not {accumulate_steps!r}, where batches differ in size: "
            "batch with drop_remainder=True"
        )
    if batch_size % accumulate_steps:
        raise ConfigError(
            f"accumulate_steps must divide the batch size of {batch_size}, not {accumulate_steps!r}"
        )
