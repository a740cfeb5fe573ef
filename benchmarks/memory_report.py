"""What `memory.py` says of its figures: the text for a reader, the picture.

    print(describe(result))
    draw(result, pathlib.Path("memory.png"), about="lab_cnn, cifar10")

A result is what `memory.summarise` returns.
"""

from __future__ import annotations

import pathlib
from typing import Any

import harness
from harness import format_megabytes

from cifarflow.files import replacing

LABELS = {"cifarflow": "cifarflow", "notebook": "Keras fit, the notebook's way"}
GOAL_SHARE = 0.6  # of the notebook's peak, all of it


def describe(result: dict[str, Any]) -> str:
    """The figures for a reader: a table, the two shares and the goal, growth."""
    header = ["way", "precision", "peak MB", "spread", "TensorFlow alone MB", "above it MB", "n"]
    header += ["seconds", "grown MB"]
    rows = []
    for row in result["ways"]:
        rows.append(
            [
                row["label"],
                _short(row["precision"]),
                format_megabytes(row["peak_bytes"]["median"]),
                f"{100 * row['peak_bytes']['spread']:.1f} %",
                format_megabytes(row["alone_bytes"]["median"]),
                format_megabytes(row["above_bytes"]["median"]),
                str(row["peak_bytes"]["n"]),
                harness.format_number(row["seconds"]["median"]),
                f"{row['growth_bytes']['median'] / 1e6:+.1f}",
            ]
        )
    total, above = result["share_of_total"], result["share_above"]
    lines = [
        f"## {result['model']}, training, validation and test",
        "",
        harness.format_table(header, rows),
        "",
        f"Peak: {_percent(total)} of the notebook's way in all; {_percent(above)} above what "
        "TensorFlow and Keras take alone.",
        _compare_precisions(result),
    ]
    if result["goal"] is not None:
        reached = "reached" if result["goal"]["is_reached"] else "missed"
        below, value = 100 * result["goal"]["below"], 100 * total["median"]
        ours, notebook = _precisions(result)
        lines.append(
            f"peak, ours in {ours} < {below:.0f} % of the notebook's in {notebook}: {reached}, "
            f"{value:.1f} %"
        )
    for row in result["ways"]:
        grown = row["growth_bytes"]
        ends = f" ({grown['low'] / 1e6:+.1f} to {grown['high'] / 1e6:+.1f})"
        lines.append(
            f"{row['label']}: {grown['median'] / 1e6:+.1f} MB{ends if grown['n'] > 1 else ''} "
            f"from the end of epoch {result['settled_epoch']} to that of epoch "
            f"{result['epochs']}, {result['steps_per_epoch']} steps each; "
            f"{grown['second_half'] / 1e6:+.1f} MB in the second half (n={grown['n']})"
        )
    return "\n".join([*lines, ""])


def _compare_precisions(result: dict[str, Any]) -> str:
    """Says whether a part of the difference is that ours computes in smaller numbers."""
    ours, notebook = _precisions(result)
    if ours == notebook:
        return f"Both compute in {ours}."
    return (
        f"Ours computes in {ours}, the notebook's way in {notebook}: a part of the difference "
        f"may be the precision's, see --precision={notebook}."
    )


def _precisions(result: dict[str, Any]) -> tuple[str, str]:
    """What ours and the notebook's way compute in."""
    found = {row["way"]: _short(row["precision"]) for row in result["ways"]}
    return found["cifarflow"], found["notebook"]


def _short(precision: str) -> str:
    return precision.removeprefix("mixed_")


def _percent(share: dict[str, Any]) -> str:
    text = f"{100 * share['median']:.1f} %"
    if share["n"] < 2:
        return text
    return f"{text} ({100 * share['low']:.1f} to {100 * share['high']:.1f} in {share['n']} rounds)"


def draw(result: dict[str, Any], path: pathlib.Path, *, about: str) -> None:
    """Draws the peaks as bars, and below them what is resident after each epoch.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from cifarflow.reporting.plots import BLUE, DOTS_PER_INCH, INK, MUTED, PALE, figure_style

    colours = {"cifarflow": BLUE, "notebook": MUTED}
    with figure_style():
        figure = Figure(figsize=(9, 5.4), dpi=DOTS_PER_INCH, layout="constrained")
        figure.suptitle(f"Memory, {about}", fontsize=12)
        bars, lines = figure.subplots(2, 1, height_ratios=(1, 2))
        rows = result["ways"]
        for place, row in enumerate(rows):
            alone, peak = row["alone_bytes"]["median"] / 1e6, row["peak_bytes"]
            median = peak["median"] / 1e6
            bars.barh(place, alone, height=0.6, color=PALE)
            bars.barh(place, median - alone, left=alone, height=0.6, color=colours[row["way"]])
            ends = [[median - peak["low"] / 1e6], [peak["high"] / 1e6 - median]]
            bars.errorbar(median, place, xerr=ends, fmt="none", ecolor=INK, capsize=2)
            bars.annotate(
                f"{median:,.0f} MB",
                (peak["high"] / 1e6, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        bars.set_yticks(range(len(rows)), [row["label"] for row in rows])
        bars.invert_yaxis()
        bars.set_xlim(0, 1.2 * max(row["peak_bytes"]["high"] for row in rows) / 1e6)
        bars.grid(axis="y", visible=False)
        bars.set_title("Peak of training, validation and test (pale: TensorFlow alone), MB")
        settled = result["settled_epoch"]
        for row in rows:
            for number, series in enumerate(row["epochs_bytes"]):
                start = series[settled - 1]
                epochs = range(1, len(series) + 1)
                lines.plot(
                    epochs,
                    [(value - start) / 1e6 for value in series],
                    color=colours[row["way"]],
                    linestyle="-" if row["way"] == "cifarflow" else "--",
                    marker=".",
                    label=row["label"] if number == 0 else None,
                )
        lines.axvline(settled, color=MUTED, linewidth=0.8, linestyle=":")
        lines.xaxis.set_major_locator(MaxNLocator(integer=True))
        lines.set_xlabel("epoch")
        lines.set_title(f"Resident after each epoch, against epoch {settled}, MB")
        lines.legend(loc="lower right")
        with replacing(path) as file:
            figure.savefig(file, format="png")
