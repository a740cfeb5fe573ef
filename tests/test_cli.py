"""The runners' common part: flags from fields, clear endings, the command to go on."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver

from cifarflow import cli
from cifarflow.errors import CheckpointError, ConfigError, DataNotFoundError, WorkdirError
from cifarflow.recipes.named import RECIPES
from cifarflow.recipes.options import parse_options
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.loop import Run, TrainingInterrupted

ROOT = Path(__file__).resolve().parents[1]
FLAGS = flags.FLAGS
PYTHON = Path(sys.executable).name
FIELDS = [field.name for field in dataclasses.fields(Recipe) if field.name != "name"]


@pytest.fixture(scope="module")
def train_module():
    """examples/train.py, whose import defines the flags in this process."""
    spec = importlib.util.spec_from_file_location("train_example", ROOT / "examples" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(train_module, here, monkeypatch, capfd):
    """Runs a main with a command line; returns exit status, stdout and stderr."""

    def run(*words, main=train_module.main):
        monkeypatch.setattr(sys, "argv", ["examples/train.py", *words])
        saved = flagsaver.save_flag_values()
        try:
            with pytest.raises(SystemExit) as caught:
                cli.run(main)
        finally:
            flagsaver.restore_flag_values(saved)
        code = caught.value.code
        return (0 if code is None else code), *capfd.readouterr()

    return run


def complaint(result):
    """The one line of a run that was refused."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err


def test_a_flag_for_each_field(train_module):
    assert [field.name for field in cli.recipe_fields()] == FIELDS
    for field in cli.recipe_fields():
        flag = FLAGS[field.name]
        # Not given means: as the recipe has it.
        assert flag.default is None
        assert flag.help.endswith(field.metadata["help"])
        if field.metadata["choices"]:
            assert tuple(flag.parser.enum_values) == field.metadata["choices"]
    named = "recipe data data_dir epochs batch_size learning_rate precision jit_compile augment"
    for name in f"{named} seed limit_examples workdir resume".split():
        assert name in FLAGS


GIVEN = {
    "model": ("mlp", "mlp"),
    "model_options": ("units=[8,4],activation=relu", {"units": (8, 4), "activation": "relu"}),
    "data": ("folder", "folder"),
    "image_size": ("48", 48),
    "validation_fraction": ("0.5", 0.5),
    "validation_split": ("stratified", "stratified"),
    "limit_examples": ("100", 100),
    "batch_size": ("8", 8),
    "accumulate_steps": ("2", 2),
    "eval_batch_size": ("9", 9),
    "epochs": ("12.5", 12.5),
    "patience_epochs": ("3", 3),
    "learning_rate": ("1e-3", 0.001),
    "learning_rate_examples": ("64", 64),
    "learning_rate_scales": ("beta=2,logits/kernel=0.5", {"beta": 2.0, "logits/kernel": 0.5}),
    "optimizer": ("muon", "muon"),
    "muon_momentum": ("0.7", 0.7),
    "momentum": ("0.5", 0.5),
    "nesterov": ("false", False),
    "scaled_velocity": ("false", False),
    "schedule": ("piecewise", "piecewise"),
    "decay": ("0", 0.0),
    "warmup_epochs": ("1", 1.0),
    "drop_epochs": ("3,4.5", (3.0, 4.5)),
    "drop_factor": ("0.2", 0.2),
    "start_fraction": ("0.1", 0.1),
    "peak_fraction": ("0.3", 0.3),
    "end_fraction": ("0", 0.0),
    "freeze": ("whitening/bias=0.5,beta=2", {"whitening/bias": 0.5, "beta": 2.0}),
    "l2": ("0.01", 0.01),
    "weight_decay": ("0.02", 0.02),
    "decay_biases": ("true", True),
    "clip_norm": ("1", 1.0),
    "label_smoothing": ("0.1", 0.1),
    "augment": ("flip,crop:2", "flip,crop:2"),
    "averaging": ("ema", "ema"),
    "tta": ("mirror", "mirror"),
    "tta_share": ("0.5", 0.5),
    "precision": ("float32", "float32"),
    "jit_compile": ("true", "true"),
    "seed": ("7", 7),
}


def test_each_flag_reaches_the_recipe(call):
    assert list(GIVEN) == FIELDS
    seen = []
    words = [f"--{name}={text}" for name, (text, _) in GIVEN.items()]
    code, _, err = call(
        "--recipe=lab_final", *words, main=lambda: seen.append(cli.recipe_from_flags())
    )
    assert (code, err) == (0, "")
    assert seen[0].name == "lab_final"
    for name, (_, value) in GIVEN.items():
        assert getattr(seen[0], name) == value


