"""A run's model from its folder alone, to the same weights; and folders that cannot give it."""

import contextlib
import dataclasses
import json
import shutil
import signal

import keras
import numpy as np
import pytest
import tiny

from cifarflow.ensemble import train_ensemble
from cifarflow.errors import CheckpointError, ConfigError, DataError, WorkdirError
from cifarflow.evaluation.predict import predict
from cifarflow.evaluation.voting import combine_outputs
from cifarflow.recipes import trained as trained_module
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.recipes.trained import load_trained
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted
from cifarflow.training.workdir import LATER_FIELDS

DATA = tiny.dataset()
TINY = {**tiny.MLP, "epochs": 3, "batch_size": 8}
# Nothing but the step is known of an unfinished run on data of one's own.
KNOWN = {"image_shape": tiny.SHAPE, "class_names": tiny.NAMES}


def run_in(folder, **options):
    return train_recipe("lab_mlp", dataset=DATA, workdir=folder, **{**TINY, **options})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_in(folder)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def same_weights(trained, model):
    pairs = zip(trained.model.variables, model.variables, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_finished_run(finished):
    folder, run = finished
    trained = load_trained(folder)
    assert same_weights(trained, run.model)
    assert np.array_equal(predict(trained.model, DATA.test.images), run.test_outputs)
    assert trained.class_names == tiny.NAMES
    assert trained.image_shape == tiny.SHAPE
    assert trained.step == run.summary["steps"]
    assert trained.is_finished
    assert trained.summary == run.summary
    assert trained.recipe.to_json() == json.loads((folder / "recipe.json").read_text())
    assert trained.describe() == f"lab_mlp on tiny, step {trained.step}"


@pytest.mark.parametrize(
    "options",
    [
        {"averaging": "lookahead", "schedule": "piecewise", "drop_epochs": (0.4, 1)},
        {"precision": "mixed_float16"},
        {
            "model": "speednet",
            "model_options": {"widths": (4,)},
            "optimizer": "muon",
            "averaging": "ema",
            "freeze": {"whitening/bias": 1},
        },
    ],
)
def test_whatever_the_recipe_keeps(tmp_path, options):
    run = run_in(tmp_path, epochs=1.5, **options)
    trained = load_trained(tmp_path)
    assert same_weights(trained, run.model)
    assert trained.is_finished


@pytest.fixture
def earlier(monkeypatch):
    """A version that had not all the fields: what it writes lacks them, within the block."""

    @contextlib.contextmanager
    def version():
        with monkeypatch.context() as patch:
            to_json = Recipe.to_json

            def without(recipe):
                values = to_json(recipe)
                return {key: values[key] for key in values if key not in LATER_FIELDS}

            patch.setattr(Recipe, "to_json", without)
            yield

    return version


def test_a_run_from_before_there_was_a_field(finished, tmp_path, earlier):
    with earlier(), pytest.raises(TrainingInterrupted):
        run_in(tmp_path, hooks=[Hook(Every(steps=5), interrupt)])
    before = (tmp_path / "recipe.json").read_text()
    assert not set(json.loads(before)) & set(LATER_FIELDS)
    assert load_trained(tmp_path, **KNOWN).step == 5
    with pytest.raises(WorkdirError, match="holds a run with accumulate_steps=1, not 2"):
        run_in(tmp_path, resume=True, accumulate_steps=2)
    # As many hooks as before.
    run = run_in(tmp_path, resume=True, hooks=[Hook(Every(steps=5), lambda state: None)])
    assert run.summary["weights_sha256"] == finished[1].summary["weights_sha256"]
    assert same_weights(load_trained(tmp_path), run.model)
    assert same_weights(load_trained(tmp_path, which="best"), run.model)
    assert (tmp_path / "recipe.json").read_text() == before


def test_members_from_before_there_was_a_field(tmp_path, earlier):
    recipe = Recipe("mine", **TINY)
    with earlier():
        first = train_ensemble(recipe, 1, dataset=DATA, workdir=tmp_path)
    ensemble = train_ensemble(recipe, 2, dataset=DATA, workdir=tmp_path, resume=True)
    assert ensemble.members[0] == first.members[0]
    assert np.array_equal(
        ensemble.predict(DATA.test.images, tta=False).by_average,
        combine_outputs(ensemble.outputs[:, 0]).by_average,
    )


def test_every_later_field_is_known():
    """A field that is added must be in LATER_FIELDS, or runs that are there get lost."""
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    assert {name: defaults[name] for name in LATER_FIELDS} == LATER_FIELDS
    # A name and 38 fields are what recipes had at first.
    assert len(defaults) - len(LATER_FIELDS) == 39


def test_the_best_is_what_validation_saw(tmp_path):
    # A rate at which the loss goes up and down.
    run = run_in(tmp_path, epochs=6, averaging="ema", learning_rate=0.5)
    rows = [row for row in run.history.rows if row["split"] == "validation"]
    best = min(rows, key=lambda row: row["loss"])
    trained = load_trained(tmp_path, which="best")
    assert trained.step == best["step"]
    assert trained.is_finished
    outputs = predict(trained.model, DATA.validation.images)
    loss = keras.losses.sparse_categorical_crossentropy(
        DATA.validation.labels, outputs, from_logits=True
    )
    assert np.mean(loss) == pytest.approx(best["loss"], rel=1e-5)


def interrupt(state):
    signal.raise_signal(signal.SIGINT)


def test_an_unfinished_run(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run_in(tmp_path, hooks=[Hook(Every(steps=5), interrupt)])
    with pytest.raises(ConfigError, match="class_names must be given: the run on 'tiny' is not"):
        load_trained(tmp_path)
    with pytest.raises(ConfigError, match="image_shape must be given: the run on 'tiny' does"):
        load_trained(tmp_path, class_names=tiny.NAMES)
    trained = load_trained(tmp_path, **KNOWN)
    assert not trained.is_finished
    assert trained.summary is None
    assert trained.step == 5
    assert trained.describe() == "lab_mlp on tiny, step 5, of a run that is not finished"
    with pytest.raises(CheckpointError, match="is of another model"):
        load_trained(tmp_path, image_shape=(8, 8, 1), class_names=tiny.NAMES)
    with pytest.raises(CheckpointError, match="has no best checkpoint: nothing was validated yet"):
        load_trained(tmp_path, which="best", **KNOWN)
    # Of the data sets that the library loads itself everything is known.
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    for name, first in (("cifar10", "airplane"), ("standin", "disk")):
        (tmp_path / "recipe.json").write_text(json.dumps({**recipe, "data": name}))
        with pytest.raises(CheckpointError, match=f"is of another run: data='tiny', not '{name}'"):
            load_trained(tmp_path)
        assert trained_module._KNOWN_CLASSES[name][0] == first


def test_no_run(tmp_path):
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "recipe.json").write_text('{"name": "mine", "ensemble": "test"}')
    (tmp_path / "lab" / "lab_mlp-0").mkdir(parents=True)
    (tmp_path / "lab" / "lab_mlp-0" / "recipe.json").write_text("{}")
    for name, reason in (
        (".", "it has no recipe.json; there are runs below it, in 'five'"),
        ("nowhere", "it is no folder"),
        ("five", "it holds an ensemble; what came of it is in ensemble.json"),
        ("lab", "it has no recipe.json; there are runs below it, in 'lab_mlp-0'"),
    ):
        with pytest.raises(WorkdirError, match=f"there is no run in .*: {reason}"):
            load_trained(tmp_path / name)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(DataError, match="is not readable JSON"):
        load_trained(tmp_path)


def test_a_folder_that_lacks_something(folder):
    with pytest.raises(ConfigError, match="which must be one of last, best, not 'first'"):
        load_trained(folder, which="first")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(WorkdirError, match="has no checkpoint yet: train it first"):
        load_trained(folder)


def test_damaged_checkpoints(folder, finished):
    older, newest = sorted((folder / "checkpoints").glob("step_*.npz"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="is damaged: .*; going on from the one before, of step"):
        trained = load_trained(folder)
    assert trained.step == int(older.stem.removeprefix("step_"))
    assert not trained.is_finished
    older.write_bytes(b"")
    (folder / "checkpoints" / "best.npz").write_bytes(b"x")
    for which in ("last", "best"):
        with pytest.raises(CheckpointError, match="is damaged"):
            load_trained(folder, which=which)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("weights_sha256", "0" * 64, "are not those that .*summary.json' is of"),
        ("class_names", ["a", 3], r"the summary's class_names must be two printable names or more"),
        ("class_names", ["a", "\x1b[31m"], "must be two printable names"),
        ("class_names", None, "must be two printable names"),
        ("class_names", ["a"], "must be two printable names"),
        ("image_shape", [8, 8], "image_shape must be"),
        ("image_shape", [8, 8, "3"], "image_shape must be"),
        ("steps", None, "is no summary of a run"),
    ],
)
def test_a_summary_that_says_something_else(folder, key, value, match):
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(DataError, match=match) as caught:
        load_trained(folder)
    assert str(caught.value).isprintable()


def test_a_summary_from_before_it_had_the_shape(folder):
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    del summary["image_shape"]
    path.write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="image_shape must be given"):
        load_trained(folder)
    assert load_trained(folder, image_shape=tiny.SHAPE).is_finished
