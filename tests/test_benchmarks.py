"""The benchmark suite: its statistics, its workers, its checks, and a quick run of step_time.py."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from benchmark_suite import BENCHMARKS, ROOT, read

# isort: split
import harness
import nets
import step_report
import step_time
import ways

from cifarflow.data.splits import Split
from cifarflow.errors import ConfigError, DataNotFoundError, WorkdirError


def samples(*values):
    return harness.Samples(values)


# Statistics


def test_samples_by_hand():
    five = samples(4.0, 1.0, 3.0, 2.0, 5.0)
    assert (five.n, five.median, five.low, five.high) == (5, 3, 1, 5)
    # The quartiles of 1..5 are 2 and 4.
    assert five.spread == pytest.approx(2 / 3)
    assert samples(7.0).spread == 0
    assert samples(1.0, 3.0).median == 2
    assert five.to_json()["values"] == [4, 1, 3, 2, 5]
    with pytest.raises(ValueError, match="at least one value"):
        samples()


def test_a_ratio_is_the_median_of_the_ratios_of_each_round():
    theirs, ours = samples(2.0, 4.0, 9.0), samples(1.0, 4.0, 3.0)
    assert theirs.over(ours).values == (2, 1, 3)
    # The ratio of the medians would be 4/3.
    assert theirs.over(ours).median == 2
    with pytest.raises(ValueError, match="shorter"):
        theirs.over(samples(1.0, 2.0))


def test_rate():
    assert samples(0.5, 0.25).rate(8).values == (16, 32)


class Fake:
    """A way whose steps take so long without taking any time."""

    def __init__(self, seconds_a_step, calls=None, name="", **facts):
        self.seconds_a_step, self.facts, self.name = seconds_a_step, facts, name
        self.calls = calls if calls is not None else []

    def round(self, steps):
        self.calls.append((self.name, steps))
        return self.seconds_a_step * steps


@pytest.mark.parametrize(
    ("seconds", "facts", "steps"),
    [
        (0.01, {}, 100),
        (0.01, {"multiple": 30}, 90),
        (0.01, {"max_steps": 50}, 50),
        (0.01, {"max_steps": 50, "multiple": 30}, 30),
        (3.0, {}, 1),
        (3.0, {"multiple": 7}, 7),
        # Its steps run twice in a round.
        (0.01, {"max_steps": 50, "warms_up": True}, 25),
        (0.01, {"max_steps": 50, "multiple": 10, "warms_up": True}, 20),
        (0.01, {"max_steps": 1, "warms_up": True}, 1),
        (0.01, {"warms_up": True}, 100),
    ],
)
def test_calibrate(seconds, facts, steps):
    fake = Fake(seconds, **facts)
    assert harness.calibrate(fake, seconds_a_round=1.0) == steps
    # The steps before are the warm-up: never fewer than asked for by the facts.
    assert all(count % facts.get("multiple", 1) == 0 for _, count in fake.calls)


def test_interleaved_rounds_turn_round():
    calls = []
    fakes = {name: Fake(1.0 + i, calls, name) for i, name in enumerate("abc")}
    found = harness.interleave(fakes, rounds=3, seconds_a_round=1.0, settle_seconds=0)
    # Each turn is a warm-up that is not counted, and the round.
    assert "".join(name for name, _ in calls[-18:]) == "aabbccccbbaaaabbcc"
    assert all(
        warm <= count for (_, warm), (_, count) in zip(calls[-18::2], calls[-17::2], strict=True)
    )
    assert found["b"].values == (2, 2, 2)


def test_a_way_that_warms_itself_up_is_not_warmed_up_again():
    calls = []
    fakes = {"a": Fake(1.0, calls, "a"), "b": Fake(1.0, calls, "b", warms_up=True)}
    harness.interleave(fakes, rounds=2, seconds_a_round=4.0, settle_seconds=0)
    # The first call of each finds out how many steps make a round.
    assert calls[2:] == [("a", 1), ("a", 4), ("b", 4), ("b", 4), ("a", 1), ("a", 4)]


def test_bad_rounds():
    with pytest.raises(ConfigError, match="--seconds_a_round must be a finite number > 0, not 0"):
        harness.calibrate(Fake(1.0), seconds_a_round=0)
    with pytest.raises(ConfigError, match="--rounds must be a whole number >= 1, not 0"):
        harness.interleave({"a": Fake(1.0)}, rounds=0, seconds_a_round=1.0)


def test_turns():
    turns = harness.in_turn({"a": 1, "b": 2, "c": 3}, rounds=3)
    assert ["".join(turn) for turn in turns] == ["abc", "cba", "abc"]


def test_table():
    rows = [["ours", "2.5", "1.3x"], ["theirs", "10", "-"]]
    assert harness.format_table(["way", "ms", "ratio"], rows).splitlines() == [
        "| way    |  ms | ratio |",
        "| ------ | --: | ----: |",
        "| ours   | 2.5 |  1.3x |",
        "| theirs |  10 |     - |",
    ]


# Workers

CHILD = """
import os, sys, time
sys.path.insert(0, {path!r})
import worker
from cifarflow.errors import ConfigError

