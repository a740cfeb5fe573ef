"""The PyTorch loop that recipes are compared with: what it refuses, and that it trains the same."""

import contextlib
import dataclasses
import importlib.util
import json
import subprocess
import sys
import types

import benchmark_suite
import numpy as np
import pytest

# isort: split
import harness
import time_to_accuracy
import torch_peer

from cifarflow.data.augment import parse_augment
from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import ConfigError, DataError, NonFiniteError
from cifarflow.recipes.build import assemble, build_model
from cifarflow.recipes.named import get_recipe
from cifarflow.trials import TIMING_RULE

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
TORCH = {
    "torch": "time_to_accuracy.py --quick --data=standin --recipe=fast75 --runs=2 --bar=0.01 "
    "--tune --compare=torch --json=torch.json --plot=torch.png"
}
# What trains in a moment.
SMALL = {
    "model_options": {"widths": (8, 16), "activation": "silu"},
    "precision": "float32",
    "data": "standin",
    "batch_size": 16,
    "epochs": 2.5,
}


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """A function of a name in `TORCH`: the run's folder, and how it ended."""
    commands = TORCH if importlib.util.find_spec("torch") else {}
    with benchmark_suite.quick_runs(tmp_path_factory.mktemp("torch"), commands) as run:
        yield run


@pytest.fixture(scope="module", autouse=True)
def started(finish):
    """It runs while the other tests do."""


@pytest.fixture
def loop(monkeypatch):
    """The worker's module."""
    torch = pytest.importorskip("torch")
    import torch_trials

    threads = torch.get_num_threads()
    # On busy processors PyTorch's threads wait for each other: small steps take ten times as long.
    monkeypatch.setattr(torch_trials.worker, "count_cores", lambda: 1)
    torch.set_num_threads(1)
    yield torch_trials
    torch.set_num_threads(threads)
    # The loop turns it on for the whole process, where other tests need the smallest numbers.
    torch.set_flush_denormal(False)


def images_of(count, seed=0):
    """Images whose brightness tells the class, in noise, [N, 32, 32, 3] uint8, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 10).astype(np.int32)
    images = rng.integers(0, 60, (count, 32, 32, 3)) + labels[:, None, None, None] * 19
    return Split(images.astype(np.uint8), labels)


def dataset_of(train=64, test=40):
    names = tuple("abcdefghij")
    splits = images_of(train), images_of(20, 1), images_of(test, 2)
    return Dataset("standin", *splits, names, "generated")


@pytest.fixture
def specs(monkeypatch):
    """What workers are asked for; none is started."""
    found = []

    class Worker:
        facts = {  # noqa: RUF012
            **{"steps": 9, "train_images": 64, "read_images": 40, "torch": "2"},
            **{"precision": "float32", "device": "cpu"},
            **{"compile_seconds": 2.0, "seconds_to_first_step": 9.0},
        }

        def __init__(self, name, script, spec):
            found.append(spec)
            self.facts = {**self.facts, "compile": spec["compile"]}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(harness, "Worker", Worker)
    return found


def start(loop, monkeypatch, recipe, dataset=None, **spec):
    """The loop for a recipe, on generated images and warmed up."""
    dataset = dataset or dataset_of()
    monkeypatch.setattr(loop, "load_data", lambda *args, **kwargs: dataset)
    parts = {
        "recipe": recipe.to_json(),
        "augment": parse_augment(recipe.augment),
        "read": "test",
        "device": "cpu",
        "data_dir": None,
        "compile": "none",
    }
    trials = loop.TorchTrials({**parts, **spec})
    trials.round(1)
    return trials


def values_by_path(net, model):
    """Pairs of a PyTorch tensor and the Keras variable that is the same, and how to turn one."""
    pairs = [(net.whitening.weight, model.get_layer("whitening").kernel)]
    paths = {variable.path: variable for variable in model.trainable_variables}
    for path, tensor in net.trained.items():
        pairs.append((tensor, paths[path]))
    for name, norm in zip(net.kernels, net.norms, strict=True):
        layer = model.get_layer(name.replace("_conv/kernel", "_norm"))
        pairs += [
            (norm.running_mean, layer.moving_mean),
            (norm.running_var, layer.moving_variance),
        ]
    return pairs


def turned(array):
    """Keras: sides, channels, filters; PyTorch: filters, channels, sides."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def copy_to_torch(net, model):
    import torch

    with torch.no_grad():
        for tensor, variable in values_by_path(net, model):
            tensor.copy_(torch.tensor(turned(np.asarray(variable)).copy()))


