"""What checkpoints cost in training time.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --model=lab_final --epochs=2 --rounds=9 --json=cost.json

The same run in three ways that take turns, each a process of its own: with no workdir; with one,
thus with a log and with checkpoints at the default interval; and with a checkpoint every --steps
steps, so many that what one costs is more than the machine's own ups and downs.  Timed is all from
the first compiled call to the end of training: steps, validation, log, checkpoints, the last of
them waited for.  The bar is a ratio of 1.02 at the default interval.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import checkpoint_ways
import harness
from absl import flags

from cifarflow.errors import check_choice, check_float, check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES

FLAGS = flags.FLAGS
KEEPS = ("nothing", "checkpoints", "many")
# Of the time without checkpoints, at the default interval.
GOAL_RATIO = 1.02


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, checked.

    Attributes:
      model: a recipe's name.
      precision: "auto" is the recipe's.
      epochs: of a run.
      steps: from one checkpoint to the next where there are many.
    """

    model: str
    precision: str
    epochs: float
    steps: int


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags()
    flags.DEFINE_string("model", None, "the recipe to train (default lab_cnn; quick: lab_mlp)")
    flags.DEFINE_enum("precision", "auto", PRECISIONS, "auto: the recipe's")
    flags.DEFINE_float("epochs", None, "of a run (default 1; quick: 0.5)")
    flags.DEFINE_integer("steps", None, "between many checkpoints (default 50; quick: 4)")


