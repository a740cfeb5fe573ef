"""A Keras model as a picture of boxes and arrows, and its summary as text.

    plot_model(model, path="model.png")
    print(model_summary(model))

The picture needs matplotlib only, no graphviz.  The data runs down; where a model is long, the
drawing goes on at the top of the next column.

How boxes find their places: the row of a layer is the length of the longest way to it from an
input, so every arrow points down.  Within a row the layer with the longest way still to go takes
the leftmost free lane: a network's trunk becomes one straight line and its shortcuts stand to the
right of it.  An arrow that passes rows without a stop has a lane of its own there, so that no
arrow runs through a box.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

import keras
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.textpath import text_to_path

from cifarflow.errors import ConfigError
from cifarflow.reporting.plots import BLUE, INK, MUTED, figure_style, save_figure

# One call of a layer: the layer, and which of its calls.  A layer that is called several times
# has a box for each call, else the picture could run in circles.
_Call = tuple[Any, int]
_Arrow = tuple[_Call, _Call]
_Point = tuple[float, float]

_SUMMARY_COLUMNS = 100

# Lengths are inches of the saved picture, font sizes are points.
_HEADING_SIZE, _SUBHEADING_SIZE, _TYPE_SIZE, _DETAIL_SIZE = 13, 10, 9.5, 8.5
_LINE_HEIGHT = 0.19
_PADDING = 0.11
_ROW_GAP = 0.34
_LEAVE, _ENTER = 0.10, 0.18  # where arrows turn: below the box they leave, above the one they enter
_CORNER = 0.07
_TRACK_WIDTH = 0.2  # a lane that holds arrows only
_LANE_GAP = 0.2
_COLUMN_GAP = 0.6
_MARGIN = 0.3
_HEADING_HEIGHT = 0.95

_FEWEST_ROWS = 7  # a column shorter than this is not worth the jump of the eye
_WIDTH_TO_HEIGHT = 1.1  # the shape of a picture that fits a screen


@dataclass(frozen=True)
class _Box:
    """What is drawn for one call of a layer."""

    name: str
    lines: tuple[str, ...]
    has_weights: bool


@dataclass(frozen=True)
class _Grid:
    """Row and lane of every box, and the lane in which an arrow passes the rows in between."""

    rows: dict[_Call, int]
    lanes: dict[_Call, int]
    tracks: dict[_Arrow, int]


@dataclass(frozen=True)
class _Drawing:
    """The grid in inches, broken into columns; y grows downwards."""

    box_size: tuple[float, float]
    centres: dict[_Call, _Point]
    track_x: dict[_Arrow, float]
    column: dict[_Call, int]
    column_ends: list[float]  # right edge of each column
    size: tuple[float, float]

    def arrival_x(self, source: _Call, call: _Call) -> float:
        """Where an arrow comes from, sideways, in the column of the box that it enters."""
        if (source, call) in self.track_x:
            return self.track_x[source, call]
        same_column = self.column[source] == self.column[call]
        return self.centres[source if same_column else call][0]


def plot_model(
    model: keras.Model,
    *,
    show_shapes: bool = True,
    show_parameters: bool = True,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draws a model's layers and the way of the data through them.

    A box holds the layer's type and main settings, the shape of its output without the batch, and
    its number of parameters; layers with parameters are tinted.  A nested model is one box.

    Args:
      model: a functional or Sequential model.
      show_shapes: whether to write each layer's output shape.
      show_parameters: whether to write numbers of parameters.
      title: heading of the figure; None is the model's name.
      path: where to save the figure as PNG.

    Returns:
      The figure.  A box has the `gid` "layer:NAME", an arrow "arrow:NAME->NAME".

    Raises:
      ConfigError: if `model` is no Keras model, is not built, or has its own `call` (there is no
        graph to draw then), or by `save_figure`.
      WorkdirError: if `path` cannot be written.
    """
    inbound = _read_graph(model)
    boxes: dict[_Call, _Box] = {}
    for call in inbound:
        earlier = sum(layer is call[0] for layer, _ in boxes)
        boxes[call] = _describe(call, earlier, show_shapes, show_parameters)
    heading = model.name if title is None else title
    subheading = _parameters_of(model) if show_parameters else ""
    with figure_style():
        box_size = _box_size(boxes)
        drawing = _draw_to_scale(_place_on_grid(inbound), inbound, box_size)
        heading_width = max(
            _text_width(heading, _HEADING_SIZE, "bold"),
            _text_width(subheading, _SUBHEADING_SIZE, "normal"),
        )
        width = max(drawing.size[0], heading_width + 2 * _MARGIN)
        figure = Figure(figsize=(width, drawing.size[1]))
        ax = figure.add_axes((0, 0, 1, 1))  # of which one unit is one inch
        ax.set(xlim=(0, width), ylim=(drawing.size[1], 0))
        ax.set_axis_off()
        ax.text(_MARGIN, 0.3, heading, fontsize=_HEADING_SIZE, weight="bold", va="center")
        ax.text(_MARGIN, 0.54, subheading, fontsize=_SUBHEADING_SIZE, va="center")
        for call, box in boxes.items():
            _draw_box(ax, box, drawing.centres[call], box_size)
            for source in inbound[call]:
                gid = f"arrow:{boxes[source].name}->{box.name}"
                _draw_arrow(ax, _route(source, call, inbound, drawing), gid)
    return save_figure(figure, path)


