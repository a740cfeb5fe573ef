"""A training run that says how far it is, for the scripts that kill it and hurt it.

    python benchmarks/watched_run.py --recipe=lab_cnn --workdir=runs/watched --checkpoint_steps=7

It is examples/train.py without pictures: the same flags, the same endings.  After every compiled
call it prints `step` and how many are done, and it saves a checkpoint every so many steps, so that
one is never far from any moment of a short run.  Started by `child_runs.py`.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import sys
from typing import Any

import tensorflow as tf
from absl import flags

import cifarflow as cf
from cifarflow.device import has_gpu

FLAGS = flags.FLAGS
cli.define_recipe_flags("lab_cnn")
cli.define_run_flags()
flags.DEFINE_integer("checkpoint_steps", 7, "steps from one checkpoint to the next")


class Steps:
    """A progress view that prints steps, a line each, to whoever started this process."""

    def __init__(self, total_steps: int, **about: Any) -> None:
        """Takes what `train_recipe` tells every view, and needs none of it."""

    def __enter__(self) -> Steps:
        """Says that training begins."""
        print("begins", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Says nothing: the test is still to come."""

    def update(self, step: int, **means: float) -> None:
        """Says how many steps are done."""
        print(f"step {step}", flush=True)

    def line(self, text: str) -> None:
        """Says what a person is told, such as that a checkpoint is damaged."""
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    if has_gpu():
        # Else its sums come out differently from run to run.
        tf.config.experimental.enable_op_determinism()
    recipe = cli.recipe_from_flags()
    options = cli.run_options_from_flags(recipe.name)
    options["progress"] = Steps
    run = cf.train_recipe(
        recipe, checkpoint_every=cf.Every(steps=FLAGS.checkpoint_steps), **options
    )
    cli.print_summary(run)


if __name__ == "__main__":
    cli.run(main)
