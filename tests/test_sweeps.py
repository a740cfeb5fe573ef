"""Sweeps: what is read, which runs come of it, how they are ranked, and that they go on."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from cifarflow import sweeps
from cifarflow.errors import ConfigError, DataError, WorkdirError
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
BASE = Recipe("base", epochs=1, batch_size=8, validation_fraction=0.2, **tiny.MLP)


@pytest.mark.parametrize(
    ("words", "grid"),
    [
        (["learning_rate=0.01,0.02"], {"learning_rate": (0.01, 0.02)}),
        (["--seed=0..4"], {"seed": (0, 1, 2, 3, 4)}),
        (["seed=3", " batch_size = 8 , 16"], {"seed": (3,), "batch_size": (8, 16)}),
        (["nesterov=true,False"], {"nesterov": (True, False)}),
        (["augment=none;flip,crop:4"], {"augment": ("none", "flip,crop:4")}),
        (["optimizer=sgd,muon"], {"optimizer": ("sgd", "muon")}),
        (["drop_epochs=1,2;3"], {"drop_epochs": ((1.0, 2.0), (3.0,))}),
        (
            ['model_options=filters=[8,16],dropout=0.5;{"filters": [4]}'],
            {"model_options": ({"filters": [8, 16], "dropout": 0.5}, {"filters": [4]})},
        ),
        (["model_options=activation=gelu"], {"model_options": ({"activation": "gelu"},)}),
    ],
)
def test_what_is_read(words, grid):
    assert sweeps.parse_grid(words) == grid


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "a sweep must be over a field at least"),
        (["learning_rate"], "FIELD=VALUE,VALUE,..., not 'learning_rate'"),
        (["seed="], "FIELD=VALUE,VALUE,..., not 'seed='"),
        (["rate=1"], "a sweep's field must be one of .*learning_rate.*, not 'rate'"),
        (["name=a"], "a sweep's field must be one of .*, not 'name'"),
        (["seed=0", "seed=1"], "each field once, not 'seed' twice"),
        (["seed=1,2,1"], "each value once, not 'seed=1,2,1'"),
        (["seed=a"], "seed must be a whole number, not 'a'"),
        (["learning_rate=0.1,"], "learning_rate must be a number, not ''"),
        (["nesterov=yes"], "nesterov must be true or false, not 'yes'"),
        (["drop_epochs=1|2"], "drop_epochs must be numbers joined by commas"),
        (["freeze=bias"], "freeze must be key=value,.*each key once"),
        (["seed=4..0"], "a range must be FIRST..LAST, .*not '4..0'"),
        (["seed=0..99999999"], "at most 10,000 numbers, not '0..99999999'"),
        (["seed=0..999", "batch_size=1..99"], "at most 10,000 runs, not 99,000"),
    ],
)
def test_what_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        sweeps.parse_grid(words)


def test_points():
    grid = sweeps.parse_grid(["learning_rate=0.1,0.02", "seed=0..2"])
    points = sweeps.make_points(BASE, grid)
    assert [point.name for point in points[:4]] == [
        "learning_rate=0.1,seed=0",
        "learning_rate=0.1,seed=1",
        "learning_rate=0.1,seed=2",
        "learning_rate=0.02,seed=0",
    ]
    assert points[4].recipe == dataclasses.replace(BASE, learning_rate=0.02, seed=1)
    assert points[4].setting == {"learning_rate": 0.02}
    # A combination that cannot work is found out before any is run.
    with pytest.raises(ConfigError, match=r"momentum must be .* < 1, not 1"):
        sweeps.make_points(BASE, {"momentum": (0.5, 1.0)})
    with pytest.raises(ConfigError, match=r"validation_fraction must be above 0 for a sweep"):
        sweeps.make_points(BASE, {"validation_fraction": (0.0, 0.1)})


def test_names_of_folders():
    options = [{"filters": [size] * 60} for size in (8, 9)]
    points = sweeps.make_points(get_recipe("lab_cnn"), {"model_options": options})
    assert len({point.name for point in points}) == 2
    augments = sweeps.parse_grid(["augment=none;flip,crop:4"])
    names = [point.name for point in sweeps.make_points(BASE, augments)]
    assert names == ["augment=none", "augment=flip,crop_4"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two rates, of which one is far too large, with two seeds each."""
    workdir = tmp_path_factory.mktemp("sweep")
    grid = sweeps.parse_grid(["learning_rate=0.05,3e38", "seed=0,1"])
    points = sweeps.make_points(BASE, grid)
    said = []
    results = sweeps.run_points(points, workdir=workdir, dataset=tiny.dataset(), say=said.append)
    return workdir, points, results, said


