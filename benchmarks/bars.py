"""Horizontal bars, a group for each thing that was measured, with the spread of the rounds.

draw_bars({"lab_cnn, batch 32": [Bar("cifarflow float32", samples, "28.1 ms")]},
          unit="images/s", title="Training speed", path=pathlib.Path("bars.png"))
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import harness
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cifarflow.files import replacing
from cifarflow.reporting.plots import BLUE, DOTS_PER_INCH, INK, MUTED, PALE


class Bar(NamedTuple):
    """One bar.

    Attributes:
      label: what was measured.
      samples: its values; the bar is the median, a line goes from the least to the greatest.
      note: what is written behind it.
      is_ours: whether it stands out.
    """

    label: str
    samples: harness.Samples
    note: str = ""
    is_ours: bool = False


def draw_bars(
    groups: Mapping[str, Sequence[Bar]], *, unit: str, title: str, path: pathlib.Path
) -> Figure:
    """Draws the groups under each other, each with a scale of its own, and saves a PNG.

    Args:
      groups: the bars of each group, by the group's title.
      unit: of the scale.
      title: of the picture.
      path: the PNG file.

    Raises:
      WorkdirError: if it cannot be written.
    """
    heights = [len(bars) + 1.6 for bars in groups.values()]
    # In inches: 0.27 a bar, and the title.
    figure = Figure(figsize=(9, 0.27 * sum(heights) + 0.6), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", color=INK)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08)
    all_axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, bars) in zip(all_axes, groups.items(), strict=True):
        places = range(len(bars))
        medians = [bar.samples.median for bar in bars]
        ends = [
            [bar.samples.median - bar.samples.low for bar in bars],
            [bar.samples.high - bar.samples.median for bar in bars],
        ]
        colours = [BLUE if bar.is_ours else "#b0b0b0" for bar in bars]
        axes.barh(places, medians, height=0.72, color=colours, zorder=2)
        axes.errorbar(
            medians, places, xerr=ends, fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=3
        )
        for place, bar in zip(places, bars, strict=True):
            axes.annotate(
                bar.note,
                (bar.samples.high, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
        axes.set_title(name, fontsize=10, loc="left", fontweight="bold", color=INK)
        axes.set_yticks(places, [bar.label for bar in bars], fontsize=8.5)
        axes.invert_yaxis()
        # Room for the notes, which have a width of their own.
        axes.set_xlim(0, 1.3 * max(bar.samples.high for bar in bars))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.tick_params(axis="x", labelsize=8, colors=MUTED)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=PALE, linewidth=0.6, zorder=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    all_axes[-1].set_xlabel(unit, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png")
    return figure