class Way:
    def __init__(self, spec):
        if spec.get("refused"):
            raise ConfigError("the spec is no good")
        print("noise of Python")
        os.write(1, b"noise of a library")
        self.facts = {{"spec": spec["answer"]}}

    def round(self, steps):
        if steps == 13:
            raise ValueError("first line\\nno luck")
        if steps == 14:
            os.kill(os.getpid(), 9)
        if steps == 15:
            time.sleep(60)
        return steps / 4

    def pid(self):
        return os.getpid()

worker.serve(Way)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "child.py"
    path.write_text(CHILD.format(path=str(BENCHMARKS)))
    return path


def is_running(pid):
    try:
        # A zombie has a state too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid):
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_answers(child):
    with harness.Worker("ours", child, {"answer": 42}) as worker:
        assert worker.facts["spec"] == 42
        assert 0 < worker.facts["seconds_to_first_step"] < 60
        assert worker.round(2) == 0.5
        pid = worker.ask("pid")
        assert is_running(pid)
    assert not is_running(pid)
    with pytest.raises(harness.WorkerError, match="ours is not running"):
        worker.round(1)


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (13, "the worker theirs ended with status 1: 'no luck'"),
        (14, "the worker theirs was killed by signal 9: "),
    ],
)
def test_a_worker_that_dies_is_one_line(child, capfd, steps, line):
    with (
        harness.Worker("theirs", child, {"answer": 1}) as worker,
        pytest.raises(harness.WorkerError) as caught,
    ):
        worker.round(steps)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
    # What it wrote is shown then, and only then.
    assert ("Traceback" in capfd.readouterr().err) == (steps == 13)


def test_what_a_worker_refuses_is_the_users_fault(child, capfd):
    with (
        pytest.raises(ConfigError, match=r"^the spec is no good$"),
        harness.Worker("ours", child, {"refused": True}),
    ):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_benchmark(child, number):
    steps = 15 if number == signal.SIGINT else 1
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import harness, time\n"
        f"with harness.Worker('ours', {str(child)!r}, {{'answer': 1}}) as worker:\n"
        f"    print(worker.ask('pid'), flush=True); worker.round({steps}); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pid = int(process.stdout.readline())
        # To the parent alone, as from a job control that does not reach the whole group.
        process.send_signal(number)
        process.wait(timeout=20)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    wait_for_end(pid)


# Bad input, before anything runs


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"models": "lab_mlp,lab_foo"}, "--models must be one of .*, not 'lab_foo'"),
        ({"models": ""}, "--models must be one of .*, not ''"),
        ({"batch_sizes": "32,0"}, "--batch_sizes must be a whole number >= 1, not 0"),
        ({"batch_sizes": "1.5"}, "--batch_sizes must be a whole number >= 1, not '1.5'"),
        ({"batch_sizes": "-8"}, "--batch_sizes must be a whole number >= 1, not '-8'"),
        ({"precisions": "float8"}, "--precisions must be one of .*, not 'float8'"),
        ({"peer_precisions": "auto"}, "--peer_precisions must be one of .*, not 'auto'"),
        ({"compare": "caffe"}, "--compare must be one of none, all, keras, torch.*not 'caffe'"),
        ({"compare": "keras,none"}, "--compare must be none or all alone.*not 'keras,none'"),
        ({"seconds_a_round": 0.0}, "--seconds_a_round must be a finite number > 0, not 0.0"),
        ({"jit_compile": "maybe"}, "--jit_compile must be one of auto, true, false, not 'maybe'"),
        ({"starts": 0}, "--starts must be a whole number >= 1, not 0"),
    ],
)
def test_bad_plans(flags, line):
    with pytest.raises(ConfigError, match=line):
        step_time.make_plan(**flags)


