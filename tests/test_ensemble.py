"""Ensembles: each member is the run of its seed, together they are what their outputs say."""

import dataclasses
import errno
import gc
import json
import os
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
from absl.testing import flagsaver

from cifarflow import ensemble as module
from cifarflow.data.splits import Dataset, Split
from cifarflow.ensemble import Accuracy, train_ensemble
from cifarflow.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    WorkdirError,
)
from cifarflow.evaluation.predict import predict
from cifarflow.evaluation.voting import combine_outputs
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import train_recipe
from cifarflow.training.workdir import Workdir
from cifarflow.trials import Trials

RECIPE = Recipe(
    "tiny",
    **tiny.MLP,
    batch_size=8,
    epochs=3.0,
    learning_rate=0.05,
    eval_batch_size=16,
    augment="altflip",
    tta="multicrop",
    tta_share=0.5,
    seed=3,
)


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset()


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """Three members in a folder; no test may change it."""
    workdir = tmp_path_factory.mktemp("ensemble") / "three"
    return train_ensemble(RECIPE, 3, dataset=dataset, workdir=workdir)


@pytest.fixture
def copy(trained, tmp_path):
    """A folder of its own with the three."""
    shutil.copytree(trained.workdir, tmp_path / "three")
    return tmp_path / "three"


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was trained")

    monkeypatch.setattr(module, "Trials", refuse)