# Command lines


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("lab_cnn", "--compare=torch needs a recipe with model=speednet, not 'cnn'"),
        ("fast96", "--compare=torch needs a recipe with optimizer=muon, not 'sgd'"),
        (
            "fast94:averaging=ema",
            "--compare=torch needs a recipe with averaging=none, not 'ema'",
        ),
        (
            "fast94:schedule=cosine",
            "--compare=torch needs a recipe with schedule=one_cycle, not 'cosine'",
        ),
        (
            'fast94:model_options={"dropout":0.5}',
            "model_options of a recipe for --compare=torch must be one of widths, .*not 'dropout'",
        ),
        (
            'fast94:model_options={"activation":"tanh"}',
            "activation of a recipe for --compare=torch must be one of relu, gelu, silu, .*'tanh'",
        ),
        (
            "fast94:augment=altflip,cutout:8",
            "augment of a recipe for --compare=torch must be one of flip, .*, not 'cutout'",
        ),
        (
            "fast94:augment=altflip,mixup:0.2",
            "augment of a recipe for --compare=torch must be one of flip, .*, not 'mixup'",
        ),
        (
            "fast94:augment=randaugment",
            "augment of a recipe for --compare=torch must be one of flip, .*, not 'randaugment'",
        ),
        (
            'fast94:freeze={"beta":1}',
            "--compare=torch needs a recipe that freezes whitening/bias alone, not 'beta'",
        ),
        (
            'fast94:freeze={"block2":1}',
            "--compare=torch needs a recipe that freezes whitening/bias alone, not 'block2'",
        ),
        (
            'fast94:freeze={"block3_2_norm":1}',
            "--compare=torch needs a recipe that freezes whitening/bias alone, .*'block3_2_norm'",
        ),
        (
            'fast94:freeze={"":1}',
            "freeze's keys must .*, not ''",
        ),
        (
            'fast94:freeze={"whitening/bias":1,"dense":1}',
            "--compare=torch needs a recipe that freezes whitening/bias alone, not 'dense'",
        ),
        (
            'fast94:learning_rate_scales={"conv":2}',
            "--compare=torch needs learning_rate_scales above 0, and none of convolutions, "
            "not 'conv': 2.0",
        ),
        (
            'fast94:learning_rate_scales={"block2_1_conv":2}',
            "--compare=torch needs learning_rate_scales above 0, and none of convolutions, "
            "not 'block2_1_conv': 2.0",
        ),
        (
            'fast94:model_options={"widths":[]}',
            r"widths must hold at least one size, not \(\)",
        ),
        (
            'fast94:learning_rate_scales={"beta":0}',
            "--compare=torch needs learning_rate_scales above 0, .*, not 'beta': 0.0",
        ),
    ],
)
def test_recipes_that_it_cannot_run(recipe, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        time_to_accuracy.make_plan(recipe=recipe, compare="torch")


def test_torch_may_be_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    line = r'^--compare=torch: torch is not installed: pip install "\.\[compare\]"$'
    with pytest.raises(ConfigError, match=line):
        time_to_accuracy.make_plan(recipe="fast94", compare="torch")


@pytest.mark.parametrize("choice", torch_peer.COMPILE_CHOICES)
def test_the_choice_of_compilation_is_passed_on(monkeypatch, specs, capsys, choice):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    plan = time_to_accuracy.make_plan(recipe="fast94", compare="torch", torch_compile=choice)
    assert (plan.torch, plan.torch_compile, len(plan.recipes)) == (True, choice, 1)
    trials = types.SimpleNamespace(recipe=plan.recipes[0], total_steps=9)
    for device, auto in (("cpu", "none"), ("gpu", "default")):
        settings = types.SimpleNamespace(device=device, data_dir=None)
        peer = torch_peer.TorchPeer(trials, dataset_of(), settings, compile_mode=choice)
        with contextlib.ExitStack() as stack:
            peer.start(stack)
        mode = auto if choice == "auto" else choice
        assert specs.pop()["compile"] == mode
        # As long as ours counts: not from the start of the process.
        line = f"fast94 by PyTorch: compiled in 2.0 s; torch 2, float32, compile={mode}, cpu\n"
        assert capsys.readouterr().err == line


def test_the_mode_of_compilation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="--torch_compile needs --compare=torch, not 'fast75'"):
        time_to_accuracy.make_plan(recipe="fast94", compare="fast75", torch_compile="none")
    with pytest.raises(ConfigError, match=r"^--torch_compile must be one of auto, .*'some'$"):
        time_to_accuracy.make_plan(recipe="fast94", compare="torch", torch_compile="some")


