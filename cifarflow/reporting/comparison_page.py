"""The report of several runs beside each other.

    path.write_bytes(comparison_page([read_run("runs/first"), read_run("runs/second")]))

Each run has a letter, by which tables, legends and verdicts call it.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

from cifarflow.errors import CifarflowError
from cifarflow.evaluation.comparison import LEVEL
from cifarflow.recipes.compare import compare_runs
from cifarflow.reporting.charts import Line, join_charts, line_chart
from cifarflow.reporting.markup import Markup, document, join, table, tag
from cifarflow.reporting.run_files import KeptRun
from cifarflow.reporting.run_page import (
    banners,
    footer,
    section,
    sections,
    tiles,
)
from cifarflow.reporting.style import COLOURS
from cifarflow.reporting.wording import NONE, duration, percent, short, shown_value

Named = tuple[str, KeptRun]


def comparison_page(runs: Sequence[KeptRun]) -> bytes:
    """Makes the page of several runs.

    Args:
      runs: at least two, at most as many as there are letters.
    """
    named = list(zip(string.ascii_uppercase, runs))  # noqa: B905 - letters are left over
    parts = [
        ("results", "Results", _results(named)),
        ("recipes", "What differs in the recipes", _recipes(named)),
        ("curves", "Curves", _curves(named)),
        ("verdicts", "Is one better than another?", _verdicts(named)),
        ("runs", "Each run", join(_run(letter, run) for letter, run in named)),
    ]
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts]
    names = list(dict.fromkeys(run.name for run in runs))
    return document(
        f"{len(runs)} runs: {', '.join(names)}",
        tag(
            "header",
            tag("p", "cifarflow: report of several runs", class_="over"),
            tag(
                "h1",
                f"{len(runs)} runs of {_listed(names)}",
            ),
            *(banner for letter, run in named for banner in banners(run, who=_title(letter, run))),
            *_data_banner(runs),
            tag("nav", tag("ul", *links), aria_label="sections"),
        ),
        tag("main", *(section(name, title, content) for name, title, content in parts)),
        footer(),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{len(names)} recipes"


def _title(letter: str, run: KeptRun) -> str:
    return f"{letter}, {run.name} in {run.path.name or run.path}"


def _data_banner(runs: Sequence[KeptRun]) -> list[Markup]:
    """A word of warning where figures beside each other are not of the same data."""
    data = list(dict.fromkeys(run.dataset for run in runs))
    if len(data) < 2:
        return []
    words = f"The data sets are {', '.join(data)}: their figures must not be compared."
    strong = tag("strong", "These runs are not of the same data")
    return [tag("p", strong, words, class_="banner", role="note")]


def _head(letter: str, run: KeptRun) -> Markup:
    """A run's letter in the colour of its curves."""
    place = string.ascii_uppercase.index(letter)
    swatch = tag("span", class_=f"swatch s{place % COLOURS}", aria_hidden="true")
    return tag("span", swatch, f"{letter} {run.path.name or run.path}")


# --- sections -----------------------------------------------------------------------------


# Each: what it is, its value in a run's summary or None, how it is written, and whether more of it
# is better (1), less (-1) or neither.
_FIGURES: Sequence[tuple[str, Callable[[KeptRun], Any], Callable[[Any], str], int]] = (
    ("test accuracy", lambda run: _of(run, "test_accuracy"), lambda v: percent(v, digits=2), 1),
    ("test loss", lambda run: _of(run, "test_loss"), short, -1),
    (
        "calibration error",
        lambda run: run.scores.get("expected_calibration_error"),
        lambda v: percent(v, digits=2),
        -1,
    ),
    ("training", lambda run: _of(run, "train_seconds"), duration, -1),
    ("images/s", lambda run: _of(run, "images_per_second"), lambda v: f"{v:,.0f}", 1),
    ("epochs", lambda run: _of(run, "epochs"), short, 0),
    ("parameters", lambda run: _of(run, "parameters"), lambda v: f"{v:,}", 0),
)


def _of(run: KeptRun, key: str) -> Any:
    return run.summary[key] if run.summary is not None else None


