"""A guard that a compiled step is not compiled again and again.

    train_step = RetraceGuard(make_train_step(model, optimizer))
    for images, labels in batches.dataset(0, 1000):
        train_step(images, labels)  # a batch of another shape raises a RetraceError

TensorFlow traces a function anew for each new shape, dtype and Python value among its arguments,
and says nothing: a loop that was fast yesterday compiles at every other step today.  `train` needs
no guard for its steps: it traces its call once, as a concrete function, which cannot be traced
again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.errors import CifarflowError, ConfigError, check_choice, check_int

RETRACE_CHOICES = ("raise", "warn")


class RetraceError(CifarflowError, RuntimeError):
    """A compiled function was traced again after its warm-up."""


class RetraceGuard:
    """Calls a compiled function, and complains when it is traced again after its warm-up.

    A call that needs no trace takes a few microseconds more than without the guard.

    Args:
      function: a `tf.function`, such as `make_train_step` returns.
      warmup_calls: in how many calls new traces are allowed, >= 1.  Whatever shapes the function
        is meant for, such as that of a smaller last batch, must come in these.
      on_retrace: "raise" a RetraceError, once the call is done; or "warn" by a RuntimeWarning and
        go on.  Either is once for each new trace.

    Attributes:
      calls: how many there have been.

    Raises:
      ConfigError: if the function is no `tf.function`, or another argument is out of range.
    """

    def __init__(self, function: Any, *, warmup_calls: int = 1, on_retrace: str = "raise") -> None:
        if not hasattr(function, "experimental_get_tracing_count"):
            raise ConfigError(
                "function must be a tf.function, such as make_train_step returns, "
                f"not {function!r:.80}"
            )
        self.calls = 0
        self._function = function
        self._warmup_calls = check_int("warmup_calls", warmup_calls)
        self._on_retrace = check_choice("on_retrace", on_retrace, RETRACE_CHOICES)
        # The arguments that it was traced for, in words.
        self._known: list[dict[str, tuple[str, str]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function.

        Raises:
          RetraceError: if it was traced again, after the warm-up and unless it is to warn.
        """
        traces = self._function.experimental_get_tracing_count()
        result = self._function(*args, **kwargs)
        self.calls += 1
        if self._function.experimental_get_tracing_count() != traces or not self._known:
            new = self._named(args, kwargs)
            # Against the most similar ones.
            found = min((_differences(new, old) for old in self._known), key=len, default=[])
            self._known.append(new)
            if self.calls > self._warmup_calls:
                self._complain(", ".join(found))
        return result

    def __getattr__(self, name: str) -> Any:
        """All else is the function's own, such as `get_concrete_function`."""
        if name == "_function":  # not there yet, while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self._function, name)

    def _complain(self, differences: str) -> None:
        name = self._function.python_function.__name__
        what = differences or "its arguments are as before, what it uses beside them is not"
        message = f"{name} was traced again at call {self.calls}: {what}"
        if self._on_retrace == "raise":
            raise RetraceError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _named(self, args: Any, kwargs: Any) -> dict[str, tuple[str, str]]:
        """Of each value among the arguments, by name: what it is, and of which shape."""
        bound = inspect.signature(self._function.python_function).bind(*args, **kwargs)
        bound.apply_defaults()
        return {
            name: _describe(value)
            for argument, nest in bound.arguments.items()
            for name, value in _leaves(argument, nest)
        }


def _describe(value: Any) -> tuple[str, str]:
    if isinstance(value, (tf.Tensor, tf.Variable, np.ndarray, np.generic)):
        return tf.as_dtype(value.dtype).name, str(tf.TensorShape(value.shape))
    if isinstance(value, tf.__internal__.CompositeTensor):
        return str(tf.type_spec_from_value(value)), ""
    return f"the Python value {value!r:.60}", ""


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested arguments, named as one would write them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}[{key!r}]", inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}[{index}]", inner)
    else:
        yield name, value


def _differences(new: dict[str, tuple[str, str]], old: dict[str, tuple[str, str]]) -> list[str]:
    texts = []
    for name in {**new, **old}:
        if name not in old:
            texts.append(f"argument {name!r} is new")
        elif name not in new:
            texts.append(f"argument {name!r} is left out")
        else:
            (kind, shape), (old_kind, old_shape) = new[name], old[name]
            if shape != old_shape and shape and old_shape:
                texts.append(f"argument {name!r} has the shape {shape} after {old_shape}")
            if kind != old_kind:
                verb = "has the dtype" if shape and old_shape else "is"
                texts.append(f"argument {name!r} {verb} {kind} after {old_kind}")
    return texts
