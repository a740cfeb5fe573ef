"""One HTML page about one run or several, from nothing but their folders.

    path = write_report(["runs/first"])                      # runs/first/report.html
    write_report(["runs/first", "runs/second"], out="both.html")

The page is one file that any browser opens, with no network, and that can be sent to anybody: its
curves are drawn in it, its pictures are in it, and it runs no script.  Of several runs it shows
what differs between them, their curves in one plot, and whether one is better than another.  A run
that has not finished is shown as far as it has come.
"""

from __future__ import annotations

import os
import pathlib
import string
from collections.abc import Sequence

from cifarflow.errors import ConfigError, WorkdirError
from cifarflow.files import replacing
from cifarflow.reporting.comparison_page import comparison_page
from cifarflow.reporting.markup import MARK
from cifarflow.reporting.run_files import read_run
from cifarflow.reporting.run_page import run_page

# As many as there are letters to call them by.
_MOST_RUNS = len(string.ascii_uppercase)


def write_report(
    workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Writes the page.

    Args:
      workdirs: the runs' folders, 1 to 26; of several each is told from the others by a letter.
      out: where the page goes; None for report.html in the first of the folders.  A report that is
        there is replaced, and nothing else.

    Returns:
      The path of the page.

    Raises:
      ConfigError: if `workdirs` is no list, of no folder or too many, or has one twice, or `out` is
        no path.
      WorkdirError: if a folder has no run, `out` is a file of another kind, or cannot be written.
      DataError: if a file of a run is damaged, or is not what such a file is.
    """
    if isinstance(workdirs, (str, os.PathLike)):
        raise ConfigError(f"workdirs must be a list of folders, not {os.fspath(workdirs)!r}")
    paths = [pathlib.Path(os.path.expanduser(workdir)) for workdir in workdirs]
    if not 0 < len(paths) <= _MOST_RUNS:
        raise ConfigError(f"a report must be of 1 to {_MOST_RUNS} runs, not of {len(paths)}")
    real = [os.path.realpath(path) for path in paths]
    twice = next((path for i, path in enumerate(paths) if real[i] in real[:i]), None)
    if twice is not None:
        raise ConfigError(f"each run must be given once, not {str(twice)!r} twice")
    if out is not None and not os.fspath(out).strip():
        raise ConfigError(f"out must be the path of a file, not {os.fspath(out)!r}")
    target = pathlib.Path(os.path.expanduser(out)) if out is not None else paths[0] / "report.html"
    runs = [read_run(path) for path in paths]
    _check_target(target)
    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    with replacing(target, what="report") as file:
        file.write(page)
    return target


def _check_target(path: pathlib.Path) -> None:
    """Refuses to write over anything but a report.

    Raises:
      WorkdirError: if the path is of something else.
    """
    try:
        # Not opened before it is known for a file: a pipe would wait.
        begins = b""
        if path.is_file():
            with path.open("rb") as file:
                begins = file.read(len(MARK))
        elif not os.path.lexists(path):
            return
    except OSError as error:
        raise WorkdirError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if begins != MARK:
        raise WorkdirError(
            f"{str(path)!r} is there already and is no report: give another file to write"
        )
