"""Checkpoints: all of a run's state in one verified file a step.

    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    checkpoints.save(1250, variables, extra={"epoch": 1})
    extra = checkpoints.restore(checkpoints.latest(), variables)

A file is an uncompressed .npz (so nothing in it can run code): one array a variable, in order, and
a JSON member with the step, names, shapes and a SHA-256 of all the arrays' bytes.  It is written
beside its final name, flushed to disk and renamed, so a file under a final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cifarflow.errors import CheckpointError, check_int
from cifarflow.files import replacing

_NAME = re.compile(r"step_(\d{8,})\.npz")
_FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
      directory: the folder; made at the first save.
      keep: how many of the newest files stay; older ones are removed after a save.

    Raises:
      ConfigError: if keep is not a whole number >= 1.
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.directory = pathlib.Path(directory)
        self._keep = check_int("keep", keep)

    def steps(self) -> list[int]:
        """The steps that have a file, oldest first."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """The newest step that has a file, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> pathlib.Path:
        """The file of a step."""
        return self.directory / f"step_{step:08d}.npz"

    def save(
        self, step: int, variables: Sequence[Any], *, extra: Mapping[str, Any] | None = None
    ) -> pathlib.Path:
        """Writes one checkpoint and removes the oldest ones.

        Args:
          step: steps done.
          variables: Keras variables, always in the same order.
          extra: JSON values to keep with them.

        Returns:
          The file's path.

        Raises:
          WorkdirError: if it cannot be written; what was there before is untouched.
        """
        arrays = [np.asarray(variable) for variable in variables]
        header = {
            "format": _FORMAT,
            "step": step,
            "variables": [_describe(v, a) for v, a in zip(variables, arrays, strict=True)],
            "sha256": hash_arrays(arrays),
            "extra": dict(extra or {}),
        }
        path = self.path(step)
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        members: dict[str, Any] = {f"{i:04d}": array for i, array in enumerate(arrays)}
        with replacing(path, what="checkpoint") as file:
            np.savez(file, header=text, **members)
        for old in self.steps()[: -self._keep]:
            if old != step:
                self.path(old).unlink(missing_ok=True)
        return path

    def restore(self, step: int, variables: Sequence[Any]) -> dict[str, Any]:
        """Reads one checkpoint, verifies it, and only then sets the variables.

        Args:
          step: a step that has a file.
          variables: Keras variables, in the order of `save`.

        Returns:
          The `extra` of `save`.

        Raises:
          CheckpointError: if the file is missing or damaged, or is of other variables; nothing is
            set then.
        """
        path = self.path(step)
        try:
            header, arrays = _read(path)
        except CheckpointError as error:
            older = [kept for kept in self.steps() if kept < step]
            if not older or not path.exists():
                raise
            raise CheckpointError(f"{error}; remove it to go on from step {older[-1]}") from error
        ours = [_describe(variable, variable) for variable in variables]
        theirs = header["variables"]
        if theirs != ours:
            wrong = next(
                (pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]),
                (f"{len(theirs)} variables", f"{len(ours)}"),
            )
            raise CheckpointError(
                f"checkpoint {str(path)!r} is of another model: it has {wrong[0]}, "
                f"the model has {wrong[1]}"
            )
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        return dict(header["extra"])


def _describe(variable: Any, value: Any) -> list[Any]:
    """What must agree for a variable to be restored: name, shape, dtype."""
    # Keras numbers layers through the whole process: the same model built again in a notebook has
    # dense_3 where it had dense.  Order, shape and the rest of the name still tell models apart.
    name = re.sub(r"_\d+(?=[_/]|$)", "", variable.path)
    dtype = getattr(value.dtype, "name", value.dtype)
    return [name, [int(side) for side in value.shape], str(dtype)]


def _read(path: pathlib.Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads and verifies a file."""
    try:
        # Opened here: NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            header = json.loads(members["header"].tobytes())
            expected = header["sha256"]
            arrays = [
                _as_described(members[f"{number:04d}"], shape, dtype)
                for number, (_, shape, dtype) in enumerate(header["variables"])
            ]
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {str(path)!r}") from None
    # A damaged zip file fails in many ways: wrong compression, wrong version, too long, a flag
    # that says it is encrypted.
    except Exception as error:
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged: {error}") from error
    found = hash_arrays(arrays)
    if found != expected:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is damaged: SHA-256 of its arrays is {found}, "
            f"it should be {expected}"
        )
    return header, arrays


def _as_described(array: np.ndarray, shape: Sequence[int], dtype: str) -> np.ndarray:
    """The array, if it is what the header says of it."""
    if array.dtype.kind == "V":
        # NumPy's format knows no bfloat16 and keeps its bytes without a name.
        array = array.view(np.dtype(dtype))
    if list(array.shape) != list(shape) or array.dtype.name != dtype:
        raise ValueError(f"an array is {array.dtype.name} {array.shape}, not {dtype} {shape}")
    return array


def hash_arrays(arrays: Iterable[Any]) -> str:
    """SHA-256 over the bytes of all arrays in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(np.asarray(array)).tobytes())
    return digest.hexdigest()