def files(folder):
    """Times and contents of all files."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder): (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


def test_each_member_is_the_run_of_its_seed(trained, dataset):
    assert [member.seed for member in trained.members] == [3, 4, 5]
    images, labels = dataset.test
    for member, (plain, augmented) in zip(trained.members, trained.outputs, strict=True):
        if member.seed == 4:
            # Two of the three take two thirds of the time.
            continue
        run = train_recipe(dataclasses.replace(RECIPE, seed=member.seed), dataset=dataset)
        assert member.weights_sha256 == run.summary["weights_sha256"]
        assert member.steps == run.summary["steps"]
        assert member.accuracy.augmented == pytest.approx(run.summary["test_accuracy"])
        np.testing.assert_array_equal(augmented, run.test_outputs)
        np.testing.assert_array_equal(plain, predict(run.model, images, batch_size=16))
        assert member.accuracy.plain == pytest.approx((plain.argmax(1) == labels).mean())
        assert member.train_seconds > 0
    assert trained.summary["step_traces"] == 1


def test_together_they_are_what_their_outputs_say(trained, dataset):
    labels = dataset.test.labels
    assert [together.members for together in trained.by_size] == [1, 2, 3]
    for size, together in enumerate(trained.by_size, 1):
        for how, name in enumerate(("plain", "augmented")):
            found = combine_outputs(trained.outputs[:size, how])
            for kind, predicted in (("average", found.by_average), ("vote", found.by_vote)):
                share = (predicted == labels).mean()
                assert getattr(getattr(together, kind), name) == pytest.approx(share)
    first = trained.members[0].accuracy
    assert trained.by_size[0] == (1, first, first)
    assert (trained.average, trained.vote) == trained.by_size[-1][1:]
    accuracies = [member.accuracy for member in trained.members]
    assert trained.one == pytest.approx(Accuracy(*np.mean(accuracies, axis=0)))
    assert len({member.weights_sha256 for member in trained.members}) == 3


def test_what_is_in_the_folder(trained, dataset):
    folder = trained.workdir
    assert {path.name for path in folder.iterdir()} == {"recipe.json", "members", "ensemble.json"}
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe == {**trained.recipe.to_json(), "ensemble": "test"}
    assert recipe["data"] == "tiny"
    for number, member in enumerate(trained.members):
        path = folder / "members" / f"seed_{member.seed}"
        names = {"outputs.npy", "member.json", f"step_{member.steps:08d}.npz"}
        assert {file.name for file in path.iterdir()} == names
        np.testing.assert_array_equal(np.load(path / "outputs.npy"), trained.outputs[number])
    summary = json.loads((folder / "ensemble.json").read_text())
    assert summary == trained.summary
    assert summary["examples"] == {"train": 64, "validation": 20, "test": 30}
    assert (summary["tta"], summary["tta_share"], summary["read"]) == ("multicrop", 0.5, "test")
    for entry, member in zip(summary["members"], trained.members, strict=True):
        assert entry == {**dataclasses.asdict(member), "accuracy": member.accuracy._asdict()}
    assert summary["by_size"][-1] == {
        "members": 3,
        "average": trained.average._asdict(),
        "vote": trained.vote._asdict(),
    }


def test_predicting_other_images(trained, dataset, monkeypatch):
    built = []
    build = module.build_model
    monkeypatch.setattr(
        module, "build_model", lambda *args, **options: built.append(1) or build(*args, **options)
    )
    found = trained.predict(dataset.test.images)
    for part, expected in zip(found, combine_outputs(trained.outputs[:, 1]), strict=True):
        np.testing.assert_array_equal(part, expected)
    plain = trained.predict(dataset.test.images, tta=False)
    np.testing.assert_array_equal(plain.votes, combine_outputs(trained.outputs[:, 0]).votes)
    others = trained.predict(dataset.validation.images)
    assert others.probabilities.shape == (20, 10)
    assert (others.votes.sum(1) == 3).all()
    # One model for all of them.
    assert len(built) <= 1


def test_predicting_what_cannot_be_predicted(trained, copy, dataset, no_training):
    with pytest.raises(
        DataError, match=r"images must be \[N, 8, 8, 3\] uint8 .* not \[1, 9, 8, 3\]"
    ):
        trained.predict(np.zeros((1, 9, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="tta must be True or False, not 'mirror'"):
        trained.predict(dataset.test.images, tta="mirror")
    again = train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    weights = next((copy / "members" / "seed_4").glob("step_*.npz"))
    weights.write_bytes(weights.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match="is damaged"):
        again.predict(dataset.test.images)
    # Another member's weights are not taken for this one's.
    other = next((copy / "members" / "seed_5").glob("step_*.npz"))
    shutil.copy(other, weights)
    with pytest.raises(CheckpointError, match="is of another run: seed=5, not 4"):
        again.predict(dataset.test.images)


# --- resuming -------------------------------------------------------------------------------


def test_a_finished_ensemble_is_not_trained_again(copy, trained, dataset, no_training):
    before = files(copy)
    again = train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    assert files(copy) == before
    assert again.members == trained.members
    assert again.by_size == trained.by_size
    assert again.summary == trained.summary
    np.testing.assert_array_equal(again.outputs, trained.outputs)
    found = again.predict(dataset.test.images)
    np.testing.assert_array_equal(found.votes, combine_outputs(trained.outputs[:, 1]).votes)


class Killed(BaseException):
    """What no part of the package catches."""


def test_a_killed_ensemble_goes_on_with_the_next_member(trained, dataset, tmp_path, monkeypatch):
    train, seeds = Trials.train, []

    def dying(self, seed, **options):
        seeds.append(seed)
        if len(seeds) == 3:
            raise Killed
        return train(self, seed, **options)

    monkeypatch.setattr(Trials, "train", dying)
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=folder)
    assert not (folder / "ensemble.json").exists()
    before = files(folder)
    assert {path.name for path in (folder / "members").iterdir()} == {"seed_3", "seed_4"}
    with pytest.raises(WorkdirError, match="holds a run of this recipe already: add --resume"):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=folder)
    again = train_ensemble(RECIPE, 3, dataset=dataset, workdir=folder, resume=True)
    assert seeds == [3, 4, 5, 5]
    assert before.items() <= files(folder).items()
    assert [m.weights_sha256 for m in again.members] == [m.weights_sha256 for m in trained.members]
    np.testing.assert_array_equal(again.outputs, trained.outputs)
    assert again.by_size == trained.by_size


def test_a_finished_ensemble_may_get_more_members(copy, trained, dataset, no_training):
    before = files(copy)
    # Fewer are refused.
    with pytest.raises(ConfigError, match=r"members must be at least the 3 that .* has, not 2"):
        train_ensemble(RECIPE, 2, dataset=dataset, workdir=copy, resume=True)
    assert files(copy) == before
    with pytest.raises(AssertionError, match="something was trained"):
        train_ensemble(RECIPE, 4, dataset=dataset, workdir=copy, resume=True)


def test_a_member_that_lacks_a_file_is_trained_again(copy, trained, dataset, monkeypatch):
    before, seeds, train = files(copy), [], Trials.train
    monkeypatch.setattr(
        Trials, "train", lambda self, seed, **o: seeds.append(seed) or train(self, seed, **o)
    )
    (copy / "members" / "seed_3" / "outputs.npy").unlink()
    (copy / "members" / "seed_5" / "step_00000024.npz").unlink()
    again = train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    assert seeds == [3, 5]
    np.testing.assert_array_equal(again.outputs, trained.outputs)
    after = files(copy)
    assert set(after) == set(before)
    for path in before:
        if "seed_4" in path.parts:
            assert after[path] == before[path]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        *(({"seed": value}, "seed") for value in (5, True, None, -1)),
        *(({"steps": value}, "steps") for value in (0, "9", 1.5, 2**70)),
        *(({"train_seconds": value}, "train_seconds") for value in (-1, "x", 1e300)),
        *(({"resident_bytes": value}, "resident_bytes") for value in (-1, 0.5)),
        *(({"weights_sha256": value}, "weights_sha256") for value in ("\x1b[31m", 3)),
    ],
)
def test_a_record_that_is_none(copy, dataset, change, key, no_training):
    path = copy / "members" / "seed_4" / "member.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=f"is no record of this member, its '{key}' is not one's: "):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)


def test_outputs_that_are_none(copy, trained, dataset, no_training):
    path = copy / "members" / "seed_4" / "outputs.npy"
    good = trained.outputs[1]
    for bad in (good[:, :20], good[:1], np.where(good > 0, np.inf, good), good[..., :9]):
        np.save(path, bad)
        with pytest.raises(DataError, match=r"must hold finite outputs of shape \(2, 30, 10\)"):
            train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    np.save(path, good[0])
    with pytest.raises(DataError, match=r"is damaged: it is float32 of shape .*expected float32"):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    (copy / "ensemble.json").write_text("[")
    with pytest.raises(DataError, match="is not readable JSON"):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)


def test_a_folder_of_something_else(copy, trained, dataset, tmp_path, no_training):
    for options, quoted in (
        ({"epochs": 2.0}, "epochs=3.0, not 2.0"),
        ({"seed": 4}, "seed=3, not 4"),
        ({"read": "validation"}, "ensemble='test', not 'validation'"),
    ):
        with pytest.raises(WorkdirError, match=f"holds a run with {quoted}"):
            train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True, **options)
    # Nor is a single run put into it, nor an ensemble into a single run's.
    with pytest.raises(WorkdirError, match="holds a run with ensemble='test', not None"):
        train_recipe(trained.recipe, dataset=dataset, workdir=copy, resume=True)
    Workdir(tmp_path / "one").open(trained.recipe.to_json())
    with pytest.raises(WorkdirError, match="holds a run with ensemble=None, not 'test'"):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=tmp_path / "one", resume=True)


def test_members_of_an_unknown_recipe_stay(copy, dataset):
    (copy / "recipe.json").unlink()
    before = files(copy)
    with pytest.raises(WorkdirError, match=r"has members but no recipe\.json"):
        train_ensemble(RECIPE, 3, dataset=dataset, workdir=copy, resume=True)
    assert files(copy) == before


def test_a_folder_that_is_removed_meanwhile(dataset, tmp_path, monkeypatch):
    train, folder = Trials.train, tmp_path / "cut"

    def removing(self, seed, **options):
        if seed == 4:
            shutil.rmtree(folder)
        return train(self, seed, **options)

    monkeypatch.setattr(Trials, "train", removing)
    with (
        pytest.warns(UserWarning, match="cut' was removed, or its files were"),
        pytest.raises(WorkdirError, match="lacks members/seed_3, removed while the ensemble"),
    ):
        train_ensemble(RECIPE, 2, dataset=dataset, workdir=folder)
    assert not (folder / "ensemble.json").exists()
    monkeypatch.undo()
    again = train_ensemble(RECIPE, 2, dataset=dataset, workdir=folder, resume=True)
    assert [member.seed for member in again.members] == [3, 4]


# --- without a folder, and memory ----------------------------------------------------------------


def test_without_a_folder_the_weights_go_with_the_ensemble(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Without test-time augmentation of its own: "mirror" of all images.
    recipe = dataclasses.replace(RECIPE, tta="none", tta_share=0.5)
    found = train_ensemble(recipe, 2, dataset=dataset)
    assert found.workdir is None
    assert (found.recipe.tta, found.recipe.tta_share) == ("mirror", 1.0)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("cifarflow-ensemble-")
    np.testing.assert_array_equal(
        found.predict(dataset.test.images).votes, combine_outputs(found.outputs[:, 1]).votes
    )
    del found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_temporary_files(dataset, monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(WorkdirError, match=r"temporary folder for weights: No space .*give a work"):
        train_ensemble(RECIPE, 2, dataset=dataset)


def test_memory_does_not_grow_with_the_members(dataset, tmp_path, monkeypatch):
    """Nothing but a member's outputs stays: no objects, no open files."""
    counts, handles = [], []
    save = module._Shelf.save

    def counting(self, *arguments):
        save(self, *arguments)
        gc.collect()
        counts.append(len(gc.get_objects()))
        if Path("/proc/self/fd").is_dir():
            handles.append(len(os.listdir("/proc/self/fd")))

    monkeypatch.setattr(module._Shelf, "save", counting)
    train_ensemble(RECIPE, 6, dataset=dataset, workdir=tmp_path)
    # The first two find out and keep what is known from then on; a member is some ten objects.
    grown = counts[-1] - counts[2]
    assert grown < 3 * 40
    assert len(set(handles[1:])) <= 1


