"""A run's folder: who may use it, and that nothing in it is overwritten."""

import json
import shutil

import numpy as np
import pytest

from cifarflow.errors import DataError, WorkdirError
from cifarflow.training.workdir import Workdir

RECIPE = {"name": "mine", "epochs": 2.0, "drop_epochs": [1.0], "model_options": {"units": [8]}}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_folder_is_made(tmp_path):
    folder = tmp_path / "a" / "b"
    workdir = Workdir(folder)
    assert not workdir.open(RECIPE)
    assert json.loads((folder / "recipe.json").read_text()) == RECIPE
    assert list(contents(folder)) == ["recipe.json"]
    assert workdir.checkpoints == folder / "checkpoints"
    assert workdir.metrics == folder / "metrics.jsonl"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workdir("~/run").path == tmp_path / "run"


def test_a_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert not Workdir(tmp_path).open(RECIPE)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_where_there_is_nothing_starts_afresh(tmp_path):
    assert not Workdir(tmp_path).open(RECIPE, resume=True)


def test_the_same_recipe_goes_on_with_resume_only(tmp_path):
    Workdir(tmp_path).open(RECIPE)
    before = contents(tmp_path)
    with pytest.raises(WorkdirError, match="holds a run of this recipe already: add --resume"):
        Workdir(tmp_path).open(RECIPE)
    assert Workdir(tmp_path).open(RECIPE, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"epochs": 3.0}, "epochs=2.0, not 3.0"),
        ({"model_options": {"units": [9]}}, r"model_options=\{'units': \[8\]\}, not"),
        ({"extra": 1}, "extra=None, not 1"),
    ],
)
def test_another_recipe_is_refused(tmp_path, resume, change, quoted):
    Workdir(tmp_path).open(RECIPE)
    before = contents(tmp_path)
    with pytest.raises(WorkdirError, match=f"holds a run with {quoted}.*give another folder"):
        Workdir(tmp_path).open({**RECIPE, **change}, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("stray", ["metrics.jsonl", "checkpoints", "summary.json"])
def test_files_of_an_unknown_run_are_refused(tmp_path, stray, resume):
    (tmp_path / stray).write_text("kept")
    with pytest.raises(WorkdirError, match=f"has {stray} but no recipe.json"):
        Workdir(tmp_path).open(RECIPE, resume=resume)
    assert contents(tmp_path) == {stray: b"kept"}


@pytest.mark.parametrize("below", ["", "run", "a/run"])
def test_a_path_that_cannot_be_a_folder(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WorkdirError, match=r"cannot write to workdir .*give a folder") as caught:
        Workdir(file / below).open(RECIPE)
    assert repr(str(file / below)) in str(caught.value)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("text", ["{", "", "[1]", '"text"', "\udcff"])
def test_a_damaged_recipe(tmp_path, text):
    (tmp_path / "recipe.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = contents(tmp_path)
    with pytest.raises(DataError, match=r"recipe\.json' (is not readable JSON|must hold a JSON)"):
        Workdir(tmp_path).open(RECIPE, resume=True)
    assert contents(tmp_path) == before


def test_a_folder_that_was_removed_is_made_anew(tmp_path):
    folder = tmp_path / "run"
    workdir = Workdir(folder)
    workdir.ensure()
    assert not folder.exists()  # it has not been opened
    workdir.open(RECIPE)
    before = contents(folder)
    workdir.ensure()
    assert contents(folder) == before
    resumed = Workdir(folder)
    resumed.open(RECIPE, resume=True)
    for each in (workdir, resumed):
        shutil.rmtree(folder)
        with pytest.warns(UserWarning, match=r"workdir '.*run' was removed.*it is made anew"):
            each.ensure()
        assert contents(folder) == before
        each.ensure()


def test_a_folder_that_holds_another_run_by_now(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.open(RECIPE)
    shutil.rmtree(tmp_path / "run")
    Workdir(tmp_path / "run").open({**RECIPE, "epochs": 3.0})
    with pytest.raises(WorkdirError, match="run' holds another run by now: nothing more"):
        workdir.ensure()
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"cannot write to workdir .*is not readable JSON"):
        workdir.ensure()
    assert contents(tmp_path) == {"recipe.json": b"{"}


def test_a_folder_that_cannot_be_made_anew(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.open(RECIPE)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("mine")
    with pytest.raises(WorkdirError, match="cannot write to workdir"):
        workdir.ensure()
    assert (tmp_path / "run").read_text() == "mine"


def test_what_a_finished_run_lacks(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.open(RECIPE)
    files = ["metrics.jsonl", "test_outputs.npy", "summary.json", "checkpoints/a"]
    assert workdir.missing(tmp_path / "checkpoints" / "a") == files
    (tmp_path / "checkpoints").mkdir()
    for name in files:
        (tmp_path / name).write_text("")
    assert workdir.missing(tmp_path / "checkpoints" / "a") == []


def test_json_files_come_back(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_json("summary.json") is None
    workdir.write_json("summary.json", {"a": [1, None]})
    workdir.write_json("summary.json", {"a": [2, None]})
    assert workdir.read_json("summary.json") == {"a": [2, None]}
    assert list(contents(tmp_path)) == ["summary.json"]


def test_json_that_cannot_be_written(tmp_path):
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(WorkdirError, match=r"cannot write .*summary\.json"):
        Workdir(tmp_path).write_json("summary.json", {})
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WorkdirError, match="cannot write"):
        Workdir(file).write_json("summary.json", {})


def test_test_outputs_come_back(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_test_outputs() is None
    outputs = np.arange(12, dtype=np.float32).reshape(4, 3)
    workdir.write_test_outputs(outputs)
    np.testing.assert_array_equal(workdir.read_test_outputs(), outputs)
    path = tmp_path / "test_outputs.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"test_outputs\.npy' is damaged"):
        workdir.read_test_outputs()


def test_a_summary_that_is_none(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_summary(["seed"]) is None
    workdir.write_json("summary.json", {"seed": 1})
    assert workdir.read_summary(["seed"]) == {"seed": 1}
    with pytest.raises(DataError, match=r"summary of a run, it lacks 'test_loss': remove it"):
        workdir.read_summary(["seed", "test_loss"])
