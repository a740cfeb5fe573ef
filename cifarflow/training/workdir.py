"""A run's folder: what is in it, and whether a run may use it.

    workdir = Workdir("runs/first")
    resuming = workdir.open(recipe_values, resume=True)
    workdir.write_json("summary.json", summary)

In the folder are

    recipe.json         the recipe, with every "auto" replaced by what was used
    metrics.jsonl       the log, a line an event
    metrics.csv         the same as a table
    checkpoints/        the state, a file a step
    capsules/           steps whose numbers were not finite, a folder each
    test_outputs.npy    the model's outputs for the test set
    test_labels.npy     its labels
    mistakes.npz        the mistakes that the model is most confident of, with their images
    summary.json        what came of it

The summary is written last of these: a folder that has it holds a finished run.  Who asks for more
finds beside them

    profile/            where a step's time goes, and the trace that says so
    tensorboard/        the log and pictures for TensorBoard
    plots/              the pictures of a finished run
    report.html         all of it as a page
    export/             the model in other formats

While a process works in the folder it holds a lock on the file `.lock` there, so that a second one
is refused.  A process that was killed leaves the file and no lock.

Somebody may remove the folder while its run goes on.  Whoever writes into it calls `ensure` before
that, which makes it anew; the log is then written from its beginning, and at the end of the run
`missing` says what could not be.
"""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

import numpy as np

from cifarflow.errors import DataError, WorkdirError
from cifarflow.files import replacing
from cifarflow.untrusted import (
    one_line,
    open_file,
    open_npz,
    parse_json,
    read_array,
    read_array_header,
    read_bytes,
    reading,
    shown,
)

# A recipe has 2 kB, a summary of 300 classes 0.9 MB, for its confusion matrix.  As many bytes of
# empty lists take half a second: Python looks through all that TensorFlow has made, for garbage.
_JSON_BYTES_LIMIT = 1_000_000
# What a run has from its test, and what every finished one has beside its recipe.
_TESTED = ("test_outputs.npy", "test_labels.npy", "mistakes.npz", "summary.json")
_FINISHED = ("metrics.jsonl", "metrics.csv", *_TESTED)
# What else belongs to one run, or to one ensemble, and must not get into another's hands.
_OWNED = (*_FINISHED, "checkpoints", "capsules", "members", "ensemble.json")
# Fields that recipes did not have at first, and what every run did until then.
LATER_FIELDS: Mapping[str, Any] = {"accumulate_steps": 1, "image_size": 32, "patience_epochs": 0}
# As many runs below a folder are named.
_MOST_NAMED = 8
# What a summary's readers print or draw, and what that must be.
_SUMMARY_NUMBERS = (
    *("parameters", "epochs", "train_seconds", "images_per_second"),
    *("test_loss", "test_accuracy"),
)
_SUMMARY_TEXTS = ("recipe", "dataset", "precision", "device", "weights_sha256")
# Those of `write_mistakes`: dtype, and how many sides after the first.
_MISTAKES = {
    "images": ("uint8", 3),
    "labels": ("int32", 0),
    "predicted": ("int32", 0),
    "probabilities": ("float32", 1),
    "indices": ("int32", 0),
}


class ArrayKind(NamedTuple):
    """What an array in a file must be.

    Attributes:
      kind: of its dtype, as NumPy has it: "f" for floats, "i" for signed integers.
      sides: how many dimensions.
      text: the same for a message.
    """

    kind: str
    sides: int
    text: str


OUTPUTS = ArrayKind("f", 2, "float32 of shape (images, classes)")
_LABELS = ArrayKind("i", 1, "int32 of shape (images,)")


