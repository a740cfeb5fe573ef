"""The run's log, on disk and in memory."""

import csv
import functools
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


# --- the table ------------------------------------------------------------------------------


def table_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_cells(rows):
    return [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]


def both(folder, **options):
    return History(folder / "metrics.jsonl", table=folder / "metrics.csv", **options)


def again(folder):
    return History.load(folder / "metrics.jsonl", table=folder / "metrics.csv")


def agree(folder):
    """Whether the table has what the log has."""
    return table_of(folder / "metrics.csv") == as_cells(rows_on_disk(folder / "metrics.jsonl"))


def test_the_table_has_the_rows_of_the_log(tmp_path):
    history = both(tmp_path, tags={"dataset": "standin"})
    add(history, 3, learning_rate=0.01, images_per_second=1234.5678)
    assert agree(tmp_path)
    add(history, 3, "validation", loss=math.nan)
    assert agree(tmp_path)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines() == [
        "step,epoch,split,loss,accuracy,learning_rate,images_per_second,dataset",
        "3,0.3,train,1.5,0.25,0.01,1234.6,standin",
        "3,0.3,validation,,0.25,,,standin",
    ]
    history.to_csv(tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_text() == text
    with pytest.raises(WorkdirError, match="cannot write log"):
        history.to_csv(tmp_path / "metrics.csv" / "below.csv")


def test_columns_are_all_that_some_row_has(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "split": "train", "epoch": 1.0, "note": true}\n')
    history = History.load(log, table=tmp_path / "metrics.csv", tags={"dataset": "x"})
    history.rewind(1)
    add(history, 2)
    found = table_of(tmp_path / "metrics.csv")
    assert list(found[0]) == [*KEYS, "note", "dataset"]
    assert [row["note"] for row in found] == ["true", ""]
    assert [row["dataset"] for row in found] == ["", "x"]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\uff1d1", '=1","=2']


@pytest.mark.parametrize("text", [*FORMULAS, 'a,"b"\nc', "ordinary", "", "\ud800"])
def test_no_text_is_a_formula(tmp_path, text):
    history = History(tags={text: text})
    add(history, -5)
    history.to_csv(tmp_path / "table.csv")
    (row,) = table_of(tmp_path / "table.csv")
    expected = f"'{text}" if text in FORMULAS else text.replace("\ud800", "?")
    expected = expected.replace("\r", "\n")
    assert row[expected] == expected
    assert row["step"] == "-5"  # a number is one


@pytest.mark.parametrize("damage", ["cut", "longer", "removed", "a row behind", "a folder's"])
def test_the_table_is_right_again_after_whatever_happened(tmp_path, damage):
    history, table = both(tmp_path), tmp_path / "metrics.csv"
    add(history, 1)
    before = table.read_bytes()
    add(history, 2)
    whole = table.read_bytes()
    if damage == "cut":
        table.write_bytes(whole[:-7])
    elif damage == "longer":
        table.write_bytes(whole + b"3,")
    elif damage == "removed":
        table.unlink()
    elif damage == "a row behind":
        table.write_bytes(before)
    else:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    # A run that goes on; and one that was killed, whose log is rewound.
    add(history, 3)
    assert agree(tmp_path)
    table.write_bytes(before)
    resumed = again(tmp_path)
    resumed.rewind(2)
    assert agree(tmp_path)
    assert len(table_of(table)) == 2
    add(resumed, 4)
    assert agree(tmp_path)


def test_a_table_without_room_is_told_once_and_written_later(tmp_path):
    history = both(tmp_path)
    add(history, 1)
    table = tmp_path / "metrics.csv"
    whole = table.read_bytes()
    table.unlink()
    table.mkdir()
    with pytest.warns(UserWarning, match=r"cannot write log .*csv.*; trying again") as told:
        list(map(functools.partial(add, history), (2, 3)))
    assert len(told) == 1
    assert rows_on_disk(tmp_path / "metrics.jsonl") == history.rows
    with pytest.raises(WorkdirError, match=r"cannot write log .*csv"):
        history.flush()
    table.rmdir()
    history.flush()
    assert agree(tmp_path)
    # Half a row is taken back, as in the log; that file is longer already.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    long = both(tmp_path, tags={"x" * 300: "y"})
    long.rewind(0)
    add(long, 1)
    whole = table.read_bytes()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    room = max(len(whole) + 10, len(log) + 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.warns(UserWarning, match="File too large"):
            add(long, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert table.read_bytes() == whole
    add(long, 3)
    assert agree(tmp_path)


def test_a_log_that_starts_anew_leaves_no_old_table(tmp_path):
    add(both(tmp_path), 1)
    (tmp_path / "metrics.jsonl").unlink()
    both(tmp_path).rewind(0)
    assert table_of(tmp_path / "metrics.csv") == []
    History().rewind(0)
