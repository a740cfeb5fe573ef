"""The command lines of the benchmarks: defaults, and what is refused before anything runs."""

import functools
import importlib
import importlib.util
import json
import re
import sys

import benchmark_suite  # noqa: F401
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver

# isort: split
import harness
import nets

from cifarflow import cli

SCRIPTS = ("step_time", "input_pipeline", "memory")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(here, monkeypatch, capfd):
    """Runs a script's main in this process; returns exit status, stdout and stderr."""
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])
    find_spec = importlib.util.find_spec
    # Of the peers one is not there, whatever this machine has.
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "torch" else find_spec(name, package),
    )
    # Flags are of the whole process: another script's may have the same names.
    for kind in ("boolean", "enum", "float", "integer", "string"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), allow_override=True)
        monkeypatch.setattr(flags, f"DEFINE_{kind}", define)

    def run(script, *words, main=None):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *words])
        saved = flagsaver.save_flag_values()
        try:
            module.define_flags()
            with pytest.raises(SystemExit) as caught:
                cli.run(main or module.main)
        finally:
            # This takes away the flags that are new, too.
            flagsaver.restore_flag_values(saved)
        return caught.value.code, *capfd.readouterr()

    return run


def settings_and_plan(call, script, *words):
    """What a command line asks for."""
    found = []

    def main():
        settings = harness.settings_from_flags()
        found.extend([settings, importlib.import_module(script).plan_from_flags(settings)])

    code, _, err = call(script, *words, main=main)
    assert not code, err
    return found


BAD = [
    ("step_time", "--models=lab_mlp,vgg", "--models must be one of lab_mlp, .*, not 'vgg'"),
    ("step_time", "--compare=caffe", "--compare must be one of none, all, .*, not 'caffe'"),
    (
        "step_time",
        "--compare=keras,torch",
        r'--compare=keras,torch: torch is not installed: pip install "\.\[compare\]"',
    ),
    ("step_time", "--batch_sizes=0", "--batch_sizes must be a whole number >= 1, not 0"),
    ("step_time", "--starts=0", "--starts must be a whole number >= 1, not 0"),
    ("step_time", "--starts=x", "flag --starts=x: .*'x'"),
    ("input_pipeline", "--ways=copy,dali", "--ways must be one of .*, not 'dali'"),
    ("input_pipeline", "--batch_sizes=32,0", "--batch_sizes must be a whole number >= 1, not 0"),
    ("memory", "--model=vgg", "--model must be one of lab_mlp, .*, not 'vgg'"),
    ("memory", "--precision=half", r"flag --precision=half: value should be one of <auto\|.*>"),
    ("memory", "--growth_examples=0", "--growth_examples must be a whole number >= 32, not 0"),
    ("time_to_accuracy", "--runs=0", "--runs must be a whole number >= 1, not 0"),
    ("time_to_accuracy", "--recipe=vgg", "--recipe must be one of lab_mlp, .*, not 'vgg'"),
    ("time_to_accuracy", "--first_seed=-1", "seed must be a whole number >= 0, not -1"),
    ("time_to_accuracy", "--json=no/x.json", "--json cannot be written: 'no/x.json': No such.*"),
    ("accuracy", "--seeds=0", "--seeds must be a whole number >= 1, not 0"),
    ("accuracy", "--recipes=lab_cnn,vgg", "--recipes must be one of lab_mlp, .*, not 'vgg'"),
    ("accuracy", "--plot=.", "--plot must be a file to write, not '.'"),
]
BAD_FOR_ALL = [
    ("--device=tpu", r"flag --device=tpu: value should be one of <auto\|cpu\|gpu>"),
    ("--device=gpu", "--device=gpu needs a GPU that TensorFlow sees: there is none here"),
    ("--rounds=0", "--rounds must be a whole number >= 1, not 0"),
    ("--json=no/such.json", "--json cannot be written: 'no/such.json': No such file.*"),
    ("--plot=.", "--plot must be a file to write, not '.'"),
    ("quick", "unexpected argument 'quick': options are written --name=value"),
]


@pytest.mark.parametrize(
    ("script", "flag", "line"),
    [*BAD, *((script, *bad) for script in SCRIPTS for bad in BAD_FOR_ALL)],
)
def test_bad_input_is_one_line_and_status_2(call, here, script, flag, line):
    code, out, err = call(script, "--json=figures.json", "--plot=figures.png", flag)
    assert (code, out) == (2, "")
    assert re.fullmatch(f"error: {line}\n", err)
    assert list(here.iterdir()) == []


def test_defaults(call):
    settings, plan = settings_and_plan(call, "step_time")
    assert (settings.rounds, plan.seconds_a_round, plan.starts) == (9, 1, 1)
    assert plan.models == nets.NETS
    for script in ("input_pipeline", "memory"):
        assert settings_and_plan(call, script)[0].rounds == 5
    assert settings_and_plan(call, "memory")[1].precision == "auto"


def test_quick_defaults(call):
    settings, plan = settings_and_plan(call, "step_time", "--quick")
    assert (settings.rounds, plan.seconds_a_round, plan.models) == (2, 0.1, ("lab_mlp",))
    _, text, _ = call("step_time", main=lambda: print(flags.FLAGS["models"].help))
    assert "quick: lab_mlp)" in text
    # What is asked for is done, the usual values too.
    words = ("--quick", "--rounds=9", "--models=lab_cnn,lab_mlp", "--seconds_a_round=1")
    settings, plan = settings_and_plan(call, "step_time", *words)
    assert (settings.rounds, plan.seconds_a_round) == (9, 1)
    assert plan.models == ("lab_cnn", "lab_mlp")
    for script in ("input_pipeline", "memory"):
        assert settings_and_plan(call, script, "--quick")[0].rounds == 2


@pytest.mark.parametrize(
    ("script", "report", "flag"),
    [
        ("step_time", "step_report", "--models=lab_mlp,lab_cnn"),
        ("input_pipeline", "input_report", "--batch_sizes=8,16"),
    ],
)
def test_an_error_loses_nothing_of_what_was_measured(call, here, monkeypatch, script, report, flag):
    results = iter([{"first": 1}])

    def measure(*_, **__):
        for result in results:
            return result
        raise harness.WorkerError("the second worker died")

    module = importlib.import_module(script)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(importlib.import_module(report), "describe", str)
    monkeypatch.setattr(harness, "load_images", lambda *_: tiny.dataset())
    code, out, err = call(script, flag, "--json=figures.json")
    assert (code, err) == (2, "error: the second worker died\n")
    assert "{'first': 1}" in out
    assert json.loads((here / "figures.json").read_text())["results"] == [{"first": 1}]
