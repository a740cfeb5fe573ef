"""Bad command lines of every script: each is one clear line on stderr and exit status 2.

A process takes seconds to load TensorFlow, so one child runs the mains of all scripts with hundreds
of command lines; a few are run as anybody would run them.
"""

import collections
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Whatever gets as far as its data has not been refused: this is where it ends.
NO_DATA = "no-such-data"


# --- the child ------------------------------------------------------------------------------


def run_all(lines):
    """Runs (script, words) after each other in this process; returns how each ended."""
    from absl import app, flags
    from absl.testing import flagsaver

    from cifarflow import cli

    app.define_help_flags()
    FLAGS = flags.FLAGS  # noqa: N806
    # Scripts have flags of the same names; each has them for itself.
    for kind in ("boolean", "enum", "float", "integer", "list", "string"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), allow_override=True)
        setattr(flags, f"DEFINE_{kind}", define)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    ended = []
    by_script = collections.defaultdict(list)
    for place, (script, words) in enumerate(lines):
        by_script[script].append((place, words))
    for script, some in by_script.items():
        before = set(FLAGS)
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        if hasattr(module, "define_flags"):
            module.define_flags()
        for place, words in some:
            sys.argv = [script, *words]
            saved = flagsaver.save_flag_values()
            out, err = io.StringIO(), io.StringIO()
            code = None
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    cli.run(module.main)
            except SystemExit as end:
                code = end.code
            except BaseException:
                err.write(traceback.format_exc())
            finally:
                flagsaver.restore_flag_values(saved)
                FLAGS.unparse_flags()
            ended.append((place, code, out.getvalue(), err.getvalue()))
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
    return [end for _, *end in sorted(ended)]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    results = run_all(json.load(sys.stdin))
    answers.write(json.dumps(results))
    answers.flush()
    os._exit(0)


# --- the command lines ------------------------------------------------------------------------

from test_recipes import BAD  # noqa: E402

NUMBERS = "limit_examples batch_size eval_batch_size epochs learning_rate momentum decay l2 seed"
NUMBERS += " validation_fraction warmup_epochs drop_factor weight_decay clip_norm label_smoothing"
NUMBERS += " learning_rate_examples muon_momentum start_fraction peak_fraction end_fraction"
NUMBERS += " tta_share image_size accumulate_steps patience_epochs"
NUMBERS = NUMBERS.split()
# What is wrong as a Python value and right as a flag's text, or wrong only for a model or its data.
FINE = {
    ("nesterov", 1),
    ("scaled_velocity", 0),
    ("decay_biases", 1),
    ("drop_epochs", 3),
    ("drop_epochs", "1,2"),
    ("drop_epochs", ("1",)),
    ("model_options", "units=8"),
    ("learning_rate_scales", "beta=2"),
    ("freeze", "bias=2"),
}


def as_text(value):
    """A Python value as somebody might write it in a flag; None if nobody can."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(as_text, value))
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value) or any(map(callable, value.values())):
            return None
        return json.dumps(value)
    return str(value)


def bad_fields():
    """(flag, more flags) for each bad value of a recipe's field in `test_recipes`."""
    for name, values in BAD.items():
        for value in values if name != "name" else ["x"]:
            is_number = isinstance(value, str) and name in NUMBERS
            key = (name, value) if isinstance(value, collections.abc.Hashable) else (name, None)
            text = as_text(value)
            if text is None or is_number or (key in FINE and value is not None):
                continue
            more = ["--schedule=piecewise"] if name == "drop_epochs" else []
            yield f"--{name}={text}", more
    for name in NUMBERS:
        for text in (
            "",
            " ",
            "x",
            "1,5",
            "0x",
            "--",
            "1e",
            "1_",
            "9" * 5000 + "x",
            "\x1b[31m",
            "½",
        ):
            yield f"--{name}={text}", []


