"""Capsules of failed steps: written whole, read with suspicion, replayed to the bit."""

import dataclasses
import io
import json
import math
import os
import pickle
import runpy
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import CifarflowError, ConfigError, WorkdirError
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.build import assemble
from cifarflow.recipes.named import get_recipe
from cifarflow.replay import replay_capsule
from cifarflow.training import capsule as module
from cifarflow.training import checkpoints
from cifarflow.training.capsule import (
    CapsuleError,
    Findings,
    examine_step,
    load_capsule,
    save_capsule,
)
from cifarflow.training.step import cross_entropy, make_train_step

STEP = 5


def bits(variables):
    return [np.asarray(variable).tobytes() for variable in variables]


def trained(name="lab_dropout", steps=STEP, **changes):
    """The pieces of a recipe after some steps, and its next batch."""
    sizes = {
        "cnn": {"filters": (4,), "kernel_size": 3, "dense_units": 8, "dropout": 0.25},
        "mlp": {"units": (8,)},
        "speednet": {"widths": (4,)},
    }
    recipe = get_recipe(name, batch_size=8, precision="float32")
    recipe = get_recipe(recipe, **{"model_options": sizes[recipe.model], **changes})
    pieces = assemble(recipe, tiny.dataset(train=64))
    if steps:
        train_step = make_train_step(
            pieces.model, pieces.optimizer, loss_fn=pieces.loss_fn, freeze=pieces.freeze
        )
        for images, labels in pieces.batches.dataset(0, steps):
            train_step(images, labels)
    return pieces, pieces.batches.batch_at(steps)


def state_of(pieces):
    return [*pieces.model.variables, *pieces.optimizer.variables]


def kept(folder, pieces, batch, **changes):
    """Saves a capsule of the next step; returns what was found."""
    found = examine_step(
        pieces.model,
        pieces.optimizer,
        *batch,
        loss_fn=pieces.loss_fn,
        freeze=pieces.freeze,
        accumulate_steps=pieces.recipe.accumulate_steps,
    )
    values = {
        "images": batch[0],
        "labels": batch[1],
        "variables": state_of(pieces),
        "step": STEP,
        "num_classes": 10,
        "steps_per_epoch": pieces.batches.steps_per_epoch,
        "found": found,
        "recipe": pieces.recipe.to_json(),
        "seed": pieces.recipe.seed,
    }
    assert save_capsule(folder, **{**values, **changes}) == folder
    return found


@pytest.fixture(scope="module")
def some(tmp_path_factory):
    """A capsule of a step whose loss is not a number, and what belongs to it."""
    folder = tmp_path_factory.mktemp("some") / "capsule"
    pieces, batch = trained("lab_mlp", steps=2)
    pieces.model.layers[-1].kernel.assign(np.full((8, 10), np.inf))
    return folder, pieces, batch, kept(folder, pieces, batch)


