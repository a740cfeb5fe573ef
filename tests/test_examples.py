"""The runners in processes of their own, as a person starts them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
BANNER = "STAND-IN DATA: these are NOT CIFAR-10 results"
# Nobody listens here: what a machine without a network finds.
DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """No data, no network, and one cache for all the processes of this file."""
    cache = tmp_path_factory.mktemp("cache")
    values = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        "CIFARFLOW_CACHE": str(cache),
        "KERAS_HOME": str(cache / "keras"),
        "TFDS_DATA_DIR": str(cache / "tfds"),
        "HOME": str(cache),
    }
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        values[name] = DEAD_PROXY
    for name in ("CIFARFLOW_DATA", "no_proxy", "NO_PROXY", "TF_CPP_MIN_LOG_LEVEL"):
        values.pop(name, None)
    return values


def start(words, *, cwd, env):
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*words, cwd, env):
    process = start(words, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def read_json(path):
    return json.loads(path.read_text())


def refused(result):
    code, _, err = result
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_train_without_data_and_network(tmp_path, env):
    words = [EXAMPLES / "train.py", "--limit_examples=320", "--epochs=1", "--workdir=run"]
    words += ["--model_options=widths=[8]", "--batch_size=32", "--augment=flip,crop:4", "--check"]
    code, out, err = run(*words, cwd=tmp_path, env=env)
    assert code == 0, err
    assert BANNER in err
    assert "320 standin images" in err
    assert "fast75 on standin: test accuracy" in out
    assert "pictures: " in out
    assert out.startswith("the training step was checked: ")
    # Nothing but the banner, the announcement and the progress: no noise of TensorFlow's.
    assert "oneDNN" not in err
    assert "Warning" not in err
    folder = tmp_path / "run"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    summary = read_json(folder / "summary.json")
    assert (summary["dataset"], summary["steps"], summary["step_traces"]) == ("standin", 10, 1)
    assert f"{summary['test_accuracy']:.4f}" in out
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.json",
        "metrics.jsonl",
        "metrics.csv",
        "test_outputs.npy",
        "test_labels.npy",
        "mistakes.npz",
        "summary.json",
        "checkpoints",
        "plots",
    }
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "model_eval.png",
        "history.png",
        "confusion_matrix.png",
        "mistakes.png",
        "reliability.png",
        "model.png",
    }


def test_custom_loop(tmp_path, env):
    words = [EXAMPLES / "custom_loop.py", "--data=standin", "--steps=3", "--check"]
    code, out, err = run(*words, cwd=tmp_path, env=env)
    assert code == 0, err
    assert BANNER in err
    assert out.startswith("the training step was checked: ")
    loss = re.search(r"^step 3: loss (\d+\.\d+)$", out, re.MULTILINE)
    assert 1.5 < float(loss[1]) < 4
    assert re.search(r"^standin: validation accuracy 0\.\d+ after 3 steps$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []
    assert "--steps must be a whole number >= 1, not 0" in refused(
        run(EXAMPLES / "custom_loop.py", "--steps=0", cwd=tmp_path, env=env)
    )


def test_show_augment(tmp_path, env):
    words = [EXAMPLES / "show_augment.py", "--data=standin", "--images=2", "--seed=4"]
    words += ["--augment=altflip,randaugment,mixup", "--out=new/some.png"]
    code, out, err = run(*words, cwd=tmp_path, env=env)
    assert code == 0, err
    assert BANNER in err
    assert out == "picture: new/some.png, 4 augmentations of standin, 2 draws of each\n"
    picture = tmp_path / "new" / "some.png"
    before = picture.read_bytes()
    assert before.startswith(b"\x89PNG")
    assert "--out must be a new file, and 'new/some.png' is there" in refused(
        run(*words, cwd=tmp_path, env=env)
    )
    assert picture.read_bytes() == before


def test_find_lr(tmp_path, env):
    words = [EXAMPLES / "find_lr.py", "--data=standin", "--limit_examples=640", "--steps=40"]
    words += ["--recipe=lab_mlp", "--model_options=units=8,activation=relu", "--low=1e-3"]
    code, out, err = run(*words, "--plot=rates.png", cwd=tmp_path, env=env)
    assert code == 0, err
    assert BANNER in err
    assert re.match(r" step +learning rate +loss +smoothed\n +1 +0\.001 +2\.\d+ ", out)
    said = r"the loss did not fall by more|lab_mlp on standin: the loss fell fastest at [\d.]+; a "
    assert re.search(said, out)
    assert out.endswith("picture: rates.png\n")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]


def test_find_batch_size(tmp_path, env):
    words = [EXAMPLES / "find_batch_size.py", "--data=standin", "--limit_examples=100"]
    words += ["--recipe=lab_mlp", "--model_options=units=8", "--seconds=0.01", "--largest=40"]
    code, out, err = run(*words, "--accumulate_steps=2", cwd=tmp_path, env=env)
    assert code == 0, err
    heading, row, largest, efficient = out.splitlines()
    assert heading.split() == ["batch", "size", "peak", "memory", "images/s"]
    assert re.fullmatch(r" +32 +0\.\d\d GiB +[\d,]+", row)
    # Of 100 images there is no larger one, so that the limit is not known.
    said = r"lab_mlp: the largest batch of those tried that fits into [\d.]+ GiB is 32"
    assert re.fullmatch(said, largest)
    assert efficient == "the smallest within 5 % of the best throughput is 32"
    assert list(tmp_path.iterdir()) == []


def test_notebook_benchmark(tmp_path, env):
    words = [ROOT / "benchmarks" / "notebook.py", "--data=standin", "--limit_examples=64"]
    words += ["--epochs=1", "--seeds=2", "--recipe=lab_batchnorm"]
    code, out, err = run(*words, cwd=tmp_path, env=env)
    assert code == 0, err
    *rows, last = out.splitlines()
    results = [json.loads(row) for row in rows]
    assert [result["seed"] for result in results] == [0, 1]
    mean = sum(result["test_accuracy"] for result in results) / 2
    assert "by Keras fit on standin" in last
    assert abs(float(re.search(r"test accuracy (0\.\d+) \(n=2\)", last)[1]) - mean) < 1e-3
    assert "--seeds must be a whole number >= 1, not 0" in refused(
        run(words[0], "--seeds=0", cwd=tmp_path, env=env)
    )


def test_lab(tmp_path, env):
    words = [EXAMPLES / "lab.py", "--data=standin", "--limit_examples=64", "--epochs=1"]
    words += ["--batch_size=32", "--workdir=lab", "--check"]
    code, out, err = run(*words, cwd=tmp_path, env=env)
    assert code == 0, err
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert "test accuracy (standin)" in table[0]
    recipes = ["lab_mlp", "lab_cnn", "lab_dropout", "lab_batchnorm", "lab_final"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1:]]
    assert [row[1] for row in cells] == recipes
    assert [row[0] for row in cells] == ["2", "3", "4.1", "4.2", "5"]
    assert [row[2] for row in cells] == [
        "1,707,274",
        "714,202",
        "714,202",
        "715,930",
        "1,856,650",
    ]
    assert [row[7] for row in cells] == ["0.485", "0.663", "0.653", "0.701", "0.758"]
    assert [row[8] for row in cells] == ["0.45", "0.62", "-", "-", "0.75"]
    folder = tmp_path / "lab"
    for name, row in zip(recipes, cells, strict=True):
        summary = read_json(folder / f"{name}-0" / "summary.json")
        assert summary["recipe"] == name
        assert row[6] == f"{summary['test_accuracy']:.3f}"
        assert (folder / f"{name}-0" / "plots" / "model_eval.png").exists()
    for name in ("random_from_each_class.png", "comparison.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    # A second run is refused and changes nothing.
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    line = refused(run(*words, cwd=tmp_path, env=env))
    assert "holds a run of this recipe already" in line
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_a_run_that_blows_up_and_the_command_that_replays_its_step(tmp_path, env):
    words = "--recipe=lab_mlp --data=standin --limit_examples=320 --epochs=3 --learning_rate=1e30"
    words += " --model_options=units=8,activation=relu --workdir=run --noplots"
    line = refused(run(EXAMPLES / "train.py", *words.split(), cwd=tmp_path, env=env))
    assert "the training loss became nan, which began in step 1, the first being 0: " in line
    assert "try a smaller learning_rate than 9.99999e+29; to run it again: python -m" in line
    command = shlex.split(line.partition("to run it again: python ")[2])
    assert command == ["-m", "cifarflow", "replay", "run/capsules/step_00000001"]
    code, out, err = run(*command, cwd=tmp_path, env=env)
    assert (code, err) == (0, "")
    first, then, now = out.splitlines()
    assert first == "step 1 of 'lab_mlp', seed 0, 32 images"
    assert then.startswith("then: loss nan; gradients not finite: 'dense/kernel'")
    assert now.removeprefix("now:  ") == then.removeprefix("then: ")


LONG = "--recipe=lab_mlp --data=standin --limit_examples=640 --epochs=40 --precision=float32"
LONG = [EXAMPLES / "train.py", *LONG.split(), "--augment=flip,crop:4", "--noplots"]
LONG += ["--model_options=units=[256,128],dropout=0.2", "--batch_size=16"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, env):
    folder = tmp_path_factory.mktemp("whole")
    code, _, err = run(*LONG, "--workdir=run", cwd=folder, env=env)
    assert code == 0, err
    return folder / "run"


def wait_until_training(process, workdir, rows):
    """Waits for rows of the log: then the process is inside its loop."""
    deadline = time.monotonic() + 120
    log = workdir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < rows:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on(tmp_path, env, uninterrupted, number):
    chosen = number == signal.SIGTERM
    words = [*LONG, *(["--workdir=run"] if chosen else [])]
    process = start(words, cwd=tmp_path, env=env)
    try:
        if not chosen:
            deadline = time.monotonic() + 120
            while not list(tmp_path.glob("runs/*")) and time.monotonic() < deadline:
                time.sleep(0.01)
        workdir = tmp_path / "run" if chosen else next(tmp_path.glob("runs/*"))
        wait_until_training(process, workdir, 7)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    step = int(re.search(r"interrupted after step (\d+): all is saved in", err)[1])
    total = read_json(uninterrupted / "summary.json")["steps"]
    assert 5 <= step < total
    assert (workdir / "checkpoints" / f"step_{step:08d}.npz").exists()
    assert not (workdir / "summary.json").exists()

    command = re.search(r"^to go on: python (.*)$", err, re.MULTILINE)[1]
    code, _, err = run(*shlex.split(command), cwd=tmp_path, env=env)
    assert code == 0, err
    ours, whole = (read_json(f / "summary.json") for f in (workdir, uninterrupted))
    for key in ("weights_sha256", "test_loss", "test_accuracy", "steps"):
        assert ours[key] == whole[key]

    def rows(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "images_per_second": None} for line in lines]

    assert rows(workdir) == rows(uninterrupted)
