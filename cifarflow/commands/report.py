"""Writes one self-contained HTML page about one run, or about several and how they differ.

    cifarflow report runs/first
    cifarflow report runs/first runs/second --out=both.html

The page needs nothing but the browser: it can be sent to anybody.
"""

from __future__ import annotations

from absl import flags

from cifarflow.errors import ConfigError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "out", None, "where the page goes (default: report.html in the first run's folder)"
    )


def main(words: list[str]) -> None:
    """Writes the page, and prints where it is.

    Args:
      words: the runs' folders.

    Raises:
      ConfigError: if there is none.
      CifarflowError: see `write_report`.
    """
    if not words or not all(word.strip() for word in words):
        raise ConfigError(f"report must be given WORKDIR ..., the folders of runs, not {words!r}")
    # Loaded here: what is wrong with a word is said without waiting for plots.
    from cifarflow.reporting.report import write_report

    print(f"the report is {write_report(words, FLAGS.out)}")