def test_no_flags_leave_the_recipe_alone(call):
    seen = []
    call(main=lambda: seen.append(cli.recipe_from_flags()))
    call("--recipe=lab_mlp", main=lambda: seen.append(cli.recipe_from_flags()))
    assert seen == [RECIPES["fast75"], RECIPES["lab_mlp"]]


@pytest.mark.parametrize("name", [*FIELDS, "recipe"])
def test_nonsense_in_each_flag(call, here, name):
    line = complaint(call(f"--{name}=non!sense"))
    assert "non!sense" in line
    assert name in line or name == "nesterov"
    assert list(here.iterdir()) == []


NUMBERS = "validation_fraction batch_size eval_batch_size epochs learning_rate momentum decay "
NUMBERS += "warmup_epochs drop_factor l2 weight_decay clip_norm label_smoothing seed limit_examples"


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
@pytest.mark.parametrize("name", NUMBERS.split())
def test_numbers_out_of_range(call, here, name, value):
    line = complaint(call(f"--{name}={value}"))
    assert name in line
    assert value in line
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--batch_size=0"], "batch_size must be a whole number >= 1, not 0"),
        (["--epochs=0"], "epochs must be a finite number > 0, not 0.0"),
        (["--learning_rate=0"], "learning_rate must be a finite number > 0, not 0.0"),
        (["--momentum=1"], "momentum must be a finite number >= 0 and < 1, not 1.0"),
        (["--nosuch=1"], "nosuch"),
        (["lab_final"], "unexpected argument 'lab_final': options are written --name=value"),
        (["--resume"], "--resume needs --workdir"),
        (["--workdir="], "--workdir must be a path, not ''"),
        (["--data_dir= "], "--data_dir must be a path, not ' '"),
        (["--drop_epochs=1,x"], "--drop_epochs must be numbers joined by commas, not '1,x'"),
        (["--drop_epochs=2"], "drop_epochs must be given for schedule=piecewise"),
        (["--model_options=units"], "key=value,..., each key once, or a JSON object, not 'units'"),
        (["--model_options=units=8,units=9"], "each key once"),
        (["--model_options={"], "key=value,..., each key once, or a JSON object, not '{'"),
        (["--augment=crop:0"], "augment crop must be a whole number >= 1, not '0'"),
        (["--seed=2147483648"], "seed must be at most 2147483647, not 2147483648"),
    ],
)
def test_bad_command_lines(call, here, words, quoted):
    assert quoted in complaint(call(*words))
    assert list(here.iterdir()) == []


@pytest.fixture(scope="module")
def standin_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("standin")


@pytest.fixture
def standin(standin_folder, monkeypatch):
    monkeypatch.setenv("CIFARFLOW_CACHE", str(standin_folder))


TINY = "--data=standin --recipe=lab_mlp --model_options=units=8 --limit_examples=64 --epochs=1"
TINY = [*TINY.split(), "--noplots", "--noprogress"]


def last_line(result):
    """The complaint of a run that had its data already, and so the banner before it."""
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--batch_size=65"], "batch_size must be at most the 64 training examples, not 65"),
        (["--limit_examples=8001"], "limit_examples must be at most the 8000"),
        (["--augment=crop:32"], "crop padding must be smaller than the image side 32, not 32"),
        (
            ["--model_options=unit=8"],
            "one of activation, dropout, l2, units, not 'unit'",
        ),
        (["--model_options=units=8,oops"], "'8,oops'"),
        (["--model_options=units=0"], "units must be"),
    ],
)
def test_what_does_not_fit_the_data(call, here, standin, words, quoted):
    assert quoted in last_line(call(*TINY, *words))
    assert list(here.iterdir()) == []


def test_data_that_is_not_there(call, here):
    line = complaint(call("--data=cifar10", "--data_dir=nowhere"))
    assert "nowhere" in line
    assert list(here.iterdir()) == []


def test_a_run_and_another_into_the_same_folder(call, here, standin):
    code, out, err = call(*TINY, "--workdir=run")
    assert code == 0
    assert "STAND-IN DATA" in err
    assert "lab_mlp on standin: test accuracy" in out
    assert out.rstrip().endswith("run")
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert "holds a run of this recipe already" in last_line(call(*TINY, "--workdir=run"))
    refused = last_line(call(*TINY, "--workdir=run", "--resume", "--seed=3"))
    assert "seed=0, not 3" in refused
    unwritable = last_line(call(*TINY, "--workdir=run/recipe.json"))
    assert "cannot write to workdir 'run/recipe.json'" in unwritable
    code, again, _ = call(*TINY, "--workdir=run", "--resume")
    assert (code, again) == (0, out)
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