def test_what_the_recipe_is_checked_by_is_what_the_loop_has(loop):
    assert ("auto", *loop.COMPILE_MODES) == torch_peer.COMPILE_CHOICES
    assert tuple(loop.ACTIVATIONS) == torch_peer.ACTIVATIONS
    for options in ({}, {"widths": (8, 16), "convs_per_block": 3}, {"widths": 8, "logit_scale": 1}):
        net, paths = loop.Speednet(options), torch_peer.trained_paths(options)
        assert paths.kernels == net.kernels
        assert {*paths.kernels, *paths.others} == set(net.trained)


@pytest.mark.parametrize("mode", torch_peer.COMPILE_CHOICES[1:])
def test_all_is_compiled_in_the_same_mode(loop, monkeypatch, mode):
    import torch

    compiled, marks = [], []

    def compile_(function, **options):
        compiled.append((function.__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    trials = start(loop, monkeypatch, get_recipe("fast94", **SMALL), compile=mode)
    assert trials.facts["compile"] == mode
    names = [] if mode == "none" else ["muon_step", "loss_of", "outputs_of"]
    assert compiled == [(name, {"mode": mode, "dynamic": False}) for name in names]
    assert bool(marks) == (mode in ("reduce-overhead", "max-autotune"))


def test_it_must_be_built_for_the_gpu(loop, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device=gpu needs a PyTorch built for the GPU: this"):
        start(loop, monkeypatch, get_recipe("fast75", **SMALL), device="gpu")


def test_the_process_holds_no_tensorflow(loop):
    code = "import sys, torch_trials; print({'tensorflow', 'keras', 'jax'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=benchmark_suite.BENCHMARKS, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "set()\n", done.stderr


# The same net, rates and steps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "silu", "batch_norm_momentum": 0.557, "logit_scale": 1 / 256},
        {"activation": "relu", "convs_per_block": 3, "residual": True, "logit_scale": 1.0},
    ],
)
def test_its_net_computes_the_same(loop, options, training):
    import torch

    options = {"widths": (8, 16, 24), **options}
    recipe = get_recipe("fast94", model_options=options, precision="float32")
    images = images_of(16).images
    ours = build_model(recipe, image_shape=(32, 32, 3), num_classes=10, images=images)
    rng = np.random.default_rng(0)
    for variable in ours.variables:
        if "variance" not in variable.path and "seed" not in variable.path:
            noise = rng.normal(0, 0.02, variable.shape)
            variable.assign(np.asarray(variable) + noise.astype(np.float32))
    net = loop.Speednet(recipe.model_options).train(training)
    copy_to_torch(net, ours)
    scaled = (images / 255 - loop.nets.MEAN) / loop.nets.STD
    with torch.no_grad():
        found = net(torch.tensor(scaled.astype(np.float32)).permute(0, 3, 1, 2))
    wanted = np.asarray(ours(images, training=training))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4, rtol=1e-4)


