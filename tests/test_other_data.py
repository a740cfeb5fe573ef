"""Recipes on 100 classes and on folders of pictures of another size, as far as the plots."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import test_data_cifar100
from own_flags import no_flags
from PIL import Image

import cifarflow as cf
from cifarflow.data import layouts
from cifarflow.data.cifar100 import load_cifar100
from cifarflow.data.folder import load_folder
from cifarflow.errors import ConfigError, DataNotFoundError, WorkdirError
from cifarflow.recipes.build import resolve
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.reporting.pictures import draw_run

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY = {"precision": "float32", "epochs": 1, "batch_size": 32, "eval_batch_size": 50}
MODELS = {
    "lab_cnn": {"model_options": {"filters": [4], "kernel_size": 3, "dense_units": 8}},
    "lab_dropout": {
        "model": "resnet",
        "model_options": {"depth": 4, "widths": [4]},
    },
    "fast75": {"model_options": {"widths": [4]}, "validation_fraction": 0.1},
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a small CIFAR-100, and a folder of pictures in three classes."""
    root = tmp_path_factory.mktemp("places")
    test_data_cifar100.put("binary", root)
    rng = np.random.default_rng(0)
    for name in ("ash", "beech", "cedar"):
        (root / "trees" / name).mkdir(parents=True)
        for number in range(60):
            pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(root / "trees" / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(layouts.LAYOUTS, "cifar100", test_data_cifar100.SMALL)


def data_of(name, places):
    return {
        "cifar100": {"data": "cifar100", "data_dir": places},
        "folder": {"data": "folder", "data_dir": places / "trees", "image_size": 24},
    }[name]


@pytest.mark.parametrize("data", ["cifar100", "folder"])
@pytest.mark.parametrize("recipe", MODELS)
def test_recipes(places, tmp_path, recipe, data):
    options = {**TINY, **MODELS[recipe], **data_of(data, places)}
    run = train_recipe(recipe, workdir=tmp_path / "run", **options)
    summary = run.summary
    classes, name = (100, "cifar100") if data == "cifar100" else (3, "trees")
    assert (summary["dataset"], len(summary["class_names"])) == (name, classes)
    assert np.array(summary["confusion_matrix"]).shape == (classes, classes)
    assert np.array(summary["confusion_matrix"]).sum() == summary["examples"]["test"]
    assert {row["dataset"] for row in run.history.rows} == {name}
    assert run.model.output_shape == (None, classes)
    size = 32 if data == "cifar100" else 24
    assert run.model.input_shape == (None, size, size, 3)
    assert np.isfinite(summary["test_loss"])
    if recipe == "lab_cnn":
        dataset = (
            load_cifar100(places)
            if data == "cifar100"
            else load_folder(places / "trees", image_size=24)
        )
        paths = draw_run(run, dataset, tmp_path / "plots")
        assert {path.stat().st_size > 5000 for path in paths.values()} == {True}


def test_a_run_on_a_folder_is_repeated_and_resumed(places, tmp_path):
    options = {**TINY, **MODELS["lab_cnn"], **data_of("folder", places)}
    run = train_recipe("lab_cnn", workdir=tmp_path / "run", **options)
    saved = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (saved["data"], saved["image_size"]) == ("folder:trees", 24)
    again = train_recipe("lab_cnn", workdir=tmp_path / "run", resume=True, **options)
    assert again.summary["weights_sha256"] == run.summary["weights_sha256"]
    recipe = cf.load_recipe(tmp_path / "run")
    images, labels = cf.batch_at(recipe, 1, data_dir=places / "trees")
    assert (images.shape, labels.shape) == ((32, 24, 24, 3), (32,))
    with pytest.raises(DataNotFoundError, match="data=folder:trees is not in the folder"):
        cf.batch_at(recipe, 1, data_dir=other_name(places, tmp_path))
    # Another folder is other data: the run in the workdir is not gone on with.
    with pytest.raises(WorkdirError):
        train_recipe(
            "lab_cnn",
            workdir=tmp_path / "run",
            resume=True,
            **{**options, "data_dir": other_name(places, tmp_path)},
        )


def test_examples_on_a_folder(places, tmp_path, monkeypatch, capsys):
    words = ["--data=folder", f"--data_dir={places / 'trees'}", "--image_size=24"]
    for name, more, said in (
        ("custom_loop", ["--steps=2"], r"^trees: validation accuracy [01]\.\d+ after 2 steps$"),
        ("show_augment", ["--augment=flip", "--images=1"], "1 augmentations of trees, 1 draws"),
    ):
        out = tmp_path / f"{name}.png"
        more += [f"--out={out}"] if name == "show_augment" else []
        argv = [name, *words, *more]
        monkeypatch.setattr(sys, "argv", argv)
        with no_flags(), pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        assert not end.value.code
        assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    assert out.exists()


def other_name(places, tmp_path):
    link = tmp_path / "bushes"
    if not link.exists():
        (tmp_path / "bushes").mkdir()
        for name in ("ash", "beech", "cedar"):
            (link / name).symlink_to(places / "trees" / name)
    return link


def test_resolve(places):
    trees = load_folder(places / "trees")
    for data in ("folder", "folder:trees"):
        assert resolve(Recipe("mine", data=data), trees).data == "folder:trees"
    hundred = dataclasses.replace(trees, name="tfds:mnist")
    assert resolve(Recipe("mine", data="tfds:mnist"), hundred).data == "tfds:mnist"


@pytest.mark.parametrize("data", ["mnist", "cifar-10", "folder:", "tfds:", "FOLDER", "standin:x"])
def test_data_that_is_none(data):
    with pytest.raises(
        ConfigError, match=r"data must be one of auto, cifar10, .*folder, tfds:NAME"
    ):
        train_recipe("lab_cnn", data=data)
