"""One recipe trained by one process or by workers, each of them a child process.

    python benchmarks/team_ways.py       # a worker: see `worker.serve`; distribution.py starts it

The first line on stdin says recipe, batch_size (of all workers together), precision, model_options
(over the recipe's), data, data_dir, examples (0 for all), cores (those to stay on, null for all),
addresses (of all workers; none for one process alone) and index.
"""

from __future__ import annotations

import json
import os
from typing import Any

import worker


class TeamWay:
    """The path of `cifarflow.train_recipe`, alone or as one worker of a team.

    Args:
      spec: see the module.

    Attributes:
      facts: what it says of itself, as JSON has it.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        if spec["cores"] is not None:
            # Before TensorFlow counts them for its threads.
            os.sched_setaffinity(0, spec["cores"])
        import ways

        from cifarflow.recipes import build
        from cifarflow.training.distribution import open_team
        from cifarflow.training.runner import StepRunner
        from cifarflow.training.step import make_train_step

        team = None
        if spec["addresses"]:
            task = {"type": "worker", "index": spec["index"]}
            config = {"cluster": {"worker": spec["addresses"]}, "task": task}
            os.environ["TF_CONFIG"] = json.dumps(config)
            team = open_team("multiworker")
        dataset = ways.load_dataset(spec)
        recipe = ways.get_recipe(
            spec["recipe"],
            dataset,
            batch_size=spec["batch_size"],
            precision=spec["precision"],
            model_options=spec["model_options"],
            jit_compile="false",
        )
        pieces = build.assemble(recipe, dataset)
        if team is not None:
            team.check_batch_size(recipe.batch_size)
            team.begin(pieces.model)
        step = make_train_step(
            pieces.model,
            pieces.optimizer,
            loss_fn=pieces.loss_fn,
            spread=team.spread if team is not None else None,
        )
        self._variables = [*pieces.model.variables, *pieces.optimizer.variables]
        self._weights = pieces.model.trainable_variables
        self._start = [variable.numpy() for variable in self._variables]
        self._runner = StepRunner(step, pieces.batches, first_step=0, last_step=2**40)
        self.facts: dict[str, Any] = {"replicas": 1 if team is None else team.replicas}

    def round(self, steps: int) -> float:
        """Runs the steps to their end and returns their seconds."""
        import ways

        return ways.run_timed(self._runner, steps)[0]

    def save_weights(self, steps: int, path: str) -> None:
        """Trains so many steps from the start and keeps the weights in an .npz."""
        import numpy as np

        for variable, value in zip(self._variables, self._start, strict=True):
            variable.assign(value)
        self._runner.restart()
        self.round(steps)
        np.savez(path, *[variable.numpy() for variable in self._weights])


if __name__ == "__main__":
    worker.serve(TeamWay)