def test_a_peer_that_is_not_installed(monkeypatch):
    # All the others are, whatever this machine has.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(ConfigError, match=r"--compare=keras,torch: torch is not installed: pip"):
        step_time.make_plan(compare="keras,torch")
    plan = step_time.make_plan(compare="all")
    assert plan.peers == tuple(peer for peer in step_time.PEERS if peer != "torch")
    assert plan.skipped == ('torch is not installed: pip install ".[compare]"',)
    assert step_time.make_plan(compare="none").peers == ()


def test_each_is_measured_once():
    plan = step_time.make_plan(models="lab_mlp,lab_mlp", precisions="float32,auto", compare="keras")
    assert plan.models == ("lab_mlp",)
    specs = step_time.make_specs("lab_mlp", 32, plan, harness.Settings(), dataset=tiny.dataset())
    # The recipe's own precision is float32, so that auto is the same again.
    assert list(specs) == [
        ("cifarflow", "float32"),
        ("keras_fit", "float32"),
        ("keras_fit_spe", "float32"),
        ("gemm", "float32"),
    ]


def test_bad_settings(monkeypatch):
    with pytest.raises(ConfigError, match="--rounds must be a whole number >= 1, not 0"):
        harness.Settings(rounds=0)
    with pytest.raises(ConfigError, match="--device must be one of auto, cpu, gpu, not 'tpu'"):
        harness.Settings(device="tpu")
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    with pytest.raises(ConfigError, match="--device=gpu needs a GPU that TensorFlow sees"):
        harness.Settings(device="gpu")
    assert harness.Settings(device="auto").device == "cpu"


def test_a_quick_run_takes_few_images():
    assert harness.Settings().count_examples(32) == 0
    assert harness.Settings(quick=True).count_examples(32) == 2048
    assert harness.Settings(quick=True).count_examples(4096) == 4096


def test_the_cpu_hides_the_gpus_from_the_workers(monkeypatch):
    import tensorflow as tf

    visible = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *given: visible.append(given))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert harness.choose_device("cpu") == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
    assert visible == [([], "GPU")]


def test_outputs_that_cannot_be_written(tmp_path):
    file = tmp_path / "there.json"
    file.write_text("old")
    before = sorted(tmp_path.iterdir())
    too_long = tmp_path / ("x" * 300)
    for path in (tmp_path, tmp_path / "no" / "x.json", file / "x.json", "", "/dev/null", too_long):
        for name in ("json", "plot"):
            with pytest.raises(WorkdirError, match=f"--{name} (must be a file|cannot be written)"):
                harness.Settings(**{name: path})
    with pytest.raises(WorkdirError, match="--json must be a file to write"):
        harness.Settings(json=tmp_path)
    with pytest.raises(ConfigError, match="--json and --plot must be two files"):
        harness.Settings(json=tmp_path / "x", plot=tmp_path / "x")
    assert harness.Settings(json=str(file)).json == file
    assert (sorted(tmp_path.iterdir()), file.read_text()) == (before, "old")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        harness.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_data_are_looked_for_first(tmp_path):
    with pytest.raises(DataNotFoundError):
        harness.load_images(harness.Settings(data="cifar10", data_dir=str(tmp_path)), [32])
    with pytest.raises(ConfigError, match="at most the 8000 training images, not 50000"):
        harness.load_images(harness.Settings(data="standin"), [32, 50000])


# The twins