# --- what is asked for -------------------------------------------------------------------------


class Lines:
    """A progress that notes what it is told."""

    made: ClassVar = []

    def __init__(self, total_steps, *, steps_per_epoch, first_step, description):
        self.made.append((total_steps, steps_per_epoch, first_step, description))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, step, **_):
        self.made[-1] = (*self.made[-1][:4], step)


def test_progress_and_changes(dataset):
    Lines.made.clear()
    found = train_ensemble(RECIPE, 2, dataset=dataset, progress=Lines, epochs=1.0, seed=9)
    assert Lines.made == [
        (8, 8, 0, "tiny, member 1 of 2", 8),
        (8, 8, 0, "tiny, member 2 of 2", 8),
    ]
    assert [member.seed for member in found.members] == [9, 10]
    assert found.recipe.epochs == 1.0


def test_the_test_set_is_left_alone_when_tuning(dataset):
    class Closed:
        def __len__(self):
            return 30

        @property
        def images(self):
            raise AssertionError("the test set was read")

        labels = images

    closed = dataclasses.replace(dataset)
    object.__setattr__(closed, "test", Closed())
    found = train_ensemble(RECIPE, 1, dataset=closed, read="validation")
    assert found.read == "validation"
    assert found.outputs.shape == (1, 2, 20, 10)