LONG, DEEP = "x" * 20_000, "[" * 50_000
HOSTILE = ["", "=", "==", ",", "a", "a=", "=a", "a=1,a=2", "{", "}", "[]", '{"a"', "{1: 2}", LONG]
HOSTILE += [f'{{"a": {DEEP}']
KINDS = ("keras", "tflite", "h5", "pb", "")
BY_HAND = {
    "examples/train.py": [
        *(f"--model_options={text}" for text in HOSTILE if text not in ("", "a=", "==")),
        *(f"--learning_rate_scales={text}" for text in HOSTILE if text not in ("", "==")),
        *(f"--freeze={text}" for text in HOSTILE if text not in ("", "==")),
        *('--model_options={"a": NaN}', '--model_options={"a": 1e999}', "--freeze=bias=inf"),
        *("--model_options=seed=1", "--model_options=num_classes=3", "--freeze=bias=-1"),
        *("--learning_rate_scales=beta=nan", '--learning_rate_scales={"beta": [1]}'),
        *("--augment=crop:" + "9" * 5000, "--augment=flip:1", "--augment=flip,altflip"),
        *("--augment=,", "--augment=crop:1.5", "--augment=crop:-1", "--augment=brightness:9"),
        *("--augment=cutout:0", "--augment=contrast:1e999", "--augment=crop:٣", "--augment=FLIP"),
        *("--drop_epochs=", "--drop_epochs=1,,2", "--drop_epochs=1;2", "--drop_epochs=1"),
        *("--recipe=", "--recipe=lab", "--recipe=LAB_CNN", "--recipe=lab_cnn,lab_mlp", "--recipe"),
        *(
            "--resume",
            "--resume=perhaps",
            "--workdir=",
            "--workdir= ",
            "--data_dir=",
            "--noplots=1",
        ),
        *(
            "--tensorboard=2",
            "--profile=all",
            "--check=x",
            "--on_nonfinite=go",
            "--strategy=tpu",
            "--strategy=multiworker",
            "--strategy=mirrored --profile",
            "--strategy=multiworker --worker_timeout_seconds=0",
            "--strategy=multiworker --worker_timeout_seconds=nan",
            "--plots=no way",
            "--progress=?",
            "--noresume=x",
        ),
        *("--eval_batch_size=99999999999999999999", "--eval_batch_size=2147483648"),
        *("--momentum=0", "--seed=2147483648", "--seed=99999999999999999999", "--epochs=1e999"),
        *("--batch_size=1e2", "--batch_size=32 64", "--batch_size=", "--batch-size=3", "-batch=3"),
        *("--recipe=lab_cnn --accumulate_steps=5", "--batch_size=30 --accumulate_steps=4"),
        *("--stderrthreshold=x", "--verbosity=x", "--logger_levels=a:b", "--logger_levels=a"),
        *("--flagfile=no/such", "--flagfile=.", "--pdb=x", "--logtostderr=x", "--v=x"),
        *("--precision=fp32", "--precision=float32 ", "--jit_compile=1", "--tta=all"),
        *("lab_cnn", "-", "---", "=", "--=", "-x", "a b", "--epochs=2 3", "--help=me"),
        *("--\x1b[31m=1", "\x1b[31m", "--precision=\x1b[31m", "--x\ny=1", "--precision=a\nb"),
    ],
    "examples/lab.py": [
        *("--recipes=vgg", "--recipes=lab_cnn,vgg", "--recipes=lab_cnn;lab_mlp"),
        *("--recipes=lab_cnn,,lab_mlp", "--seeds=0", "--seeds=-1", "--seeds=two", "--seeds=1.5"),
        *("--recipe=lab_cnn", "--resume", "--workdir=", "lab_cnn", "--seeds"),
        *("--strategy=", "--strategy=multiworker"),
    ],
    "examples/speedrun.py": [
        *("--recipe=fast", "--runs=0", "--runs=-3", "--runs=x", "--runs=1e3", "--tune=2"),
        *("--seed=2147483647 --runs=2", "--data_dir", "--progress=x", "fast94", "--workdir=x"),
        *("--check=perhaps", "--on_nonfinite=skip"),
    ],
    "examples/sweep.py": [
        *("--sweep=", "--sweep=seed", "--sweep=seed=", "--sweep=seed=a", "--sweep=seeds=1"),
        *("--sweep=seed=1,1", "--sweep=seed=0..99999", "--sweep=seed=3..1", "--sweep=name=a"),
        *("--sweep=seed=1 --sweep=seed=2", "--sweep=momentum=0.5,1", "--sweep=epochs=0"),
        *("--sweep=augment=none;spin", "--sweep=model_options=units", "--sweep=nesterov=yes"),
        *("--sweep=validation_fraction=0,0.1", "--sweep=learning_rate=0.1|0.2", "--sweep"),
        *("--sweep=seed=1 --processes=-1", "--sweep=seed=1 --processes=x"),
        *("--sweep=seed=1 --point=1", "--sweep=seed=1 --point=-2", "--sweep=seed=1 --resume"),
        *("seed=1 --epochs=0", "learning_rate", "--sweep=seed=1 --workdir="),
    ],
    "examples/ensemble.py": [
        *(
            "--members=0",
            "--members=-1",
            "--members=two",
            "--members=1.5",
            "--members=",
            "--tune=x",
        ),
        *("--seed=2147483647 --members=2", "--resume", "--workdir=", "--workdir= ", "--data_dir= "),
        *(
            "--recipe=ensemble",
            "--recipe=",
            "--plots=?",
            "--progress=x",
            "5",
            "--on_nonfinite=skip",
        ),
    ],
    "examples/find_lr.py": [
        *("--steps=9", "--steps=x", "--low=0", "--low=-1", "--low=nan", "--high=1e-5", "--high=x"),
        *("--low=20", "--smoothing=1", "--smoothing=-1", "--plot=rates.pdf", "--plot= "),
        *("--recipe=vgg", "--workdir=x", "--batch_size=0", "fast94"),
    ],
    "examples/find_batch_size.py": [
        *("--memory_limit_gib=0", "--memory_limit_gib=-1", "--memory_limit_gib=nan"),
        *("--memory_limit_gib=4GB", "--multiple=0", "--multiple=x", "--largest=0"),
        *("--largest=31", "--largest=x", "--seconds=0", "--seconds=inf", "--recipe=vgg", "32"),
        *("--accumulate_steps=5", "--plot=x"),
    ],
    "examples/custom_loop.py": [
        *("--steps=0", "--steps=-1", "--steps=1.5", "--steps=many", "--steps=", "--steps"),
        *("--data=mnist", "--data=", "--data=CIFAR10", "--epochs=3", "500", "--batch_size=8"),
        *("--data=folder", "--data=tfds:", "--image_size=0", "--image_size=1025", "--image_size=x"),
    ],
    "examples/show_augment.py": [
        *("--augment=", "--augment=none", "--augment=spin", "--augment=flip,flip", "--augment=,"),
        *("--augment=randaugment:31", "--augment=randaugment:0x9", "--augment=randaugment:2x"),
        *("--augment=erase:1.1", "--augment=hue:0.6", "--augment=mixup:-1", "--augment=cutmix:1e1"),
        *("--images=0", "--images=-1", "--images=x", "--seed=-1", "--seed=2147483648"),
        *("--out=x.jpg", "--out=", "--out", "--epochs=3", "flip"),
        *("--data=mnist", "--data=folder", "--data=tfds:", "--image_size=0", "--image_size=x"),
    ],
    "examples/export.py": [
        *("", "--workdir=", "--workdir= ", "--workdir=no/such", "--workdir=.", "--workdir"),
        *("--workdir=no/such --formats=onnx", "--formats=", "--formats=keras,,tflite"),
        *("--workdir=no/such --which=newest", "--workdir=no/such --split=all", "--out="),
        *("--examples=0", "--examples=-1", "--examples=x", "--examples=1.5", "--out"),
        *("--max_accuracy_loss=2", "--max_accuracy_loss=nan", "--max_accuracy_loss=x"),
        *("--workdir=no/such runs", "--data_dir", "--epochs=2"),
    ],
    "examples/predict.py": [
        *("", "no/such.keras", "--top=0", "--top=x", "--top=-1", "--top=1.5", "--top", "--bottom"),
        *(f"--top={place}|no/such.{kind}|x.png" for place in (1, 2) for kind in KINDS),
        *(".|x.png", "/dev/null|x.png", "no/such|x.png", "a| ", "|x.png", "x.png|no/such.keras"),
        *("--class_names=a|no/such.keras|x.png", "\x1b[31m.tflite|x.png", f"{LONG}|x.png"),
    ],
    "benchmarks/step_time.py": [
        *("--models=", "--models=vgg", "--models=lab_cnn,", "--precisions=half", "--precisions="),
        *("--batch_sizes=", "--batch_sizes=0", "--batch_sizes=-1", "--batch_sizes=32,x"),
        *("--batch_sizes=1.5", "--batch_sizes=" + "9" * 5000, "--batch_sizes=1e3"),
        *("--compare=caffe", "--compare=all,none", "--compare=", "--peer_precisions=float64"),
        *("--seconds_a_round=0", "--seconds_a_round=-1", "--seconds_a_round=nan"),
        *("--seconds_a_round=inf", "--jit_compile=yes", "--starts=0", "--profile=x"),
    ],
    "benchmarks/input_pipeline.py": [
        *("--ways=", "--ways=dali", "--ways=copy,dali", "--augment=spin", "--augment=cutout:4"),
        *("--ways=cifarflow --augment=spin", "--ways=cifarflow --augment=cutout:33"),
        *("--augment=crop:32", "--augment=crop:" + "9" * 5000, "--ways=copy --augment=flip,"),
        *("--batch_sizes=0", "--batch_sizes=", "--seconds_a_round=0", "--seconds_a_round=x"),
    ],
    "benchmarks/distribution.py": [
        *("--recipe=vgg", "--batch_size=0", "--batch_size=31", "--batch_size=x", "--steps=0"),
        *("--precision=half", "--seconds_a_round=0", "--seconds_a_round=nan", "--device=gpu"),
        *("--model_options=x", "--model_options=", "--model_options={", "--workers=3"),
    ],
    "benchmarks/memory.py": [
        *(
            "--model=vgg",
            "--model=",
            "--precision=half",
            "--epochs=0",
            "--epochs=-1",
            "--epochs=1.5",
        ),
        *("--growth_examples=0", "--growth_examples=31", "--growth_examples=x"),
        *("--growth_rounds=0", "--growth_rounds=-1", "--growth_rounds=x"),
    ],
    "benchmarks/time_to_accuracy.py": [
        *("--recipe=", "--recipe=vgg", "--recipe=lab_cnn:", "--recipe=lab_cnn:epochs"),
        *("--recipe=lab_cnn:epochs=0", "--recipe=lab_cnn:seed=1", "--recipe=lab_cnn:epoch=1"),
        *("--recipe=lab_cnn:epochs=1,epochs=2", "--recipe=lab_cnn:model_options=1"),
        *("--compare=vgg", "--compare=fast75", "--compare=fast75:epochs=x", "--runs=0", "--bar=0"),
        *("--bar=1.1", "--bar=nan", "--bar=x", "--first_seed=-1", "--first_seed=2147483647"),
        *("--notebook_full", "--tune=x"),
    ],
    "benchmarks/accuracy.py": [
        *("--recipes=", "--recipes=vgg", "--recipes=lab_cnn,vgg", "--recipes=lab_cnn:x=1"),
        *("--recipes=lab_cnn:epochs=-1", "--seeds=0", "--seeds=x", "--points=0", "--points=-1"),
        *("--first_seed=-1", "--recipes=lab_cnn:batch_size=1.5", "--recipes=lab_cnn:tta=flip"),
    ],
    "benchmarks/notebook.py": [
        *("--seeds=0", "--seeds=-1", "--seeds=x", "--recipe=vgg", "--recipe=", "--workdir=x"),
    ],
    "benchmarks/fuzz_readers.py": [
        *("--inputs=0", "--inputs=15", "--inputs=x", "--seed=-1", "--seed=2147483648"),
        *("--readers=zip", "--readers=npz,", "--found= ", "--found=", "--json=no/such.json"),
    ],
}
# Of those benchmarks that `harness.define_flags` gives its flags.
SHARED = ["step_time", "distribution", "input_pipeline", "memory", "time_to_accuracy", "accuracy"]
FOR_SHARED = [
    *(
        "--device=tpu",
        "--device=",
        "--data=mnist",
        "--data=",
        "--quick=x",
        "--json=no/such.json",
    ),
    *("--json=", "--json=.", "--plot=.", "--plot=no/such.png", "--plot= ", "--json=/dev/null"),
    *("--json=~nosuchuser/x.json", "--plot=~nosuchuser/x.png"),
    *("--json=a --plot=a", "--json=" + "x" * 5000, "--data_dir", "--plot"),
]
# Of every script.
FOR_ALL = [
    *("--nosuch=1", "--nosuch", "nosuch", "--nosuch=\x1b[31m", "--flagfile=no/such/file"),
    *("--verbosity=loud", "--stderrthreshold=loud", "-h=1", "--only_check_args=maybe"),
]