def model_summary(model: keras.Model) -> str:
    """What `model.summary()` prints, as plain text of 100 columns.

    Args:
      model: a built model of any kind.

    Returns:
      The table, without colours or other terminal codes.

    Raises:
      ConfigError: if `model` is no Keras model or is not built.
    """
    _check_built(model)
    parts: list[str] = []
    # Keras lays the table out by `line_length`, but then cuts it at the width of the terminal,
    # which this variable overrules.
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_SUMMARY_COLUMNS)
    try:
        model.summary(line_length=_SUMMARY_COLUMNS, print_fn=parts.append)
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "".join(parts)


def _check_built(model: object) -> None:
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model must be a Keras model, not {type(model).__name__}")
    if not model.built:
        raise ConfigError(
            f"model {model.name!r} is not built; start it with an Input or call it on a batch"
        )


def _read_graph(model: keras.Model) -> dict[_Call, list[_Call]]:
    """For each call of a layer the calls it gets its input from; sources come first."""
    _check_built(model)
    if not getattr(model, "outputs", None):
        raise ConfigError(
            f"model {model.name!r} has no graph to draw; a diagram needs a functional or "
            f"Sequential model, not {type(model).__name__} with its own call()"
        )
    inbound: dict[_Call, list[_Call]] = {}
    waiting = [_producer(tensor) for tensor in model.outputs]
    while waiting:
        call = waiting.pop()
        if call not in inbound:
            layer, node_index = call
            # Keras has no public way to the inputs of a second call, or to a tensor's layer.
            tensors = layer._inbound_nodes[node_index].input_tensors
            # Two tensors from one layer, as in x + x, are one arrow.
            inbound[call] = list(dict.fromkeys(_producer(tensor) for tensor in tensors))
            waiting += reversed(inbound[call])
    return {call: inbound[call] for call in TopologicalSorter(inbound).static_order()}


def _producer(tensor: Any) -> _Call:
    history = tensor._keras_history
    return history.operation, history.node_index


def _describe(call: _Call, earlier_calls: int, show_shapes: bool, show_parameters: bool) -> _Box:
    layer, node_index = call
    is_model = isinstance(layer, keras.Model)
    settings = [layer.name] if is_model else _settings(layer)
    details = []
    if show_shapes:
        details.append(", ".join(map(_shape_text, layer._inbound_nodes[node_index].output_tensors)))
    has_weights = bool(getattr(layer, "weights", None))
    if show_parameters and has_weights:
        details.append("shared weights" if earlier_calls else _parameters_of(layer))
    lines = (" ".join([type(layer).__name__, ", ".join(settings)]).strip(), "; ".join(details))
    name = f"{layer.name}#{earlier_calls + 1}" if earlier_calls else layer.name
    return _Box(name, tuple(filter(None, lines)), has_weights)


