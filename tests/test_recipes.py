"""Recipes: their fields, and a run from one end to the other."""

import csv
import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.splits import Dataset, Split
from cifarflow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DataNotFoundError,
    NonFiniteError,
    WorkdirError,
)
from cifarflow.evaluation.predict import softmax
from cifarflow.evaluation.scores import score_outputs
from cifarflow.recipes import build
from cifarflow.recipes import run as run_module
from cifarflow.recipes.build import (
    build_model,
    build_optimizer,
    build_schedule,
    load_recipe_data,
    resolve,
)
from cifarflow.recipes.named import RECIPES, get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.redraw import batch_at
from cifarflow.recipes.run import train_recipe
from cifarflow.training.checkpoints import hash_arrays
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted
from cifarflow.training.tensorboard import TensorBoard, confusion_pictures, image_grid
from cifarflow.training.workdir import Workdir

BASE = {**tiny.MLP, "epochs": 1.0, "batch_size": 8}
# A tenth of the stand-in set's training images keeps a run short.
LIMIT = {**BASE, "data": "standin", "limit_examples": 160, "batch_size": 32}


@pytest.fixture(scope="module")
def standin_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("standin")


@pytest.fixture
def standin(standin_folder, monkeypatch):
    """The stand-in set is drawn once for this file, not once a test."""
    monkeypatch.setenv("CIFARFLOW_CACHE", str(standin_folder))


def run_tiny(**kwargs):
    return train_recipe("lab_mlp", **{"dataset": tiny.dataset(), **BASE, **kwargs})


@pytest.fixture(scope="module")
def plain_run():
    return run_tiny()


NAN, INF = math.nan, math.inf
BAD = {
    "name": [None, "", "  ", 3],
    "model": ["vgg", None, 3, ""],
    "model_options": ["units=8", [1], 3, {3: 4}, {"seed": 1}, {"activation": abs}, {"l2": NAN}],
    "data": [3, None, ""],
    "image_size": [0, -1, 1025, 1.5, NAN, "32", None, True],
    "validation_fraction": [-0.1, 1.0, 2, NAN, INF, "0.2", None, True],
    "validation_split": ["first", None],
    "limit_examples": [-1, 1.5, NAN, "10", None, True],
    "batch_size": [0, -1, 1.5, NAN, INF, "32", None, True],
    "accumulate_steps": [0, -1, 1.5, NAN, "2", None, True],
    "eval_batch_size": [0, -1, 1.5, NAN, "32", None, True],
    "epochs": [0, -1, NAN, INF, "5", None, True],
    "patience_epochs": [-1, 1.5, NAN, "3", None, True],
    "learning_rate": [0, -0.1, NAN, INF, "0.1", None, True],
    "momentum": [-0.1, 1.0, 1.5, NAN, "0.9", None, True],
    "nesterov": ["yes", 1, None],
    "schedule": ["linear", None, 0],
    "decay": [-1e-6, NAN, INF, "0", None, True],
    "warmup_epochs": [-1, NAN, INF, "1", None, 6.0],
    "drop_epochs": [3, "1,2", None, (0,), (-1.0,), (NAN,), ("1",), (2.0, 1.0), (1.0, 1.0)],
    "drop_factor": [0, -1, NAN, INF, "0.1", None],
    "l2": [-1, NAN, INF, "0", None],
    "weight_decay": [-1, NAN, INF, "0", None],
    "clip_norm": [-1, NAN, INF, "0", None],
    "label_smoothing": [-0.1, 1.0, NAN, "0", None],
    "augment": [
        *("spin", "flip,flip", "crop:0", "crop:-1", "crop:x", "flip:2", None, 3),
        *("randaugment:31", "randaugment:11x9", "hue:0.51", "saturation:1.1", "erase:1.01"),
        *("mixup:11", "mixup:x", "cutmix:-1"),
    ],
    "precision": ["float64", "bfloat16", None],
    "learning_rate_examples": [-1, 1.5, NAN, "1", None, True],
    "learning_rate_scales": [3, "beta=2", ["beta"], {"beta": -1}, {"beta": "x"}],
    "optimizer": ["adam", "", None, 1],
    "muon_momentum": [-0.1, 1.0, NAN, "0.6", None],
    "scaled_velocity": [0, "yes", None],
    "start_fraction": [-0.1, 1.1, NAN, "0", None],
    "peak_fraction": [-0.1, 1.1, NAN, "0", None],
    "end_fraction": [-0.1, 1.1, NAN, "0", None],
    "freeze": [3, "bias=2", ["bias"], {"bias": -1}, {"bias": "x"}, {"bias": NAN}],
    "decay_biases": [1, "no", None],
    "averaging": ["swa", "", None, True],
    "tta": ["flip", "", None, True],
    "tta_share": [0, -0.5, 1.1, NAN, "1", None],
    "jit_compile": [True, False, "yes", None],
    "seed": [-1, 2**31, 1.5, NAN, "0", None, True],
}


def test_every_field_has_bad_values():
    assert set(BAD) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_values(name, value):
    values = {"name": "mine", name: value}
    if name == "drop_epochs":
        values["schedule"] = "piecewise"
    with pytest.raises(ConfigError) as caught:
        Recipe(**values)
    text = str(caught.value)
    assert "\n" not in text
    quoted = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    if name == "augment" and isinstance(value, str) and ":" in value and "flip" not in value:
        quoted = value.split(":")[1]
    assert repr(quoted) in text
    assert name in text or (name == "augment" and "crop" in text)


@pytest.mark.parametrize(
    ("values", "quoted"),
    [
        ({"momentum": 0.0}, "nesterov must be False, or True with momentum > 0, not True"),
        ({"schedule": "piecewise"}, r"drop_epochs must be given .* not \(\) with schedule=piece"),
        ({"drop_epochs": (1.0,)}, r"drop_epochs must be given .* not \(1.0,\) with schedule=inv"),
        ({"accumulate_steps": 5}, "accumulate_steps must divide the batch size of 32, not 5"),
        ({"epochs": 1.0, "warmup_epochs": 1.5}, r"warmup_epochs must be at most epochs \(1\)"),
    ],
)
def test_fields_that_do_not_fit_together(values, quoted):
    with pytest.raises(ConfigError, match=quoted):
        Recipe("mine", **values)


def test_unknown_names():
    with pytest.raises(ConfigError, match=r"recipe must be one of lab_mlp, .*, not 'lab_vgg'"):
        get_recipe("lab_vgg")
    with pytest.raises(ConfigError, match=r"field must be one of .*, not 'learningrate'"):
        get_recipe("lab_cnn", learningrate=0.1)
    with pytest.raises(ConfigError, match="epochs must be"):
        get_recipe("lab_cnn", epochs=0)


