"""Many models trained in one process, or many epochs of one, and what the process has after each.

    python benchmarks/leak_ways.py           # a worker: see `worker.serve`; started by leaks.py

The first line on stdin says what is run: way ("models" or "epochs"), model (a recipe's name),
precision, count (how many of them), settled (after how many growth is counted), data, data_dir,
examples, clear_session (whether Keras's is called after each model).  All of it is the worker's
first step; `figures` is to be asked for afterwards.
"""

from __future__ import annotations

import collections
import gc
import os
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

import ways
import worker

_MOST_KINDS = 8


class Leaking(ways.Runs):
    """What both ways share: a recipe, trained as examples/train.py does it, in a workdir."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._rows: list[dict[str, int]] = []
        self._kinds: list[collections.Counter[str]] = []

    def round(self, steps: int) -> float:
        """All of it, once."""
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self.run(pathlib.Path(folder))
        return time.perf_counter() - start

    def run(self, folder: pathlib.Path) -> None:
        """Trains; calls `note` after each model or epoch.

        Args:
          folder: for workdirs.
        """
        raise NotImplementedError

    def note(self, *_: object) -> None:
        """Notes what the process has, of which what nobody refers to is none."""
        gc.collect()
        objects = gc.get_objects()
        self._rows.append(
            {
                "rss_bytes": worker.rss_bytes(),
                "threads": count_threads(),
                "handles": count_handles(),
                "objects": len(objects),
            }
        )
        if len(self._rows) in (self.spec["settled"], self.spec["count"]):
            self._kinds.append(collections.Counter(map(_kind, objects)))

    def figures(self) -> dict[str, Any]:
        """What the process had after each, and which Python objects there are more of at the end.

        Their kinds are counted after the one at which growth begins to count, and after the last.
        """
        more = self._kinds[-1] - self._kinds[0]
        return {"rows": self._rows, "more": dict(more.most_common(_MOST_KINDS))}


def _kind(thing: object) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def count_threads() -> int:
    """The threads of this process, those of libraries too where the system tells (Linux)."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def count_handles() -> int:
    """The files and pipes that this process has open; 0 where the system does not tell."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0


class Models(Leaking):
    """Models of other seeds, each trained for an epoch, tested and let go."""

    def run(self, folder: pathlib.Path) -> None:
        """Trains them."""
        import keras

        import cifarflow as cf

        for seed in range(self.spec["count"]):
            cf.train_recipe(
                self._recipe,
                dataset=self._dataset,
                workdir=folder / str(seed),
                seed=seed,
                epochs=1,
            )
            shutil.rmtree(folder / str(seed))
            if self.spec["clear_session"]:
                keras.backend.clear_session()
            self.note()


class Epochs(Leaking):
    """Epochs of one model, each with its validation and its checkpoint."""

    def run(self, folder: pathlib.Path) -> None:
        """Trains it."""
        import cifarflow as cf

        cf.train_recipe(
            self._recipe,
            dataset=self._dataset,
            workdir=folder / "run",
            epochs=self.spec["count"],
            hooks=[cf.Hook(cf.Every(epochs=1), self.note)],
        )


WAYS: dict[str, type[Leaking]] = {"models": Models, "epochs": Epochs}

if __name__ == "__main__":
    worker.serve(lambda spec: ways.make_way(spec, WAYS))
