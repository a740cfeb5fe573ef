"""The proofs: kills and resumes, faults, parity with `fit`, leaks, what checkpoints cost."""

import ast
import dataclasses
import functools
import importlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import benchmark_suite
import pytest
from absl import flags
from absl.testing import flagsaver

# isort: split
import checkpoint_cost
import checkpoint_ways
import child_runs
import fault_places
import fault_table
import faults
import fit_parity
import fit_ways
import harness
import leak_ways
import leaks
import resume_proof
from child_runs import Course, Moment
from faults import Outcome, Scene

from cifarflow import cli
from cifarflow.errors import ConfigError
from cifarflow.recipes.named import get_recipe

QUICK = harness.Settings(rounds=2, quick=True, data="standin")
# Both are processes that start processes: they run while the other tests do.
COMMANDS = {
    "resume": "resume_proof.py --quick --data=standin --json=resume.json --plot=resume.png",
    "faults": "fault_table.py --quick --data=standin --signals=1 --faults=checkpoints,data "
    "--json=faults.json",
}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory):
    return tmp_path_factory.mktemp("proofs")


@pytest.fixture(scope="module")
def finish(proofs):
    """A function of a name in `COMMANDS`: the run's folder, and how it ended."""
    with benchmark_suite.quick_runs(proofs, COMMANDS) as run:
        yield run


@pytest.fixture(scope="module", autouse=True)
def started(finish):
    """They run while the tests that need none of them do."""


# A run in a few lines, without TensorFlow: two numbers, a log, checkpoints.  `mode` says what it
# does wrong.
RUN = """
import io, json, os, pathlib, signal, sys, time
import numpy as np

workdir, steps, mode = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
folder, log = workdir / "checkpoints", workdir / "metrics.jsonl"
try:
    folder.mkdir(parents=True, exist_ok=True)
except OSError as error:
    sys.exit(print(f"error: cannot write to {workdir}: {error}", file=sys.stderr) or 2)
came = []

def note(number, frame):
    if came:
        os._exit(128 + number)
    came.append(number)

if mode != "deaf":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)

def remake():
    if mode.startswith("remakes") and not log.exists():
        if mode == "remakes":
            print(f"workdir {workdir} was removed: it is made anew", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(row) + "\\n" for row in rows))

def read(path):
    with np.load(path) as members:
        return [float(value) for value in members["0000"]]

def save(step, weight, velocity):
    final = folder / f"step_{step:08d}.npz"
    remake()
    # A file of some size, so that writing takes a while.
    arrays = {"0000": np.array([weight, velocity]), "0001": np.zeros(200_000)}
    try:
        mark = folder / f".{final.name}.{os.getpid()}"
        mark.touch()
        with (final if mode == "cuts" else mark).open("wb") as file:
            whole = io.BytesIO()
            np.savez(whole, header=np.array(time.time()), **arrays)
            file.write(whole.getvalue()[:100_000])
            file.flush()
            # Half-way for so long that a kill is sure to find it so.
            time.sleep(0.3 if mode == "cuts" else 0.03)
            file.write(whole.getvalue()[100_000:])
        if mode == "cuts":
            mark.unlink()
        else:
            mark.replace(final)
        for old in sorted(folder.glob("step_*.npz"))[:-2]:
            old.unlink()
    except OSError as error:
        print(f"cannot write checkpoint {final.name}: {error}; trying again", file=sys.stderr)
        return False
    return True

step, weight, velocity, good = 0, 1.0, 0.0, True
for path in sorted(folder.glob("step_*.npz"), reverse=True):
    try:
        weight, velocity = read(path)
        step = int(path.stem[5:])
        break
    except Exception:
        if mode != "silent":
            print(f"checkpoint {path.name} is damaged", file=sys.stderr)
else:
    if list(folder.glob("step_*.npz")):
        sys.exit(print("error: all checkpoints are damaged", file=sys.stderr) or 2)
if step and mode == "dies":
    sys.exit(print("error: no way to go on", file=sys.stderr) or 2)
if step and mode == "forgets":
    velocity = 0.0
rows = [json.loads(line) for line in log.read_text().splitlines(True) if line.endswith("}\\n")] \\
    if log.exists() else []
rows = [row for row in rows if row["step"] <= step]
log.write_text("".join(json.dumps(row) + "\\n" for row in rows))
print("begins", flush=True)
time.sleep(0.02)
while step < steps:
    # Slow enough that what is removed between two files is not removed in the middle of one.
    time.sleep(0.01 if mode.startswith("remakes") else 0.002)
    velocity = 0.9 * velocity + weight
    weight -= 0.05 * velocity
    step += 1
    row = {"step": step, "loss": weight, "images_per_second": time.time()}
    remake()
    try:
        with log.open("a") as file:
            file.write(json.dumps(row) + "\\n")
    except OSError:
        # Removed since: it is with those that are written again.
        if not mode.startswith("remakes"):
            raise
    rows.append(row)
    print("step", step, flush=True)
    if step == steps and mode.startswith("remakes"):
        time.sleep(0.3)
    good = True
    if step % 7 == 0 or step == steps or came:
        good = save(step, weight, velocity)
    if came:
        print(f"interrupted after step {step}", file=sys.stderr)
        print("to go on:", "python", *sys.argv, file=sys.stderr)
        sys.exit(128 + came[0])
if not good:
    sys.exit(print("error: the last checkpoint cannot be written", file=sys.stderr) or 2)
time.sleep(0.1)
remake()
(workdir / "test_outputs.npy").write_bytes(repr(weight).encode())
summary = {"weights_sha256": repr(weight), "steps": step, "epochs": 1, "test_loss": weight}
summary |= {"test_accuracy": 0, "confusion_matrix": [], "total_seconds": time.time()}
(workdir / "summary.json").write_text(json.dumps(summary))
"""


