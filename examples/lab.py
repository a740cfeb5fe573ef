"""The whole lab: its five models in the notebook's order, a table against its numbers, the plots.

    python examples/lab.py                          # an hour on two cores without a GPU
    python examples/lab.py --epochs=1               # a first look
    python examples/lab.py --seeds=3 --workdir=runs/lab --resume

Each run has its own folder in the workdir, RECIPE-SEED; with --resume finished ones are kept and
an interrupted one goes on.  The runs of a recipe with several seeds are an ensemble too: what they
reach together is printed below the table.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

import cifarflow as cf
from cifarflow import cli
from cifarflow.errors import check_int

FLAGS = flags.FLAGS
cli.define_recipe_flags(None)
cli.define_run_flags(workdir_help="folder of all the runs (default: a new one, runs/lab-DATE-TIME)")
flags.DEFINE_list("recipes", None, "which of the lab's recipes to run (default: all five)")
flags.DEFINE_integer("seeds", 1, "runs of each recipe, with seeds --seed, --seed+1, ...")


class Notebook(NamedTuple):
    """What the notebook reached, one run each, and the bar it set."""

    section: str
    test_loss: float
    test_accuracy: float
    bar: float | None


NOTEBOOK: Mapping[str, Notebook] = {
    "lab_mlp": Notebook("2", 1.462, 0.485, 0.45),
    "lab_cnn": Notebook("3", 0.997, 0.663, 0.62),
    "lab_dropout": Notebook("4.1", 0.998, 0.653, None),
    "lab_batchnorm": Notebook("4.2", 0.875, 0.701, None),
    "lab_final": Notebook("5", 0.698, 0.758, 0.75),
}


def main() -> None:
    check_int("--seeds", FLAGS.seeds)
    names = [cf.get_recipe(name).name for name in dict.fromkeys(FLAGS.recipes or NOTEBOOK)]
    changes = cli.recipe_changes()
    # Every recipe is made before any is run: a bad flag must not be found out an hour later.
    chosen = [cf.get_recipe(name, **changes) for name in names]
    cli.refuse_several_workers("examples/lab.py")
    options = cli.run_options_from_flags("lab")
    workdir = pathlib.Path(options.pop("workdir"))
    dataset = cf.load_recipe_data(chosen[0], data_dir=options.pop("data_dir"))
    summaries: dict[str, list[dict[str, Any]]] = {}
    outputs: dict[str, list[Any]] = {}
    for recipe in chosen:
        for seed in range(recipe.seed, recipe.seed + FLAGS.seeds):
            run = cf.train_recipe(
                recipe,
                seed=seed,
                dataset=dataset,
                workdir=workdir / f"{recipe.name}-{seed}",
                **options,
            )
            if seed == recipe.seed:
                print(cf.model_summary(run.model))
            cli.print_summary(run)
            if FLAGS.plots:
                cli.draw_and_print(run, dataset)
            summaries.setdefault(recipe.name, []).append(run.summary)
            outputs.setdefault(recipe.name, []).append(run.test_outputs)
    print(f"\n{table(summaries, dataset)}")
    for name, found in outputs.items():
        # Of a finished run that was shown again, the file with them may have been removed.
        if FLAGS.seeds > 1 and not any(part is None for part in found):
            print(together(name, cf.combine_outputs(found), dataset))
    if FLAGS.plots:
        # At the end: a run that is refused must leave the folder as it was.
        cf.plot_random_from_each_class(
            dataset.train.images,
            dataset.train.labels,
            class_names=dataset.class_names,
            seed=0,
            title=dataset.name,
            path=workdir / "random_from_each_class.png",
        )
        cf.plot_comparison(
            list(summaries),
            [[run["test_accuracy"] for run in runs] for runs in summaries.values()],
            reference=[getattr(NOTEBOOK.get(n), "test_accuracy", None) for n in summaries],
            reference_name="the notebook, on CIFAR-10",
            title=f"The lab on {dataset.name}",
            path=workdir / "comparison.png",
        )
        print(f"\nall pictures and runs are in {workdir}")


def together(name: str, found: cf.Combined, dataset: cf.Dataset) -> str:
    """What the runs of a recipe reach as an ensemble, in a line."""
    by_average, by_vote = (
        (predicted == dataset.test.labels).mean() for predicted in (found.by_average, found.by_vote)
    )
    return (
        f"{found.members} of {name} as an ensemble: test accuracy {by_average:.4f} by average of "
        f"probabilities, {by_vote:.4f} by majority vote"
    )


def table(summaries: Mapping[str, list[dict[str, Any]]], dataset: cf.Dataset) -> str:
    """The lab's results beside the notebook's, as a Markdown table."""
    lines = [
        f"| section | recipe | parameters | epochs | runs | test loss | test accuracy "
        f"({dataset.name}) | notebook, on CIFAR-10 | its bar | seconds of training |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in summaries.items():
        mean = {
            key: sum(run[key] for run in runs) / len(runs)
            for key in ("test_loss", "test_accuracy", "train_seconds")
        }
        theirs = NOTEBOOK.get(name)
        lines.append(
            f"| {theirs.section if theirs else '-'} | {name} | {runs[0]['parameters']:,} "
            f"| {runs[0]['epochs']:g} | {len(runs)} | {mean['test_loss']:.3f} "
            f"| {mean['test_accuracy']:.3f} "
            f"| {f'{theirs.test_accuracy:.3f}' if theirs else '-'} "
            f"| {theirs.bar if theirs and theirs.bar else '-'} "
            f"| {mean['train_seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
