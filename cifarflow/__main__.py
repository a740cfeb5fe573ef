"""The command line: cifarflow COMMAND ..., or python -m cifarflow COMMAND ...

    cifarflow                       # what there is
    cifarflow train --help          # a command's flags
    cifarflow train --recipe=lab_cnn

Each command is a module of `cifarflow.commands`, loaded when it is called: the list of them, and a
word that is none, take no longer than Python itself.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NamedTuple


class Command(NamedTuple):
    """A command, as its line in the list of them says it.

    Attributes:
      summary: what it does.
      words: what it is given, for people; "" for flags alone.
    """

    summary: str
    words: str = ""


# Each is the module of its name in `cifarflow.commands`: its docstring is the command's help,
# `define_flags()` defines its flags, and `main` runs it, given the words if it has a parameter.
COMMANDS = {
    "train": Command("train a recipe, evaluate it, draw what came out"),
    "evaluate": Command("measure one trained model, or compare two", "TARGET [TARGET] [FLAGS]"),
    "report": Command("write one HTML page about one or more runs", "WORKDIR ... [FLAGS]"),
    "recipes": Command("list the recipes and what they reach, or show one", "[NAME]"),
    "data": Command("say which data is where, and verify it"),
    "doctor": Command("look at this machine: what is slow, and why"),
    "replay": Command("run a failed step again, from its capsule", "FOLDER"),
}
_HELP = ("--help", "-h", "help")


def main() -> None:
    """Runs the command that the process was given, and ends the process."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in _HELP and not rest:
        print(_overview())
        sys.exit(0)
    if name in _HELP:
        # As in `cifarflow help train`.
        name, rest = rest[0], ["--help"]
    if name == "--version":
        # Not imported above: the package's own names are for its users.
        print(f"cifarflow {importlib.import_module('cifarflow').__version__}")
        sys.exit(0)
    # Loaded from here on: the above is answered at once.
    from cifarflow import cli

    if name not in COMMANDS:
        sys.exit(cli.complain(_unknown(name)))
    command = COMMANDS[name]
    module = importlib.import_module(f"cifarflow.commands.{name}")
    usage = f"cifarflow {name} {command.words or '[FLAGS]'}"
    if {"--help", "-h"} & set(rest):
        print(cli.help_text(usage, module.__doc__ or "", module.define_flags))
        sys.exit(0)
    module.define_flags()
    argv = [f"cifarflow {name}", *rest]
    cli.run(module.main, argv=argv)


def _overview() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cifarflow COMMAND ...",
            "",
            *lines,
            "",
            "cifarflow COMMAND --help says more of one; cifarflow --version, which version this is",
        ]
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"the command must be one of {', '.join(COMMANDS)}, not {name!r:.80}{meant}"


if __name__ == "__main__":
    main()
