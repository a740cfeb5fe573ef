"""What accuracy recipes reach, and on the way there, over seeds: a table and a picture.

    python benchmarks/accuracy.py --recipes=lab_cnn,fast75 --seeds=3 --plot=accuracy.png
    python benchmarks/accuracy.py --recipes=fast75,fast75:precision=float32

A recipe's curve is of images held out of its training set, a tenth if it holds out none itself, and
is evaluated outside the clock without test-time augmentation.  The test set is read once a run, at
its end, as the recipe has it.  The files of --json and --plot are written after each seed.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import trial_report
import trial_runs
from absl import flags

from cifarflow.data.splits import Dataset
from cifarflow.errors import check_int
from cifarflow.evaluation.statistics import summarise
from cifarflow.recipes.recipe import Recipe
from cifarflow.trials import TIMING_RULE, Trial, Trials

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run, checked.

    Attributes:
      recipes: the recipes; each holds out images for its curve.
      seeds: of the runs of each.
      points: of a run's curve.
    """

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    points: int = 10


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags(rounds=3, counts="seeds")
    flags.DEFINE_string(
        "recipes",
        "lab_cnn,fast75",
        "joined by commas; each may change fields, as fast75:epochs=2,precision=float32",
    )
    flags.DEFINE_integer("first_seed", 0, "seed of the first run; the others follow")
    flags.DEFINE_integer("points", 10, "points of a run's curve")


def make_plan(
    *,
    recipes: str,
    seeds: int = 3,
    first_seed: int = 0,
    points: int = 10,
    settings: harness.Settings | None = None,
) -> Plan:
    """Reads the flags.

    Raises:
      ConfigError: if a recipe is unknown or a number out of range.
    """
    settings = settings or harness.Settings()
    chosen = trial_runs.read_recipes("--recipes", recipes)
    return Plan(
        recipes=tuple(trial_runs.adapt(r, settings, held_out=trial_runs.HELD_OUT) for r in chosen),
        seeds=tuple(trial_runs.read_seeds("--seeds", seeds, first_seed)),
        points=check_int("--points", points),
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    return make_plan(
        recipes=FLAGS.recipes,
        seeds=settings.rounds,
        first_seed=FLAGS.first_seed,
        points=FLAGS.points,
        settings=settings,
    )


def measure(
    plan: Plan,
    sets: Sequence[Dataset],
    *,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Runs everything.

    Args:
      plan: what to run.
      sets: the images of each recipe.
      keep: is called with the figures so far after each seed but the last.

    Returns:
      The figures, as they go into the JSON file.
    """
    trials = {
        recipe.name: trial_runs.start(recipe, dataset)
        for recipe, dataset in zip(plan.recipes, sets, strict=True)
    }
    found = trial_runs.run_in_turn(
        {
            name: trial_runs.run_with(each, curve_epochs=each.recipe.epochs / plan.points)
            for name, each in trials.items()
        },
        seeds=plan.seeds,
        keep=lambda found: keep(_result(trials, found, sets, is_complete=False)),
    )
    return _result(trials, found, sets, is_complete=True)


def _result(
    trials: Mapping[str, Trials],
    found: Mapping[str, Sequence[Trial]],
    sets: Sequence[Dataset],
    *,
    is_complete: bool,
) -> dict[str, Any]:
    """The figures of the runs that there are, which are as many of each recipe."""
    rows = []
    for (name, each), dataset in zip(trials.items(), sets, strict=True):
        runs = found[name]
        summaries = {
            figure: dataclasses.asdict(summarise([getattr(run, figure) for run in runs]))
            for figure in ("accuracy", "seconds")
        }
        rows.append({**trial_runs.to_json(each, runs, dataset), **summaries})
    return {"timing_rule": TIMING_RULE, "complete": is_complete, "recipes": rows}


def main() -> None:
    settings = harness.settings_from_flags(counts="seeds")
    plan = plan_from_flags(settings)
    sets = trial_runs.load_sets(plan.recipes, settings)
    trial_runs.check_same_images(plan.recipes, sets, read="test")
    record = harness.begin_record(
        settings,
        plan,
        dataset=sets[0],
        how=f"{trial_report.describe_seeds(plan.seeds)}; "
        f"{trial_runs.describe_reading(sets, read='test')}",
    )
    print(f"{TIMING_RULE}\n", flush=True)

    def write(result: dict[str, Any]) -> None:
        def draw(path: pathlib.Path, about: str) -> None:
            # Plotting is loaded here: whoever wants no picture does not wait for it.
            import trial_plots

            trial_plots.draw_curves(result, path, about=about)

        harness.write_outputs(settings, {**record, "result": result}, draw=draw)

    result = measure(plan, sets, keep=write)
    print("\n" + trial_report.describe_accuracy(result), flush=True)
    write(result)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
