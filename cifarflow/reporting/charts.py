"""Charts as SVG within a page: lines over epochs, a calibration curve, bars.

    chart = line_chart(
        "Loss", [Line("train", epochs, losses, colour=0), Line("validation", ..., colour=1)]
    )

They take their colours from the page's style sheet, so that they follow light and dark, and need no
script: what a point is stands in its <title>, which browsers show under the pointer.  Values that
cannot be drawn are left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from cifarflow.reporting.markup import Markup, join, tag
from cifarflow.reporting.style import COLOURS
from cifarflow.reporting.wording import percent, short, short_all

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 42
# Of larger values, smaller ones, and those that differ by less, ticks would not differ.
_LARGEST, _SMALLEST, _LEAST_SPAN = 1e12, 1e-100, 1e-12
# More are not told apart at this width.
_MOST_POINTS, _MOST_HOVERS = 500, 60


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Attributes:
      name: for the legend.
      x, y: its points, equally many.
      colour: which of the style's; the same colour again comes with other dashes.
      is_thin: dotted and thinner: what stands behind the others.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    is_thin: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        """Those that can be drawn, in order, not more than are told apart."""
        good = [
            (float(x), float(y))
            for x, y in zip(self.x, self.y, strict=True)
            if abs(x) <= _LARGEST and abs(y) <= _LARGEST
        ]
        if len(good) <= _MOST_POINTS:
            return good
        last = len(good) - 1
        return [good[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]

    @property
    def classes(self) -> str:
        """Its classes in the style sheet."""
        dashes = "thin" if self.is_thin else "dashed" if self.colour // COLOURS % 2 else ""
        return f"curve s{self.colour % COLOURS} {dashes}".rstrip()


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, evenly spaced.

    Args:
      low: finite, at most `high`.
      high: finite.
      most: about how many.
    """
    size = max(abs(low), abs(high))
    if size < _SMALLEST or high - low <= _LEAST_SPAN * size:
        half = 0.1 * size if size >= _SMALLEST else 1.0
        low, high = low - half, high + half
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    space = next(power * step for step in (1, 2, 2.5, 5, 10) if power * step >= rough * 0.999)
    first, last = math.floor(low / space + 1e-9), math.ceil(high / space - 1e-9)
    # 0.6, not 0.6000000000000001.
    return [float(f"{index * space:.14g}") for index in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Line], *, from_zero: bool = False) -> Markup:
    """Draws curves over the epochs in one plot, with a legend.

    Args:
      title: what the values are.
      lines: the curves; what stands behind the others comes first.
      from_zero: whether the axis begins at 0, so that what changes little looks so.

    Returns:
      A figure; it says so where there is nothing to draw.
    """
    drawn = [line for line in lines if line.points]
    heading = tag("figcaption", tag("h3", title))
    if not drawn:
        return tag("figure", heading, tag("p", "nothing to draw", class_="note"), class_="chart")
    every = [point for line in drawn for point in line.points]
    # Epochs begin at 0.
    x_ticks = ticks(min(0.0, *(x for x, _ in every)), max(x for x, _ in every))
    low, high = min(y for _, y in every), max(y for _, y in every)
    y_ticks = ticks(min(0.0, low) if from_zero else low, max(0.0, high) if from_zero else high)
    plane = _Plane(x_ticks, y_ticks)
    parts = [plane.axes("epoch"), *(_curve(plane, line) for line in drawn)]
    legend = None
    if len(drawn) > 1 or drawn[0].name != title:
        samples = [tag("li", _line_sample(line.classes), line.name) for line in drawn]
        legend = tag("ul", *samples, class_="legend")
    ends = ", ".join(f"{line.name} ends at {short(line.points[-1][1])}" for line in drawn)
    return tag(
        "figure",
        heading,
        legend,
        _svg(f"{title} over epochs: {ends}", *parts),
        class_="chart",
    )


def calibration_chart(bins: Sequence[Sequence[float]]) -> Markup:
    """Draws how often the model is right against how certain it is.

    Args:
      bins: each mean confidence, accuracy (both 0..1) and count.
    """
    most = max(count for _, _, count in bins)
    scale = [index / 5 for index in range(6)]
    plane = _Plane(scale, scale, height=_WIDTH)
    ideal = tag("line", **plane.ends((0, 0), (1, 1)), class_="ideal")
    curve = _path(plane, [(mean, right) for mean, right, _ in bins])
    dots = []
    for mean, right, count in bins:
        x, y = plane.place(mean, right)
        told = f"{percent(mean)} certain, {percent(right)} right: {count:,} images"
        # By area, so that it is the count one sees.
        radius = f"{3 + 9 * math.sqrt(count / most):.1f}"
        dot = tag("circle", tag("title", told), cx=x, cy=y, r=radius, class_="fill s0 end")
        dots.append(dot)
    label = (
        "share of images classified right over the model's confidence, "
        f"{len(bins)} groups: "
        + ", ".join(
            f"{percent(right, digits=0)} right at {percent(mean, digits=0)}"
            for mean, right, _ in bins
        )
    )
    axes = plane.axes("confidence")
    svg = _svg(label, axes, ideal, tag("path", d=curve, class_="curve s0"), *dots, height=_WIDTH)
    return tag(
        "figure",
        tag("figcaption", tag("h3", "Right, by confidence")),
        tag(
            "ul",
            tag("li", _line_sample("curve s0"), "this model; larger: more images"),
            tag("li", _line_sample("ideal"), "as sure as it is right"),
            class_="legend",
        ),
        svg,
        class_="chart square",
    )