class Workdir:
    """One run's folder; as a context manager it closes itself.

    Args:
      path: the folder; made by `open`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Of an unknown user, unlike pathlib's, this leaves the name as it is.
        self.path = pathlib.Path(os.path.expanduser(path))
        self._recipe: Mapping[str, Any] | None = None
        self._lock: _Lock | None = None

    def __enter__(self) -> Workdir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def capsules(self) -> pathlib.Path:
        """The folder of capsules."""
        return self.path / "capsules"

    @property
    def metrics(self) -> pathlib.Path:
        """The log."""
        return self.path / "metrics.jsonl"

    @property
    def table(self) -> pathlib.Path:
        """The log as a table."""
        return self.path / "metrics.csv"

    def open(self, recipe: Mapping[str, Any], *, resume: bool = False) -> bool:
        """Makes the folder ready for a run, and overwrites nothing.

        Args:
          recipe: the recipe's values, as JSON has them.
          resume: whether a run that is there may go on.

        Returns:
          Whether a run of this recipe is there already.

        Raises:
          WorkdirError: if the folder cannot be written, another process is running in it, it holds
            another recipe's run, or holds one and `resume` is False.
        """
        try:
            return self._open(recipe, resume=resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes in; nothing more may be written."""
        if self._lock is not None:
            self._lock.release()
        self._lock = self._recipe = None

    def _take_lock(self) -> None:
        """Takes the lock, if this object does not hold it; anew where its file was removed."""
        if self._lock is not None:
            if self._lock.is_there():
                return
            self._lock.release()
            self._lock = None
        try:
            self._lock = _Lock(self.path / ".lock")
        except BlockingIOError:
            raise WorkdirError(
                f"another process is running in workdir {str(self.path)!r}: wait for it, or give "
                "another folder"
            ) from None
        except OSError:
            # A file system that knows no locks is no reason not to run.
            self._lock = None

    def _open(self, recipe: Mapping[str, Any], *, resume: bool) -> bool:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise WorkdirError(
                f"cannot write to workdir {str(self.path)!r}: {error.strerror}; "
                "give a folder that can be made and written"
            ) from error
        self._take_lock()
        found = self.read_json("recipe.json")
        if found is None:
            left = next((name for name in _OWNED if self._exists(self.path / name)), None)
            if left is not None:
                raise WorkdirError(
                    f"workdir {str(self.path)!r} has {left} but no recipe.json: "
                    "it is unclear whose run it holds; give another folder"
                )
            self.write_json("recipe.json", recipe)
            self._recipe = recipe
            return False
        difference = first_difference(found, recipe)
        if difference is not None:
            raise WorkdirError(
                f"workdir {str(self.path)!r} holds a run with {difference}: give another folder"
            )
        if not resume:
            raise WorkdirError(
                f"workdir {str(self.path)!r} holds a run of this recipe already: "
                "add --resume (resume=True) to go on with it, or give another folder"
            )
        self._recipe = recipe
        return True

    def ensure(self) -> None:
        """Makes the folder anew if it was removed since `open`; to be called before each write.

        Warns:
          If it was.

        Raises:
          WorkdirError: if that is not possible, or the folder holds another run by now.
        """
        if self._recipe is None:
            return
        try:
            found = self.read_json("recipe.json")
        except DataError as error:
            raise WorkdirError(f"cannot write to workdir {str(self.path)!r}: {error}") from error
        if found is None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WorkdirError(
                    f"cannot write to workdir {str(self.path)!r}: {error.strerror}"
                ) from error
            self._take_lock()
            self.write_json("recipe.json", self._recipe)
            # With the time, since Python shows the same text once only.
            warnings.warn(
                f"workdir {str(self.path)!r} was removed, or its files were: it is made anew, with "
                f"the whole log; what else was in it is lost (seen at {time.strftime('%H:%M:%S')})",
                stacklevel=2,
            )
        elif first_difference(found, self._recipe) is not None:
            raise WorkdirError(
                f"workdir {str(self.path)!r} holds another run by now: nothing more of this one is "
                "written into it"
            )
        else:
            self._take_lock()

    def missing(self, *paths: pathlib.Path) -> list[str]:
        """What a finished run should have and this one has not, by name.

        Args:
          *paths: files and folders in this folder beside log, summary and the like.

        Raises:
          WorkdirError: if the folder cannot be read.
        """
        every = [*(self.path / name for name in ("recipe.json", *_FINISHED)), *paths]
        return [str(path.relative_to(self.path)) for path in every if not self._exists(path)]

    def _exists(self, path: pathlib.Path) -> bool:
        try:
            return path.exists()
        except OSError as error:
            raise WorkdirError(
                f"cannot read workdir {str(self.path)!r}: {error.strerror}"
            ) from error

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads one of the folder's JSON files; None if it is not there.

        Raises:
          DataError: if it is not a JSON object.
        """
        path = self.path / name
        with reading(repr(str(path)), failing="is not readable JSON"):
            try:
                data = read_bytes(path, limit=_JSON_BYTES_LIMIT)
            except FileNotFoundError:
                return None
            value = parse_json(data)
        if not isinstance(value, dict):
            raise DataError(f"{str(path)!r} must hold a JSON object, not {type(value).__name__}")
        return value

    def read_recipe(self) -> dict[str, Any]:
        """Reads the recipe of the run that is in the folder; none of its fields is checked.

        Raises:
          WorkdirError: if there is no run in it; says what there is instead, such as an ensemble,
            or the runs that are below it.
          DataError: if recipe.json is damaged.
        """
        values = self.read_json("recipe.json") if os.path.isdir(self.path) else None
        if values is None:
            reason = self._what_is_there()
        elif "ensemble" in values:
            reason = (
                "it holds an ensemble; what came of it is in ensemble.json, the weights and "
                "outputs of each model are in members"
            )
        else:
            return values
        raise WorkdirError(f"there is no run in {str(self.path)!r}: {reason}")

    def _what_is_there(self) -> str:
        """Why a folder without a recipe has no run, and where there are some."""
        try:
            below = sorted(path.parent.name for path in self.path.glob("*/recipe.json"))
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        if below:
            more = len(below) - _MOST_NAMED
            names = ", ".join(map(repr, below[:_MOST_NAMED]))
            names += f" and {more} more" if more > 0 else ""
            return f"it has no recipe.json; there are runs below it, in {names}"
        return "it has no recipe.json" if os.path.isdir(self.path) else "it is no folder"

    def read_summary(self, keys: Iterable[str]) -> dict[str, Any] | None:
        """Reads summary.json, which a finished run has; None if it is not there.

        Args:
          keys: what it must hold.

        Raises:
          DataError: if it is not a JSON object with these keys, or one is not what it must be.
        """
        summary = self.read_json("summary.json")
        if summary is None:
            return None
        missing = sorted(set(keys) - set(summary))
        wrong = [key for key in summary if not _is_as_it_must_be(key, summary[key])]
        if missing or wrong:
            what = f"it lacks {missing[0]!r}" if missing else f"its {wrong[0]!r} is not one's"
            raise DataError(
                f"{str(self.path / 'summary.json')!r} is no summary of a run, {what}: "
                "remove it to have the run tested again"
            )
        return summary

    def read_test_outputs(self) -> np.ndarray | None:
        """Reads a finished run's outputs for the test set; None if they are not there.

        Returns:
          [N, num_classes] float32.

        Raises:
          DataError: if the file is damaged.
        """
        return read_npy(self.path / "test_outputs.npy", OUTPUTS)

    def read_test_labels(self) -> np.ndarray | None:
        """Reads the labels of a finished run's test set; None if they are not there.

        Returns:
          [N] int32.

        Raises:
          DataError: if the file is damaged.
        """
        return read_npy(self.path / "test_labels.npy", _LABELS)

    def read_mistakes(self) -> dict[str, np.ndarray] | None:
        """Reads a finished run's worst mistakes; None if they are not there.

        Returns:
          By name what `write_mistakes` takes.

        Raises:
          DataError: if the file is damaged, or holds anything else.
        """
        path = self.path / "mistakes.npz"
        with reading(repr(str(path)), failing="is damaged"):
            try:
                with open_npz(path, packed=False) as archive:
                    if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in _MISTAKES):
                        raise ValueError(f"it has not the members {', '.join(_MISTAKES)} alone")
                    found = {}
                    for name, (dtype, sides) in _MISTAKES.items():
                        info = archive.getinfo(f"{name}.npy")
                        with archive.open(info) as file:
                            header = read_array_header(file)
                            if header.dtype != dtype or len(header.shape) != 1 + sides:
                                raise ValueError(
                                    f"its {name} are {header.dtype} of shape {header.shape}"
                                )
                            found[name] = read_array(file, header, size=info.file_size)
            except FileNotFoundError:
                return None
            _check_mistakes(found)
            return found

    def write_test_outputs(self, outputs: np.ndarray) -> None:
        """Keeps the model's outputs for the test set, which is read once only.

        Args:
          outputs: [N, num_classes] float32.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        self._write_npy("test_outputs.npy", outputs)

    def write_test_labels(self, labels: np.ndarray) -> None:
        """Keeps the labels of the test set, by which two runs can be compared.

        Args:
          labels: [N] int32.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        self._write_npy("test_labels.npy", labels)

    def write_mistakes(
        self,
        *,
        images: np.ndarray,
        labels: np.ndarray,
        predicted: np.ndarray,
        probabilities: np.ndarray,
        indices: np.ndarray,
    ) -> None:
        """Keeps the worst mistakes, most confident first.

        Args:
          images: [K, H, W, C] uint8.
          labels: [K] int32, the true classes.
          predicted: [K] int32, the classes predicted.
          probabilities: [K, num_classes] float32.
          indices: [K] int32, their places in the test set.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        with replacing(self.path / "mistakes.npz") as file:
            np.savez(
                file,
                images=images,
                labels=labels,
                predicted=predicted,
                probabilities=probabilities,
                indices=indices,
            )

    def _write_npy(self, name: str, array: np.ndarray) -> None:
        with replacing(self.path / name) as file:
            np.save(file, array, allow_pickle=False)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one of the folder's JSON files, whole or not at all.

        Raises:
          WorkdirError: if it cannot be written.
        """
        with replacing(self.path / name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())


class _Lock:
    """A lock on a file that goes with the object, or with the process however that ends.

    Args:
      path: the file; it is made if need be, and removed with the lock.

    Raises:
      BlockingIOError: if somebody else holds it.
      OSError: if there can be none.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        while True:
            try:
                # Not open for writing: that would keep a disk from being made read-only.
                self._file = _locked(path, os.O_RDONLY)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                # NFS locks only what is.
                self._file = _locked(path, os.O_RDWR)
            # Whoever held it may have removed it in between: the next one then has another file.
            if self.is_there():
                break
            os.close(self._file)
        self._release = weakref.finalize(self, _unlock, self._file, path, os.getpid())

    def is_there(self) -> bool:
        """Whether the file that is locked is the one under the name."""
        return _is_open_as(self._file, self._path)

    def release(self) -> None:
        """Gives the lock back; once."""
        self._release()


