"""Trains a recipe with every combination of some settings, ranks them, and draws the ranking.

    python examples/sweep.py --recipe=lab_cnn --sweep learning_rate=0.01,0.02 seed=0..4
    python examples/sweep.py --recipe=lab_cnn --sweep 'augment=none;flip,crop:4' --epochs=2
    python examples/sweep.py --sweep learning_rate=0.01,0.02 --workdir=runs/rates --resume

What follows --sweep is FIELD=VALUE,VALUE,... or FIELD=FIRST..LAST, as often as wanted; where values
have commas themselves, a semicolon parts them.  Other fields are flags, as of train.py.

Settings are ranked by validation accuracy.  Each combination is a run in a folder of its own; with
--resume those that are finished stay and an interrupted one goes on.  Where there are several GPUs,
a process on each takes the next run; --processes=N asks for so many processes.  A run that fails is
told at the end, with exit status 1; the others go on.
"""

from __future__ import annotations

import os
import pathlib
import sys

from absl import flags

import cifarflow as cf
from cifarflow import cli, sweeps
from cifarflow.device import count_gpus
from cifarflow.errors import ConfigError, WorkdirError, check_int

FLAGS = flags.FLAGS
# Some of the runs did not come to their end.
EXIT_FAILED = 1
# Of the training images, to rank by, where the recipe trains on all.
HELD_OUT = 0.1
cli.define_recipe_flags("lab_cnn")
cli.define_run_flags(
    workdir_help="folder of all the runs (default: a new one, runs/sweep-DATE-TIME)"
)
flags.DEFINE_multi_string("sweep", [], "a field and its values, FIELD=VALUE,VALUE,...; repeatable")
flags.DEFINE_integer("processes", 0, "runs at a time, each a process; 0: one for each GPU, or 1")
flags.DEFINE_integer("point", -1, "run this one of the combinations only, counted from 0")


def main(words: list[str]) -> int:
    # A shell's words after --sweep's first are none of a flag.
    grid = sweeps.parse_grid([*FLAGS.sweep, *words])
    recipe = cli.recipe_from_flags()
    if not recipe.validation_fraction and "validation_fraction" not in grid:
        recipe = cf.get_recipe(recipe, validation_fraction=HELD_OUT)
    points = sweeps.make_points(recipe, grid)
    processes = check_int("--processes", FLAGS.processes, minimum=0)
    only = check_int("--point", FLAGS.point, minimum=-1)
    if only >= len(points):
        raise ConfigError(f"--point must be below the {len(points)} combinations, not {only}")
    cli.refuse_several_workers("examples/sweep.py")
    options = cli.run_options_from_flags("sweep")
    workdir = pathlib.Path(options.pop("workdir"))
    if not options["resume"]:
        there = next((point.name for point in points if (workdir / point.name).exists()), None)
        if there is not None and only < 0:
            raise WorkdirError(
                f"workdir {str(workdir)!r} holds a run {there!r} already: add --resume to go on "
                "with the sweep, or give another folder"
            )
    gpus = count_gpus()
    processes = min(processes or max(1, gpus), len(points))
    if processes > 1 and options["strategy"] != "none":
        raise ConfigError(
            f"--strategy must be none with {processes} processes, each of which has one device, "
            f"not {options['strategy']}: --processes=1 gives each run all of them"
        )
    if only >= 0:
        result = sweeps.run_point(points[only], workdir=workdir, **options)
        if result.error:
            raise ConfigError(result.error)
        return 0
    print(f"{len(points)} runs of {recipe.name}, {processes} at a time, in {workdir}")
    if processes > 1:
        results = sweeps.run_processes(
            points,
            workdir=workdir,
            command=lambda place: _command(workdir, place),
            environments=[
                {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {}
                for slot in range(processes)
            ],
        )
    else:
        results = sweeps.run_points(points, workdir=workdir, **options)
    sweeps.write_csv(results, workdir / "results.csv")
    print(f"\n{sweeps.describe(results)}")
    data = dict.fromkeys(result.dataset for result in results if result.dataset)
    # Where every run has failed there is nothing to draw.
    if FLAGS.plots and data:
        ranked = sweeps.rank(results)
        cf.plot_comparison(
            [each.label for each in ranked],
            [
                [r.validation_accuracy for r in each.results if r.validation_accuracy is not None]
                for each in ranked
            ],
            metric="validation accuracy",
            title=f"{recipe.name} on {', '.join(data)}, {len(points)} runs",
            path=workdir / "sweep.png",
        )
    failed = [result for result in results if result.error]
    for result in failed:
        print(f"{result.point.name} failed: {result.error}")
    print(f"all runs are in {workdir}")
    return EXIT_FAILED if failed else 0


def _command(workdir: pathlib.Path, place: int) -> list[str]:
    """This command for one of the combinations."""
    own = [f"--workdir={workdir}", f"--point={place}", "--resume", "--noprogress"]
    return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:], *own]


if __name__ == "__main__":
    cli.run(main)