def scripts():
    """Every script that is run with flags."""
    for folder in ("examples", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if "cli.run(main)" in path.read_text():
                yield f"{folder}/{path.name}"


def command_lines():
    """(script, words) of all that is tried."""
    fields = list(bad_fields())
    for script in ("examples/train.py", "examples/speedrun.py", "benchmarks/notebook.py"):
        yield from ((script, ["--recipe=lab_cnn", flag, *more]) for flag, more in fields)
    yield from (("examples/lab.py", [flag, *more]) for flag, more in fields)
    for script, flags in BY_HAND.items():
        for flag in flags:
            # Several flags in one text are several words.
            words = flag.split(" --")
            first = words[0].split("|") if script == "examples/predict.py" else words[:1]
            yield script, [*first, *(f"--{word}" for word in words[1:])]
    for name in SHARED:
        for flag in FOR_SHARED:
            words = flag.split(" --")
            yield f"benchmarks/{name}.py", [words[0], *(f"--{word}" for word in words[1:])]
    for script in scripts():
        yield from ((script, [flag]) for flag in FOR_ALL)


LINES = list(command_lines())
# As anybody would run them.
TRUE = [
    ("examples/train.py", ["--recipe=lab_cnn", "--epochs=nan"]),
    ("examples/lab.py", ["--noplots=1"]),
    ("benchmarks/fuzz_readers.py", ["--readers=zip"]),
]


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CIFARFLOW_DATA": NO_DATA,
        "CIFARFLOW_CACHE": str(cache),
        "CUDA_VISIBLE_DEVICES": "-1",
    }


