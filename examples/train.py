"""Trains one recipe, evaluates it on the test set once, and draws what came out.

    python examples/train.py
    python examples/train.py --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final
    python examples/train.py --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final --resume

Any field of the recipe is a flag; one that is not given keeps the recipe's value.  Without
CIFAR-10 and without a network it trains on generated stand-in images, and says so.
"""

from __future__ import annotations

from absl import flags

import cifarflow as cf
from cifarflow import cli

FLAGS = flags.FLAGS
cli.define_recipe_flags("fast75")
cli.define_run_flags()


def main() -> None:
    recipe = cli.recipe_from_flags()
    options = cli.run_options_from_flags(recipe.name)
    dataset = cf.load_recipe_data(recipe, data_dir=options.pop("data_dir"))
    run = cf.train_recipe(recipe, dataset=dataset, **options)
    cli.print_summary(run)
    if FLAGS.plots:
        cli.draw_and_print(run, dataset)


if __name__ == "__main__":
    cli.run(main)