def _settings(layer: Any) -> list[str]:
    """The settings that tell two layers of one type apart at a glance."""
    settings = []
    for attribute in ("kernel_size", "pool_size"):
        size = getattr(layer, attribute, None)
        if isinstance(size, tuple):
            settings.append("x".join(map(str, size)))
    strides = getattr(layer, "strides", None)
    # Pooling usually strides by its own size, which says nothing new.
    if isinstance(strides, tuple) and strides != getattr(layer, "pool_size", (1,) * len(strides)):
        settings.append(f"stride {strides[0]}" if len(set(strides)) == 1 else f"strides {strides}")
    if isinstance(getattr(layer, "rate", None), float):
        settings.append(f"{layer.rate:g}")
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    if activation != "linear":
        settings.append(activation)
    return settings


def _shape_text(tensor: Any) -> str:
    # A single number is no shape to the eye: `10` alone could be anything.
    sizes = ["?" if size is None else str(size) for size in tensor.shape[1:]]
    return " x ".join(sizes) if len(sizes) > 1 else f"({', '.join(sizes)})"


def _parameters_of(layer: Any) -> str:
    total, frozen = (
        sum(math.prod(weight.shape) for weight in weights)
        for weights in (layer.weights, layer.non_trainable_weights)
    )
    text = f"{total:,} parameter{'' if total == 1 else 's'}"
    # A BatchNormalization always has some; only the whole model's number is of interest.
    return text + (f" ({frozen:,} not trainable)" if frozen and hasattr(layer, "outputs") else "")


def _place_on_grid(inbound: dict[_Call, list[_Call]]) -> _Grid:
    """Gives every box a cell of its own, and every passing arrow free cells to pass through."""
    calls = list(inbound)
    rows: dict[_Call, int] = {}
    for call in calls:
        rows[call] = 1 + max((rows[source] for source in inbound[call]), default=-1)
    way_to_go = dict.fromkeys(calls, 0)
    for call in reversed(calls):
        for source in inbound[call]:
            way_to_go[source] = max(way_to_go[source], way_to_go[call] + 1)

    taken: set[tuple[int, int]] = set()

    def take_lane(cells_in_rows: range, *wishes: int) -> int:
        free = (
            lane
            for lane in itertools.chain(wishes, itertools.count())
            if taken.isdisjoint((row, lane) for row in cells_in_rows)
        )
        lane = next(free)
        taken.update((row, lane) for row in cells_in_rows)
        return lane

    lanes: dict[_Call, int] = {}
    for call in sorted(calls, key=lambda call: (rows[call], -way_to_go[call])):
        wish = min((lanes[source] for source in inbound[call]), default=0)
        lanes[call] = take_lane(range(rows[call], rows[call] + 1), wish)

    arrows = [(source, call) for call in calls for source in inbound[call]]
    passing = [arrow for arrow in arrows if rows[arrow[1]] - rows[arrow[0]] > 1]
    tracks: dict[_Arrow, int] = {}
    for source, call in sorted(passing, key=lambda arrow: rows[arrow[1]] - rows[arrow[0]]):
        between = range(rows[source] + 1, rows[call])
        tracks[source, call] = take_lane(between, lanes[source], lanes[call])
    return _Grid(rows, lanes, tracks)


def _draw_to_scale(
    grid: _Grid, inbound: dict[_Call, list[_Call]], box_size: tuple[float, float]
) -> _Drawing:
    """Breaks the rows into columns in the way that gives the handiest picture."""
    num_rows = max(grid.rows.values()) + 1
    origins = [set[_Call]() for _ in range(num_rows)]  # of arrows that come into a row or pass it
    for call, sources in inbound.items():
        for source in sources:
            for row in range(grid.rows[source] + 1, grid.rows[call] + 1):
                origins[row].add(source)
    # Where all that goes on comes from one box, it can as well go on at the top of a new column.
    cuts = [row for row, sources in enumerate(origins) if len(sources) == 1]
    ways = {
        tuple(_column_starts(cuts, num_rows, most_rows)): None
        for most_rows in range(min(_FEWEST_ROWS, num_rows), num_rows + 1)
    }

    def badness(starts: tuple[int, ...]) -> float:
        drawing = _in_columns(grid, starts, box_size)
        longest = max(b - a for a, b in zip(starts, [*starts[1:], num_rows], strict=True))
        empty = 1 - num_rows / (longest * len(starts))
        return abs(math.log(drawing.size[0] / drawing.size[1] / _WIDTH_TO_HEIGHT)) + 2 * empty

    return _in_columns(grid, min(ways, key=badness), box_size)


