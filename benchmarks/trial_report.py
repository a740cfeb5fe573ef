"""What the benchmarks of whole runs say of their figures, for a reader.

    print(describe(result))

A result is what `time_to_accuracy.measure` returns; `describe_accuracy` takes that of `accuracy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
import trial_statistics


def describe_seeds(seeds: Sequence[int]) -> str:
    """How many runs there are, and their seeds."""
    if len(seeds) == 1:
        return f"one run, seed {seeds[0]}"
    return f"{len(seeds)} runs of each, in turn, seeds {seeds[0]} to {seeds[-1]}"


def describe(result: dict[str, Any]) -> str:
    """The runs, what they come to, and what can be said of two recipes."""
    recipes = result["recipes"]
    lines = [_runs(recipes), "", _summaries(recipes)]
    lines.append("")
    for row in recipes:
        if row["bar"] is not None:
            n = len(row["runs"])
            reached = round(row["share_that_reach_it"] * n)
            lines.append(f"{row['name']}: {reached} of {n} runs reach {row['bar']:g}")
    for verdict in result["verdicts"]:
        lines.append(f"{verdict['measure']}: {verdict['sentence']}")
    if result["notebook"] is not None:
        lines += _notebook(result["notebook"], recipes[0])
    return "\n".join(lines)


def describe_accuracy(result: dict[str, Any]) -> str:
    """What the runs come to, a line a recipe, and what was read for it."""
    recipes = result["recipes"]
    lines = [_summaries(recipes), ""]
    for row in recipes:
        examples = row["examples"]
        lines.append(
            f"{row['name']}: trained on {examples['train']:,} images, {row['recipe']['epochs']:g} "
            f"epochs in {row['recipe']['precision']}; its curve is of {examples['validation']:,} "
            "images held out of the training set"
        )
    return "\n".join([*lines, ""])


def _runs(recipes: Sequence[dict[str, Any]]) -> str:
    """A line a run, in the order of the seeds."""
    header = ["recipe", "seed", "seconds", "of them training", "accuracy", "loss", "weights"]
    pairs = [(row["name"], run) for row in recipes for run in row["runs"]]
    return harness.format_table(
        header,
        [
            [
                name,
                str(run["seed"]),
                f"{run['seconds']:,.2f}",
                f"{run['train_seconds']:,.2f}",
                f"{run['accuracy']:.4f}",
                f"{run['loss']:.4f}",
                run["weights_sha256"][:8],
            ]
            for name, run in pairs
        ],
    )


def _summaries(recipes: Sequence[dict[str, Any]]) -> str:
    """A line a recipe: mean, standard deviation and interval of accuracy and time."""
    read = recipes[0]["read"]
    header = ["recipe", "n", f"{read} accuracy", "sd", "95 % interval"]
    header += ["seconds", "sd", "95 % interval"]
    rows = []
    for row in recipes:
        accuracy = _summary(row["accuracy"], ".4f")
        rows.append(
            [row["name"], str(len(row["runs"])), *accuracy, *_summary(row["seconds"], ",.2f")]
        )
    return harness.format_table(header, rows)


def _summary(summary: dict[str, Any], form: str) -> list[str]:
    """Mean, standard deviation and interval as text; of one run there is only the mean."""
    mean = f"{summary['mean']:{form}}"
    if summary["deviation"] is None:
        return [mean, "-", "-"]
    low, high = summary["interval"]
    return [mean, f"{summary['deviation']:{form}}", f"{low:{form}} to {high:{form}}"]


def _notebook(notebook: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """How many times as fast as the notebook's way ours is, and how that was measured."""
    step, ratio = notebook["seconds_a_step"], notebook["ratio"]
    mine, estimate = (notebook[name]["median"] for name in ("our_seconds", "estimated_seconds"))
    show = trial_statistics.SECONDS.show
    lines = [
        f"{ours['name']} is {ratio['median']:.1f} times as fast as the notebook's way: median "
        f"{show(mine)} against {show(estimate)} ({_range(ratio, '.1f')} in {ratio['n']} pairs)",
        f"the notebook's time is a measured step times {notebook['epochs']} epochs, not a full "
        f"run: {notebook['recipe']} by Keras fit in float32, "
        f"{1000 * step['median']:.3g} ms a step ({_range(step, '.3g', 1000)} in {step['n']} turns "
        f"between our runs), times {notebook['steps']:,} steps; tracing, validation and test are "
        "left out",
    ]
    full = notebook["full_run"]
    if full is not None:
        lines.append(
            "one full run of it, with the tracing and the validation after each epoch, took "
            f"{show(full['seconds'])}, {notebook['ratio_of_full_run']:.1f} times ours, and came "
            f"to {full['accuracy']:.4f} on the test images"
        )
    return lines


def _range(samples: dict[str, Any], form: str, scale: float = 1) -> str:
    return f"{scale * samples['low']:{form}} to {scale * samples['high']:{form}}"
