"""The benchmarks of whole runs, and the speedrun: what they refuse, run and say."""

import dataclasses
import json
import re

import benchmark_suite
import numpy as np
import pytest
import tiny

# isort: split
import accuracy
import harness
import time_to_accuracy
import trial_report
import trial_runs

from cifarflow.data.splits import Split
from cifarflow.errors import ConfigError
from cifarflow.recipes.named import RECIPES
from cifarflow.training.contract import CHECKED
from cifarflow.trials import TIMING_RULE

COMMANDS = {
    "notebook": "time_to_accuracy.py --quick --data=standin --recipe=lab_mlp --runs=1 --bar=0.01 "
    "--compare=notebook --notebook_full --json=notebook.json --plot=notebook.png",
    "accuracy": "accuracy.py --quick --data=standin --recipes=lab_mlp,lab_mlp:epochs=0.5 "
    "--points=3 --json=accuracy.json --plot=accuracy.png",
    "speedrun": "../examples/speedrun.py --recipe=lab_mlp --data=standin --limit_examples=320 "
    "--epochs=0.5 --validation_fraction=0 --runs=2 --seed=3 --tune --check",
    "no_runs": "../examples/speedrun.py --data=standin --runs=0",
    # More than it comes to before it is interrupted.
    "interrupted": "time_to_accuracy.py --quick --data=standin --recipe=lab_mlp "
    "--runs=1000 --json=interrupted.json --plot=interrupted.png",
}
QUICK = harness.Settings(rounds=2, quick=True)


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """A function of a name in `COMMANDS`: the run's folder, and how it ended."""
    folder = tmp_path_factory.mktemp("trials")
    with benchmark_suite.quick_runs(folder, COMMANDS) as run:
        yield run


@pytest.fixture(scope="module", autouse=True)
def started(finish):
    """They run while the tests that need none of them do."""


def test_an_interrupted_run_keeps_what_it_measured(finish):
    # First in this file: it computes until it is interrupted.
    folder, done = finish("interrupted", interrupt_at="interrupted.png")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    names = {path.name for path in folder.iterdir()}
    assert names == {"interrupted.json", "interrupted.png"}
    assert (folder / "interrupted.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "interrupted.json").read_text())
    result = record["result"]
    assert not result["complete"]
    assert record["rounds"] == 1000
    (row,) = result["recipes"]
    assert 1 <= len(row["runs"]) == row["accuracy"]["n"] < 1000
    for seed, run in enumerate(row["runs"]):
        assert run["seed"] == seed
        assert f"\nlab_mlp, seed {seed}: test accuracy {run['accuracy']:.4f} in " in done.stdout


# Command lines


def test_a_recipe_and_its_variants():
    assert trial_runs.read_recipe("--recipe", "lab_cnn") == RECIPES["lab_cnn"]
    text = "lab_cnn:precision=float32,augment=flip,crop:4,epochs=2,nesterov=false"
    found = trial_runs.read_recipe("--recipe", text)
    changes = {"precision": "float32", "augment": "flip,crop:4", "epochs": 2, "nesterov": False}
    assert found == dataclasses.replace(RECIPES["lab_cnn"], **changes, name=text)


def test_recipes_joined_by_commas():
    words = ["lab_mlp", "lab_cnn:augment=crop:4,flip,epochs=2", "lab_final"]
    found = trial_runs.read_recipes("--recipes", ",".join([*words, "lab_mlp"]))
    assert [recipe.name for recipe in found] == words
    assert found[1].augment == "crop:4,flip"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"runs": 0}, "--runs must be a whole number >= 1, not 0"),
        ({"first_seed": -1}, "seed must be a whole number >= 0, not -1"),
        ({"first_seed": 2**31 - 3}, "seed must be at most 2147483647, not 2147483649"),
        ({"recipe": "fast"}, "--recipe must be one of lab_mlp, .*, not 'fast'"),
        ({"recipe": "lab_mlp:"}, "--recipe must be RECIPE or RECIPE:field=value,..., not .*"),
        ({"recipe": "lab_mlp:seed=1"}, "a field in --recipe must be one of model, .*not 'seed'"),
        ({"recipe": "lab_mlp:name=x"}, "a field in --recipe must be one of model, .*not 'name'"),
        ({"recipe": "lab_mlp:epochs=x"}, "epochs must be a finite number > 0, not 'x'"),
        ({"compare": "nothing"}, "--compare must be one of lab_mlp, .*, not 'nothing'"),
        ({"compare": "lab_mlp"}, "--compare must be another recipe than --recipe, not 'lab_mlp'"),
        ({"bar": 75.0}, "--bar must be a finite number > 0 and <= 1, not 75.0"),
        ({"notebook_full": True}, "--notebook_full needs --compare=notebook, not ''"),
        (
            {"notebook_full": True, "compare": "notebook", "tune": True},
            "--notebook_full reads the test set: it does not go with --tune",
        ),
    ],
)
def test_bad_plans(flags, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        time_to_accuracy.make_plan(**{"recipe": "lab_mlp", **flags})


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"seeds": 0}, "--seeds must be a whole number >= 1, not 0"),
        ({"points": 0}, "--points must be a whole number >= 1, not 0"),
        ({"recipes": "lab_mlp,vgg,lab_cnn"}, "--recipes must be one of lab_mlp, .*, not 'vgg'"),
        ({"recipes": ""}, "--recipes must be one of lab_mlp, .*, not ''"),
    ],
)
def test_bad_plans_of_accuracy(flags, line):
    with pytest.raises(ConfigError, match=f"^{line}$"):
        accuracy.make_plan(**{"recipes": "lab_mlp", **flags})


