"""The capsule of a failed step: all that it takes to run that one step again.

    found = examine_step(model, optimizer, images, labels)
    save_capsule("runs/first/capsules/step_00000041", images=images, labels=labels, step=41, ...)

    capsule = load_capsule("runs/first/capsules/step_00000041")
    capsule.restore([*model.variables, *optimizer.variables])
    print(examine_step(model, optimizer, capsule.images, capsule.labels).describe())

In the folder are

    capsule.json    step, seed, recipe, shapes, what was found
    batch/          images and labels of the step
    state/          weights and optimiser state from before it

the latter two in the format of a checkpoint.  `cifarflow.replay` builds the model from the recipe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.errors import (
    CheckpointError,
    CifarflowError,
    WorkdirError,
    check_int,
    check_seed,
)
from cifarflow.files import replacing
from cifarflow.training.checkpoints import Checkpoints, sha256_of
from cifarflow.training.gradients import make_gradients
from cifarflow.training.snapshot import Snapshot, all_finite, not_finite
from cifarflow.training.step import LossFn, make_train_step
from cifarflow.untrusted import one_line, parse_json, read_bytes, shown

_FORMAT = 1
_JSON = "capsule.json"
# A recipe is a page of text; a hundred times that is no capsule of ours.
_MOST_JSON_BYTES = 1_000_000
# Of each kind of variable: with all else, and the command to replay it, it is to fit in a line.
_SHOWN = 4


class CapsuleError(CifarflowError, ValueError):
    """A capsule is damaged, or cannot be replayed."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """Which numbers of a step are not finite.

    Attributes:
      loss: mean over the batch, regularisation included.
      before: paths of the model's variables that are infinite or NaN before the step.
      gradients: paths of the trained variables whose gradients are.
      after: paths of the model's variables that are after the step.
      loss_scale: what the loss was multiplied by, where the optimiser scales it.  Gradients that
        overflow at a finite loss are then its business: it skips the step and lowers the scale.
    """

    loss: float
    before: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    loss_scale: float | None = None

    @property
    def is_sound(self) -> bool:
        """Whether training can go on from here."""
        is_overflow = self.loss_scale is not None and math.isfinite(self.loss)
        return math.isfinite(self.loss) and not self.after and (is_overflow or not self.gradients)

    def describe(self) -> str:
        """It in a line, of many variables the first."""
        parts = [f"loss {self.loss:.6g}"]
        for name, paths in (
            ("weights before the step", self.before),
            ("gradients", self.gradients),
            ("weights after the step", self.after),
        ):
            if paths:
                more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
                parts.append(f"{name} not finite: {', '.join(map(repr, paths[:_SHOWN]))}{more}")
        if len(parts) == 1 and math.isfinite(self.loss):
            parts.append("all gradients and weights are finite")
        if self.loss_scale is not None:
            parts.append(f"loss scale {self.loss_scale:g}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, which knows no NaN: the numbers are texts."""
        values: dict[str, Any] = {
            name: list(getattr(self, name)) for name in ("before", "gradients", "after")
        }
        scale = self.loss_scale
        return {
            "loss": repr(self.loss),
            **values,
            "loss_scale": None if scale is None else repr(scale),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Findings:
        """The reverse of `to_json`.

        Raises:
          KeyError, TypeError, ValueError: if it is not such.
        """
        paths = {name: tuple(map(_name, values[name])) for name in ("before", "gradients", "after")}
        scale = values["loss_scale"]
        scale = None if scale is None else float(scale)
        return cls(loss=float(values["loss"]), loss_scale=scale, **paths)


@dataclasses.dataclass(frozen=True, eq=False)
class Capsule:
    """A failed step, read from its folder.

    Attributes:
      path: the folder.
      step: which step of the run it is, 0 for the first.
      images: [B, H, W, C], as the step got them, augmented.
      labels: [B] integers or [B, num_classes] probabilities.
      num_classes: how many outputs the model has.
      found: what was found when it failed.
      recipe: the values of the run's recipe, as JSON has them; None if it has none.
      seed: the run's, None if it has none.
      steps_per_epoch: of the run.
    """

    path: pathlib.Path
    step: int
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    found: Findings
    recipe: dict[str, Any] | None
    seed: int | None
    steps_per_epoch: int

    def restore(self, variables: Sequence[Any]) -> None:
        """Sets variables to what they were before the step.

        Args:
          variables: the model's and then the optimiser's, as were given to `save_capsule`.

        Raises:
          CapsuleError: if the file is damaged, or of other variables; nothing is set then.
        """
        try:
            Checkpoints(self.path / "state").restore(self.step, variables)
        except CheckpointError as error:
            raise CapsuleError(f"capsule {str(self.path)!r} cannot be restored: {error}") from error

    def state_bytes(self) -> int:
        """The size of the file that `restore` reads, 0 if there is none."""
        try:
            return Checkpoints(self.path / "state").path(self.step).stat().st_size
        except OSError:
            return 0


def make_examine(
    model: Any,
    optimizer: Any,
    *,
    loss_fn: LossFn | None = None,
    freeze: Mapping[str, int] | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
) -> Callable[[Any, Any], Findings]:
    """Makes a function that runs one step and tells what is not finite, to be called for many.

    Args:
      model: as in `make_train_step`.
      optimizer: as there; it is built if it is not.
      loss_fn: as in `make_train_step`.
      freeze: as there.
      jit_compile: as there.
      fused: as there.
      accumulate_steps: as there.

    Returns:
      A function of (images, labels) that does what `examine_step` does.

    Raises:
      ConfigError: as `make_train_step`.
    """
    options: dict[str, Any] = {
        "loss_fn": loss_fn,
        "jit_compile": jit_compile,
        "fused": fused,
        "accumulate_steps": accumulate_steps,
    }
    train_step = make_train_step(model, optimizer, freeze=freeze, **options)
    gradients_of = make_gradients(model, **options)
    has_scale = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)

    def examine(images: Any, labels: Any) -> Findings:
        scale = float(optimizer.dynamic_scale) if has_scale else None
        images, labels = tf.convert_to_tensor(images), tf.convert_to_tensor(labels)
        before = not_finite(model.variables)
        state = Snapshot([*model.variables, *optimizer.variables])
        try:
            gradients = gradients_of(images, labels, scale=scale or 1.0)
            state.restore()
            train_step(images, labels)
            after = not_finite(model.variables)
        finally:
            state.restore()
        pairs = zip(model.trainable_variables, gradients.values, strict=True)
        return Findings(
            gradients.loss,
            tuple(before),
            tuple(v.path for v, value in pairs if value is not None and not all_finite(value)),
            tuple(after),
            scale,
        )

    return examine


