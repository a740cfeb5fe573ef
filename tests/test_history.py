"""The run's log, on disk and in memory."""

import json
import math
import resource
import shutil
import signal

import pytest

from cifarflow.errors import DataError, WorkdirError
from cifarflow.training.history import History

KEYS = ["step", "epoch", "split", "loss", "accuracy", "learning_rate", "images_per_second"]


def add(history, step, split="train", **changes):
    values = {"epoch": step / 10, "loss": 1.5, "accuracy": 0.25, **changes}
    history.add(step=step, split=split, **values)


def rows_on_disk(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_one_line_of_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path, tags={"dataset": "standin"})
    add(history, 3, epoch=1 / 3, learning_rate=0.01, images_per_second=1234.5678)
    # It is on disk at once, not when the run ends.
    assert rows_on_disk(path) == [
        {
            "step": 3,
            "epoch": 0.3333,
            "split": "train",
            "loss": 1.5,
            "accuracy": 0.25,
            "learning_rate": 0.01,
            "images_per_second": 1234.6,
            "dataset": "standin",
        }
    ]
    add(history, 3, "validation")
    row = rows_on_disk(path)[1]
    assert list(row) == [*KEYS, "dataset"]
    assert row["learning_rate"] is None
    assert row["images_per_second"] is None
    assert rows_on_disk(path) == history.rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(tmp_path, value):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    add(history, 1, loss=value, accuracy=value, learning_rate=value)

    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row["loss"] is row["accuracy"] is row["learning_rate"] is None


def test_series():
    history = History()
    add(history, 5, loss=2.0, learning_rate=0.1)
    add(history, 10, loss=1.0)
    add(history, 10, "validation", loss=1.25)
    assert history.series("train", "loss") == ([0.5, 1.0], [2.0, 1.0])
    assert history.series("train", "learning_rate") == ([0.5], [0.1])
    assert history.series("validation", "loss") == ([1.0], [1.25])
    assert history.series("test", "loss") == ([], [])


def test_listeners_get_each_row():
    history, heard = History(), []
    history.listeners.append(heard.append)
    add(history, 1)
    add(history, 2)
    assert heard == history.rows


def test_rewind_drops_later_rows_on_disk_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for step in (5, 10, 15):
        add(history, step)
    history.rewind(10)
    assert [row["step"] for row in history.rows] == [5, 10]
    assert rows_on_disk(path) == history.rows
    add(history, 12)
    assert [row["step"] for row in rows_on_disk(path)] == [5, 10, 12]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    in_memory = History()
    add(in_memory, 5)
    in_memory.rewind(4)
    assert in_memory.rows == []


def test_load_gives_the_rows_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path, tags={"dataset": "x"})
    add(history, 5)
    add(history, 10, loss=math.nan)
    loaded = History.load(path, tags={"dataset": "x"})
    assert loaded.rows == history.rows
    add(loaded, 15)
    assert [row["step"] for row in History.load(path).rows] == [5, 10, 15]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_last_line_cut_short_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    add(history, 5)
    add(history, 10)
    path.write_text(path.read_text()[: -cut - 1])
    loaded = History.load(path)
    assert loaded.rows == history.rows[:1]
    # What a resumed run does: the rest of the cut line must not stay in the file.
    loaded.rewind(5)
    add(loaded, 10)
    assert History.load(path).rows == history.rows


@pytest.mark.parametrize("bad", ['{"step": 5, "los', "[]", '{"epoch": 1}', '{"step": "5"}', "5"])
def test_a_damaged_middle_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    add(history, 5)
    add(history, 10)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{bad}\n{second}\n")
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl") as caught:
        History.load(path)
    assert repr(bad) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a readable log"):
        History.load(path)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="not a readable log"):
        History.load(tmp_path / "metrics.jsonl")


def test_unwritable(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    history = History(file / "metrics.jsonl")
    with pytest.warns(UserWarning, match=r"cannot write log .*metrics.*; trying again with each"):
        add(history, 1)
    add(history, 2)  # told once
    with pytest.raises(WorkdirError, match=r"cannot write .*metrics"):
        history.flush()
    with pytest.raises(WorkdirError, match=r"cannot write .*metrics"):
        history.rewind(0)
    assert file.read_text() == "mine"


def test_each_time_that_it_cannot_be_written_is_told(tmp_path):
    """In words of its own, since Python shows the same ones once."""
    folder = tmp_path / "run"
    history = History(folder / "metrics.jsonl")
    for step in (1, 3):
        with pytest.warns(UserWarning, match=f"; trying again with .* after that of step {step}$"):
            add(history, step)
        folder.mkdir()
        add(history, step + 1)
        history.sync()
        assert not history.unwritten()
        shutil.rmtree(folder)
    with pytest.raises(WorkdirError, match="cannot write log"):
        history.sync()


def test_rewind_says_what_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    for step in (1, 2, 3):
        add(history, step)
    rows = history.rows
    path.write_text(json.dumps(rows[1]) + "\n")
    assert History.load(path).rewind(3, most=3) == 2
    assert History.load(path).rewind(3, most=3, unwritten=rows[1:]) == 1
    assert rows_on_disk(path) == rows[1:]
    assert History.load(path).rewind(3, most=2, unwritten=rows[2:]) == 0
    assert rows_on_disk(path) == rows[1:]
    assert History().rewind(3, most=3) == 0
    with pytest.raises(ValueError, match="NaN"):
        history.rewind(3, most=9, unwritten=[{**rows[0], "loss": math.nan}])


def test_rows_that_could_not_be_written_are_written_later(tmp_path):
    folder = tmp_path / "run"
    history = History(folder / "metrics.jsonl")
    with pytest.warns(UserWarning, match="cannot write log"):
        add(history, 1)
    folder.mkdir()
    add(history, 2)
    history.flush()
    assert [row["step"] for row in History.load(folder / "metrics.jsonl").rows] == [1, 2]


def test_a_log_that_was_removed_is_written_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    history = History(path, prepare=lambda: path.parent.mkdir(exist_ok=True))
    for step in (1, 2):
        add(history, step)
    shutil.rmtree(path.parent)
    add(history, 3)
    assert rows_on_disk(path) == history.rows
    path.unlink()
    history.flush()
    assert rows_on_disk(path) == history.rows
    path.unlink()
    loaded = History(path)
    loaded.flush()
    assert not path.exists()  # of no rows there is no log
    history.flush()
    loaded = History.load(path, prepare=lambda: path.parent.mkdir(exist_ok=True))
    shutil.rmtree(path.parent)
    add(loaded, 4)
    assert [row["step"] for row in rows_on_disk(path)] == [1, 2, 3, 4]


def test_what_must_come_before_writing_may_fail(tmp_path):
    path, wrong = tmp_path / "metrics.jsonl", ["no such place"]

    def prepare():
        if wrong:
            raise WorkdirError(wrong[0])

    history = History(path, prepare=prepare)
    with pytest.warns(UserWarning, match="no such place; trying again with each row"):
        add(history, 1)
    with pytest.raises(WorkdirError, match="no such place"):
        history.flush()
    assert not path.exists()
    wrong.clear()
    add(history, 2)
    assert rows_on_disk(path) == history.rows


def test_half_a_row_is_taken_back(tmp_path):
    """A real file that may not grow: what fits of a row is written, and then taken back."""
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    add(history, 1)
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, limits[1]))
    try:
        with pytest.warns(UserWarning, match="File too large"):
            add(history, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == whole
    add(history, 3)
    assert [row["step"] for row in History.load(path).rows] == [1, 2, 3]