def randomise(model):
    """Gives a net of Keras random biases and statistics, so that each of them counts."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        shape = tuple(variable.shape)
        if variable.name == "moving_variance":
            # Some so small that epsilon counts.
            variable.assign(rng.uniform(0.01, 1, shape))
        elif variable.name != "kernel":
            variable.assign(variable + rng.normal(0, 0.3, shape))


def some_pixels(name):
    """Images of noise [4, 32, 32, 3], uint8, and as the Keras twin of that name takes them."""
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    scaled = images.astype("float32") / 255
    if name in nets.NORMALISED:
        scaled = (scaled - np.float32(nets.MEAN)) / np.float32(nets.STD)
    return images, scaled


def assert_close(logits, expected):
    expected = np.asarray(expected)
    assert expected.std() > 0.01
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def attributes(model, kind, *names):
    """These attributes of each layer of a kind, in the order of the net."""
    return [
        tuple(getattr(layer, name) for name in names)
        for layer in model.layers
        if isinstance(layer, kind)
    ]


@pytest.mark.parametrize("name", nets.NETS)
def test_the_twins_are_the_same_net(name):
    import keras
    import keras_models

    from cifarflow.models.flops import count_flops
    from cifarflow.recipes import build

    recipe = ways.get_recipe(name, tiny.dataset(), precision="float32")
    ours = build.build_model(recipe, image_shape=(32, 32, 3), num_classes=10)
    twin = keras_models.build(name)

    def count(variables):
        return sum(int(np.prod(v.shape)) for v in variables)

    assert count(twin.trainable_variables) == count(ours.trainable_variables)
    assert count(twin.variables) == count(ours.variables)
    assert count_flops(twin, training=True) == count_flops(ours, training=True)
    for kind, names in (
        (keras.layers.Dropout, ["rate"]),
        (keras.layers.BatchNormalization, ["momentum", "epsilon", "center", "scale"]),
    ):
        assert attributes(twin, kind, *names) == attributes(ours, kind, *names)
    randomise(ours)
    for variable, copy in zip(ours.weights, twin.weights, strict=True):
        assert (copy.name, copy.shape) == (variable.name, variable.shape)
        copy.assign(variable)
    images, scaled = some_pixels(name)
    assert_close(twin(scaled), ours(images.astype("float32")))
    # Plain Keras: nothing of ours may make the peer faster, or slower.
    assert all(type(layer).__module__.startswith("keras.") for layer in twin.layers)
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("name", nets.NETS)
def test_the_torch_twins_are_the_same_net(name):
    torch = pytest.importorskip("torch")
    import keras_models
    import torch_models
    from torch.utils.flop_counter import FlopCounterMode

    from cifarflow.models.flops import count_flops

    ours, twin = keras_models.build(name), torch_models.build(name)
    trained = sum(v.shape.num_elements() for v in ours.trainable_variables)
    assert torch_models.count_parameters(twin) == trained
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        logits = twin(images)
    assert logits.shape == (2, 10)
    assert counter.get_total_flops() == 2 * count_flops(ours)


# With strides, as resnet has them, PyTorch pads both sides of an image, Keras the far one.
@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "resnet"])
def test_the_torch_twins_compute_the_same(name):
    torch = pytest.importorskip("torch")
    import keras
    import keras_models
    import torch_models

    ours, twin = keras_models.build(name), torch_models.build(name).eval()
    norms = [m for m in twin if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    found = attributes(ours, keras.layers.BatchNormalization, "momentum", "epsilon")
    assert [(1 - m.momentum, m.eps) for m in norms] == [pytest.approx(pair) for pair in found]
    rates = attributes(ours, keras.layers.Dropout, "rate")
    assert [(m.p,) for m in twin if isinstance(m, torch.nn.Dropout)] == rates
    randomise(ours)
    names = {
        "kernel": "weight",
        "bias": "bias",
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    layers = [layer for layer in ours.layers if layer.weights]
    modules = [m for m in twin if m.state_dict()]
    for layer, module in zip(layers, modules, strict=True):
        for variable in layer.weights:
            value = torch.tensor(np.asarray(variable))
            if variable.name == "kernel":
                # Keras: sides, channels, filters; PyTorch: filters, channels, sides.
                value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
            getattr(module, names[variable.name]).data.copy_(value)
    images, scaled = some_pixels(name)
    with torch.no_grad():
        logits = twin(torch.tensor(images)).numpy()
    assert_close(logits, ours(scaled))


@pytest.mark.parametrize(
    ("device", "batch_size", "max_steps", "together"),
    [
        ("cpu", 32, 1250, 50),
        ("cpu", 512, 78, 3),
        ("cpu", 4096, 9, 2),
        ("gpu", 512, 78, 50),
        ("gpu", 1024, 39, 39),
        ("cpu", 8, 1, 1),
    ],
)
def test_keras_steps_that_share_a_call(device, batch_size, max_steps, together):
    way = object.__new__(ways.KerasFitSpe)
    way.spec = {"device": device, "batch_size": batch_size}
    assert way.choose_steps_per_execution(max_steps) == together


@pytest.fixture
def make_fit(monkeypatch):
    """Makes a way of Keras `fit` on so many images in batches of 4; its net has nothing to do.

    The first pixel of an image is its number.
    """

    def make(cls, count):
        images = np.zeros((count, 32, 32, 3), np.uint8)
        images[:, 0, 0, 0] = range(count)
        train = Split(images, np.arange(count, dtype=np.int32) % 10)
        monkeypatch.setattr(ways, "load_dataset", lambda spec: SimpleNamespace(train=train))
        sizes = {"model": nets.EMPTY, "batch_size": 4, "device": "cpu"}
        return cls({**sizes, "precision": "float32", "learning_rate": 0.01})

    return make


def test_a_round_of_keras_is_the_second_of_two_epochs(make_fit, monkeypatch):
    way, asked = make_fit(ways.KerasFit, 22), []
    # Two images fill no batch.
    assert (way.facts["max_steps"], way.facts["warms_up"]) == (5, True)

    def fit(images, labels, *, callbacks, epochs, steps_per_epoch, **_):
        assert len(images) == len(labels) == 20
        asked.append((epochs, steps_per_epoch))
        way._traces[0] = 1
        for epoch in range(epochs):
            callbacks[0].on_epoch_begin(epoch)
            callbacks[0].on_epoch_end(epoch, {"loss": 10.0 + epoch})

    way._model.fit = fit
    # Begin and end of each epoch.
    clock = iter([0, 1, 10, 12, 15, 19])
    monkeypatch.setattr(ways, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    # The first round is the first step, which there is but once.
    assert (way.round(1), way.loss) == (1, 10)
    assert (way.round(2), way.loss) == (4, 11)
    assert asked == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("cls", "count", "steps"),
    [
        (ways.KerasFit, 40, 5),
        (ways.KerasFit, 43, 3),
        # Each epoch is all that there is.
        (ways.KerasFit, 6, 1),
        (ways.KerasFitSpe, 40, 5),
        (ways.KerasFitSpe, 19, 2),
    ],
)
def test_rounds_of_keras(make_fit, cls, count, steps):
    way = make_fit(cls, count)
    together = way.facts["multiple"]
    assert together == (steps if cls is ways.KerasFitSpe else 1)
    # Images that run out would be a warning, and that an error here.
    for asked in (together, steps, steps):
        assert way.round(asked) > 0
        assert np.isfinite(way.loss)
    assert int(way._model.optimizer.iterations) == together + 4 * steps


def test_both_epochs_of_a_round_have_one_iterator(make_fit):
    way, drawn = make_fit(ways.KerasFit, 40), []
    train_step = way._model.train_step

    def noted(data):
        drawn.extend(np.rint(255 * data[0].numpy()[:, 0, 0, 0]).astype(int).tolist())
        return train_step(data)

    way._model.run_eagerly, way._model.train_step = True, noted
    # As if it were not the first round, and this is not traced.
    way._traces = [1]
    way.round(5)
    # Another iterator would have drawn some images again.
    assert sorted(drawn) == list(range(40))
    assert drawn != sorted(drawn)


def test_a_round_of_keras_that_is_traced_again_is_an_error(make_fit):
    way = make_fit(ways.KerasFit, 20)
    for _ in range(2):
        way.round(1)
    way._model.make_train_function(force=True)
    with pytest.raises(RuntimeError, match=r"^Keras traced its step again, \d+ times in all$"):
        way.round(1)


def test_torch_draws_every_image_once_an_epoch():
    pytest.importorskip("torch")
    way = object.__new__(ways.TorchEager)
    import torch

    way.spec, way._torch, way._device = {"batch_size": 4}, torch, torch.device("cpu")
    way._images = torch.zeros(10, 1)
    drawn = [index.tolist() for index in itertools.islice(way._draw(), 6)]
    assert all(len(index) == 4 for index in drawn)
    for first in (0, 2, 4):
        assert len({*drawn[first], *drawn[first + 1]}) == 8
    assert drawn[:2] != drawn[2:4]


# What a figure stands with


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit that `harness` takes for its own; returns its folder."""
    for name in ("benchmarks", "cifarflow/models"):
        (tmp_path / "repository" / name).mkdir(parents=True)
    folder = tmp_path / "repository"
    (folder / "benchmarks" / "harness.py").write_text("")
    (folder / ".gitignore").write_text("ignored.py\n")
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*settings, "commit", "-q", "-m", "one"]):
        try:
            subprocess.run(["git", *words], cwd=folder, check=True)
        except FileNotFoundError:
            pytest.skip("there is no git")
    monkeypatch.setattr(harness, "__file__", str(folder / "benchmarks" / "harness.py"))
    return folder