def share_bar(share: float, *, colour: int = 0) -> Markup:
    """A small bar beside a number, 0..1; for the eye only."""
    full = {"width": 100, "height": 10, "rx": 2}
    return tag(
        "svg",
        tag("rect", **full, class_="track"),
        tag("rect", **{**full, "width": f"{100 * share:.1f}"}, class_=f"fill s{colour}"),
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )


def stacked_bar(parts: Sequence[tuple[str, float]]) -> Markup:
    """One bar of several parts, with their shares.

    Args:
      parts: each a name and an amount >= 0; the sum is above 0.
    """
    total = sum(amount for _, amount in parts)
    boxes, legend, told, left = [], [], [], 0.0
    for colour, (name, amount) in enumerate(parts):
        width = _WIDTH * (amount / total)
        told.append(f"{name} {percent(amount / total, digits=0)}")
        size = {"x": f"{left:.1f}", "width": f"{width:.1f}", "height": 26}
        boxes.append(tag("rect", tag("title", told[-1]), **size, class_=f"fill s{colour}"))
        swatch = tag("span", class_=f"swatch s{colour}", aria_hidden="true")
        legend.append(tag("li", swatch, told[-1]))
        left += width
    return tag(
        "figure",
        tag("figcaption", tag("h3", "A step")),
        tag("ul", *legend, class_="legend"),
        _svg(", ".join(told), *boxes, height=26),
        class_="chart",
    )


# --- pieces -------------------------------------------------------------------------------


class _Plane:
    """The area within the axes.

    Args:
      x_ticks, y_ticks: at least two each, increasing; the axes end with them.
      height: of the whole chart.
    """

    def __init__(
        self, x_ticks: Sequence[float], y_ticks: Sequence[float], *, height: int = _HEIGHT
    ) -> None:
        self._x, self._y, self._height = x_ticks, y_ticks, height

    def place(self, x: float, y: float) -> tuple[str, str]:
        """Where a point is drawn."""
        across = (x - self._x[0]) / (self._x[-1] - self._x[0])
        up = (y - self._y[0]) / (self._y[-1] - self._y[0])
        return (
            f"{_LEFT + across * (_WIDTH - _LEFT - _RIGHT):.1f}",
            f"{self._height - _BOTTOM - up * (self._height - _TOP - _BOTTOM):.1f}",
        )

    def ends(self, start: tuple[float, float], end: tuple[float, float]) -> dict[str, str]:
        """The attributes of a line."""
        (x1, y1), (x2, y2) = self.place(*start), self.place(*end)
        return {"x1": x1, "y1": y1, "x2": x2, "y2": y2}

    def axes(self, x_name: str) -> Markup:
        """Grid, axis and numbers."""
        left, right, low = self._x[0], self._x[-1], self._y[0]
        parts = []
        for y, name in zip(self._y, short_all(self._y), strict=True):
            kind = "axis" if y == low else "gridline"
            parts.append(tag("line", **self.ends((left, y), (right, y)), class_=kind))
            at = float(self.place(left, y)[1]) + 4
            parts.append(tag("text", name, x=_LEFT - 8, y=f"{at:.1f}", text_anchor="end"))
        for x, name in zip(self._x, short_all(self._x), strict=True):
            at_x = self.place(x, low)[0]
            below = self._height - _BOTTOM + 18
            parts.append(tag("text", name, x=at_x, y=below, text_anchor="middle"))
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        bottom = self._height - 6
        parts.append(tag("text", x_name, x=middle, y=bottom, text_anchor="middle"))
        return tag("g", *parts)


def _svg(label: str, *parts: Markup, height: int = _HEIGHT) -> Markup:
    box = f"0 0 {_WIDTH} {height}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=label)


def _path(plane: _Plane, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(" ".join(plane.place(*point)) for point in points)


def _curve(plane: _Plane, line: Line) -> Markup:
    """A curve, its end, and what its points are."""
    points = line.points
    colour = f"s{line.colour % COLOURS}"
    parts = [tag("path", d=_path(plane, points), class_=line.classes)]
    if not line.is_thin or len(points) == 1:
        x, y = plane.place(*points[-1])
        parts.append(tag("circle", cx=x, cy=y, r=4, class_=f"fill {colour} end"))
    for index in range(0, len(points), math.ceil(len(points) / _MOST_HOVERS)):
        x, y = plane.place(*points[index])
        told = f"{line.name}: {short(points[index][1])} at {short(points[index][0])}"
        parts.append(tag("circle", tag("title", told), cx=x, cy=y, r=7, class_="hover"))
    return tag("g", *parts, class_=colour)


def _line_sample(classes: str) -> Markup:
    """What a line looks like, for the legend."""
    line = tag("line", x1=1, y1=5, x2=27, y2=5, class_=classes)
    return tag("svg", line, viewBox="0 0 28 10", aria_hidden="true")


def join_charts(charts: Sequence[Markup]) -> Markup:
    """Charts beside each other, as many as there is room for."""
    return tag("div", join(charts), class_="grid")
