"""Reports: what is on the page, that it harms nobody, and what is refused."""

import base64
import dataclasses
import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from own_flags import no_flags

import cifarflow
from cifarflow import __main__ as command_line
from cifarflow.errors import ConfigError, DataError, WorkdirError
from cifarflow.evaluation.metrics import class_scores
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.reporting import wording
from cifarflow.reporting.charts import (
    Line,
    calibration_chart,
    line_chart,
    share_bar,
    stacked_bar,
    ticks,
)
from cifarflow.reporting.comparison_page import comparison_page
from cifarflow.reporting.markup import MARK, Markup, document, picture, table, tag, text
from cifarflow.reporting.report import write_report
from cifarflow.reporting.run_files import read_run
from cifarflow.reporting.run_page import run_page
from cifarflow.reporting.style import STRENGTHS, STYLE
from cifarflow.training.workdir import Workdir

# Of a recipe beside its name, as many as a page counts.
FIELDS = len(dataclasses.fields(Recipe)) - 1
# What tries to get out of wherever it is put.
HOSTILE = (
    "</title></style></script><script>document.title='harmed'</script>"
    "<img src=http://hostile.invalid/a.png onerror=\"document.title='harmed'\">\"' onload=x &lt;"
)
PROFILE = {
    "step_ms": 4.0,
    "input_ms": 1.0,
    "host_ms": 1.0,
    "device_ms": 2.0,
    "batch_size": 8.0,
    "precision": "float32",
    "device": "cpu: some, 2 cores",
    "verdict": "The device takes 50 % of the step's 4 ms: what is left is a smaller model.",
    "ops": [{"kind": "MatMul (dense)", "ms": 1.5, "count": 2.0, "family": "product"}],
}


