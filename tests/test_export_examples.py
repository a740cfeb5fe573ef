"""examples/export.py and examples/predict.py, as a person runs them, in one child process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifarflow.data.standin import load_standin
from cifarflow.recipes.run import train_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "data": "standin",
    "limit_examples": 320,
    "validation_fraction": 0.2,
    "model": "mlp",
    "model_options": {"units": (16,)},
    "learning_rate": 1e-3,
    "epochs": 1,
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How each command line ended: (exit status, stdout, stderr) by its name."""
    folder = tmp_path_factory.mktemp("here")
    cache = folder / "cache"
    data = load_standin(validation_fraction=0.2, cache_dir=cache)
    train_recipe("lab_mlp", dataset=data, workdir=folder / "run", **RECIPE)
    shutil.copytree(folder / "run", folder / "unfinished")
    (folder / "unfinished" / "summary.json").unlink()
    for number in range(2):
        big = np.repeat(np.repeat(data.test.images[number], 9, 0), 9, 1)
        Image.fromarray(big).save(folder / f"some {number}.png")
    (folder / "bad.png").write_text("no picture")
    images = ["some 0.png", "some 1.png"]
    every = "--formats=keras,saved_model,tflite"
    lines = {
        "export": ["export.py", "--workdir=run", every, "--examples=50"],
        "again": ["export.py", "--workdir=run", every],
        "test set": ["export.py", "--workdir=run", "--formats=keras", "--split=test", "--out=out"],
        "run": ["predict.py", "run", *images],
        "keras": ["predict.py", "run/export/model.keras", *images, "--top=1"],
        "saved_model": ["predict.py", "run/export/saved_model", *images],
        "tflite": ["predict.py", "run/export/model.tflite", *images, "--top=99"],
        "unfinished": ["predict.py", "unfinished", "some 0.png"],
        "named": ["predict.py", "run", "some 0.png", "--class_names=" + ",".join("abcdefghij")],
        "too few": ["predict.py", "run", "some 0.png", "--class_names=a,b"],
        "bad": ["predict.py", "run", "bad.png", "some 0.png", "none.png"],
        "folder": ["predict.py", "run", "."],
        "no image": ["predict.py", "run"],
        "exports": ["predict.py", "run/export", "some 0.png"],
        "a picture": ["predict.py", "some 0.png", "some 1.png"],
    }
    environ = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "CIFARFLOW_CACHE": str(cache),
        "COLUMNS": "80",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "test_bad_flags.py"],
        cwd=folder,
        env=environ,
        input=json.dumps([[f"examples/{words[0]}", words[1:]] for words in lines.values()]),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True)), folder


def test_an_export(ends):
    by_name, folder = ends
    code, out, err = by_name["export"]
    assert code == 0, err
    assert out.startswith("lab_mlp on standin, step 10; each file is checked on 50 validation")
    assert "keras: 0.2" in out
    table = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    kinds = ["format", "model", "keras", "saved_model", "tflite"]
    assert [row[0].strip() for row in table] == kinds
    for row in table[1:]:
        assert re.fullmatch(r" 0\.\d{4} ", row[3])
        assert float(row[4]) >= 0.98
        assert float(row[5]) <= 0.001
    names = {path.name for path in (folder / "run" / "export").iterdir()}
    assert names == {"model.keras", "saved_model", "model.tflite", "export.json"}
    code, out, _ = by_name["test set"]
    assert code == 0
    assert "checked on 80 test images" in out


@pytest.mark.parametrize("name", ["run", "keras", "saved_model", "tflite"])
def test_predictions(ends, name):
    code, out, err = ends[0][name]
    assert (code, err) == (0, "")
    count = {"keras": 1, "tflite": 10}.get(name, 3)
    blocks = out.strip().split("\n\n")
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        title, *rows = block.splitlines()
        assert title == f"some {number}.png"
        assert len(rows) == count
        shares = [float(re.search(r"(\d+\.\d) %", row)[1]) for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert rows[0].count("━") == round(shares[0] * 0.3)
    # Every form of the model says the same.
    first = re.search(r"(\w+) +(\d+\.\d) %", out).groups()
    assert first == re.search(r"(\w+) +(\d+\.\d) %", ends[0]["run"][1]).groups()


def test_what_there_is_to_say_of_a_model(ends):
    by_name, _ = ends
    code, out, _ = by_name["unfinished"]
    assert code == 0
    first = out.splitlines()[0]
    assert first == "this is lab_mlp on standin, step 10, of a run that is not finished"
    assert re.search(r"^  [a-j] ", by_name["named"][1], re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("again", "'run/export' is there already: give a folder that is not"),
        ("bad", r"image 'bad.png' is no picture that can be read: .* \(and 1 more that cannot be"),
        ("folder", r"image '\.' cannot be read: "),
        ("no image", r"predict.py must be given MODEL IMAGE..., not \['run'\]"),
        ("exports", "did you mean 'run/export/model.keras'"),
        ("a picture", "model must be a run's folder, .* not 'some 0.png'"),
        ("too few", "class_names must be as many as the model's 10 classes, not 2"),
    ],
)
def test_what_is_refused(ends, name, match):
    code, out, err = ends[0][name]
    assert code == 2
    # Of the stand-in set there is a banner before it.
    *_, line = err.splitlines()
    assert re.search(match, line)
    assert line.startswith("error: ")
    assert err.count("error: ") == 1
    # The good images among the others are shown all the same.
    assert ("some 0.png" in out) == (name == "bad")