def examine_step(
    model: Any,
    optimizer: Any,
    images: Any,
    labels: Any,
    **options: Any,
) -> Findings:
    """Runs one step from the variables as they are, and tells what is not finite; changes nothing.

    Args:
      model: as in `make_train_step`.
      optimizer: as there; it is built if it is not.
      images: [B, H, W, C].
      labels: [B] integers or [B, num_classes] probabilities.
      **options: those of `make_examine`.

    Returns:
      What was found.  Gradients are those of all variables, frozen ones too.

    Raises:
      ConfigError: as `make_train_step`.
    """
    return make_examine(model, optimizer, **options)(images, labels)


def save_capsule(
    folder: str | os.PathLike[str],
    *,
    images: Any,
    labels: Any,
    variables: Sequence[Any],
    step: int,
    num_classes: int,
    steps_per_epoch: int,
    found: Findings,
    recipe: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """Writes a capsule, the whole folder or nothing.

    Args:
      folder: where to; a capsule that is there already is replaced, any other folder is not.
      images: [B, H, W, C], as the step gets them.
      labels: [B] integers or [B, num_classes] probabilities.
      variables: the model's and then the optimiser's, with their values from before the step.
      step: which step of the run it is, 0 for the first.
      num_classes: how many outputs the model has.
      steps_per_epoch: of the run.
      found: what `examine_step` found.
      recipe: the values of the run's recipe, as JSON has them.
      seed: the run's.

    Returns:
      The folder.

    Raises:
      ConfigError: if a number is out of range.
      WorkdirError: if it cannot be written, or another folder is in its place.
    """
    path = pathlib.Path(os.path.expanduser(folder))
    batch = [
        _Array(name, np.ascontiguousarray(array))
        for name, array in (("images", images), ("labels", labels))
    ]
    values: dict[str, Any] = {
        "format": _FORMAT,
        "step": check_int("step", step, minimum=0),
        "seed": None if seed is None else check_seed(seed),
        "num_classes": check_int("num_classes", num_classes),
        "steps_per_epoch": check_int("steps_per_epoch", steps_per_epoch),
        "recipe": None if recipe is None else dict(recipe),
        "found": found.to_json(),
        "batch": [[list(array.shape), array.dtype.name] for array in batch],
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }
    values["sha256"] = sha256_of(values)
    if path.exists() and not (path / _JSON).is_file():
        raise WorkdirError(f"cannot write capsule {str(path)!r}: something else is there")
    # Beside its final name, so that the folder gets that only when all is in it.
    new, old = (path.with_name(f".{path.name}.{secrets.token_hex(8)}") for _ in range(2))
    try:
        new.mkdir(parents=True)
        Checkpoints(new / "batch").save(step, batch)
        Checkpoints(new / "state").save(step, variables)
        with replacing(new / _JSON, what="capsule") as file:
            file.write((json.dumps(values, indent=2) + "\n").encode())
        if path.exists():
            path.rename(old)
        new.rename(path)
    except OSError as error:
        if old.exists():
            old.rename(path)
        # That of the file's own error, which names a folder that nobody has heard of.
        reason = getattr(error.__cause__, "strerror", None) or error.strerror or str(error)
        raise WorkdirError(f"cannot write capsule {str(path)!r}: {reason}") from error
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    return path


def load_capsule(folder: str | os.PathLike[str]) -> Capsule:
    """Reads a capsule, and trusts nothing in it.

    No code in it can run, and nothing is allocated on the word of a file that holds less.

    Args:
      folder: as `save_capsule` wrote it.

    Raises:
      CapsuleError: if there is none, or it is damaged.
    """
    path = pathlib.Path(os.path.expanduser(folder))
    if not (path / _JSON).is_file():
        raise CapsuleError(f"there is no capsule in {str(path)!r}: it has no {_JSON}")
    try:
        values = parse_json(read_bytes(path / _JSON, limit=_MOST_JSON_BYTES))
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"{_JSON} is not of format {_FORMAT}")
        if values.pop("sha256", None) != sha256_of(values):
            raise ValueError(f"{_JSON} has been changed")
        recipe = values["recipe"]
        if recipe is not None and not isinstance(recipe, dict):
            raise TypeError("its recipe is none")
        step = check_int("step", values["step"], minimum=0)
        images, labels = batch = [
            _Array(name, shape=shape, dtype=dtype)
            for name, (shape, dtype) in zip(("images", "labels"), values["batch"], strict=True)
        ]
        Checkpoints(path / "batch").restore(step, batch)
        num_classes = check_int("num_classes", values["num_classes"], minimum=2)
        _check_batch(images.value, labels.value, num_classes)
        return Capsule(
            path=path,
            step=step,
            images=images.value,
            labels=labels.value,
            num_classes=num_classes,
            found=Findings.from_json(values["found"]),
            recipe=recipe,
            seed=None if values["seed"] is None else check_seed(values["seed"]),
            steps_per_epoch=check_int("steps_per_epoch", values["steps_per_epoch"]),
        )
    # Whatever is wrong with a file from anywhere: it is of no use.
    except Exception as error:
        reason = one_line(str(error)) or type(error).__name__
        raise CapsuleError(f"capsule {str(path)!r} is damaged: {reason}") from error