def test_its_first_weights(loop):
    import torch

    recipe = get_recipe("fast94")
    ours = build_model(recipe, image_shape=(32, 32, 3), num_classes=10)
    net = loop.Speednet(recipe.model_options)
    net.reset(torch.Generator().manual_seed(0))
    assert set(net.trained) == {v.path for v in ours.trainable_variables}
    for tensor, variable in values_by_path(net, ours)[1:]:
        found, wanted = tensor.detach().numpy(), turned(np.asarray(variable))
        assert found.shape == wanted.shape
        # Drawn from the same distribution; what is fixed is the same.
        assert found.std() == pytest.approx(wanted.std(), rel=0.15, abs=1e-6), variable.path
        assert np.abs(found).max() == pytest.approx(np.abs(wanted).max(), rel=0.15)
        if found.ndim == 4:
            fixed = wanted[: min(wanted.shape[:2])]
            np.testing.assert_array_equal(found[: len(fixed)], fixed)
    again = loop.Speednet(recipe.model_options)
    again.reset(torch.Generator().manual_seed(0))
    for one, other in zip(net.trained.values(), again.trained.values(), strict=True):
        assert torch.equal(one, other)


def test_its_whitening(loop):
    import torch

    from cifarflow.models.speednet import whitening_kernel

    images = images_of(50).images
    net = loop.Speednet({})
    net.whiten(torch.tensor(((images / 255 - loop.nets.MEAN) / loop.nets.STD).astype(np.float32)))
    found = net.whitening.weight.detach().numpy()
    np.testing.assert_allclose(found, turned(whitening_kernel(images)), rtol=1e-3, atol=1e-4)


def test_its_rates_are_those_of_the_recipe(loop):
    recipe = get_recipe("fast94")
    net = loop.Speednet(recipe.model_options)
    rates = loop.rates_of(recipe.to_json(), list(net.trained), net.kernels)
    peak, scales = recipe.learning_rate, recipe.learning_rate_scales
    assert rates.muon == peak
    (biases, bias_l2, paths), (head, head_l2, rest) = rates.groups
    # The recipe's are of one example, as is the gradient of a sum.
    assert recipe.learning_rate_examples == 1
    assert biases == pytest.approx(peak * scales["beta"])
    assert biases == pytest.approx(peak * scales["whitening/bias"])
    assert head == pytest.approx(peak * scales["classifier/kernel"])
    # What a weight loses a step at the peak.
    for rate, l2 in ((biases, bias_l2), (head, head_l2)):
        assert rate * l2 == pytest.approx(peak * recipe.l2 * recipe.batch_size)
    assert set(paths) == set(net.trained) - set(net.kernels) - {"classifier/kernel"}
    assert rest == ("classifier/kernel",)
    kept = get_recipe("fast94", decay_biases=False).to_json()
    groups = loop.rates_of(kept, list(net.trained), net.kernels).groups
    assert [l2 for _, l2, _ in groups] == [0, head_l2]


@pytest.mark.parametrize("fractions", [(1.0, 0.0, 0.0), (0.2, 0.23, 0.07), (0.5, 1.0, 0.1)])
def test_its_schedule(loop, fractions):
    from cifarflow.optimizers.schedules import OneCycle

    names = ("start_fraction", "peak_fraction", "end_fraction")
    shape = dict(zip(names, fractions, strict=True))
    schedule = OneCycle(1.0, 13, **shape)
    found = loop.one_cycle(shape, 13)
    assert found == pytest.approx([float(schedule(step)) for step in range(13)], abs=1e-6)