def _column_starts(cuts: list[int], num_rows: int, most_rows: int) -> list[int]:
    """First row of each column, if a column takes `most_rows` rows, or more for want of a cut."""
    starts = [0]
    for row, next_row in zip(cuts, [*cuts[1:], num_rows], strict=True):
        if next_row - starts[-1] > most_rows:
            starts.append(row)
    return starts


def _in_columns(grid: _Grid, starts: tuple[int, ...], box_size: tuple[float, float]) -> _Drawing:
    box_width, box_height = box_size
    num_rows = max(grid.rows.values()) + 1
    column_of_row = [sum(start <= row for start in starts) - 1 for row in range(num_rows)]
    box_lanes = [set[int]() for _ in starts]
    track_lanes = [set[int]() for _ in starts]
    for call, lane in grid.lanes.items():
        box_lanes[column_of_row[grid.rows[call]]].add(lane)
    for (source, _), lane in grid.tracks.items():
        track_lanes[column_of_row[grid.rows[source] + 1]].add(lane)

    left = _MARGIN
    lane_x: dict[tuple[int, int], float] = {}
    column_ends = []
    for column in range(len(starts)):
        for lane in sorted(box_lanes[column] | track_lanes[column]):
            width = box_width if lane in box_lanes[column] else _TRACK_WIDTH
            lane_x[column, lane] = left + width / 2
            left += width + _LANE_GAP
        column_ends.append(left - _LANE_GAP)
        left += _COLUMN_GAP - _LANE_GAP

    top = _HEADING_HEIGHT + box_height / 2
    pitch = box_height + _ROW_GAP
    centres = {}
    for call, row in grid.rows.items():
        column = column_of_row[row]
        centres[call] = (lane_x[column, grid.lanes[call]], top + pitch * (row - starts[column]))
    track_x = {}
    for (source, call), lane in grid.tracks.items():
        column = column_of_row[grid.rows[source] + 1]
        track_x[source, call] = lane_x[column, lane]
        if lane != grid.lanes[source] and lane in box_lanes[column]:
            # Beside the boxes that it passes, not in the middle of a wide empty lane.
            track_x[source, call] -= (box_width - _TRACK_WIDTH) / 2
    lowest = max(y for _, y in centres.values()) + box_height / 2
    size = (column_ends[-1] + _MARGIN, lowest + _MARGIN)
    column_of_call = {call: column_of_row[row] for call, row in grid.rows.items()}
    return _Drawing(box_size, centres, track_x, column_of_call, column_ends, size)


def _route(
    source: _Call, call: _Call, inbound: dict[_Call, list[_Call]], drawing: _Drawing
) -> list[_Point]:
    """The corners of the arrow from one box to another: down and sideways in turn."""
    width, height = drawing.box_size
    (start_x, start_y), (end_x, end_y) = drawing.centres[source], drawing.centres[call]
    start_y, end_y = start_y + height / 2, end_y - height / 2
    end_x += width / 2 * _entry(source, call, inbound, drawing)
    x = drawing.track_x.get((source, call), end_x)
    if drawing.column[source] == drawing.column[call]:
        # What goes sideways starts beside the middle, which is the straight arrow's.
        goal_x = drawing.track_x.get((source, call), drawing.centres[call][0])
        start_x += width / 4 * _sign(goal_x - start_x)
        sideways = [(start_x, start_y + _LEAVE), (x, start_y + _LEAVE)]
    else:
        gutter = drawing.column_ends[drawing.column[source]] + _COLUMN_GAP / 2
        over = _HEADING_HEIGHT - _ENTER
        sideways = [(start_x, start_y + _LEAVE), (gutter, start_y + _LEAVE)]
        sideways += [(gutter, over), (x, over)]
    turns = [(x, end_y - _ENTER), (end_x, end_y - _ENTER)]
    return _without_straight_corners([(start_x, start_y), *sideways, *turns, (end_x, end_y)])


