"""A run's folder: who may use it, and that nothing in it is overwritten."""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from cifarflow.errors import DataError, WorkdirError
from cifarflow.training.workdir import LATER_FIELDS, Workdir

RECIPE = {"name": "mine", "epochs": 2.0, "drop_epochs": [1.0], "model_options": {"units": [8]}}


def contents(folder):
    """The files, without that of a lock, which goes with it."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.name: p.read_bytes() for p in files}


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
@pytest.mark.parametrize(
    "stray",
    [
        *("metrics.jsonl", "metrics.csv", "test_outputs.npy", "test_labels.npy", "mistakes.npz"),
        *("summary.json", "checkpoints", "capsules", "members", "ensemble.json"),
    ],
)
def test_files_of_an_unknown_run_are_refused(tmp_path, stray, resume):
    (tmp_path / stray).write_text("kept")
    with pytest.raises(WorkdirError, match=f"has {stray} but no recipe.json"):
        Workdir(tmp_path).open(RECIPE, resume=resume)
    assert contents(tmp_path) == {stray: b"kept"}


def test_a_recipe_from_before_there_was_a_field(tmp_path):
    old = RECIPE
    new = {**old, **LATER_FIELDS}
    for number, (there, wanted) in enumerate([(old, new), (new, old)]):
        folder = tmp_path / str(number)
        Workdir(folder).open(there)
        with Workdir(folder) as workdir:
            assert workdir.open(wanted, resume=True)
            workdir.ensure()
        with pytest.raises(WorkdirError, match=r"holds a run with accumulate_steps=1, not 4: give"):
            Workdir(folder).open({**wanted, "accumulate_steps": 4}, resume=True)


def test_what_is_in_a_folder_without_a_run(tmp_path):
    for number in range(10):
        (tmp_path / "many" / f"run{number}").mkdir(parents=True)
        (tmp_path / "many" / f"run{number}" / "recipe.json").write_text("{}")
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "recipe.json").write_text('{"ensemble": "test"}')
    for name, reason in (
        ("nowhere", "it is no folder"),
        ("many", "it has no recipe.json; there are runs below it, in 'run0', .* 'run7' and 2 more"),
        ("five", "it holds an ensemble; what came of it is in ensemble.json, .*members"),
    ):
        with pytest.raises(WorkdirError, match=f"^there is no run in '.*{name}': {reason}$"):
            Workdir(tmp_path / name).read_recipe()
    assert Workdir(tmp_path / "many" / "run3").read_recipe() == {}


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
    for _ in range(2):
        shutil.rmtree(folder)
        with pytest.warns(UserWarning, match=r"workdir '.*run' was removed.*it is made anew"):
            workdir.ensure()
        assert contents(folder) == before
        workdir.ensure()
        workdir.close()
        workdir = Workdir(folder)
        workdir.open(RECIPE, resume=True)


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
    files = ["metrics.jsonl", "metrics.csv", "test_outputs.npy", "test_labels.npy"]
    files += ["mistakes.npz", "summary.json", "checkpoints/a"]
    assert workdir.missing(tmp_path / "checkpoints" / "a") == files
    (tmp_path / "checkpoints").mkdir()
    for name in files:
        (tmp_path / name).write_text("")
    assert workdir.missing(tmp_path / "checkpoints" / "a") == []


def test_the_folder_cannot_be_looked_into(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    workdir = Workdir(tmp_path)
    monkeypatch.setattr(pathlib.Path, "exists", refuse)
    for look in (workdir.missing, lambda: workdir.open(RECIPE)):
        with pytest.raises(WorkdirError, match=r"cannot read workdir '.*': Permission denied"):
            look()


def test_a_second_removal_is_told_too(tmp_path, monkeypatch):
    """Python shows a text once."""
    workdir, times = Workdir(tmp_path / "run"), iter(["12:00:00", "12:00:01"])
    workdir.open(RECIPE)
    monkeypatch.setattr("time.strftime", lambda _: next(times))
    for seconds in (0, 1):
        shutil.rmtree(tmp_path / "run")
        with pytest.warns(UserWarning, match=f"was removed, .* lost .seen at 12:00:0{seconds}"):
            workdir.ensure()


# --- one process at a time -----------------------------------------------------------------------

_HOLDER = """
import sys
from cifarflow.training.workdir import Workdir
workdir = Workdir(sys.argv[1])
workdir.open({recipe!r}, resume=True)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder open, until it ends."""
    command = [sys.executable, "-c", _HOLDER.format(recipe=RECIPE), str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        try:
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path, holder, is_killed):
    folder = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(WorkdirError, match=r"^another process is running in workdir '.*run': "):
            Workdir(folder).open(RECIPE, resume=resume)
    if is_killed:
        holder.send_signal(signal.SIGKILL)
    else:
        holder.stdin.close()
    holder.wait(30)
    # A killed one leaves the file, and no lock on it.
    assert (folder / ".lock").exists() == is_killed
    with Workdir(folder) as workdir:
        assert workdir.open(RECIPE, resume=True)
        assert (folder / ".lock").exists()
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]


def test_a_folder_that_another_process_made_anew_is_that_ones(tmp_path, holder):
    folder = tmp_path / "run"
    holder.stdin.close()
    holder.wait(30)
    workdir = Workdir(folder)
    workdir.open(RECIPE, resume=True)
    shutil.rmtree(folder)
    command = [sys.executable, "-c", _HOLDER.format(recipe=RECIPE), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(WorkdirError, match="another process is running in workdir"):
            workdir.ensure()
        workdir.close()
        assert (folder / ".lock").exists()  # which is not its own
        other.stdin.close()
    workdir.open(RECIPE, resume=True)
    workdir.ensure()


def test_a_lock_goes_with_what_holds_it(tmp_path):
    workdir = Workdir(tmp_path)
    workdir.open(RECIPE)
    with pytest.raises(WorkdirError, match="another process is running"):
        Workdir(tmp_path).open(RECIPE, resume=True)
    del workdir
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]
    # Nor does it stay after an open that is refused.
    for _ in range(2):
        with pytest.raises(WorkdirError, match="add --resume"):
            Workdir(tmp_path).open(RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EROFS])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for resume in (False, True):
        workdir = Workdir(tmp_path)
        assert workdir.open(RECIPE, resume=resume) == resume
        workdir.ensure()


def test_a_lock_keeps_no_file_open_for_writing_unless_it_must(tmp_path, monkeypatch):
    """A disk with a file that is open for writing cannot be made read-only."""
    flock, asked = fcntl.flock, []

    def record(file, operation):
        asked.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        if is_nfs and asked[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, "as NFS does")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", record)
    for is_nfs, access in ((False, [os.O_RDONLY]), (True, [os.O_RDONLY, os.O_RDWR])):
        folder = Workdir(tmp_path / str(is_nfs))
        asked.clear()
        folder.open(RECIPE, resume=False)
        assert asked == access
        with pytest.raises(WorkdirError, match="another process is running"):
            Workdir(folder.path).open(RECIPE, resume=True)
        folder.close()


def test_a_system_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("cifarflow.training.workdir.fcntl", None)
    with Workdir(tmp_path) as workdir:
        workdir.open(RECIPE)
        workdir.ensure()
    assert list(contents(tmp_path)) == ["recipe.json"]


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


def test_test_labels_come_back(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_test_labels() is None
    labels = np.array([3, 1, 2], np.int32)
    workdir.write_test_labels(labels)
    np.testing.assert_array_equal(workdir.read_test_labels(), labels)
    np.save(tmp_path / "test_labels.npy", labels.astype(np.float32))
    with pytest.raises(
        DataError, match=r"labels\.npy' is damaged: it is float32 of .*expected int32"
    ):
        workdir.read_test_labels()


MISTAKES = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
    "labels": np.array([0, 1], np.int32),
    "predicted": np.array([2, 0], np.int32),
    "probabilities": np.array([[0.1, 0, 0.9], [0.6, 0.2, 0.2]], np.float32),
    "indices": np.array([7, 3], np.int32),
}


def test_mistakes_come_back(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_mistakes() is None
    none = {name: array[:0] for name, array in MISTAKES.items()}
    for mistakes in (MISTAKES, none):
        workdir.write_mistakes(**mistakes)
        found = workdir.read_mistakes()
        assert set(found) == set(mistakes)
        for name, array in mistakes.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    # Anybody can read them.
    with np.load(tmp_path / "mistakes.npz", allow_pickle=False) as archive:
        assert set(archive.files) == set(MISTAKES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": MISTAKES["images"].astype(np.int32)}, "its images are int32 of shape"),
        ({"images": MISTAKES["images"][0]}, "its images are uint8 of shape"),
        ({"labels": np.zeros(2, np.int64)}, "its labels are int64"),
        ({"labels": np.array([0, 3], np.int32)}, r"its labels are not within 0\.\.2"),
        ({"predicted": np.array([0, -1], np.int32)}, r"its predicted are not within 0\.\.2"),
        ({"indices": np.array([0, -1], np.int32)}, "its indices are not within 0"),
        ({"indices": np.array([0], np.int32)}, "its arrays are of 1, 2 mistakes"),
        (
            {"probabilities": np.full((2, 3), np.nan, np.float32)},
            r"its probabilities are not within 0\.\.1",
        ),
        (
            {"probabilities": np.full((2, 3), 2, np.float32)},
            r"its probabilities are not within 0\.\.1",
        ),
        ({"probabilities": np.full(2, 0.5, np.float32)}, "its probabilities are float32 of shape"),
        ({"more": np.zeros(2)}, "it has not the members images, labels"),
    ],
)
def test_mistakes_that_are_none(tmp_path, change, message):
    np.savez(tmp_path / "mistakes.npz", **{**MISTAKES, **change})
    with pytest.raises(DataError, match=rf"mistakes\.npz' is damaged: {message}"):
        Workdir(tmp_path).read_mistakes()


def test_mistakes_that_are_packed_or_cut(tmp_path):
    path = tmp_path / "mistakes.npz"
    np.savez_compressed(path, **MISTAKES)
    with pytest.raises(DataError, match="is damaged: a member is compressed"):
        Workdir(tmp_path).read_mistakes()
    Workdir(tmp_path).write_mistakes(**MISTAKES)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"mistakes\.npz' is damaged: "):
        Workdir(tmp_path).read_mistakes()


def test_a_summary_that_is_none(tmp_path):
    workdir = Workdir(tmp_path)
    assert workdir.read_summary(["seed"]) is None
    workdir.write_json("summary.json", {"seed": 1})
    assert workdir.read_summary(["seed"]) == {"seed": 1}
    with pytest.raises(DataError, match=r"summary of a run, it lacks 'test_loss': remove it"):
        workdir.read_summary(["seed", "test_loss"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("steps", value) for value in (-1, 1.0, "9", True, None, 2**70)),
        *(("skipped_steps", value) for value in (-1, "\x1b[31m", None)),
        *(("seed", value) for value in (-1, 1.5, 2**31, True)),
        *(("recipe", value) for value in ("\x1b[31m", "a\nb", "\ud800", 1)),
        *((key, "\x1b[2J") for key in ("dataset", "precision", "device", "weights_sha256")),
        *(("confusion_matrix", [[value]]) for value in (-1, 0.5, 10**30)),
        *(("scores", value) for value in (None, [1], 3)),
        *(("scores", {"f1": value}) for value in (0.5, [2.0], ["1"], [True], [-0.1], [10**400])),
        *(("scores", {"top_2_accuracy": value}) for value in (1.5, "1", [0.5], False)),
        *(("scores", {"expected_calibration_error": value}) for value in (-0.1, "x")),
        *(("scores", {"calibration_bins": value}) for value in (3, [3], [[0.5, 0.5]], {})),
        *(
            ("scores", {"calibration_bins": [value]})
            for value in ([0.5, 0.5, -1], [0.5, 2, 1], [None, 0.5, 1], [0.5, 0.5, 0], [0, 0, 0])
        ),
    ],
)
def test_a_summary_that_cannot_be_shown(tmp_path, key, value):
    workdir = Workdir(tmp_path)
    workdir.write_json("summary.json", {key: value})
    with pytest.raises(DataError, match=f"is no summary of a run, its '{key}' is not one's"):
        workdir.read_summary([key])


def test_the_home_of_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Workdir("~/x").path == tmp_path / "home" / "x"
    # As a shell has it: a name like any other.
    assert not Workdir("~nosuchuser/x").open({"a": 1})
    assert (tmp_path / "~nosuchuser" / "x" / "recipe.json").exists()
