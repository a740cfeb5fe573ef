"""Trains a recipe against the clock: what accuracy, in how many seconds, with how many seeds.

    python examples/speedrun.py --recipe=fast75
    python examples/speedrun.py --recipe=fast94 --runs=3
    python examples/speedrun.py --recipe=fast94 --epochs=8 --tune

Any field of the recipe is a flag.  All runs share one compiled step.  With --tune accuracy is that
of images held out of the training set, so that settings can be chosen without the test set.
"""

from __future__ import annotations

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import check_int, check_seed
from cifarflow.training.contract import CHECKED

FLAGS = flags.FLAGS
cli.define_recipe_flags("fast75")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_integer("runs", 1, "runs, with seeds --seed, --seed+1, ...")
flags.DEFINE_boolean("tune", False, "read validation images, not the test set")
cli.define_check_flag()
flags.DEFINE_boolean("progress", True, "show progress on stderr")


def main() -> None:
    recipe = cli.recipe_from_flags()
    seeds = range(recipe.seed, recipe.seed + check_int("--runs", FLAGS.runs))
    check_seed(seeds[-1])
    if FLAGS.tune and not recipe.validation_fraction:
        recipe = cf.get_recipe(recipe, validation_fraction=0.1)
    dataset = cf.load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    trials = cf.Trials(recipe, dataset, read="validation" if FLAGS.tune else "test")
    recipe = trials.recipe
    print(
        f"{recipe.name}: {recipe.epochs:g} epochs of {len(dataset.train):,} {dataset.name} images, "
        f"batch {recipe.batch_size}, {recipe.precision}; compiled in {trials.compile_seconds:.1f} s"
    )
    if FLAGS.check:
        trials.check()
        print(CHECKED)
    print(cf.TIMING_RULE)
    if FLAGS.tune:
        print(f"the {len(dataset.validation):,} validation images are read, not the test set")
    else:
        print(f"the {len(dataset.test):,} test images are read once a run, at its end")
    results = []
    for seed in seeds:
        with cf.Progress(
            trials.total_steps,
            steps_per_epoch=trials.steps_per_epoch,
            description=f"{recipe.name}, seed {seed}",
            verbose=FLAGS.progress,
        ) as progress:
            results.append(trials.run(seed, progress=progress))
        print(describe(results[-1]), flush=True)
    if len(results) > 1:
        print(f"mean of {len(results)}: {mean(results, 'accuracy')}, {mean(results, 'seconds')}")


def describe(trial: cf.Trial) -> str:
    """One run in a line."""
    return (
        f"seed {trial.seed}: {trial.read} accuracy {trial.accuracy:.4f} in {trial.seconds:.1f} s, "
        f"{trial.train_seconds:.1f} s of them training"
    )


def mean(trials: list[cf.Trial], name: str) -> str:
    """Mean of a figure; of two runs or more its standard deviation and 95 % confidence interval."""
    found = cf.summarise([getattr(trial, name) for trial in trials])
    form, unit = (".4f", "") if name == "accuracy" else (".1f", " s")
    text = f"{name} {found.mean:{form}}{unit}"
    if found.deviation is None or found.interval is None:
        return text
    low, high = found.interval
    spread = f"sd {found.deviation:{form}}{unit}, 95 % interval {low:{form}} to {high:{form}}{unit}"
    return f"{text} ({spread})"


if __name__ == "__main__":
    cli.run(main)
