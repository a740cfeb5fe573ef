"""Trains a recipe with several seeds, and says what the models reach alone and together.

    python examples/ensemble.py --recipe=fast75 --members=5
    python examples/ensemble.py --recipe=fast94 --members=3 --workdir=runs/three
    python examples/ensemble.py --recipe=fast94 --members=3 --workdir=runs/three --resume

All members share one compiled step, and each reads the test set once, at its end; with --tune it
is images held out of the training set, so that settings can be chosen without the test set.
"""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import ConfigError, check_int, check_seed

FLAGS = flags.FLAGS
cli.define_recipe_flags("fast75")
flags.DEFINE_string(
    "data_dir", None, "where the data is, a file or folder (default: search, see README)"
)
flags.DEFINE_integer("members", 5, "models, with seeds --seed, --seed+1, ...")
flags.DEFINE_boolean("tune", False, "read validation images, not the test set")
flags.DEFINE_string(
    "workdir", None, "the folder (default: a new one, runs/ensemble-RECIPE-DATE-TIME-PID)"
)
flags.DEFINE_boolean("resume", False, "go on after the last whole member in --workdir")
flags.DEFINE_boolean("plots", True, "draw the picture")
flags.DEFINE_boolean("progress", True, "show progress on stderr")


def main() -> None:
    recipe = cli.recipe_from_flags()
    check_seed(recipe.seed + check_int("--members", FLAGS.members) - 1)
    if FLAGS.tune and not recipe.validation_fraction:
        recipe = cf.get_recipe(recipe, validation_fraction=0.1)
    for flag in ("workdir", "data_dir"):
        path = FLAGS[flag].value
        if path is not None and not path.strip():
            raise ConfigError(f"--{flag} must be a path, not {path!r}")
    if FLAGS.resume and not FLAGS.workdir:
        raise ConfigError("--resume needs --workdir: the folder of the ensemble to go on with")
    if FLAGS.workdir is None:
        # Kept in the flag, so that the command to go on can name it.
        started = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        FLAGS["workdir"].value = f"runs/ensemble-{recipe.name}-{started}"
    dataset = cf.load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    ensemble = cf.train_ensemble(
        recipe,
        FLAGS.members,
        read="validation" if FLAGS.tune else "test",
        dataset=dataset,
        workdir=FLAGS.workdir,
        resume=FLAGS.resume,
        progress=cf.Progress if FLAGS.progress else None,
    )
    print(table(ensemble, dataset))
    if FLAGS.plots:
        path = pathlib.Path(FLAGS.workdir).expanduser() / "ensemble.png"
        cf.plot_ensemble(
            [member.accuracy.augmented for member in ensemble.members],
            [together.average.augmented for together in ensemble.by_size],
            [together.vote.augmented for together in ensemble.by_size],
            metric=f"{ensemble.read} accuracy, with TTA",
            title=f"{len(ensemble.members)} of {recipe.name}, {dataset.name}",
            path=path,
        )
        print(f"picture: {path}")


def table(ensemble: cf.Ensemble, dataset: cf.Dataset) -> str:
    """What each member reached, and all together, as a Markdown table."""
    recipe, size = ensemble.recipe, len(ensemble.members)
    images = dataset.test if ensemble.read == "test" else dataset.validation
    lines = [
        f"{size} of {recipe.name} on {dataset.name}: {ensemble.read} accuracy on {len(images):,} "
        f"images, in {recipe.precision}; TTA is {recipe.tta} of {recipe.tta_share:.0%}",
        "",
        "| model | one view | with TTA | seconds of training | resident MB after it |",
        "|---|---:|---:|---:|---:|",
    ]
    for member in ensemble.members:
        memory = member.resident_bytes
        lines.append(
            row(
                f"seed {member.seed}",
                member.accuracy,
                f"{member.train_seconds:.1f}",
                "-" if memory is None else f"{memory / 1e6:,.0f}",
            )
        )
    seconds = f"{sum(member.train_seconds for member in ensemble.members):.1f}"
    mean = sum(member.train_seconds for member in ensemble.members) / size
    lines.append(row("one, on average", ensemble.one, f"{mean:.1f}"))
    lines.append(row(f"{size} by average", ensemble.average, seconds))
    lines.append(row(f"{size} by vote", ensemble.vote, seconds))
    lines.append(
        f"\none {ensemble.one[0]:.4f}, {size} by average {ensemble.average[0]:.4f}, {size} by "
        f"average with TTA {ensemble.average[1]:.4f}; all files in {ensemble.workdir}"
    )
    return "\n".join(lines)


def row(name: str, accuracy: Sequence[float], seconds: str, memory: str = "") -> str:
    """A line of the table."""
    plain, augmented = accuracy
    return f"| {name} | {plain:.4f} | {augmented:.4f} | {seconds} | {memory} |"


if __name__ == "__main__":
    cli.run(main)