def test_a_recipe_is_changed_in_a_copy():
    changed = get_recipe(RECIPES["lab_cnn"], epochs=2, augment="flip")
    assert (changed.epochs, changed.augment, changed.model) == (2.0, "flip", "cnn")
    assert RECIPES["lab_cnn"].epochs == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.epochs = 3


def through_json(recipe):
    return Recipe(**json.loads(json.dumps(recipe.to_json(), allow_nan=False)))


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_go_through_json(name):
    assert RECIPES[name].name == name
    assert through_json(RECIPES[name]) == RECIPES[name]


@settings(deadline=None, max_examples=25)
@given(
    batch_size=st.integers(1, 4096).map(np.int64),
    epochs=st.floats(1e-3, 1e4).map(np.float64) | st.integers(1, 100),
    learning_rate=st.floats(2**-20, 10, width=32).map(np.float32),
    drops=st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=4, unique=True).map(sorted),
    options=st.none() | st.dictionaries(st.text(min_size=1).map("x".__add__), st.integers()),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_recipe_goes_through_json(batch_size, epochs, learning_rate, drops, options, seed):
    recipe = Recipe(
        "mine",
        batch_size=batch_size,
        epochs=epochs,
        learning_rate=learning_rate,
        schedule="piecewise",
        drop_epochs=drops,
        model_options=options,
        seed=seed,
    )
    assert through_json(recipe) == recipe


def test_the_labs_settings():
    table = {
        "lab_mlp": (1_707_274, 0.01, 15),
        "lab_cnn": (714_202, 0.01, 5),
        "lab_dropout": (714_202, 0.01, 10),
        "lab_batchnorm": (715_930, 0.01, 15),
        "lab_final": (1_856_650, 0.04, 25),
    }
    assert [name for name in RECIPES if name.startswith("lab_")] == list(table)
    for name, (parameters, learning_rate, epochs) in table.items():
        recipe = RECIPES[name]
        assert (recipe.learning_rate, recipe.epochs) == (learning_rate, epochs)
        model = build_model(recipe, image_shape=(32, 32, 3), num_classes=10)
        assert model.count_params() == parameters
        rates = [layer.rate for layer in model.layers if type(layer).__name__ == "Dropout"]
        momenta = {
            layer.momentum for layer in model.layers if type(layer).__name__ == "BatchNormalization"
        }
        assert rates == {
            "lab_dropout": [0.25, 0.25, 0.5],
            "lab_batchnorm": [0.25, 0.25, 0.5],
            "lab_final": [0.25, 0.3, 0.5],
        }.get(name, [])
        assert momenta == {"lab_batchnorm": {0.75}, "lab_final": {0.8}}.get(name, set())
        frozen = sum(int(np.prod(v.shape)) for v in model.non_trainable_weights)
        assert frozen == {"lab_batchnorm": 864, "lab_final": 1408}.get(name, 0)
        assert recipe.batch_size == 32
        assert (recipe.momentum, recipe.nesterov) == (0.9, True)
        assert (recipe.schedule, recipe.decay) == ("inverse_time", 1e-6)
        assert (recipe.validation_fraction, recipe.validation_split) == (0.2, "last")
        assert (recipe.l2, recipe.weight_decay, recipe.label_smoothing) == (0, 0, 0)
        assert recipe.augment == "none"
    mlp = build_model(RECIPES["lab_mlp"], image_shape=(32, 32, 3), num_classes=10)
    names = [layer.activation.__name__ for layer in mlp.layers if hasattr(layer, "activation")]
    assert [name for name in names if name != "linear"] == ["tanh", "tanh"]