def make_plan(
    settings: harness.Settings,
    *,
    model: str | None = None,
    precision: str = "auto",
    epochs: float | None = None,
    steps: int | None = None,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if the model or the precision is unknown, or a number out of range.
    """
    quick = settings.quick
    model = check_choice("--model", model or ("lab_mlp" if quick else "lab_cnn"), RECIPES)
    if epochs is None:
        epochs = 0.5 if quick else 1.0
    return Plan(
        model=model,
        precision=check_choice("--precision", precision, PRECISIONS),
        epochs=check_float("--epochs", epochs, above_minimum=True),
        steps=check_int("--steps", steps if steps is not None else (4 if quick else 50)),
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("model", "precision", "epochs", "steps")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


def measure(plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Runs the three ways in turn.

    Returns:
      The figures, as they go into the JSON file.
    """
    recipe = RECIPES[plan.model]
    spec = {
        "way": "keeping",
        "model": plan.model,
        "precision": recipe.precision if plan.precision == "auto" else plan.precision,
        "device": settings.device,
        "examples": settings.count_examples(recipe.batch_size),
        "steps": plan.steps,
        **settings.data_options,
    }
    script = pathlib.Path(checkpoint_ways.__file__)
    found: dict[str, list[float]] = {keeps: [] for keeps in KEEPS}
    with contextlib.ExitStack() as stack:
        workers = {}
        for keeps in KEEPS:
            print(f"{plan.model}, keeping {keeps}: starting", file=sys.stderr)
            child = harness.Worker(f"keeping {keeps}", script, {**spec, "keeps": keeps})
            workers[keeps] = stack.enter_context(child)
        steps_per_epoch = workers["nothing"].facts["steps_per_epoch"]
        steps = max(2, round(plan.epochs * steps_per_epoch))
        for turn in harness.in_turn(KEEPS, rounds=settings.rounds):
            for keeps in turn:
                found[keeps].append(workers[keeps].round(steps))
                print(f"keeping {keeps}: {found[keeps][-1]:.3g} s", file=sys.stderr)
    seconds = {keeps: harness.Samples(tuple(values)) for keeps, values in found.items()}
    return summarise(
        plan, seconds, steps=steps, steps_per_epoch=steps_per_epoch, is_quick=settings.quick
    )


def summarise(
    plan: Plan,
    seconds: Mapping[str, harness.Samples],
    *,
    steps: int,
    steps_per_epoch: int,
    is_quick: bool = False,
) -> dict[str, Any]:
    """Puts the rounds together.

    Args:
      plan: what was measured.
      seconds: of a run in each round, by what it keeps.
      steps: of a run.
      steps_per_epoch: of the recipe.
      is_quick: whether sizes were too tiny to reach or miss the bar.
    """
    nothing = seconds["nothing"]
    ratio = seconds["checkpoints"].over(nothing)
    # The last step has one too, whatever the interval.
    count = -(-steps // plan.steps)
    pairs = zip(seconds["many"].values, nothing.values, strict=True)
    each = harness.Samples(tuple((many - none) / count for many, none in pairs))
    an_epoch = nothing.median * steps_per_epoch / steps
    return {
        "model": plan.model,
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "seconds": {keeps: samples.to_json() for keeps, samples in seconds.items()},
        "ratio": ratio.to_json(),
        "many": {
            "count": count,
            "ratio": seconds["many"].over(nothing).to_json(),
            # No spread: a share of a median that may be nothing.
            "seconds_each": {"median": each.median, "values": list(each.values)},
            "share_of_an_epoch": each.median / an_epoch,
        },
        "goal": None
        if is_quick
        else {"below": GOAL_RATIO, "is_reached": ratio.median < GOAL_RATIO},
    }


def describe(result: dict[str, Any]) -> str:
    """The figures for a reader: a table, what one checkpoint costs, and the bar."""
    labels = {
        "nothing": "no workdir",
        "checkpoints": "workdir, default interval",
        "many": f"workdir, {result['many']['count']} checkpoints",
    }
    ratios = {"checkpoints": result["ratio"], "many": result["many"]["ratio"]}
    rows = []
    for keeps, label in labels.items():
        seconds, ratio = result["seconds"][keeps], ratios.get(keeps)
        rows.append(
            [
                label,
                harness.format_number(seconds["median"]),
                f"{100 * seconds['spread']:.1f} %",
                f"{ratio['median']:.4f}" if ratio else "-",
                f"{ratio['low']:.4f} to {ratio['high']:.4f}" if ratio else "-",
                str(seconds["n"]),
            ]
        )
    many = result["many"]
    header = ["kept", "seconds", "spread", "over none", "range", "n"]
    lines = [
        f"## {result['model']}, runs of {result['steps']:,} steps",
        "",
        harness.format_table(header, rows),
        "",
        f"By many, a checkpoint costs {1e3 * many['seconds_each']['median']:.1f} ms of training: "
        f"one an epoch of {result['steps_per_epoch']:,} steps would be "
        f"{100 * many['share_of_an_epoch']:.2f} % of it",
    ]
    if result["goal"] is not None:
        reached = "reached" if result["goal"]["is_reached"] else "missed"
        lines.append(
            f"ratio at the default interval < {result['goal']['below']:g}: {reached}, "
            f"{result['ratio']['median']:.4f}"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: pathlib.Path, *, about: str) -> None:
    """Draws the seconds of the three ways as bars.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    import bars

    lines = []
    for keeps in KEEPS:
        samples = harness.Samples(tuple(result["seconds"][keeps]["values"]))
        note = f"{samples.median:.2f} s"
        lines.append(bars.Bar(f"keeps {keeps}", samples, note, is_ours=keeps == "checkpoints"))
    group = f"{result['model']}, {result['steps']:,} steps"
    bars.draw_bars({group: lines}, unit="s", title=f"Checkpoints, {about}", path=path)


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    record = harness.begin_record(
        settings,
        plan,
        dataset=harness.load_images(settings, [RECIPES[plan.model].batch_size]),
        how=f"median of {settings.rounds} runs of each way in turn, spread = range of the "
        "quartiles / median",
    )
    result = measure(plan, settings)
    print("\n" + describe(result), flush=True)
    harness.write_outputs(
        settings,
        {**record, "result": result},
        draw=lambda path, about: draw(result, path, about=about),
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