# --- runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two finished runs, on the same data, and one that has only begun."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny.dataset(name="cifar10", train=256, test=200)
    for name, rate in (("first", 0.05), ("second", 1e-9)):
        train_recipe(
            "lab_mlp",
            workdir=folder / name,
            dataset=data,
            epochs=3,
            batch_size=8,
            learning_rate=rate,
            **tiny.MLP,
        )
    shutil.copytree(folder / "first", folder / "begun")
    for name in ("summary.json", "test_outputs.npy", "test_labels.npy", "mistakes.npz"):
        (folder / "begun" / name).unlink()
    lines = (folder / "first" / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [line for line in lines if '"split": "test"' not in line]
    (folder / "begun" / "metrics.jsonl").write_text("".join(rows[:3]))
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """The same, to be changed."""
    shutil.copytree(trained, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "runs"


def change(folder, file="summary.json", /, **values):
    """Changes keys of one of a run's JSON files; None removes one."""
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(values)
    kept = {key: value for key, value in found.items() if value is not None}
    path.write_text(json.dumps(kept))


# --- pages ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """A page taken apart: any tag that is not closed, and all that could run or load, fails."""

    VOID = frozenset(["meta", "img"])
    KNOWN = frozenset(
        [
            *("html", "head", "meta", "title", "style", "body", "header", "main", "nav", "section"),
            *("footer", "h1", "h2", "h3", "p", "strong", "small", "b", "span", "div", "dl", "dt"),
            *("dd", "ul", "li", "a", "table", "caption", "thead", "tbody", "tr", "th", "td", "img"),
            *("figure", "figcaption", "svg", "g", "line", "path", "circle", "rect", "text"),
            *("details", "summary", "code"),
        ]
    )

    def __init__(self, data):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.ids = [], [], [], []
        assert data.startswith(MARK)
        self.feed(data.decode())
        self.close()
        assert not self.open
        assert len(self.ids) == len(set(self.ids))
        links = {attributes["href"] for name, attributes in self.tags if name == "a"}
        assert links <= {f"#{name}" for name in self.ids}

    def handle_starttag(self, name, pairs):
        assert name in self.KNOWN, name
        attributes = dict(pairs)
        assert len(attributes) == len(pairs)
        assert not {"style", "srcdoc", "action", "formaction"} & set(attributes)
        assert not [key for key in attributes if key.startswith("on") or ":" in key]
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
        if name == "img":
            assert attributes["alt"]
        self.ids += [attributes[key] for key in attributes if key == "id"]
        self.tags.append((name, attributes))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        assert data == " a report by cifarflow "

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def count(self, name, **wanted):
        return sum(
            tag == name and all(attributes.get(key) == value for key, value in wanted.items())
            for tag, attributes in self.tags
        )


def page_of(*folders, **options):
    return Page(write_report(folders, **options).read_bytes())


def test_one_run(runs):
    change(runs / "first", "profile/profile.json", **PROFILE)
    path = write_report([runs / "first"])
    assert path == runs / "first" / "report.html"
    page = Page(path.read_bytes())
    summary = json.loads((runs / "first" / "summary.json").read_text())
    for wanted in (
        f"test accuracy {100 * summary['test_accuracy']:.2f} %",
        f"calibration error {100 * summary['scores']['expected_calibration_error']:.2f} %",
        "Curves Accuracy train validation",
        "Which class was taken for which",
        "Confusion matrix, 200 test images",
        "Class by class",
        "Below the dashed line the model is surer than it is right",
        "Worst mistakes",
        PROFILE["verdict"],
        "device 50 % host 25 % input 25 %",
        "MatMul (dense) 1.500 37.5 % 2",
        f"4 of {FIELDS} fields are not those of the recipe lab_mlp",
        "batch_size 8 32 epochs 3.0 15.0 learning_rate 0.05 0.01",
        "ended finished, tested once",
        summary["weights_sha256"],
        summary["device"],
        f"keras {summary['versions']['keras']}",
        "skipped steps 0 of 96",
    ):
        assert wanted in page.text, wanted
    kept = np.load(runs / "first" / "mistakes.npz")
    assert page.count("img", **{"class": "pixels"}) == len(kept["images"]) > 5
    assert f"test image {kept['indices'][0]}" in page.text
    # Nobody who reads it aloud misses a curve, and nobody without a mouse a wide table.
    assert page.count("svg", role="img") == 6
    assert all(
        attributes.get("aria-hidden") == "true" or attributes["aria-label"]
        for name, attributes in page.tags
        if name == "svg"
    )
    assert page.count("div", tabindex="0", role="region") == page.count("table")
    assert page.count("tr") < page.count("th", scope="row") + page.count("th", scope="col")
    assert "STAND-IN" not in page.text
    assert "has not finished" not in page.text


def test_the_scores_are_those_of_the_matrix(runs):
    summary = json.loads((runs / "first" / "summary.json").read_text())
    precision, recall, f1 = class_scores(summary["confusion_matrix"])
    row = " ".join(wording.percent(of[9]) for of in (precision, recall, f1))
    assert f"j 20 {row}" in page_of(runs / "first").text


def test_the_same_run_is_the_same_page(runs):
    first = write_report([runs / "first"]).read_bytes()
    assert write_report([runs / "first"], out=runs / "other.html").read_bytes() == first


def test_an_older_run(runs):
    folder = runs / "first"
    change(
        folder,
        **dict.fromkeys(["scores", "versions", "class_names", "stop_reason", "skipped_steps"]),
        **dict.fromkeys(["data_source", "compile_seconds", "total_seconds", "jit_compile"]),
    )
    for name in ("test_labels.npy", "mistakes.npz", "test_outputs.npy", "metrics.jsonl"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "nothing to draw" in page.text
    assert "does not say how certain the model was: an older version" in page.text
    assert "does not say its worst mistakes" in page.text
    assert "a run with --profile says" in page.text
    assert "skipped steps 0 of 96" in page.text


def test_what_a_newer_run_may_have(runs):
    change(runs / "first", date="2026-11-26 14:00", jit_compile=True, loss_scale_skips=3)
    text_of = page_of(runs / "first").text
    assert "date 2026-11-26 14:00" in text_of
    assert "float32, compiled by XLA" in text_of
    assert "loss scale was too high 3, as is normal" in text_of


def test_how_it_ended(runs):
    change(runs / "first", stop_reason="no better for 3 epochs", skipped_steps=7)
    (runs / "first" / "capsules" / "step_00000012").mkdir(parents=True)
    page = page_of(runs / "first")
    assert "ended stopped: no better for 3 epochs" in page.text
    assert "skipped steps 7 of 96" in page.text
    assert "Steps that were skipped: 7. Kept to be run again: step_00000012" in page.text


def test_a_run_that_has_not_finished(runs):
    page = page_of(runs / "begun")
    rows = (runs / "begun" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert "This run has not finished" in page.text
    assert f"ends at step {last['step']}, epoch {last['epoch']:g} of 3." in page.text
    assert page.count("section") == 4
    assert "Confusion" not in page.text
    (runs / "begun" / "metrics.jsonl").unlink()
    assert "Nothing is in its log yet." in page_of(runs / "begun").text


@pytest.mark.parametrize("where", ["summary", "log", "recipe"])
def test_a_stand_in_says_so(runs, where):
    folder = runs / ("first" if where == "summary" else "begun")
    if where == "summary":
        change(folder, dataset="standin")
    elif where == "recipe":
        change(folder, "recipe.json", data="standin")
    else:
        path = folder / "metrics.jsonl"
        path.write_text(path.read_text().replace("cifar10", "standin"))
    alone, beside = page_of(folder), page_of(runs / "second", folder)
    for page in (alone, beside):
        assert page.count("p", **{"class": "banner alarm"}) == 1
        assert "STAND-IN DATA: these are NOT CIFAR-10 results" in page.text
    assert ", STAND-IN" in beside.text


def test_recipes(runs):
    folder = runs / "first"
    change(folder, "recipe.json", name="my_own")
    assert "my_own is none of the recipes that have a name here" in page_of(folder).text
    named = cifarflow.get_recipe("lab_cnn").to_json()
    # What auto became is no change.
    named.update(precision="mixed_bfloat16", jit_compile="false", data="cifar10")
    (folder / "recipe.json").write_text(json.dumps(named))
    page = page_of(folder)
    assert "All fields are those of the recipe lab_cnn." in page.text
    assert page.count("td", **{"class": "mark"}) == 0
    change(folder, "recipe.json", momentum=0.5, another_field={"a": [1, None]})
    page = page_of(folder)
    assert "momentum 0.5 0.9 another_field a=[1, null] none" in page.text
    # Each in the table of differences, and in that of all fields.
    assert page.count("td", **{"class": "mark"}) == 4


def test_many_classes_are_a_picture(runs):
    folder, count = runs / "first", 30
    (folder / "mistakes.npz").unlink()
    matrix = (np.eye(count, dtype=int) * 5 + np.eye(count, k=1, dtype=int)).tolist()
    change(folder, confusion_matrix=matrix, class_names=[f"c{i}" for i in range(count)])
    page = page_of(folder)
    assert page.count("img", **{"class": "heat"}) == 1
    assert page.count("table", **{"class": "matrix"}) == 0
    assert "c0 taken for c1 1 16.7 %" in page.text


def test_a_run_without_mistakes(runs):
    folder = runs / "first"
    shape = {"images": (0, 8, 8, 3), "probabilities": (0, 10)}
    kept = dict(np.load(folder / "mistakes.npz"))
    Workdir(folder).write_mistakes(
        **{name: np.zeros(shape.get(name, (0,)), array.dtype) for name, array in kept.items()}
    )
    change(folder, confusion_matrix=np.diag([6] * 10).tolist())
    page = page_of(folder)
    assert "It made none." in page.text
    assert "The commonest mistakes" not in page.text


# --- several --------------------------------------------------------------------------------


def test_several_runs(runs):
    path = write_report([runs / "first", runs / "second", runs / "begun"], out=runs / "all.html")
    page = Page(path.read_bytes())
    assert "3 runs of lab_mlp" in page.text
    accuracies = [
        json.loads((runs / name / "summary.json").read_text())["test_accuracy"]
        for name in ("first", "second")
    ]
    assert accuracies[0] > accuracies[1]
    assert f"A first lab_mlp cifar10 {100 * accuracies[0]:.2f} %" in page.text
    # One field differs, in B alone.
    assert "learning_rate 0.05 1e-09 0.05" in page.text
    assert f"The other {FIELDS} fields are the same in all" in page.text
    assert page.count("td", **{"class": "mark"}) == 1 + 2 * 3 * 4
    # Of each run both curves, all in one plot.
    assert "Accuracy A train B train C train A validation B validation" in page.text
    found = cifarflow.compare_runs(runs / "first", runs / "second")
    assert (
        f"A and B {found.first_only} {found.second_only} {found.p:.2g} 'A' is better" in page.text
    )
    assert "A and C: both must be finished" in page.text
    assert "C, lab_mlp in begun: This run has not finished" in page.text
    assert page.count("details", **{"class": "run"}) == 3


def test_runs_that_cannot_be_compared(runs):
    change(runs / "second", dataset="another")
    shutil.copytree(runs / "first", runs / "third")
    (runs / "third" / "test_labels.npy").unlink()
    page = page_of(runs / "first", runs / "second", runs / "third")
    assert "The data sets are cifar10, another: their figures must not be compared." in page.text
    assert page.count("b") == 0
    assert "A and B: runs must be of the same data" in page.text
    assert "A and C: " in page.text
    assert "has no test_labels.npy" in page.text


def test_the_same_run_twice_over(runs):
    shutil.copytree(runs / "first", runs / "copy")
    shutil.copytree(runs / "first", runs / "third")
    page = page_of(runs / "first", runs / "copy", runs / "third")
    assert f"Nothing: all {FIELDS + 1} fields are the same." in page.text
    assert "Of 3 pairs one in twenty" in page.text
    assert "only a p below 0.017" in page.text
    # None is the best of equals.
    assert page.count("b") == 0


# --- nothing in a file harms ----------------------------------------------------------------


def hostile_run(folder):
    """Puts what tries to get out into every text of a run."""
    change(
        folder,
        **dict.fromkeys(["device", "precision", "data_source", "date", "stop_reason"], HOSTILE),
        **dict.fromkeys(["recipe", "dataset", "weights_sha256"], HOSTILE),
        class_names=[f"{HOSTILE}{i}" for i in range(10)],
        versions={HOSTILE: HOSTILE},
    )
    change(folder, "recipe.json", name=HOSTILE, model_options={HOSTILE: [HOSTILE]}, **{HOSTILE: 1})
    change(folder, "profile/profile.json", **{**PROFILE, "verdict": HOSTILE, "device": HOSTILE})
    change(folder, "profile/profile.json", ops=[{"kind": HOSTILE, "ms": 1, "count": 1}])
    (folder / "capsules" / HOSTILE.replace("/", " ")[:90]).mkdir(parents=True)
    rows = (folder / "metrics.jsonl").read_text()
    bad = json.dumps({**json.loads(rows.splitlines()[0]), "split": HOSTILE, "dataset": HOSTILE})
    (folder / "metrics.jsonl").write_text(f"{rows}{bad}\n")


def test_a_hostile_run_is_text(runs):
    hostile_run(runs / "first")
    for page in (page_of(runs / "first"), page_of(runs / "first", runs / "second")):
        assert page.text.count("<script>document.title='harmed'</script>") > 20
        assert page.count("script") == 0


TEXTS = st.text() | st.text("<>&\"'/=!- \n\x00\u202e\ud800`onsrc") | st.just(HOSTILE)
NUMBERS = st.integers(-(10**20), 10**400) | st.floats() | st.sampled_from([0, 1, 1e-308, 1.7e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SUMMARY_TEXTS = (
    *("recipe", "dataset", "device", "precision", "stop_reason", "data_source", "date"),
    "weights_sha256",
)
SUMMARY_KEYS = (
    *("parameters", "epochs", "steps", "seed", "train_seconds", "images_per_second", "examples"),
    *("test_loss", "test_accuracy", "confusion_matrix", "scores", "skipped_steps", "versions"),
    *("loss_scale_skips", "class_names", "compile_seconds", "total_seconds", *SUMMARY_TEXTS),
)
# One file of a run at a time, of which most may hold anything and some may not.
CHANGES = (
    st.tuples(st.just("recipe.json"), st.dictionaries(TEXTS, VALUES, min_size=1))
    | st.tuples(
        st.just("recipe.json"),
        st.dictionaries(st.sampled_from(["name", "data", "epochs", "seed"]), VALUES, min_size=1),
    )
    | st.tuples(
        st.just("summary.json"),
        st.dictionaries(st.sampled_from(SUMMARY_TEXTS), TEXTS, min_size=1),
    )
    | st.tuples(
        st.just("summary.json"),
        st.fixed_dictionaries(
            {
                "class_names": st.lists(TEXTS, min_size=10, max_size=10),
                "versions": st.dictionaries(TEXTS, TEXTS, max_size=3),
                "test_loss": NUMBERS,
                "train_seconds": NUMBERS,
            }
        ),
    )
    | st.tuples(
        st.just("summary.json"),
        st.dictionaries(st.sampled_from(SUMMARY_KEYS), VALUES, min_size=1, max_size=1),
    )
    | st.tuples(
        st.just("profile/profile.json"),
        st.dictionaries(st.sampled_from(sorted(PROFILE)), VALUES | TEXTS, min_size=1, max_size=1),
    )
    | st.tuples(
        st.just("metrics.jsonl"),
        st.dictionaries(
            st.sampled_from(["loss", "accuracy", "epoch", "learning_rate", "dataset"]),
            NUMBERS | TEXTS,
            min_size=1,
        ),
    )
)


@pytest.fixture(scope="module")
def fuzzed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed") / "run"
    shutil.copytree(trained / "first", folder, ignore=shutil.ignore_patterns("checkpoints"))
    change(folder, "profile/profile.json", **PROFILE)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restored():
        for path, data in files.items():
            path.write_bytes(data)
        return folder, read_run(trained / "second")

    return restored


@settings(deadline=None, max_examples=50)
@given(CHANGES)
def test_whatever_a_run_holds(fuzzed, changes):
    folder, other = fuzzed()
    name, values = changes
    if name == "metrics.jsonl":
        rows = (folder / name).read_text()
        row = {**json.loads(rows.splitlines()[0]), **values}
        (folder / name).write_text(f"{rows}{json.dumps(row)}\n")
    else:
        change(folder, name, **{key: value for key, value in values.items() if value is not None})
    try:
        run = read_run(folder)
    except (DataError, WorkdirError):
        # In one line, as `cli` makes all of them; the tests below have what each says.
        return
    Page(run_page(run))
    Page(comparison_page([run, other]))


@pytest.mark.parametrize(
    ("name", "data", "quoted"),
    [
        ("recipe.json", b"{", "recipe.json' is not readable JSON"),
        ("recipe.json", b"[]", "must hold a JSON object"),
        ("summary.json", b'{"a": NaN}', "which JSON has not"),
        ("summary.json", b"{}", "it lacks 'confusion_matrix'"),
        ("metrics.jsonl", b"1\n2\n", "line 1 of"),
        ("mistakes.npz", b"PK", "mistakes.npz' is damaged"),
        ("profile/profile.json", b"{}", "its 'step_ms' is None"),
    ],
)
def test_damaged_files(runs, name, data, quoted):
    path = runs / "first" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(DataError, match=re.escape(quoted)) as caught:
        write_report([runs / "first"])
    assert "\n" not in str(caught.value)
    assert not (runs / "first" / "report.html").exists()


@pytest.mark.parametrize(
    ("values", "quoted"),
    [
        ({"test_accuracy": 7}, "'test_accuracy' is 7"),
        ({"class_names": ["one"]}, "it has 1 class_names for 10 classes"),
        ({"class_names": [1] * 10}, "'class_names' is"),
        ({"confusion_matrix": []}, r"must be of shape \[C, C\]"),
        ({"versions": {"python": 3}}, "'versions' is"),
        ({"confusion_matrix": [[1]], "class_names": ["a"]}, "is of 10 classes, its run of 1"),
    ],
)
def test_summaries_of_no_run(runs, values, quoted):
    change(runs / "first", **values)
    with pytest.raises(DataError, match=quoted):
        write_report([runs / "first"])


def test_mistakes_that_are_no_small_pictures(runs):
    folder = Workdir(runs / "first")
    kept = folder.read_mistakes()
    for images in (np.zeros((1, 1, 513, 3), np.uint8), np.zeros((1, 0, 8, 3), np.uint8)):
        rest = {name: array[:1] for name, array in kept.items() if name != "images"}
        folder.write_mistakes(images=images, **rest)
        with pytest.raises(DataError, match=r"is damaged: its images are \(1, "):
            write_report([folder.path])


# --- the command ----------------------------------------------------------------------------


def test_bad_arguments(runs):
    first = runs / "first"
    (runs / "link").symlink_to(first)
    for workdirs, out, quoted in (
        ([], None, "1 to 26 runs, not of 0"),
        (str(first), None, "must be a list of folders, not '.*first'"),
        ([first] * 27, None, "1 to 26 runs, not of 27"),
        ([first, first], None, "each run must be given once"),
        ([first, runs / "link"], None, r"link' twice"),
        ([first], " ", "out must be the path of a file, not ' '"),
    ):
        with pytest.raises(ConfigError, match=quoted):
            write_report(workdirs, out=out)


def test_folders_without_a_run(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "recipe.json").write_text('{"name": "mine", "ensemble": "test"}')
    for folder, quoted in (
        (runs / "nowhere", "it is no folder"),
        (runs / "first" / "recipe.json", "it is no folder"),
        (tmp_path / "empty", "it has no recipe.json$"),
        (runs, "there are runs below it, in 'begun', 'first', 'second'"),
        (tmp_path / "five", "it holds an ensemble; what came of it is in ensemble.json"),
    ):
        with pytest.raises(WorkdirError, match=quoted):
            write_report([folder])


def test_only_a_report_is_replaced(runs):
    target = runs / "first" / "report.html"
    target.write_text("my own notes")
    with pytest.raises(WorkdirError, match="is there already and is no report"):
        write_report([runs / "first"])
    assert target.read_text() == "my own notes"
    with pytest.raises(WorkdirError, match="is no report"):
        write_report([runs / "first"], out=runs)
    target.write_bytes(MARK + b"of long ago")
    assert len(write_report([runs / "first"]).read_bytes()) > 10_000


def test_a_report_that_cannot_be_written(runs):
    out = runs / "first" / "recipe.json" / "report.html"
    with pytest.raises(WorkdirError, match="cannot write report"):
        write_report([runs / "first"], out=out)


def test_a_target_that_cannot_be_read(runs, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    target = write_report([runs / "first"])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WorkdirError, match=r"cannot read .*report.html': Permission denied"):
        write_report([runs / "first"], out=target)


@pytest.fixture
def command(monkeypatch, capfd):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cifarflow", *map(str, words)])
        with no_flags(), pytest.raises(SystemExit) as caught:
            command_line.main()
        return caught.value.code or 0, *capfd.readouterr()

    return run


def test_the_command(runs, command):
    code, out, err = command("report", runs / "first", runs / "second")
    assert (code, out, err) == (0, f"the report is {runs / 'first' / 'report.html'}\n", "")
    code, out, err = command("report", runs / "begun", f"--out={runs / 'new' / 'page.html'}")
    assert (code, out, err) == (0, f"the report is {runs / 'new' / 'page.html'}\n", "")
    assert (runs / "new" / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        ([], "report must be given WORKDIR ..., the folders of runs, not []"),
        (["nowhere"], "there is no run in 'nowhere'"),
        (["a", " "], "the folders of runs, not ['a', ' ']"),
        (["nowhere", "nowhere"], "each run must be given once, not 'nowhere' twice"),
        (["nowhere", "--out="], "out must be the path of a file, not ''"),
    ],
)
def test_bad_commands(command, tmp_path, monkeypatch, words, quoted):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("report", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert quoted in err


# --- pieces ---------------------------------------------------------------------------------


@given(TEXTS)
def test_text_is_escaped_once(value):
    escaped = text(value)
    assert not set(escaped) & set("<>\"'")
    assert escaped.isprintable()
    assert text(escaped) is escaped
    if value.isprintable() and len(value) <= 1000:
        assert html.unescape(escaped) == value


def test_long_text_is_cut():
    assert text("a" * 5000) == "a" * 1000 + " ..."


def test_tags():
    assert tag("p", "<", None, tag("b", 1), class_="x", text_anchor="end", id=None) == (
        '<p class="x" text-anchor="end">&lt;<b>1</b></p>'
    )
    assert tag("img", alt='"') == '<img alt="&quot;">'
    assert isinstance(tag("p"), Markup)


def test_tables():
    made = table("what", ["run", "name", "number"], [["a", "b", 1]], words=[1], marked=[(0, 2)])
    assert '<th scope="row">a</th><td>b</td><td class="number mark">1</td>' in made
    assert '<th scope="col" class="number">number</th>' in made


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures(channels, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    made = picture(image, alt="some", class_="pixels")
    data = re.search(r'src="data:image/png;base64,([^"]*)"', made)[1]
    path = tmp_path / "it.png"
    path.write_bytes(base64.b64decode(data))
    found = np.round(matplotlib.image.imread(path) * 255).astype(np.uint8)
    np.testing.assert_array_equal(found.reshape(image.shape), image)


def test_a_document_allows_its_own_style_alone():
    page = document("a title", tag("p", "text"))
    policy = re.search(rb'Policy" content="([^"]*)"', page)[1].decode()
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert f"<style>{STYLE}</style>".encode() in page
    assert "</" not in STYLE
    assert "http" not in STYLE
    assert f".h{STRENGTHS} " in STYLE


@settings(deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.integers(2, 10))
def test_ticks_are_round_and_enclose(low, span, most):
    high = min(1e12, low + span)
    found = ticks(low, high, most=most)
    assert 2 <= len(found) <= most + 3
    assert found[0] <= low + 1e-6 * max(1, abs(low))
    assert found[-1] >= high - 1e-6 * max(1, abs(high))
    assert all(a < b for a, b in itertools.pairwise(found))


def test_ticks():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(0.31, 0.58) == [0.3, 0.4, 0.5, 0.6]
    assert ticks(0, 0) == [-1, -0.5, 0, 0.5, 1]
    # A rate that hardly falls: told apart where it is looked at, and flat where it is drawn.
    assert wording.short_all([0.01, 0.009999, 0.009998]) == ["0.01", "0.009999", "0.009998"]
    rates = [Line("rate", [0, 1], [0.01, 0.00999])]
    (_, y0), (_, y1) = points_of(line_chart("Rate", rates, from_zero=True))
    assert abs(y0 - y1) < 1
    (_, y0), (_, y1) = points_of(line_chart("Rate", rates))
    assert abs(y0 - y1) > 200


def points_of(chart):
    path = re.search(r'<path d="M([^"]*)"', chart)[1]
    return [tuple(map(float, point.split())) for point in path.split("L")]


def test_a_curve_is_where_its_points_are():
    chart = line_chart("Loss", [Line("train", [0, 1, 2], [1.0, 0.0, 0.5])])
    (x0, y0), (x1, y1), (x2, y2) = points_of(chart)
    assert x2 - x1 == pytest.approx(x1 - x0)
    # Down is up in an SVG.
    assert y0 < y2 < y1
    assert (y0 + y1) / 2 == pytest.approx(y2, abs=0.1)
    assert "<title>train: 0.5 at 2</title>" in chart
    assert 'aria-label="Loss over epochs: train ends at 0.5"' in chart


@pytest.mark.parametrize(
    "values", [[1e300, 1.0], [1e12, -1e12], [5e-324, 0.0], [0.5, 0.5], [math.nan, 1.0]]
)
def test_a_curve_of_anything(values):
    chart = line_chart("Loss", [Line("train", [0, 1], values)])
    assert all(0 <= x <= 520 and 0 <= y <= 300 for x, y in points_of(chart))
    assert "nan" not in chart


def test_curves_that_are_long_or_many():
    long = Line("a", range(100_000), range(100_000))
    assert len(long.points) == 500
    assert long.points[-1] == (99_999, 99_999)
    assert len(line_chart("Loss", [long])) < 40_000
    assert Line("a", [0], [0], colour=7).classes == "curve s1 dashed"
    assert Line("a", [0], [0], colour=7, is_thin=True).classes == "curve s1 thin"
    assert "nothing to draw" in line_chart("Loss", [Line("a", [1], [math.inf])])


def test_other_charts():
    chart = calibration_chart([[0.5, 0.25, 10], [0.9, 0.95, 40]])
    assert "50.0 % certain, 25.0 % right: 10 images" in chart
    assert 'width="25.0"' in share_bar(0.25)
    assert "<title>host 25 %</title>" in stacked_bar([("device", 3.0), ("host", 1.0)])


def test_wording():
    assert wording.percent(0.7834) == "78.3 %"
    assert wording.percent(math.nan) == "-"
    assert [wording.duration(s) for s in (8.24, 200, 7500, 59.97, 1e300)] == [
        *("8.2 s", "3 min 20 s", "2 h 5 min", "1 min 0 s", "1e+300 s")
    ]
    assert [wording.short(v) for v in (1.04e-6, 0.5, 1234.5678, 1e9, 0)] == [
        *("1.04e-06", "0.5", "1,234.5678", "1e+09", "0")
    ]
    assert wording.shown_value({"a": [1], "b": {"c": "d"}}) == "a=[1], b=c=d"
    assert [wording.shown_value(v) for v in ({}, None, True, 1e-6)] == [
        *("none", "none", "true", "1e-06")
    ]


# --- a real browser -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in Chromium: the document it made of it, its picture, and what it asked for."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")

    def run(path, *, dark=False):
        folder = tmp_path_factory.mktemp("browser")
        command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"),
            *(f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"),
            *(f"--blink-settings=preferredColorScheme={int(not dark)}", "--window-size=1200,900"),
            *(f"--screenshot={folder / 'page.png'}", "--dump-dom", path.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout, matplotlib.image.imread(folder / "page.png"), folder / "net.json"

    return run


def test_a_browser_runs_and_loads_nothing(runs, browse, tmp_path):
    hostile_run(runs / "first")
    made, shot, asked = browse(write_report([runs / "first", runs / "second"]))
    assert "<title>2 runs: &lt;/title&gt;" in made
    assert "hostile.invalid" not in asked.read_text()
    # The style sheet is let in by its hash: else the ground is white.
    ground = tuple(np.round(shot[0, 0, :3] * 255).astype(int))
    assert ground == (0xFC, 0xFC, 0xFB)

    # The same words, not escaped: the browser would have run them, and asked.
    control = tmp_path / "control.html"
    control.write_text(f"<!doctype html><title>{HOSTILE}")
    made, _, asked = browse(control)
    assert "<title>harmed</title>" in made
    assert "hostile.invalid" in asked.read_text()


def test_a_browser_shows_it_dark(runs, browse):
    _, shot, _ = browse(write_report([runs / "first"]), dark=True)
    assert tuple(np.round(shot[0, 0, :3] * 255).astype(int)) == (0x14, 0x16, 0x1A)
    # All the same it shows something: text as light as that of the style.
    assert shot[..., :3].max() > 0.9