@pytest.mark.parametrize(
    ("options", "quoted"),
    [
        (
            {"unit": [8]},
            "must be one of activation, dropout, l2, units, not 'unit'",
        ),
        ({"units": [0]}, "units must be"),
        ({"units": "many"}, "units must be"),
        ({"units": 8.5}, "units must be"),
        ({"dropout": "x"}, "dropout"),
        ({"dropout": [0.1, 0.2, 0.3]}, "dropout"),
        ({"activation": "nope"}, "activation must be .*'nope'"),
        ({"activation": 3}, "activation must be .*3"),
        ({"l2": -1}, "l2 must be .*-1"),
    ],
)
def test_model_options_that_the_builder_refuses(tmp_path, options, quoted):
    with pytest.raises(ConfigError, match=quoted) as caught:
        run_tiny(model_options=options, workdir=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "constant"}, [0.1, 0.1, 0.1]),
        ({"schedule": "inverse_time", "decay": 0.1}, [0.1, 0.05, 0.1 / 3]),
        ({"schedule": "cosine"}, [0.1, 0.05, 0.0]),
        (
            {"schedule": "piecewise", "drop_epochs": [0.5, 1.5], "drop_factor": 0.5},
            [0.1, 0.05, 0.025],
        ),
        ({"schedule": "constant", "warmup_epochs": 2}, [0.0, 0.05, 0.1]),
    ],
)
def test_schedules(changes, expected):
    recipe = get_recipe("lab_cnn", epochs=2, learning_rate=0.1, **changes)
    schedule = build_schedule(recipe, steps_per_epoch=10)
    rates = [float(schedule(step)) for step in (0, 10, 20)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_one_cycle():
    recipe = get_recipe("lab_cnn", epochs=2, learning_rate=0.1, schedule="one_cycle")
    rates = [float(build_schedule(recipe, steps_per_epoch=10)(step)) for step in range(21)]
    assert max(rates) == pytest.approx(0.1)
    assert rates[0] < 0.05
    assert rates[-1] < 0.01
    assert 0 < np.argmax(rates) < 15


def test_the_optimizer_has_the_recipes_numbers():
    recipe = get_recipe(
        "lab_cnn", momentum=0.8, nesterov=False, l2=0.1, weight_decay=0.2, clip_norm=3.0
    )
    optimizer = build_optimizer(recipe, steps_per_epoch=10)
    assert (optimizer.momentum, optimizer.nesterov, optimizer.l2) == (0.8, False, 0.1)
    assert (optimizer.weight_decay, optimizer.global_clipnorm) == (0.2, 3.0)
    plain = build_optimizer(get_recipe("lab_cnn", precision="float32"), steps_per_epoch=10)
    assert not plain.weight_decay
    assert plain.global_clipnorm is None
    scaled = build_optimizer(get_recipe("lab_cnn", precision="mixed_float16"), steps_per_epoch=10)
    assert type(scaled).__name__ == "LossScaleOptimizer"


SMALL_SPEEDNET = {"model": "speednet", "model_options": {"widths": [4]}}
SMALL_CNN = {
    "model": "cnn",
    "model_options": {"filters": [4], "kernel_size": 3, "dense_units": 4},
}
CHANGES = [
    SMALL_CNN,
    {"model": "resnet", "model_options": {"depth": 4, "widths": [4]}},
    SMALL_SPEEDNET,
    {"model_options": {"units": [8], "dropout": 0.5, "l2": 0.1, "activation": "relu"}},
    {"limit_examples": 32},
    {"batch_size": 16},
    {"epochs": 2},
    # Stopped after the second.
    {"epochs": 4, "schedule": "constant", "learning_rate": 100.0, "patience_epochs": 1},
    {"accumulate_steps": 2, **SMALL_SPEEDNET},
    {"learning_rate": 0.02},
    {"learning_rate_examples": 3},
    {"learning_rate_scales": {"bias": 3}},
    {"optimizer": "muon", **SMALL_CNN},
    {"optimizer": "muon", "muon_momentum": 0.9, **SMALL_CNN},
    {"momentum": 0.5},
    {"nesterov": False},
    {"schedule": "cosine", "scaled_velocity": False},
    {"schedule": "one_cycle"},
    {"schedule": "one_cycle", "start_fraction": 0.5},
    {"schedule": "one_cycle", "peak_fraction": 0.6},
    {"schedule": "one_cycle", "end_fraction": 0.9},
    {"freeze": {"bias": 0.5}},
    {"l2": 0.1, "decay_biases": True},
    {"averaging": "lookahead"},
    {"averaging": "ema"},
    {"augment": "altflip"},
    {"augment": "brightness:0.3,contrast:0.2"},
    {"schedule": "constant"},
    {"schedule": "cosine"},
    {"schedule": "piecewise", "drop_epochs": [0.25]},
    {"schedule": "piecewise", "drop_epochs": [0.25], "drop_factor": 0.5},
    {"decay": 0.5},
    {"warmup_epochs": 0.5},
    {"l2": 0.1},
    {"weight_decay": 0.1},
    {"clip_norm": 0.01},
    {"label_smoothing": 0.2},
    {"augment": "flip,crop:2,cutout:3"},
    {"precision": "mixed_bfloat16"},
    {"precision": "mixed_float16"},
    {"seed": 1},
]


def test_every_option_changes_the_run(plain_run):
    hashes = {plain_run.summary["weights_sha256"]: "nothing"}
    for change in CHANGES:
        run = run_tiny(**change)
        assert np.isfinite(run.summary["test_loss"])
        assert run.summary["step_traces"] == 1
        digest = run.summary["weights_sha256"]
        assert digest not in hashes, f"{change} gives what {hashes[digest]} gives"
        hashes[digest] = change


def test_every_field_is_changed():
    elsewhere = {"name", "data", "validation_fraction", "validation_split", "eval_batch_size"}
    elsewhere |= {"tta", "tta_share", "jit_compile", "image_size"}
    changed = {field for change in CHANGES for field in change}
    assert changed | elsewhere == {field.name for field in dataclasses.fields(Recipe)}


def test_test_time_augmentation_changes_the_test_alone(plain_run):
    losses = {plain_run.summary["test_loss"]}
    for change in ({"tta": "mirror"}, {"tta": "multicrop"}, {"tta": "multicrop", "tta_share": 0.5}):
        run = run_tiny(**change)
        assert run.summary["weights_sha256"] == plain_run.summary["weights_sha256"]
        losses.add(run.summary["test_loss"])
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "muon"),
        ({"learning_rate_scales": {"gama": 2.0}}, "gama"),
    ],
)
def test_an_optimizer_that_does_not_fit_leaves_no_folder(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_tiny(workdir=tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_options_that_change_time_only(plain_run):
    run = run_tiny(eval_batch_size=7)
    assert run.summary["weights_sha256"] == plain_run.summary["weights_sha256"]
    assert run.summary["test_loss"] == pytest.approx(plain_run.summary["test_loss"], rel=1e-5)
    compiled = run_tiny(jit_compile="true")
    assert compiled.summary["jit_compile"] is True
    assert compiled.summary["step_traces"] == 1
    assert compiled.summary["test_loss"] == pytest.approx(plain_run.summary["test_loss"], rel=1e-4)


def test_resolve(monkeypatch):
    recipe = get_recipe("lab_cnn")
    assert (recipe.data, recipe.precision, recipe.jit_compile) == ("auto",) * 3
    for gpu in (False, True):
        monkeypatch.setattr(build, "has_gpu", lambda gpu=gpu: gpu)
        resolved = resolve(recipe, tiny.dataset(name="standin"))
        assert resolved.data == "standin"
        assert resolved.precision in ("float32", "mixed_bfloat16")
        assert resolved.jit_compile == ("true" if gpu else "false")
    # Data of one's own keeps its own name: a run of it must not go on with other data.
    assert resolve(recipe, tiny.dataset()).data == "tiny"
    fixed = get_recipe("lab_cnn", precision="float32", jit_compile="false", data="standin")
    assert resolve(fixed, tiny.dataset(name="standin")) == fixed


def test_unknown_data():
    with pytest.raises(ConfigError, match=r"data must be one of auto, .*, not 'mnist'"):
        train_recipe("lab_mlp", data="mnist")


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    options = {"workdir": tmp_path, "epochs": 1, "batch_size": 16, **tiny.MLP}
    train_recipe("lab_mlp", dataset=tiny.dataset(name="mine"), **options)
    with pytest.raises(WorkdirError, match="holds a run with data='mine', not 'other'"):
        train_recipe("lab_mlp", dataset=tiny.dataset(name="other"), resume=True, **options)


def test_model_options_are_laid_over_the_recipes_own():
    recipe = get_recipe("lab_dropout", model_options={"activation": "gelu"})
    assert recipe.model_options == {"dropout": (0.25, 0.25, 0.5), "activation": "gelu"}
    assert get_recipe(recipe, model_options={"dropout": 0.0}).model_options["dropout"] == 0.0
    other = get_recipe("lab_dropout", model="mlp", model_options={"units": [8]})
    assert other.model_options == {"units": (8,)}


def test_a_finished_run_has_its_test_outputs_without_reading_again(tmp_path, monkeypatch):
    options = {"workdir": tmp_path, "epochs": 1, "batch_size": 16, **tiny.MLP}
    first = train_recipe("lab_mlp", dataset=tiny.dataset(), **options)
    monkeypatch.setattr(run_module, "predict", None)
    second = train_recipe("lab_mlp", dataset=tiny.dataset(), resume=True, **options)
    np.testing.assert_array_equal(second.test_outputs, first.test_outputs)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="is no summary of a run, it lacks"):
        train_recipe("lab_mlp", dataset=tiny.dataset(), resume=True, **options)


def test_a_model_too_large_for_memory():
    with pytest.raises(ConfigError, match="do not fit mlp"):
        train_recipe("lab_mlp", dataset=tiny.dataset(), model_options={"units": [10**12]})


def test_progress_of_another_kind():
    with pytest.raises(ConfigError, match="progress must be Progress or None, not True"):
        train_recipe("lab_mlp", dataset=tiny.dataset(), progress=True)


def test_loading_the_data(standin, capfd):
    dataset = load_recipe_data(get_recipe("lab_cnn", data="standin"))
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [
        8000,
        2000,
        2000,
    ]
    assert "STAND-IN DATA" in capfd.readouterr().err
    small = load_recipe_data(
        get_recipe(
            "lab_cnn",
            data="standin",
            validation_fraction=0.5,
            validation_split="stratified",
            limit_examples=100,
        )
    )
    assert [len(s) for s in (small.train, small.validation, small.test)] == [100, 100, 40]
    assert not np.array_equal(small.train.images, dataset.train.images[:100])
    none = load_recipe_data(get_recipe("lab_cnn", data="standin", validation_fraction=0))
    assert [len(none.train), len(none.validation)] == [10_000, 0]
    with pytest.raises(ConfigError, match=r"limit_examples must be at most the 8000 .* not 8001"):
        load_recipe_data(get_recipe("lab_cnn", data="standin", limit_examples=8001))


def test_cifar10_that_is_not_there(tmp_path):
    with pytest.raises(DataNotFoundError):
        train_recipe("lab_cnn", data="cifar10", data_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()


SUMMARY_KEYS = {
    "recipe",
    "dataset",
    "parameters",
    "epochs",
    "steps",
    "seed",
    "precision",
    "jit_compile",
    "device",
    "train_seconds",
    "images_per_second",
    "test_loss",
    "test_accuracy",
    "weights_sha256",
    "versions",
}


@pytest.fixture(scope="module")
def standin_run(standin_folder, tmp_path_factory):
    """A run on the stand-in set with everything switched on, and what its progress was told."""
    lines = []

    class Lines:
        def __init__(self, total_steps, *, steps_per_epoch, first_step, description):
            lines.append((total_steps, steps_per_epoch, first_step, description))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, step, **_):
            pass

        def line(self, text):
            lines.append(text)

    workdir = tmp_path_factory.mktemp("runs") / "standin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFARFLOW_CACHE", str(standin_folder))
        run = train_recipe(
            "lab_mlp", workdir=workdir, progress=Lines, tensorboard=True, **{**LIMIT, "epochs": 2}
        )
    return run, lines


