"""Tries learning rates for a recipe: a table, two rates that suggest themselves, and a picture.

    python examples/find_lr.py --recipe=lab_cnn
    python examples/find_lr.py --recipe=fast94 --steps=500 --high=3 --plot=rates.png

Any field of the recipe is a flag.  The rate rises from --low to --high over --steps steps from the
recipe's initial weights; nothing is kept of the training.
"""

from __future__ import annotations

import pathlib

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import ConfigError, check_float, check_int

FLAGS = flags.FLAGS
cli.define_recipe_flags("lab_cnn")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_integer("steps", 300, "how many rates are tried, 10 or more")
flags.DEFINE_float("low", 1e-5, "the first rate")
flags.DEFINE_float("high", 10.0, "the last rate; the ramp ends before it where the loss diverges")
flags.DEFINE_float("smoothing", 0.95, "of the loss, 0 up to but not 1")
flags.DEFINE_string("plot", "learning_rates.png", "the picture's file; empty for none")


def main() -> None:
    recipe = cli.recipe_from_flags()
    # All of them before the data is read.
    check_int("--steps", FLAGS.steps, minimum=10)
    low = check_float("--low", FLAGS.low, above_minimum=True)
    check_float("--high", FLAGS.high, minimum=low, above_minimum=True)
    check_float("--smoothing", FLAGS.smoothing, maximum=1.0, below_maximum=True)
    if FLAGS.plot and pathlib.Path(FLAGS.plot).suffix.lower() != ".png":
        raise ConfigError(f"--plot must end in .png, or be empty, not {FLAGS.plot!r}")
    dataset = cf.load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    found = cf.find_recipe_learning_rate(
        recipe,
        dataset=dataset,
        steps=FLAGS.steps,
        low=low,
        high=FLAGS.high,
        smoothing=FLAGS.smoothing,
    )
    print(found.table())
    if found.diverged:
        print(f"the loss diverged after {found.rates[-1]:.3g}")
    if found.steepest is None:
        print(
            "the loss did not fall by more than its noise, and no rate suggests itself: try more "
            "--steps, a larger --batch_size, or a higher --low"
        )
    else:
        print(
            f"{recipe.name} on {dataset.name}: the loss fell fastest at {found.steepest:.2g}; a "
            f"tenth of the rate of the least loss is {found.tenth_of_minimum:.2g}; the recipe's "
            f"learning_rate is {recipe.learning_rate:.2g}"
        )
    if FLAGS.plot:
        cf.plot_learning_rates(
            found,
            current=recipe.learning_rate,
            title=f"{recipe.name}, {dataset.name}",
            path=FLAGS.plot,
        )
        print(f"picture: {FLAGS.plot}")


if __name__ == "__main__":
    cli.run(main)