# The products' rounding, times the rate of 0.1.
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_its_muon(loop, dtype, atol):
    import keras
    import torch

    from cifarflow.optimizers.muon import Muon

    rng = np.random.default_rng(0)
    # Two of one shape, one lying and one standing: [filters, channels * 9].
    shapes = [(3, 3, 4, 8), (3, 3, 4, 8), (3, 3, 2, 6), (3, 3, 2, 24)]
    draw = [[rng.normal(size=shape).astype(np.float32) for shape in shapes] for _ in range(4)]
    variables = [keras.Variable(value, name="kernel") for value in draw[0]]
    ours = Muon(0.1, muon_momentum=0.655)
    ours.build(variables)

    def tensors(values):
        layout = {"memory_format": torch.channels_last}
        return [torch.tensor(turned(value).copy()).contiguous(**layout) for value in values]

    weights = tensors(draw[0])
    velocities = [torch.zeros_like(weight) for weight in weights]
    for gradients in draw[1:]:
        ours.apply(list(map(keras.ops.convert_to_tensor, gradients)), variables)
        rate = torch.tensor(0.1)
        loop.muon_step(
            weights,
            tensors(gradients),
            velocities,
            rate,
            momentum=0.655,
            dtype=getattr(torch, dtype),
        )
    for weight, variable in zip(weights, variables, strict=True):
        np.testing.assert_allclose(weight.numpy(), turned(np.asarray(variable)), atol=atol)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", "float32"), ("mixed_bfloat16", "bfloat16"), ("mixed_float16", "bfloat16")],
)
def test_its_muon_is_as_precise_as_the_recipe(loop, monkeypatch, precision, dtype):
    found = []

    def orthogonalize(matrices, *, dtype):
        found.append(str(dtype))
        return matrices

    monkeypatch.setattr(loop, "orthogonalize", orthogonalize)
    trials = start(loop, monkeypatch, get_recipe("fast94", **{**SMALL, "precision": precision}))
    trials.run(0)
    assert set(found) == {f"torch.{dtype}"}


def test_it_trains_the_same(loop):
    import torch

    from cifarflow.training.step import make_train_step

    recipe = get_recipe("fast94", **SMALL, freeze={"whitening/bias": 0.5}, tta="none")
    dataset = dataset_of()
    pieces = assemble(recipe, dataset)
    net = loop.Speednet(recipe.model_options)
    copy_to_torch(net, pieces.model)
    optimizer = loop.Optimizer(net, recipe.to_json(), total_steps=10)
    step_fn = make_train_step(
        pieces.model, pieces.optimizer, loss_fn=pieces.loss_fn, freeze=pieces.freeze
    )
    images, labels = dataset.train
    scaled = torch.tensor(((images / 255 - loop.nets.MEAN) / loop.nets.STD).astype(np.float32))
    for step in range(4):
        some = slice(16 * step, 16 * step + 16)
        sums = step_fn(images[some], labels[some])
        logits = net(scaled[some].permute(0, 3, 1, 2), step < 2)
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[some]).long(), label_smoothing=0.09, reduction="sum"
        )
        assert loss.item() == pytest.approx(float(sums.loss), rel=1e-3)
        loss.backward()
        optimizer.step(step)
    for tensor, variable in values_by_path(net, pieces.model):
        # PyTorch's running variances are those of the population: of few pixels they are larger.
        if "variance" not in variable.path:
            wanted = turned(np.asarray(variable))
            np.testing.assert_allclose(
                tensor.detach().numpy(), wanted, atol=2e-3, err_msg=variable.path
            )


# Augmentation and evaluation