@dataclasses.dataclass(frozen=True)
class Imitation(Course):
    """A course whose command is the run above."""

    script: str = ""
    mode: str = "good"

    def command(self, workdir, *, data_dir=None):
        return [sys.executable, self.script, str(workdir), str(self.steps), self.mode]


@pytest.fixture(scope="module")
def course(proofs):
    """A function of a mode: a course of a recipe that is never trained."""
    script = proofs / "run.py"
    script.write_text(RUN)

    def make(mode="good"):
        recipe = get_recipe("lab_mlp", precision="float32")
        return Imitation(recipe, 60, 7, script=str(script), mode=mode)

    return make


@pytest.fixture(scope="module")
def whole(course, proofs):
    """The `Whole` of it; its folder is proofs / "whole"."""
    return child_runs.run_whole(course(), proofs / "whole")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


# Moments


@pytest.mark.parametrize("count", [1, 2, 4, 6, 20])
def test_moments_are_over_the_whole_run(count):
    moments = child_runs.draw_moments(count, seed=3)
    assert len(moments) == count
    assert moments == child_runs.draw_moments(count, seed=3)
    assert moments != child_runs.draw_moments(count, seed=4)
    kinds = [moment.kind for moment in moments]
    assert set(kinds) >= set(["training", "writing", "start-up", "end"][:count])
    assert "end" not in kinds[:-1]
    inside = [moment.share for moment in moments if moment.kind in ("training", "writing")]
    # One in each of as many parts, in order.
    assert [int(share * len(inside)) for share in inside] == list(range(len(inside)))
    assert all(0 <= moment.share < 1 for moment in moments)


# What a run leaves


def test_equal_runs_have_one_fingerprint_whatever_their_times(course, whole, folder):
    again = child_runs.run_whole(course(), folder / "a")
    assert child_runs.differing(again.fingerprint, whole.fingerprint) == []
    assert whole.checkpoint_bytes > 1_600_000
    # No sleep is shorter than it was asked to be.
    assert min(whole.start_seconds, whole.end_seconds) > 0.02
    assert whole.call_seconds > 0.002
    assert child_runs.newest_step(folder / "a") == 60
    assert child_runs.damaged(folder / "a") == []


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weights", lambda f: edit(f / "summary.json", "weights_sha256", "other")),
        ("test", lambda f: edit(f / "summary.json", "test_loss", 7.0)),
        ("test", lambda f: (f / "test_outputs.npy").write_bytes(b"other")),
        ("metrics", lambda f: f.joinpath("metrics.jsonl").write_text('{"step": 1}\n')),
        ("metrics", lambda f: (f / "metrics.jsonl").unlink()),
        ("state", lambda f: shutil.copy(*child_runs.checkpoints(f))),
        ("state", lambda f: faults.empty_file(child_runs.checkpoints(f)[-1], None)),
    ],
)
def test_what_differs_is_found(proofs, whole, folder, part, change):
    shutil.copytree(proofs / "whole", folder / "a")
    change(folder / "a")
    assert child_runs.differing(child_runs.fingerprint(folder / "a"), whole.fingerprint) == [part]
    # What can be read in neither is not equal.
    nothing = child_runs.fingerprint(folder / "nothing")
    assert child_runs.differing(nothing, nothing) == list(child_runs.PARTS)


