"""Pictures of data and runs, as figures to show or PNG files to keep.

    plot_history(run.history, title="lab_cnn", path="history.png")
    plot_confusion_matrix(matrix, class_names=names).savefig("matrix.pdf")

Every `plot_*` returns a `matplotlib.figure.Figure` made without pyplot: no window opens, no
display is needed, and nothing has to be closed.  With `path` the figure is also saved as a PNG of
150 dots an inch.  Colours follow Okabe and Ito, whose palette people with any colour vision can
tell apart; nothing is said by colour alone.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from cifarflow.errors import ConfigError, DataError, check_float, check_int
from cifarflow.evaluation.confidence import check_probabilities, worst_mistakes
from cifarflow.evaluation.metrics import accuracy, check_matrix, per_class_accuracy
from cifarflow.files import replacing

if TYPE_CHECKING:
    from cifarflow.training.history import History
    from cifarflow.training.lr_finder import LearningRates

BLUE, VERMILION, GREEN, INK, MUTED, PALE = (
    "#0072B2",
    "#D55E00",
    "#00795A",  # Okabe and Ito's green, darkened until text in it is easy to read on white
    "#1a1a1a",
    "#666666",
    "#d9d9d9",
)
DOTS_PER_INCH = 150
# With more, cells of a matrix with numbers in them, and columns of images, fill no screen.
_MOST_READABLE_CLASSES = 20
# Ticks of the scale of a matrix without numbers.
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)

_STYLE = {
    "figure.dpi": DOTS_PER_INCH,
    "figure.facecolor": "white",
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.handlelength": 2.8,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.8,
    "savefig.bbox": "standard",  # "tight" would make the file's size depend on its content
    "savefig.facecolor": "auto",
    "text.color": INK,
    "text.usetex": False,
    "text.parse_math": False,  # names are anybody's: of 'a $x$' it would make a formula, or fail
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """The look that all of cifarflow's figures share; settings of the caller come back after."""
    with matplotlib.rc_context(_STYLE):
        yield


