"""One recipe with many settings: every combination of some fields' values, each a run.

    grid = parse_grid(["learning_rate=0.01,0.02", "seed=0..4"])
    points = make_points(get_recipe("lab_cnn"), grid)      # ten of them
    results = run_points(points, workdir="runs/sweep", dataset=dataset)
    print(describe(results))

Each point has a folder of its own in the sweep's, a run like any other, and so a sweep that was
interrupted goes on where it was.  Settings are ranked by their validation accuracy.  The test set,
which each run reads once at its end, is quoted for the first of the ranking and for no other.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cifarflow.data.splits import Dataset
from cifarflow.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    WorkdirError,
    check_choice,
)
from cifarflow.evaluation.statistics import Summary, summarise
from cifarflow.files import replacing
from cifarflow.recipes.build import load_recipe_data
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.options import parse_options
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.training.history import History, table_cell
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import one_line

MOST_POINTS = 10_000
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_SECONDS_A_LOOK = 0.05
# What decides which images are loaded; training itself takes the first of them, as limit_examples.
_DATA_FIELDS = ("data", "image_size", "validation_fraction", "validation_split")


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
      name: what its folder is called, such as "learning_rate=0.01,seed=3".
      setting: the swept fields and their values, without the seed.
      recipe: with all of them.
    """

    name: str
    setting: Mapping[str, Any]
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class PointResult:
    """What came of a point.

    Attributes:
      point: which.
      validation_accuracy: that of the last validation, 0..1; None if the run failed.
      validation_loss: likewise.
      test_accuracy: of the run's one look at the test set; None if it failed.
      train_seconds: of training.
      dataset: the name of the data; "" if it failed.
      error: why it failed, or "".
    """

    point: Point
    validation_accuracy: float | None = None
    validation_loss: float | None = None
    test_accuracy: float | None = None
    train_seconds: float | None = None
    dataset: str = ""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The runs of one setting, which differ in their seed.

    Attributes:
      label: the setting in words.
      results: of its seeds.
      accuracy: validation accuracies, summarised; None if every run failed.
    """

    label: str
    results: tuple[PointResult, ...]
    accuracy: Summary | None


def parse_grid(words: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Reads what is swept over.

    Args:
      words: one a field: "learning_rate=0.01,0.02", "seed=0..4" (0 and 4 included),
        "nesterov=true,false".  Where a value has commas itself, values are parted by semicolons:
        "augment=none;flip,crop:4", "model_options=filters=[32,64];filters=[64,64]".

    Returns:
      Fields of `Recipe` and their values, in the order given.

    Raises:
      ConfigError: if a field is unknown or given twice, has no value or the same one twice, or a
        value is not of its kind.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe) if field.name != "name"}
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().lstrip("-")
        if not equals or not text.strip():
            raise ConfigError(f"a sweep must be FIELD=VALUE,VALUE,..., not {word!r}")
        check_choice("a sweep's field", name, fields)
        if name in grid:
            raise ConfigError(f"a sweep must have each field once, not {name!r} twice")
        parts = _parts(text)
        values = tuple(_read_value(fields[name], part) for part in parts)
        if len({repr(value) for value in values}) < len(values):
            raise ConfigError(f"a sweep must have each value once, not {word!r}")
        grid[name] = values
    if not grid:
        raise ConfigError("a sweep must be over a field at least: --sweep learning_rate=0.01,0.02")
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise ConfigError(f"a sweep must have at most {MOST_POINTS:,} runs, not {count:,}")
    return grid


def _parts(text: str) -> list[str]:
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        return [part.strip() for part in text.split(";" if ";" in text else ",")]
    first, last = int(found[1][:12]), int(found[2][:12])
    if not 0 <= last - first < MOST_POINTS:
        raise ConfigError(
            f"a range must be FIRST..LAST, with at most {MOST_POINTS:,} numbers, not {text!r}"
        )
    return [str(number) for number in range(first, last + 1)]


def _read_value(field: dataclasses.Field[Any], text: str) -> Any:
    """Reads a value as its field's flag would."""
    if field.default is None:
        return parse_options(text, flag=field.name)
    words = {"true": True, "false": False}
    good = "a word"
    try:
        if isinstance(field.default, bool):
            good = "true or false"
            return words[text.lower()]
        if isinstance(field.default, int):
            good = "a whole number"
            return int(text)
        if isinstance(field.default, float):
            good = "a number"
            return float(text)
        if isinstance(field.default, tuple):
            good = "numbers joined by commas, with ; between two values"
            return tuple(float(part) for part in text.split(","))
    except (ValueError, KeyError):
        raise ConfigError(f"{field.name} must be {good}, not {text!r}") from None
    return text