def edit(path, key, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def test_a_run_that_fails_when_left_alone_is_an_error(course, folder):
    (folder / "file").write_text("")
    with pytest.raises(harness.WorkerError, match=r"ended with status 2: .error: cannot write"):
        child_runs.run_whole(course(), folder / "file" / "run")


# Kills


def test_a_run_that_resumes_exactly_is_found_identical(course, folder):
    result = resume_proof.prove(course(), kills=5, seed=1, folder=folder)
    assert result["is_identical"], result["runs"]
    kills = result["kills"]
    assert len(kills) == 5
    assert {kill["kind"] for kill in kills} == {"training", "writing", "start-up", "end"}
    text = resume_proof.describe([result])
    assert "| identical" in text.splitlines()[2]
    assert "1 of 1 runs identical" in text
    assert re.search(r"^5 kills: \d in start-up, \d between checkpoints, \d while one", text, re.M)


@pytest.mark.parametrize(
    ("mode", "end"),
    [
        ("forgets", "DIFFERS: weights, state, metrics, test"),
        ("cuts", r"step_\d{8}\.npz cut"),
        ("dies", "status 2: error: no way to go on"),
    ],
)
def test_a_run_that_does_not_is_found_out(course, folder, mode, end):
    result = resume_proof.prove(course(mode), kills=4, seed=0, folder=folder)
    assert not result["is_identical"]
    text = resume_proof.describe([result])
    assert re.search(end, text.splitlines()[2])
    assert "0 of 1 runs identical" in text


def test_a_kill_that_comes_too_late_comes_earlier_in_another_run(
    course, whole, folder, monkeypatch
):
    late = [Moment("end", 0.999), Moment("training", 0.3)]
    monkeypatch.setattr(child_runs, "draw_moments", lambda count, *, seed: list(late))
    slow = whole._replace(end_seconds=whole.end_seconds + 0.2)
    monkeypatch.setattr(child_runs, "run_whole", lambda course, workdir: slow)
    result = resume_proof.prove(course(), kills=2, seed=0, folder=folder)
    assert len(result["kills"]) == 2
    assert len(result["runs"]) > 1
    assert result["is_identical"]


def test_the_short_form(finish):
    folder, done = finish("resume")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert benchmark_suite.NOISE.findall(done.stderr) == []
    record = json.loads((folder / "resume.json").read_text())
    (result,) = record["results"]
    assert (result["recipe"], result["precision"]) == ("lab_mlp", "float32")
    # One is meant for the writing of a checkpoint, which may be over by then.
    assert len(result["kills"]) == 2
    assert {kill["kind"] for kill in result["kills"]} <= {"training", "writing"}
    assert all(0 < kill["step"] <= result["steps"] for kill in result["kills"])
    assert result["is_identical"]
    # Real steps, with augmentation.
    (course,) = record["plan"]["courses"]
    assert course["recipe"]["augment"] == "flip,crop:4"
    assert re.search(r"\| lab_mlp .*\| identical \|", done.stdout)
    assert (folder / "resume.png").read_bytes().startswith(b"\x89PNG")


def test_main_ends_with_status_1_if_a_run_differs(call, monkeypatch):
    kill = {"kind": "training", "step": 5, "resumed_step": 0, "newest_step": 0}
    run = {"differs": ["state"], "damaged": [], "failed": ""}
    result = {"kills": [kill], "runs": [run], "differs": ["state"], "is_identical": False}

    def prove(course, **_):
        about = {"recipe": "lab_mlp", "precision": "float32", "steps": course.steps}
        return {**about, **result}

    monkeypatch.setattr(resume_proof, "prove", prove)
    code, out, _ = call("resume_proof", "--quick", "--data=standin", "--json=x.json")
    assert code == 1
    assert "DIFFERS: state" in out


def test_the_flags_of_a_course_ask_for_its_recipe(call):
    text = 'fast75:{"model_options": {"widths": [8]}, "nesterov": false, "batch_size": 64}'
    course = child_runs.make_course(text, QUICK, steps=40, precision="mixed_bfloat16")
    command = course.command("run")
    assert command[-2:] == ["--workdir=run", "--resume"]
    recipes = []
    code, _, err = call(
        "watched_run", *command[2:], main=lambda: recipes.append(cli.recipe_from_flags())
    )
    assert not code, err
    assert recipes == [dataclasses.replace(course.recipe, name="fast75")]
    assert (course.steps, recipes[0].epochs, recipes[0].limit_examples) == (40, 2.5, 16 * 64)


# Faults


@pytest.fixture
def scene(course, whole, folder):
    """A function of a mode: a scene of runs of that mode."""

    def make(mode="good", **options):
        return Scene(course(mode), whole, folder, None, **options)

    return make


def test_signals_that_are_answered(scene):
    outcomes = list(faults.try_signals(scene(signals=4)))
    assert [outcome.is_kept for outcome in outcomes] == [True] * 7, outcomes
    assert all(outcome.end == "identical" for outcome in outcomes)
    assert outcomes[1].fault.startswith("SIGTERM")
    assert [each.fault.partition(",")[0] for each in outcomes[4:]] == [
        "SIGINT in training",
        "SIGTERM twice in training",
        "SIGINT twice in training",
    ]
    assert re.match(r"in \d\.\d\d s status 130: interrupted after step \d+$", outcomes[4].happened)
    assert {outcome.lost_steps for outcome in outcomes[:5]} == {0}


def test_a_signal_that_saves_nothing_is_a_broken_promise(scene):
    outcomes = list(faults.try_signals(scene("deaf", signals=2, quick=True)))
    assert [outcome.is_kept for outcome in outcomes[:2]] == [False, False]
    assert "SIGTERM" in outcomes[0].happened
    # It still goes on from a checkpoint.
    assert outcomes[0].end == "identical"
    assert max(outcome.lost_steps for outcome in outcomes) > 0


def test_a_signal_whose_run_is_over_first_comes_in_another(scene, folder):
    late = faults.Order(signal.SIGTERM, Moment("end", 0.0))
    outcomes = faults._chain(scene(), "late", [late, late])
    # After the first the run has no step left, and no moment after its last.
    assert [outcome.is_kept for outcome in outcomes] == [True, True], outcomes
    assert all(each.fault == "SIGTERM after the last step, step 60" for each in outcomes)
    assert [path.name for path in sorted(folder.iterdir())] == ["late0", "late1"]


def test_a_moment_that_never_comes_is_said_not_to(scene, whole, monkeypatch):
    monkeypatch.setattr(faults, "_MOST_RUNS", 2)
    never = scene()._replace(whole=whole._replace(end_seconds=1000.0))
    order = faults.Order(signal.SIGTERM, Moment("end", 0.9))
    (outcome,) = faults._chain(never, "never", [order])
    assert outcome.is_kept is None
    assert outcome.happened == "not tried: 2 runs were over first"


def test_a_signal_to_a_process_that_has_ended_is_none(course, folder):
    with child_runs.Child(course().command(folder / "run")) as child:
        child.finish()
        assert child.signal(signal.SIGTERM) is False


def test_damaged_files(scene):
    outcomes = list(faults.try_checkpoints(scene()))
    assert all(outcome.is_kept for outcome in outcomes), outcomes
    found = {outcome.fault: outcome for outcome in outcomes}
    cut = found["newest checkpoint cut"]
    assert re.match(r"status 0: checkpoint step_\d+\.npz is damaged$", cut.happened)
    assert (cut.lost_steps, cut.end) == (7, "identical")
    assert found["newest checkpoint deleted"].lost_steps == 7
    every = found["all checkpoints cut"]
    assert every.end == "to be started anew"
    assert "error: all checkpoints are damaged" in every.happened
    assert found["log ends in half a line"].end == "identical"


def test_damage_that_is_passed_over_in_silence_is_a_broken_promise(scene):
    (outcome,) = faults.try_checkpoints(scene("silent", quick=True))
    assert (outcome.fault, outcome.is_kept) == ("newest checkpoint cut", False)
    assert (outcome.happened, outcome.end) == ("status 0", "identical")


def test_folders_removed(scene):
    outcome = next(faults.try_removed(scene(quick=True)))
    # This imitation does not make the folder again.
    assert outcome.fault == "checkpoint folder removed in training"
    assert outcome.is_kept is False
    assert "error: the last checkpoint cannot be written" in outcome.happened
    assert outcome.end == "identical"


@pytest.mark.parametrize("at_end", [False, True])
def test_workdirs_removed(scene, at_end):
    outcome = faults._remove(scene("remakes"), "", at_end=at_end)
    when = "after the last step" if at_end else "in training"
    assert outcome.fault == f"workdir removed {when}"
    assert outcome.is_kept, outcome
    assert outcome.happened.startswith("status 0: ")
    assert outcome.end == "identical"


@pytest.mark.parametrize("mode", ["remakes in silence", "good"])
def test_a_workdir_that_goes_in_silence_or_with_a_crash_is_a_broken_promise(scene, mode):
    outcome = faults._remove(scene(mode), "")
    assert outcome.is_kept is False
    # Then it is begun anew.
    assert outcome.end == "identical"


def test_disks_by_limits(scene):
    one = scene(mounts=False)
    outcomes = list(faults.try_disk(one))
    assert [each.is_kept for each in outcomes] == [True, True, None], outcomes
    assert outcomes[0].fault.startswith("disk full for a while (RLIMIT_FSIZE of 0.")
    assert outcomes[0].happened.startswith("status 0: cannot write checkpoint step_")
    assert "error: the last checkpoint cannot be written" in outcomes[1].happened
    assert outcomes[1].lost_steps > 0
    assert "not tried: needs a file system of its own" in outcomes[2].happened


def test_faults_that_cannot_be_tried_are_said_to_be(scene):
    (outcome,) = faults.try_data(scene())
    assert outcome.is_kept is None
    text = fault_table.describe([outcome])
    assert "not tried: needs CIFAR-10 in its own files" in text
    assert "0 of 0 faults ended as promised" in text


def test_a_place_of_its_own_is_full_and_read_only():
    # In a process of its own, whose mounts end with it.
    code = """
    import os, pathlib, sys, tempfile
    sys.path.insert(0, sys.argv[1])
    import fault_places
    if not fault_places.own_mounts():
        sys.exit(77)
    with tempfile.TemporaryDirectory() as folder:
        with fault_places.make_place(pathlib.Path(folder), size=10**6, mounts=True) as place:
            place.workdir.mkdir()
            (place.workdir / "a").write_bytes(bytes(10**5))
            def refuses(name, size):
                try:
                    (place.workdir / name).write_bytes(bytes(size))
                except OSError as error:
                    if (place.workdir / name).exists():
                        (place.workdir / name).unlink()
                    return error.strerror
            place.fill(0)
            assert refuses("b", 10**5) == "No space left on device"
            assert not refuses("c", 10**3)
            place.fill(0, to_the_last=True)
            assert refuses("d", 10**5) == "No space left on device"
            place.free(0)
            assert not refuses("b", 10**5)
            place.lock()
            try:
                (place.workdir / "e").touch()
            except OSError as error:
                assert error.strerror == "Read-only file system"
            else:
                raise AssertionError("it is not read-only")
            place.unlock()
            assert not refuses("c", 1)
        assert not os.listdir(folder)
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(benchmark_suite.BENCHMARKS)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip("this user may not mount")
    assert done.returncode == 0, done.stderr


def test_a_folder_is_locked_by_permissions(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with fault_places.make_place(tmp_path / "place", size=10**6, mounts=False) as place:
        place.workdir.mkdir()
        file = place.workdir / "a"
        file.write_text("")
        place.lock()
        assert [path.stat().st_mode & 0o777 for path in (place.workdir, file)] == [0o555, 0o444]
    assert [path.stat().st_mode & 0o777 for path in (place.workdir, file)] == [0o755, 0o644]
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(fault_places.UnavailableError, match="a user other than root"):
        place.lock()


def test_damages(tmp_path):
    path = tmp_path / "file"
    for seed in range(20):
        path.write_bytes(bytes(range(50)))
        faults.flip_byte(path, random.Random(seed))
        wrong = [a ^ b for a, b in zip(path.read_bytes(), range(50), strict=True) if a != b]
        assert [mask.bit_count() for mask in wrong] == [1]
        faults.cut_file(path, random.Random(seed))
        assert 0 < path.stat().st_size < 50
    faults.empty_file(path, random.Random(0))
    assert path.read_bytes() == b""


def test_what_a_run_says_of_itself_is_no_trouble():
    text = "## banner ##\nlab_mlp: 1,000 parameters\nepoch 1  validation loss 2\n"
    assert faults.said(text) == []
    warning = "/a/b.py:3: UserWarning: cannot write log 'x': full; trying again with each row\n"
    assert faults.said(text + warning) == ["cannot write log 'x': full; trying again with each row"]
    assert not faults.reports(text + warning)
    assert faults.reports("checkpoint 'x' is damaged: cut; going on from the one before")


def test_the_table_of_faults(finish):
    folder, done = finish("faults")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert benchmark_suite.NOISE.findall(done.stderr) == []
    results = json.loads((folder / "faults.json").read_text())["results"]
    assert [(each["fault"], each["is_kept"]) for each in results] == [
        ("newest checkpoint cut", True),
        ("a batch file damaged", None),
    ]
    assert results[0]["end"] == "identical"
    assert results[0]["lost_steps"] > 0
    assert "is damaged" in results[0]["happened"]
    assert "1 of 1 faults ended as promised" in done.stdout


def test_main_ends_with_status_1_if_a_promise_is_broken(call, monkeypatch):
    outcome = Outcome("SIGTERM in training, step 3", "SIGTERM", 3, "identical", False, 0.1)
    whole = child_runs.Whole({}, 1.0, 0.1, 0.1, 10)
    monkeypatch.setattr(fault_places, "own_mounts", lambda: False)
    monkeypatch.setattr(child_runs, "run_whole", lambda *_: whole)
    monkeypatch.setitem(faults.GROUPS, "signals", lambda scene: iter([outcome]))
    words = ("--quick", "--data=standin", "--faults=signals", "--plot=x.png")
    code, out, _ = call("fault_table", *words)
    assert code == 1
    assert "| NO " in out
    assert "0 of 1 faults ended as promised" in out
    assert "at most 0.10 s (n=1)" in out


# The others run in this process: their workers are ours to import, and starting one is slow.


class Local:
    """`harness.Worker` without a process."""

    def __init__(self, name, script, spec):
        module = importlib.import_module(script.stem)
        self._way = module.WAYS[spec["way"]](spec)

    def __enter__(self):
        self._way.round(1)
        self.facts = self._way.facts
        return self

    def __exit__(self, *_):
        pass

    def ask(self, call, **arguments):
        # As what comes through a pipe.
        return json.loads(json.dumps(getattr(self._way, call)(**arguments)))

    def round(self, steps):
        return float(self._way.round(steps))


@pytest.fixture
def local(monkeypatch):
    monkeypatch.setattr(harness, "Worker", Local)
    monkeypatch.setattr(harness.Settings, "count_examples", lambda self, size: max(size, 64))


@pytest.fixture
def call(tmp_path, proofs, monkeypatch, capfd):
    """Runs a script's main in this process; returns exit status, stdout and stderr."""
    import tensorflow as tf

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    # The stand-in images are there already.
    monkeypatch.setenv("CIFARFLOW_CACHE", str(proofs / "cache"))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    # Flags are of the whole process: another script's may have the same names.
    for kind in ("boolean", "enum", "float", "integer", "string"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), allow_override=True)
        monkeypatch.setattr(flags, f"DEFINE_{kind}", define)

    def run(script, *words, main=None):
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *words])
        saved = flagsaver.save_flag_values()
        try:
            module = importlib.import_module(script)
            if hasattr(module, "define_flags"):
                module.define_flags()
            with pytest.raises(SystemExit) as caught:
                cli.run(main or module.main)
        finally:
            # This takes away the flags that are new, too.
            flagsaver.restore_flag_values(saved)
        return caught.value.code, *capfd.readouterr()

    return run


