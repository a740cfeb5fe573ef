"""A run's folder: what is in it, and whether a run may use it.

    workdir = Workdir("runs/first")
    resuming = workdir.open(recipe_values, resume=True)
    workdir.write_json("summary.json", summary)

In the folder are

    recipe.json         the recipe, with every "auto" replaced by what was used
    metrics.jsonl       the log, a line an event
    checkpoints/        the state, a file a step
    capsules/           steps whose numbers were not finite, a folder each
    test_outputs.npy    the model's outputs for the test set
    summary.json        what came of it

The summary is written last: a folder that has it holds a finished run.

Somebody may remove the folder while its run goes on.  Whoever writes into it calls `ensure` before
that, which makes it anew; the log is then written from its beginning, and at the end of the run
`missing` says what could not be.
"""

from __future__ import annotations

import json
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cifarflow.errors import DataError, WorkdirError
from cifarflow.files import replacing
from cifarflow.untrusted import (
    one_line,
    open_file,
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
# What a summary's readers print or draw, and what that must be.
_SUMMARY_NUMBERS = (
    *("parameters", "epochs", "seed", "train_seconds", "images_per_second"),
    *("test_loss", "test_accuracy"),
)
_SUMMARY_TEXTS = ("recipe", "dataset", "precision", "device", "weights_sha256")


class Workdir:
    """One run's folder.

    Args:
      path: the folder; made by `open`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).expanduser()
        self._recipe: Mapping[str, Any] | None = None

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

    def open(self, recipe: Mapping[str, Any], *, resume: bool = False) -> bool:
        """Makes the folder ready for a run, and overwrites nothing.

        Args:
          recipe: the recipe's values, as JSON has them.
          resume: whether a run that is there may go on.

        Returns:
          Whether a run of this recipe is there already.

        Raises:
          WorkdirError: if the folder cannot be written, holds another recipe's run, or holds one
            and `resume` is False.
        """
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
        found = self.read_json("recipe.json")
        if found is None:
            ours = (self.metrics, self.checkpoints, self.path / "summary.json")
            left = next((p for p in ours if p.exists()), None)
            if left is not None:
                raise WorkdirError(
                    f"workdir {str(self.path)!r} has {left.name} but no recipe.json: "
                    "it is unclear whose run it holds; give another folder"
                )
            self.write_json("recipe.json", recipe)
            self._recipe = recipe
            return False
        key = _first_difference(found, recipe)
        if key is not None:
            raise WorkdirError(
                f"workdir {str(self.path)!r} holds a run with {one_line(key, length=60)}="
                f"{shown(found.get(key))}, not {shown(recipe.get(key))}: give another folder"
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
            self.write_json("recipe.json", self._recipe)
            warnings.warn(
                f"workdir {str(self.path)!r} was removed, or its files were: it is made anew, with "
                "the whole log; what else was in it is lost",
                stacklevel=2,
            )
        elif _first_difference(found, self._recipe) is not None:
            raise WorkdirError(
                f"workdir {str(self.path)!r} holds another run by now: nothing more of this one is "
                "written into it"
            )

    def missing(self, *paths: pathlib.Path) -> list[str]:
        """What a finished run should have and this one has not, by name.

        Args:
          *paths: files and folders in this folder beside recipe, log, test outputs and summary.
        """
        names = ("recipe.json", "metrics.jsonl", "test_outputs.npy", "summary.json")
        every = [*(self.path / name for name in names), *paths]
        return [str(path.relative_to(self.path)) for path in every if not path.exists()]

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
        path = self.path / "test_outputs.npy"
        with reading(repr(str(path)), failing="is damaged"):
            try:
                file = open_file(path)
            except FileNotFoundError:
                return None
            with file:
                header = read_array_header(file)
                if len(header.shape) != 2 or header.dtype.kind != "f":
                    raise ValueError(
                        f"it is {header.dtype} of shape {header.shape}, "
                        "expected float32 of shape (images, classes)"
                    )
                return read_array(file, header, size=os.fstat(file.fileno()).st_size)

    def write_test_outputs(self, outputs: np.ndarray) -> None:
        """Keeps the model's outputs for the test set, which is read once only.

        Raises:
          WorkdirError: if the file cannot be written.
        """
        with replacing(self.path / "test_outputs.npy") as file:
            np.save(file, outputs, allow_pickle=False)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes one of the folder's JSON files, whole or not at all.

        Raises:
          WorkdirError: if it cannot be written.
        """
        with replacing(self.path / name) as file:
            file.write((json.dumps(value, indent=2) + "\n").encode())


def _first_difference(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> str | None:
    """The first key, by name, in which two recipes differ; None if they do not."""
    keys = sorted(set(found) | set(recipe))
    return next((key for key in keys if found.get(key) != recipe.get(key)), None)


def _is_as_it_must_be(key: str, value: object) -> bool:
    """Whether a summary's value can be printed and drawn; others than the known may be anything."""
    if key in _SUMMARY_NUMBERS:
        return _is_number(value)
    if key in _SUMMARY_TEXTS:
        return isinstance(value, str)
    if key == "examples":
        splits = ("train", "validation", "test")
        return isinstance(value, dict) and all(_is_number(value.get(split)) for split in splits)
    if key == "confusion_matrix":
        return isinstance(value, list) and all(
            isinstance(row, list) and len(row) == len(value) and all(map(_is_number, row))
            for row in value
        )
    return True


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    # Python's whole numbers have no end; those beyond floats cannot be printed as one.
    return abs(value) < 1e300
