"""Our own loop against Keras `fit`: same weights, same batches, same losses? And the time.

    python benchmarks/fit_parity.py
    python benchmarks/fit_parity.py --models=lab_cnn --steps=200 --fit_optimizer=keras
    python benchmarks/fit_parity.py --json=parity.json --plot=parity.png

Each lab net begins with the same weights and gets the same batches in `fit` and in our loop, there
with Keras's own layers (fused=False) and with the fused kernels that are the default.  Compared are
the losses of each of the first steps, in float32 unless --precision says otherwise; then the three
take turns, and their seconds a step are compared round by round.

Both sides use our SGD unless --fit_optimizer=keras.  Keras's own rounds its last digit differently,
and so do the fused kernels: through BatchNorm and max pooling over equal pixels that much becomes a
different run within some steps.  So the bar is for equal layers and equal optimisers.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import fit_ways
import harness
from absl import flags

from cifarflow.errors import check_choice, check_float, check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES

FLAGS = flags.FLAGS
# Without dropout, lab_dropout is lab_cnn.
NETS = ("lab_mlp", "lab_cnn", "lab_batchnorm", "lab_final")
OPTIMIZERS = ("ours", "keras")
LABELS = {"loop": "Keras's layers", "loop_fused": "fused"}
# The largest difference of a loss in float32, equal layers and optimisers, in the first 50 steps.
GOAL_DIFFERENCE, GOAL_STEPS = 1e-4, 50


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared, checked.

    Attributes:
      models: names in `NETS`.
      precision: of all ways.
      fit_optimizer: "ours" or "keras", that of `fit`.
      steps: whose losses are compared.
      seconds_a_round: how long a turn of the timing takes.
    """

    models: tuple[str, ...]
    precision: str
    fit_optimizer: str
    steps: int
    seconds_a_round: float


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags()
    flags.DEFINE_string("models", None, f"of {', '.join(NETS)} (default: all; quick: lab_mlp)")
    flags.DEFINE_enum("precision", "float32", PRECISIONS, "of all ways; auto: the recipe's")
    flags.DEFINE_enum("fit_optimizer", "ours", OPTIMIZERS, "fit's SGD: ours, or Keras's own")
    flags.DEFINE_integer("steps", None, f"whose losses are compared (default {GOAL_STEPS})")
    flags.DEFINE_float("seconds_a_round", None, "of one turn of one way (default 1; quick: 0.1)")