def _results(named: Sequence[Named]) -> Markup:
    """A row a run; the best of a column is bold, where they can be compared."""
    columns = []
    is_one = len({run.dataset for _, run in named}) == 1
    for _, value_of, write, better in _FIGURES:
        values = [value_of(run) for _, run in named]
        known = [value for value in values if value is not None]
        best = (
            (max if better > 0 else min)(known)
            if is_one and better and len(set(known)) > 1
            else None
        )
        columns.append(
            [
                NONE
                if v is None
                else tag("b", write(v))
                if best is not None and v == best
                else write(v)
                for v in values
            ]
        )
    rows = []
    for place, (letter, run) in enumerate(named):
        state = "finished" if run.is_finished else "not finished"
        data = f"{run.dataset}, STAND-IN" if run.is_standin else run.dataset
        rows.append(
            [_head(letter, run), run.name, data, *(column[place] for column in columns), state]
        )
    heads = ["run", "recipe", "data", *(name for name, *_ in _FIGURES), "state"]
    where: dict[str, list[str]] = {}
    for letter, run in named:
        if run.summary is not None:
            words = f"in {run.summary['precision']} on {run.summary['device']}"
            where.setdefault(words, []).append(letter)
    told = "; ".join(f"{', '.join(letters)} {words}" for words, letters in where.items())
    note = tag("p", f"{told}.", class_="note") if where else None
    bold = "Bold: the best of its column, by however little" if is_one else "Results"
    return join(
        [
            part
            for part in (table(bold, heads, rows, words=[1, 2, len(heads) - 1]), note)
            if part is not None
        ]
    )


def _recipes(named: Sequence[Named]) -> Markup:
    """A row a field that is not the same in all runs."""
    keys = list(dict.fromkeys(key for _, run in named for key in run.recipe))
    missing = object()
    rows: list[Sequence[object]] = []
    marked, same = [], 0
    for key in keys:
        values = [run.recipe.get(key, missing) for _, run in named]
        if all(value == values[0] for value in values):
            same += 1
            continue
        words = [NONE if value is missing else shown_value(value) for value in values]
        marked += [(len(rows), i + 1) for i, v in enumerate(values) if i and v != values[0]]
        rows.append([key, *words])
    if not rows:
        return tag("p", f"Nothing: all {same} fields are the same.")
    heads = ["field", *(_head(letter, run) for letter, run in named)]
    what = f"Marked: other than in {named[0][0]}. The other {same} fields are the same in all"
    return table(what, heads, rows, words=range(len(heads)), marked=marked)


def _curves(named: Sequence[Named]) -> Markup:
    """All runs in one plot each of accuracy, loss and learning rate."""
    charts = []
    for title, key in (("Accuracy", "accuracy"), ("Loss", "loss")):
        behind, lines = [], []
        for colour, (letter, run) in enumerate(named):
            train, validation = (run.history.series(s, key) for s in ("train", "validation"))
            if train[0]:
                behind.append(Line(f"{letter} train", *train, colour, is_thin=True))
            if validation[0]:
                lines.append(Line(f"{letter} validation", *validation, colour))
        charts.append(line_chart(title, [*behind, *lines]))
    rates = [
        Line(letter, *run.history.series("train", "learning_rate"), colour)
        for colour, (letter, run) in enumerate(named)
    ]
    charts.append(line_chart("Learning rate", [line for line in rates if line.x], from_zero=True))
    return join_charts(charts)


def _verdicts(named: Sequence[Named]) -> Markup:
    """McNemar's test of each pair that was tested on the same images."""
    rows: list[Sequence[object]] = []
    marked, refused = [], []
    for (one, first), (other, second) in itertools.combinations(named, 2):
        if not (first.is_finished and second.is_finished):
            refused.append(f"{one} and {other}: both must be finished")
            continue
        try:
            found = compare_runs(first.path, second.path)
        except CifarflowError as error:
            refused.append(f"{one} and {other}: {error}")
            continue
        found = dataclasses.replace(found, names=(one, other))
        if found.p < LEVEL:
            marked.append((len(rows), 3))
        only = (f"{count:,}" for count in (found.first_only, found.second_only))
        rows.append([f"{one} and {other}", *only, f"{found.p:.2g}", found.verdict])
    parts = []
    if rows:
        heads = ("runs", "only the first right", "only the second right", "p", "verdict")
        what = (
            "McNemar's test on the test images that one of the two gets right and the other wrong"
        )
        body = table(what, heads, rows, words=[4], marked=marked)
        parts.append(body)
        words = (
            "It speaks of these trained models. Whether one recipe is better than another takes "
            "runs of several seeds."
        )
        if len(rows) > 1:
            words += (
                f" Of {len(rows)} pairs one in twenty would show a difference by chance alone: "
                f"take only a p below {LEVEL / len(rows):.2g} for one."
            )
        parts.append(tag("p", words, class_="note"))
    if refused:
        parts.append(tag("p", "Not compared:"))
        parts.append(tag("ul", *(tag("li", reason) for reason in refused), class_="note"))
    return join(parts)


def _run(letter: str, run: KeptRun) -> Markup:
    """All that there is to show of one run, folded."""
    content = [
        tag("section", tag("h3", title), part, id=f"{letter}-{name}")
        for name, title, part in sections(run)
    ]
    return tag("details", tag("summary", _title(letter, run)), tiles(run), *content, class_="run")