def save_figure(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Saves `figure` as PNG, making the folder; a file of that name is replaced in one go.

    Args:
      figure: the figure to save.
      path: file name ending in .png, or None to save nothing.

    Returns:
      `figure`.

    Raises:
      ConfigError: if the name does not end in .png.
      WorkdirError: if the file cannot be written.
    """
    if path is None:
        return figure
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"a picture's path must end in .png, not {os.fspath(path)!r}")
    with replacing(target, what="the picture") as file, figure_style():
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return figure


def plot_random_from_each_class(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    examples_per_class: int = 3,
    class_names: Sequence[str],
    seed: int | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows a few random images of each class, a column a class.

    A class that has fewer images shows those it has.  Of more than 20 classes 20 are shown, chosen
    by `seed` as the images are.

    Args:
      images: [N, H, W, C] uint8, C 1 or 3.
      labels: [N] integers, 0..len(class_names) - 1.
      examples_per_class: rows of images, >= 1.
      class_names: the name of each label.
      seed: chooses the images; None chooses anew each time.
      title: heading of the figure, such as the data set's name.
      path: where to save the figure as PNG.

    Returns:
      The figure; each image is an axes.

    Raises:
      ConfigError: if `examples_per_class` is not a whole number >= 1, or by `save_figure`.
      DataError: if arrays have the wrong shape, dtype or length, or a label has no name.
      WorkdirError: if `path` cannot be written.

    Source: the lab's `PlotRandomFromEachClass(X, y, 3, labels)`; there the images cannot be seeded.
    """
    examples_per_class = check_int("examples_per_class", examples_per_class)
    images, labels = _check_examples(images, labels, class_names)
    random = np.random.default_rng(seed)
    shown = np.arange(len(class_names))
    if len(shown) > _MOST_READABLE_CLASSES:
        shown = np.sort(random.permutation(shown)[:_MOST_READABLE_CLASSES])
    num_classes = len(shown)
    with figure_style():
        figure = Figure(
            figsize=(
                max(3.0, 1.05 * num_classes + 0.2),
                1.02 * examples_per_class + (0.75 if title else 0.4),
            ),
            layout="constrained",
        )
        axes = figure.subplots(examples_per_class, num_classes, squeeze=False)
        for label, column in zip(shown, axes.T, strict=True):
            members = np.flatnonzero(labels == label)
            chosen = random.permutation(members)[:examples_per_class]
            name = _shortened(class_names[label], 14)
            # As wide as an image are some ten letters of the usual size.
            size = 10 if len(name) <= 10 else 8
            column[0].set_title(name, fontsize=size, loc="center")
            for place, ax in enumerate(column):
                if place < len(chosen):
                    _draw_image(ax, images[chosen[place]])
                else:
                    ax.set_axis_off()
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_augmentations(
    originals: ArrayLike,
    draws: ArrayLike,
    *,
    names: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows what augmentations make of images, a row an augmentation: the original, then draws.

    Args:
      originals: [R, H, W, C] uint8, C 1 or 3.
      draws: [R, N, H, W, C] numbers on the 0..255 scale; what is beyond it is shown as its end.
      names: of the R augmentations.
      captions: what is written below each draw, R times N of them, of a line or more; empty for
        nothing.
      title: heading of the figure.
      path: where to save the figure as PNG.

    Returns:
      The figure; each image is an axes, row by row.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if originals are no such images, draws are of another shape or not finite, or there
        are not as many names or captions as there are rows and draws.
      WorkdirError: if `path` cannot be written.
    """
    originals, draws = np.asarray(originals), np.asarray(draws)
    _check_draws(originals, draws, names, captions)
    rows, columns = draws.shape[:2]
    below = captions or [[""] * columns] * rows
    # Inches below each row.
    lines = [max((len(text.splitlines()) for text in texts), default=0) for texts in below]
    height = rows + sum(0.13 * count + 0.06 * bool(count) for count in lines)
    shown = np.clip(np.round(draws), 0, 255).astype(np.uint8)
    with figure_style():
        figure = Figure(
            figsize=(1.02 * (columns + 1) + 1.4, 1.02 * height + (0.75 if title else 0.4)),
            layout="constrained",
        )
        axes = figure.subplots(rows, columns + 1, squeeze=False)
        for row, (name, line) in enumerate(zip(names, axes, strict=True)):
            for ax, image in zip(line, [originals[row], *shown[row]], strict=True):
                _draw_image(ax, image)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
            for ax, text in zip(line[1:], below[row], strict=True):
                ax.set_xlabel(text, fontsize=8, labelpad=2)
        axes[0, 0].set_title("original", fontsize=10, loc="center", color=MUTED)
        for number, ax in enumerate(axes[0, 1:]):
            ax.set_title(f"step {number}", fontsize=10, loc="center", color=MUTED)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_history(
    history: History,
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows loss and accuracy over the epochs, for training and validation.

    Args:
      history: a run's history.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure; axes "Loss" and "Accuracy".

    Raises:
      ConfigError: by `save_figure`.
      WorkdirError: if `path` cannot be written.
    """
    with figure_style():
        figure = Figure(figsize=(10, 4), layout="constrained")
        _draw_history(figure.subplots(1, 2), history)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_learning_rates(
    found: LearningRates,
    *,
    current: float | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows the loss over the learning rate, and the rates that suggest themselves.

    Args:
      found: as `find_learning_rate` returns it.
      current: a rate to compare with, > 0, such as the recipe's.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure, of one axes.

    Raises:
      ConfigError: if `current` is not > 0, or by `save_figure`.
      WorkdirError: if `path` cannot be written.
    """
    if current is not None:
        check_float("current", current, above_minimum=True)
    smoothed = np.array(found.smoothed)
    marks = (
        ("steepest slope", found.steepest, VERMILION, "v", "--"),
        ("a tenth of the minimum's", found.tenth_of_minimum, GREEN, "s", "-."),
        ("the present one", current, INK, "D", ":"),
    )
    with figure_style():
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        ax = figure.subplots()
        ax.plot(found.rates, found.losses, color=MUTED, lw=0.8, alpha=0.6, label="loss of a batch")
        ax.plot(found.rates, smoothed, color=BLUE, label="smoothed")
        for name, rate, colour, marker, line in marks:
            if rate is None:
                continue
            ax.axvline(rate, color=colour, linestyle=line, linewidth=1.2)
            height = np.interp(math.log(rate), np.log(found.rates), smoothed)
            label = f"{name}: {rate:.2g}"
            ax.plot([rate], [height], line, marker=marker, color=colour, lw=1.2, label=label)
        ax.set_xscale("log")
        # Not as powers in mathematical type, which this look leaves unread.
        ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        # What follows once the loss rises would make all before it flat.
        room = max(smoothed[0] - smoothed.min(), 0.05 * smoothed[0])
        ax.set_ylim(smoothed.min() - 0.4 * room, max(found.losses[0], smoothed[0]) + 0.6 * room)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.set_title("Loss while the learning rate rises")
        figure.legend(loc="outside lower center", ncols=3)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_confusion_matrix(
    matrix: ArrayLike,
    *,
    class_names: Sequence[str],
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows how often each class was taken for each, with the accuracy of each class.

    A cell says the count and its share of the row, that is of the true class.  With more than 20
    classes cells are colours alone, beside a scale of them, and with more than 120 only some of the
    classes are named.

    Args:
      matrix: [C, C] counts; rows true, columns predicted.
      class_names: the C names.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure, of one axes.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if `matrix` is no square of counts, or `class_names` has another length.
      WorkdirError: if `path` cannot be written.
    """
    counts = _check_named_matrix(matrix, class_names)
    with figure_style():
        side = _matrix_side(counts)
        figure = Figure(figsize=(side + 3.0, side + (2.0 if title else 1.6)), layout="constrained")
        _draw_confusion_matrix(figure.subplots(), counts, class_names)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_predictions(
    images: ArrayLike,
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    class_names: Sequence[str],
    count: int = 12,
    seed: int | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows random images with the class predicted, the confidence, and the true class.

    A right prediction has a check mark and a solid frame, a wrong one a cross, a dashed frame and
    the true class below.

    Args:
      images: [N, H, W, C] uint8, C 1 or 3.
      labels: [N] integers, 0..len(class_names) - 1.
      probabilities: [N, len(class_names)] floats, 0..1, each row adding up to 1 (softmax, not
        logits).
      class_names: the name of each label.
      count: images to show, >= 1; with fewer than that, all are shown.
      seed: chooses the images; None chooses anew each time.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure; each image is an axes.

    Raises:
      ConfigError: if `count` is not a whole number >= 1, or by `save_figure`.
      DataError: if arrays have the wrong shape, dtype, range or length.
      WorkdirError: if `path` cannot be written.
    """
    count = check_int("count", count)
    images, labels = _check_examples(images, labels, class_names)
    chances = _check_probabilities(probabilities, len(images), class_names)
    columns = min(6, count, len(images))
    rows = math.ceil(min(count, len(images)) / columns)
    with figure_style():
        figure = Figure(
            figsize=(max(3.0, 1.6 * columns + 0.2), 1.95 * rows + (0.5 if title else 0.1)),
            layout="constrained",
        )
        chosen = _choose(len(images), count, seed)
        _draw_predictions(figure, images, labels, chances, class_names, chosen, columns)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_mistakes(
    images: ArrayLike,
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    class_names: Sequence[str],
    count: int = 24,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows the mistakes that a model is most confident of, the worst first.

    Above each image are the class predicted and its probability, below it the true class and the
    probability of that.

    Args:
      images: [N, H, W, C] uint8, C 1 or 3.
      labels: [N] integers, 0..len(class_names) - 1.
      probabilities: [N, len(class_names)] floats, 0..1, each row adding up to 1 (softmax, not
        logits).
      class_names: the name of each label.
      count: images to show, >= 1; with fewer mistakes than that, all are shown.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure; each image is an axes.

    Raises:
      ConfigError: if `count` is not a whole number >= 1, or by `save_figure`.
      DataError: if arrays have the wrong shape, dtype, range or length.
      WorkdirError: if `path` cannot be written.
    """
    count = check_int("count", count)
    images, labels = _check_examples(images, labels, class_names)
    chances = _check_probabilities(probabilities, len(images), class_names)
    worst = worst_mistakes(labels, chances, count=count)
    shown = len(worst.indices)
    columns = max(1, min(6, shown))
    rows = max(1, math.ceil(shown / columns))
    with figure_style():
        figure = Figure(
            figsize=(max(3.0, 1.6 * columns + 0.2), 2.05 * rows + (0.5 if title else 0.1)),
            layout="constrained",
        )
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax in axes.flat[shown:]:
            ax.set_axis_off()
        if not shown:
            axes[0, 0].text(0.5, 0.5, "no mistakes", ha="center", color=MUTED)
        for ax, index, true, predicted, row in zip(
            axes.flat,
            worst.indices,
            worst.labels,
            worst.predicted,
            worst.probabilities,
            strict=False,
        ):
            _draw_image(ax, images[index])
            ax.set_title(
                f"{class_names[predicted]} {row[predicted]:.1%}",
                fontsize=9.5,
                loc="center",
                color=VERMILION,
            )
            ax.set_xlabel(f"is: {class_names[true]} {row[true]:.1%}", fontsize=9.5, labelpad=3)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_reliability(
    bins: Sequence[Sequence[float | None]],
    *,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows how often a model is right when it is how sure, and how often it is how sure.

    Where the bars end on the diagonal, the model is right as often as it says.

    Args:
      bins: of equal width from 0 to 1, each of (mean confidence, accuracy, count), the first two
        None where the count is 0: `calibration(...).bins`, or "calibration_bins" of a summary.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure; axes of the accuracies and of the counts.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if there is no bin, or one is not three such numbers.
      WorkdirError: if `path` cannot be written.

    Source: the reliability diagram and confidence histogram of Guo et al., "On Calibration of
      Modern Neural Networks" (2017), figure 1.
    """
    confidence, accuracies, counts = _check_bins(bins)
    width = 1 / len(counts)
    left = np.arange(len(counts)) * width
    total, is_full = int(counts.sum()), counts > 0
    with figure_style():
        figure = Figure(figsize=(5.2, 5.8 if title else 5.4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        bars: dict[str, Any] = {"width": width, "align": "edge", "edgecolor": "white"}
        upper.bar(left, accuracies, color=BLUE, alpha=0.6, label="accuracy", **bars)
        upper.plot(
            [0, 1], [0, 1], "--", color=INK, linewidth=1.2, label="right as often as it says"
        )
        upper.plot(
            confidence[is_full],
            accuracies[is_full],
            "o",
            color=VERMILION,
            markersize=5,
            label="mean confidence",
        )
        error = float(np.abs(accuracies - confidence)[is_full] @ counts[is_full]) / max(1, total)
        text = f"Expected calibration error {error:.3f}" if total else "No examples"
        upper.set_title(text)
        upper.set_ylabel("accuracy")
        upper.set_ylim(0, 1)
        upper.legend(loc="upper left")
        lower.bar(left, counts / max(1, total), color=MUTED, **bars)
        lower.set_ylabel("share of images")
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)
        figure.align_ylabels()
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_model_eval(
    history: History,
    matrix: ArrayLike,
    images: ArrayLike,
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    class_names: Sequence[str],
    seed: int | None = None,
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows all about one trained model: curves, confusion matrix and sample predictions.

    Args:
      history: the run's history.
      matrix: [C, C] counts; rows true, columns predicted.
      images: [N, H, W, channels] uint8, channels 1 or 3.
      labels: [N] integers, 0..C - 1.
      probabilities: [N, C] floats, 0..1, each row adding up to 1.
      class_names: the C names.
      seed: chooses the sample images; None chooses anew each time.
      title: heading of the figure, such as recipe and data set.
      path: where to save the figure as PNG.

    Returns:
      The figure.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if arrays have the wrong shape, dtype, range or length.
      WorkdirError: if `path` cannot be written.

    Source: the lab's `PlotModelEval`, which printed the three one after the other.
    """
    counts = _check_named_matrix(matrix, class_names)
    images, labels = _check_examples(images, labels, class_names)
    chances = _check_probabilities(probabilities, len(images), class_names)
    side = _matrix_side(counts)
    width = side + 8.6
    columns = int(width / 1.6)  # inches: room for "automobile 100%" above an image
    with figure_style():
        figure = Figure(
            figsize=(width, side + (6.0 if title else 5.6)),
            # Subfigures are set edge to edge; this leaves a margin around them all.
            layout=ConstrainedLayoutEngine(rect=(0.01, 0.01, 0.98, 0.98)),
        )
        (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[side + 1.6, 4.0])
        left, right = upper.subfigures(1, 2, width_ratios=[5.6, side + 3.0])
        _draw_history(left.subplots(2, 1), history)
        _draw_confusion_matrix(right.subplots(), counts, class_names)
        chosen = _choose(len(images), 2 * columns, seed)
        _draw_predictions(lower, images, labels, chances, class_names, chosen, columns)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_comparison(
    names: Sequence[str],
    measured: Sequence[Sequence[float]],
    *,
    reference: Sequence[float | None] | None = None,
    reference_name: str = "reference",
    metric: str = "test accuracy",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows what several recipes reached, run by run, beside the values to be reached.

    Args:
      names: the recipes, top to bottom.
      measured: for each recipe the value of each run; may be empty for a recipe that did not run.
      reference: for each recipe the value to compare with, or None where there is none.
      reference_name: where the reference values come from, for the legend.
      metric: what is measured, for the axis.
      title: heading of the figure.
      path: where to save the figure as PNG.

    Returns:
      The figure, of one axes.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if there is no recipe or no value at all, the lengths differ, or a value is not
        finite.
      WorkdirError: if `path` cannot be written.
    """
    references = [None] * len(names) if reference is None else list(reference)
    for what, values in (("measured", measured), ("reference", references)):
        if len(values) != len(names):
            raise DataError(f"{what} must hold {len(names)} entries, as names, not {len(values)}")
    everything = [v for runs in measured for v in runs] + [v for v in references if v is not None]
    if not everything:
        raise DataError("there is nothing to compare: no measured and no reference value")
    for value in everything:
        if not math.isfinite(value):
            raise DataError(f"values to compare must be finite, not {value!r}")
    with figure_style():
        figure = Figure(
            figsize=(8.5, 0.55 * len(names) + (1.75 if title else 1.35)), layout="constrained"
        )
        ax = figure.subplots()
        for row, (runs, target) in enumerate(zip(measured, references, strict=True)):
            _draw_comparison_row(ax, row, list(runs), target, reference_name)
        ax.set_yticks(range(len(names)), list(names))
        ax.tick_params(axis="y", length=0, labelsize=10)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.spines["left"].set_visible(False)
        ax.set_xlabel(metric)
        ax.margins(x=0.08)
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        _set_title(figure, title)
    return save_figure(figure, path)


def plot_ensemble(
    members: Sequence[float],
    average: Sequence[float],
    vote: Sequence[float],
    *,
    metric: str = "test accuracy",
    title: str | None = None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Shows what models reach alone, and the first few of them together.

    Args:
      members: the value of each model alone.
      average: of the first one, two, ... up to all, by average of probabilities.
      vote: the same by majority vote.
      metric: what is measured, for the axis.
      title: heading of the figure.
      path: where to save the figure as PNG.

    Returns:
      The figure, of one axes.

    Raises:
      ConfigError: by `save_figure`.
      DataError: if there is no value, the lengths differ, or a value is not finite.
      WorkdirError: if `path` cannot be written.
    """
    for what, values in (("members", members), ("average", average), ("vote", vote)):
        if not len(values) or len(values) != len(members):
            raise DataError(
                f"{what} must hold a value for each of one or more members, not {len(values)} for "
                f"{len(members)}"
            )
        for value in values:
            if not math.isfinite(value):
                raise DataError(f"{what} must be finite, not {value!r}")
    sizes = range(1, len(members) + 1)
    with figure_style():
        figure = Figure(figsize=(6.4, 4.2 if title else 3.8), layout="constrained")
        ax = figure.subplots()
        mean = float(np.mean(members))
        ax.axhline(mean, color=MUTED, linewidth=1.2, linestyle=":", label=f"mean of one {mean:.4f}")
        ax.plot(sizes, members, "o", color=MUTED, markersize=6, alpha=0.8, label="each one alone")
        for values, name, colour, line, marker in (
            (average, "by average", BLUE, "-", "o"),
            (vote, "by vote", VERMILION, "--", "s"),
        ):
            label = f"together {name}, all {values[-1]:.4f}"
            ax.plot(sizes, values, line, color=colour, marker=marker, markersize=5, label=label)
        ax.set_xlabel("members")
        ax.set_ylabel(metric)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2)
        _set_title(figure, title)
    return save_figure(figure, path)


def _draw_comparison_row(
    ax: Axes, row: int, runs: list[float], target: float | None, reference_name: str
) -> None:
    """One recipe's runs, their mean and the reference; the numbers at the right edge."""
    at_right: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "va": "center",
        "fontsize": 9,
    }
    if target is not None:
        ax.plot(
            target, row, "D", color=VERMILION, markersize=9, fillstyle="none", label=reference_name
        )
    if runs:
        mean = float(np.mean(runs))
        ax.plot([mean, mean], [row - 0.28, row + 0.28], color=BLUE, linewidth=2.5, label="mean")
        ax.plot(runs, [row] * len(runs), "o", color=BLUE, markersize=6, alpha=0.7, label="one run")
        text = f"{mean:.3f}"
        if len(runs) > 1:
            text += f" ± {np.std(runs, ddof=1):.3f}  ({len(runs)} runs)"
        ax.annotate(text, (1.01, row - (0.16 if target is not None else 0)), **at_right)
    if target is not None:
        below = row + (0.2 if runs else 0)
        ax.annotate(f"{reference_name} {target:.3f}", (1.01, below), color=VERMILION, **at_right)


def _draw_history(axes: Sequence[Axes], history: History) -> None:
    """Loss on the first axes, accuracy on the second."""
    for ax, key, best_of in zip(
        axes, ("loss", "accuracy"), (np.nanargmin, np.nanargmax), strict=True
    ):
        for split, colour, line in (("train", BLUE, "-"), ("validation", VERMILION, "--")):
            epochs, values = (np.asarray(part, float) for part in history.series(split, key))
            if not len(values):
                continue
            label = split
            if np.isfinite(values).any():
                best = int(best_of(np.where(np.isfinite(values), values, np.nan)))
                label = f"{split}, best {values[best]:.3f} at epoch {round(epochs[best], 1):g}"
            # Single points would be invisible as a line; hundreds of markers would hide it.
            marker = ("o" if split == "train" else "s") if len(values) <= 40 else None
            ax.plot(epochs, values, line, color=colour, marker=marker, markersize=4, label=label)
        ax.set_title(key.capitalize())
        ax.set_xlabel("epoch")
        if ax.lines:
            ax.legend(loc="best")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            ax.text(0.5, 0.5, "nothing logged", transform=ax.transAxes, ha="center", color=MUTED)


def _draw_confusion_matrix(ax: Axes, counts: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Cells with count and row share, and each class's accuracy right of its row."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    # Mistakes are a few percent of a row; the root makes their differences visible.
    cells = ax.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    if len(counts) > _MOST_READABLE_CLASSES:
        _finish_large_matrix(ax, counts, class_names, cells)
        return
    for (row, column), count in np.ndenumerate(counts):
        share = shares[row, column]
        # At 0.47 white and ink stand out equally from the cell's blue (about 4 to 1).
        colour = "white" if share > 0.47 else INK if count else MUTED
        at: dict[str, Any] = {"ha": "center", "color": colour}
        ax.text(column, row - 0.02, f"{count:,}", va="bottom", fontsize=9.5, **at)
        text = f"{share:.1%}" if totals[row, 0] else "-"
        ax.text(column, row + 0.07, text, va="top", fontsize=7.5, **at)
    last = len(counts) - 0.3
    ax.text(last, -0.6, "accuracy", va="bottom", fontsize=9, weight="bold")
    for row, share in enumerate(per_class_accuracy(counts)):
        text = "no examples" if math.isnan(share) else f"{share:.1%}"
        ax.text(last, row, text, va="center", fontsize=10)
    ax.set_xticks(range(len(counts)), class_names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(counts)), class_names)
    ax.tick_params(length=0, labelsize=10)
    _finish_matrix(ax, counts)


def _finish_large_matrix(
    ax: Axes, counts: NDArray[np.int64], class_names: Sequence[str], cells: Any
) -> None:
    """Names and accuracies as small as rows are, and a scale of the colours in place of numbers."""
    # So many rows apart that names of 6 points, 0.1 inches with what is between, do not meet.
    apart = math.ceil(0.1 * len(counts) / _matrix_side(counts))
    places = range(0, len(counts), apart)
    names = [_shortened(class_names[place], 20) for place in places]
    ax.set_xticks(places, names, rotation=90)
    ax.set_yticks(places, names)
    ax.tick_params(length=0, labelsize=6)
    last = len(counts)
    for row, share in enumerate(per_class_accuracy(counts)):
        if row % apart == 0:
            text = "-" if math.isnan(share) else f"{share:.0%}"
            ax.text(last, row, text, va="center", fontsize=6)
    bar = ax.figure.colorbar(cells, ax=ax, shrink=0.5, pad=0.04, ticks=_SHARES)
    bar.ax.set_yticklabels([f"{share:.0%}" for share in _SHARES])
    bar.set_label("share of the true class; right of each row its accuracy", fontsize=9)
    bar.outline.set_visible(False)
    _finish_matrix(ax, counts)


def _finish_matrix(ax: Axes, counts: NDArray[np.int64]) -> None:
    """What every confusion matrix has: what its axes are, and how many are right."""
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    total = int(counts.sum())
    right = f"{accuracy(counts):.1%} of {total:,} right" if total else "no examples"
    ax.set_title(f"Confusion matrix: {right}")


def _matrix_side(counts: NDArray[np.int64]) -> float:
    """Inches that make room for the text in the cells, and for the heading above few cells."""
    if len(counts) > _MOST_READABLE_CLASSES:
        return min(12.0, max(7.0, 0.115 * len(counts)))
    return max(4.4, 0.62 * len(counts))


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _draw_predictions(
    figure: FigureBase,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    class_names: Sequence[str],
    chosen: NDArray[np.int64],
    columns: int,
) -> None:
    """The chosen images in rows of `columns`, each with its prediction as heading."""
    axes = figure.subplots(math.ceil(len(chosen) / columns), columns, squeeze=False)
    for ax, index in zip(axes.flat, chosen, strict=False):
        predicted = int(probabilities[index].argmax())
        right = predicted == labels[index]
        _draw_image(ax, images[index])
        colour = GREEN if right else VERMILION
        ax.spines[:].set(visible=True, color=colour, lw=2.5, ls="-" if right else (0, (3, 1.5)))
        confidence = f"{probabilities[index, predicted]:.0%}"
        ax.set_title(
            f"{'✓' if right else '✗'} {_shortened(class_names[predicted], 12)} {confidence}",
            fontsize=9.5,
            loc="center",
            color=colour,
        )
        if not right:
            true = _shortened(class_names[labels[index]], 16)
            ax.set_xlabel(f"is: {true}", fontsize=9.5, labelpad=3)
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()


def _draw_image(ax: Axes, image: NDArray[np.uint8]) -> None:
    # `nearest` shows the pixels the model gets; grey images have a channel axis to drop.
    if image.shape[-1] == 1:
        ax.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        ax.imshow(image, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _set_title(figure: Figure, title: str | None) -> None:
    if title:
        figure.suptitle(title)


def _choose(size: int, count: int, seed: int | None) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(size)[:count]


def _check_named_matrix(matrix: ArrayLike, class_names: Sequence[str]) -> NDArray[np.int64]:
    counts = check_matrix(matrix)
    if len(class_names) != len(counts):
        raise DataError(
            f"class_names must hold {len(counts)} names, one a row of the matrix, "
            f"not {len(class_names)}"
        )
    return counts


def _check_examples(
    images: ArrayLike, labels: ArrayLike, class_names: Sequence[str]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise DataError(
            "images must be [N, H, W, C] uint8 with C 1 or 3, "
            f"not {list(images.shape)} {images.dtype}"
        )
    if not images.size:
        raise DataError(f"images must hold at least one image, not {list(images.shape)}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be [N] integers, not {list(labels.shape)} {labels.dtype}")
    if len(labels) != len(images):
        raise DataError(f"there must be a label an image, not {len(labels)} for {len(images)}")
    if labels.min() < 0 or labels.max() >= len(class_names):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"labels must be in 0..{len(class_names) - 1}, as there are {len(class_names)} "
            f"class_names, not {wrong}"
        )
    return images, labels.astype(np.int64)


def _check_draws(
    originals: NDArray[Any],
    draws: NDArray[Any],
    names: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
) -> None:
    shape = originals.shape
    if len(shape) != 4 or originals.dtype != np.uint8 or shape[-1] not in (1, 3) or not shape[0]:
        raise DataError(
            "originals must be [R, H, W, C] uint8 with C 1 or 3, "
            f"not {list(shape)} {originals.dtype}"
        )
    rows, sides = shape[0], shape[1:]
    if draws.ndim != 5 or not draws.size or (draws.shape[0], *draws.shape[2:]) != shape:
        wanted = ", ".join(map(str, (rows, "N", *sides)))
        raise DataError(f"draws must be [{wanted}], N draws a row, not {list(draws.shape)}")
    if not np.isfinite(np.asarray(draws, np.float64)).all():
        raise DataError("draws must be finite numbers on the 0..255 scale")
    if len(names) != rows:
        raise DataError(f"names must be {rows}, one a row, not {len(names)}")
    if captions is not None and [len(texts) for texts in captions] != [draws.shape[1]] * rows:
        raise DataError(
            f"captions must be {rows} rows of {draws.shape[1]}, not of "
            f"{[len(texts) for texts in captions]}"
        )


def _check_probabilities(
    probabilities: ArrayLike, size: int, class_names: Sequence[str]
) -> NDArray[np.float64]:
    chances = np.asarray(probabilities, dtype=np.float64)
    if chances.shape != (size, len(class_names)):
        raise DataError(
            f"probabilities must be [{size}, {len(class_names)}], a row an image and a column a "
            f"class name, not {list(chances.shape)}"
        )
    return check_probabilities(chances)


def _check_bins(
    bins: Sequence[Sequence[float | None]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Returns confidences and accuracies, 0 where there are none, and counts."""
    if not len(bins):
        raise DataError("bins must hold at least one, not 0")
    rows: list[Any] = [list(entry) for entry in bins]
    for row in rows:
        try:
            *shares, count = [0, 0, 0] if row[2:] == [0] else map(float, row)
            is_good = len(shares) == 2 and count == int(count) >= 0
            is_good = is_good and all(0 <= share <= 1 for share in shares)
        except (TypeError, ValueError, OverflowError):
            is_good = False
        if not is_good:
            raise DataError(
                "each of the bins must be (mean confidence, accuracy, count), the first two in "
                f"0..1, not {tuple(row)!r}"
            )
    table = np.array([[0, 0, 0] if row[2] == 0 else row for row in rows], np.float64)
    return table[:, 0], table[:, 1], table[:, 2].astype(np.int64)