def test_the_test_set_is_read_once_a_member(dataset):
    reads = []

    class Counted(Split):
        @property
        def images(self):
            reads.append(1)
            return dataset.test.images

    counted = dataclasses.replace(dataset)
    test = object.__new__(Counted)
    object.__setattr__(test, "labels", dataset.test.labels)
    object.__setattr__(counted, "test", test)
    train_ensemble(RECIPE, 2, dataset=counted)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members must be a whole number >= 1, not 0"),
        ({"members": 2.0}, "members must be a whole number >= 1, not 2.0"),
        ({"seed": 2**31 - 1}, "seed must be at most 2147483647, not 2147483648"),
        ({"read": "train"}, "read must be one of test, validation, not 'train'"),
        ({"progress": 3}, "progress must be Progress or None, not 3"),
        ({"resume": True}, "resume=True needs a workdir, not None"),
        ({"batch_size": 65}, "batch_size must be at most the 64 training examples, not 65"),
        ({"nothing": 1}, "a recipe's field must be one of .*, not 'nothing'"),
    ],
)
def test_bad_options(dataset, options, message):
    with pytest.raises(ConfigError, match=message):
        train_ensemble(RECIPE, **{"members": 2, "dataset": dataset, **options})


def test_what_does_not_fit_the_data_leaves_no_folder(dataset, tmp_path):
    with pytest.raises(ConfigError, match="batch_size must be at most"):
        train_ensemble(RECIPE, 2, dataset=dataset, batch_size=65, workdir=tmp_path / "run")
    with pytest.raises(DataError, match="must have validation images, not 0"):
        train_ensemble(
            RECIPE,
            2,
            dataset=tiny.dataset(validation=0),
            read="validation",
            workdir=tmp_path / "run",
        )
    assert list(tmp_path.iterdir()) == []