def _entry(
    source: _Call, call: _Call, inbound: dict[_Call, list[_Call]], drawing: _Drawing
) -> float:
    """Where an arrow enters the upper side of its box: -1 left end, 0 middle, 1 right end."""

    def offset(other: _Call) -> float:
        return drawing.arrival_x(other, call) - drawing.centres[call][0]

    if len(inbound[call]) == 1:
        return 0.0
    side = _sign(offset(source))
    # Arrows from one side enter in the order in which they come, the nearest innermost.
    rivals = sorted(
        (other for other in inbound[call] if _sign(offset(other)) == side),
        key=lambda other: abs(offset(other)),
    )
    return side * (rivals.index(source) + 1) / (len(rivals) + 1)


def _sign(length: float) -> int:
    return 0 if abs(length) < 1e-9 else int(math.copysign(1, length))


def _without_straight_corners(corners: list[_Point]) -> list[_Point]:
    kept: list[_Point] = []
    for point in corners:
        if kept and math.dist(kept[-1], point) < 1e-9:
            continue
        if len(kept) > 1 and (kept[-2][0] == kept[-1][0] == point[0]):
            kept.pop()
        kept.append(point)
    return kept


def _box_size(boxes: dict[_Call, _Box]) -> tuple[float, float]:
    """One size that holds the text of each of the boxes."""
    texts = {line for box in boxes.values() for line in box.lines[:1]}
    details = {line for box in boxes.values() for line in box.lines[1:]}
    width = max(
        *(_text_width(line, _TYPE_SIZE, "bold") for line in texts),
        *(_text_width(line, _DETAIL_SIZE, "normal") for line in details),
        1.2,
    )
    height = _LINE_HEIGHT * max(len(box.lines) for box in boxes.values())
    return width + 2 * _PADDING, height + _PADDING


def _text_width(text: str, size: float, weight: str) -> float:
    font = FontProperties(size=size, weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return width / 72  # points to inches


def _draw_box(ax: Axes, box: _Box, centre: _Point, box_size: tuple[float, float]) -> None:
    (x, y), (width, height) = centre, box_size
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={_CORNER}",
            facecolor="#e3eef7" if box.has_weights else "#f5f5f5",
            edgecolor=BLUE if box.has_weights else MUTED,
            linewidth=1.1,
            gid=f"layer:{box.name}",
        )
    )
    upper = y - _LINE_HEIGHT * (len(box.lines) - 1) / 2
    for number, line in enumerate(box.lines):
        ax.text(
            x,
            upper + number * _LINE_HEIGHT,
            line,
            fontsize=_DETAIL_SIZE if number else _TYPE_SIZE,
            weight="normal" if number else "bold",
            ha="center",
            va="center_baseline",
        )


def _draw_arrow(ax: Axes, corners: list[_Point], gid: str) -> None:
    points, codes = [corners[0]], [Path.MOVETO]
    for before, corner, after in zip(corners, corners[1:], corners[2:], strict=False):
        # A corner becomes a quarter turn, as far as the lines on its sides leave room.
        radius = min(_CORNER, math.dist(before, corner) / 2, math.dist(corner, after) / 2)
        points += [_towards(corner, before, radius), corner, _towards(corner, after, radius)]
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    points.append(corners[-1])
    codes.append(Path.LINETO)
    ax.add_patch(
        FancyArrowPatch(
            path=Path(points, codes),
            arrowstyle="-|>,head_length=5,head_width=2.5",
            mutation_scale=1,
            color=INK,
            linewidth=1.1,
            joinstyle="round",
            gid=gid,
        )
    )


def _towards(start: _Point, goal: _Point, length: float) -> _Point:
    share = length / math.dist(start, goal)
    return start[0] + share * (goal[0] - start[0]), start[1] + share * (goal[1] - start[1])