def test_the_files_of_a_run(standin_run):
    run, _ = standin_run
    names = {path.name for path in run.workdir.iterdir()}
    assert names == {
        "recipe.json",
        "metrics.jsonl",
        "metrics.csv",
        "test_outputs.npy",
        "test_labels.npy",
        "mistakes.npz",
        "summary.json",
        "checkpoints",
        "tensorboard",
    }
    recipe = json.loads((run.workdir / "recipe.json").read_text())
    assert Recipe(**recipe).epochs == 2
    assert recipe["data"] == "standin"
    assert recipe["jit_compile"] in ("true", "false")
    assert sorted(p.name for p in (run.workdir / "checkpoints").iterdir()) == [
        "best.npz",
        "step_00000005.npz",
        "step_00000010.npz",
    ]


def test_the_summary(standin_run):
    run, _ = standin_run
    summary = json.loads((run.workdir / "summary.json").read_text())
    assert summary == run.summary
    assert set(summary) >= SUMMARY_KEYS
    assert summary["recipe"] == "lab_mlp"
    assert summary["dataset"] == "standin"
    assert (summary["epochs"], summary["steps"], summary["seed"]) == (2, 10, 0)
    assert summary["parameters"] == run.model.count_params()
    assert (summary["precision"], summary["jit_compile"]) == ("float32", False)
    assert summary["weights_sha256"] == hash_arrays(run.model.variables)
    assert set(summary["versions"]) >= {"python", "tensorflow", "keras", "numpy"}
    assert summary["images_per_second"] > 0
    assert summary["train_seconds"] < summary["total_seconds"]
    assert summary["examples"] == {"train": 160, "validation": 40, "test": 40}
    matrix = np.array(summary["confusion_matrix"])
    assert matrix.sum() == 40
    assert summary["test_accuracy"] == pytest.approx(np.trace(matrix) / 40)
    assert len(summary["per_class_accuracy"]) == 10


def test_the_scores(standin_run, standin):
    run, _ = standin_run
    labels = load_recipe_data(get_recipe("lab_mlp", **LIMIT)).test.labels
    scores = run.summary["scores"]
    assert scores == score_outputs(labels, run.test_outputs)
    order = np.argsort(-run.test_outputs, axis=1, kind="stable")
    for k in (2, 3, 5):
        hits = (order[:, :k] == labels[:, None]).any(1).mean()
        assert scores[f"top_{k}_accuracy"] == pytest.approx(hits, abs=1e-6)
    bins = scores["calibration_bins"]
    assert len(bins) == 15
    assert sum(count for _, _, count in bins) == 40
    error = sum(count * abs(right - sure) for sure, right, count in bins if count) / 40
    assert scores["expected_calibration_error"] == pytest.approx(error, abs=1e-5)
    matrix = np.array(run.summary["confusion_matrix"])
    for name, totals in (("precision", matrix.sum(0)), ("recall", matrix.sum(1))):
        for found, hits, total in zip(scores[name], np.diag(matrix), totals, strict=True):
            assert found == (pytest.approx(hits / total, abs=1e-6) if total else None)


def test_what_is_kept_of_the_test(standin_run, standin):
    run, _ = standin_run
    images, labels = load_recipe_data(get_recipe("lab_mlp", **LIMIT)).test
    folder = Workdir(run.workdir)
    kept = np.load(run.workdir / "test_labels.npy")
    assert kept.dtype == np.int32
    np.testing.assert_array_equal(kept, labels)
    np.testing.assert_array_equal(folder.read_test_labels(), labels)
    worst = folder.read_mistakes()
    wrong = np.flatnonzero(run.test_outputs.argmax(1) != labels)
    assert len(worst["indices"]) == min(24, len(wrong)) > 0
    assert set(worst["indices"]) <= set(wrong)
    np.testing.assert_array_equal(worst["images"], images[worst["indices"]])
    np.testing.assert_array_equal(worst["labels"], labels[worst["indices"]])
    np.testing.assert_array_equal(worst["predicted"], worst["probabilities"].argmax(1))
    np.testing.assert_array_equal(
        worst["probabilities"], softmax(run.test_outputs[worst["indices"]])
    )
    confidence = worst["probabilities"].max(1)
    assert (np.diff(confidence) <= 0).all()
    rest = np.setdiff1d(wrong, worst["indices"])
    assert softmax(run.test_outputs[rest]).max(1).max(initial=0) <= confidence[-1]