def test_what_is_held_out():
    def fractions(**flags):
        plan = time_to_accuracy.make_plan(**flags)
        return [recipe.validation_fraction for recipe in plan.recipes]

    none, some = "lab_mlp:validation_fraction=0", "lab_mlp"
    assert fractions(recipe=none, compare=some) == [0, 0.2]
    assert fractions(recipe=none, tune=True) == [0.1]
    assert fractions(recipe=none, compare="lab_cnn:validation_fraction=0.3", tune=True) == [0.3] * 2
    plan = accuracy.make_plan(recipes=f"{none},{some}")
    assert [recipe.validation_fraction for recipe in plan.recipes] == [0.1, 0.2]


def test_the_data_flag_is_for_recipes_that_leave_it_open():
    settings = harness.Settings(data="standin")
    for text, data in (("lab_mlp", "standin"), ("lab_mlp:data=cifar10", "cifar10")):
        plan = time_to_accuracy.make_plan(recipe=text, settings=settings)
        assert plan.recipes[0].data == data


def test_recipes_on_different_data_sets(monkeypatch):
    loaded = []

    def load(recipe, *, data_dir):
        loaded.append(recipe.name)
        return tiny.dataset(name=recipe.data)

    monkeypatch.setattr(trial_runs, "load_recipe_data", load)
    plan = time_to_accuracy.make_plan(
        recipe="lab_mlp:data=cifar10", compare="lab_cnn", settings=harness.Settings(data="standin")
    )
    line = "must be on one data set: lab_mlp:data=cifar10 is on cifar10, lab_cnn on standin$"
    with pytest.raises(ConfigError, match=line):
        trial_runs.load_sets(plan.recipes, QUICK)
    # What is the same is loaded once.
    loaded.clear()
    plan = time_to_accuracy.make_plan(recipe="lab_mlp", compare="lab_cnn")
    first, second = trial_runs.load_sets(plan.recipes, QUICK)
    assert first is second
    assert loaded == ["lab_mlp"]


def test_recipes_that_read_different_images():
    recipes = [RECIPES["lab_mlp"], RECIPES["lab_cnn"]]
    whole = tiny.dataset()
    check = trial_runs.check_same_images
    check(recipes, [whole, tiny.dataset(train=32)], read="test")
    line = "must read the same test images: lab_mlp reads 30, lab_cnn 29 or others"
    with pytest.raises(ConfigError, match=line):
        check(recipes, [whole, tiny.dataset(test=29)], read="test")
    check(recipes, [whole, tiny.dataset(test=29)], read="validation")
    other = Split(whole.test.images[::-1].copy(), whole.test.labels)
    with pytest.raises(ConfigError, match="lab_mlp reads 30, lab_cnn 30 or others"):
        check(recipes, [whole, dataclasses.replace(whole, test=other)], read="test")