@pytest.fixture
def copy(some, tmp_path):
    """A copy of that capsule, to be damaged."""
    folder = tmp_path / "copy"
    for file in sorted(some[0].rglob("*")):
        if file.is_file():
            target = folder / file.relative_to(some[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return folder


def rewrite(folder, **changes):
    """Changes capsule.json as somebody would who knows how its checksum is made."""
    values = json.loads((folder / "capsule.json").read_text())
    del values["sha256"]
    values.update(changes)
    values["sha256"] = checkpoints.sha256_of(values)
    (folder / "capsule.json").write_text(json.dumps(values))


def test_a_sound_step_is_examined_and_nothing_changes():
    pieces, batch = trained()
    before = bits(state_of(pieces))
    found = examine_step(pieces.model, pieces.optimizer, *batch, loss_fn=pieces.loss_fn)
    assert bits(state_of(pieces)) == before
    assert found == Findings(found.loss)
    assert found.is_sound
    assert found.describe() == f"loss {found.loss:.6g}; all gradients and weights are finite"
    # The loss of the step itself, dropout and all.
    train_step = make_train_step(pieces.model, pieces.optimizer, loss_fn=pieces.loss_fn)
    sums = train_step(*map(tf.constant, batch))
    assert float(sums.loss / sums.examples) == found.loss


def test_what_is_not_finite_is_named():
    model = tiny.tiny_mlp()
    images, labels = tiny.batches().batch_at(0)
    model.layers[-1].bias.assign(np.full(10, 3e38))
    model.layers[-1].kernel.assign(np.full((8, 10), np.nan))
    found = examine_step(model, SGD(0.1), images, labels)
    everything = tuple(v.path for v in model.trainable_variables)
    assert math.isnan(found.loss)
    assert found.before == (model.layers[-1].kernel.path,)
    assert found.gradients == found.after == everything
    assert not found.is_sound
    text = found.describe()
    assert text.startswith(f"loss nan; weights before the step not finite: '{found.before[0]}'; ")
    assert "weights after the step not finite: " in text


def test_a_gradient_that_is_not_finite_at_a_finite_loss():
    def rough(labels, outputs):
        # The slope of a square root at 0.
        return cross_entropy()(labels, outputs) + tf.sqrt(tf.reduce_sum(0 * outputs, -1))

    model = tiny.linear()
    found = examine_step(
        model, SGD(0.1), np.ones((4, 2, 2, 3), np.float32), [0, 1, 2, 0], loss_fn=rough
    )
    assert math.isfinite(found.loss)
    assert found.before == ()
    assert found.gradients == found.after == tuple(v.path for v in model.trainable_variables)
    assert not found.is_sound


def test_a_skip_of_the_loss_scale_is_sound():
    model = tiny.tiny_mlp(dtype_policy="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(SGD(0.1), initial_scale=2.0**40)
    found = examine_step(model, optimizer, *tiny.batches().batch_at(0))
    assert found.gradients
    assert found.after == ()
    assert found.loss_scale == 2.0**40
    assert found.is_sound
    assert found.describe().endswith("; loss scale 1.09951e+12")
    assert float(optimizer.dynamic_scale) == 2.0**40


def test_many_names_are_cut_short():
    found = Findings(1.0, gradients=tuple(f"v{i}" for i in range(20)))
    assert found.describe() == ("loss 1; gradients not finite: 'v0', 'v1', 'v2', 'v3' and 16 more")


@pytest.mark.parametrize(
    "found",
    [
        Findings(0.1),
        Findings(math.nan, ("a",), ("b", "c"), ("d",), 0.5),
        Findings(-math.inf, loss_scale=math.inf),
    ],
)
def test_findings_go_through_json(found):
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    # NaN is equal to nothing, not even to itself.
    assert repr(Findings.from_json(values)) == repr(found)


def test_it_comes_back_as_it_was(some):
    folder, pieces, (images, labels), found = some
    capsule = load_capsule(str(folder))
    assert (capsule.step, capsule.seed, capsule.num_classes) == (STEP, 0, 10)
    assert capsule.steps_per_epoch == pieces.batches.steps_per_epoch
    assert capsule.recipe == pieces.recipe.to_json()
    assert repr(capsule.found) == repr(found)
    for ours, theirs in ((capsule.images, images), (capsule.labels, labels)):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    other, _ = trained("lab_mlp", steps=0, seed=3)
    capsule.restore(state_of(other))
    assert bits(state_of(other)) == bits(state_of(pieces))


@pytest.mark.parametrize("labels", [np.arange(4, dtype=np.int64), np.eye(4, dtype=np.float32)])
@pytest.mark.parametrize("dtype", [np.float32, tf.bfloat16.as_numpy_dtype])
def test_other_kinds_of_batches(tmp_path, labels, dtype):
    # In Fortran order, as a transposed batch is.
    images = np.arange(4 * 2 * 2 * 3).reshape(3, 2, 2, 4).T.astype(dtype)
    model = tiny.linear(classes=4)
    save_capsule(
        tmp_path / "it",
        images=images,
        labels=labels,
        variables=model.variables,
        step=0,
        num_classes=4,
        steps_per_epoch=1,
        found=Findings(1.0),
    )
    capsule = load_capsule(tmp_path / "it")
    assert (capsule.recipe, capsule.seed) == (None, None)
    np.testing.assert_array_equal(capsule.images.astype(np.float32), images.astype(np.float32))
    np.testing.assert_array_equal(capsule.labels, labels)
    assert (capsule.images.dtype, capsule.labels.dtype) == (images.dtype, labels.dtype)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lab_dropout", {"augment": "flip,crop:1"}),
        # Frozen before that step, in part.
        ("fast75", {"freeze": {"whitening/bias": 0.5}}),
        ("lab_dropout", {"accumulate_steps": 2}),
        ("lab_mlp", {"precision": "mixed_float16", "model_options": {"units": (8,), "l2": 0.01}}),
    ],
)
def test_a_replay_is_the_same_to_the_bit(tmp_path, name, changes):
    pieces, batch = trained(name, **changes)
    found = kept(tmp_path / "it", pieces, batch)
    assert found.is_sound
    again = replay_capsule(tmp_path / "it")
    assert again.loss == found.loss
    assert again.is_sound
    assert again.loss_scale == found.loss_scale


def test_a_replay_of_a_failure(some):
    folder, _, _, found = some
    again = replay_capsule(load_capsule(folder))
    assert math.isnan(again.loss)
    for ours, theirs in zip(
        dataclasses.astuple(again)[1:4], dataclasses.astuple(found)[1:4], strict=True
    ):
        # But for the numbers that Keras gives to layers.
        assert len(ours) == len(theirs) > 0


def test_a_capsule_is_replaced_and_nothing_else_is(tmp_path, some):
    _, pieces, batch, _ = some
    folder = tmp_path / "it"
    kept(folder, pieces, batch)
    kept(folder, pieces, batch, seed=7)
    assert load_capsule(folder).seed == 7
    assert [entry.name for entry in tmp_path.iterdir()] == ["it"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(WorkdirError, match=r"cannot write capsule '.*mine': something else is"):
        kept(mine, pieces, batch)
    assert [entry.name for entry in mine.iterdir()] == ["notes.txt"]
    with pytest.raises(WorkdirError, match=r"cannot write capsule '.*notes.txt/below': Not a dir"):
        kept(mine / "notes.txt" / "below", pieces, batch)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, some, failing, there):
    _, pieces, batch, _ = some
    folder = tmp_path / "it"
    if there:
        kept(folder, pieces, batch, seed=7)
    calls = []

    def disk_full(*arguments):
        calls.append(arguments)
        raise OSError(28, "No space left on device")

    def rename(self, target):
        # All but the last, which gives the new folder its name.
        if target == folder and not calls:
            disk_full(target)
        return self.replace(target)

    with monkeypatch.context() as patch:
        if failing == "fsync":
            patch.setattr(module.os, "fsync", disk_full)
        else:
            patch.setattr(module.pathlib.Path, "rename", rename)
        with pytest.raises(WorkdirError, match=r"capsule '.*/it': No space left on device"):
            kept(folder, pieces, batch)
    assert calls
    assert [entry.name for entry in tmp_path.iterdir()] == (["it"] if there else [])
    if there:
        assert load_capsule(folder).seed == 7


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"step": -1}, "step must be a whole number >= 0, not -1"),
        ({"num_classes": 0}, "num_classes must be a whole number >= 1, not 0"),
        ({"steps_per_epoch": 0.5}, "steps_per_epoch must be a whole number >= 1, not 0.5"),
        ({"seed": -3}, "seed must be a whole number >= 0, not -3"),
    ],
)
def test_bad_numbers(tmp_path, some, changes, quoted):
    _, pieces, batch, _ = some
    with pytest.raises(ConfigError, match=quoted):
        kept(tmp_path / "it", pieces, batch, **changes)
    assert list(tmp_path.iterdir()) == []