def test_a_summary_from_before_the_scores_is_read(tmp_path):
    run = run_tiny(workdir=tmp_path)
    summary = {key: value for key, value in run.summary.items() if key != "scores"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for name in ("test_labels.npy", "mistakes.npz"):
        (tmp_path / name).unlink()
    assert run_tiny(workdir=tmp_path, resume=True).summary == summary


@pytest.mark.parametrize("name", ["test_outputs.npy", "test_labels.npy", "mistakes.npz"])
def test_what_the_test_came_to_cannot_be_written(tmp_path, name):
    def block(state):
        (tmp_path / name).mkdir()

    with pytest.raises(WorkdirError, match=f"cannot write file '.*{name}'"):
        run_tiny(workdir=tmp_path, hooks=[Hook(Every(epochs=1), block)])
    # Not taken for a finished run.
    assert not (tmp_path / "summary.json").exists()


def test_the_log(standin_run):
    run, _ = standin_run
    rows = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.history.rows
    for row in rows:
        assert list(row) == [
            "step",
            "epoch",
            "split",
            "loss",
            "accuracy",
            "learning_rate",
            "images_per_second",
            "dataset",
        ]
        assert row["dataset"] == "standin"
    assert {row["split"] for row in rows} == {"train", "validation", "test"}
    assert [row["step"] for row in rows if row["split"] == "validation"] == [5, 10]
    assert rows[-1]["split"] == "test"
    assert rows[-1]["loss"] == run.summary["test_loss"]


def test_what_is_announced_names_the_data(standin_run):
    run, lines = standin_run
    assert lines[0] == (10, 5, 0, "lab_mlp, standin")
    assert "160 standin images" in lines[1]
    assert f"{run.model.count_params():,} parameters" in lines[1]
    assert run.summary["device"] in lines[2]
    assert any("epoch 2" in line and "validation loss" in line for line in lines[3:])


def summaries_of(folder):
    """(tag, plugin, step, tensor) of all that is in the event files of a split."""
    for file in sorted(folder.glob("events.out.tfevents*")):
        for record in tf.data.TFRecordDataset([str(file)]):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                plugin = value.metadata.plugin_data.plugin_name
                yield value.tag, plugin, event.step, tf.make_ndarray(value.tensor)


def test_tensorboard_files(standin_run, standin):
    run, _ = standin_run
    images = {}
    for split in ("train", "validation", "test"):
        assert len(list((run.workdir / "tensorboard" / split).glob("*"))) == 1
        found = list(summaries_of(run.workdir / "tensorboard" / split))
        scalars = {tag for tag, plugin, *_ in found if plugin == "scalars"}
        assert {"loss", "accuracy"} <= scalars
        for tag, plugin, step, value in found:
            if plugin == "images":
                width, height, *pictures = value
                (image,) = (tf.io.decode_png(picture).numpy() for picture in pictures)
                assert image.shape[:2] == (int(height), int(width))
                images[split, tag] = step, image
    assert {key: step for key, (step, _) in images.items()} == {
        ("train", "first_batch"): 0,
        ("test", "confusion_matrix"): 10,
        ("test", "predictions"): 10,
    }
    recipe = get_recipe("lab_mlp", **LIMIT)
    dataset = load_recipe_data(recipe)
    batch, _ = batch_at(recipe, 0, dataset=dataset)
    np.testing.assert_array_equal(images["train", "first_batch"][1], image_grid(batch))
    labels, outputs = dataset.test.labels, run.test_outputs
    pictures = confusion_pictures(dataset.test.images, labels, outputs)
    for name, picture in zip(("confusion_matrix", "predictions"), pictures, strict=True):
        np.testing.assert_array_equal(images["test", name][1], picture)


def test_a_grid_of_images():
    images = np.arange(5 * 2 * 3 * 1, dtype=np.float32).reshape(5, 2, 3, 1) + 0.4
    grid = image_grid(images, columns=2)
    times = 22  # 64 pixels or more
    assert grid.shape == (3 * (2 * times + 2), 2 * (3 * times + 2), 1)
    second = grid[:, 3 * times + 2 :]
    np.testing.assert_array_equal(second[0, : 3 * times : times, 0], [6, 7, 8])
    np.testing.assert_array_equal(second[2 * times : 2 * times + 2], 128)
    np.testing.assert_array_equal(second[2 * (2 * times + 2) :], 128)  # the sixth is not there
    assert image_grid(images, most=4).shape[0] == 2 * (2 * times + 2)
    np.testing.assert_array_equal(
        image_grid(np.full((1, 64, 64, 3), [-1, 300, NAN]))[0, 0], [0, 255, 0]
    )
    for bad in (np.zeros((0, 2, 2, 3)), np.zeros((2, 2, 3)), np.zeros((1, 2, 2, 4))):
        with pytest.raises(DataError, match="with C 1 or 3, not"):
            image_grid(bad)
    for option in ("columns", "most"):
        with pytest.raises(ConfigError, match=f"{option} must be a whole number >= 1, not 0"):
            image_grid(images, **{option: 0})


def test_a_confusion_matrix_in_pictures():
    images = (
        np.full((4, 64, 64, 1), 10, np.uint8) * np.arange(1, 5, dtype=np.uint8)[:, None, None, None]
    )
    # Class 0: two right, the second surer; class 1: one taken for 0.  Of class 2 there is none.
    outputs = np.array([[1, 0, 0], [5, 0, 0], [3, 0, 0], [0, 9, 0]], np.float32)
    matrix, cells = confusion_pictures(images, np.array([0, 0, 1, 1]), outputs)
    assert matrix.shape == cells.shape == (3 * 66, 3 * 66, 1)
    share = round(255 * (1 - 0.5**0.5))
    assert matrix[::66, ::66, 0].tolist() == [[0, 255, 255], [share, share, 255], [255] * 3]
    assert cells[::66, ::66, 0].tolist() == [[20, 128, 128], [30, 40, 128], [128] * 3]


def test_images_that_cannot_be_shown_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    many = Split(rng.integers(0, 256, (64, 8, 8, 4)).astype(np.uint8), np.arange(64) % 10)
    data = Dataset("four", many, many, many, tiny.NAMES, "here")
    run = run_tiny(dataset=data, workdir=tmp_path / "run", tensorboard=True)
    for split in ("train", "test"):
        found = summaries_of(run.workdir / "tensorboard" / split)
        assert {plugin for _, plugin, *_ in found} == {"scalars"}


def test_tensorboard_files_that_cannot_be_written(tmp_path):
    folder = tmp_path / "tensorboard"
    write = TensorBoard(folder).add_row
    row = dict.fromkeys(("accuracy", "learning_rate", "images_per_second"))
    rows = [{**row, "step": step, "split": "train", "loss": 1.0} for step in range(1, 6)]
    folder.write_text("in its place")
    with pytest.warns(UserWarning, match="cannot write TensorBoard's files in '.*board': ") as told:
        list(map(write, rows[:2]))
    assert len(told) == 1
    assert str(told[0].message).isprintable()
    folder.unlink()
    write(rows[2])
    write(rows[3])
    assert logged_steps(folder / "train") == [1, 2, 3, 4]
    # Pictures are kept for the next try too.
    board = TensorBoard(tmp_path / "other")
    (tmp_path / "other").write_text("in its place")
    with pytest.warns(UserWarning, match="cannot write TensorBoard's files in '.*other': "):
        board.add_images("train", "grey", [np.zeros((2, 3, 1), np.uint8)] * 2, step=7)
    (tmp_path / "other").unlink()
    board.add_row(rows[0])
    (tag, plugin, step, value), _ = summaries_of(tmp_path / "other" / "train")
    assert (tag, plugin, step, len(value)) == ("grey", "images", 7, 4)
    assert value[:2].tolist() == [b"3", b"2"]


def test_the_test_set_is_counted_right(standin_run, standin):
    run, _ = standin_run
    dataset = load_recipe_data(get_recipe("lab_mlp", **LIMIT))
    model = run.model
    model.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    loss = model.evaluate(dataset.test.images, dataset.test.labels, verbose=0)
    assert run.summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    hits = (run.test_outputs.argmax(-1) == dataset.test.labels).mean()
    assert run.summary["test_accuracy"] == pytest.approx(hits)


def test_regularisation_is_in_the_test_loss():
    plain = run_tiny(learning_rate=1e-9)
    heavy = run_tiny(learning_rate=1e-9, model_options={"units": (8,), "l2": 0.5})
    kernels = [w for w in tiny.weights(heavy.model) if w.ndim == 2]
    penalty = 0.5 * sum(float((kernel**2).sum()) for kernel in kernels)
    difference = heavy.summary["test_loss"] - plain.summary["test_loss"]
    assert difference == pytest.approx(penalty, rel=1e-4)


def test_pictures_name_the_data(standin_run, standin, monkeypatch, tmp_path):
    from cifarflow.reporting import pictures

    run, _ = standin_run
    titles = []
    plots = ("model_eval", "history", "confusion_matrix", "mistakes", "reliability")
    for name in (f"plot_{plot}" for plot in plots):
        plot = getattr(pictures, name)

        def noting(*args, plot=plot, **kwargs):
            titles.append(kwargs["title"])
            return plot(*args, **kwargs)

        monkeypatch.setattr(pictures, name, noting)
    dataset = load_recipe_data(get_recipe("lab_mlp", **LIMIT))
    paths = pictures.draw_run(run, dataset, tmp_path / "plots")
    assert set(paths) == {
        *("model_eval", "history", "confusion_matrix", "mistakes", "reliability", "model")
    }
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG")
    assert len(titles) == 5
    assert all("standin" in title for title in titles)
    # Without the outputs at hand they are computed again.
    again = pictures.draw_run(
        dataclasses.replace(run, test_outputs=None), dataset, tmp_path / "again"
    )
    for name in ("history", "confusion_matrix", "mistakes", "reliability"):
        assert again[name].read_bytes() == paths[name].read_bytes()
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WorkdirError):
        pictures.draw_run(run, dataset, file / "plots")


