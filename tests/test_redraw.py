"""Any batch of a run drawn again, and what a run keeps of a step that failed."""

import pathlib
import re
import shlex
import sys
import warnings

import numpy as np
import pytest
import tensorflow as tf
import tiny

import cifarflow
from cifarflow.errors import ConfigError, DataError, NonFiniteError, WorkdirError
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes import build
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.redraw import batch_at, load_recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.replay import replay_capsule
from cifarflow.training import contract, loop
from cifarflow.training.capsule import load_capsule
from cifarflow.training.checkpoints import hash_arrays
from cifarflow.training.contract import CHECKED, ContractError
from cifarflow.training.retrace import RetraceError
from cifarflow.training.step import cross_entropy

BASE = {**tiny.MLP, "epochs": 1.5, "batch_size": 8}
RELU = {"units": (8,), "activation": "relu"}


def run_tiny(**kwargs):
    return train_recipe("lab_mlp", **{"dataset": tiny.dataset(), **BASE, **kwargs})


@pytest.mark.parametrize(
    "augment",
    ["none", "flip,crop:2,brightness:0.2", "altflip,cutout:3", "randaugment,mixup,cutmix"],
)
def test_it_is_what_the_run_trained_on(tmp_path, monkeypatch, augment):
    trained_on = []
    make = loop.make_train_step

    def recording(*args, **kwargs):
        step = make(*args, **kwargs)

        def record(images, labels):
            trained_on.append((images.numpy(), labels.numpy()))

        @tf.function
        def recorded(images, labels):
            tf.py_function(record, [images, labels], [])
            return step(images, labels)

        return recorded

    monkeypatch.setattr(loop, "make_train_step", recording)
    options = {"limit_examples": 40, "seed": 3, "augment": augment}
    run = run_tiny(workdir=tmp_path, **options)
    # Five batches an epoch, so the second epoch is among them.
    assert len(trained_on) == run.summary["steps"] == 8

    # From the folder alone, where the data comes from its own source.
    monkeypatch.setattr(build, "load_data", lambda *args, **kwargs: tiny.dataset())
    recipe = load_recipe(tmp_path)
    assert (recipe.name, recipe.seed, recipe.data) == ("lab_mlp", 3, "tiny")
    for step in (0, 4, 5, 7):
        for ours, theirs in zip(batch_at(recipe, step), trained_on[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    # By name, and with data that is there already.
    recipe = get_recipe("lab_mlp", **BASE, **options)
    again = batch_at(recipe, 6, dataset=tiny.dataset())
    np.testing.assert_array_equal(again[0], trained_on[6][0])
    assert len(batch_at("lab_mlp", 0)[0]) == 32


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ConfigError, match="step must be a whole number >= 0, not -1"):
        batch_at("lab_mlp", -1, dataset=tiny.dataset())
    with pytest.raises(ConfigError, match=r"recipe must be one of .*, not 'x'"):
        batch_at("x", 0, dataset=tiny.dataset())
    with pytest.raises(ConfigError, match=r"batch_size must be at most the 64 .*, not 65"):
        batch_at(get_recipe("lab_mlp", batch_size=65), 0, dataset=tiny.dataset())
    with pytest.raises(WorkdirError, match=r"there is no run in '.*': it has no recipe\.json"):
        load_recipe(tmp_path)
    for text, quoted in (("{", "is not readable"), ('{"name": "x", "y": 1}', "has no field 'y'")):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(DataError, match=quoted):
            load_recipe(tmp_path)


def test_a_run_that_blows_up_leaves_its_step(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    data = tiny.dataset()
    options = {"learning_rate": 1e30, "model_options": RELU, "augment": "flip,crop:1"}
    with pytest.raises(NonFiniteError) as caught:
        run_tiny(workdir=workdir, dataset=data, **options)
    folder = workdir / "capsules" / "step_00000001"
    command = shlex.join(
        [pathlib.Path(sys.executable).name, "-m", "cifarflow", "replay", str(folder)]
    )
    assert str(caught.value).endswith(f"; to run it again: {command}")
    capsule = load_capsule(folder)
    for ours, theirs in zip(
        (capsule.images, capsule.labels),
        batch_at(load_recipe(workdir), 1, dataset=data),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (capsule.step, capsule.seed, capsule.steps_per_epoch) == (1, 0, 8)
    found = replay_capsule(folder)
    assert not np.isfinite(found.loss)
    assert not found.is_sound
    assert len(found.gradients) == len(capsule.found.gradients) > 0
    # As the README has it.
    monkeypatch.setattr(build, "load_data", lambda *args, **kwargs: data)
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    # The folder last: its name may hold any digits.
    for old, new in (("00000041", "00000001"), ("41", "1"), ("runs/final", str(workdir))):
        assert old in code
        code = code.replace(old, new)
    names = {"cf": cifarflow, "model": tiny.tiny_mlp(), "optimizer": SGD(0.1)}
    exec(compile(code, "README.md", "exec"), names)
    np.testing.assert_array_equal(names["images"], capsule.images)
    assert not names["found"].is_sound
    with pytest.raises(RetraceError, match=r"'images' has the shape \(3, 8, 8, 3\) after \(8, 8"):
        names["train_step"](names["images"][:3], names["labels"][:3])
    # The same without a folder, and nothing is kept.
    with pytest.raises(NonFiniteError, match="which began in step 1, ") as caught:
        run_tiny(dataset=data, **options)
    assert "replay" not in str(caught.value)


def test_a_run_that_skips_what_is_not_finite(tmp_path, monkeypatch):
    def odd(**kwargs):
        def loss_fn(labels, outputs):
            return cross_entropy(**kwargs)(labels, outputs) * tf.where(labels[0] < 4, np.nan, 1.0)

        return loss_fn

    recipe = get_recipe("lab_mlp", **BASE)
    batches = [batch_at(recipe, step, dataset=tiny.dataset())[1] for step in range(12)]
    bad = [step for step, labels in enumerate(batches) if labels[0] < 4]
    assert 1 < len(bad) < 11
    monkeypatch.setattr(build, "cross_entropy", odd)
    # What comes of it on the test set is another matter.
    monkeypatch.setattr("cifarflow.recipes.run._summary", lambda *args: dict(args[1].summary))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = run_tiny(workdir=tmp_path, on_nonfinite="skip")
    assert (run.summary["skipped_steps"], run.summary["steps"]) == (len(bad), 12)
    kept = sorted(folder.name for folder in (tmp_path / "capsules").iterdir())
    assert kept == [f"step_{step:08d}" for step in bad[:3]]
    for step, warning in zip(bad[:3], told[:3], strict=True):
        assert str(warning.message).startswith(f"step {step} was skipped: loss nan; gradients not")


def test_skips_are_in_the_summary():
    run = run_tiny(precision="mixed_float16", on_nonfinite="skip", learning_rate=0.01)
    assert run.summary["skipped_steps"] == 0
    assert run.summary["loss_scale_skips"] >= 0
    with pytest.raises(ConfigError, match="on_nonfinite must be one of stop, skip, not None"):
        run_tiny(on_nonfinite=None)


def test_a_step_is_checked_before_it_trains(tmp_path, capsys, monkeypatch):
    plain = run_tiny()
    assert CHECKED not in capsys.readouterr().out
    checked = run_tiny(check=True)
    assert capsys.readouterr().out == f"{CHECKED}\n"
    # It leaves nothing behind.
    assert hash_arrays(checked.model.variables) == hash_arrays(plain.model.variables)

    def detached(model, optimizer, **kwargs):
        return loop.make_eval_step(model)

    monkeypatch.setattr(contract, "make_train_step", detached)
    with pytest.raises(ContractError, match="no step moves 'dense"):
        run_tiny(check=True, workdir=tmp_path / "run")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()
