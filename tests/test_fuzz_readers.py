"""Hostile files for every reader, briefly; and that an input which breaks a rule is found."""

import gc
import json
import os
import random
import re
import subprocess
import sys
import textwrap

import benchmark_suite
import numpy as np
import pytest

# isort: split
import fuzz_inputs
import fuzz_kept
import fuzz_readers
import fuzz_ways
from worker import Worker, WorkerError

from cifarflow.errors import ConfigError, DataError, WorkdirError

# By hand, so that no reader is lost; 2,440 in all.
INPUTS = {
    **dict.fromkeys(("pickle", "archive", "npz", "checkpoint", "history", "outputs"), 200),
    **dict.fromkeys(("binary", "tfrecord", "verified", "workdir", "summary", "mistakes"), 120),
    **{"recipe": 120, "folder": 100, "capsule": 50, "tfds": 50, "picture": 150, "prepared": 50},
}


@pytest.fixture
def light():
    """What other tests have loaded is not gone through with each million of lists."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("reader", fuzz_ways.READERS)
def test_no_input_breaks_a_rule(tmp_path, light, reader):
    fuzz = fuzz_ways.Fuzz(reader, scratch=tmp_path)
    assert fuzz.round(1) >= 0  # a valid one is read
    count = INPUTS[reader]
    assert count > len(fuzz_kept.KEPT.get(reader, ()))
    # Wholly new ones to look for what is still unknown: FUZZ_SEED=17 python -m pytest.
    fuzz = fuzz_ways.Fuzz(reader, scratch=tmp_path, seed=int(os.environ.get("FUZZ_SEED", "0")))
    found = fuzz.run(0, count)
    assert found["broke"] == []
    assert found["read"] + found["refused"] == count
    assert found["refused"] > count / 10 or reader == "verified"


def test_every_reader_is_tried():
    assert set(INPUTS) == set(fuzz_ways.READERS) == set(fuzz_inputs.BUILDERS)
    assert set(fuzz_readers.WEIGHTS) == set(fuzz_ways.READERS)
    assert set(fuzz_kept.KEPT) <= set(fuzz_ways.READERS)
    assert sum(INPUTS.values()) == 2440


@pytest.mark.parametrize("reader", fuzz_ways.READERS)
def test_inputs_are_the_same_every_time(reader):
    kept = len(fuzz_kept.KEPT.get(reader, ()))
    first = [fuzz_ways.make_input(reader, seed=1, index=kept + index) for index in range(12)]
    again = [fuzz_ways.make_input(reader, seed=1, index=kept + index) for index in range(12)]
    other = [fuzz_ways.make_input(reader, seed=2, index=kept + index) for index in range(12)]
    assert first == again
    assert len({*first, *other}) > 12
    builder = fuzz_inputs.BUILDERS[reader]
    assert builder(random.Random(0), 0) == builder(random.Random(0), 0)


def refuse(message):
    raise DataError(message)


def refuse_for_memory():
    try:
        raise MemoryError("no room")
    except MemoryError:
        raise DataError("cannot be read: no room") from None


RULES = {
    "another error": (lambda: {}["key"], "KeyError: 'key'"),
    "a message of two lines": (lambda: refuse("one\ntwo"), "not one short line"),
    "a message that a terminal obeys": (lambda: refuse("\x1b[31m"), "not one short line"),
    "an endless message": (lambda: refuse("x" * 2000), "not one short line"),
    "no message": (lambda: refuse(""), "not one short line"),
    "memory that was not there": (refuse_for_memory, "it asked for more memory"),
    "much memory": (lambda: np.ones(60_000_000, np.uint8).sum(), "memory grew by"),
    "much time": (lambda: sum(range(8_000_000)), r"it took \d+\.\d s"),
}


@pytest.mark.parametrize("rule", RULES)
def test_an_input_that_breaks_a_rule_is_found(tmp_path, monkeypatch, rule):
    act, why = RULES[rule]
    monkeypatch.setattr(fuzz_ways, "MEMORY_LIMIT", 30_000_000)
    monkeypatch.setattr(fuzz_ways, "SECONDS_LIMIT", 0.05 if rule == "much time" else 10)
    monkeypatch.setitem(
        fuzz_ways.READERS, "binary", lambda _, data: act() if data == b"bad" else data
    )
    monkeypatch.setattr(
        fuzz_ways, "make_input", lambda *_, seed, index: b"bad" if index == 5 else b"good"
    )
    found = fuzz_ways.Fuzz("binary", scratch=tmp_path).run(3, 4)
    assert [index for index, _ in found["broke"]] == [5]
    assert re.search(why, found["broke"][0][1])
    assert (found["read"], found["refused"]) == (3, 0)


def test_what_an_input_leaves_behind_is_gone_before_the_next(tmp_path, monkeypatch):
    def read(folder, data):
        assert list(folder.iterdir()) == []
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        (folder / "loop").symlink_to(folder)

    monkeypatch.setitem(fuzz_ways.READERS, "binary", read)
    assert fuzz_ways.Fuzz("binary", scratch=tmp_path).run(0, 3)["read"] == 3


PLANTED = """
    import os, signal, sys, time
    sys.path[:0] = {path!r}
    import fuzz_ways

    def read(folder, data):
        if data in (b"crash", b"again"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == b"hang":
            time.sleep(60)
        if data == b"memory":
            try:
                bytearray(2 << 30)
            except MemoryError as error:
                raise fuzz_ways.CifarflowError("no room") from error

    planted = {{2: b"crash", 4: b"hang", 5: b"memory", 6: b"crash"}}
    fuzz_ways.READERS["binary"] = read
    fuzz_ways.HANG_SECONDS = 0.3
    fuzz_ways.make_input = lambda *_, seed, index: planted.get(index, b"fine")
    fuzz_ways.serve(fuzz_ways.make_way)
"""


def test_crashes_and_hangs_are_survived(tmp_path, monkeypatch, capfd):
    script, found = tmp_path / "planted.py", tmp_path / "found"
    path = [str(benchmark_suite.BENCHMARKS), str(benchmark_suite.ROOT)]
    script.write_text(textwrap.dedent(PLANTED.format(path=path)))
    found.mkdir()
    (found / "binary-9-1.bin").write_bytes(b"again")
    (found / "binary-9-2.bin").write_bytes(b"mended")
    (found / "pickle-9-2.bin").write_bytes(b"of another reader")
    total = fuzz_readers.fuzz_reader("binary", 8, seed=0, found=found, script=script)
    assert total["inputs"] == 10
    assert (total["read"], total["refused"]) == (5, 0)
    broke = {broken.get("index", -1): broken for broken in total["broke"]}
    assert sorted(broke) == [-1, 2, 4, 5, 6]
    for index, why in {-1: "signal 11", 2: "signal 11", 4: "signal 14", 6: "signal 11"}.items():
        assert why in broke[index]["why"]
    assert "asked for more memory" in broke[5]["why"]
    for index in (2, 4, 5, 6):
        data = fuzz_ways.make_input("binary", seed=0, index=index)
        assert broke[index]["input"] == str(found / f"binary-0-{index}.bin")
        assert (found / f"binary-0-{index}.bin").read_bytes() == data
    assert broke[-1]["input"] == str(found / "binary-9-1.bin")
    capfd.readouterr()  # what dead children wrote


def test_a_reader_that_refuses_what_is_valid_is_no_finding(tmp_path, capfd):
    script = tmp_path / "planted.py"
    path = [str(benchmark_suite.BENCHMARKS), str(benchmark_suite.ROOT)]
    script.write_text(
        f"import sys\nsys.path[:0] = {path!r}\nimport fuzz_ways\n"
        "fuzz_ways.READERS['binary'] = lambda _, data: {}['nothing']\n"
        "fuzz_ways.serve(fuzz_ways.make_way)\n"
    )
    with pytest.raises(WorkerError, match="does not read a valid input: KeyError"):
        fuzz_readers.fuzz_reader("binary", 3, seed=0, found=tmp_path / "found", script=script)
    capfd.readouterr()


def test_the_child_has_a_limit(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems do not keep to it")
    spec = {"reader": "outputs", "seed": 0, "scratch": str(tmp_path)}
    with Worker("outputs", fuzz_readers.SCRIPT, spec) as worker:
        found = worker.ask("run", first=0, count=50)
    assert found["broke"] == []
    assert found["grown"] < 1 << 30


def test_shares():
    for readers in (tuple(fuzz_ways.READERS), ("npz", "tfds")):
        for inputs in (len(readers), 100, 100_000):
            counts = fuzz_readers.shares(inputs, readers)
            assert tuple(counts) == readers
            assert min(counts.values()) >= 1
            assert sum(counts.values()) == inputs


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"inputs": 0}, ConfigError, "--inputs must be a whole number >= 18, not 0"),
        ({"inputs": 1, "readers": "npz,pickle"}, ConfigError, "--inputs must be .* >= 2, not 1"),
        ({"inputs": 100, "readers": "npz,zip"}, ConfigError, "--readers must be .*, not 'zip'"),
        ({"inputs": 100, "seed": -1}, ConfigError, "seed must be a whole number >= 0, not -1"),
        ({"inputs": 100, "found": __file__}, WorkdirError, "--found must be a folder, not"),
        ({"inputs": 100, "found": " "}, WorkdirError, "--found must be a folder, not ' '"),
    ],
)
def test_bad_plans(options, error, match):
    with pytest.raises(error, match=match):
        fuzz_readers.make_plan(**options)


def test_the_script(tmp_path):
    found = tmp_path / "found"
    found.mkdir()
    # One of an earlier run, of which nothing is left to mend.
    (found / "outputs-0-1.bin").write_bytes(b"\x93NUMPY\1\0")
    words = ["--inputs=200", "--readers=pickle,outputs", "--seed=4", "--json=fuzz.json"]
    words.append(f"--found={found}")
    done = subprocess.run(
        [sys.executable, str(benchmark_suite.BENCHMARKS / "fuzz_readers.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(benchmark_suite.ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "201 inputs, 0 broke a rule\n" in done.stdout
    assert "| pickle " in done.stdout
    record = json.loads((tmp_path / "fuzz.json").read_text())
    assert (record["inputs"], record["broke"]) == (201, 0)
    assert set(record["results"]) == {"pickle", "outputs"}
    assert record["environment"]["commit"]
    for result in record["results"].values():
        assert result["seconds"] > 0
        assert result["slowest"][0] < 1
        assert result["refused"] > 10
    assert [path.name for path in found.iterdir()] == ["outputs-0-1.bin"]


def test_a_finding_is_status_1(tmp_path, monkeypatch, capsys):
    from absl.testing import flagsaver

    from cifarflow import cli

    result = {"inputs": 3, "read": 1, "refused": 1, "seconds": 0.1, "grown": 0, "slowest": (0.1, 1)}
    broke = [{"index": 2, "why": "KeyError", "input": "found/npz-0-2.bin"}]
    monkeypatch.setattr(fuzz_readers, "fuzz_reader", lambda *_, **__: {**result, "broke": broke})
    monkeypatch.setattr(sys, "argv", ["fuzz_readers.py", "--readers=npz", "--inputs=3"])
    monkeypatch.chdir(tmp_path)
    saved = flagsaver.save_flag_values()
    try:
        for kind in ("integer", "string"):
            define = getattr(fuzz_readers.flags, f"DEFINE_{kind}")
            monkeypatch.setattr(
                fuzz_readers.flags,
                f"DEFINE_{kind}",
                lambda *words, define=define: define(*words, allow_override=True),
            )
        fuzz_readers.define_flags()
        with pytest.raises(SystemExit) as caught:
            cli.run(fuzz_readers.main)
    finally:
        flagsaver.restore_flag_values(saved)
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "npz: found/npz-0-2.bin: KeyError\n" in out
    assert "3 inputs, 1 broke a rule\n" in out
