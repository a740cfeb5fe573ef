"""How much memory a whole run takes, and whether it grows, against the notebook's way.

    python benchmarks/memory.py
    python benchmarks/memory.py --model=lab_final --rounds=3 --json=memory.json --plot=memory.png
    python benchmarks/memory.py --precision=float32       # float32 against float32

The peak is of one epoch on all images, with validation and test.  Growth is what the process has
more after the last of --epochs epochs than after the third: the first ones fill what the libraries
keep for use again.  Every run is a process of its own, and they take turns; the ways are described
in `memory_ways.py`.  The notebook's way is its own, a fit in float32; ours computes in the recipe's
precision, which for most is bfloat16 on CPUs that have it, unless --precision says otherwise.  On a
GPU too this is the memory of the host.
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
import memory_report
import memory_ways
from absl import flags

from cifarflow.errors import ConfigError, check_choice, check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES

FLAGS = flags.FLAGS
# Growth is counted from the end of this epoch on.
SETTLED_EPOCH = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, checked.

    Attributes:
      model: a recipe's name.
      precision: of our runs; "auto" is the recipe's.  The notebook's way is float32.
      epochs: of the runs that show growth.
      growth_examples: images of an epoch of these.
      growth_rounds: how many of these each way runs.
    """

    model: str
    precision: str
    epochs: int
    growth_examples: int
    growth_rounds: int = 1


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags()
    flags.DEFINE_string("model", "lab_cnn", f"the recipe to train, one of {', '.join(RECIPES)}")
    flags.DEFINE_enum(
        "precision",
        "auto",
        PRECISIONS,
        "of our runs; auto: the recipe's. The notebook's way is float32",
    )
    flags.DEFINE_integer("epochs", None, "of the runs that show growth (default 20; quick: 4)")
    flags.DEFINE_integer(
        "growth_examples", None, "images of an epoch of these (default 6400; quick: 64)"
    )
    flags.DEFINE_integer("growth_rounds", 1, "how many of these each way runs")


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    epochs, examples = FLAGS.epochs, FLAGS.growth_examples
    return make_plan(
        model=FLAGS.model,
        precision=FLAGS.precision,
        epochs=epochs if epochs is not None else (4 if settings.quick else 20),
        growth_examples=examples if examples is not None else (64 if settings.quick else 6400),
        growth_rounds=FLAGS.growth_rounds,
    )


def make_plan(
    *,
    model: str = "lab_cnn",
    precision: str = "auto",
    epochs: int = 20,
    growth_examples: int = 6400,
    growth_rounds: int = 1,
) -> Plan:
    """Checks the flags.

    Raises:
      ConfigError: if the model or the precision is unknown, or a number out of range.
    """
    model = check_choice("--model", model, RECIPES)
    return Plan(
        model=model,
        precision=check_choice("--precision", precision, PRECISIONS),
        epochs=check_int("--epochs", epochs, minimum=SETTLED_EPOCH + 1),
        growth_examples=check_int(
            "--growth_examples", growth_examples, minimum=RECIPES[model].batch_size
        ),
        growth_rounds=check_int("--growth_rounds", growth_rounds),
    )


def make_specs(
    plan: Plan, settings: harness.Settings, *, epochs: int, examples: int
) -> dict[str, dict[str, Any]]:
    """What each worker is told, by way."""
    recipe = RECIPES[plan.model]
    common = {
        "model": plan.model,
        "precision": recipe.precision if plan.precision == "auto" else plan.precision,
        "epochs": epochs,
        "examples": examples,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "device": settings.device,
        **settings.data_options,
    }
    return {way: {**common, "way": way} for way in memory_ways.WAYS}


def run_in_turn(
    specs: dict[str, dict[str, Any]], *, rounds: int, what: str
) -> dict[str, list[dict[str, Any]]]:
    """Runs each way in a new process, again and again; every second time in reverse.

    Args:
      specs: what each worker is told, by way.
      rounds: how often.
      what: what is measured, for messages.

    Returns:
      The figures of each run, by way.
    """
    script = pathlib.Path(memory_ways.__file__)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in specs}
    for turn in harness.in_turn(specs, rounds=rounds):
        for way in turn:
            name = f"{memory_report.LABELS[way]}, {what}"
            with harness.Worker(name, script, specs[way]) as worker:
                seconds = worker.facts["seconds_to_first_step"]
                print(f"{name}: {seconds:.1f} s", file=sys.stderr)
                found[way].append({**worker.ask("figures"), "seconds": seconds})
    return found