@pytest.mark.parametrize(
    ("path", "is_dirty"),
    [
        (None, False),
        ("benchmarks/harness.py", True),
        ("benchmarks/new.py", True),
        ("cifarflow/models/new.py", True),
        ("cifarflow/ignored.py", False),
        ("notes.py", False),
        ("benchmarks/figures.png", False),
    ],
)
def test_code_that_is_in_no_commit_is_told(checkout, path, is_dirty):
    if path:
        (checkout / path).write_text("new")
    commit, _, dirty = harness.environment()["commit"].partition("-")
    assert len(commit) == 12
    assert int(commit, 16)
    assert dirty == ("dirty" if is_dirty else "")


def test_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "harness.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.environment()["commit"] == "unknown"
    monkeypatch.setenv("PATH", "")
    assert harness.environment()["commit"] == "unknown"


def test_versions_of_what_is_installed(monkeypatch):
    def version(package):
        if package == "torch":
            raise importlib.metadata.PackageNotFoundError
        return f"1.0 of {package}"

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = harness.environment()["versions"]
    assert list(versions) == ["python", "tensorflow", "keras", "numpy", "jax", "jaxlib"]
    assert versions["jaxlib"] == "1.0 of jaxlib"


# Starts and rounds, without processes


class FakeWorker(Fake):
    """A worker whose starts take longer and longer; the last of each is the one that is asked."""

    started, running, loss = (), 0, 1.5
    parameters = {}  # noqa: RUF012

    def __init__(self, name, script, spec):
        cls = type(self)
        cls.started = (*cls.started, name)
        super().__init__(len(cls.started) / 100, name=name)
        self.facts = {"seconds_to_first_step": float(len(cls.started))}
        if spec["way"] == "gemm":
            self.facts["flops_per_step"] = 1e9
        else:
            self.facts |= {"flops_per_image": 1e6, "jit_compile": False}
            self.facts["parameters"] = self.parameters.get(spec["way"], 7)

    def __enter__(self):
        type(self).running += 1
        return self

    def __exit__(self, *_):
        type(self).running -= 1

    def ask(self, call):
        assert type(self).running == 4
        return {"last_loss": self.loss, "peak_rss_bytes": 1}[call]


