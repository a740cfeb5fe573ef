"""Pictures of whole runs: what they came to, and accuracy against seconds on the way.

    draw_runs(result, pathlib.Path("runs.png"), about="cifar10, two cores")
    draw_curves(result, pathlib.Path("curves.png"), about="cifar10, two cores")

A result is what `measure` of `time_to_accuracy.py` and of `accuracy.py` returns.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cifarflow.files import replacing
from cifarflow.reporting.plots import (
    BLUE,
    DOTS_PER_INCH,
    GREEN,
    INK,
    MUTED,
    PALE,
    VERMILION,
    figure_style,
)

# Colour, line and marker: none of them alone tells two recipes apart.
_LOOKS = tuple(
    zip(
        # After the house's own: purple and brown-orange of Okabe and Ito, the latter darkened.
        (BLUE, VERMILION, GREEN, "#9c4f83", INK, "#a66f00"),
        ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))),
        ("o", "s", "D", "^", "v", "P"),
        strict=True,
    )
)
# Times that differ by more would press the shorter curves against the edge.
_MOST_LINEAR = 10
# Letters, of which a line of the legend would not hold more.
_LONG_NAME = 45
# Between two marks of an axis.
_STEPS = [1, 2, 5, 10]


def draw_runs(result: dict[str, Any], path: pathlib.Path, *, about: str) -> Figure:
    """Draws seconds and accuracy of each run, a row a recipe, with mean and 95 % interval.

    Args:
      result: what `time_to_accuracy.measure` returns.
      path: the PNG file.
      about: what to name in the title: data and machine.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    recipes, notebook = result["recipes"], result["notebook"]
    labels = [row["name"] for row in recipes] + (["the notebook's way"] if notebook else [])
    with figure_style():
        figure = Figure(figsize=(10, 0.62 * len(labels) + 1.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for place, row in enumerate(recipes):
            for axes, name, form in ((left, "seconds", ",.1f"), (right, "accuracy", ".4f")):
                values = [run[name] for run in row["runs"]]
                _draw_row(axes, place, values, row[name], form=form, colour=BLUE)
            if row["bar"] is not None:
                label = None if place else "the bar"
                ends = [place - 0.36, place + 0.36]
                right.plot([row["bar"]] * 2, ends, ":", color=VERMILION, label=label)
        if notebook:
            _draw_notebook(left, right, len(recipes), notebook)
        left.set_yticks(range(len(labels)), labels)
        left.set_ylim(len(labels) - 0.4, -0.6)
        read = recipes[0]["read"]
        left.set_xlabel("seconds")
        right.set_xlabel(f"{read} accuracy")
        means = [row["seconds"]["mean"] for row in recipes]
        if notebook:
            means.append(notebook["estimated_seconds"]["median"])
        _scale_seconds(left, means)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0, labelsize=10)
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            # For the texts, which are wider than what they stand above.
            axes.margins(x=0.2)
        right.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        figure.suptitle(f"Time and accuracy, {about}")
        _add_legend(figure, (left, right))
        _save(figure, path)
    return figure


def _draw_row(
    axes: Axes,
    place: int,
    values: Sequence[float],
    summary: dict[str, Any],
    *,
    form: str,
    colour: str,
) -> None:
    """Each run as a point, the mean as a line across with its interval, and the mean as text."""
    mean = summary["mean"]
    axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.55, markersize=6)
    axes.plot([mean, mean], [place - 0.22, place + 0.22], color=INK, linewidth=2.2)
    if summary["interval"] is not None:
        axes.plot(summary["interval"], [place, place], color=INK, linewidth=1.2)
    text = f"{mean:{form}}"
    if summary["deviation"] is not None:
        text += f" ± {summary['deviation']:{form}}"
    axes.annotate(
        f"{text}  (n = {len(values)})",
        (mean, place - 0.24),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
    )


def _draw_notebook(left: Axes, right: Axes, place: int, notebook: dict[str, Any]) -> None:
    """The notebook's way: what it would take, and what it took if it was run."""
    values, full = notebook["estimated_seconds"]["values"], notebook["full_run"]
    median = notebook["estimated_seconds"]["median"]
    left.plot(values, [place] * len(values), "o", color=MUTED, alpha=0.55, markersize=6)
    left.plot([median, median], [place - 0.22, place + 0.22], color=INK, linewidth=2.2)
    above: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8.5}
    text = f"about {median:,.0f}: {notebook['epochs']} epochs of a measured step"
    left.annotate(text, (median, place - 0.24), **{**above, "ha": "right"})
    if full is None:
        where: Any = ("axes fraction", "data")
        right.annotate("not run", (0.5, place), xycoords=where, color=MUTED, **above)
        return
    for axes, name, form in ((left, "seconds", ",.0f"), (right, "accuracy", ".4f")):
        label = "one full run" if axes is left else None
        mark: dict[str, Any] = {"color": VERMILION, "fillstyle": "none", "linestyle": ""}
        axes.plot(full[name], place, "D", markersize=9, label=label, **mark)
        below = {**above, "va": "top", "color": VERMILION}
        axes.annotate(f"{full[name]:{form}}", (full[name], place + 0.24), **below)