def test_fit_parity(call, local, tmp_path):
    words = ("--quick", "--data=standin", "--seconds_a_round=0.01", "--steps=20")
    code, out, err = call("fit_parity", *words, "--json=x.json", "--plot=x.png")
    assert not code, err
    record = json.loads((tmp_path / "here" / "x.json").read_text())
    (result,) = record["results"]
    assert len(result["losses"]) == 20
    assert result["losses"][-1] != result["losses"][0]
    assert result["goal"] == {"at_most": 1e-4, "is_reached": True}
    for loop in result["loops"]:
        assert loop["largest_difference"] < 1e-4
        assert loop["fit_over_loop"]["n"] == 2
    assert "| lab_mlp | Keras's layers | " in out
    assert "largest difference at most 0.0001: reached" in out


def test_a_difference_from_fit_is_found():
    plan = fit_parity.make_plan(QUICK, steps=3)
    seconds = {way: harness.Samples((1.0, 2.0)) for way in fit_ways.WAYS}
    losses = {"fit": [2.0, 1.5, 1.0], "loop": [2.0, 1.5, 1.001], "loop_fused": [2.0, 1.6, 1.0]}
    result = fit_parity.summarise("lab_mlp", plan, losses, seconds)
    assert result["goal"]["is_reached"] is False
    found = [(each["at_step"], each["largest_difference"]) for each in result["loops"]]
    assert found == [(3, pytest.approx(1e-3)), (2, pytest.approx(0.1))]
    assert "missed, 1.0e-03" in fit_parity.describe([result], steps=3)
    # Keras's own SGD rounds differently: there is no bar then.
    plan = fit_parity.make_plan(QUICK, steps=3, fit_optimizer="keras")
    assert fit_parity.summarise("lab_mlp", plan, losses, seconds)["goal"] is None


