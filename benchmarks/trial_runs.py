"""Recipes as a command line names them, their images, and their runs in turn.

    recipes = [read_recipe("--recipe", "fast75"), read_recipe("--compare", "fast75:epochs=2")]
    sets = load_sets(recipes, settings)
    trials = {r.name: start(r, dataset) for r, dataset in zip(recipes, sets)}
    found = run_in_turn({name: run_with(t) for name, t in trials.items()}, seeds=range(3))

A recipe may be followed by fields to change, `fast75:precision=float32,epochs=2`: a variant, which
goes by that whole name.
"""

from __future__ import annotations

import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import harness

from cifarflow import cli
from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import ConfigError, check_choice, check_int, check_seed
from cifarflow.recipes.build import load_recipe_data
from cifarflow.recipes.named import RECIPES, get_recipe
from cifarflow.recipes.options import parse_options
from cifarflow.recipes.recipe import Recipe
from cifarflow.reporting.progress import Progress
from cifarflow.training.signals import noted_signals
from cifarflow.trials import Trial, Trials

Result = TypeVar("Result")
# Held out for --tune and for curves, of a recipe that holds out nothing itself.
HELD_OUT = 0.1
_QUICK_EXAMPLES, _QUICK_BATCH_SIZE = 800, 32


def read_recipe(flag: str, text: str) -> Recipe:
    """Reads NAME or NAME:field=value,...

    Args:
      flag: where it comes from, for messages.
      text: as on the command line; becomes the recipe's name.

    Raises:
      ConfigError: if the recipe or a field is unknown, or a value is out of range.
    """
    name, colon, rest = text.partition(":")
    check_choice(flag, name, RECIPES)
    if not colon:
        return get_recipe(name)
    try:
        changes = parse_options(rest)
    except ConfigError:
        raise ConfigError(
            f"{flag} must be RECIPE or RECIPE:field=value,..., not {text!r}"
        ) from None
    # Seeds are the benchmark's to choose.
    known = [field.name for field in cli.recipe_fields() if field.name != "seed"]
    for field in changes:
        check_choice(f"a field in {flag}", field, known)
    return get_recipe(name, **changes, name=text)


def read_recipes(flag: str, text: str) -> list[Recipe]:
    """Reads recipes joined by commas, each once.

    Raises:
      ConfigError: as `read_recipe`.
    """
    # A comma may stand within a variant too: there no recipe's name follows it.
    names = "|".join(map(re.escape, RECIPES))
    words = re.split(rf",(?=(?:{names})(?:[:,]|$))", text)
    for word in words:
        # What was not split off is no recipe, and is to be quoted alone.
        check_choice(flag, word.partition(":")[0].rpartition(",")[2], RECIPES)
    return [read_recipe(flag, word) for word in dict.fromkeys(words)]


def adapt(recipe: Recipe, settings: harness.Settings, *, held_out: float = 0.0) -> Recipe:
    """A recipe as the flags of the benchmark have it.

    Args:
      recipe: the recipe.
      settings: --data is taken for data=auto; --quick makes sizes tiny.
      held_out: share of the training images to hold out if the recipe holds out none.
    """
    fraction = recipe.validation_fraction or held_out
    changes: dict[str, Any] = {"validation_fraction": fraction}
    if recipe.data == "auto":
        changes["data"] = settings.data
    if settings.quick:
        # Of all that there are, so that recipes that hold out other shares have the same test set.
        examples = round(_QUICK_EXAMPLES * (1 - fraction))
        epochs = min(recipe.epochs, 1.0)
        changes.update(
            epochs=epochs,
            warmup_epochs=min(recipe.warmup_epochs, epochs),
            limit_examples=recipe.limit_examples or examples,
            batch_size=min(recipe.batch_size, _QUICK_BATCH_SIZE),
        )
    return get_recipe(recipe, **changes)


def load_sets(recipes: Sequence[Recipe], settings: harness.Settings) -> list[Dataset]:
    """The images of each recipe; recipes that want the same share them.

    Raises:
      ConfigError: if they are not on one data set, and as `cifarflow.load_recipe_data`.
      DataError, DataNotFoundError: as `cifarflow.load_recipe_data`.
    """
    loaded: dict[Any, Dataset] = {}
    sets = []
    for recipe in recipes:
        key = (
            recipe.data,
            recipe.validation_fraction,
            recipe.validation_split,
            recipe.limit_examples,
        )
        if key not in loaded:
            loaded[key] = load_recipe_data(recipe, data_dir=settings.data_dir)
        sets.append(loaded[key])
        if sets[-1].name != sets[0].name:
            raise ConfigError(
                "recipes that are compared must be on one data set: "
                f"{recipes[0].name} is on {sets[0].name}, {recipe.name} on {sets[-1].name}"
            )
    return sets


def split_of(dataset: Dataset, read: str) -> Split:
    """The images that a trial reads in the end: "test" or "validation"."""
    return dataset.test if read == "test" else dataset.validation


