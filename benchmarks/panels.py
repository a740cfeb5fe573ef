"""A picture of panels under each other.

with drawn_panels(path, len(results), title="Losses", inches=1.9) as panels:
    for axes, result in zip(panels, results):
        axes.plot(result["losses"])
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cifarflow.files import replacing
from cifarflow.reporting.plots import DOTS_PER_INCH, figure_style


@contextlib.contextmanager
def drawn_panels(
    path: pathlib.Path, count: int, *, title: str, inches: float
) -> Iterator[Sequence[Axes]]:
    """Gives the panels, and saves a PNG when the block has drawn them.

    Args:
      path: the PNG file.
      count: of panels, at least 1.
      title: of the picture.
      inches: the height of a panel.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    with figure_style():
        figure = Figure(figsize=(9, 0.8 + inches * count), dpi=DOTS_PER_INCH, layout="constrained")
        figure.suptitle(title, fontsize=12)
        yield figure.subplots(count, 1, squeeze=False)[:, 0]
        with replacing(path) as file:
            figure.savefig(file, format="png")