class _Array:
    """An array that a checkpoint takes for a variable."""

    def __init__(
        self,
        path: str,
        value: np.ndarray | None = None,
        *,
        shape: Sequence[int] = (),
        dtype: str = "",
    ) -> None:
        self.path = path
        self.value: Any = value
        # Of an array still to be read, only its outline: nothing of that size is allocated.
        self.shape = tuple(shape) if value is None else value.shape
        # Of a text with commas NumPy would make a type of many parts.
        if value is None and not re.fullmatch("[a-z]+[0-9_a-z]{0,20}", dtype):
            raise ValueError(f"an array is of {shown(dtype)}, not of numbers")
        self.dtype = np.dtype(dtype) if value is None else value.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype)

    def assign(self, value: np.ndarray) -> None:
        self.value = value


def _check_batch(images: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    is_float = tf.as_dtype(labels.dtype).is_floating
    if images.ndim != 4 or not images.size or len(labels) != len(images):
        raise ValueError(f"images {images.shape} and labels {labels.shape} are no batch")
    if labels.shape[1:] != ((num_classes,) if is_float else ()):
        raise ValueError(
            f"labels {labels.dtype.name} {labels.shape} are none of {num_classes} classes"
        )
    for dtype in map(tf.as_dtype, (images.dtype, labels.dtype)):
        if not (dtype.is_floating or dtype.is_integer):
            raise ValueError(f"an array is of {dtype.name}, not of numbers")


def _name(value: object) -> str:
    if not isinstance(value, str) or len(value) > 300:
        raise TypeError("what was found is no list of names")
    return value
