"""Whole runs that keep checkpoints or do not, timed from their first compiled call to their last.

    python benchmarks/checkpoint_ways.py     # a worker: see `worker.serve`; started by
                                             # checkpoint_cost.py

The first line on stdin says what is run: model (a recipe's name), precision, data, data_dir,
examples (0 for all), and keeps: "nothing", "checkpoints" at the default interval in a workdir of
its own, or "many", a checkpoint every `steps` steps.  A round of n steps is a run of n steps.
"""

from __future__ import annotations

import gc
import pathlib
import tempfile
import time
from typing import Any

import ways
import worker


class Watch:
    """A progress view that notes when the first compiled call is over, and when training is.

    Attributes:
      seconds: between the two: training, validation, logs and checkpoints, without compiling.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._first: float | None = None

    def __call__(self, total_steps: int, **about: Any) -> Watch:
        """Begins anew: `train_recipe` calls what it is given to make a view."""
        self._first = None
        return self

    def __enter__(self) -> Watch:
        """Notes nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Notes that training is over, its last checkpoint written."""
        self.seconds = time.perf_counter() - (self._first or 0.0)

    def update(self, step: int, **means: float) -> None:
        """Notes the first call's end."""
        if self._first is None:
            self._first = time.perf_counter()

    def line(self, text: str) -> None:
        """Shows nothing."""


class Keeping(ways.Runs):
    """`cifarflow.train_recipe`, again and again, each run a new one."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._steps_per_epoch = len(self._dataset.train) // self._recipe.batch_size
        self.facts = {"steps_per_epoch": self._steps_per_epoch}

    def round(self, steps: int) -> float:
        """A run of so many steps."""
        import keras

        import cifarflow as cf

        watch = Watch()
        options: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            if self.spec["keeps"] != "nothing":
                options["workdir"] = pathlib.Path(folder) / "run"
            if self.spec["keeps"] == "many":
                options["checkpoint_every"] = cf.Every(steps=self.spec["steps"])
            run = cf.train_recipe(
                self._recipe,
                dataset=self._dataset,
                epochs=steps / self._steps_per_epoch,
                progress=watch,
                **options,
            )
        self.loss = run.summary["test_loss"]
        # The next run is to find what this one found.
        del run
        keras.backend.clear_session()
        gc.collect()
        return watch.seconds


WAYS: dict[str, type[Keeping]] = {"keeping": Keeping}

if __name__ == "__main__":
    worker.serve(lambda spec: ways.make_way(spec, WAYS))