def make_points(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values, the last field changing fastest.

    All are checked here: a bad one must not be found out an hour later.

    Args:
      recipe: what all have in common.
      grid: fields and their values.

    Raises:
      ConfigError: if a combination is out of range, or there are no validation images to rank by.
    """
    points = []
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        changed = get_recipe(recipe, **changes)
        if not changed.validation_fraction:
            raise ConfigError(
                "validation_fraction must be above 0 for a sweep, which ranks by validation "
                f"accuracy, not {changed.validation_fraction!r}"
            )
        setting = {name: value for name, value in changes.items() if name != "seed"}
        points.append(Point(_name(changes), setting, changed))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        # Long values are cut in names.
        points = [
            dataclasses.replace(point, name=f"{place:04d}-{point.name}")
            for place, point in enumerate(points)
        ]
    return points


def _name(changes: Mapping[str, Any]) -> str:
    """A folder's name: what can stand in one everywhere, and is not too long."""
    text = ",".join(f"{name}={_word(value)}" for name, value in changes.items())
    return re.sub(r"[^\w.,=+-]", "_", text)[:120]


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{key}={_word(entry)}" for key, entry in value.items())
    if isinstance(value, (tuple, list)):
        return "-".join(map(_word, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_points(
    points: Sequence[Point],
    *,
    workdir: str | os.PathLike[str],
    dataset: Dataset | None = None,
    resume: bool = False,
    say: Callable[[str], object] = print,
    **options: Any,
) -> list[PointResult]:
    """Trains all points in this process, one after the other.

    Args:
      points: as `make_points` returns them.
      workdir: the sweep's folder; each point has a folder in it.
      dataset: images that are loaded already; None loads those of the recipes, once for all runs
        that follow each other with the same.
      resume: whether runs that are there go on, or stay if they are finished.
      say: told a line when a run is done.
      **options: of `train_recipe`, for each.

    Returns:
      A result a point, in their order.  A run whose numbers are no longer finite, or whose values
      do not fit the data, is a result too: the others go on.

    Raises:
      WorkdirError: if the folder cannot be written, or holds runs and `resume` is False.
      DataError, DataNotFoundError: see `load_data`.
      TrainingInterrupted: after Ctrl-C.
    """
    load = _data_loader(options.pop("data_dir", None), dataset)
    results = []
    for place, point in enumerate(points):
        result = run_point(point, workdir=workdir, load=load, resume=resume, **options)
        say(line_of(result, place=place, count=len(points)))
        results.append(result)
    return results


def _data_loader(
    data_dir: str | pathlib.Path | None, dataset: Dataset | None
) -> Callable[[Recipe], Dataset]:
    """Makes a function that loads a recipe's data, and keeps the last, whole."""

    @functools.lru_cache(maxsize=1)
    def load(**fields: Any) -> Dataset:
        if dataset is not None:
            return dataset
        return load_recipe_data(get_recipe("lab_cnn", **fields), data_dir=data_dir)

    return lambda recipe: load(**{name: getattr(recipe, name) for name in _DATA_FIELDS})


def run_point(
    point: Point,
    *,
    workdir: str | os.PathLike[str],
    load: Callable[[Recipe], Dataset] | None = None,
    **options: Any,
) -> PointResult:
    """Trains one point; as `run_points`, with `load` to load a recipe's data."""
    folder = pathlib.Path(workdir) / point.name
    try:
        dataset = load(point.recipe) if load is not None else None
        train_recipe(point.recipe, workdir=folder, dataset=dataset, **options)
    except (NonFiniteError, ConfigError) as error:
        return PointResult(point, error=one_line(str(error)))
    return read_result(point, workdir=workdir)


def read_result(point: Point, *, workdir: str | os.PathLike[str]) -> PointResult:
    """What a finished run in the sweep's folder came to.

    Raises:
      DataError: if a file is damaged, or the run is not finished.
    """
    folder = Workdir(pathlib.Path(workdir) / point.name)
    summary = folder.read_summary(("dataset", "test_accuracy", "train_seconds"))
    if summary is None:
        raise DataError(
            f"the run in {str(folder.path)!r} is not finished: there is no summary.json"
        )
    rows = [row for row in History.load(folder.metrics).rows if row["split"] == "validation"]
    if not rows:
        raise DataError(f"the log in {str(folder.path)!r} must have a validation row, and has none")
    return PointResult(
        point,
        validation_accuracy=rows[-1]["accuracy"],
        validation_loss=rows[-1]["loss"],
        test_accuracy=summary["test_accuracy"],
        train_seconds=summary["train_seconds"],
        dataset=summary["dataset"],
    )


def run_processes(
    points: Sequence[Point],
    *,
    workdir: str | os.PathLike[str],
    command: Callable[[int], Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    say: Callable[[str], object] = print,
) -> list[PointResult]:
    """Trains the points in processes of their own, as many at a time as there are environments.

    Args:
      points: as `make_points` returns them.
      workdir: the sweep's folder.
      command: of a point's place in `points`, what runs that point into its folder.
      environments: variables that each place at a time has beside this process's own, such as the
        one GPU that it sees.
      say: told a line when a run is done.

    Returns:
      A result a point, in their order.  A process that ends with a status other than 0 gives one
      that quotes the last line it wrote to stderr.

    Raises:
      ConfigError: if there is no environment.
      WorkdirError: if the folder cannot be written.
      KeyboardInterrupt: after Ctrl-C, when all processes have ended.
    """
    if not environments:
        raise ConfigError("environments must hold at least one, not 0")
    logs = pathlib.Path(workdir) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"cannot write to {str(logs)!r}: {error.strerror}") from error
    waiting = list(enumerate(points))
    running: dict[int, tuple[int, Point, subprocess.Popen[bytes]]] = {}
    results: dict[int, PointResult] = {}
    try:
        while waiting or running:
            for slot, environment in enumerate(environments):
                if slot in running or not waiting:
                    continue
                place, point = waiting.pop(0)
                with (logs / f"{point.name}.txt").open("wb") as log:
                    process = subprocess.Popen(
                        list(command(place)),
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                running[slot] = (place, point, process)
            for slot, (place, point, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[slot]
                if status:
                    said = _last_line(logs / f"{point.name}.txt")
                    results[place] = PointResult(point, error=said or f"exit status {status}")
                else:
                    results[place] = _read_or_say(point, workdir=workdir)
                say(line_of(results[place], place=place, count=len(points)))
            time.sleep(_SECONDS_A_LOOK)
    finally:
        # After Ctrl-C in a terminal they have it too; each saves its state and ends.
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()
    return [results[place] for place in range(len(points))]


def _read_or_say(point: Point, *, workdir: str | os.PathLike[str]) -> PointResult:
    """What a run came to; one whose files are damaged has failed."""
    try:
        return read_result(point, workdir=workdir)
    except DataError as error:
        return PointResult(point, error=one_line(str(error)))


def _last_line(path: pathlib.Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1].removeprefix("error: ")) if lines else ""


def line_of(result: PointResult, *, place: int, count: int) -> str:
    """What came of a point, in a line."""
    if result.validation_accuracy is None:
        came = f"failed: {result.error}"
    else:
        came = f"validation accuracy {result.validation_accuracy:.4f}, {result.train_seconds:.1f} s"
    return f"{place + 1}/{count} {result.point.name}: {came}"


def rank(results: Sequence[PointResult]) -> list[Ranked]:
    """Settings by their mean validation accuracy, the best first; those that failed last."""
    by_setting: dict[str, list[PointResult]] = {}
    for result in results:
        by_setting.setdefault(_label(result.point.setting), []).append(result)
    ranked = []
    for label, group in by_setting.items():
        reached = [r.validation_accuracy for r in group if r.validation_accuracy is not None]
        ranked.append(Ranked(label, tuple(group), summarise(reached) if reached else None))
    return sorted(ranked, key=lambda each: -each.accuracy.mean if each.accuracy else 1.0)


def _label(setting: Mapping[str, Any]) -> str:
    words = (f"{name}={_shown(value)}" for name, value in setting.items())
    # In a table a bar would be the end of a cell.
    return ", ".join(words).replace("|", "/") or "the recipe as it is"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(results: Sequence[PointResult]) -> str:
    """A table of the settings, the best first, and in words what it says."""
    ranked = rank(results)
    lines = [
        "| setting | runs | validation accuracy | 95 % interval | validation loss | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for each in ranked:
        done = [result for result in each.results if result.validation_accuracy is not None]
        failed = len(each.results) - len(done)
        runs = f"{len(done)}" + (f" ({failed} failed)" if failed else "")
        if each.accuracy is None:
            lines.append(f"| {each.label} | {runs} | - | - | - | - |")
            continue
        spread = "" if each.accuracy.deviation is None else f" ± {each.accuracy.deviation:.4f}"
        interval = "-"
        if each.accuracy.interval is not None:
            # An accuracy is within 0..1, whatever the spread of so few runs would allow.
            low, high = (min(1.0, max(0.0, end)) for end in each.accuracy.interval)
            interval = f"{low:.4f} to {high:.4f}"
        loss = sum(result.validation_loss or 0.0 for result in done) / len(done)
        seconds = sum(result.train_seconds or 0.0 for result in done) / len(done)
        lines.append(
            f"| {each.label} | {runs} | {each.accuracy.mean:.4f}{spread} | {interval} "
            f"| {loss:.4f} | {seconds:.1f} |"
        )
    best = ranked[0]
    if best.accuracy is None:
        return "\n".join([*lines, "", f"no run came to its end: {best.results[0].error}"])
    tested = [r.test_accuracy for r in best.results if r.test_accuracy is not None]
    lines += [
        "",
        f"best on validation, {_data_of(results)}: {best.label}; its test accuracy is "
        f"{sum(tested) / len(tested):.4f} (n = {len(tested)})",
    ]
    second = ranked[1] if len(ranked) > 1 else None
    if second is not None and second.accuracy is not None:
        lines.append(_how_sure(best.accuracy, second.accuracy, second.label))
    return "\n".join(lines)


def _data_of(results: Sequence[PointResult]) -> str:
    """The names of the data that the runs came to their end on."""
    return ", ".join(dict.fromkeys(result.dataset for result in results if result.dataset))


def _how_sure(best: Summary, second: Summary, label: str) -> str:
    """Whether the first place is more than chance, as far as the intervals say."""
    if best.interval is None or second.interval is None:
        return "with one run a setting, how much of this is chance is not known: sweep over seeds"
    if best.interval[0] > second.interval[1]:
        return f"its 95 % interval lies above that of {label}"
    return f"its 95 % interval overlaps that of {label}: more seeds could change the order"


def write_csv(results: Sequence[PointResult], path: pathlib.Path) -> None:
    """Writes a row a run, with a column for each swept field.

    Args:
      results: as `run_points` returns them.
      path: the file; written anew.

    Raises:
      WorkdirError: if it cannot be written.
    """
    fields = list(dict.fromkeys(name for result in results for name in result.point.setting))
    figures = ("validation_accuracy", "validation_loss", "test_accuracy", "train_seconds", "error")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*fields, "seed", *figures])
    for result in results:
        setting = [_shown(result.point.setting.get(name, "")) for name in fields]
        shown = [getattr(result, name) for name in figures]
        writer.writerow(map(table_cell, [*setting, result.point.recipe.seed, *shown]))
    with replacing(path) as file:
        file.write(text.getvalue().encode())