def make_plan(
    settings: harness.Settings,
    *,
    models: str | None = None,
    precision: str = "float32",
    fit_optimizer: str = "ours",
    steps: int | None = None,
    seconds_a_round: float | None = None,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if a name is unknown, or a number out of range.
    """
    quick = settings.quick
    models = models or ("lab_mlp" if quick else ",".join(NETS))
    if seconds_a_round is None:
        seconds_a_round = 0.1 if quick else 1.0
    return Plan(
        models=harness.parse_choices("--models", models, NETS),
        precision=check_choice("--precision", precision, PRECISIONS),
        fit_optimizer=check_choice("--fit_optimizer", fit_optimizer, OPTIMIZERS),
        steps=check_int("--steps", steps if steps is not None else GOAL_STEPS),
        seconds_a_round=check_float("--seconds_a_round", seconds_a_round, above_minimum=True),
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("models", "precision", "fit_optimizer", "steps", "seconds_a_round")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


def measure(model: str, plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Compares the ways of training one net.

    Returns:
      The figures, as they go into the JSON file.
    """
    script = pathlib.Path(fit_ways.__file__)
    recipe = RECIPES[model]
    spec = {
        "model": model,
        "precision": plan.precision if plan.precision != "auto" else recipe.precision,
        "fit_optimizer": plan.fit_optimizer,
        "device": settings.device,
        "examples": settings.count_examples(recipe.batch_size),
        **settings.data_options,
    }
    with contextlib.ExitStack() as stack:
        workers = {}
        for way in fit_ways.WAYS:
            print(f"{model}: starting {way}", file=sys.stderr)
            child = harness.Worker(f"{way} of {model}", script, {**spec, "way": way})
            workers[way] = stack.enter_context(child)
        losses = {way: each.ask("losses", steps=plan.steps) for way, each in workers.items()}
        seconds = harness.interleave(
            workers, rounds=settings.rounds, seconds_a_round=plan.seconds_a_round
        )
    return summarise(model, plan, losses, seconds, is_quick=settings.quick)


def summarise(
    model: str,
    plan: Plan,
    losses: Mapping[str, Sequence[float]],
    seconds: Mapping[str, harness.Samples],
    *,
    is_quick: bool = False,
) -> dict[str, Any]:
    """Puts the figures of one net together.

    Args:
      model: the net.
      plan: what was compared.
      losses: of the first steps, by way.
      seconds: a step, by way.
      is_quick: whether the times are worth nothing.
    """
    theirs = losses["fit"]
    loops: list[dict[str, Any]] = []
    for way in LABELS:
        differences = [abs(a - b) for a, b in zip(losses[way], theirs, strict=True)]
        largest = max(differences)
        loops.append(
            {
                "way": way,
                "label": LABELS[way],
                "largest_difference": largest,
                "at_step": differences.index(largest) + 1,
                "differences": differences,
                "seconds_a_step": seconds[way].to_json(),
                "fit_over_loop": seconds["fit"].over(seconds[way]).to_json(),
            }
        )
    has_bar = (plan.precision, plan.fit_optimizer) == ("float32", "ours")
    has_bar = has_bar and plan.steps <= GOAL_STEPS
    is_reached = loops[0]["largest_difference"] <= GOAL_DIFFERENCE
    return {
        "model": model,
        "losses": list(theirs),
        "fit_seconds_a_step": seconds["fit"].to_json(),
        "loops": loops,
        "times_count": not is_quick,
        "goal": {"at_most": GOAL_DIFFERENCE, "is_reached": is_reached} if has_bar else None,
    }


def describe(results: Sequence[dict[str, Any]], *, steps: int) -> str:
    """The figures for a reader: a table, and the bar."""
    header = ["net", "our loop", "first loss", "last loss", "largest difference", "at step"]
    header += ["fit ms/step", "loop ms/step", "fit / loop", "spread", "n"]
    rows = []
    for result in results:
        for loop in result["loops"]:
            ratio = loop["fit_over_loop"]
            rows.append(
                [
                    result["model"],
                    loop["label"],
                    f"{result['losses'][0]:.4f}",
                    f"{result['losses'][-1]:.4f}",
                    f"{loop['largest_difference']:.1e}",
                    str(loop["at_step"]) if loop["largest_difference"] else "-",
                    harness.format_number(1e3 * result["fit_seconds_a_step"]["median"]),
                    harness.format_number(1e3 * loop["seconds_a_step"]["median"]),
                    f"{ratio['median']:.2f}",
                    f"{100 * ratio['spread']:.1f} %",
                    str(ratio["n"]),
                ]
            )
    lines = [f"## Losses of the first {steps} steps, and seconds a step", ""]
    lines += [harness.format_table(header, rows), ""]
    for result in results:
        if result["goal"] is not None:
            reached = "reached" if result["goal"]["is_reached"] else "missed"
            lines.append(
                f"{result['model']}, equal layers: largest difference at most "
                f"{result['goal']['at_most']:g}: {reached}, "
                f"{result['loops'][0]['largest_difference']:.1e}"
            )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path, *, about: str) -> None:
    """Draws the difference of the losses at each step, a panel a net.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from matplotlib.ticker import FuncFormatter, NullFormatter
    from panels import drawn_panels

    from cifarflow.reporting.plots import BLUE, MUTED

    title = f"Losses of our loop against fit, {about}"
    with drawn_panels(path, len(results), title=title, inches=1.9) as panels:
        for axes, result in zip(panels, results, strict=True):
            for loop, colour in zip(result["loops"], (BLUE, MUTED), strict=True):
                # No difference at all has no place on a scale of powers.
                values = [max(value, 1e-9) for value in loop["differences"]]
                steps = range(1, len(values) + 1)
                axes.plot(steps, values, ".-", color=colour, label=loop["label"])
            axes.axhline(GOAL_DIFFERENCE, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{result['model']}: difference of the loss")
        panels[0].legend(loc="best")
        panels[-1].set_xlabel("step")


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    sizes = [RECIPES[model].batch_size for model in plan.models]
    record = harness.begin_record(
        settings,
        plan,
        dataset=harness.load_images(settings, sizes),
        how=f"median of {settings.rounds} rounds in turn, spread = range of the quartiles / median",
    )
    results: list[dict[str, Any]] = []
    for model in plan.models:
        results.append(measure(model, plan, settings))
        # Whoever interrupts it keeps what has been measured.
        harness.write_outputs(
            settings,
            {**record, "results": results},
            draw=lambda path, about: draw(results, path, about=about),
        )
    print("\n" + describe(results, steps=plan.steps), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