def test_losses_and_files_that_are_no_good(dataset, tmp_path):
    with pytest.raises(NonFiniteError, match="the training loss became nan"):
        train_ensemble(
            RECIPE, 2, dataset=dataset, learning_rate=1e30, model_options={"activation": "relu"}
        )
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkdirError, match="cannot write to workdir"):
        train_ensemble(RECIPE, 2, dataset=dataset, workdir=tmp_path / "file" / "run")


def test_outputs_in_the_end_must_be_finite(dataset, monkeypatch):
    trials = Trials(RECIPE, dataset)
    trials.train(7)
    bad = np.full((30, 10), np.nan, np.float32)
    monkeypatch.setattr(trials._predict, "plain_and_mean", lambda images: (bad * 0, bad))
    with pytest.raises(NonFiniteError, match="the outputs of seed 7 are not finite"):
        trials.outputs()


def test_data_that_is_loaded(tmp_path, monkeypatch):
    small = Dataset("standin", *(tiny.split(n) for n in (64, 20, 30)), tiny.NAMES, "generated")
    asked = []
    monkeypatch.setattr(
        module, "load_recipe_data", lambda recipe, data_dir: asked.append(data_dir) or small
    )
    found = train_ensemble(RECIPE, 1, data_dir=tmp_path / "here")
    assert asked == [tmp_path / "here"]
    assert found.summary["dataset"] == "standin"


# --- the runner -----------------------------------------------------------------------------