def test_a_finished_run_is_not_run_again(standin_run, standin, monkeypatch):
    run, _ = standin_run
    before = {p: p.read_bytes() for p in run.workdir.rglob("*") if p.is_file()}

    def refuse(*args, **kwargs):
        raise AssertionError("trained or tested again")

    monkeypatch.setattr(run_module, "train", refuse)
    monkeypatch.setattr(run_module, "predict", refuse)
    again = train_recipe("lab_mlp", workdir=run.workdir, resume=True, **{**LIMIT, "epochs": 2})
    assert again.summary == run.summary
    assert again.history.rows == run.history.rows
    assert hash_arrays(again.model.variables) == run.summary["weights_sha256"]
    assert {p: p.read_bytes() for p in run.workdir.rglob("*") if p.is_file()} == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    for seed in (0, 1):
        run_tiny(workdir=tmp_path / str(seed), seed=seed)
    newest = sorted((tmp_path / "1" / "checkpoints").glob("step_*"))[-1]
    shutil.copy(newest, tmp_path / "0" / "checkpoints")
    for is_finished in (True, False):
        if not is_finished:
            (tmp_path / "0" / "summary.json").unlink()
        with pytest.raises(CheckpointError, match="is of another run: seed=1, not 0"):
            run_tiny(workdir=tmp_path / "0", seed=0, resume=True)


def test_a_finished_run_with_other_weights_says_so(tmp_path):
    run_tiny(workdir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({**summary, "weights_sha256": "0" * 64}))
    with pytest.warns(UserWarning, match="the weights in '.*npz' are not those that .*summary"):
        run_tiny(workdir=tmp_path, resume=True)


def test_other_runs_are_refused(standin_run, standin):
    run, _ = standin_run
    before = {p: p.read_bytes() for p in run.workdir.rglob("*") if p.is_file()}
    with pytest.raises(WorkdirError, match="holds a run of this recipe already"):
        train_recipe("lab_mlp", workdir=run.workdir, **{**LIMIT, "epochs": 2})
    with pytest.raises(WorkdirError, match="holds a run with seed=0, not 1"):
        train_recipe("lab_mlp", workdir=run.workdir, resume=True, seed=1, **{**LIMIT, "epochs": 2})
    assert {p: p.read_bytes() for p in run.workdir.rglob("*") if p.is_file()} == before


def interrupt_at(step):
    def stop(state):
        if state.step == step:
            raise TrainingInterrupted(step, None)

    return Hook(Every(steps=step), stop)


