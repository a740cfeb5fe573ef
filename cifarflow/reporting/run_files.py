"""What a run's folder says of the run, read as if anybody had written it.

    run = read_run("runs/first")
    print(run.name, run.rows[-1]["loss"])
    if run.summary is not None:
        print(run.summary["test_accuracy"])

An unfinished run has no summary, an older one no labels, mistakes or scores: what is not there is
None.  What is there has been checked, so that whoever shows it need not.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cifarflow.errors import DataError
from cifarflow.evaluation.metrics import check_matrix
from cifarflow.training.history import History
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import one_line, reading, shown

# Of pictures, and of their sides in pixels.
_MOST_MISTAKES, _MOST_PIXELS = 100, 512
_MOST_CAPSULES = 1_000


@dataclasses.dataclass(frozen=True)
class KeptRun:
    """One run, as its folder has it.

    Attributes:
      path: the folder.
      recipe: all its fields, of which none is checked.
      history: its log.
      summary: what came out; None if the run has not finished.
      matrix: [num_classes, num_classes] int64, rows true and columns predicted; None as above.
      class_names: one a class; empty as above.
      scores: the summary's; empty as above.
      mistakes: the worst ones, as `Workdir.write_mistakes` takes them.
      profile: the figures of the run's profile, if it has one.
      capsules: steps that were kept because their numbers were not finite, by name.
    """

    path: pathlib.Path
    recipe: Mapping[str, Any]
    history: History
    summary: Mapping[str, Any] | None
    matrix: np.ndarray | None
    class_names: tuple[str, ...]
    scores: Mapping[str, Any]
    mistakes: Mapping[str, np.ndarray] | None
    profile: Mapping[str, Any] | None
    capsules: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its recipe."""
        name = self.recipe.get("name")
        return name if isinstance(name, str) and name.strip() else shown(name)

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to its end and tested."""
        return self.summary is not None

    @property
    def dataset(self) -> str:
        """The name of its data set, "" if nothing says it."""
        logged = self.history.rows[-1].get("dataset") if self.history.rows else None
        said = [(self.summary or {}).get("dataset"), logged, self.recipe.get("data")]
        return next((name for name in said if isinstance(name, str)), "")

    @property
    def is_standin(self) -> bool:
        """Whether any of its files says that it was trained on the stand-in set."""
        logged = [row.get("dataset") for row in self.history.rows]
        return "standin" in [self.dataset, self.recipe.get("data"), *logged]


def read_run(directory: str | os.PathLike[str]) -> KeptRun:
    """Reads a run's folder, and changes nothing in it.

    Args:
      directory: the folder of a run, finished or not.

    Raises:
      WorkdirError: if there is no run in it, see `Workdir.read_recipe`.
      DataError: if one of its files is damaged, or is not what such a file is.
    """
    folder = Workdir(directory)
    recipe = folder.read_recipe()
    profile = folder.read_json("profile/profile.json")
    if profile is not None:
        _check(folder.path / "profile" / "profile.json", profile, _PROFILE, needed=_PROFILE)
    has_log = os.path.lexists(folder.metrics)
    run = KeptRun(
        path=folder.path,
        recipe=recipe,
        history=History.load(folder.metrics) if has_log else History(),
        summary=None,
        matrix=None,
        class_names=(),
        scores={},
        mistakes=None,
        profile=profile,
        capsules=_capsules(folder.capsules),
    )
    path = folder.path / "summary.json"
    summary = folder.read_summary(_SUMMARY_KEYS)
    if summary is None:
        return run
    _check(path, summary, _SUMMARY)
    with reading(repr(str(path)), failing="is no summary of a run"):
        matrix = check_matrix(summary["confusion_matrix"])
    names = summary.get("class_names", [str(number) for number in range(len(matrix))])
    if len(names) != len(matrix):
        raise DataError(
            f"{str(path)!r} is no summary of a run: it has {len(names)} class_names for "
            f"{len(matrix)} classes"
        )
    mistakes = folder.read_mistakes()
    if mistakes is not None:
        _check_mistakes(folder.path / "mistakes.npz", mistakes, len(matrix))
    return dataclasses.replace(
        run,
        summary=summary,
        matrix=matrix,
        class_names=tuple(names),
        scores=summary.get("scores", {}),
        mistakes=mistakes,
    )


def _capsules(folder: pathlib.Path) -> tuple[str, ...]:
    """The names of the capsules of a run."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return ()
    return tuple(one_line(name, length=80) for name in names[:_MOST_CAPSULES])


def _check_mistakes(path: pathlib.Path, found: Mapping[str, np.ndarray], classes: int) -> None:
    """Refuses what would not be two dozen small pictures of the run's classes.

    Raises:
      DataError: if it is not.
    """
    count, *sides, _ = found["images"].shape
    if count > _MOST_MISTAKES or not all(0 < side <= _MOST_PIXELS for side in sides):
        raise DataError(f"{str(path)!r} is damaged: its images are {found['images'].shape}")
    if found["probabilities"].shape[1] != classes:
        raise DataError(
            f"{str(path)!r} is of {found['probabilities'].shape[1]} classes, its run of {classes}"
        )


# --- what a value must be -------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Python's whole numbers have no end; those beyond floats cannot be printed as one.
    return is_number and abs(value) < 1e300


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_words(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _are_operations(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and _is_text(row.get("kind"))
        and _is_amount(row.get("ms"))
        and _is_amount(row.get("count"))
        for row in value
    )


def _check(
    path: pathlib.Path,
    values: Mapping[str, Any],
    kinds: Mapping[str, Callable[[Any], bool]],
    *,
    needed: Mapping[str, object] | None = None,
) -> None:
    """Checks what a file holds.

    Raises:
      DataError: if a value is not of its kind, or one of `needed` is not there.
    """
    for key, is_good in kinds.items():
        if (key in values or key in (needed or ())) and not is_good(values.get(key)):
            value = shown(values.get(key), length=80)
            raise DataError(f"{str(path)!r} is not such a file of a run: its {key!r} is {value}")


# What `Workdir.read_summary` checks.
_SUMMARY_KEYS = (
    *("recipe", "dataset", "parameters", "epochs", "steps", "seed", "precision", "device"),
    *("train_seconds", "images_per_second", "examples", "test_loss", "test_accuracy"),
    *("confusion_matrix", "weights_sha256"),
)
_SUMMARY: Mapping[str, Callable[[Any], bool]] = {
    "test_accuracy": lambda value: _is_amount(value) and value <= 1,
    "loss_scale_skips": _is_count,
    "compile_seconds": _is_number,
    "total_seconds": _is_number,
    "stop_reason": _is_text,
    "data_source": _is_text,
    "date": _is_text,
    "class_names": _are_texts,
    "versions": _are_words,
}
_PROFILE: Mapping[str, Callable[[Any], bool]] = {
    "step_ms": lambda value: _is_amount(value) and value != 0,
    "input_ms": _is_amount,
    "host_ms": _is_amount,
    "device_ms": _is_amount,
    "batch_size": _is_amount,
    "precision": _is_text,
    "device": _is_text,
    "verdict": _is_text,
    "ops": _are_operations,
}