def test_a_profile_before_training(call, here, standin):
    code, out, _ = call(*TINY, "--workdir=run", "--profile")
    assert code == 0
    assert out.startswith("where the time of a step goes, on ")
    kept = here / "run" / "profile"
    verdict = json.loads((kept / "profile.json").read_text())["verdict"]
    assert f"\n{verdict}\nthe trace is in run/profile: " in out
    assert call(*TINY, "--workdir=plain")[0] == 0
    hashes = {
        json.loads((here / name / "summary.json").read_text())["weights_sha256"]
        for name in ("run", "plain")
    }
    assert len(hashes) == 1
    before = (kept / "trace.json.gz").read_bytes()
    code, out, _ = call(*TINY, "--workdir=run", "--profile", "--resume")
    assert code == 0
    assert out.startswith("the run has a profile already, in run/profile: it stays")
    assert (kept / "trace.json.gz").read_bytes() == before


def test_a_loss_that_is_not_finite(call, standin):
    words = ["--learning_rate=1e30", "--workdir=run", "--model_options=units=8,activation=relu"]
    assert "the training loss became" in last_line(call(*TINY, *words))


def test_skipped_steps_are_printed(capsys):
    numbers = dict.fromkeys(("test_accuracy", "test_loss", "epochs", "train_seconds"), 1.0)
    texts = dict.fromkeys(("recipe", "dataset", "precision", "device", "weights_sha256"), "x")
    summary = {**numbers, **texts, "images_per_second": 9.0, "examples": {"test": 3}, "steps": 40}
    for skipped in (0, 3):
        cli.print_summary(Run(None, None, {**summary, "skipped_steps": skipped}))
        out = capsys.readouterr().out
        assert ("3 of 40 steps were skipped" in out) == bool(skipped)
    for key in texts:
        cli.print_summary(Run(None, None, {**summary, key: "a\x1b[31m\nb"}))
        assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())


def test_a_new_workdir_by_default(call, here, standin):
    assert call(*TINY)[0] == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("lab_mlp-")
    assert (folder / "summary.json").exists()


@pytest.mark.parametrize("error", [ConfigError, DataNotFoundError, WorkdirError, CheckpointError])
def test_our_errors_end_in_one_line(call, error):
    def main():
        raise error("first\n  second")

    assert complaint(call(main=main)) == "error: first second\n"


def test_interrupted(call, monkeypatch):
    def main():
        cli.run_options_from_flags("lab_cnn")
        raise TrainingInterrupted(7, Path("some where/checkpoints/step_00000007.npz"))

    code, out, err = call("--workdir=some where", "--epochs=2", main=main)
    assert (code, out) == (130, "")
    assert "interrupted after step 7: all is saved in some where" in err
    assert (
        f"to go on: {PYTHON} examples/train.py '--workdir=some where' --epochs=2 --resume\n" in err
    )

    def unsaved():
        raise TrainingInterrupted(7, None)

    code, _, err = call(main=unsaved)
    assert code == 130
    assert "nothing was saved" in err
    assert "to go on" not in err

    def early():
        raise KeyboardInterrupt

    code, _, err = call(main=early)
    assert (code, err) == (130, "\ninterrupted\n")

    def begun():
        workdir = Path(cli.run_options_from_flags("lab_cnn")["workdir"])
        workdir.mkdir()
        (workdir / "recipe.json").touch()
        raise KeyboardInterrupt

    code, _, err = call("--workdir=begun", main=begun)
    assert code == 130
    assert f"to go on: {PYTHON} examples/train.py --workdir=begun --resume\n" in err
    # The library finds this one in the home folder, here the current one.
    monkeypatch.setenv("HOME", os.getcwd())

    def at_home():
        cli.run_options_from_flags("lab_cnn")
        raise KeyboardInterrupt

    code, _, err = call("--workdir=~/begun", main=at_home)
    assert code == 130
    assert f"to go on: {PYTHON} examples/train.py '--workdir=~/begun' --resume\n" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workdir=w"], "--workdir=w --resume"),
        (["--workdir", "w", "--resume"], "--workdir w --resume"),
        (["--resume=true", "--workdir=w"], "--workdir=w --resume"),
        (["--noresume", "--workdir=w"], "--noresume --workdir=w --resume"),
        (['--model_options={"units": [8]}', "--workdir=w"], None),
    ],
)
def test_the_command_to_go_on(call, words, expected):
    seen = []
    call(*words, main=lambda: (cli.run_options_from_flags("x"), seen.append(cli.resume_command())))
    if expected is None:
        expected = "'--model_options={\"units\": [8]}' --workdir=w --resume"
    assert seen == [f"{PYTHON} examples/train.py {expected}"]


