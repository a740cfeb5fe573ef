"""Two finished runs compared by their folders alone.

found = compare_runs("runs/small", "runs/large")
print(found.verdict)
"""

from __future__ import annotations

import os

import numpy as np

from cifarflow.errors import DataError, WorkdirError
from cifarflow.evaluation.comparison import Comparison, mcnemar
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import one_line


def compare_runs(
    workdir_a: str | os.PathLike[str], workdir_b: str | os.PathLike[str]
) -> Comparison:
    """McNemar's test of two runs, by their outputs for the test set; neither model is loaded.

    Args:
      workdir_a: the folder of a finished run.
      workdir_b: the folder of another on the same data.

    Returns:
      The `Comparison`, its names those of the folders.

    Raises:
      WorkdirError: if a folder holds no finished run, or one from before labels were kept.
      DataError: if a file is damaged, or the two were tested on other data: the name of the data
        set and all labels must be the same.
    """
    paths = [os.fspath(workdir) for workdir in (workdir_a, workdir_b)]
    (names, labels, outputs) = zip(*map(_read, paths), strict=True)
    for what, (first, second) in (
        ("data sets", [repr(name) for name in names]),
        ("test sets", [f"{len(part):,} images" for part in labels]),
        ("numbers of classes", [f"{part.shape[1]}" for part in outputs]),
    ):
        if first != second:
            raise DataError(
                f"runs must be of the same data to be compared, and {paths[0]!r} and {paths[1]!r} "
                f"are of other {what}: {first} and {second}"
            )
    if not np.array_equal(*labels):
        raise DataError(
            f"runs must be of the same data to be compared, and the test sets of {paths[0]!r} and "
            f"{paths[1]!r} have other labels"
        )
    predicted = [part.argmax(-1) for part in outputs]
    return mcnemar(labels[0], *predicted, names=(one_line(paths[0]), one_line(paths[1])))


def _read(path: str) -> tuple[str, np.ndarray, np.ndarray]:
    """A run's data set, the labels of its test set, and its outputs for it."""
    folder = Workdir(path)
    summary = folder.read_summary(["dataset"])
    labels, outputs = folder.read_test_labels(), folder.read_test_outputs()
    files = {"summary.json": summary, "test_labels.npy": labels, "test_outputs.npy": outputs}
    missing = [name for name, found in files.items() if found is None]
    if summary is None or labels is None or outputs is None:
        # Of a folder that is no run's this says so.
        folder.read_recipe()
        raise WorkdirError(
            f"{str(folder.path)!r} has no {missing[0]}: a run to be compared must be finished, and "
            "have been made by a version that writes this file"
        )
    if len(labels) != len(outputs) or not outputs.size:
        raise DataError(
            f"{str(folder.path)!r} has {len(labels)} labels and outputs of shape "
            f"{list(outputs.shape)}: there must be one each an image, and at least one"
        )
    if not np.isfinite(outputs).all() or labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise DataError(
            f"{str(folder.path)!r} has outputs that are not finite, or labels that are none of its "
            f"{outputs.shape[1]} classes"
        )
    return summary["dataset"], labels, outputs