def test_a_quick_run_has_the_same_test_images_whatever_is_held_out():
    plan = time_to_accuracy.make_plan(
        recipe="lab_mlp", compare="lab_mlp:validation_fraction=0", settings=QUICK
    )
    # As `Dataset.limit` does it, of 10,000 images for training and 2,000 for the test.
    tests = []
    for recipe in plan.recipes:
        train = round(10_000 * (1 - recipe.validation_fraction))
        tests.append(2_000 * recipe.limit_examples // train)
    assert tests == [160, 160]


def test_the_bar_of_a_recipe():
    assert time_to_accuracy.bar_of("fast75:precision=float32") == 0.75
    assert time_to_accuracy.bar_of("lab_dropout") is None


def test_turns():
    calls = []

    def way(name):
        return lambda seed: calls.append(f"{name}{seed}") or seed

    def keep(found):
        # As it is by now: it grows.
        calls.append({name: list(values) for name, values in found.items()})

    found = trial_runs.run_in_turn({"a": way("a"), "b": way("b")}, seeds=[5, 6, 7], keep=keep)
    kept = [{"a": [5], "b": [5]}, {"a": [5, 6], "b": [5, 6]}]
    assert calls == ["a5", "b5", kept[0], "b6", "a6", kept[1], "a7", "b7"]
    assert found == {"a": [5, 6, 7], "b": [5, 6, 7]}


# Runs


@pytest.fixture(scope="module")
def compared():
    """Two recipes on tiny images, tuned: the plan, the data, what came out, and what was kept."""
    recipe = 'lab_mlp:model_options={"units":[8]},precision=float32,limit_examples=64'
    plan = time_to_accuracy.make_plan(
        recipe=f"{recipe},batch_size=8",
        compare=f"{recipe},learning_rate=0.0001",
        runs=3,
        first_seed=7,
        bar=0.15,
        tune=True,
        settings=QUICK,
    )
    dataset, kept = tiny.dataset(), []
    result = time_to_accuracy.measure(plan, QUICK, [dataset, dataset], keep=kept.append)
    return plan, dataset, result, kept


def test_what_there_is_after_each_seed(compared):
    _, _, result, kept = compared
    assert result["complete"]
    assert [part["complete"] for part in kept] == [False, False]
    for count, part in enumerate(kept, start=1):
        assert part.keys() == result.keys()
        for row, whole in zip(part["recipes"], result["recipes"], strict=True):
            assert row["runs"] == whole["runs"][:count]
            assert row["accuracy"]["n"] == row["seconds"]["n"] == count
        assert ("too small" in part["verdicts"][0]["sentence"]) == (count == 1)
        json.dumps(part, allow_nan=False)


def test_the_notebooks_full_run_may_be_interrupted(monkeypatch):
    class Notebook:
        epochs, steps = 25, 100

        def __init__(self, dataset, settings, *, examples):
            assert examples == 64

        def start(self, stack):
            return lambda seed: 0.5

        def run(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(time_to_accuracy, "Notebook", Notebook)
    plan = time_to_accuracy.make_plan(
        recipe='lab_mlp:model_options={"units":[8]},precision=float32,limit_examples=64',
        compare="notebook",
        runs=1,
        notebook_full=True,
        settings=QUICK,
    )
    kept = []
    with pytest.raises(KeyboardInterrupt):
        time_to_accuracy.measure(plan, QUICK, [tiny.dataset()], keep=kept.append)
    (part,) = kept
    assert not part["complete"]
    assert part["notebook"]["estimated_seconds"]["values"] == [50]
    assert part["notebook"]["full_run"] is None
    assert len(part["recipes"][0]["runs"]) == 1


def test_accuracy_after_each_seed():
    recipe = 'lab_mlp:model_options={"units":[8]},precision=float32,limit_examples=64'
    plan = accuracy.make_plan(recipes=recipe, seeds=2, points=2, settings=QUICK)
    kept = []
    result = accuracy.measure(plan, [tiny.dataset()], keep=kept.append)
    (part,) = kept
    assert (part["complete"], result["complete"]) == (False, True)
    (row,), (whole,) = part["recipes"], result["recipes"]
    assert row["runs"] == whole["runs"][:1]
    assert len(whole["runs"]) == whole["accuracy"]["n"] == 2


def test_two_recipes_are_compared(compared):
    plan, dataset, result, _ = compared
    assert result["timing_rule"] == TIMING_RULE
    assert result["notebook"] is None
    assert [row["name"] for row in result["recipes"]] == [recipe.name for recipe in plan.recipes]
    for row, steps in zip(result["recipes"], (8, 2), strict=True):
        assert [run["seed"] for run in row["runs"]] == [7, 8, 9]
        assert {run["steps"] for run in row["runs"]} == {row["steps"]} == {steps}
        values = [run["accuracy"] for run in row["runs"]]
        # Of the validation images, and of no others.
        assert {run["read"] for run in row["runs"]} == {row["read"]} == {"validation"}
        for value in values:
            assert value * len(dataset.validation) == pytest.approx(
                round(value * len(dataset.validation))
            )
        assert row["accuracy"]["mean"] == pytest.approx(np.mean(values))
        assert row["accuracy"]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert row["share_that_reach_it"] == np.mean(np.array(values) >= 0.15)
        assert len({run["weights_sha256"] for run in row["runs"]}) == 3
    assert [verdict["measure"] for verdict in result["verdicts"]] == ["seconds", "accuracy"]
    json.dumps(result, allow_nan=False)


def test_a_comparison_is_readable(compared):
    plan, dataset, result, _ = compared
    text = trial_report.describe(result)
    for row in result["recipes"]:
        for run in row["runs"]:
            assert f"{run['accuracy']:.4f}" in text
            assert run["weights_sha256"][:8] in text
        reached = round(3 * row["share_that_reach_it"])
        assert f"{row['name']}: {reached} of 3 runs reach 0.15" in text
    assert "validation accuracy" in text
    for verdict in result["verdicts"]:
        assert f"{verdict['measure']}: {verdict['sentence']}" in text
    assert "the test set is not read" in trial_runs.describe_reading([dataset], read=plan.read)


def test_it_can_be_drawn(compared, tmp_path):
    import trial_plots

    figure = trial_plots.draw_runs(compared[2], tmp_path / "runs.png", about="tiny")
    left, right = figure.axes
    assert (left.get_xlabel(), right.get_xlabel()) == ("seconds", "validation accuracy")
    drawn = [list(line.get_xdata()) for line in right.lines]
    for row in compared[2]["recipes"]:
        assert [run["accuracy"] for run in row["runs"]] in drawn
        assert [row["accuracy"]["mean"]] * 2 in drawn
    assert [path.name for path in tmp_path.iterdir()] == ["runs.png"]


@pytest.mark.parametrize(("slower", "scale"), [(9, "linear"), (11, "log")])
def test_times_far_apart_have_a_logarithmic_axis(tmp_path, slower, scale):
    import trial_plots

    def row(name, seconds):
        runs = [
            {
                "seconds": seconds * (1 + seed / 50),
                "accuracy": 0.8 + seed / 50,
                "curve": [(seconds * share, share, share / 2) for share in (0.5, 1.0)],
            }
            for seed in range(2)
        ]
        accuracy, time = {"mean": 0.81, "deviation": 0.01}, {"mean": seconds}
        figures = {"accuracy": accuracy, "seconds": time, "examples": {"train": 45_000}}
        return {"name": name, "runs": runs, **figures}

    long = "fast75:precision=float32,augment=flip,crop:4,tta=none"
    result = {"recipes": [row("one", 3.0), row(long, 3.0 * slower)]}
    figure = trial_plots.draw_curves(result, tmp_path / "x.png", about="nothing")
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    labels = axes.get_legend_handles_labels()[1]
    on = ", trained on 45,000 images"
    assert labels[0] == f"one: test 0.8100 ± 0.0100 after 3.0 s (n = 2){on}"
    # A name that fills a line has that for itself.
    after = f"{3.0 * slower:.1f} s"
    assert labels[1] == f"{long}:\ntest 0.8100 ± 0.0100 after {after} (n = 2){on}"
    # A thin line a seed, the mean, the ends, what leads to them, and the mark.
    assert len(axes.lines) == 2 * (2 + 4)


# As a person starts them


def record_of(folder, done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "STAND-IN DATA" in done.stderr
    name = folder.name
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["data"]["name"] == "standin"
    assert done.stdout.startswith(record["environment"]["device"])
    assert f"\n{TIMING_RULE}\n" in done.stdout
    assert "accuracy is of the 160 test images, read once a run, at its end" in done.stdout
    return record


def test_against_the_notebook(finish):
    folder, done = finish("notebook")
    record = record_of(folder, done)
    result = record["result"]
    (row,) = result["recipes"]
    assert (record["rounds"], len(row["runs"]), row["share_that_reach_it"]) == (1, 1, 1)
    assert result["verdicts"] == []
    found = result["notebook"]
    # 640 images in batches of 32, and one epoch of the 25, because of --quick.
    assert (found["recipe"], found["epochs"], found["steps"]) == ("lab_final", 1, 20)
    (step,) = found["seconds_a_step"]["values"]
    assert found["estimated_seconds"]["values"] == [20 * step]
    assert found["ratio"]["values"] == pytest.approx([20 * step / row["runs"][0]["seconds"]])
    assert f"lab_mlp is {found['ratio']['median']:.1f} times as fast as the" in done.stdout
    assert result["complete"]
    assert "is a measured step times 1 epochs, not a full run: lab_final by Keras" in done.stdout
    full = found["full_run"]
    # All of its steps take no less than a part of them, tracing aside.
    assert full["seconds"] > 0.5 * found["estimated_seconds"]["median"]
    assert 0 <= full["accuracy"] <= 1
    assert f"came to {full['accuracy']:.4f} on the test images" in done.stdout
    assert "lab_mlp, seed 0: test accuracy" in done.stdout


def test_accuracy_over_seeds(finish):
    folder, done = finish("accuracy")
    rows = record_of(folder, done)["result"]["recipes"]
    assert [row["name"] for row in rows] == ["lab_mlp", "lab_mlp:epochs=0.5"]
    for row, steps in zip(rows, (20, 10), strict=True):
        assert row["examples"] == {"train": 640, "validation": 160, "test": 160}
        for run in row["runs"]:
            seconds, epochs, accuracies = zip(*run["curve"], strict=True)
            assert len(run["curve"]) >= 3
            assert list(seconds) == sorted(seconds)
            assert epochs[-1] == run["epochs"] == steps / 20
            assert seconds[-1] == run["train_seconds"] < run["seconds"]
            assert all(0 <= accuracy <= 1 for accuracy in accuracies)
        mean = np.mean([run["accuracy"] for run in row["runs"]])
        assert re.search(rf"^\| {row['name']} +\| +2 \| +{mean:.4f} \|", done.stdout, re.MULTILINE)
    assert "lab_mlp: trained on 640 images, 1 epochs in float32; its curve is of 160" in done.stdout


def test_speedrun(finish):
    folder, done = finish("speedrun")
    assert done.returncode == 0, done.stderr
    assert "STAND-IN DATA" in done.stderr
    assert list(folder.iterdir()) == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith("lab_mlp: 0.5 epochs of 320 standin images, batch 32, float32; comp")
    assert lines.pop(1) == CHECKED
    assert lines[1] == TIMING_RULE
    # A tenth is held out, as the recipe holds out nothing.
    assert lines[2] == "the 35 validation images are read, not the test set"
    found = [
        re.fullmatch(
            r"seed (\d): validation accuracy (0\.\d{4}) in (\d+\.\d) s, \d+\.\d s of them training",
            line,
        )
        for line in lines[3:5]
    ]
    assert [match[1] for match in found] == ["3", "4"]
    values = [float(match[2]) for match in found]
    printed = re.fullmatch(
        r"mean of 2: accuracy (\S+) \(sd (\S+), 95 % interval (\S+) to (\S+)\), "
        r"seconds (\d+\.\d) s \(sd \d+\.\d s, 95 % interval -?\d+\.\d to \d+\.\d s\)",
        lines[5],
    )
    # Of one degree of freedom: the table has 12.706.
    half = 12.7062 * np.std(values, ddof=1) / np.sqrt(2)
    expected = [np.mean(values), np.std(values, ddof=1), np.mean(values) - half]
    expected.append(np.mean(values) + half)
    # Those of the lines are rounded.
    assert list(map(float, printed.groups()[:4])) == pytest.approx(expected, abs=2e-3)
    assert float(printed[5]) == pytest.approx(np.mean([float(m[3]) for m in found]), abs=0.11)
    assert len(lines) == 6


def test_speedrun_of_no_runs(finish):
    folder, done = finish("no_runs")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --runs must be a whole number >= 1, not 0\n"
    assert list(folder.iterdir()) == []