def check_same_images(recipes: Sequence[Recipe], sets: Sequence[Dataset], *, read: str) -> None:
    """Checks that all recipes read the same images in the end.

    Args:
      recipes: the recipes.
      sets: their images.
      read: "test" or "validation".

    Raises:
      ConfigError: if two do not.
    """
    first = split_of(sets[0], read)
    for recipe, dataset in zip(recipes, sets, strict=True):
        split = split_of(dataset, read)
        same = split is first or (
            len(split) == len(first) and bool((split.images == first.images).all())
        )
        if not same:
            raise ConfigError(
                f"recipes that are compared must read the same {read} images: {recipes[0].name} "
                f"reads {len(first):,}, {recipe.name} {len(split):,} or others"
            )


def read_seeds(flag: str, count: int, first: int) -> range:
    """Seeds first, first + 1, ...

    Args:
      flag: the flag that counts them, for messages.
      count: how many.
      first: the first.

    Raises:
      ConfigError: if there is none, or one is out of range.
    """
    seeds = range(first, first + check_int(flag, count))
    check_seed(seeds[0])
    check_seed(seeds[-1])
    return seeds


def start(recipe: Recipe, dataset: Dataset, *, read: str = "test") -> Trials:
    """Compiles a recipe for its runs, and says on stderr how long that took."""
    trials = Trials(recipe, dataset, read=read)
    print(f"{recipe.name}: compiled in {trials.compile_seconds:.1f} s", file=sys.stderr)
    return trials


class _Stopping(Progress):
    """A bar at which a run stops: what interrupts Python while it clears up is lost."""

    def __init__(self, came: Callable[[], int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._came = came

    def update(self, *args: Any, **kwargs: Any) -> None:
        _stop_if_asked(self._came)
        super().update(*args, **kwargs)


def _stop_if_asked(came: Callable[[], int]) -> None:
    if came() == signal.SIGTERM:
        signal.raise_signal(signal.SIGTERM)
    if came():
        raise KeyboardInterrupt


def run_with(trials: Trials, *, curve_epochs: float = 0.0) -> Callable[[int], Trial]:
    """A function of the seed that runs one trial, with a bar on a terminal, and prints its line."""
    name = trials.recipe.name

    def run(seed: int) -> Trial:
        with (
            noted_signals() as came,
            _Stopping(
                came,
                trials.total_steps,
                steps_per_epoch=trials.steps_per_epoch,
                description=f"{name}, seed {seed}",
                # Elsewhere the line below is enough.
                verbose=sys.stderr.isatty(),
            ) as progress,
        ):
            trial = trials.run(seed, curve_epochs=curve_epochs, progress=progress)
            _stop_if_asked(came)
        print(
            f"{name}, seed {seed}: {trial.read} accuracy {trial.accuracy:.4f} in "
            f"{trial.seconds:.1f} s",
            flush=True,
        )
        return trial

    return run


def run_in_turn(
    ways: Mapping[str, Callable[[int], Result]],
    *,
    seeds: Iterable[int],
    keep: Callable[[dict[str, list[Result]]], object] | None = None,
) -> dict[str, list[Result]]:
    """Runs each way with the first seed, then each with the next; every second time in reverse.

    The machine's speed drifts: what slows one slows the others about as often.

    Args:
      ways: functions of the seed, by name.
      seeds: the seeds.
      keep: is called with what there is after each seed but the last, so that an interrupt, or an
        error in the next one, loses nothing.

    Returns:
      What each way returned, seed by seed.
    """
    seeds = list(seeds)
    found: dict[str, list[Result]] = {name: [] for name in ways}
    turns = zip(seeds, harness.in_turn(ways, rounds=len(seeds)), strict=True)
    for done, (seed, names) in enumerate(turns, start=1):
        for name in names:
            found[name].append(ways[name](seed))
        if keep is not None and done < len(seeds):
            with noted_signals() as came:
                keep(found)
            _stop_if_asked(came)
    return found


def describe_reading(sets: Sequence[Dataset], *, read: str) -> str:
    """Says in a sentence which images the accuracies are of."""
    counts = " or ".join(f"{n:,}" for n in dict.fromkeys(len(split_of(s, read)) for s in sets))
    if read == "test":
        return f"accuracy is of the {counts} test images, read once a run, at its end"
    return (
        f"accuracy is of {counts} validation images, held out of the training set; the test set "
        "is not read"
    )


def to_json(trials: Trials, runs: Sequence[Trial], dataset: Dataset) -> dict[str, Any]:
    """A recipe and its runs, as they go into a JSON file."""
    if trials.traces > 1:
        raise RuntimeError(f"the step of {trials.recipe.name} was traced {trials.traces} times")
    return {
        "name": trials.recipe.name,
        "recipe": trials.recipe.to_json(),
        "read": runs[0].read,
        "examples": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "compile_seconds": trials.compile_seconds,
        "steps": trials.total_steps,
        "runs": [dataclasses.asdict(run) for run in runs],
    }
