"""Whether a process grows: many models trained in it one after the other, many epochs of one.

    python benchmarks/leaks.py
    python benchmarks/leaks.py --recipe=fast75 --models=100 --json=leaks.json --plot=leaks.png
    python benchmarks/leaks.py --noclear_session

Each kind is a process of its own, --rounds times.  After every model, and after every epoch, it
notes its resident memory, its threads and its open files.  Growth is counted after a warm-up, a
fifth of all, in which libraries fill what they keep for use again: from the median of the first
tenth after it to that of the last tenth, as memory goes up and down.  The bars: memory less than
1 %, threads and files none.

Between two models stands keras.backend.clear_session(), as Keras asks for where many are made in
one process; --noclear_session leaves it out.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import harness
import leak_ways
from absl import flags

from cifarflow.errors import ConfigError, check_choice, check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES

FLAGS = flags.FLAGS
LABELS = {"models": "models in one process", "epochs": "epochs of one model"}
GOAL_GROWTH = 0.01
_WARM_UP_SHARE, _ENDS_SHARE = 0.2, 0.1
_LEAST = 5  # fewer have no beginning and no end


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run, checked.

    Attributes:
      recipe: its name.
      precision: "auto" is the recipe's.
      counts: how many models, how many epochs.
      examples: training images of an epoch.
      clear_session: whether Keras's is called after each model.
    """

    recipe: str
    precision: str
    counts: dict[str, int]
    examples: int
    clear_session: bool = True


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags(rounds=1)
    flags.DEFINE_string("recipe", None, "what is trained (default lab_cnn; quick: lab_mlp)")
    flags.DEFINE_enum("precision", "auto", PRECISIONS, "auto: the recipe's")
    flags.DEFINE_integer("models", None, "how many (default 50; quick: 5)")
    flags.DEFINE_integer("epochs", None, "how many (default 100; quick: 10)")
    flags.DEFINE_integer("examples", None, "images of an epoch (default 20 batches; quick: 2)")
    flags.DEFINE_boolean("clear_session", True, "call Keras's after each model")