def test_the_command_to_go_on_names_a_folder_that_nobody_chose(call):
    seen = []

    def main():
        seen.append(cli.run_options_from_flags("lab")["workdir"])
        seen.append(cli.resume_command())

    call(main=main)
    workdir, command = seen
    assert workdir.startswith("runs/lab-")
    assert command == f"{PYTHON} examples/train.py --workdir={workdir} --resume"


def test_run_options(call):
    seen = []

    def main():
        seen.append(cli.run_options_from_flags("x"))

    call("--workdir=w", "--resume", "--data_dir=d", "--tensorboard", main=main)
    call("--workdir=w", "--noprogress", "--profile", "--check", "--on_nonfinite=skip", main=main)
    call("--strategy=mirrored", "--worker_timeout_seconds=7", main=main)
    assert seen[0] == {
        "workdir": "w",
        "resume": True,
        "data_dir": "d",
        "on_nonfinite": "stop",
        "check": False,
        "tensorboard": True,
        "profile": None,
        "progress": cli.Progress,
        "strategy": "none",
        "worker_timeout_seconds": 60.0,
    }
    assert seen[1]["progress"] is None
    assert seen[1]["profile"] is print
    assert not seen[1]["resume"]
    assert (seen[1]["check"], seen[1]["on_nonfinite"]) == (True, "skip")
    assert (seen[2]["strategy"], seen[2]["worker_timeout_seconds"]) == ("mirrored", 7.0)


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["--worker_timeout_seconds=0"], "--worker_timeout_seconds must be a finite number > 0"),
        (["--strategy=mirrored", "--profile"], "--profile needs --strategy=none, not mirrored"),
        (["--strategy=multiworker"], "TF_CONFIG must be JSON, not 'x'"),
    ],
)
def test_options_of_a_team(call, monkeypatch, words, quoted):
    monkeypatch.setenv("TF_CONFIG", "x")
    assert quoted in complaint(call(*words))


def test_several_workers_are_refused(call):
    def main():
        cli.refuse_several_workers("some.py")

    assert call("--strategy=mirrored", main=main)[0] == 0
    line = complaint(call("--strategy=multiworker", main=main))
    assert "--strategy must be none or mirrored for some.py, which has several runs" in line


def test_the_workers_meet_before_the_data_is_read(call, monkeypatch):
    from cifarflow.recipes import run

    came = []

    def open_team(strategy, *, worker_timeout_seconds):
        came.append(strategy)

    def load_recipe_data(recipe, *, data_dir):
        came.append(data_dir)
        raise DataNotFoundError("none")

    monkeypatch.setattr(run, "open_team", open_team)
    monkeypatch.setattr(run, "load_recipe_data", load_recipe_data)
    assert last_line(call("--strategy=mirrored", "--data_dir=d")) == "error: none"
    assert came == ["mirrored", "d"]


def test_a_cluster_is_read_without_tensorflow():
    code = (
        "import sys; from cifarflow import cli; from cifarflow.training import cluster; "
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("units=8", {"units": 8}),
        ("units=[8,4],dropout=0.5", {"units": [8, 4], "dropout": 0.5}),
        (" a = relu , b=true,c=null", {"a": "relu", "b": True, "c": None}),
        ('{"filters": [4, 8], "pooling": "max"}', {"filters": [4, 8], "pooling": "max"}),
        ("{}", {}),
        ("name=a=b", {"name": "a=b"}),
    ],
)
def test_parse_options(text, expected):
    parsed = parse_options(text)
    stripped = {k: v.strip() if isinstance(v, str) else v for k, v in parsed.items()}
    assert stripped == expected


@pytest.mark.parametrize("text", ["", "units", "=8", "{", "{1}", '{"a":', ",", "units 8"])
def test_options_that_are_none(text):
    with pytest.raises(ConfigError, match="a JSON object, not") as caught:
        parse_options(text)
    assert repr(text) in str(caught.value)


def test_a_bug_keeps_its_traceback(tmp_path):
    code = "from cifarflow import cli\ndef main():\n    raise RuntimeError('a bug')\ncli.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: a bug")
    assert "error:" not in done.stderr.replace("RuntimeError:", "")


def test_the_readme_names_every_flag():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    names = [field.name for field in cli.recipe_fields()]
    names += ["recipe", "data_dir", "workdir", "resume", "tensorboard", "profile", "plots"]
    names += ["progress"]
    assert [name for name in names if f"--{name}" not in text] == []
