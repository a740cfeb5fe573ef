"""Says which data sets are on this machine and where, and verifies them.

    cifarflow data
    cifarflow data --data_dir=some/folder

Everything is read and held against the official checksums; nothing is written or downloaded.  A
star marks what a run would take.  Exit status: 1 if something that was found is damaged, or
--data_dir holds none of the sets; else 0.
"""

from __future__ import annotations

import itertools

from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cifarflow.errors import ConfigError
from cifarflow.untrusted import one_line

FLAGS = flags.FLAGS
EXIT_WRONG = 1
_STYLES = {"verified": "green", "damaged": "bold red", "not found": "dim"}


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("data_dir", None, "a file or folder to look into first")


def main() -> int:
    """Prints what is found; returns the exit status.

    Raises:
      ConfigError: if --data_dir is no path.
    """
    if FLAGS.data_dir is not None and not FLAGS.data_dir.strip():
        raise ConfigError(f"--data_dir must be a path, not {FLAGS.data_dir!r}")
    # Loaded here: what is wrong with a flag is said at once.
    from cifarflow.data.inspect import DAMAGED, VERIFIED, find_data

    console = Console(highlight=False)
    with Console(stderr=True).status("reading and verifying"):
        sources = find_data(FLAGS.data_dir)
    for name, group in itertools.groupby(sources, key=lambda source: source.data):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        for source in group:
            # Paths are anybody's, and may hold what a terminal obeys.
            about = [Text(one_line(str(source.path)))]
            if source.examples:
                about.append(Text(f"{source.examples:,} images, {source.format}", style="dim"))
            if source.reason:
                about.append(Text(one_line(source.reason, length=500), style="dim"))
            table.add_row(
                Text("*" if source.is_taken else " ", style="bold cyan"),
                source.place,
                Text(source.state, style=_STYLES[source.state]),
                Text("\n").join(about),
            )
        console.print(Text(name, style="bold"))
        console.print(Padding(table, (0, 0, 1, 2)))
    console.print("* what --data takes; a named place that holds none is an error", style="dim")
    is_damaged = any(source.state == DAMAGED for source in sources)
    named = [source.state for source in sources if source.place == "data_dir"]
    is_empty = bool(named) and VERIFIED not in named
    return EXIT_WRONG if is_damaged or is_empty else 0