def test_each_point_is_a_run(swept):
    workdir, points, results, said = swept
    assert [result.point for result in results] == points
    summary = json.loads((workdir / "learning_rate=0.05,seed=1" / "summary.json").read_text())
    assert summary["seed"] == 1
    assert results[1].test_accuracy == summary["test_accuracy"]
    assert results[1].train_seconds == summary["train_seconds"]
    assert 0 <= results[1].validation_accuracy <= 1
    assert results[1].validation_loss > 0
    assert said[1].startswith("2/4 learning_rate=0.05,seed=1: validation accuracy ")
    # One that fails is told, and the others go on.
    assert results[2].validation_accuracy is None
    assert "not finite" in results[2].error
    assert said[2].startswith("3/4 learning_rate=3e+38,seed=0: failed: ")


def test_the_ranking(swept):
    workdir, _, results, _ = swept
    best, worst = sweeps.rank(results)
    assert (best.label, worst.label) == ("learning_rate=0.05", "learning_rate=3e+38")
    assert best.accuracy.n == 2
    assert worst.accuracy is None
    text = sweeps.describe(results)
    mean = sum(result.validation_accuracy for result in results[:2]) / 2
    assert f"| learning_rate=0.05 | 2 | {mean:.4f} ± " in text
    assert "| learning_rate=3e+38 | 0 (2 failed) | - |" in text
    tested = sum(result.test_accuracy for result in results[:2]) / 2
    assert (
        f"best on validation, tiny: learning_rate=0.05; its test accuracy is {tested:.4f}" in text
    )
    sweeps.write_csv(results, workdir / "results.csv")
    with (workdir / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["learning_rate"], row["seed"]) for row in rows][1:3] == [
        ("0.05", "1"),
        ("3e+38", "0"),
    ]
    assert float(rows[0]["validation_accuracy"]) == results[0].validation_accuracy
    assert rows[3]["validation_accuracy"] == ""
    assert "not finite" in rows[3]["error"]
    assert sweeps.describe(results[2:]).endswith(f"no run came to its end: {results[2].error}")


def test_how_sure_the_first_place_is():
    def results_of(accuracies, **setting):
        points = [
            sweeps.Point(f"{setting}-{seed}", setting, dataclasses.replace(BASE, seed=seed))
            for seed in range(len(accuracies))
        ]
        return [
            sweeps.PointResult(point, value, 1.0, value, 1.0, "tiny")
            for point, value in zip(points, accuracies, strict=True)
        ]

    good, bad = [0.80, 0.81, 0.805], [0.70, 0.71, 0.705]
    text = sweeps.describe(results_of(bad, l2=0.0) + results_of(good, l2=1e-4))
    assert text.endswith("its 95 % interval lies above that of l2=0")
    text = sweeps.describe(results_of([0.7, 0.9], l2=0.0) + results_of(good, l2=1e-4))
    assert text.endswith(
        "its 95 % interval overlaps that of l2=0: more seeds could change the order"
    )
    text = sweeps.describe(results_of([0.7], l2=0.0) + results_of([0.8], l2=1e-4))
    assert text.endswith("how much of this is chance is not known: sweep over seeds")


def test_a_sweep_goes_on(swept):
    workdir, points, results, _ = swept
    with pytest.raises(WorkdirError, match="holds a run of this recipe already"):
        sweeps.run_points(points[:1], workdir=workdir, dataset=tiny.dataset())
    before = (workdir / points[0].name / "summary.json").read_bytes()
    again = sweeps.run_points(points[:2], workdir=workdir, dataset=tiny.dataset(), resume=True)
    assert again == results[:2]
    assert (workdir / points[0].name / "summary.json").read_bytes() == before