def _locked(path: pathlib.Path, access: int) -> int:
    """Opens a file, made if need be, and locks it."""
    file = os.open(path, access | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file


def _unlock(file: int, path: pathlib.Path, process: int) -> None:
    """Removes a locked file and closes it; what a child process has of it is not its own."""
    with suppress(OSError):
        if os.getpid() == process and _is_open_as(file, path):
            path.unlink()
    os.close(file)


def _is_open_as(file: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def first_difference(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> str | None:
    """The first field, by name, in which two recipes differ, as "epochs=2.0, not 3.0".

    A field of `LATER_FIELDS` that one of them lacks counts as what was done without it.

    Args:
      found: the recipe that is there, as JSON has it.
      recipe: the one that is wanted.

    Returns:
      The text; None if they do not differ.
    """
    theirs, ours = {**LATER_FIELDS, **found}, {**LATER_FIELDS, **recipe}
    for key in sorted({*theirs, *ours}):
        their, our = theirs.get(key), ours.get(key)
        if their != our:
            return f"{one_line(key, length=60)}={shown(their)}, not {shown(our)}"
    return None


def read_npy(path: pathlib.Path, kind: ArrayKind) -> np.ndarray | None:
    """Reads an array that anybody may have written; None if there is no such file.

    Args:
      path: an `.npy` file.
      kind: what it must be.

    Raises:
      DataError: if the file is damaged, or holds anything else.
    """
    with reading(repr(str(path)), failing="is damaged"):
        try:
            file = open_file(path)
        except FileNotFoundError:
            return None
        with file:
            header = read_array_header(file)
            if len(header.shape) != kind.sides or header.dtype.kind != kind.kind:
                raise ValueError(
                    f"it is {header.dtype} of shape {header.shape}, expected {kind.text}"
                )
            return read_array(file, header, size=os.fstat(file.fileno()).st_size)


def _check_mistakes(found: Mapping[str, np.ndarray]) -> None:
    """Refuses what cannot be drawn.

    Raises:
      ValueError: if the arrays do not belong together, or a value is out of range.
    """
    counts = {len(array) for array in found.values()}
    if len(counts) > 1:
        raise ValueError(f"its arrays are of {', '.join(map(str, sorted(counts)))} mistakes")
    probabilities = found["probabilities"]
    # Of a NaN no comparison holds.
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("its probabilities are not within 0..1")
    num_classes = probabilities.shape[1]
    for name, end in (("labels", num_classes), ("predicted", num_classes), ("indices", 2**31)):
        if not ((found[name] >= 0) & (found[name] < end)).all():
            raise ValueError(f"its {name} are not within 0..{end - 1}")


def _is_as_it_must_be(key: str, value: Any) -> bool:
    """Whether a summary's value can be printed and drawn; others than the known may be anything."""
    if key in _SUMMARY_NUMBERS:
        return _is_number(value)
    if key in _SUMMARY_TEXTS:
        return isinstance(value, str) and value.isprintable()
    if key in ("steps", "skipped_steps", "seed"):
        return _is_count(value) and (key != "seed" or value < 2**31)
    if key == "examples":
        splits = ("train", "validation", "test")
        return isinstance(value, dict) and all(_is_number(value.get(split)) for split in splits)
    if key == "confusion_matrix":
        return isinstance(value, list) and all(
            isinstance(row, list) and len(row) == len(value) and all(map(_is_count, row))
            for row in value
        )
    return key != "scores" or _are_scores(value)


def _are_scores(value: Any) -> bool:
    """Whether scores can be printed and drawn; those that are not known may be anything."""
    if not isinstance(value, dict):
        return False
    for key, score in value.items():
        if key in ("precision", "recall", "f1"):
            if not (isinstance(score, list) and all(map(_is_share, score))):
                return False
        elif key == "calibration_bins":
            if not (isinstance(score, list) and all(map(_is_bin, score))):
                return False
        elif re.fullmatch(r"top_[0-9]{1,4}_accuracy|expected_calibration_error", key) and not (
            _is_share(score)
        ):
            return False
    return True


def _is_bin(value: Any) -> bool:
    """Whether this is a bin of a reliability diagram: mean confidence, accuracy, count."""
    if not (isinstance(value, list) and len(value) == 3 and _is_count(value[2])):
        return False
    # Both are defined where there is something to take the mean of, and only there.
    return all(_is_share(part) and (part is None) == (value[2] == 0) for part in value[:2])


def _is_share(value: Any) -> bool:
    """Whether this is 0..1, or not defined."""
    return value is None or (_is_number(value) and 0 <= value <= 1)


def _is_count(value: Any) -> bool:
    # So that a table of them can be added up in 64 bits.
    return type(value) is int and 0 <= value < 2**40


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # Python's whole numbers have no end; those beyond floats cannot be printed as one.
    return abs(value) < 1e300
