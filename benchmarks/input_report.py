"""What `input_pipeline.py` says of its figures: ratios, goals, the text for a reader, the picture.

    print(describe(result))
    draw(results, pathlib.Path("input.png"), about="cifar10, two cores")

A result is what `input_pipeline.measure` returns.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import harness

LABELS = {
    "cifarflow_drawn": "cifarflow, drawn in the step",
    "cifarflow": "cifarflow, tf.data",
    "cifarflow_python": "cifarflow, tf.data, Python loop",
    "tf_data": "tf.data, example by example",
    "keras_layers": "Keras layers",
    "keras_crop": "Keras layers, one crop a batch",
    "copy": "bare copy",
}
# What the training loop can draw its batches by; a loop in Python is for users.
_OURS = ("cifarflow_drawn", "cifarflow")
GOAL_BATCH_SIZE = 512
GOALS = {"plain": 1_000_000, "augmented": 150_000}  # images/s
GOAL_OVER_KERAS = 10.0
# What these goals are about; another augmentation is another thing.
GOAL_AUGMENT = {"flip", "crop:4"}


def ratios(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How many times as fast as each other way the faster of our compiled ways is.

    Args:
      rows: one for each way and kind, as `input_pipeline.measure` makes them.

    Yields:
      `kind`, `ours` and `against` (ways) and `ratio`: the time of theirs over the time of ours,
      round by round.
    """
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ours = _best(rows, kind)
        for row in rows:
            if ours is not None and row["kind"] == kind and row["way"] != ours["way"]:
                ratio = _samples(row, "seconds_a_batch").over(_samples(ours, "seconds_a_batch"))
                yield {
                    "kind": kind,
                    "ours": ours["way"],
                    "against": row["way"],
                    "ratio": ratio.to_json(),
                }


def _best(rows: Iterable[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """The row of the faster of our ways."""
    ours = [row for row in rows if row["way"] in _OURS and row["kind"] == kind]
    return min(ours, key=lambda row: row["seconds_a_batch"]["median"], default=None)


def _samples(row: dict[str, Any], figure: str) -> harness.Samples:
    return harness.Samples(tuple(row[figure]["values"]))


def goals(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is to be reached at batch 512, and whether it is.

    Yields:
      `goal` (in words), `least`, `value` (median), `by` (way), `is_reached`.
    """
    if result["batch_size"] != GOAL_BATCH_SIZE:
        return
    is_meant = set(result["augment"].split(",")) == GOAL_AUGMENT
    names = {"plain": "plain", "augmented": "crop + flip + normalise"}
    for kind, least in GOALS.items():
        best = _best(result["ways"], kind)
        if best is not None and (kind == "plain" or is_meant):
            value = best["images_per_second"]["median"]
            yield _goal(f"{names[kind]} >= {least:,} images/s", least, value, best["way"])
    for ratio in result["ratios"]:
        if (ratio["kind"], ratio["against"]) == ("augmented", "keras_layers") and is_meant:
            text = f"{names['augmented']} >= {GOAL_OVER_KERAS:g}x Keras's layers"
            yield _goal(text, GOAL_OVER_KERAS, ratio["ratio"]["median"], ratio["ours"])


def _goal(goal: str, least: float, value: float, way: str) -> dict[str, Any]:
    return {"goal": goal, "least": least, "value": value, "by": way, "is_reached": value >= least}


def describe(result: dict[str, Any]) -> str:
    """The figures of one batch size for a reader: a table of each kind, ratios, goals."""
    size, lines = result["batch_size"], []
    found = {(r["kind"], r["against"]): r["ratio"]["median"] for r in result["ratios"]}
    header = ["way", "images/s", "us/batch", "spread", "of a copy", "delivers"]
    header += ["idle MB", "peak MB", "grown MB", "ours is"]
    for kind in dict.fromkeys(row["kind"] for row in result["ways"]):
        rows = []
        for row in (row for row in result["ways"] if row["kind"] == kind):
            ratio, share = found.get((kind, row["way"])), row["share_of_copy"]
            rows.append(
                [
                    row["label"],
                    f"{row['images_per_second']['median']:,.0f}",
                    harness.format_number(1e6 * row["seconds_a_batch"]["median"]),
                    f"{100 * row['seconds_a_batch']['spread']:.1f} %",
                    "-" if share is None else f"{100 * share['median']:.1f} %",
                    row["delivers"],
                    *(
                        harness.format_megabytes(row[f"{part}_bytes"])
                        for part in ("idle_rss", "peak_rss", "growth")
                    ),
                    "-" if ratio is None else f"{ratio:.2f}x",
                ]
            )
        lines += [f"## Batch {size}, {_describe_kind(kind, result)}", ""]
        lines += [harness.format_table(header, rows), ""]
        ours = next((r["ours"] for r in result["ratios"] if r["kind"] == kind), None)
        if ours is not None:
            lines += [f"ours: {LABELS[ours]}", ""]
    for goal in result["goals"]:
        reached = "reached" if goal["is_reached"] else "missed"
        number = harness.format_number(goal["value"])
        lines.append(f"{goal['goal']}: {reached}, {number} ({LABELS[goal['by']]})")
    return "\n".join(lines).rstrip() + "\n"


def _describe_kind(kind: str, result: dict[str, Any]) -> str:
    return "plain" if kind == "plain" else f"{result['augment']} + normalise"


def draw(results: Sequence[dict[str, Any]], path: pathlib.Path, *, about: str) -> None:
    """Draws images/s of all ways, a group for each batch size and kind."""
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from bars import Bar, draw_bars

    groups: dict[str, list[Bar]] = {}
    for result in results:
        rows = sorted(result["ways"], key=lambda row: row["seconds_a_batch"]["median"])
        for kind in dict.fromkeys(row["kind"] for row in result["ways"]):
            title = f"batch {result['batch_size']}, {_describe_kind(kind, result)}"
            groups[title] = [
                Bar(
                    row["label"],
                    _samples(row, "images_per_second"),
                    f"{row['images_per_second']['median']:,.0f}",
                    row["way"].startswith("cifarflow"),
                )
                for row in rows
                if row["kind"] == kind
            ]
    draw_bars(groups, unit="images/s", title=f"Input pipeline, {about}", path=path)