def test_leaks(call, local, tmp_path):
    words = ("--quick", "--data=standin", "--rounds=1", "--epochs=6", "--examples=32")
    words += ("--noclear_session", "--json=x.json", "--plot=x.png")
    code, out, err = call("leaks", *words)
    assert not code, err
    results = json.loads((tmp_path / "here" / "x.json").read_text())["results"]
    assert [(each["way"], each["count"]) for each in results] == [("models", 5), ("epochs", 6)]
    for result in results:
        assert all(row["threads"] >= 1 for row in result["rows"])
        assert all(row["rss_bytes"] > 1e7 for row in result["rows"])
        # Whatever else it does, it closes its files: one that stays open a turn would be as many
        # more as there are turns.  One or two come and go with the threads of TensorFlow.
        before, after = result["grown"]["handles"]
        assert after - before < result["count"] - result["settled"]
    assert "| models in one process |" in out


def test_what_grows_is_found():
    def figures(*series):
        names = ("rss_bytes", "threads", "handles", "objects")
        rows = [dict(zip(names, values, strict=True)) for values in zip(*series, strict=True)]
        return {"rows": rows, "more": {"builtins.dict": 3}}

    flat = [7] * 20
    steady = leaks.summarise("models", figures([10**9] * 20, flat, flat, flat))
    assert steady["goal"]["is_reached"]
    assert steady["rss_growth"] == 0
    # What the first ones fill is no growth.
    warm = leaks.summarise("models", figures([1, 2, 3, 4, *[5] * 16], flat, flat, flat))
    assert warm["goal"]["is_reached"]
    memory = [10**9 + 10**6 * n for n in range(20)]
    growing = leaks.summarise("epochs", figures(memory, flat, flat, flat))
    # From the middle of epochs 5 and 6 to that of 19 and 20.
    assert growing["rss_growth"] == pytest.approx(14e6 / 1.0045e9)
    assert not growing["goal"]["is_reached"]
    for series in ([10**9] * 20, range(20), flat, flat), ([10**9] * 20, flat, range(20), flat):
        assert not leaks.summarise("models", figures(*series))["goal"]["is_reached"]
    text = leaks.describe([growing])
    assert "missed, +1.39 %" in text
    assert "more objects: 3 builtins.dict" in text


