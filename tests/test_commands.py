"""The command line: the list of commands, their help, what each prints, and how each ends."""

import configparser
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from own_flags import no_flags

import cifarflow
from cifarflow import __main__ as command_line
from cifarflow import cli
from cifarflow.commands import train
from cifarflow.errors import ConfigError
from cifarflow.recipes import records
from cifarflow.recipes.named import RECIPES
from cifarflow.recipes.options import parse_options
from cifarflow.recipes.recipe import MODELS, Recipe
from cifarflow.training.signals import TrainingInterrupted

ROOT = Path(__file__).resolve().parents[1]
FLAGS = flags.FLAGS
COMMANDS = list(command_line.COMMANDS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(here, monkeypatch, capfd):
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*words, argv0="/somewhere/cifarflow/__main__.py", columns=100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", [argv0, *words])
        with no_flags(), pytest.raises(SystemExit) as caught:
            command_line.main()
        code = caught.value.code
        return (0 if code is None else code), *capfd.readouterr()

    return run


def fine(result):
    """What a command that ended well has printed."""
    code, out, err = result
    assert (code, err) == (0, "")
    return out


# --- the list, the help -----------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_list_of_commands(call, words):
    out = fine(call(*words))
    for name, command in command_line.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_the_version(call):
    assert fine(call("--version")) == f"cifarflow {cifarflow.__version__}\n"


def test_each_command_is_a_module_and_each_module_a_command():
    files = {path.stem for path in (ROOT / "cifarflow" / "commands").glob("[a-z]*.py")}
    assert files == set(COMMANDS)
    for name, command in command_line.COMMANDS.items():
        module = importlib.import_module(f"cifarflow.commands.{name}")
        # What follows the command is what its main takes.
        words = module.main.__code__.co_argcount
        assert words == bool(command.words)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("how", [["{}", "--help"], ["{}", "-h"], ["help", "{}"]])
def test_help_of_a_command(call, name, how):
    out = fine(call(*(word.format(name) for word in how)))
    module = importlib.import_module(f"cifarflow.commands.{name}")
    assert out.startswith(f"usage: cifarflow {name}")
    assert module.__doc__.strip() in out
    # Every command shows how it is used.
    assert re.search(rf"^    cifarflow {name}", out, re.MULTILINE)
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize("columns", [40, 70, 200])
def test_help_is_as_wide_as_the_terminal(call, columns):
    lines = fine(call("train", "--help", columns=columns)).partition("flags:")[2].splitlines()
    assert max(map(len, lines)) <= max(columns, 40)
    assert len(lines) > 40


def test_train_has_the_flags_of_the_example(call):
    out = fine(call("train", "--help"))
    shown = re.findall(r"^  --(?:\[no\])?(\w+)", out, re.MULTILINE)
    run = ["data_dir", "workdir", "resume", "on_nonfinite", "check", "tensorboard", "profile"]
    run += ["strategy", "worker_timeout_seconds", "plots", "progress"]
    assert shown == ["recipe", *(field.name for field in cli.recipe_fields()), *run]
    assert "one of auto, float32, mixed_bfloat16, mixed_float16" in " ".join(out.split())
    assert "(default: fast75)" in " ".join(out.split())
    assert "show progress on stderr (default: on)" in out
    source = (ROOT / "examples" / "train.py").read_text()
    # One body: the example has none of its own.
    assert "train.define_flags()" in source
    assert "train_recipe" not in source
    assert train.main.__code__.co_argcount == 0


def test_what_needs_no_tensorflow_does_not_load_it(tmp_path):
    lines = [
        *([], ["--help"], ["--version"], ["trian"], ["recipes"], ["recipes", "fast94"]),
        *([name, "--help"] for name in COMMANDS),
        *(["train", "--epochs=nan"], ["train", "--nosuch"], ["train", "x"], ["replay"]),
        *(["evaluate"], ["report"], ["doctor", "--workdir="], ["data", "--data_dir="]),
    ]
    code = (
        "import contextlib, io, json, sys\n"
        "from cifarflow import __main__ as m\n"
        "from own_flags import no_flags\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['cifarflow', *words]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        with no_flags():\n"
        "            m.main()\n"
        "    loaded = {'tensorflow', 'keras', 'matplotlib'} & set(sys.modules)\n"
        "    assert not loaded, (words, loaded)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- bad input --------------------------------------------------------------------------------

BAD = [
    (["trian"], "one of train, evaluate, report, recipes, data, doctor, replay, not 'trian'"),
    (["trian"], "(did you mean train?)"),
    (["zzz"], "not 'zzz'\n"),
    ([""], "not ''"),
    (["--epochs=3"], "not '--epochs=3'"),
    (["x" * 9000], "xxx"),
    (["\x1b[31m"], "the command must be one of"),
    (["train", "lab_cnn"], "unexpected argument 'lab_cnn': options are written --name=value"),
    (["train", "--epochs=nan"], "epochs must be a finite number > 0, not nan"),
    (["train", "--recipe=lab"], "lab"),
    (["train", "--resume"], "--resume needs --workdir"),
    (["train", "--quick"], "quick"),
    (["train", "--model=vgg"], "vgg"),
    (["evaluate"], "evaluate must be given TARGET or two"),
    (["evaluate", "a", "b", "c"], "not ['a', 'b', 'c']"),
    (["evaluate", " "], "not [' ']"),
    (["evaluate", "a", "--split=train"], "train"),
    (["evaluate", "a", "--which=worst"], "worst"),
    (["evaluate", "a", "--tta=all"], "all"),
    (["evaluate", "a", "--image_size=0"], "image_size must be a whole number >= 1, not 0"),
    (["evaluate", "a", "--batch_size=0"], "--batch_size must be a whole number >= 1, not 0"),
    (["evaluate", "--epochs=3", "a"], "epochs"),
    (["report"], "report must be given WORKDIR ..., the folders of runs, not []"),
    (["report", ""], "not ['']"),
    (["report", "a", "--in=b"], "in"),
    (["recipes", "fast57"], "recipe must be one of lab_mlp, lab_cnn"),
    (["recipes", "fast75", "fast94"], "one NAME or none, not ['fast75', 'fast94']"),
    (["recipes", "--recipe=fast75"], "recipe"),
    (["data", "--data_dir= "], "--data_dir must be a path, not ' '"),
    (["data", "cifar10"], "unexpected argument 'cifar10'"),
    (["doctor", "--workdir="], "--workdir must be a path, not ''"),
    (["doctor", "--quick=perhaps"], "perhaps"),
    (["doctor", "me"], "unexpected argument 'me'"),
    (["replay"], "replay must be given FOLDER, the capsule of one step, not []"),
    (["replay", "a", "b"], "not ['a', 'b']"),
    (["replay", "no/such"], "no/such"),
    (["replay", "--resume", "a"], "resume"),
]


@pytest.mark.parametrize(("words", "quoted"), BAD)
def test_bad_command_lines(call, here, words, quoted):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert len(err) < 1200
    assert quoted in err
    assert list(here.iterdir()) == []


def test_every_command_has_bad_input():
    assert {words[0] for words, _ in BAD} >= set(COMMANDS)


# --- the process ------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The console script, as an installer writes it; in a folder of the PATH."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    path = tmp_path / "bin" / name
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    return path


def test_the_console_script(script, here, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for words, code, text in (
        (["cifarflow", "recipes", "fast94"], 0, "made for a test accuracy of 0.94"),
        (["cifarflow", "train", "--epochs=nan"], 2, "error: epochs must be"),
        ([sys.executable, "-m", "cifarflow", "trian"], 2, "did you mean train?"),
    ):
        done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert text in (done.stderr if code else done.stdout)
        assert not (code and done.stdout)
    assert list(here.iterdir()) == []


def test_the_program_that_is_started_again(script, monkeypatch, tmp_path):
    python = Path(sys.executable).name
    for argv0, words in (
        ("examples/train.py", [python, "examples/train.py"]),
        ("/a/b/cifarflow/__main__.py", [python, "-m", "cifarflow"]),
        (str(script), ["cifarflow"]),
        # One of that name that the shell would not find.
        (str(tmp_path / "other" / "cifarflow"), [str(tmp_path / "other" / "cifarflow")]),
    ):
        monkeypatch.setattr(sys, "argv", [argv0, "train", "--epochs=1"])
        assert cli.program() == words


TINY = "--data=standin --recipe=lab_mlp --model_options=units=8 --limit_examples=64 --epochs=1"
TINY = [*TINY.split(), "--noplots", "--noprogress"]


def test_train_interrupted_and_gone_on_with(call, here, script, monkeypatch):
    from cifarflow.recipes import run

    def stop(recipe, *, workdir, **options):
        raise TrainingInterrupted(7, Path(workdir) / "checkpoints" / "step_00000007.npz")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_recipe", stop)
        code, out, err = call("train", *TINY, argv0=str(script))
    assert (code, out) == (130, "")
    command = shlex.split(err.splitlines()[-1].removeprefix("to go on: "))
    name = command[-2]
    assert re.fullmatch(r"--workdir=runs/lab_mlp-[\d-]+", name)
    assert command == ["cifarflow", "train", *TINY, name, "--resume"]
    # There is nothing yet, so it starts.
    code, out, _ = call(*command[1:], argv0=str(script))
    assert code == 0
    assert "lab_mlp on standin: test accuracy" in out
    assert (here / name.removeprefix("--workdir=") / "summary.json").is_file()


def load(noise, error=None):
    """What a library writes while it loads, and how that ends."""
    with cli._quiet_import():
        os.write(2, noise)
        if error is not None:
            raise error


@pytest.mark.parametrize(("came", "status"), [([], 130), ([signal.SIGTERM], 143)])
def test_interrupted_while_tensorflow_loads(monkeypatch, capfd, came, status):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(cli, "_terminated", came)
    with pytest.raises(SystemExit) as caught:
        load(b"noise", KeyboardInterrupt)
    assert caught.value.code == status
    assert capfd.readouterr().err == "\ninterrupted\n"


def test_what_fails_while_tensorflow_loads_is_shown(capfd):
    with pytest.raises(ImportError):
        load(b"a library is missing\n", ImportError)
    assert capfd.readouterr().err == "a library is missing\n"
    load(b"noise")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("status", [None, 0, 1])
def test_a_main_may_say_how_it_ends(status):
    with no_flags(), pytest.raises(SystemExit) as caught:
        cli.run(lambda: status, argv=["x"])
    assert (caught.value.code or 0) == (status or 0)


def test_flags_may_stand_behind_words():
    seen = []

    def main(words):
        seen.append((words, FLAGS.some))

    with no_flags():
        flags.DEFINE_integer("some", 0, "")
        with pytest.raises(SystemExit):
            cli.run(main, argv=["x", "a", "--some=3", "b", "--", "--c"])
    assert seen == [(["a", "b", "--c"], 3)]


# --- recipes ----------------------------------------------------------------------------------


def test_every_recipe_has_a_record():
    assert [*records.PARAMETERS] == [*RECIPES]
    assert {record.recipe for record in records.RECORDS} == set(RECIPES)
    assert set(records.AIMS) <= set(RECIPES)
    for record in records.RECORDS:
        assert 0.3 < record.accuracy < 1
        assert record.seconds > 0
        assert re.fullmatch(r"2026-\d\d-\d\d", record.date)
        assert (record.deviation is None) or record.runs > 1
        assert record.epochs != RECIPES[record.recipe].epochs
        assert record in records.records_of(record.recipe)
    with pytest.raises(ConfigError, match=r"recipe must be one of lab_mlp, .*, not 'mine'"):
        records.records_of("mine")


@pytest.mark.parametrize("name", RECIPES)
def test_the_parameters_of_record_are_the_models(name):
    from cifarflow.recipes.build import build_model

    model = build_model(RECIPES[name], image_shape=(32, 32, 3), num_classes=10)
    assert model.count_params() == records.PARAMETERS[name]


def test_every_model_of_a_recipe_has_a_builder():
    from cifarflow.recipes.build import BUILDERS, SET_FROM_IMAGES

    assert tuple(BUILDERS) == MODELS
    assert set(SET_FROM_IMAGES) <= set(MODELS)


def test_the_figures_of_record_are_the_same():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert [r for r in records.RECORDS if f"{r.accuracy:.4f}" not in text] == []


@pytest.mark.parametrize("columns", [40, 60, 80, *range(116, 132, 3), 200])
def test_the_recipes_in_any_width(call, columns):
    out = fine(call("recipes", columns=columns))
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(re.search(rf"^{name}\b", out, re.MULTILINE) for name in RECIPES)
    words = " ".join(out.split())
    for record in records.RECORDS:
        spread = "" if record.deviation is None else f" ± {record.deviation:.4f}"
        assert f"{record.accuracy:.4f}{spread}" in words
        assert record.machine in words
    # A line each where there is room for the whole of it.
    assert "…" not in out
    is_table = "parameters  epochs  batch" in out
    assert is_table or columns < 131
    assert not is_table or columns > 116
    if is_table:
        assert lines.index("") == 1 + len(records.RECORDS)
        assert re.search(r"^ {20,}16 {20,}0.9502", out, re.MULTILINE)


@pytest.mark.parametrize("name", RECIPES)
def test_one_recipe(call, name):
    out = fine(call("recipes", name, columns=90))
    recipe, plain = RECIPES[name], Recipe("plain")
    shown = re.findall(r"^  (\w+)  ", out.partition("differs from the defaults:\n")[2], re.M)
    differing = [
        field.name
        for field in cli.recipe_fields()
        if getattr(recipe, field.name) != getattr(plain, field.name)
    ]
    assert shown == differing
    assert out.endswith(f"\nto run it:\n  cifarflow train --recipe={name}\n")
    assert max(map(len, out.splitlines())) <= 90


def test_values_are_shown_as_flags_take_them(call):
    out = fine(call("recipes", "fast96", columns=200))
    options = re.search(r"^  model_options +(.*?) *$", out, re.MULTILINE)[1]
    assert parse_options(options) == {
        "widths": [128, 384, 512],
        "convs_per_block": 3,
        "residual": True,
        "batch_norm_momentum": 0.9,
    }
    assert re.search(r"^  freeze +whitening/bias=3 *$", out, re.MULTILINE)
    assert re.search(r"^  scaled_velocity +false *$", out, re.MULTILINE)


# --- data, report, evaluate: with what they call pretended ------------------------------------


def pretend(monkeypatch, name, **attributes):
    """Puts a module of such a name and such attributes in place."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


# Nothing that a terminal obeys gets through to it.
ODD = Path("some/where\x1b[31m\n")


def source(place, state, **more):
    about = {"data": "cifar10", "path": Path("some/where"), "format": "", "examples": 0}
    about |= {"is_taken": False, "reason": ""}
    return types.SimpleNamespace(place=place, state=state, **{**about, **more})


@pytest.mark.parametrize(
    ("words", "sources", "status"),
    [
        ([], [source("CIFARFLOW_DATA", "verified", examples=60_000, is_taken=True)], 0),
        ([], [source("the project's cache", "not found", path=ODD)], 0),
        ([], [source("the project's cache", "damaged", reason="its \x1b[31m sum is off")], 1),
        (["--data_dir=x"], [source("data_dir", "not found", reason="holds none")], 1),
        (
            ["--data_dir=x"],
            [source("data_dir", "verified"), source("data_dir", "not found", data="cifar100")],
            0,
        ),
    ],
)
def test_data(call, monkeypatch, words, sources, status):
    asked = []

    def find_data(data_dir):
        asked.append(data_dir)
        return sources

    names = {"VERIFIED": "verified", "DAMAGED": "damaged", "find_data": find_data}
    pretend(monkeypatch, "cifarflow.data.inspect", **names)
    code, out, err = call("data", *words)
    assert (code, err) == (status, "")
    assert asked == ["x" if words else None]
    for each in sources:
        assert re.search(rf"^  [* ]  {each.place} +{each.state}  some/where", out, re.MULTILINE)
        assert re.search(rf"^{each.data}$", out, re.MULTILINE)
    assert "\x1b" not in out
    assert ("* " in out.replace("* what", "")) == any(each.is_taken for each in sources)
    assert ("60,000 images" in out) == bool(sources[0].examples)


def test_report(call, monkeypatch):
    asked = []

    def write_report(workdirs, out):
        asked.append((workdirs, out))
        return Path("a/report.html")

    pretend(monkeypatch, "cifarflow.reporting.report", write_report=write_report)
    assert fine(call("report", "a")) == "the report is a/report.html\n"
    fine(call("report", "a", "--out=c.html", "b"))
    assert asked == [(["a"], None), (["a", "b"], "c.html")]


PLAIN = Recipe("lab_cnn", data="standin")


@pytest.fixture
def models(monkeypatch):
    """Pretends models and data: names whose recipe is in this mapping are runs."""
    runs = {"a": PLAIN, "b": PLAIN}
    asked = []

    def load_trained(workdir, *, which):
        asked.append(("run", workdir, which))
        about = types.SimpleNamespace(model=workdir, recipe=runs[workdir])
        about.describe = lambda: f"{runs[workdir].name}, step 3\x1b[31m"
        return about

    def load_model_file(path):
        asked.append(("file", path))
        return path

    def evaluate_model(model, split, *, num_classes, batch_size, tta, tta_share):
        asked.append(("evaluate", model, len(split), num_classes, batch_size, tta, tta_share))
        probabilities = np.full((len(split), 3), 0.25, np.float32)
        # The file's model is always right, a run's one says class 0.
        classes = split.labels if model.endswith(".keras") else np.zeros_like(split.labels)
        probabilities[np.arange(len(split)), classes] = 0.5
        right = float((probabilities.argmax(-1) == split.labels).mean())
        return types.SimpleNamespace(loss=1.25, accuracy=right, probabilities=probabilities)

    def mcnemar(labels, first, second, *, names):
        better = names[int((second == labels).sum() > (first == labels).sum())]
        return types.SimpleNamespace(verdict=f"{better!r} is better")

    def load_recipe_data(recipe, *, data_dir):
        from cifarflow.data.splits import Dataset, Split

        asked.append(("data", recipe.data, recipe.image_size, data_dir))

        def split(count):
            images = np.zeros((count, 4, 4, 3), np.uint8)
            return Split(images, (np.arange(count) % 3).astype(np.int32))

        return Dataset("some", split(9), split(6), split(12), ("cat", "dog", "ox"), "made")

    from cifarflow.recipes import build

    monkeypatch.setattr(build, "load_recipe_data", load_recipe_data)
    pretend(monkeypatch, "cifarflow.recipes.trained", load_trained=load_trained)
    pretend(monkeypatch, "cifarflow.evaluation.model_files", load_model_file=load_model_file)
    pretend(monkeypatch, "cifarflow.evaluation.evaluate", evaluate_model=evaluate_model)
    pretend(monkeypatch, "cifarflow.evaluation.comparison", mcnemar=mcnemar)
    return runs, asked


def test_evaluate_one_run(call, models):
    out = fine(call("evaluate", "a"))
    _, asked = models
    assert asked == [
        ("run", "a", "last"),
        ("data", "standin", 32, None),
        ("evaluate", "a", 6, 3, 500, "none", 1.0),
    ]
    assert out.splitlines()[:2] == [
        "a: lab_cnn, step 3\\x1b[31m",
        "on 6 validation images of some",
    ]
    assert re.search(r"^  accuracy +0.3333$", out, re.MULTILINE)
    assert re.search(r"^  loss +1.2500$", out, re.MULTILINE)
    # Of three classes there is no top 3.
    assert re.findall(r"^  (top-\d) accuracy +\d\.\d{4}$", out, re.MULTILINE) == ["top-2"]
    assert re.search(r"^  calibration error +0\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^  dog +- +0.000 *$", out, re.MULTILINE)
    assert "better" not in out


def test_evaluate_two(call, models):
    words = ["--split=test", "--which=best", "--tta=mirror", "--batch_size=7", "--data_dir=d"]
    out = fine(call("evaluate", "a", *words, "b.keras"))
    _, asked = models
    assert asked == [
        ("run", "a", "best"),
        ("file", "b.keras"),
        ("data", "standin", 32, "d"),
        ("evaluate", "a", 12, 3, 7, "mirror", 1.0),
        ("evaluate", "b.keras", 12, 3, 7, "mirror", 1.0),
    ]
    assert "on 12 test images of some" in out
    assert re.search(r"^  accuracy +0.3333 +1.0000$", out, re.MULTILINE)
    assert out.endswith("\n'b.keras' is better\n")


def test_evaluate_a_file_on_data_that_is_named(call, models):
    fine(call("evaluate", "b.keras", "--data=folder", "--image_size=64"))
    _, asked = models
    assert asked[1:] == [
        ("data", "folder", 64, None),
        ("evaluate", "b.keras", 6, 3, 500, "none", 1.0),
    ]


def test_evaluate_does_what_the_run_did_at_its_end(call, models):
    runs, asked = models
    runs["a"] = Recipe("fast75", data="standin", tta="mirror", tta_share=0.25)
    for words, expected in (((), ("mirror", 0.25)), (["--tta=multicrop"], ("multicrop", 1.0))):
        fine(call("evaluate", "a", *words))
        assert asked[-1][-2:] == expected


@pytest.mark.parametrize(
    ("words", "fields", "quoted"),
    [
        (["a"], {"validation_fraction": 0.0}, "'a' is a run that held no validation images out"),
        (["b", "a"], {"validation_fraction": 0.1}, "validation_fraction=0.2 and 0.1"),
        (["b", "a"], {"validation_split": "stratified"}, "validation_split=last and stratified"),
        (["b", "a"], {"limit_examples": 9}, "limit_examples=0 and 9"),
        (["b", "a", "--split=test"], {"data": "cifar10"}, "data=standin and cifar10"),
    ],
)
def test_evaluate_on_images_that_were_trained_on(call, models, words, fields, quoted):
    runs, _ = models
    runs["a"] = Recipe("lab_cnn", **{"data": "standin", **fields})
    code, out, err = call("evaluate", *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert quoted in err
    if words[0] != "a":
        assert "'b' and 'a' must be measured on the same images" in err
    runs["a"] = Recipe("lab_cnn", data="standin", validation_fraction=0.0, tta="mirror")
    out = fine(call("evaluate", "b", "a", "--split=test"))
    assert [each[-2] for each in models[1] if each[0] == "evaluate"][-2:] == ["none", "mirror"]


def test_evaluate_on_images_of_two_sizes(call, models):
    runs, _ = models
    runs |= {
        name: Recipe("lab_cnn", data="folder", image_size=s) for name, s in (("a", 32), ("b", 64))
    }
    code, out, err = call("evaluate", "a", "b", "--split=test")
    assert (code, out) == (2, "")
    assert "'a' and 'b' must be measured on the same images, not with image_size=32" in err


def test_the_pictures_of_a_terminal_have_no_markup(call, models):
    # A name that rich would take for a style.
    runs, _ = models
    runs["[red]a[/]"] = PLAIN
    assert "[red]a[/]: " in fine(call("evaluate", "[red]a[/]"))


# --- with what they call for true -------------------------------------------------------------


def test_true_runs(call, here):
    accuracies = []
    for seed in (0, 1):
        words = ["--tta=mirror", "--tta_share=0.25", f"--seed={seed}", f"--workdir=run{seed}"]
        code, out, _ = call("train", *TINY, *words)
        assert code == 0
        summary = json.loads((here / f"run{seed}" / "summary.json").read_text())
        accuracies.append(f"{summary['test_accuracy']:.4f}")
    code, out, err = call("evaluate", "run0", "run1", "--split=test")
    assert code == 0, err
    assert re.search(rf"^  accuracy +{accuracies[0]} +{accuracies[1]}$", out, re.MULTILINE)
    assert "'run0'" in out.splitlines()[-1] + out.splitlines()[-2]
    refused = call("evaluate", "run0/recipe.json")
    said = "TARGET must be a run's folder or a .keras file, not 'run0/recipe.json'"
    assert (refused[0], said in refused[2]) == (2, True)
    code, out, err = call("evaluate", "run0", "nowhere")
    assert (code, out) == (2, "")
    assert "'nowhere'" in err
    code, out, err = call("evaluate", "nowhere.keras")
    assert (code, out) == (2, "")
    assert "'nowhere.keras'" in err
    assert fine(call("report", "run0", "run1", "--out=both.html")).endswith("both.html\n")
    assert (here / "both.html").stat().st_size > 10_000
    assert call("report", "run0", "run0")[0] == 2


def test_true_data(call, here):
    code, out, err = call("data")
    assert (code, err) == (0, "")
    assert "standin" in out
    code, out, err = call("data", "--data_dir=nowhere")
    assert (code, err) == (1, "")
    assert "nowhere" in out