@pytest.mark.parametrize("step", [1, 11])
def test_a_run_that_died_goes_on(tmp_path, step):
    """Before the first checkpoint, and after it: without one last save, as by a power cut."""
    options = {
        "epochs": 2,
        "precision": "mixed_bfloat16",
        "augment": "flip,crop:2",
        "model_options": {"units": (8,), "dropout": 0.3},
    }
    nothing = Hook(Every(steps=1000))
    whole = run_tiny(workdir=tmp_path / "whole", hooks=[nothing], **options)
    with pytest.raises(TrainingInterrupted):
        run_tiny(workdir=tmp_path / "cut", hooks=[interrupt_at(step)], **options)
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = run_tiny(workdir=tmp_path / "cut", resume=True, hooks=[nothing], **options)
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]

    def rows(run):
        lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "images_per_second": None} for line in lines]

    assert rows(resumed) == rows(whole)
    ours, theirs = (left_beside_checkpoints(run.workdir)["table"] for run in (resumed, whole))
    assert ours == theirs
    assert len(ours) == len(rows(whole))


def remove_at(step, workdir, then=lambda: None):
    def remove(state):
        if state.step == step:
            shutil.rmtree(workdir)
            then()

    return Hook(Every(steps=step), remove)


def left_by(run):
    """All that a run leaves but for its times; of the newest checkpoint and the best the state."""
    folder, states = run.workdir, {}
    for path in (folder / "checkpoints").iterdir():
        with np.load(path, allow_pickle=False) as members:
            names = sorted(set(members.files) - {"header"})
            states[path.name] = hash_arrays(members[name] for name in names)
    return {
        "newest and best": [states["best.npz"], states[max(states)]],
        **left_beside_checkpoints(folder),
    }


def left_beside_checkpoints(folder):
    with (folder / "metrics.csv").open(newline="") as table:
        found = [{k: v or None for k, v in row.items()} for row in csv.DictReader(table)]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "names": {path.name for path in folder.iterdir()} - {"checkpoints"},
        "recipe": json.loads((folder / "recipe.json").read_text()),
        "rows": [{**row, "images_per_second": None} for row in rows],
        "table": [{**row, "images_per_second": None} for row in found],
        "outputs": (folder / "test_outputs.npy").read_bytes(),
        "weights": json.loads((folder / "summary.json").read_text())["weights_sha256"],
    }


def logged_steps(folder):
    """The steps in the newest event file of a split."""
    newest = max(folder.glob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    records = tf.data.TFRecordDataset([str(newest)])
    events = [tf.compat.v1.Event.FromString(record.numpy()) for record in records]
    return sorted({event.step for event in events if event.summary.value})


def test_a_folder_that_is_removed_in_training_is_made_anew(tmp_path):
    options = {"epochs": 3, "tensorboard": True}
    whole = run_tiny(workdir=tmp_path / "whole", hooks=[Hook(Every(steps=3))], **options)
    # Before the first validation: of the best checkpoints none is lost.
    hooks = [remove_at(3, tmp_path / "cut")]
    with pytest.warns(UserWarning, match="workdir '.*cut' was removed, or its files were"):
        run = run_tiny(workdir=tmp_path / "cut", hooks=hooks, **options)
    assert left_by(run) == left_by(whole)
    assert min(row["step"] for row in run.history.rows) < 3
    for split in ("train", "validation", "test"):
        found, expected = (
            logged_steps(each.workdir / "tensorboard" / split) for each in (run, whole)
        )
        assert found == expected
    assert run_tiny(workdir=tmp_path / "cut", resume=True, **options).summary == run.summary


def test_a_folder_that_is_removed_when_the_test_begins(tmp_path, monkeypatch):
    predict = run_module.predict

    def remove_and_predict(*args, **kwargs):
        shutil.rmtree(tmp_path / "cut")
        return predict(*args, **kwargs)

    whole = run_tiny(workdir=tmp_path / "whole")
    last = whole.summary["steps"]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "predict", remove_and_predict)
        with (
            pytest.warns(UserWarning, match="was removed, or its files were"),
            pytest.raises(
                WorkdirError, match=rf"lacks checkpoints/step_0*{last}\.npz, the best checkpoint, "
            ),
        ):
            run_tiny(workdir=tmp_path / "cut")
    # All else is there, and is not taken for a finished run.
    assert left_beside_checkpoints(tmp_path / "cut") == left_beside_checkpoints(whole.workdir)
    assert left_by(run_tiny(workdir=tmp_path / "cut", resume=True)) == left_by(whole)


def test_a_folder_that_another_run_has_taken(tmp_path):
    folder = tmp_path / "cut"

    def take():
        Workdir(folder).open({"name": "another"})

    with (
        pytest.warns(UserWarning, match="cut' holds another run by now"),
        pytest.raises(WorkdirError, match="cut' holds another run by now"),
    ):
        run_tiny(workdir=folder, hooks=[remove_at(3, folder, take)])
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]
    assert json.loads((folder / "recipe.json").read_text()) == {"name": "another"}


def test_a_folder_that_cannot_be_made_anew(tmp_path):
    folder = tmp_path / "cut"
    with (
        pytest.warns(UserWarning, match="cannot write to workdir"),
        pytest.raises(WorkdirError, match="cannot write to workdir"),
    ):
        run_tiny(workdir=folder, hooks=[remove_at(3, folder, lambda: folder.write_text("mine"))])
    assert folder.read_text() == "mine"