def test_views_reflect_at_the_edge(loop):
    import torch

    images = np.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3)
    around = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    down, right = [-2, 1], [2, -1]
    rows = torch.arange(5)[None, :] + torch.tensor(down)[:, None]
    columns = torch.arange(6)[None, :] + torch.tensor(right)[:, None]
    found = loop.take(torch.tensor(images), torch.tensor([1, 0]), rows, columns)
    for view, example, d, r in zip(found.numpy(), (1, 0), down, right, strict=True):
        np.testing.assert_array_equal(view, around[example, 2 + d : 7 + d, 2 + r : 8 + r])


def test_flips_by_turns(loop):
    import torch

    images = torch.rand(40, 4, 4, 3)
    augment, generator = loop.Augment({"altflip": 1}), torch.Generator().manual_seed(0)
    mirrored = augment.start(40, generator)
    assert 5 < mirrored.sum() < 35
    order = torch.randperm(40, generator=generator)
    for epoch in range(3):
        options = {"mirrored": mirrored, "epoch": epoch, "generator": generator}
        found = augment(images, order, **options)
        for view, example in zip(found, order, strict=True):
            is_mirrored = bool(mirrored[example]) != bool(epoch % 2)
            wanted = images[example].flip(1) if is_mirrored else images[example]
            assert torch.equal(view, wanted)


