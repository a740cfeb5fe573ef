"""Commands: python -m cifarflow COMMAND ...

    python -m cifarflow replay FOLDER
    python -m cifarflow report WORKDIR [WORKDIR ...] [--out=FILE]

replay runs a failed step again, from the capsule that its run left in FOLDER, and says which
numbers are not finite.  report writes one HTML page about one run or several, into report.html of
the first one's folder, or into FILE.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping

from absl import flags

from cifarflow import cli
from cifarflow.errors import ConfigError, check_choice
from cifarflow.replay import replay_capsule
from cifarflow.reporting.report import write_report
from cifarflow.training.capsule import load_capsule


def replay(folder: str) -> None:
    """Replays a capsule, and prints what was found then and what is found now.

    Args:
      folder: the capsule.
    """
    capsule = load_capsule(folder)
    recipe = (capsule.recipe or {}).get("name")
    # A file's own words, so quoted: they may hold anything.
    print(
        f"step {capsule.step} of {recipe!r:.80}, seed {capsule.seed}, {len(capsule.labels)} images"
    )
    print(f"then: {capsule.found.describe()}")
    found = replay_capsule(capsule)
    print(f"now:  {found.describe()}")
    if found.is_sound != capsule.found.is_sound:
        print("it does not come out as it did: another device or version may round otherwise")


def report(*workdirs: str) -> None:
    """Writes a report, and prints where it is.

    Args:
      *workdirs: the runs' folders.
    """
    print(f"report: {write_report(workdirs, flags.FLAGS['out'].value)}")


# Each with the names of the arguments that follow it; "..." is for more of the last.
COMMANDS: Mapping[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "replay": (replay, ("FOLDER",)),
    "report": (report, ("WORKDIR", "...")),
}


def main(words: list[str]) -> None:
    """Runs a command.

    Args:
      words: its name and arguments.

    Raises:
      ConfigError: if they are none.
    """
    name, *arguments = words or [""]
    command, wanted = COMMANDS[check_choice("the command", name, COMMANDS)]
    is_open = wanted[-1] == "..."
    are_enough = len(arguments) >= 1 if is_open else len(arguments) == len(wanted)
    if not are_enough or not all(argument.strip() for argument in arguments):
        raise ConfigError(f"{name} must be given {' '.join(wanted)}, not {arguments!r}")
    command(*arguments)


if __name__ == "__main__":
    # Flags stay; a runner of this package takes no words beside them, so those are taken out.
    given = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word.startswith("-"))]
    if given[:1] == ["report"]:
        flags.DEFINE_string("out", None, "where the page goes", allow_override=True)
    cli.run(functools.partial(main, given))