def test_a_run_that_died_between_test_and_summary(tmp_path):
    first = run_tiny(workdir=tmp_path)
    (tmp_path / "summary.json").unlink()
    again = run_tiny(workdir=tmp_path, resume=True)
    assert again.summary["test_loss"] == first.summary["test_loss"]
    splits = [json.loads(x)["split"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert splits.count("test") == 1


def test_a_damaged_checkpoint(tmp_path):
    run_tiny(workdir=tmp_path)
    (tmp_path / "summary.json").unlink()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="is damaged"):
        run_tiny(workdir=tmp_path, resume=True)


def test_the_same_recipe_twice(plain_run):
    again = run_tiny()
    assert again.summary["weights_sha256"] == plain_run.summary["weights_sha256"]
    assert again.workdir is None
    timeless = [{**row, "images_per_second": 0} for row in again.history.rows]
    assert timeless == [{**row, "images_per_second": 0} for row in plain_run.history.rows]


def test_without_a_validation_set():
    run = run_tiny(dataset=tiny.dataset(validation=0))
    assert {row["split"] for row in run.history.rows} == {"train", "test"}


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"batch_size": 65}, "batch_size must be at most the 64 training examples, not 65"),
        ({"limit_examples": 65}, "limit_examples must be at most the 64 training images, not 65"),
        ({"augment": "crop:8"}, "crop padding must be smaller than the image side 8, not 8"),
        ({"augment": "cutout:9"}, "cutout size must be at most the image side 8, not 9"),
        ({"schedule": "piecewise", "drop_epochs": (0.001, 0.002)}, "boundaries"),
        (
            {"model": "cnn", "model_options": {"filters": [2, 2, 2]}},
            r"the image is \dx\d pixels before a 2x2 pool|pixels",
        ),
    ],
)
def test_what_does_not_fit_the_data_writes_nothing(tmp_path, changes, quoted):
    with pytest.raises(ConfigError, match=quoted) as caught:
        run_tiny(workdir=tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_early_stopping_is_the_recipes_too(tmp_path):
    options = {"learning_rate": 1e-30, "schedule": "constant", "epochs": 6, "patience_epochs": 2}
    whole = run_tiny(workdir=tmp_path / "whole", **options)
    assert whole.summary["epochs"] == 3
    assert whole.summary["stop_reason"] == "validation loss has not improved since epoch 1"
    # The epochs without an improvement are counted across an interruption.
    with pytest.raises(TrainingInterrupted):
        run_tiny(workdir=tmp_path / "cut", hooks=[interrupt_at(20)], **options)
    nothing = Hook(Every(steps=1000))
    resumed = run_tiny(workdir=tmp_path / "cut", resume=True, hooks=[nothing], **options)
    for key in ("steps", "stop_reason", "weights_sha256"):
        assert resumed.summary[key] == whole.summary[key]
    with pytest.raises(ConfigError, match="0 where there are no validation images, not 2"):
        run_tiny(workdir=tmp_path / "bare", dataset=tiny.dataset(validation=0), **options)
    assert not (tmp_path / "bare").exists()


def test_a_data_set_without_test_images(tmp_path):
    data = tiny.dataset()
    empty = Split(data.test.images[:0], data.test.labels[:0])
    data = Dataset("mine", data.train, data.validation, empty, tiny.NAMES, "here")
    with pytest.raises(DataError, match="'mine' must have test images, not 0"):
        run_tiny(dataset=data, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["resume", "tensorboard"])
def test_what_needs_a_workdir(option):
    with pytest.raises(ConfigError, match=f"{option}=True needs a workdir, not None"):
        run_tiny(**{option: True})


def test_losses_that_are_not_finite(tmp_path):
    relu = {"units": (8,), "activation": "relu"}
    with pytest.raises(NonFiniteError, match=r"which began in step 1, .* than 9\.99"):
        run_tiny(learning_rate=1e30, model_options=relu)
    # One step: its loss is from before the update, so only the test can tell.
    with pytest.raises(NonFiniteError, match="the test loss is"):
        run_tiny(
            learning_rate=1e38,
            model_options=relu,
            epochs=0.1,
            workdir=tmp_path,
            validation_fraction=0,
        )
    assert not (tmp_path / "summary.json").exists()


def test_real_cifar10(cifar10_dir):
    run = train_recipe(
        "lab_cnn", data="cifar10", data_dir=cifar10_dir, limit_examples=320, epochs=1
    )
    assert run.summary["dataset"] == "cifar10"
    assert run.summary["steps"] == 10
    assert run.summary["examples"] == {"train": 320, "validation": 80, "test": 80}
    assert math.isfinite(run.summary["test_loss"])


def test_the_fast_recipes_keep_to_their_sources():
    """airbench96's table, and of Hiverge's settings those that were not chosen anew."""
    fast96 = RECIPES["fast96"]
    # Its 9 per 1,024 examples are decoupled: 9 = rate * (momentum / (1 - momentum) + 2).
    assert fast96.learning_rate == pytest.approx(9 / (0.85 / 0.15 + 2), rel=1e-4)
    source = {
        "batch_size": 1024,
        "learning_rate_examples": 1024,
        "learning_rate_scales": {"beta": 64.0},
        "momentum": 0.85,
        "peak_fraction": 0.1,
        "start_fraction": 0.2,
        "end_fraction": 0.0,
        "epochs": 37.0,
        "freeze": {"whitening/bias": 3.0},
        "averaging": "lookahead",
        "label_smoothing": 0.2,
        "augment": "altflip,crop:4,cutout:12",
        "tta": "multicrop",
    }
    assert {name: getattr(fast96, name) for name in source} == source
    assert fast96.l2 == pytest.approx(0.00133)
    fast94 = RECIPES["fast94"]
    # Per example of the batch, as in a loss that is summed over it.
    per_example = fast94.learning_rate * fast94.learning_rate_scales["classifier/kernel"]
    assert per_example / fast94.learning_rate_examples == pytest.approx(0.5415)
    assert fast94.learning_rate * fast94.l2 == pytest.approx(1.04e-6)
    source = {
        "momentum": 0.825,
        "label_smoothing": 0.09,
        "augment": "altflip,crop:2,brightness:0.14,contrast:0.13",
        "tta": "multicrop",
        "tta_share": 0.25,
    }
    assert {name: getattr(fast94, name) for name in source} == source
    changed = {"name", "model_options", "epochs"}
    fields = {field.name for field in dataclasses.fields(Recipe)} - changed
    assert all(getattr(RECIPES["fast95"], name) == getattr(fast94, name) for name in fields)


@pytest.mark.parametrize("name", ["fast94", "fast96"])
def test_rates_go_with_the_batch(name):
    """Twice the batch is twice the rate of SGD's variables, and Muon's stays."""
    one, two = (
        build_optimizer(get_recipe(name, batch_size=size), steps_per_epoch=10) for size in (64, 128)
    )
    rates = [float(optimizer.learning_rate) for optimizer in (one, two)]
    ratios = [
        rates[1] * two.learning_rate_scales[part] / (rates[0] * one.learning_rate_scales[part])
        for part in one.learning_rate_scales
    ]
    assert ratios == pytest.approx([2.0] * len(ratios))
    assert rates[1] / rates[0] == pytest.approx(1.0 if name == "fast94" else 2.0)
    assert rates[1] * two.l2 / (rates[0] * one.l2) == pytest.approx(2.0)


def test_a_size_that_the_images_do_not_have():
    for data in ("auto", "cifar10", "cifar100", "standin"):
        with pytest.raises(
            ConfigError, match=f"image_size must be 32, the side of {data}'s images"
        ):
            get_recipe("lab_cnn", data=data, image_size=64)
    assert get_recipe("lab_cnn", data="folder", image_size=64).image_size == 64