def _add_legend(figure: Figure, all_axes: Sequence[Axes]) -> None:
    """What the marks are, once for both panels."""
    axes = all_axes[0]
    axes.plot([], [], "o", color=BLUE, alpha=0.55, label="one run")
    axes.plot([], [], color=INK, linewidth=2.2, label="mean ± sd, line: 95 % interval")
    found = [each.get_legend_handles_labels() for each in all_axes]
    handles, labels = (list(itertools.chain(*part)) for part in zip(*found, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def draw_curves(result: dict[str, Any], path: pathlib.Path, *, about: str) -> Figure:
    """Draws accuracy against seconds: a curve a recipe, thin ones for its seeds, and the end.

    Args:
      result: what `accuracy.measure` returns.
      path: the PNG file.
      about: what to name in the title: data and machine.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    recipes = result["recipes"]
    with figure_style():
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots()
        for row, (colour, line, marker) in zip(recipes, itertools.cycle(_LOOKS), strict=False):
            curves = np.array([run["curve"] for run in row["runs"]])
            seconds, accuracies = curves[:, :, 0], curves[:, :, 2]
            if len(curves) > 1:
                axes.plot(seconds.T, accuracies.T, color=colour, linewidth=0.8, alpha=0.4)
            axes.plot(
                seconds.mean(0), accuracies.mean(0), linestyle=line, color=colour, linewidth=2.2
            )
            ends = np.array([[run["seconds"], run["accuracy"]] for run in row["runs"]])
            axes.plot(*ends.T, marker, color=colour, markersize=4, alpha=0.45)
            last = [seconds[:, -1].mean(), accuracies[:, -1].mean()]
            axes.plot(*zip(last, ends.mean(0), strict=True), ":", color=colour, linewidth=1)
            axes.plot(
                *ends.mean(0),
                marker=marker,
                linestyle=line,
                color=colour,
                markersize=10,
                markeredgecolor="white",
                markeredgewidth=1.2,
                zorder=5,
                label=_label_curve(row),
            )
        axes.set_xlabel("seconds: lines, of training; marks, with whitening and final evaluation")
        axes.set_ylabel("accuracy")
        _scale_seconds(axes, [row["seconds"]["mean"] for row in recipes])
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=_STEPS))
        figure.legend(loc="outside lower center", ncols=1, handlelength=4)
        figure.suptitle(f"Accuracy against time, {about}")
        several = len(recipes[0]["runs"]) > 1
        axes.set_title(
            "lines: held-out images, the mean over seeds and each seed; marks: test images, "
            "± standard deviation"
            if several
            else "line: held-out images; mark: test images",
            fontsize=9,
            fontweight="normal",
            color=MUTED,
        )
        _save(figure, path)
    return figure


def _label_curve(row: dict[str, Any]) -> str:
    """What a recipe came to, for the legend: what is held out for the curve is not trained on."""
    end = row["accuracy"]
    spread = "" if end["deviation"] is None else f" ± {end['deviation']:.4f}"
    text = (
        f"test {end['mean']:.4f}{spread} after {row['seconds']['mean']:,.1f} s "
        f"(n = {len(row['runs'])}), trained on {row['examples']['train']:,} images"
    )
    # A variant goes by a name that may be as long as a line.
    gap = "\n" if len(row["name"]) > _LONG_NAME else " "
    return f"{row['name']}:{gap}{text}"


def _scale_seconds(axes: Axes, seconds: Sequence[float]) -> None:
    """A logarithmic axis where times lie far apart, else one from 0; plain numbers on both."""
    if max(seconds) > _MOST_LINEAR * min(seconds):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", which="minor", color=PALE, linewidth=0.3)
    else:
        axes.set_xlim(0, 1.1 * axes.dataLim.x1)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=_STEPS))
    # No power of ten, and no more digits than there are.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _save(figure: Figure, path: pathlib.Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
