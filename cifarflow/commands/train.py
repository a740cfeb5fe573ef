"""Trains one recipe, evaluates it on the test set once, and draws what came out.

    cifarflow train
    cifarflow train --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final
    cifarflow train --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final --resume

Any field of the recipe is a flag; one that is not given keeps the recipe's value.  Without
CIFAR-10 and without a network it trains on generated stand-in images, and says so.
"""

from __future__ import annotations

from absl import flags

from cifarflow import cli

# They belong to whoever asks for them: `examples/train.py` does too.
flags.disclaim_key_flags()
FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags: those of a recipe and of a run."""
    cli.define_recipe_flags("fast75")
    cli.define_run_flags()


def main() -> None:
    """Trains as the flags say."""
    recipe = cli.recipe_from_flags()
    options = cli.run_options_from_flags(recipe.name)
    # Loaded here: what is wrong with a flag is said without waiting for TensorFlow.
    from cifarflow.recipes.run import train_recipe

    # It reads the data itself: several workers must have met before TensorFlow computes anything.
    run = train_recipe(recipe, **options)
    cli.print_summary(run)
    if FLAGS.plots:
        assert run.dataset is not None
        cli.draw_and_print(run, run.dataset)