@pytest.fixture
def measure(monkeypatch):
    """Measures lab_mlp, ours and Keras's ways, with workers that are none."""
    monkeypatch.setattr(harness, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "started", ())
    monkeypatch.setattr(FakeWorker, "running", 0)

    def call(**changes):
        plan = step_time.make_plan(compare="keras", profile=False, **changes)
        settings = harness.Settings(rounds=2, quick=True)
        return step_time.measure("lab_mlp", 32, plan, settings, dataset=tiny.dataset())

    return call


NAMES = [f"lab_mlp, {way} float32" for way in ("cifarflow", "keras_fit", "keras_fit_spe", "gemm")]


def test_starts_take_turns_and_the_last_is_measured(measure):
    result = measure(starts=2)
    *training, gemm = NAMES
    assert list(FakeWorker.started) == [*training, *training[::-1], gemm]
    assert FakeWorker.running == 0
    rows = {row["way"]: row for row in result["ways"]}
    assert list(rows) == ["cifarflow", "keras_fit", "keras_fit_spe"]
    starts = {way: row["seconds_to_first_step"]["values"] for way, row in rows.items()}
    assert starts == {"cifarflow": [1, 6], "keras_fit": [2, 5], "keras_fit_spe": [3, 4]}
    # By how long their steps take, these are the processes of the second start.
    seconds = {way: row["seconds_a_step"]["median"] for way, row in rows.items()}
    expected = {"cifarflow": 0.06, "keras_fit": 0.05, "keras_fit_spe": 0.04}
    assert seconds == pytest.approx(expected)
    assert {row["last_loss"] for row in rows.values()} == {1.5}
    (ratio,) = result["start_ratios"]
    assert (ratio["ours"], ratio["against"]) == ("cifarflow float32", "keras_fit float32")
    assert ratio["ratio"]["values"] == pytest.approx([2, 5 / 6])
    text = step_report.describe(result)
    assert (
        "cifarflow float32 starts 1.42x as fast as keras_fit float32 (0.83 to 2.00 in 2 starts)"
    ) in text
    (line,) = (line for line in text.splitlines() if line.startswith("| keras_fit float32 "))
    assert "| 3.5 s |" in re.sub(" +", " ", line)