def test_a_leaking_process_is_noticed():
    way = leak_ways.Leaking.__new__(leak_ways.Leaking)
    way.spec, way._rows, way._kinds = {"settled": 1, "count": 2}, [], []
    way.note()
    kept = [Moment("training", 0.5) for _ in range(1000)]
    with open(__file__) as file:
        way.note()
        assert file.fileno() > 0
    first, last = way.figures()["rows"]
    assert last["handles"] == first["handles"] + 1
    assert last["objects"] >= first["objects"] + len(kept)
    assert way.figures()["more"]["child_runs.Moment"] == 1000


def test_checkpoint_cost(call, local, tmp_path):
    words = ("--quick", "--data=standin", "--rounds=1", "--epochs=8")
    code, out, err = call("checkpoint_cost", *words, "--json=x.json", "--plot=x.png")
    assert not code, err
    result = json.loads((tmp_path / "here" / "x.json").read_text())["result"]
    # 64 images in batches of 32.
    assert (result["steps"], result["steps_per_epoch"], result["many"]["count"]) == (16, 2, 4)
    assert all(samples["low"] > 0 for samples in result["seconds"].values())
    assert result["goal"] is None
    assert "| workdir, default interval |" in out


def test_what_a_checkpoint_costs_by_hand():
    plan = checkpoint_cost.make_plan(harness.Settings(rounds=2), steps=30)
    assert (plan.model, plan.epochs) == ("lab_cnn", 1.0)
    seconds = {"nothing": (10.0, 20.0), "checkpoints": (10.1, 20.2), "many": (12.0, 22.0)}
    samples = {keeps: harness.Samples(values) for keeps, values in seconds.items()}
    result = checkpoint_cost.summarise(plan, samples, steps=100, steps_per_epoch=50)
    assert result["ratio"]["median"] == pytest.approx(1.01)
    assert result["goal"]["is_reached"]
    # Four checkpoints of half a second; an epoch takes half of 15 seconds.
    assert result["many"]["seconds_each"]["median"] == 0.5
    assert result["many"]["share_of_an_epoch"] == pytest.approx(0.5 / 7.5)
    text = checkpoint_cost.describe(result)
    assert "a checkpoint costs 500.0 ms of training" in text
    assert "< 1.02: reached, 1.0100" in text


