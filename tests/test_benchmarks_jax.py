"""The JAX peer of step_time.py, and what its ways need: libraries that are there, and for a GPU."""

import importlib.util
import math
import sys
from pathlib import Path

import benchmark_suite
import numpy as np
import pytest
import tiny

# isort: split
import harness
import step_time
import ways
import worker as worker_module

from cifarflow.data.standin import load_standin
from cifarflow.errors import ConfigError

needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None,
    reason='JAX is not installed: pip install ".[compare]"',
)
SPEC = {
    "way": "jax_jit",
    "model": "lab_mlp",
    "precision": "float32",
    "batch_size": 8,
    "device": "cpu",
    "data": "standin",
    "data_dir": None,
    "examples": 36,
    "learning_rate": 0.01,
    "jit_compile": "auto",
    "quick": True,
}


# Which peers there are


def hide(monkeypatch, *names):
    """Makes these libraries look as if they were not installed, and the other peers as if."""
    found = importlib.util.find_spec

    def find_spec(name):
        if name in names:
            return None
        return object() if name in step_time.PEERS else found(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_jax_that_is_not_installed(monkeypatch):
    hide(monkeypatch, "jax")
    line = r'--compare=keras,jax: jax is not installed: pip install "\.\[compare\]"$'
    with pytest.raises(ConfigError, match=line):
        step_time.make_plan(compare="keras,jax")
    plan = step_time.make_plan(compare="all")
    assert plan.peers == ("keras", "torch")
    assert plan.skipped == ('jax is not installed: pip install ".[compare]"',)


def test_jax_that_is_installed(monkeypatch):
    hide(monkeypatch)
    plan = step_time.make_plan(compare="jax", precisions="float32")
    assert (plan.peers, plan.skipped) == (("jax",), ())
    specs = step_time.make_specs("lab_mlp", 32, plan, harness.Settings(), dataset=tiny.dataset())
    assert list(specs) == [("cifarflow", "float32"), ("jax_jit", "float32"), ("gemm", "float32")]
    assert "jax" in step_time.make_plan(compare="all").peers


def test_torch_must_be_built_for_the_gpu(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = "^--device=gpu needs a PyTorch built for the GPU: this one is not$"
    with pytest.raises(ConfigError, match=line):
        ways.TorchEager({**SPEC, "way": "torch_eager", "device": "gpu"})


@needs_jax
def test_jax_must_be_built_for_the_gpu(start, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    line = "^--device=gpu needs a JAX built for the GPU: this one is not$"
    with pytest.raises(ConfigError, match=line):
        start(device="gpu")


@pytest.mark.parametrize("way", ["gemm", "jax_jit"])
def test_only_its_own_way_may_import_jax(monkeypatch, way):
    # TensorFlow imports it, if it can.
    monkeypatch.setitem(sys.modules, "jax", "jax")
    monkeypatch.setitem(ways.WAYS, way, lambda spec: sys.modules["jax"])
    assert ways.make_way({"way": way}) == ("jax" if way == "jax_jit" else None)


# The way, in a process of its own


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    load_standin(cache_dir=folder)
    return folder


@pytest.fixture
def start(cache, monkeypatch, request):
    """Starts a worker with these changes to `SPEC`."""
    monkeypatch.setenv("CIFARFLOW_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(benchmark_suite.ROOT))
    # Whatever is set outside must not decide.
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")

    def start_worker(**changes):
        started = harness.Worker("jax", Path(ways.__file__), {**SPEC, **changes})
        started.__enter__()
        request.addfinalizer(started.__exit__)
        return started

    return start_worker


@needs_jax
@pytest.mark.parametrize(
    ("model", "precision"), [("lab_mlp", "float32"), ("lab_batchnorm", "mixed_bfloat16")]
)
def test_rounds(start, model, precision):
    from cifarflow.recipes import build

    worker = start(model=model, precision=precision)
    recipe = ways.get_recipe(model, tiny.dataset(), precision="float32")
    ours = build.build_model(recipe, image_shape=(32, 32, 3), num_classes=10)
    trained = sum(v.shape.num_elements() for v in ours.trainable_variables)
    assert worker.facts["parameters"] == trained
    # lab_mlp in a loop, the other step by step.
    assert worker.facts["in_one_loop"] == (model == "lab_mlp")
    first = worker.ask("last_loss")
    # Four steps an epoch.  A round that is traced again is an error, see below.
    for steps in (1, 9, 2, 20):
        assert worker.round(steps) > 0
        assert math.isfinite(worker.ask("last_loss"))
    assert worker.ask("last_loss") < first
    assert worker.ask("peak_rss_bytes") > 50 * 2**20


# The parts of it, in a process whose Keras is on JAX

CHILD = """
import os, sys
os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
sys.path.insert(0, {path!r})
import jax, keras, numpy as np
import jax_training, keras_models, ways, worker
from keras import layers

RNG = np.random.default_rng(1)
IMAGES = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 10, dtype=np.int32)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def train(model, in_one_loop=True, batch_size=4, **options):
    schedule = keras.optimizers.schedules.InverseTimeDecay(0.1, 1, 1e-2)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    return jax_training.Training(
        model, optimizer, jax.device_put(IMAGES), jax.device_put(LABELS),
        batch_size=batch_size, in_one_loop=in_one_loop, **options
    )


def small():
    return keras.Sequential([
        keras.Input((32, 32, 3)), layers.Cropping2D(12), layers.Conv2D(4, 3),
        layers.BatchNormalization(momentum=0.5), layers.Activation("relu"),
        layers.Flatten(), layers.Dropout(0.5, seed=1), layers.Dense(10),
    ])


class Checks:
    def __init__(self, spec):
        self.facts = {{}}

    def round(self, steps):
        return 0.0

    def modules(self, spec):
        ways.JaxJit(spec)
        return [name for name in ("jax", "tensorflow") if name in sys.modules]

    def save_steps(self, path, steps):
        model = keras_models.build("lab_mlp")
        before = [np.array(v) for v in model.trainable_variables]
        run = train(model, batch_size=10, mean=MEAN, std=STD)
        run.train(steps)
        after = [np.array(v) for v in run.state.trainable]
        np.savez(path, images=IMAGES, labels=LABELS, loss=run.mean_loss(),
                 **{{f"before{{i}}": v for i, v in enumerate(before)}},
                 **{{f"after{{i}}": v for i, v in enumerate(after)}})

    def both_modes(self, path):
        model, found = small(), {{}}
        for in_one_loop in (True, False):
            run = train(model, in_one_loop)
            seeds = [np.array(run.state.fixed[-1])]
            for steps in (1, 4, 2):
                run.train(steps)
                seeds.append(np.array(run.state.fixed[-1]))
            values = [*run.state.trainable, *run.state.fixed]
            found |= {{f"{{in_one_loop}}{{i}}": np.array(v) for i, v in enumerate(values)}}
            found[f"seeds{{in_one_loop}}"] = np.array(seeds)
            found[f"traces{{in_one_loop}}"] = run.traces
            found[f"programs{{in_one_loop}}"] = run._run._cache_size()
        np.savez(path, **found)

    def orders(self):
        run, found = train(small()), []
        for _ in range(3):
            run.train(2)
            found.append(np.array(run._order).tolist())
        return found

    def trace_again(self):
        way = object.__new__(ways.JaxJit)
        way._training = train(small(), batch_size=4)
        way.round(1)
        way._training._order = way._training._order[:, :2]
        try:
            way.round(1)
        except RuntimeError as error:
            return str(error)

    def pooling(self, size):
        x = RNG.standard_normal((3, 7, 9, 2)).astype("float32")
        found = []
        for layer in (layers.MaxPooling2D(size), jax_training.BlockMaxPooling(size)):
            y, pull = jax.vjp(layer, x)
            (gradient,) = pull(jax.numpy.arange(y.size, dtype=y.dtype).reshape(y.shape))
            found.append([np.array(y).tolist(), np.array(gradient).tolist()])
        return found

    def speednet(self):
        model = keras_models.build("speednet")
        twin = jax_training.with_block_pooling(model)
        kinds = [sum(isinstance(layer, kind) for layer in twin.layers)
                 for kind in (layers.MaxPooling2D, jax_training.BlockMaxPooling)]
        same = all(any(v is w for w in model.trainable_variables) for v in twin.trainable_variables)
        shapes = [model.layers[-1].output.shape, twin.layers[-1].output.shape]
        return [kinds, same, len(twin.trainable_variables), len(model.trainable_variables), shapes]


worker.serve(Checks)
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory, cache):
    """A worker that has the parts in its hands."""
    path = tmp_path_factory.mktemp("checks") / "child.py"
    path.write_text(CHILD.format(path=str(benchmark_suite.BENCHMARKS)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(benchmark_suite.ROOT))
        patch.setenv("CIFARFLOW_CACHE", str(cache))
        with worker_module.Worker("checks", path, {}) as worker:
            yield worker


@needs_jax
@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_is_that_of_our_loop(checks, tmp_path, steps):
    import keras
    import keras_models

    from cifarflow.optimizers.schedules import InverseTime
    from cifarflow.optimizers.sgd import SGD
    from cifarflow.training.step import make_train_step

    checks.ask("save_steps", path=str(tmp_path / "steps.npz"), steps=steps)
    found = np.load(tmp_path / "steps.npz")
    model = keras_models.build("lab_mlp")
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(found[f"before{i}"])
    mean, std = np.float32((0.4, 0.5, 0.6)), np.float32((0.2, 0.3, 0.25))
    images = (found["images"].astype("float32") / 255 - mean) / std
    step = make_train_step(model, SGD(InverseTime(0.1, 1e-2), momentum=0.9, nesterov=True))
    losses = [float(step(images, found["labels"]).loss) / 10 for _ in range(steps)]
    assert keras.backend.backend() == "tensorflow"
    # What is compared is not noise.
    change = [np.abs(found[f"after{i}"] - found[f"before{i}"]).max() for i in range(6)]
    assert min(change) > 1e-3
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    for i, variable in enumerate(model.trainable_variables):
        np.testing.assert_allclose(found[f"after{i}"], variable, rtol=1e-4, atol=1e-5)


@needs_jax
def test_steps_in_a_loop_are_the_same_as_one_by_one(checks, tmp_path):
    checks.ask("both_modes", path=str(tmp_path / "modes.npz"))
    found = np.load(tmp_path / "modes.npz")
    names = [name[4:] for name in found if name[:4] == "True"]
    # Kernels and biases of two layers, gamma, beta and the statistics of BatchNorm, dropout's seed.
    assert len(names) == 9
    for name in names:
        np.testing.assert_allclose(found[f"True{name}"], found[f"False{name}"], 1e-4, 1e-5)
    # Rounds of 1, 4 and 2 steps: dropout draws anew in each, and none is compiled again.
    assert len({tuple(seed) for seed in found["seedsTrue"].tolist()}) == 4
    for mode in (True, False):
        assert (found[f"traces{mode}"], found[f"programs{mode}"]) == (1, 1)


@needs_jax
def test_a_round_that_is_traced_again_is_an_error(checks):
    assert checks.ask("trace_again") == "JAX traced its step again, 2 times in all"


@needs_jax
def test_every_image_is_drawn_once_an_epoch(checks):
    # Two of ten images fill no batch of four.
    orders = checks.ask("orders")
    assert [len({*first, *second}) for first, second in orders] == [8, 8, 8]
    assert orders[0] != orders[1] != orders[2]


@needs_jax
@pytest.mark.parametrize("size", [2, 3])
def test_pooling_by_blocks_is_max_pooling(checks, size):
    (expected, expected_gradient), (found, gradient) = checks.ask("pooling", size=size)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)


@needs_jax
def test_only_pooling_is_replaced(checks):
    kinds, same, trained, expected, (shape, expected_shape) = checks.ask("speednet")
    assert (kinds, same, trained) == ([0, 4], True, expected)
    assert shape == expected_shape


@needs_jax
def test_no_tensorflow_beside_jax(checks):
    assert checks.ask("modules", spec=SPEC) == ["jax"]
