"""Lists the named recipes and what they reached, or shows one of them.

    cifarflow recipes
    cifarflow recipes fast94

Of one recipe it shows every field that differs from the default, and the command that runs it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cifarflow.errors import ConfigError
from cifarflow.recipes.named import RECIPES, get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.records import AIMS, PARAMETERS, WHOLE, Record, records_of

# More than the table could take.
_ANY_COLUMNS = 1000
_COUNTED = (
    "Test accuracy is the mean over runs ± standard deviation, on real CIFAR-10. Seconds are those "
    "of training, of the fast ones also of whitening and the final evaluation; compiling is not in "
    "them. The commands that printed all this are in benchmarks/README.md."
)


def define_flags() -> None:
    """Defines the flags: there are none."""


def main(words: list[str]) -> None:
    """Prints the list, or one recipe.

    Args:
      words: nothing, or a recipe's name.

    Raises:
      ConfigError: if there is no such recipe, or more than one word.
    """
    if len(words) > 1:
        raise ConfigError(f"recipes must be given one NAME or none, not {words!r}")
    console = Console(highlight=False)
    if words:
        _show(get_recipe(words[0]), console)
        return
    table = _table()
    wide = console.options.update(max_width=_ANY_COLUMNS)
    if console.measure(table, options=wide).maximum <= console.width:
        console.print(table)
    else:
        _print_lines(console)
    console.print()
    console.print(Text(_COUNTED, style="dim"))


def _table() -> Table:
    """The recipes, a line for each of their records."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("recipe", "model"):
        table.add_column(name, no_wrap=True)
    for name in ("parameters", "epochs", "batch"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("optimizer", no_wrap=True)
    for name in ("test accuracy", "seconds", "runs"):
        table.add_column(name, justify="right" if name != "test accuracy" else "left", no_wrap=True)
    for name in ("machine", "date"):
        table.add_column(name, no_wrap=True)
    for name, recipe in RECIPES.items():
        about: list[str | Text] = [
            Text(name, style="cyan"),
            recipe.model,
            f"{PARAMETERS[name]:,}",
            f"{recipe.epochs:g}",
            str(recipe.batch_size),
            recipe.optimizer,
        ]
        for record in records_of(name):
            if record.epochs is not None:
                about[3] = f"{record.epochs:g}"
            figures = (_accuracy(record), _seconds(record), str(record.runs))
            table.add_row(*about, *figures, record.machine, record.date)
            # What is the same for the next record is not said again.
            about = [""] * len(about)
    return table


def _print_lines(console: Console) -> None:
    """The same for a terminal that is too narrow for the table."""
    for name, recipe in RECIPES.items():
        console.print(Text(name, style="bold cyan"))
        console.print(Padding(_about(name, recipe), (0, 0, 0, 2), expand=False))
        _print_records(name, console)


def _show(recipe: Recipe, console: Console) -> None:
    """One recipe: what it is, what it reached, its fields and its command."""
    console.print(Text.assemble((recipe.name, "bold cyan"), f": {_about(recipe.name, recipe)}"))
    if recipe.name in AIMS:
        console.print(f"  made for a test accuracy of {AIMS[recipe.name]:g}; what it came to:")
    _print_records(recipe.name, console)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        # None stands for an empty mapping.
        if field.name != "name" and value != (field.default or type(value)()):
            table.add_row(field.name, Text(_shown(value)))
    console.print("\nwhat differs from the defaults:")
    console.print(Padding(table if table.rows else "nothing", (0, 0, 0, 2), expand=False))
    # On a line of its own, to be copied whole.
    console.print(f"\nto run it:\n  cifarflow train --recipe={recipe.name}", soft_wrap=True)


def _about(name: str, recipe: Recipe) -> str:
    return (
        f"{recipe.model}, {PARAMETERS[name]:,} parameters; {recipe.epochs:g} epochs of batch "
        f"{recipe.batch_size} by {recipe.optimizer}"
    )


def _print_records(name: str, console: Console) -> None:
    for record in records_of(name):
        runs = f"{record.runs} run{'s' if record.runs > 1 else ''}"
        epochs = f", {record.epochs:g} epochs" if record.epochs else ""
        what = "" if record.counted == WHOLE else f" of {record.counted}"
        line = Text.assemble(
            (_accuracy(record), "bold"),
            f" in {_seconds(record)} s{what}, {record.machine}{epochs}, {runs}, {record.date}",
        )
        console.print(Padding(line, (0, 0, 0, 4), expand=False))


def _accuracy(record: Record) -> str:
    spread = "" if record.deviation is None else f" ± {record.deviation:.4f}"
    return f"{record.accuracy:.4f}{spread}"


def _seconds(record: Record) -> str:
    return f"{record.seconds:.1f}" if record.seconds < 100 else f"{record.seconds:,.0f}"


def _shown(value: Any) -> str:
    """A field's value as its flag takes it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(entry)}" for key, entry in value.items())
    # A float of sixteen digits is a ratio that somebody computed; nobody reads more of it.
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