def make_plan(
    settings: harness.Settings,
    *,
    recipe: str | None = None,
    precision: str = "auto",
    models: int | None = None,
    epochs: int | None = None,
    examples: int | None = None,
    clear_session: bool = True,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if the recipe or the precision is unknown, or a number out of range.
    """
    quick = settings.quick
    recipe = check_choice("--recipe", recipe or ("lab_mlp" if quick else "lab_cnn"), RECIPES)
    batch_size = RECIPES[recipe].batch_size
    if examples is None:
        examples = (2 if quick else 20) * batch_size
    if models is None:
        models = 5 if quick else 50
    if epochs is None:
        epochs = 10 if quick else 100
    return Plan(
        recipe=recipe,
        precision=check_choice("--precision", precision, PRECISIONS),
        counts={
            "models": check_int("--models", models, minimum=_LEAST),
            "epochs": check_int("--epochs", epochs, minimum=_LEAST),
        },
        examples=check_int("--examples", examples, minimum=batch_size),
        clear_session=clear_session,
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("recipe", "precision", "models", "epochs", "examples", "clear_session")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


def settled_after(count: int) -> int:
    """After how many of so many growth is counted, at least one."""
    return max(1, round(_WARM_UP_SHARE * count))


def measure(way: str, plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Runs one kind in a new process.

    Returns:
      The figures, as they go into the JSON file.
    """
    recipe = RECIPES[plan.recipe]
    spec = {
        "way": way,
        "model": plan.recipe,
        "precision": recipe.precision if plan.precision == "auto" else plan.precision,
        "count": plan.counts[way],
        "settled": settled_after(plan.counts[way]),
        "examples": plan.examples,
        "clear_session": plan.clear_session,
        "device": settings.device,
        **settings.data_options,
    }
    print(f"{plan.counts[way]} {LABELS[way]}: starting", file=sys.stderr)
    with harness.Worker(LABELS[way], pathlib.Path(leak_ways.__file__), spec) as worker:
        figures = worker.ask("figures")
    return summarise(way, figures, is_quick=settings.quick)


def summarise(way: str, figures: dict[str, Any], *, is_quick: bool = False) -> dict[str, Any]:
    """What has grown.

    Args:
      way: "models" or "epochs".
      figures: what the worker noted.
      is_quick: whether there were too few to reach or miss the bars.
    """
    rows = figures["rows"]
    settled = settled_after(len(rows))
    grown = {}
    for figure in rows[0]:
        values = [row[figure] for row in rows[settled:]]
        ends = max(1, round(_ENDS_SHARE * len(values)))
        grown[figure] = [statistics.median(values[:ends]), statistics.median(values[-ends:])]
    share = grown["rss_bytes"][1] / grown["rss_bytes"][0] - 1
    is_reached = (
        share < GOAL_GROWTH
        and grown["threads"][1] <= grown["threads"][0]
        and grown["handles"][1] <= grown["handles"][0]
    )
    return {
        "way": way,
        "label": LABELS[way],
        "count": len(rows),
        "settled": settled,
        "rows": rows,
        "grown": grown,
        "rss_growth": share,
        "more_objects": figures["more"],
        "goal": None if is_quick else {"below": GOAL_GROWTH, "is_reached": is_reached},
    }


def describe(results: Sequence[dict[str, Any]]) -> str:
    """The figures for a reader: a table, what there are more of, and the bars."""
    header = ["in one process", "n", "warm-up", "MB then", "MB at the end", "growth"]
    header += ["threads", "open files", "Python objects"]
    rows = []
    for result in results:
        grown = result["grown"]
        rows.append(
            [
                result["label"],
                str(result["count"]),
                str(result["settled"]),
                *(f"{value / 1e6:,.1f}" for value in grown["rss_bytes"]),
                f"{100 * result['rss_growth']:+.2f} %",
                *(
                    f"{before:,.0f} to {after:,.0f}"
                    for before, after in (grown[n] for n in ("threads", "handles", "objects"))
                ),
            ]
        )
    lines = ["## Growth after the warm-up", "", harness.format_table(header, rows), ""]
    for result in results:
        kinds = [f"{count:,} {kind}" for kind, count in result["more_objects"].items()]
        lines.append(f"{result['label']}, more objects: {', '.join(kinds) or 'none'}")
        if result["goal"] is not None:
            reached = "reached" if result["goal"]["is_reached"] else "missed"
            lines.append(
                f"{result['label']}: memory < {100 * result['goal']['below']:g} %, threads and "
                f"files +0: {reached}, {100 * result['rss_growth']:+.2f} %"
            )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path, *, about: str) -> None:
    """Draws the resident memory after each model and each epoch.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from panels import drawn_panels

    from cifarflow.reporting.plots import BLUE, MUTED

    title = f"Memory of one process, {about}"
    with drawn_panels(path, len(results), title=title, inches=2.2) as panels:
        for axes, result in zip(panels, results, strict=True):
            values = [row["rss_bytes"] / 1e6 for row in result["rows"]]
            axes.plot(range(1, len(values) + 1), values, ".-", color=BLUE)
            axes.axvline(result["settled"], color=MUTED, linewidth=0.8, linestyle=":")
            growth = f"{100 * result['rss_growth']:+.2f} % after the warm-up"
            axes.set_title(f"{result['label']}, MB resident after each: {growth}")


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    dataset = harness.load_images(settings, [RECIPES[plan.recipe].batch_size])
    if plan.examples > len(dataset.train):
        raise ConfigError(
            f"--examples must be at most the {len(dataset.train)} training images, "
            f"not {plan.examples}"
        )
    record = harness.begin_record(
        settings, plan, dataset=dataset, how="each kind in a process of its own; MB = 10^6 bytes"
    )
    results = [
        measure(way, plan, settings)
        for turn in harness.in_turn(LABELS, rounds=settings.rounds)
        for way in turn
    ]
    print("\n" + describe(results), flush=True)
    harness.write_outputs(
        settings,
        {**record, "results": results},
        draw=lambda path, about: draw(results, path, about=f"{plan.recipe}, {about}"),
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