def test_one_start_is_one_process_each(measure):
    result = measure()
    assert list(FakeWorker.started) == NAMES
    assert result["ways"][1]["seconds_to_first_step"]["values"] == [2]
    assert " starts " not in step_report.describe(result)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_way_that_does_not_train(measure, monkeypatch, loss):
    monkeypatch.setattr(FakeWorker, "loss", loss)
    line = f"lab_mlp, cifarflow float32 does not train: its loss in the last round is {loss}"
    with pytest.raises(RuntimeError, match=f"^{line}$"):
        measure()
    assert FakeWorker.running == 0


def test_the_ways_must_train_the_same_net(measure, monkeypatch):
    monkeypatch.setattr(FakeWorker, "parameters", {"keras_fit_spe": 8})
    line = "these are not the same net, by their trainable parameters: "
    counts = dict(zip(NAMES, (7, 7, 8), strict=False))
    with pytest.raises(RuntimeError, match=f"^{re.escape(line + str(counts))}$"):
        measure()
    assert FakeWorker.running == 0


def test_the_peak_is_the_best_round_of_gemm(measure, monkeypatch):
    # In the first round the machine was slow when it was the products' turn.
    def interleave(workers, **_):
        gemm, training = samples(0.5, 0.25), samples(0.01, 0.01)
        return {key: gemm if key[0] == "gemm" else training for key in workers}

    monkeypatch.setattr(harness, "interleave", interleave)
    result = measure()
    # Steps of 32 images at a MFLOP each are 3.2 GFLOP/s; products of a GFLOP are 2 and 4.
    for row in result["ways"]:
        assert row["share_of_gemm_peak"]["values"] == pytest.approx([0.8, 0.8])
    text = step_report.describe(result)
    assert "GEMM peak 4 GFLOP/s in float32." in text
    assert text.count("80.0 %") == 3


# Ratios


def row(way, precision, *seconds):
    label = step_report.label(way, precision)
    took = samples(*seconds).to_json()
    return {"way": way, "precision": precision, "label": label, "seconds_a_step": took}


def bests(rows):
    ratios = step_report.ratios(rows, {"keras": ("fit", "spe"), "torch": ("eager",)})
    return {
        (ratio["ours"], ratio["against"]): (ratio["is"], ratio["ratio"]["values"])
        for ratio in ratios
        if "is" in ratio
    }