def measure(plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Measures peak and growth of both ways.

    Returns:
      The figures, as they go into the JSON file.
    """
    growth_specs = make_specs(plan, settings, epochs=plan.epochs, examples=plan.growth_examples)
    if settings.quick:
        # One process for both: most of its time is TensorFlow's start.
        runs = run_in_turn(growth_specs, rounds=settings.rounds, what="peak and growth")
        return summarise(plan, runs, runs, is_quick=True)
    peak_specs = make_specs(plan, settings, epochs=1, examples=0)
    peaks = run_in_turn(peak_specs, rounds=settings.rounds, what="peak")
    growths = run_in_turn(growth_specs, rounds=plan.growth_rounds, what="growth")
    return summarise(plan, peaks, growths)


def summarise(
    plan: Plan,
    peaks: dict[str, list[dict[str, Any]]],
    growths: dict[str, list[dict[str, Any]]],
    *,
    is_quick: bool = False,
) -> dict[str, Any]:
    """Puts the runs together.

    Args:
      plan: what was measured.
      peaks: the figures of each run over one epoch, by way.
      growths: those of each run over many.
      is_quick: whether sizes were too tiny to reach or miss the goal.
    """
    totals = {way: _samples(runs, "peak_bytes") for way, runs in peaks.items()}
    alone = {way: _samples(runs, "alone_bytes") for way, runs in peaks.items()}
    above = {
        way: harness.Samples(
            tuple(p - a for p, a in zip(totals[way].values, alone[way].values, strict=True))
        )
        for way in peaks
    }
    rows = []
    for way, runs in peaks.items():
        series = [run["epochs_bytes"] for run in growths[way]]
        grown = [epochs[-1] - epochs[SETTLED_EPOCH - 1] for epochs in series]
        rows.append(
            {
                "way": way,
                "label": memory_report.LABELS[way],
                "precision": runs[0]["precision"],
                "steps": runs[0]["steps"],
                "test_accuracy": [run["test_accuracy"] for run in runs],
                "seconds": _samples(runs, "seconds").to_json(),
                "alone_bytes": alone[way].to_json(),
                "peak_bytes": totals[way].to_json(),
                "above_bytes": above[way].to_json(),
                "epochs_bytes": series,
                # No spread: a share of a median that may be nothing.
                "growth_bytes": {
                    "n": len(grown),
                    "median": statistics.median(grown),
                    "low": min(grown),
                    "high": max(grown),
                    "values": grown,
                    # What goes on growing does so here too; what settles late does not.
                    "second_half": statistics.median(
                        [epochs[-1] - epochs[len(epochs) // 2 - 1] for epochs in series]
                    ),
                },
            }
        )
    total = totals["cifarflow"].over(totals["notebook"])
    result: dict[str, Any] = {
        "model": plan.model,
        "settled_epoch": SETTLED_EPOCH,
        "epochs": plan.epochs,
        "steps_per_epoch": plan.growth_examples // RECIPES[plan.model].batch_size,
        "ways": rows,
        "share_of_total": total.to_json(),
        "share_above": above["cifarflow"].over(above["notebook"]).to_json(),
    }
    is_reached = total.median < memory_report.GOAL_SHARE
    goal = {"below": memory_report.GOAL_SHARE, "is_reached": is_reached}
    return {**result, "goal": None if is_quick else goal}


def _samples(runs: Sequence[dict[str, Any]], figure: str) -> harness.Samples:
    return harness.Samples(tuple(run[figure] for run in runs))


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    dataset = harness.load_images(settings, [RECIPES[plan.model].batch_size])
    if plan.growth_examples > len(dataset.train):
        raise ConfigError(
            f"--growth_examples must be at most the {len(dataset.train)} training images, "
            f"not {plan.growth_examples}"
        )
    record = harness.begin_record(
        settings,
        plan,
        dataset=dataset,
        how=f"median of {settings.rounds} processes in turn, spread = range of the quartiles / "
        "median; MB = 10^6 bytes resident",
    )
    result = measure(plan, settings)
    print("\n" + memory_report.describe(result), flush=True)
    harness.write_outputs(
        settings,
        {**record, "result": result},
        draw=lambda path, about: memory_report.draw(result, path, about=f"{plan.model}, {about}"),
    )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