def refused(folder):
    with pytest.raises(CapsuleError) as caught:
        load_capsule(folder)
    assert isinstance(caught.value, CifarflowError)
    assert "\n" not in str(caught.value)
    assert repr(str(folder)) in str(caught.value)
    return str(caught.value)


def test_there_is_none(tmp_path):
    assert "there is no capsule in" in refused(tmp_path / "nowhere")
    assert "it has no capsule.json" in refused(tmp_path)


def test_any_flipped_byte_of_its_text_is_found(copy):
    path = copy / "capsule.json"
    whole = path.read_bytes()

    def read():
        """Its text, or why it is none."""
        try:
            return repr(dataclasses.replace(load_capsule(copy), images=None, labels=None))
        except CapsuleError as error:
            return error

    expected, harmless = read(), 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        found = read()
        if isinstance(found, CapsuleError):
            assert "is damaged: " in str(found)
            continue
        # Blanks into tabs, and the like.
        assert found == expected
        harmless += 1
    assert harmless < len(whole) / 10


@pytest.mark.parametrize("part", ["batch", "state", "capsule.json"])
def test_cuts_and_flips_are_found(copy, some, part):
    [path] = [copy / part] if part.endswith("json") else (copy / part).iterdir()
    whole = path.read_bytes()
    other, _ = trained("lab_mlp", steps=0, seed=3)
    before = bits(state_of(other))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    # The last byte of the text is the end of its last line, which says nothing.
    for data in (b"", whole[:40], whole[:-2], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(CapsuleError, match=r"is damaged: |cannot be restored: "):
            load_capsule(copy).restore(state_of(other))
        assert bits(state_of(other)) == before
    path.unlink()
    with pytest.raises(CapsuleError):
        load_capsule(copy).restore(state_of(other))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a capsule was run')",))


def npz(**members):
    """An .npz, with members that `numpy.savez` would not write."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return data.getvalue()


def npy(descr, shape):
    """The header of an .npy, with nothing behind it."""
    data = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(data, header)
    return data.getvalue()


@pytest.mark.parametrize("part", ["batch", "state"])
def test_pickles_and_claims_are_refused(copy, part):
    [path] = (copy / part).iterdir()
    other, _ = trained("lab_mlp", steps=0)
    huge = npy("|u1", (10**13,))
    pickled = io.BytesIO()
    np.save(pickled, np.array([Bomb()], object), allow_pickle=True)
    with np.load(path) as members:
        header = members["header"]
    text = io.BytesIO()
    np.save(text, header)
    for data in (
        pickle.dumps(Bomb()),
        npz(header=huge),
        npz(header=pickled.getvalue()),
        npz(header=text.getvalue(), **{"0000": huge, "0001": huge}),
        npz(header=text.getvalue(), **{"0000": pickled.getvalue()}),
    ):
        path.write_bytes(data)
        with pytest.raises(CapsuleError):
            load_capsule(copy).restore(state_of(other))


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"format": 2}, "capsule.json is not of format 1"),
        ({"step": -1}, "step must be"),
        ({"step": 6}, "there is no checkpoint"),
        ({"step": None}, "step must be"),
        ({"seed": "x"}, "seed must be"),
        ({"recipe": []}, "its recipe is none"),
        ({"num_classes": 1}, "num_classes must be"),
        ({"steps_per_epoch": 0}, "steps_per_epoch must be"),
        ({"found": {}}, "'before'"),
        ({"found": {"before": [3], "gradients": [], "after": []}}, "no list of names"),
        ({"found": None}, "subscriptable"),
        ({"batch": [[[8, 8, 8, 3], "uint8"]]}, "zip"),
        ({"batch": [[[9, 8, 8, 3], "uint8"], [[8], "int32"]]}, "is of another model"),
        ({"batch": [[[10**9] * 4, "uint8"], [[8], "int32"]]}, "is of another model"),
        ({"batch": [[[8, 8, 8, 3], "object"], [[8], "int32"]]}, "is of another model"),
        ({"batch": [[[8, 8, 8, 3], "no type"], [[8], "int32"]]}, "no type"),
        ({"batch": [[["x"], "uint8"], [[8], "int32"]]}, "invalid literal"),
    ],
)
def test_text_that_lies(copy, changes, quoted):
    rewrite(copy, **changes)
    assert quoted in refused(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1}', '{"format": NaN}', " " * 2**20]
)
def test_text_that_is_none(copy, text):
    (copy / "capsule.json").write_text(text)
    assert "is damaged: " in refused(copy)


def save_batch(folder, images, labels):
    save_capsule(
        folder,
        images=images,
        labels=labels,
        variables=[],
        step=0,
        num_classes=4,
        steps_per_epoch=1,
        found=Findings(1.0),
    )


@pytest.mark.parametrize(
    ("images", "labels", "quoted"),
    [
        (np.zeros((2, 3), np.uint8), np.zeros(2, np.int32), "are no batch"),
        (np.zeros((0, 2, 2, 3), np.uint8), np.zeros(0, np.int32), "are no batch"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros(3, np.int32), "are no batch"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, np.float32), "none of 4 classes"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros((2, 5), np.float32), "none of 4 classes"),
        (np.zeros((2, 2, 2, 3), np.uint8), np.zeros((2, 4), np.int32), "none of 4 classes"),
        (np.zeros((2, 2, 2, 3), bool), np.zeros(2, np.int32), "bool, not of numbers"),
        (np.zeros((2, 2, 2, 3), np.complex64), np.zeros(2, np.int32), "complex64, not of numbers"),
    ],
)
def test_batches_that_are_none(tmp_path, images, labels, quoted):
    save_batch(tmp_path / "it", images, labels)
    assert quoted in refused(tmp_path / "it")


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"recipe": None}, "has no recipe to build its model by"),
        ({"recipe": {}}, "has a recipe that cannot be built: .*name"),
        ({"recipe": {"name": "x", "nothing": 1}}, "has a recipe that cannot be built: .*nothing"),
        ({"recipe": {"name": "x", "epochs": -1}}, "cannot be built: epochs must be"),
        ({"recipe": {"name": "x", "model": "cnn"}}, "cannot be built: .* bytes of the state"),
        ({"recipe": {"name": "x", "model": "mlp"}}, "cannot be built: .* bytes of the state"),
        (
            {"recipe": {"name": "x", "model": "mlp", "model_options": {"units": [4]}}},
            "cannot be restored: .* is of another model",
        ),
    ],
)
def test_recipes_that_cannot_be_replayed(copy, changes, quoted):
    rewrite(copy, **changes)
    with pytest.raises(CapsuleError, match=quoted):
        replay_capsule(copy)


CLAIM = """
import resource, sys
from cifarflow import replay
from cifarflow.training.capsule import CapsuleError, load_capsule
capsule = load_capsule(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    replay.replay_capsule(capsule)
except CapsuleError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_a_model_that_is_claimed_takes_no_memory(some, copy):
    recipe = {"name": "x", "model": "mlp", "model_options": {"units": [800_000]}}
    rewrite(copy, recipe={**some[1].recipe.to_json(), **recipe})
    done = subprocess.run(
        [sys.executable, "-c", CLAIM, str(copy)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert done.returncode == 0, done.stderr
    grown, said = done.stdout.rstrip("\n").split(" ", 1)
    # The kernel of its first layer alone has 600 MB, that of the optimiser as much.
    assert int(grown) < 200_000
    assert "has a recipe that cannot be built: " in said
    assert said.endswith("its variables have more than the 16,041 bytes of the state")
    assert said.isprintable()


def test_a_label_that_the_model_has_no_output_for(tmp_path):
    pieces, (images, labels) = trained("lab_mlp", steps=0)
    kept(tmp_path / "it", pieces, (images, labels))
    kept(tmp_path / "it", pieces, (images, labels), labels=labels + 10)
    with pytest.raises(CifarflowError, match="labels must be from 0 to 9"):
        replay_capsule(tmp_path / "it")


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs `python -m cifarflow` with some words: exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cifarflow", *words])
        # As a new process has it, whichever tests were before.
        sys.modules.pop("cifarflow.__main__", None)
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("cifarflow", run_name="__main__")
        return caught.value.code or 0, *capfd.readouterr()

    return run


def test_the_command(some, command):
    code, out, err = command("replay", str(some[0]))
    assert (code, err) == (0, "")
    first, then, now = out.splitlines()
    assert first == "step 5 of 'lab_mlp', seed 0, 8 images"
    assert then.startswith("then: loss nan; weights before the step not finite: ")
    assert now.startswith("now:  loss nan; weights before the step not finite: ")


def test_the_command_says_where_a_step_does_not_fail_again(copy, command):
    rewrite(copy, found=Findings(2.0).to_json())
    code, out, _ = command("replay", str(copy))
    assert code == 0
    assert "it does not come out as it did" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "quoted"),
    [
        (["reply"], "not 'reply'"),
        (["replay"], "replay must be given FOLDER, the capsule of one step, not []"),
        (["replay", " "], "replay must be given FOLDER, the capsule of one step, not [' ']"),
        (
            ["replay", "a", "b"],
            "replay must be given FOLDER, the capsule of one step, not ['a', 'b']",
        ),
        (["replay", "nowhere"], "there is no capsule in 'nowhere'"),
        (["replay", "~nosuchuser/x"], "there is no capsule in '~nosuchuser/x'"),
        (["replay", "nowhere", "--nosuch=1"], "nosuch"),
    ],
)
def test_bad_commands(command, tmp_path, monkeypatch, words, quoted):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert quoted in err
