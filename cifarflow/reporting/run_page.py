"""The report of one run, section by section.

    path.write_bytes(run_page(read_run("runs/first")))

`sections` are those that the report of several runs shows of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cifarflow.evaluation.metrics import class_scores
from cifarflow.recipes.named import RECIPES
from cifarflow.recipes.recipe import Recipe
from cifarflow.reporting.charts import (
    Line,
    calibration_chart,
    join_charts,
    line_chart,
    share_bar,
    stacked_bar,
)
from cifarflow.reporting.markup import Markup, document, join, picture, scrolling, table, tag
from cifarflow.reporting.run_files import KeptRun
from cifarflow.reporting.style import STRENGTHS
from cifarflow.reporting.wording import duration, percent, short, shown_value

# A table of more classes is a picture; of more rows, every so many of them.
_MOST_CLASSES, _MOST_ROWS, _SHOWN_OPS, _SHOWN_CONFUSIONS = 20, 60, 8, 8
_CURVES = (("Accuracy", "accuracy"), ("Loss", "loss"))


def run_page(run: KeptRun) -> bytes:
    """Makes the page of one run."""
    parts = list(sections(run))
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts]
    return document(
        f"{run.name} on {run.dataset}",
        tag(
            "header",
            tag("p", "cifarflow: report of a run", class_="over"),
            tag("h1", run.name),
            tag("p", _subtitle(run), class_="under"),
            *banners(run),
            tiles(run),
            tag("nav", tag("ul", *links), aria_label="sections"),
        ),
        tag("main", *(section(name, title, content) for name, title, content in parts)),
        footer(),
    )


def section(name: str, title: object, content: Markup) -> Markup:
    """A section that links lead to."""
    return tag("section", tag("h2", title, id=f"{name}-title"), content, id=name)


def footer() -> Markup:
    """The end of every page."""
    return tag(
        "footer",
        "Written by cifarflow from the run's folder alone. This page is one file, loads nothing "
        "and runs no script.",
    )


def sections(run: KeptRun) -> Iterator[tuple[str, str, Markup]]:
    """What there is to show of a run: each a name for links, a title and the content."""
    yield "curves", "Curves", curves(run)
    if run.matrix is not None:
        yield "confusion", "Which class was taken for which", _confusion(run, run.matrix)
        yield "classes", "Class by class", _classes(run, run.matrix)
    if run.summary is not None:
        yield "calibration", "Calibration", _calibration(run)
        yield "mistakes", "Worst mistakes", _mistakes(run)
    yield "time", "Time", _time(run)
    yield "recipe", "Recipe", _recipe(run)
    yield "environment", "Environment and outcome", _environment(run)


# --- head ---------------------------------------------------------------------------------


def _subtitle(run: KeptRun) -> str:
    if run.summary is None:
        return f"on {run.dataset}, not finished"
    count = run.summary["examples"]["train"]
    return f"on {count:,} images of {run.dataset}, {run.summary['device']}"


def banners(run: KeptRun, *, who: str = "") -> Iterator[Markup]:
    """What must not be overlooked.

    Args:
      run: whose.
      who: what the run is called on a page of several.
    """
    before = f"{who}: " if who else ""
    if run.is_standin:
        yield tag(
            "p",
            tag("strong", f"{before}STAND-IN DATA: these are NOT CIFAR-10 results"),
            "Trained and tested on generated images with ten classes of their own. The figures "
            "say nothing about CIFAR-10.",
            class_="banner alarm",
            role="note",
        )
    if run.summary is None:
        yield tag(
            "p",
            tag("strong", f"{before}This run has not finished"),
            f"{progress(run)} Its folder has no summary: it is still going on, or was stopped. "
            "The test set has not been read. To go on with it, give its command again with "
            "--workdir and --resume.",
            class_="banner",
            role="note",
        )
    skipped = run.summary["skipped_steps"] if run.summary and "skipped_steps" in run.summary else 0
    if skipped or run.capsules:
        kept = f" Kept to be run again: {', '.join(run.capsules[:5])}" if run.capsules else ""
        more = " and others" if len(run.capsules) > 5 else ""
        counted = f"Steps that were skipped: {skipped:,}." if skipped else ""
        yield tag(
            "p",
            tag("strong", f"{before}Numbers were not finite"),
            f"{counted}{kept}{more}".strip(),
            class_="banner",
            role="note",
        )


def progress(run: KeptRun) -> str:
    """How far an unfinished run has come, in a sentence."""
    if not run.history.rows:
        return "Nothing is in its log yet."
    last = run.history.rows[-1]
    wanted = run.recipe.get("epochs")
    of = f" of {short(wanted)}" if isinstance(wanted, float) else ""
    return f"Its log ends at step {last['step']:,}, epoch {short(last['epoch'])}{of}."


def tiles(run: KeptRun) -> Markup:
    """The figures one looks for first."""
    cells: list[tuple[str, str, str]] = []
    validation = run.history.series("validation", "accuracy")[1]
    if run.summary is not None:
        found = run.summary
        tested = found["examples"]["test"]
        low, high = _wilson(found["test_accuracy"], tested)
        cells.append(
            (
                "test accuracy",
                percent(found["test_accuracy"], digits=2),
                f"{percent(low)} to {percent(high)} at 95 %",
            )
        )
        cells.append(("test loss", short(found["test_loss"]), ""))
        error = run.scores.get("expected_calibration_error")
        if error is not None:
            cells.append(("calibration error", percent(error, digits=2), "expected, of confidence"))
        seconds, speed = found["train_seconds"], found["images_per_second"]
        cells.append(("training", duration(seconds), f"{speed:,.0f} images/s"))
        cells.append(("epochs", short(found["epochs"]), f"{found['steps']:,} steps"))
        cells.append(("parameters", f"{found['parameters']:,}", ""))
    elif run.history.rows:
        losses = run.history.series("train", "loss")[1]
        cells += [("last training loss", short(loss), "") for loss in losses[-1:]]
        cells.append(("epoch", short(run.history.rows[-1]["epoch"]), "so far"))
    if validation:
        best = f"best {percent(max(validation), digits=2)}"
        cells.insert(1, ("validation accuracy", percent(validation[-1], digits=2), best))
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value, tag("small", note) if note else None))
            for name, value, note in cells
        ),
        class_="tiles",
    )


def _wilson(share: float, count: float) -> tuple[float, float]:
    """The 95 % interval of a share of independent examples.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference"
      (1927).
    """
    if count <= 0:
        return 0.0, 1.0
    square = 1.959964**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    return middle - half, middle + half


# --- sections -----------------------------------------------------------------------------


def curves(run: KeptRun) -> Markup:
    """Accuracy, loss and learning rate over the epochs, and the same in figures."""
    charts = []
    for title, key in _CURVES:
        lines = [
            Line(split, *run.history.series(split, key), colour=colour)
            for colour, split in enumerate(("train", "validation"))
        ]
        charts.append(line_chart(title, [line for line in lines if line.x]))
    rates = Line("Learning rate", *run.history.series("train", "learning_rate"), colour=2)
    charts.append(line_chart("Learning rate", [rates], from_zero=True))
    speeds = Line("Images per second", *run.history.series("train", "images_per_second"), colour=3)
    charts.append(line_chart("Images per second", [speeds], from_zero=True))
    return join([join_charts(charts), _log(run)])


def _log(run: KeptRun) -> Markup:
    """The log as a table, for who does not see the curves."""
    rows = run.history.rows
    every = math.ceil(len(rows) / _MOST_ROWS) or 1
    shown = rows[::-1][::every][::-1]
    lines = [
        (
            f"{row['step']:,}",
            short(row["epoch"]),
            row["split"],
            *("" if row.get(key) is None else short(row[key]) for _, key in _CURVES),
            "" if row.get("learning_rate") is None else short(row["learning_rate"]),
        )
        for row in shown
    ]
    what = "the log" if every == 1 else f"the log, one row of {every}"
    heads = ("step", "epoch", "split", "accuracy", "loss", "learning rate")
    folded = table(what, heads, lines, words=[2])
    return tag("details", tag("summary", "The same as a table"), folded)


def _confusion(run: KeptRun, matrix: np.ndarray) -> Markup:
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    errors = np.where(np.eye(len(matrix), dtype=bool), 0, shares)
    intro = (
        "Rows are the true classes, columns what the model said. Blue, on the diagonal, is right; "
        "the stronger an orange, the more often this mistake is made."
    )
    drawn = _matrix_picture if len(matrix) > _MOST_CLASSES else _matrix_table
    worst = [
        divmod(int(place), len(matrix)) for place in np.argsort(-errors, axis=None, kind="stable")
    ]
    rows = [
        (
            f"{run.class_names[true]} taken for {run.class_names[said]}",
            f"{matrix[true, said]:,}",
            percent(shares[true, said]),
        )
        for true, said in worst[:_SHOWN_CONFUSIONS]
        if errors[true, said] > 0
    ]
    heads = ("mistake", "images", "of its class")
    most = table("The commonest mistakes", heads, rows) if rows else Markup("")
    both = tag("div", drawn(run, matrix, shares, errors), most, class_="beside")
    return join([tag("p", intro), both])


def _matrix_table(
    run: KeptRun, matrix: np.ndarray, shares: np.ndarray, errors: np.ndarray
) -> Markup:
    most = errors.max() or 1.0
    names = run.class_names
    lines = []
    for true, row in enumerate(matrix):
        cells = []
        for said, count in enumerate(row):
            # Of mistakes the root, so that rare ones are seen beside the commonest.
            share = shares[true, said] if true == said else math.sqrt(errors[true, said] / most)
            kind = f"h{_strength(share)} diagonal" if true == said else f"e{_strength(share)}"
            kind += "" if count else " none"
            cells.append(tag("td", f"{count:,}", class_=kind))
        lines.append(tag("tr", tag("th", names[true], scope="row"), *cells))
    corner = tag("th", "true \\ said", scope="col")
    heads = [tag("th", name, scope="col") for name in names]
    caption = f"Confusion matrix, {int(matrix.sum()):,} test images"
    content = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", corner, *heads)),
        tag("tbody", *lines),
        class_="matrix",
    )
    return scrolling(content, label=caption)


def _strength(share: float) -> int:
    return round(STRENGTHS * share)


def _matrix_picture(
    run: KeptRun, matrix: np.ndarray, shares: np.ndarray, errors: np.ndarray
) -> Markup:
    """Of many classes a dot each, as opaque as there are many images."""
    most = errors.max() or 1.0
    diagonal = np.eye(len(matrix), dtype=bool)
    colours = np.where(diagonal[..., None], (0, 114, 178), (213, 94, 0))
    opacity = np.where(diagonal, shares, np.sqrt(errors / most))
    pixels = np.concatenate([colours, np.round(255 * opacity[..., None])], axis=-1)
    alt = f"confusion matrix of {len(matrix)} classes; the commonest mistakes are listed below"
    return tag("p", picture(pixels.astype(np.uint8), alt=alt, class_="heat"))


def _classes(run: KeptRun, matrix: np.ndarray) -> Markup:
    precision, recall, f1 = class_scores(matrix)
    rows = []
    for place, name in enumerate(run.class_names):
        bar = share_bar(recall[place]) if math.isfinite(recall[place]) else None
        rows.append(
            (
                name,
                f"{int(matrix[place].sum()):,}",
                percent(precision[place]),
                tag("span", percent(recall[place]), bar),
                percent(f1[place]),
            )
        )
    tops = [
        f"{percent(run.scores[key], digits=2)} in the first {key.split('_')[1]}"
        for key in ("top_2_accuracy", "top_3_accuracy", "top_5_accuracy")
        if run.scores.get(key) is not None
    ]
    note = tag("p", f"The true class is among the likeliest: {', '.join(tops)}.") if tops else None
    heads = ("class", "images", "precision", "recall (accuracy)", "F1")
    caption = (
        "Precision: of what was taken for the class, the share that is. Recall: of the class, the "
        "share that was found. F1: their harmonic mean."
    )
    return join([part for part in (table(caption, heads, rows), note) if part is not None])


def _calibration(run: KeptRun) -> Markup:
    bins = [row for row in run.scores.get("calibration_bins", ()) if row[2] and None not in row]
    if not bins:
        return _absent("how certain the model was")
    error = run.scores.get("expected_calibration_error")
    words = "Below the dashed line the model is surer than it is right, above it less sure."
    if error is not None:
        words = (
            f"On average its confidence is off by {percent(error, digits=2)} (expected "
            f"calibration error). {words}"
        )
    heads = ("mean confidence", "right", "images")
    rows = [(percent(mean), percent(right), f"{count:,}") for mean, right, count in bins]
    return tag(
        "div",
        calibration_chart(bins),
        tag("div", tag("p", words), table("Test images by confidence", heads, rows)),
        class_="halves",
    )


def _mistakes(run: KeptRun) -> Markup:
    found = run.mistakes
    if found is None:
        return _absent("its worst mistakes")
    if not len(found["images"]):
        return tag("p", "It made none.")
    items = []
    for place, image in enumerate(found["images"]):
        kinds = [int(found[name][place]) for name in ("labels", "predicted")]
        true, said = (run.class_names[kind] for kind in kinds)
        certain = percent(found["probabilities"][place, kinds[1]])
        index = int(found["indices"][place])
        caption = tag(
            "figcaption",
            tag("span", f"{said}, {certain}", class_="said"),
            tag("span", f"is {true}"),
            tag("span", f"test image {index}", class_="note"),
        )
        alt = f"test image {index}, of class {true}, taken for {said}"
        items.append(tag("li", tag("figure", picture(image, alt=alt, class_="pixels"), caption)))
    intro = "The test images whose wrong class the model was surest of, the surest first."
    return join([tag("p", intro), tag("ul", *items, class_="mistakes")])


def _absent(what: str) -> Markup:
    return tag(
        "p", f"The run's folder does not say {what}: an older version wrote it.", class_="note"
    )


def _time(run: KeptRun) -> Markup:
    found = run.summary or {}
    facts = []
    if "train_seconds" in found:
        facts.append(("training", f"{duration(found['train_seconds'])}, after compiling"))
        facts.append(("speed", f"{found['images_per_second']:,.0f} images/s"))
    for key, name in (("compile_seconds", "compiling"), ("total_seconds", "all together")):
        if key in found:
            facts.append((name, duration(found[key])))
    if not facts:
        speeds = run.history.series("train", "images_per_second")[1]
        facts = [("speed", f"{speed:,.0f} images/s at the end of the log") for speed in speeds[-1:]]
    seconds = _facts("Seconds of the run", facts) if facts else None
    if run.profile is None:
        words = "Where the time of a step goes, and what bounds it, a run with --profile says."
        return tag("div", seconds, tag("p", words, class_="note"))
    step = run.profile["step_ms"]
    names = ("device", "host", "input")
    amounts = [(name, run.profile[f"{name}_ms"]) for name in names]
    told = (
        f"{short(step)} ms a step of {short(run.profile['batch_size'])} images, in "
        f"{run.profile['precision']} on {run.profile['device']}"
    )
    parts = [tag("p", tag("strong", run.profile["verdict"]))]
    if any(amount > 0 for _, amount in amounts):
        parts.append(stacked_bar(amounts))
    rows = [
        (op["kind"], f"{op['ms']:,.3f}", percent(op["ms"] / step), short(op["count"]))
        for op in run.profile["ops"][:_SHOWN_OPS]
    ]
    heads = ("the costliest operations", "ms a step", "of the step", "times a step")
    parts.append(tag("div", table(told, heads, rows), seconds, class_="beside"))
    return join(parts)


def _recipe(run: KeptRun) -> Markup:
    changes = recipe_changes(run)
    if changes is None:
        intro = f"{run.name} is none of the recipes that have a name here: all its fields."
    elif not changes:
        intro = f"All fields are those of the recipe {run.name}."
    else:
        intro = (
            f"{len(changes)} of {len(run.recipe) - 1} fields are not those of the recipe "
            f"{run.name}: they are marked."
        )
    texts = {
        name: field.metadata.get("help") for name, field in Recipe.__dataclass_fields__.items()
    }
    keys = [key for key in run.recipe if key != "name"]
    changed = [key for key in keys if key in (changes or {})]
    parts: list[Markup] = [tag("p", intro)]
    if changed:
        rows = [
            (key, shown_value(run.recipe[key]), shown_value((changes or {})[key]))
            for key in changed
        ]
        marked = [(place, 1) for place in range(len(rows))]
        heads = ("field", "this run", f"the recipe {run.name}")
        parts.append(table("What differs", heads, rows, words=[1, 2], marked=marked))
    rows = [(key, shown_value(run.recipe[key]), texts.get(key) or "") for key in keys]
    marked = [(place, 1) for place, key in enumerate(keys) if key in changed]
    heads = ("field", "value", "what it is")
    every = table("All fields", heads, rows, words=[1, 2], marked=marked)
    parts.append(tag("details", tag("summary", f"All {len(keys)} fields"), every))
    return join(parts)


def recipe_changes(run: KeptRun) -> dict[str, Any] | None:
    """The fields in which a run is not its named recipe, and the values there.

    What "auto" became is no change.  None if there is no recipe of that name.
    """
    if run.name not in RECIPES:
        return None
    named = RECIPES[run.name].to_json()
    return {
        key: named.get(key)
        for key, value in run.recipe.items()
        if key != "name" and value != named.get(key) and named.get(key) != "auto"
    }


def _environment(run: KeptRun) -> Markup:
    found = run.summary
    facts: list[tuple[str, object]] = [("folder", tag("code", run.path))]
    if found is None:
        facts.append(("ended", f"not yet. {progress(run)}"))
        return _facts("What is known so far", facts)
    reason = found.get("stop_reason")
    facts.append(("ended", f"stopped: {reason}" if reason else "finished, tested once"))
    facts.append(("skipped steps", f"{found.get('skipped_steps', 0):,} of {found['steps']:,}"))
    scale = found.get("loss_scale_skips")
    if scale:
        facts.append(("steps whose loss scale was too high", f"{scale:,}, as is normal"))
    if found.get("date"):
        facts.append(("date", found["date"]))
    facts.append(("device", found["device"]))
    if found.get("strategy", "none") != "none":
        facts.append(("strategy", f"{found['strategy']}, replicas: {found.get('replicas')}"))
    xla = ", compiled by XLA" if found.get("jit_compile") is True else ""
    facts.append(("precision", f"{found['precision']}{xla}"))
    facts.append(("seed", found["seed"]))
    counts = [f"{found['examples'][split]:,} {split}" for split in ("train", "validation", "test")]
    facts.append(("images", f"{', '.join(counts)}, of {found['dataset']}"))
    if found.get("data_source"):
        facts.append(("data from", tag("code", found["data_source"])))
    versions = ", ".join(f"{name} {value}" for name, value in found.get("versions", {}).items())
    if versions:
        facts.append(("versions", versions))
    facts.append(("SHA-256 of the weights", tag("code", found["weights_sha256"])))
    return _facts("The run and where it ran", facts)


def _facts(caption: str, facts: list[Any]) -> Markup:
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in facts]
    body = tag("table", tag("caption", caption), tag("tbody", *rows), class_="facts")
    return scrolling(body, label=caption)