@pytest.fixture
def runner(monkeypatch):
    """A function of an example and command-line words that runs it in this process."""
    import functools
    import importlib.util
    import sys

    from absl import flags

    from cifarflow import cli

    before = set(flags.FLAGS)
    # Scripts have flags of the same names.
    for kind in ("boolean", "enum", "float", "integer", "list", "string"):
        define = functools.partial(getattr(flags, f"DEFINE_{kind}"), allow_override=True)
        monkeypatch.setattr(flags, f"DEFINE_{kind}", define)

    def run(name, *words):
        path = Path(__file__).resolve().parents[1] / "examples" / name
        spec = importlib.util.spec_from_file_location("example", path)
        example = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "example", example)
        spec.loader.exec_module(example)
        saved = flagsaver.save_flag_values()
        monkeypatch.setattr(sys, "argv", [name, *words])
        try:
            with pytest.raises(SystemExit) as end:
                cli.run(example.main)
            return end.value.code
        finally:
            flagsaver.restore_flag_values(saved)
            flags.FLAGS.unparse_flags()

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_runner(runner, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("cifarflow.load_recipe_data", lambda *_, **__: tiny.dataset())
    monkeypatch.chdir(tmp_path)
    words = ["--recipe=lab_mlp", "--members=2", "--epochs=1", "--batch_size=8", "--seed=5"]
    words += ["--model_options=units=8", "--precision=float32", "--noprogress", "--workdir=two"]
    assert not runner("ensemble.py", *words)
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "two" / "ensemble.json").read_text())
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line]
    names = ["model", "---", "seed 5", "seed 6", "one, on average", "2 by average", "2 by vote"]
    assert [row[0] for row in rows] == names
    for row, member in zip(rows[2:4], record["members"], strict=True):
        assert row[1] == f"{member['accuracy']['plain']:.4f}"
        assert row[2] == f"{member['accuracy']['augmented']:.4f}"
        assert row[4] == f"{member['resident_bytes'] / 1e6:,.0f}"
    together = record["by_size"][-1]
    assert rows[5][1:3] == [f"{together['average'][name]:.4f}" for name in ("plain", "augmented")]
    assert rows[6][1:3] == [f"{together['vote'][name]:.4f}" for name in ("plain", "augmented")]
    assert "picture: two/ensemble.png" in out
    assert (tmp_path / "two" / "ensemble.png").read_bytes().startswith(b"\x89PNG")
    # Again it is refused; with --resume shown again.
    assert runner("ensemble.py", *words) == 2
    assert "holds a run of this recipe already" in capsys.readouterr().err
    assert not runner("ensemble.py", *words, "--resume", "--noplots")
    again = capsys.readouterr().out
    assert again.splitlines() == [x for x in out.splitlines() if not x.startswith("picture")]


def test_the_runner_without_a_folder_tunes(runner, monkeypatch, tmp_path, capsys):
    asked = []

    def load(recipe, **_):
        asked.append(recipe.validation_fraction)
        return tiny.dataset()

    monkeypatch.setattr("cifarflow.load_recipe_data", load)
    monkeypatch.chdir(tmp_path)
    words = "--recipe=fast75 --model=mlp --optimizer=sgd --members=1 --epochs=1 --batch_size=8"
    words += " --model_options=units=8 --precision=float32 --tune --noplots"
    assert not runner("ensemble.py", *words.split(), "--learning_rate_scales={}", "--freeze={}")
    out = capsys.readouterr().out
    assert "validation accuracy on 20 images" in out
    assert asked == [0.1]
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ensemble-fast75-")
    assert f"all files in runs/{folder.name}" in out


def test_the_labs_runs_of_several_seeds_are_an_ensemble(runner, monkeypatch, tmp_path, capsys):
    dataset = tiny.dataset()
    monkeypatch.setattr("cifarflow.load_recipe_data", lambda *_, **__: dataset)
    words = ["--recipes=lab_mlp", "--seeds=2", "--epochs=1", "--batch_size=8", "--noprogress"]
    words += ["--model_options=units=8", "--precision=float32", "--noplots"]
    assert not runner("lab.py", *words, f"--workdir={tmp_path}")
    last = capsys.readouterr().out.splitlines()[-1]
    found = combine_outputs(
        np.load(tmp_path / f"lab_mlp-{seed}" / "test_outputs.npy") for seed in (0, 1)
    )
    by_average, by_vote = (
        (predicted == dataset.test.labels).mean() for predicted in (found.by_average, found.by_vote)
    )
    assert last == (
        f"2 of lab_mlp as an ensemble: test accuracy {by_average:.4f} by average of probabilities, "
        f"{by_vote:.4f} by majority vote"
    )
