"""Checkpoints: all of a run's state in one verified file a step.

    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    checkpoints.save(1250, variables, extra={"epoch": 1})
    extra = checkpoints.restore(checkpoints.latest_whole(), variables)

    checkpoints.begin_save(2500, variables)  # the values of now; the file is written meanwhile
    ...
    checkpoints.wait()

A file is an uncompressed .npz (so nothing in it can run code): one array a variable, in order, and
a JSON member with the step, names, shapes, which run it is of, and a SHA-256 of itself and all the
arrays' bytes.  It is written beside its final name, flushed to disk and renamed, so a file under a
final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np

from cifarflow.errors import (
    CheckpointError,
    ConfigError,
    WorkdirError,
    check_float,
    check_int,
)
from cifarflow.files import replacing
from cifarflow.training.workdir import first_difference
from cifarflow.untrusted import (
    open_npz,
    parse_json,
    read_array,
    read_array_header,
    reading,
    shown,
)

# As `path` writes it, and no other way.
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})\.npz")
_BEST = "best.npz"
# What a process that was killed while writing leaves beside them.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,}|best)\.npz\.[0-9a-f]{16}")
_FORMAT = 3
# A line a variable, and what is kept beside them.
_HEADER_BYTES_LIMIT = 1_000_000
# NumPy's format has no names for these, and keeps their bytes without one.
_UNNAMED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class Checkpoints:
    """The checkpoints of one run, in one folder: the newest ones, and the best.

    Args:
      directory: the folder; made at the first save.
      keep: how many of the newest files stay; older ones are removed after a save.
      prepare: called before a file is written, such as `Workdir.ensure`, perhaps in another thread;
        the WorkdirError that it may raise is as if the file could not be.
      identity: JSON values that say which run this is, such as a recipe's `to_json()`: they are
        kept in each file, and a file with others is not restored.  With None nothing is compared.

    Raises:
      ConfigError: if keep is not a whole number >= 1, or identity is no mapping of JSON values.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        prepare: Callable[[], object] = lambda: None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = pathlib.Path(directory)
        self._keep = check_int("keep", keep)
        self._prepare = prepare
        try:
            # As a file gives it back: tuples are lists then.
            self._identity = None if identity is None else json.loads(json.dumps(dict(identity)))
        except (TypeError, ValueError):
            raise ConfigError(
                f"identity must be a mapping of JSON values, not {shown(identity)}"
            ) from None
        # Steps whose files were written and not removed, by this object.
        self._kept: set[int] = set()
        # Step and score of the best that was ever written or found.
        self._best: tuple[int, float] | None = None
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def steps(self) -> list[int]:
        """The steps that have a file, oldest first.

        Raises:
          WorkdirError: if the folder is there and cannot be read.
        """
        try:
            if not self.directory.is_dir():
                return []
            found = [_NAME.fullmatch(entry.name) for entry in self.directory.iterdir()]
        except OSError as error:
            raise WorkdirError(
                f"cannot read checkpoint folder {str(self.directory)!r}: {error.strerror}"
            ) from error
        return sorted(int(match.group(1)) for match in found if match)

    def latest(self) -> int | None:
        """The newest step that has a file, or None.

        Raises:
          WorkdirError: if the folder is there and cannot be read.
        """
        steps = self.steps()
        return steps[-1] if steps else None

    def latest_whole(self, *, report: Callable[[str], object] = warnings.warn) -> int | None:
        """The newest step whose file is whole, or None if no step has a file.

        Args:
          report: told, in a line each, which newer files are damaged.

        Raises:
          CheckpointError: if there are files, and all are damaged.
          WorkdirError: if the folder is there and cannot be read.
        """
        steps = self.steps()
        damaged: list[CheckpointError] = []
        for step in reversed(steps):
            try:
                _read(self.path(step))
            except CheckpointError as error:
                damaged.append(error)
                continue
            for newer in damaged:
                report(f"{newer}; going on from the one before, of step {step}")
            return step
        if damaged:
            others = f", and the {len(damaged) - 1} before it are too" if damaged[1:] else ""
            raise CheckpointError(
                f"{damaged[0]}{others}: to start over give another folder"
            ) from damaged[0]
        return None

    def path(self, step: int) -> pathlib.Path:
        """The file of a step."""
        return self.directory / f"step_{step:08d}.npz"

    @property
    def best_path(self) -> pathlib.Path:
        """The file of the step with the least score, which stays when newer ones come."""
        return self.directory / _BEST

    def save(
        self,
        step: int,
        variables: Sequence[Any],
        *,
        extra: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> pathlib.Path:
        """Writes one checkpoint and removes the oldest ones.

        Args:
          step: steps done.
          variables: Keras variables, always in the same order.
          extra: JSON values to keep with them.
          score: how good they are, less is better, such as the validation loss; where it is less
            than that of all before, `best_path` becomes a copy.

        Returns:
          The file's path.

        Raises:
          ConfigError: if score is not a finite number.
          WorkdirError: if it cannot be written; what was there before is untouched.
        """
        path = self.begin_save(step, variables, extra=extra, score=score)
        self.wait()
        return path

    def begin_save(
        self,
        step: int,
        variables: Sequence[Any],
        *,
        extra: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> pathlib.Path:
        """Takes the values as they are now, and writes them while the caller goes on.

        One file is written at a time: a save that comes too soon waits for the one before.

        Args:
          step: as in `save`, as are the others.
          variables: of any values afterwards.
          extra: JSON values.
          score: less is better.

        Returns:
          The path that the file will have.

        Raises:
          ConfigError: if score is not a finite number.
          WorkdirError: if the checkpoint before could not be written, and nobody has waited for
            it; this one is not begun then.
        """
        if score is not None:
            score = check_float("score", score, minimum=-math.inf)
        self.wait()
        # Copies, since training goes on in place.
        arrays = [np.asarray(variable).copy() for variable in variables]
        header: dict[str, Any] = {
            "format": _FORMAT,
            "step": step,
            "identity": self._identity,
            "variables": [_describe(v, a) for v, a in zip(variables, arrays, strict=True)],
            "score": score,
            "extra": dict(extra or {}),
        }

        def write() -> None:
            try:
                self._write(header, arrays)
            except BaseException as error:  # told by `wait`
                self._failure = error

        # No daemon: a process that ends finishes the file first.
        self._writer = threading.Thread(target=write, name="cifarflow checkpoint")
        self._writer.start()
        return self.path(step)

    def wait(self) -> None:
        """Returns when no file is being written.

        Raises:
          WorkdirError: if the last one could not be written; once.
        """
        if self._writer is not None:
            # Ctrl-C in the middle of its start leaves it as if not started.  If it was, the process
            # does not end before it.
            with suppress(RuntimeError):
                self._writer.join()
            self._writer = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
        """Writes a file, to the best as well if it is that, and removes the oldest.

        Warns:
          If files that were written before are gone.
        """
        gone = sorted(step for step in self._kept if not os.path.lexists(self.path(step)))
        if gone:
            self._kept.difference_update(gone)
            warnings.warn(
                f"checkpoint {str(self.path(gone[-1]))!r} was removed meanwhile"
                f"{f', as were {len(gone) - 1} before it' if gone[1:] else ''}: that of step "
                f"{header['step']} takes its place",
                stacklevel=2,
            )
        self._prepare()
        header["sha256"] = sha256_of(header, arrays)
        path = self.path(header["step"])
        members: dict[str, Any] = {f"{i:04d}": array for i, array in enumerate(arrays)}
        members["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        is_best = header["score"] is not None and header["score"] < self._best_score(header["step"])
        # The best first: a run killed in between that went on from the other, past this score,
        # would never write it.
        for target in [self.best_path] * is_best + [path]:
            with replacing(target, what="checkpoint") as file:
                np.savez(file, **members)
        if is_best:
            self._note_best(header)
        self._kept.add(header["step"])
        with suppress(OSError):
            steps = self.steps()
            # Those of later steps are of a time that was rewound, since they were damaged.
            now = steps.index(header["step"]) + 1
            for old in [*steps[: max(0, now - self._keep)], *steps[now:]]:
                self._kept.discard(old)
                self.path(old).unlink(missing_ok=True)
            for entry in self.directory.iterdir():
                if _LEFTOVER.fullmatch(entry.name):
                    entry.unlink(missing_ok=True)

    def _best_score(self, step: int) -> float:
        """The score to be less than; `step` is that of the file to be written."""
        try:
            header = _read(self.best_path)[0]
            self._check_identity(self.best_path, header)
        except CheckpointError as error:
            # Nothing is lost where there was none.
            if self._best is not None or os.path.lexists(self.best_path):
                was = f"it was that of step {self._best[0]}, and " if self._best else ""
                warnings.warn(
                    f"{error}: {was}the best of those to come, from step {step} on, takes its "
                    "place",
                    stacklevel=2,
                )
            return math.inf
        self._note_best(header)
        return math.inf if header["score"] is None else float(header["score"])

    def _note_best(self, header: Mapping[str, Any]) -> None:
        score = header["score"]
        if score is not None and (self._best is None or score < self._best[1]):
            self._best = (header["step"], score)

    def lost_best(self) -> int | None:
        """The step of the best checkpoint that was, if that is gone and none as good has come."""
        if self._best is None:
            return None
        step, score = self._best
        try:
            found = _read(self.best_path)[0]["score"]
        except CheckpointError:
            return step
        return step if found is None or found > score else None

    def restore(self, step: int, variables: Sequence[Any]) -> dict[str, Any]:
        """Reads one checkpoint, verifies it, and only then sets the variables.

        Args:
          step: a step that has a file.
          variables: Keras variables, in the order of `save`.

        Returns:
          The `extra` of `save`.

        Raises:
          CheckpointError: if the file is missing or damaged, or is of another run or of other
            variables; nothing is set then.
        """
        return dict(self._restore(self.path(step), variables)["extra"])

    def restore_best(self, variables: Sequence[Any]) -> int:
        """Sets the variables to those of the best checkpoint.

        Args:
          variables: Keras variables, in the order of `save`; or the first of them only, such as
            those of the model, which leaves the others alone.

        Returns:
          The step it is of.

        Raises:
          CheckpointError: as `restore`; no checkpoint with a score was saved, for one.
        """
        step: int = self._restore(self.best_path, variables, first_only=True)["step"]
        return step

    def _restore(
        self, path: pathlib.Path, variables: Sequence[Any], *, first_only: bool = False
    ) -> dict[str, Any]:
        header, arrays = _read(path)
        self._check_identity(path, header)
        ours = [_describe(variable, variable) for variable in variables]
        theirs = header["variables"]
        if first_only:
            theirs = theirs[: len(ours)]
        if theirs != ours:
            wrong = next(
                ((shown(a), shown(b)) for a, b in zip(theirs, ours, strict=False) if a != b),
                (f"{len(theirs)} variables", f"{len(ours)}"),
            )
            raise CheckpointError(
                f"checkpoint {str(path)!r} is of another model: it has {wrong[0]}, "
                f"the model has {wrong[1]}"
            )
        for variable, array in zip(variables, arrays, strict=not first_only):
            variable.assign(array)
        return header

    def _check_identity(self, path: pathlib.Path, header: Mapping[str, Any]) -> None:
        """Refuses a file of another run."""
        ours, theirs = self._identity, header["identity"]
        if ours is None:
            return
        what = "it does not say of which"
        if theirs is not None:
            difference = first_difference(theirs, ours)
            if difference is None:
                return
            what = difference
        raise CheckpointError(f"checkpoint {str(path)!r} is of another run: {what}")


def _describe(variable: Any, value: Any) -> list[Any]:
    """What must agree for a variable to be restored: name, shape, dtype."""
    # Keras numbers layers through the whole process: the same model built again in a notebook has
    # dense_3 where it had dense.  Order, shape and the rest of the name still tell models apart.
    name = re.sub(r"_\d+(?=[_/]|$)", "", variable.path)
    dtype = getattr(value.dtype, "name", value.dtype)
    return [name, [int(side) for side in value.shape], str(dtype)]


def _read(path: pathlib.Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads and verifies a file; nothing that it claims is allocated before it is there."""
    name = f"checkpoint {str(path)!r}"
    with reading(name, failing="is damaged", error=CheckpointError), ExitStack() as stack:
        try:
            members = stack.enter_context(open_npz(path, packed=False))
        except FileNotFoundError:
            raise CheckpointError(f"there is no {name}") from None
        size = members.getinfo("header.npy").file_size
        if size > _HEADER_BYTES_LIMIT:
            raise ValueError(f"its header has {size} bytes, expected at most {_HEADER_BYTES_LIMIT}")
        # A user's hook may keep an infinity.
        header = parse_json(_read_member(members, "header").tobytes(), finite=False)
        arrays = _read_arrays(members, header)
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) != header["step"]:
            raise ValueError(f"it is of step {shown(header['step'])}, which its name is not")
        expected, found = header.pop("sha256"), sha256_of(header, arrays)
        if found != expected:
            raise ValueError(f"SHA-256 of its arrays is {found}, it should be {shown(expected)}")
    return header, arrays


def _read_arrays(members: zipfile.ZipFile, header: dict[str, Any]) -> list[np.ndarray]:
    """Reads what a header describes, and checks the header itself."""
    if header["format"] != _FORMAT:
        raise ValueError(f"it is of format {shown(header['format'])}, this version reads {_FORMAT}")
    if not isinstance(header["variables"], list):
        raise ValueError("its variables are no list")
    arrays = [
        _as_described(_read_member(members, f"{number:04d}"), shape, dtype)
        for number, (_, shape, dtype) in enumerate(header["variables"])
    ]
    names = members.namelist()
    unknown = len(names) - len(arrays) - 1
    if unknown:
        raise ValueError(f"it holds {unknown} members more than it says")
    if type(header["step"]) is not int or not isinstance(header["extra"], dict):
        raise ValueError("its step is no number, or what is kept beside it no mapping")
    if not isinstance(header["identity"], (dict, type(None))):
        raise ValueError("what says which run it is of is no mapping")
    score = header["score"]
    if score is not None and not (type(score) in (int, float) and math.isfinite(score)):
        raise ValueError("its score is no number")
    return arrays


def _read_member(members: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads one array, which must be just as long as its own header says."""
    info = members.getinfo(f"{name}.npy")
    try:
        with members.open(info) as file:
            return read_array(file, read_array_header(file), size=info.file_size)
    except ValueError as error:
        raise ValueError(f"array {name}: {error}") from error


def _as_described(array: np.ndarray, shape: Any, dtype: Any) -> np.ndarray:
    """The array, if it is what the header says of it."""
    if array.dtype.kind == "V" and dtype in _UNNAMED:
        array = array.view(np.dtype(dtype))
    if [*array.shape] != shape or array.dtype.name != dtype:
        raise ValueError(
            f"an array is {array.dtype.name} {array.shape}, not {shown(dtype)} {shown(shape)}"
        )
    return array


def sha256_of(header: Mapping[str, Any], arrays: Iterable[Any] = ()) -> str:
    """SHA-256 over a header, which is JSON, and the bytes of all arrays in order."""
    # As JSON gives it back: tuples are lists then.
    text = json.dumps(json.loads(json.dumps(header)), sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_arrays(arrays: Iterable[Any]) -> str:
    """SHA-256 over the bytes of all arrays in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(np.asarray(array)).tobytes())
    return digest.hexdigest()