@pytest.fixture(scope="module")
def true_ends(environ, tmp_path_factory):
    """How the true processes end; they run beside the child."""
    folder = tmp_path_factory.mktemp("true")
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), *words],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script, words in TRUE
    ]
    try:
        yield lambda: [
            (process.returncode, *texts)
            for process in started
            for texts in [process.communicate(timeout=240)]
        ]
        assert list(folder.iterdir()) == []
    finally:
        for process in started:
            process.kill()
            for pipe in (process.stdout, process.stderr):
                pipe.close()
            process.wait()


@pytest.fixture(scope="module")
def ends(environ, true_ends, tmp_path_factory):
    """How each of `LINES` ended in the child, and what it left in its folder."""
    folder = tmp_path_factory.mktemp("here")
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=folder,
        env={**environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        input=json.dumps(LINES),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [path.name for path in folder.iterdir()]


def fault_of(code, out, err):
    """What is wrong with the end of a bad command line; None if nothing is."""
    if "Traceback" in err:
        return err.rstrip().rpartition("\n")[2]
    if code != 2:
        return f"exit status {code}: {err[-200:]!r}"
    if out:
        return f"it wrote {out[:200]!r}"
    if not err.startswith("error: ") or not err.endswith("\n") or not err[:-1].isprintable():
        return f"it is not one line: {err[:300]!r}"
    if len(err) > 1200:
        return f"it has {len(err)} signs"
    if NO_DATA in err:
        return "it was not refused"
    return None


def test_hundreds_of_bad_command_lines(ends):
    results, left = ends
    faults = [
        (script, [word[:60] for word in words], fault)
        for (script, words), result in zip(LINES, results, strict=True)
        if (fault := fault_of(*result))
    ]
    assert faults == []
    assert left == []
    assert len(results) > 2000


def test_each_says_what_is_wrong(ends):
    results, _ = ends
    said = 0
    for (_, words), (_, _, err) in zip(LINES, results, strict=True):
        flag, _, text = words[-1].removeprefix("--").partition("=")
        # The flag or what was given, as far as it can be shown.
        if flag in err or flag.removeprefix("no") in err or (text and text[:20] in err):
            said += 1
    assert said > 0.95 * len(results)


def test_every_script_is_tried():
    tried = {script for script, _ in LINES}
    assert tried == {*scripts()} | set(BY_HAND)
    assert {"examples/train.py", "examples/lab.py", "benchmarks/step_time.py"} <= tried
    for name in NUMBERS:
        assert name in BAD
        assert isinstance(BAD[name][0], (int, float)) and not math.isnan(BAD[name][0])  # noqa: PT018
    words = [tuple(words) for _, words in LINES]
    assert len(set(zip([script for script, _ in LINES], words, strict=True))) > 0.99 * len(LINES)


def test_true_processes(true_ends, ends):
    for (script, words), end in zip(TRUE, true_ends(), strict=True):
        assert fault_of(*end) is None, (script, words)
