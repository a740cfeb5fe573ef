"""Several replicas train one model: the same run as of one process, lost workers, bad clusters.

Real workers are processes; they run side by side, and beside the tests that need none.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tiny
from benchmark_suite import read

# isort: split
import distribution as benchmark
import harness

import cifarflow as cf
from cifarflow.errors import ConfigError
from cifarflow.reporting.run_files import read_run
from cifarflow.reporting.run_page import run_page
from cifarflow.training import distribution
from cifarflow.training.checkpoints import Checkpoints
from cifarflow.training.cluster import Cluster, WorkerError, meet, read_cluster
from cifarflow.training.distribution import Mirrored, Team, open_team

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 20, 32
RECIPE = {
    "epochs": 1,
    "batch_size": BATCH,
    "precision": "float32",
    "augment": "flip,crop:4",
    "model_options": {"filters": [8], "kernel_size": 3, "dense_units": 16},
}
# What works on the reduced gradients, each against one process.
VARIANTS = {
    "sgd": {
        "clip_norm": 0.1,
        "l2": 1e-3,
        "averaging": "lookahead",
        "freeze": {"conv": 0.5},
        "on_nonfinite": "skip",
    },
    "muon": {
        "optimizer": "muon",
        "learning_rate": 0.05,
        "averaging": "ema",
        "jit_compile": "true",
    },
    "float16": {"precision": "mixed_float16"},
    "accumulated": {"accumulate_steps": 4},
}


# --- clusters -------------------------------------------------------------------------------


def config(cluster=None, kind="worker", index=0):
    cluster = {"worker": ["a:1", "b:2"]} if cluster is None else cluster
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


def test_clusters():
    assert read_cluster(config(index=1)) == Cluster(("a:1", "b:2"), 1, ("worker", 1), False)
    both = {"worker": ["a:1", "[::1]:2"], "chief": ["c-3.d:65535"]}
    found = read_cluster(config(both, index=1))
    assert found == Cluster(("c-3.d:65535", "a:1", "[::1]:2"), 2, ("worker", 1), True)
    assert read_cluster(config(both, "chief")).place == 0
    assert found.name(0) == "the chief at c-3.d:65535"
    assert found.name(2) == "worker 1 at [::1]:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "strategy=multiworker needs TF_CONFIG in the environment, such as"),
        (" ", "strategy=multiworker needs TF_CONFIG"),
        ("{", "TF_CONFIG must be JSON, not '{'"),
        ("[" * 9999, "TF_CONFIG must be JSON, not .* nested too deep"),
        ("3", "must hold a cluster, the addresses of its workers, not None"),
        ('{"cluster": {}}', "must hold a cluster, .* not {}"),
        ('{"cluster": {"worker": ["a:1"]}}', "must hold a task, its type and index, not None"),
        (config({"worker": ["a:1"], "ps": ["b:1"]}), "of type chief or worker, not 'ps'"),
        (config({"worker": ["a:1"], "evaluator": ["b:1"]}), "not 'evaluator': parameter servers"),
        (config(kind="evaluator"), "of type chief or worker, not 'evaluator'"),
        (config(kind=["worker"]), "of type chief or worker, not"),
        (config({"worker": "a:1"}), "worker must be a list of addresses, not 'a:1'"),
        (config({"worker": []}), r"worker must be a list of addresses, not \[\]"),
        (config({"worker": ["a"]}), "addresses must be host:port, not 'a'"),
        (config({"worker": ["a:0"]}), "addresses must be host:port, not 'a:0'"),
        (config({"worker": ["a:65536"]}), "addresses must be host:port, not 'a:65536'"),
        (config({"worker": ["http://a:1"]}), "addresses must be host:port, not 'http"),
        (config({"worker": [7]}), "addresses must be host:port, not 7"),
        (config({"worker": ["a:1", "a:1"]}), "name each address once, not 'a:1' twice"),
        (config({"worker": ["a:1"], "chief": ["b:1", "c:1"]}), "must have one chief, not 2"),
        (config(index=2), "index must be from 0 up to but not 2, .* its workers, not 2"),
        (config(index=-1), "index must be from 0 up to but not 2, .* not -1"),
        (config(index="0"), "index must be from 0 up to but not 2, .* not '0'"),
        (config(index=True), "index must be from 0 up to but not 2, .* not True"),
        (config(kind="chief"), "up to but not 0, the number of its chiefs, not 0"),
    ],
)
def test_bad_clusters(text, message, monkeypatch):
    if text is None:
        monkeypatch.delenv("TF_CONFIG", raising=False)
    else:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=message) as caught:
        open_team("multiworker")
    assert str(caught.value).isprintable()


def test_bad_options():
    with pytest.raises(ConfigError, match="strategy must be one of none, mirrored, multiworker"):
        cf.train_recipe("lab_cnn", strategy="tpu")
    with pytest.raises(ConfigError, match="worker_timeout_seconds must be a finite number > 0"):
        open_team("multiworker", worker_timeout_seconds=0)
    with pytest.raises(ConfigError, match="profile needs strategy none, not 'mirrored'"):
        cf.train_recipe("lab_cnn", strategy="mirrored", profile=print, workdir="x")
    with pytest.raises(ConfigError, match="team must be what open_team returns, not 'mirrored'"):
        cf.train(tiny.tiny_mlp(), cf.SGD(), batches=tiny.batches(), epochs=1, team="mirrored")
    assert open_team("none") is None


def test_multiworker_takes_one_gpu_and_comes_first(monkeypatch):
    tf.zeros([])
    monkeypatch.setenv("TF_CONFIG", config({"worker": free_addresses(1)}))
    with pytest.raises(ConfigError, match="must come before TensorFlow's first operation"):
        open_team("multiworker")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["GPU:0", "GPU:1"])
    with pytest.raises(ConfigError, match="takes one GPU a worker, and this one sees 2: start"):
        open_team("multiworker")


def test_one_device_trains_alone(capsys, monkeypatch):
    one = tf.config.list_logical_devices("CPU")[:1]
    monkeypatch.setattr(
        tf.config, "list_logical_devices", lambda kind=None: [] if kind == "GPU" else one
    )
    assert open_team("mirrored") is None
    run = cf.train_recipe(
        "lab_mlp", dataset=tiny.dataset(), strategy="mirrored", epochs=1.5, **tiny.MLP
    )
    assert "strategy mirrored: there is one device, which trains alone" in capsys.readouterr().out
    assert run.summary["steps"] == 3
    assert (run.summary["strategy"], run.summary["replicas"]) == ("none", 1)


# --- before the start -----------------------------------------------------------------------


def free_addresses(count):
    return benchmark.free_addresses(count)


def in_thread(errors, *args, **kwargs):
    def run():
        try:
            meet(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def cluster_of(addresses, index):
    return Cluster(tuple(addresses), index, ("worker", index), False)


def test_workers_meet():
    addresses, errors = free_addresses(3), []
    threads = [
        in_thread(errors, cluster_of(addresses, index), timeout_seconds=20) for index in range(3)
    ]
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_worker_that_never_comes_is_named():
    addresses = free_addresses(3)
    with pytest.raises(WorkerError) as caught:
        meet(cluster_of(addresses, 2), timeout_seconds=0.2)
    assert str(caught.value) == (
        f"after 0.2 s 2 of 3 workers have not come up: the chief at {addresses[0]}; worker 1 at "
        f"{addresses[1]}: start all of them, with the same cluster in TF_CONFIG"
    )


def test_something_else_at_an_address():
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9)
                    connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        addresses = [*free_addresses(1), f"127.0.0.1:{other.getsockname()[1]}"]
        with pytest.raises(WorkerError, match=f"{addresses[1]}, where something else answers"):
            meet(cluster_of(addresses, 0), timeout_seconds=0.3)
        # One's own address is another program's.
        with pytest.raises(ConfigError, match=f"{addresses[1]}', where it cannot listen: "):
            meet(cluster_of(addresses, 1), timeout_seconds=0.3)
        other.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_worker_that_cannot_reach_this_one():
    addresses = free_addresses(2)
    with socket.create_server(("127.0.0.1", int(addresses[1].rpartition(":")[2]))) as other:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = other.accept()
                    greeting = connection.recv(100)
                    connection.sendall(greeting[:-9] + b"00000001\n")
                    connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        wanted = f"worker 1 at {addresses[1]}, which cannot reach the chief at {addresses[0]}"
        with pytest.raises(WorkerError, match=wanted):
            meet(cluster_of(addresses, 0), timeout_seconds=0.3)
        other.shutdown(socket.SHUT_RDWR)
    thread.join()


# --- parts ----------------------------------------------------------------------------------


def test_batches_are_shared_out():
    team = Team()
    team.replicas = 4
    rows = np.arange(8)
    assert [team.share_of(rows, index).tolist() for index in range(4)] == [
        [0, 1], [2, 3], [4, 5], [6, 7]
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"multiple of the 4 replicas, .* not 6"):
        team.check_batch_size(6)
    with pytest.raises(ConfigError, match=r"multiple of the 4 replicas, .* not None"):
        team.check_batch_size(None)
    team.check_batch_size(24, accumulate_steps=3)
    wanted = "must divide the 6 examples that each of the 4 replicas has of a batch of 24, not 4"
    with pytest.raises(ConfigError, match=wanted):
        team.check_batch_size(24, accumulate_steps=4)


class Doubled(Team):
    """A team that does nothing otherwise."""

    replicas = 2

    def spread(self, make_look, model):
        return make_look(model)


def test_another_number_of_replicas_is_told_of(tmp_path):
    def run(steps, **options):
        cf.train(
            tiny.tiny_mlp(),
            cf.SGD(0.1),
            batches=tiny.batches(),
            total_steps=steps,
            checkpoints=Checkpoints(tmp_path),
            **options,
        )

    run(2, team=Doubled())
    run(3, team=Doubled(), resume=True)
    with pytest.warns(UserWarning, match="of a run with replicas=2, which goes on with 1: Batch"):
        run(4, resume=True)


def test_a_model_that_cannot_be_copied(monkeypatch):
    def refuse(model):
        raise ValueError("no config\nof it")

    monkeypatch.setattr(distribution.keras.models, "clone_model", refuse)
    team = Mirrored(["CPU:0"])
    team._devices *= 2
    with pytest.raises(ConfigError, match=r"cannot be copied for strategy=mirrored: no config$"):
        team.spread(lambda model: None, tiny.tiny_mlp())


def worker_of(addresses, index):
    """A worker without a server."""
    worker = object.__new__(distribution.Workers)
    worker._cluster, worker.index = cluster_of(addresses, index), index
    return worker


def test_a_worker_with_another_recipe(monkeypatch):
    worker = worker_of(["a:1", "b:2"], 1)
    monkeypatch.setattr(worker, "tell", lambda values: {"seed": 1, "epochs": 2.0}, raising=False)
    worker.check_same("a recipe", {"seed": 1, "epochs": 2.0})
    wanted = "^worker 1 at b:2 has a recipe with epochs=3.0, the chief 2.0: start all workers"
    with pytest.raises(WorkerError, match=wanted):
        worker.check_same("a recipe", {"seed": 1, "epochs": 3.0})


def test_who_is_lost():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        addresses = [f"127.0.0.1:{silent.getsockname()[1]}", *free_addresses(2)]
        worker = worker_of(addresses, 2)
        # Nobody listens there any more.
        lost = f"^worker 1 at {addresses[1]} was lost: "
        with pytest.raises(WorkerError, match=lost), worker.noticing():
            raise tf.errors.UnavailableError(None, None, "Connection reset by peer")
        # Somebody does, and does not answer.
        worker = worker_of(addresses[:1] * 2, 1)
        text = "(stopped sending heartbeats):\n/job:worker/replica:0/task:0"
        assert worker._describe_loss(text).startswith(f"the chief at {addresses[0]} was lost")
        assert worker._describe_loss("Aborted").startswith("another worker was lost")


class Signalled(Team):
    """A team to another worker of which a signal comes."""

    index = 1

    def agree(self, count, *, signal_number=0):
        self.calls = getattr(self, "calls", 0) + 1
        return super().agree(count, signal_number=signal.SIGTERM if self.calls == 4 else 0)

    def spread(self, make_look, model):
        return make_look(model)


def test_a_signal_to_another_worker_ends_this_one_too():
    with pytest.raises(cf.TrainingInterrupted, match="what is saved is with the chief") as caught:
        cf.train(
            tiny.tiny_mlp(),
            cf.SGD(0.1),
            batches=tiny.batches(),
            total_steps=20,
            log_every=cf.Every(steps=2),
            team=Signalled(),
        )
    assert caught.value.signal == signal.SIGTERM
    assert 3 <= caught.value.step < 20


# --- real workers ---------------------------------------------------------------------------


class Workers:
    """Processes of `team_worker`, started together."""

    def __init__(self, folder, images, jobs, *, team=True, **spec):
        self.folder, self.processes, self.addresses = folder, [], []
        self._jobs, self._team = jobs, team
        self._spec = {"images": str(images), **spec}
        self._start()

    def _start(self):
        if self._team:
            self.addresses = free_addresses(len(self._jobs))
        self.processes = []
        for index, job in enumerate(self._jobs):
            env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"}
            if self._team:
                env["TF_CONFIG"] = config({"worker": self.addresses}, index=index)
                job = {"strategy": "multiworker", **RECIPE, **job}
            text = {"out": str(self.folder / str(index)), **self._spec}
            text["jobs"] = job if isinstance(job, list) else [job]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "tests" / "team_worker.py"), json.dumps(text)],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self, *, again=True):
        """What each has told, None for one that was killed; and what it has left."""
        ends = []
        for index, process in enumerate(self.processes):
            out, err = process.communicate(timeout=240)
            if process.returncode == -signal.SIGKILL:
                ends.append(None)
                continue
            assert process.returncode == 0, err
            assert "Traceback" not in err + out
            ends.append(json.loads((self.folder / str(index) / "told.json").read_text()))
        # An address that was free may be somebody's by the time the worker listens there.
        if again and "where it cannot listen" in json.dumps(ends):
            self._start()
            return self.end(again=False)
        return ends

    def weights(self, index, job=0):
        with np.load(self.folder / str(index) / f"{job}.npz") as file:
            return list(file.values())

    def close(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def started(tmp_path_factory, some_images):
    """What runs beside the other tests: a function of its name."""
    folder = tmp_path_factory.mktemp("team")
    images, labels = some_images
    parts = {"a": slice(0, 640), "b": slice(640, 700), "c": slice(700, 760)}
    arrays = {f"{name}_images": images[part] for name, part in parts.items()}
    arrays |= {f"{name}_labels": labels[part] for name, part in parts.items()}
    np.savez(folder / "images.npz", **arrays)
    for name in ("whole", "killed", "resumed", "one"):
        (folder / name).mkdir()
    file = folder / "images.npz"
    alone = [dict(RECIPE)]
    for changes in ({}, *VARIANTS.values()):
        alone += [{**RECIPE, **changes}] if changes else []
        alone += [{**RECIPE, **changes, "strategy": "mirrored"}]
    alone += [{**RECIPE, "batch_size": 33, "strategy": "mirrored"}]
    alone += [{**RECIPE, "accumulate_steps": BATCH, "strategy": "mirrored"}]
    workdir = {"workdir": str(folder / "workdir")}
    longer = {"epochs": 1.25, "workdir": str(folder / "other")}
    made = {
        "whole": Workers(
            folder / "whole",
            file,
            [longer, {"epochs": 1.25, "term_at": STEPS}],
            shares=True,
            poisoned=True,
        ),
        "killed": Workers(folder / "killed", file, [workdir, {"kill_at": 10}]),
        "one": Workers(folder / "one", file, [alone], team=False, cpus=2),
    }
    resumed = {"made": None}

    def get(name):
        if name == "resumed" and resumed["made"] is None:
            made["killed"].end()
            resumed["made"] = Workers(folder / "resumed", file, [{**workdir, "resume": True}, {}])
            made["resumed"] = resumed["made"]
        return made[name]

    try:
        yield get
    finally:
        for each in made.values():
            each.close()


@pytest.fixture(scope="module")
def ended(started):
    """As `started`, with what they have told."""
    told = {}

    def get(name):
        if name not in told:
            told[name] = started(name).end()
        return started(name), told[name]

    return get


@pytest.fixture(autouse=True)
def _begun(started):
    """Workers start before the first test, since they take seconds to load."""


def largest_difference(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)


def test_mirrored_equals_one_device(ended):
    run, [told] = ended("one")
    assert [each.get("error") for each in told[:-2]] == [None] * (len(told) - 2)
    for each, expected in zip(told, [("none", 1), ("mirrored", 2)], strict=False):
        assert (each["summary"]["strategy"], each["summary"]["replicas"]) == expected
    # Measured: 6e-8.
    assert largest_difference(run.weights(0, 0), run.weights(0, 1)) < 1e-5
    for row, other in zip(told[0]["rows"], told[1]["rows"], strict=True):
        assert row["step"] == other["step"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=0.02)
    for place, name in enumerate(VARIANTS):
        difference = largest_difference(
            run.weights(0, 2 + 2 * place), run.weights(0, 3 + 2 * place)
        )
        # float16 rounds the gradients of half a batch otherwise than those of a whole one.
        assert difference < (0.02 if name == "float16" else 1e-5), (name, difference)
    # The last of the variants is the plain run, a share of each batch cut into micro-batches.
    assert largest_difference(run.weights(0, 0), run.weights(0, 1 + 2 * len(VARIANTS))) < 1e-5
    assert [each["kind"] for each in told[-2:]] == ["ConfigError"] * 2
    assert "batch_size must be a multiple of the 2 replicas" in told[-2]["error"]
    assert "accumulate_steps must divide the 16 examples that each of" in told[-1]["error"]


def test_a_signal_to_one_worker_ends_all_at_the_same_step(ended):
    _, told = ended("whole")
    assert [each[0]["kind"] for each in told] == ["TrainingInterrupted"] * 2
    assert [each[0]["step"] for each in told] == [STEPS] * 2
    assert "all is saved in" in told[0][0]["error"]
    assert "what is saved is with the chief" in told[1][0]["error"]


def test_workers_run_bad_steps_again_together(ended):
    _, told = ended("whole")
    chief, other = (each[1] for each in told)
    skips, ends = zip(chief["runs"], other["runs"], strict=True)
    for run in skips:
        assert (run["error"], run["skipped"]) == (None, 1)
        assert [text.partition(":")[0] for text in run["said"]] == ["step 2 was skipped"]
    assert skips[0]["weights"] == skips[1]["weights"]
    # The chief alone keeps steps, and writes checkpoints: no other would look at the weights then.
    assert [chief["capsules"], other["capsules"]] == [["step_00000002", "step_00000003"], []]
    for run in ends:
        assert "became infinite or NaN, which began in step 3, the first being 0: " in run["error"]
    assert ends[0]["weights"] == ends[1]["weights"]


def test_two_workers_equal_one_process(ended):
    run, _ = ended("whole")
    one, _ = ended("one")
    with np.load(run.folder.parent / "other" / "checkpoints" / f"step_{STEPS:08d}.npz") as file:
        ours = [file[f"{index:04d}"] for index in range(len(one.weights(0)))]
    # Measured: 6e-8.
    assert largest_difference(ours, one.weights(0)) < 1e-5


def test_the_global_batch_is_that_of_one_process(ended, some_images):
    run, _ = ended("whole")
    shares = [np.load(run.folder / str(index) / "shares.npy") for index in range(2)]
    images, labels = (values[:640] for values in some_images)
    batches = cf.ArrayBatches(
        images, labels, batch_size=BATCH, augment=cf.make_augment("flip,crop:4")
    )
    assert len(shares[0]) == len(shares[1]) == STEPS
    for step in range(STEPS):
        whole = np.concatenate([share[step] for share in shares])
        np.testing.assert_array_equal(whole, batches.batch_at(step)[0])


def test_a_lost_worker_ends_the_others_in_one_line(ended):
    run, told = ended("killed")
    assert told[1] is None
    assert told[0][0]["kind"] == "WorkerError"
    assert told[0][0]["error"] == (
        f"worker 1 at {run.addresses[1]} was lost: to go on from the chief's newest checkpoint "
        "start all workers again with --resume"
    )


def test_workers_that_go_on_end_in_the_same_weights(ended):
    run, [chief, other] = ended("resumed")
    one, _ = ended("one")
    assert largest_difference(run.weights(0), one.weights(0)) < 1e-5
    assert chief[0]["weights"] == other[0]["weights"]
    # The chief alone has files, and tells what came out.
    assert [chief[0]["has_workdir"], other[0]["has_workdir"]] == [True, False]
    assert chief[0]["summary"] == other[0]["summary"]
    assert chief[0]["summary"]["steps"] == STEPS
    assert chief[0]["summary"]["replicas"] == 2
    assert chief[0]["summary"]["strategy"] == "multiworker"
    page = run_page(read_run(run.folder.parent / "workdir"))
    assert b"multiworker, replicas: 2" in page
    folders = {path.name for path in run.folder.parent.iterdir()}
    assert folders == {"images.npz", "whole", "killed", "resumed", "one", "workdir", "other"}
    validation = [row for row in chief[0]["rows"] if row["split"] == "validation"]
    theirs = [row for row in other[0]["rows"] if row["split"] == "validation"]
    assert [row["loss"] for row in validation] == [row["loss"] for row in theirs]


# --- the benchmark --------------------------------------------------------------------------


def test_quick_run(quick_run):
    record = read(*quick_run("team"))
    result = record["results"]
    assert [way["way"] for way in result["ways"]] == ["one", "one_core", "workers"]
    assert result["goal"] == {"at_most": 1e-5, "is_reached": True}
    assert not result["times_count"]
    text = quick_run("team")[1].stdout
    assert "the workers share this machine, each pinned to one core" in text
    assert "largest difference between one process and two workers at most 1e-05: reached" in text


def test_summarise_by_hand():
    plan = benchmark.make_plan(harness.Settings(device="cpu"), batch_size=10)
    weights = {"one": [np.zeros(3)], "one_core": [np.zeros(3)], "workers": [np.full(3, 0.5)]}
    seconds = {
        name: harness.Samples((value,))
        for name, value in (("one", 1.0), ("one_core", 2.0), ("workers", 4.0))
    }
    result = benchmark.summarise(plan, weights, seconds, is_pinned=False)
    workers = result["ways"][2]
    assert workers["largest_difference"] == 0.5
    assert workers["images_per_second"]["median"] == 2.5
    assert workers["speed_over_one"]["median"] == 0.25
    assert workers["speed_over_one_core"]["median"] == 0.5
    assert "at most 1e-05: missed, 5.0e-01" in benchmark.describe(result, plan)
    plan = benchmark.make_plan(harness.Settings(device="cpu"), recipe="lab_final")
    assert plan.model_options == {}
    assert benchmark.summarise(plan, weights, seconds, is_pinned=True)["goal"] is None


def test_bad_plans():
    settings = harness.Settings(device="cpu")
    with pytest.raises(ConfigError, match="--batch_size must be even, for two workers, not 31"):
        benchmark.make_plan(settings, batch_size=31)
    gpu = harness.Settings(device="cpu")
    object.__setattr__(gpu, "device", "gpu")
    with pytest.raises(ConfigError, match="--device must be cpu: two workers cannot"):
        benchmark.make_plan(gpu)