def test_the_same_data_is_loaded_once(tmp_path, monkeypatch):
    loaded = []

    def load_recipe_data(recipe, *, data_dir):
        loaded.append((recipe.data, recipe.validation_fraction, recipe.limit_examples, data_dir))
        return tiny.dataset()

    monkeypatch.setattr(sweeps, "load_recipe_data", load_recipe_data)
    grid = {"validation_fraction": (0.2, 0.3), "limit_examples": (0, 32)}
    points = sweeps.make_points(BASE, grid)
    results = sweeps.run_points(points, workdir=tmp_path, data_dir="here", say=lambda line: None)
    assert all(result.dataset == "tiny" for result in results)
    assert loaded == [("auto", 0.2, 0, "here"), ("auto", 0.3, 0, "here")]
    # Fewer images are the training's own matter.
    summary = json.loads((tmp_path / points[1].name / "summary.json").read_text())
    assert summary["examples"]["train"] == 32


def test_an_unfinished_run_is_no_result(swept):
    workdir, points, _, _ = swept
    with pytest.raises(DataError, match="is not finished: there is no summary"):
        sweeps.read_result(points[2], workdir=workdir)


def test_a_log_without_validation_is_no_result(swept, tmp_path):
    workdir, points, _, _ = swept
    folder = tmp_path / points[0].name
    folder.mkdir()
    for name in ("summary.json", "metrics.jsonl"):
        text = (workdir / points[0].name / name).read_text()
        lines = [line for line in text.splitlines() if '"validation",' not in line]
        (folder / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="must have a validation row, and has none"):
        sweeps.read_result(points[0], workdir=tmp_path)


def test_processes(swept, tmp_path):
    workdir, points, results, _ = swept
    seen, said = [], []

    def command(place):
        seen.append(place)
        # Each sees the variables of its place; the third does not come to its end.
        source, target = workdir / points[place].name, tmp_path / points[place].name
        code = (
            "import os, shutil, sys\n"
            f"if {place} == 2: sys.exit('error: out of ' + os.environ['PLACE'])\n"
            f"shutil.copytree({str(source)!r}, {str(target)!r})\n"
        )
        return [sys.executable, "-c", code]

    found = sweeps.run_processes(
        points[:3],
        workdir=tmp_path,
        command=command,
        environments=[{"PLACE": "luck"}, {"PLACE": "luck"}],
        say=said.append,
    )
    assert found[:2] == results[:2]
    assert found[2] == sweeps.PointResult(points[2], error="out of luck")
    assert seen == [0, 1, 2]
    assert len(said) == 3
    with pytest.raises(ConfigError, match="environments must hold at least one"):
        sweeps.run_processes(points, workdir=tmp_path, command=command, environments=[])
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="cannot write to"):
        sweeps.run_processes(points, workdir=tmp_path / "file", command=command, environments=[{}])


def test_the_runner(tmp_path):
    """In processes of their own, interrupted by nothing, then asked for once more."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
    words = [sys.executable, str(ROOT / "examples" / "sweep.py"), "--data=standin", "--noprogress"]
    # A recipe that holds nothing out.
    words += ["--recipe=lab_mlp", "--epochs=0.2", "--limit_examples=640", "--workdir=s"]
    words += ["--model_options=units=8", "--validation_fraction=0", "--processes=2"]
    sweep = ["--sweep", "learning_rate=0.1,3e38", "seed=5"]

    def run(*more):
        done = subprocess.run(
            [*words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = run(*sweep)
    assert (code, err) == (1, "")
    assert re.search(r"^learning_rate=3e\+38,seed=5 failed: .*not finite", out, re.MULTILINE)
    assert "2 runs of lab_mlp, 2 at a time, in s" in out
    assert "best on validation, standin: learning_rate=0.1;" in out
    # One that fails does not end the others.
    assert "learning_rate=3e+38,seed=5: failed: " in out
    assert "| learning_rate=3e+38 | 0 (1 failed) |" in out
    names = {path.name for path in (tmp_path / "s").iterdir()}
    points = {"learning_rate=0.1,seed=5", "learning_rate=3e+38,seed=5"}
    assert names == {*points, "results.csv", "sweep.png", "logs"}
    recipe = json.loads((tmp_path / "s" / "learning_rate=0.1,seed=5" / "recipe.json").read_text())
    assert (recipe["validation_fraction"], recipe["seed"]) == (0.1, 5)
    code, _, err = run(*sweep)
    assert code == 2
    assert "error: workdir 's' holds a run 'learning_rate=0.1,seed=5' already: add --resume" in err