def test_the_best_of_a_peer_is_of_the_same_precision_or_says_that_it_is_of_any():
    ours = [row("cifarflow", "float32", 1.0, 2.0), row("cifarflow", "mixed_bfloat16", 1.0, 1.0)]
    keras = [
        row("fit", "float32", 6.0, 6.0),
        row("spe", "float32", 4.0, 6.0),
        row("fit", "mixed_bfloat16", 3.0, 3.0),
        row("spe", "mixed_bfloat16", 2.0, 2.0),
    ]
    found = bests([*ours, *keras, row("eager", "float32", 8.0, 8.0)])
    assert found == {
        ("cifarflow float32", "best of keras in float32"): ("spe float32", [4, 3]),
        ("cifarflow float32", "best of keras in any precision"): ("spe bfloat16", [2, 1]),
        ("cifarflow float32", "best of torch"): ("eager float32", [8, 4]),
        ("cifarflow bfloat16", "best of keras in bfloat16"): ("spe bfloat16", [2, 2]),
        ("cifarflow bfloat16", "best of keras in any precision"): ("spe bfloat16", [2, 2]),
        # There is none in bfloat16.
        ("cifarflow bfloat16", "best of torch in any precision"): ("eager float32", [8, 8]),
    }
    assert bests(ours) == {}


# The script


def test_a_quick_run(quick_run):
    folder, done = quick_run("step")
    record = read(folder, done)
    assert record["rounds"] == 2
    (result,) = record["results"]
    assert (result["model"], result["batch_size"]) == ("lab_mlp", 32)
    assert result["trainable_parameters"] == 1_707_274
    found = {row["label"]: row for row in result["ways"]}
    installed = {peer: importlib.util.find_spec(peer) is not None for peer in step_time.PEERS}
    peers = [way for peer, ways in step_time.PEERS.items() if installed[peer] for way in ways]
    assert list(found) == [f"{way} float32" for way in ("cifarflow", *peers)]
    for peer, is_installed in installed.items():
        assert (f"skipped: {peer} is not installed" in done.stdout) == (not is_installed)
    for row in found.values():
        seconds, rates = row["seconds_a_step"], row["images_per_second"]
        assert seconds["n"] == len(seconds["values"]) == 2
        assert rates["values"] == pytest.approx([32 / value for value in seconds["values"]])
        gflop = 32 * result["training_flops_per_image"] / 1e9
        assert row["gflops"]["values"] == pytest.approx([gflop / s for s in seconds["values"]])
        assert row["peak_rss_bytes"] > 50 * 2**20
        assert row["seconds_to_first_step"]["n"] == 1
        assert row["seconds_to_first_step"]["median"] > 0
        assert 0 < row["last_loss"] < 10
    (ratio,) = [r for r in result["ratios"] if r["against"] == "keras_fit float32"]
    ours, theirs = (
        found[name]["seconds_a_step"]["values"]
        for name in ("cifarflow float32", "keras_fit float32")
    )
    assert ratio["ratio"]["values"] == pytest.approx(
        [b / a for a, b in zip(ours, theirs, strict=True)]
    )


def test_a_quick_run_is_readable(quick_run):
    folder, done = quick_run("step")
    record = json.loads((folder / "step.json").read_text())
    (result,) = record["results"]
    assert step_report.describe(result) in done.stdout
    best = next(r for r in result["ratios"] if r["against"] == "best of keras")
    assert best["is"] in ("keras_fit float32", "keras_fit_spe float32")
    assert f"{best['ratio']['median']:.2f}x as fast as the best of keras" in done.stdout
    split = next(row for row in result["ways"] if row["way"] == "cifarflow")["profile"]
    assert split["bound"] in ("input", "host", "device")
    parts = split["input_ms"] + split["host_ms"] + split["device_ms"]
    assert parts == pytest.approx(split["step_ms"], rel=1e-3)
    assert split["verdict"] in done.stdout
    # The libraries' noise is held back; progress is not.
    assert "lab_mlp, cifarflow float32: first step after" in done.stderr
