"""Commands: python -m cifarflow COMMAND ...

    python -m cifarflow replay FOLDER

replay runs a failed step again, from the capsule that its run left in FOLDER, and says which
numbers are not finite.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping

from cifarflow import cli
from cifarflow.errors import ConfigError, check_choice
from cifarflow.replay import replay_capsule
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


# Each with the names of the arguments that follow it.
COMMANDS: Mapping[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "replay": (replay, ("FOLDER",)),
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
    if len(arguments) != len(wanted) or not all(argument.strip() for argument in arguments):
        raise ConfigError(f"{name} must be given {' '.join(wanted)}, not {arguments!r}")
    command(*arguments)


if __name__ == "__main__":
    # Flags stay; a runner of this package takes no words beside them, so those are taken out.
    given = [word for word in sys.argv[1:] if not word.startswith("-")]
    sys.argv = [sys.argv[0], *(word for word in sys.argv[1:] if word.startswith("-"))]
    cli.run(functools.partial(main, given))