def test_a_watch_leaves_out_the_first_call(monkeypatch):
    times = iter([3.0, 8.0])
    watch = checkpoint_ways.Watch()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_ways.time, "perf_counter", lambda: next(times))
        with watch(100, steps_per_epoch=10):
            watch.update(1)
            watch.update(2)
            watch.line("")
    assert watch.seconds == 5.0


# Command lines


def test_scripts_keep_tensorflow_quiet_from_their_first_import_on():
    scripts = [
        path
        for path in benchmark_suite.BENCHMARKS.glob("*.py")
        if "cli.run(main)" in path.read_text()
    ]
    assert len(scripts) > 10
    for path in scripts:
        imports = [
            ast.unparse(node)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert imports[:2] == [
            "from __future__ import annotations",
            "from cifarflow import cli",
        ], path


@pytest.mark.parametrize(
    ("script", "flag", "line"),
    [
        ("resume_proof", "--kills=0", "--kills must be a whole number >= 1, not 0"),
        ("resume_proof", "--recipes=vgg", "--recipes must be one of lab_mlp, .*, not 'vgg'"),
        ("resume_proof", "--precisions=half", "--precisions must be one of auto, .*, not 'half'"),
        ("resume_proof", "--steps=1", "--steps must be a whole number >= 2, not 1"),
        ("resume_proof", "--checkpoint_steps=0", "--checkpoint_steps must be a whole .*, not 0"),
        ("resume_proof", "--epoch_steps=0", "--epoch_steps must be a whole number >= 1, not 0"),
        ("resume_proof", "--seed=-1", "seed must be a whole number >= 0, not -1"),
        ("fault_table", "--signals=0", "--signals must be a whole number >= 1, not 0"),
        ("fault_table", "--faults=fire", "--faults must be one of signals, .*, not 'fire'"),
        ("fault_table", "--recipe=vgg", "--recipe must be one of lab_mlp, .*, not 'vgg'"),
        ("fit_parity", "--models=fast75", "--models must be one of lab_mlp, .*, not 'fast75'"),
        ("fit_parity", "--steps=0", "--steps must be a whole number >= 1, not 0"),
        ("fit_parity", "--seconds_a_round=0", "--seconds_a_round must be a finite .*, not 0.0"),
        ("leaks", "--recipe=vgg", "--recipe must be one of lab_mlp, .*, not 'vgg'"),
        ("leaks", "--models=4", "--models must be a whole number >= 5, not 4"),
        ("leaks", "--epochs=0", "--epochs must be a whole number >= 5, not 0"),
        ("leaks", "--examples=31", "--examples must be a whole number >= 32, not 31"),
        ("checkpoint_cost", "--model=vgg", "--model must be one of lab_mlp, .*, not 'vgg'"),
        ("checkpoint_cost", "--epochs=0", "--epochs must be a finite number > 0, not 0.0"),
        ("checkpoint_cost", "--steps=0", "--steps must be a whole number >= 1, not 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(call, script, flag, line):
    code, out, err = call(script, flag)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {line}\n", err)


def test_a_picture_needs_signals(tmp_path):
    settings = dataclasses.replace(QUICK, plot=tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"--plot draws seconds .* it needs --faults="):
        fault_table.make_plan(settings, faults="disk,data")


def test_defaults_are_what_is_promised():
    settings = harness.Settings(rounds=6)
    plan = resume_proof.make_plan(settings)
    named = {(each.recipe.name, each.recipe.precision) for each in plan.courses}
    precisions = ("float32", "mixed_bfloat16")
    assert named == {(name, p) for name in ("lab_cnn", "fast75") for p in precisions}
    assert len(plan.courses) * plan.kills >= 20
    assert {each.recipe.augment for each in plan.courses} == {"flip,crop:4", "altflip"}
    assert leaks.make_plan(settings).counts == {"models": 50, "epochs": 100}
    assert fault_table.make_plan(settings).faults == tuple(faults.GROUPS)


def test_a_signal_that_comes_before_python_listens_ends_the_process(course, whole, folder):
    workdir = folder / "run"
    with child_runs.Child(course().command(workdir)) as child:
        assert child.meet(Moment("start-up", 0.0), course(), whole, workdir)
        child.signal(signal.SIGTERM)
        ended = child.finish()
    assert child_runs.describe_status(ended.status) in ("SIGTERM", "status 143")
    assert child.step is None or ended.status == 143