def test_crops_and_light(loop):
    import torch

    images = torch.randn(200, 8, 8, 3)
    std, mean = torch.tensor(loop.nets.STD), torch.tensor(loop.nets.MEAN)
    parts = {"flip": 1, "crop": 2, "brightness": 0.14, "contrast": 0.13}
    generator = torch.Generator().manual_seed(0)

    def views(*names):
        augment = loop.Augment({name: parts[name] for name in names})
        options = {"mirrored": None, "epoch": 0, "generator": generator}
        return augment(images.clone(), torch.arange(200), **options)

    assert torch.equal(views(), images)

    def raw(images):
        """Pixels on the 0..1 scale, [N, H * W * C]."""
        return (mean + std * images).flatten(1)

    added = 4 * (raw(views("brightness")) - raw(images))
    assert added.std(1).max() < 2e-6
    assert 0.12 < added.abs().max() <= 0.1401
    assert abs(added.mean()) < 0.03
    stretched = raw(views("contrast"))
    torch.testing.assert_close(stretched.mean(1), raw(images).mean(1))
    factors = stretched.std(1) / raw(images).std(1)
    assert 0.87 <= factors.min() < 0.89
    assert 1.11 < factors.max() <= 1.1301
    both = raw(views("brightness", "contrast"))
    assert 0.1 < 4 * (both.mean(1) - raw(images).mean(1)).abs().max() <= 0.1401
    # Each window of each image, mirrored or not.
    around = np.pad(images.numpy(), [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    windows = {
        (row, column, flip): around[:, row : row + 8, column : column + 8][:, :, :: 1 - 2 * flip]
        for row in range(5)
        for column in range(5)
        for flip in range(2)
    }
    cropped, seen = views("flip", "crop").numpy(), set()
    for index, view in enumerate(cropped):
        (found,) = [key for key, all_of in windows.items() if np.array_equal(all_of[index], view)]
        seen.add(found)
    assert len(seen) > 40


@pytest.mark.parametrize("names", [["brightness"], ["contrast"], ["brightness", "contrast"]])
def test_its_light_is_ours(loop, names):
    import tensorflow as tf
    import torch

    from cifarflow.data import augment

    rng = np.random.default_rng(0)
    # Each channel of each image about a level of its own.
    levels = rng.integers(20, 200, (30, 1, 1, 3))
    images = (levels + rng.integers(0, 50, (30, 8, 8, 3))).astype(np.uint8)
    seed = tf.constant([3, 7], tf.int64)
    ours = augment.Augment(dict.fromkeys(names, 0.5))(tf.constant(images), seed).numpy()
    # What was drawn: of images of one level the level moves by the brightness alone, and of all
    # others the deviation by the contrast.
    drawn = {}
    if "brightness" in names:
        grey = tf.fill((30, 8, 8, 3), np.uint8(100))
        moved = augment.Augment({"brightness": 0.5})(grey, seed).numpy()[:, 0, 0, 0]
        drawn["brightness"] = torch.tensor((moved - 100) / 63.75)
    if "contrast" in names:
        deviations = ours.std((1, 2, 3)) / images.std((1, 2, 3))
        drawn["contrast"] = torch.tensor(deviations - 1).float()
    assert all(0.3 < each.abs().max() <= 0.5001 for each in drawn.values())

    def normalised(pixels):
        values = (pixels / 255 - loop.nets.MEAN) / loop.nets.STD
        return torch.tensor(values.astype(np.float32))

    found = loop.relight(normalised(images), **drawn)
    torch.testing.assert_close(found, normalised(ours), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("tta", "share"), [("none", 1), ("mirror", 0.3), ("multicrop", 0.25)])
def test_it_evaluates_the_same(loop, monkeypatch, tta, share):
    import torch

    from cifarflow.evaluation.predict import predict

    monkeypatch.setitem(loop._EVALUATED_AT_ONCE, "cpu", 17)
    recipe = get_recipe("fast94", **SMALL, tta=tta, tta_share=share)
    trials, dataset = start(loop, monkeypatch, recipe), dataset_of()
    trials.run(0)
    ours = build_model(recipe, image_shape=(32, 32, 3), num_classes=10)
    for tensor, variable in values_by_path(trials._net, ours):
        value = tensor.detach().numpy()
        variable.assign(value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T)
    wanted = predict(ours, dataset.test.images, tta=tta, tta_share=share)
    found = trials._evaluate(torch.tensor(dataset.test.images))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-3, rtol=1e-3)


# Runs


def test_a_run_is_of_its_seed(loop, monkeypatch):
    trials = start(loop, monkeypatch, get_recipe("fast94", **{**SMALL, "epochs": 8}))
    assert trials.facts["steps"] == 32
    first, other, again = (trials.run(seed) for seed in (3, 4, 3))
    figures = ("accuracy", "loss", "weights_sha256")
    assert [first[name] for name in figures] == [again[name] for name in figures]
    assert first["weights_sha256"] != other["weights_sha256"]
    assert 0 < first["train_seconds"] < first["seconds"]
    # There is something to learn.
    assert first["loss"] < 2.27


def test_the_seconds_of_compilation_are_those_of_the_warm_up(loop, monkeypatch):
    trials = start(loop, monkeypatch, get_recipe("fast94", **SMALL))
    assert trials.facts["compile_seconds"] > 0
    seconds = trials.round(1)
    assert trials.facts["compile_seconds"] == seconds


def test_it_reads_the_images_once_in_the_end(loop, monkeypatch):
    recipe, dataset = get_recipe("fast94", **SMALL), dataset_of()
    black = Split(np.zeros_like(dataset.test.images), dataset.test.labels)
    hashes, events = set(), []
    for test in (dataset.test, black):
        trials = start(loop, monkeypatch, recipe, dataclasses.replace(dataset, test=test))
        evaluate, train_step = trials._evaluate, trials._train_step

        def noted(images, trials=trials, evaluate=evaluate):
            assert images is trials._read
            events.append("read")
            return evaluate(images)

        def stepped(*args, train_step=train_step, **kwargs):
            events.append("step")
            train_step(*args, **kwargs)

        monkeypatch.setattr(trials, "_evaluate", noted)
        monkeypatch.setattr(trials, "_train_step", stepped)
        hashes.add(trials.run(0)["weights_sha256"])
    assert events == 2 * [*10 * ["step"], "read"]
    # Whatever they are, the weights are the same.
    assert len(hashes) == 1


def test_it_may_read_the_validation_images(loop, monkeypatch):
    recipe, dataset = get_recipe("fast94", **SMALL), dataset_of()
    trials = start(loop, monkeypatch, recipe, dataset, read="validation")
    assert trials.facts["read_images"] == len(dataset.validation)
    assert np.array_equal(trials._read.numpy(), dataset.validation.images)
    none = dataclasses.replace(dataset, validation=images_of(0))
    with pytest.raises(DataError, match="must have validation images, not 0"):
        start(loop, monkeypatch, recipe, none, read="validation")


def test_a_batch_larger_than_the_set(loop, monkeypatch):
    recipe = get_recipe("fast94", **{**SMALL, "batch_size": 65})
    with pytest.raises(ConfigError, match="at most the 64 training examples, not 65"):
        start(loop, monkeypatch, recipe)


def test_weights_that_became_infinite(loop, monkeypatch):
    recipe = get_recipe("fast94", **SMALL)
    trials = start(loop, monkeypatch, recipe)
    monkeypatch.setattr(trials._optimizer, "_peaks", [float("nan")] * 2)
    with pytest.raises(NonFiniteError, match="PyTorch's seed 5 are not finite after the last"):
        trials.run(5)


@pytest.mark.parametrize("freeze", [{}, {"whitening/bias": 0.0}, {"whitening/bias": 1.0}])
def test_the_bias_of_the_whitening_freezes(loop, monkeypatch, freeze):
    trials = start(loop, monkeypatch, get_recipe("fast94", **SMALL, freeze=freeze))
    bias, train_step, values = trials._net.whitening.bias, trials._train_step, []

    def stepped(*args, **kwargs):
        before = bias.detach().clone()
        train_step(*args, **kwargs)
        values.append(not bool((bias == before).all()))

    monkeypatch.setattr(trials, "_train_step", stepped)
    trials.run(0)
    count = round(4 * freeze.get("whitening/bias", 2.5))
    assert values == [True] * count + [False] * (10 - count)


# As a person starts it


@needs_torch
def test_against_torch(finish):
    folder, done = finish("torch")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {"torch.json", "torch.png"}
    assert (folder / "torch.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "torch.json").read_text())
    result = record["result"]
    assert result["complete"]
    assert f"\n{TIMING_RULE}\n" in done.stdout
    ours, theirs = result["recipes"]
    assert (ours["name"], theirs["name"]) == ("fast75", "fast75 by PyTorch")
    assert ours.keys() | {"torch"} == theirs.keys()
    assert theirs["torch"]["compile"] == "none"
    line = f"\n{theirs['name']}: compiled in {theirs['compile_seconds']:.1f} s; torch "
    assert line in f"\n{done.stderr}"
    for row in (ours, theirs):
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert {run["steps"] for run in row["runs"]} == {row["steps"]} == {ours["steps"]}
        assert {run["read"] for run in row["runs"]} == {"validation"}
        assert (row["bar"], row["share_that_reach_it"]) == (0.01, 1)
        for run in row["runs"]:
            assert 0 < run["train_seconds"] < run["seconds"]
            line = f"{row['name']}, seed {run['seed']}: validation accuracy {run['accuracy']:.4f}"
            assert f"\n{line} in " in done.stdout
            assert run["weights_sha256"][:8] in done.stdout
    assert [verdict["measure"] for verdict in result["verdicts"]] == ["seconds", "accuracy"]
    for verdict in result["verdicts"]:
        assert "of fast75 by PyTorch" in verdict["sentence"]
        assert verdict["sentence"] in done.stdout


@needs_torch
@pytest.mark.usefixtures("specs")
def test_other_images_than_ours_are_found_out():
    plan = time_to_accuracy.make_plan(
        recipe='fast75:model_options={"widths":[8]},precision=float32,data=standin',
        compare="torch",
        settings=harness.Settings(quick=True, device="cpu"),
    )
    with pytest.raises(RuntimeError, match="does other steps, or of other images"):
        time_to_accuracy.measure(plan, harness.Settings(device="cpu"), [dataset_of(800)])
