"""Checkpoints: whole or not there, verified before anything is set."""

import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import threading
import zipfile

import keras
import numpy as np
import pytest
import tiny

from cifarflow.errors import CheckpointError, ConfigError, WorkdirError
from cifarflow.optimizers.sgd import SGD
from cifarflow.training import checkpoints as module
from cifarflow.training.checkpoints import Checkpoints, hash_arrays


def some_variables(shapes=((2, 3), (4,)), names=("kernel", "bias"), dtype="float32"):
    values = [np.arange(1, np.prod(shape) + 1).reshape(shape) for shape in shapes]
    return [
        keras.Variable(value, dtype=dtype, name=name)
        for value, name in zip(values, names, strict=True)
    ]


def zeroed(variables):
    for variable in variables:
        variable.assign(np.zeros(variable.shape))
    return variables


def arrays(variables):
    return [np.asarray(variable) for variable in variables]


def assert_zero(variables):
    for array in arrays(variables):
        assert not array.astype(bool).any()


def test_what_is_saved_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []
    variables = some_variables()
    expected = arrays(variables)
    extra = {"pending": [1.5, None], "text": "ü"}
    path = checkpoints.save(7, variables, extra=extra)
    assert path == checkpoints.path(7) == tmp_path / "deep" / "checkpoints" / "step_00000007.npz"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert checkpoints.restore(7, zeroed(variables)) == extra
    for a, b in zip(expected, arrays(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_with_its_optimiser(tmp_path):
    def make():
        model = tiny.tiny_cnn(batch_norm_momentum=0.5, dropout=0.3)
        optimizer = SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
        return [*model.variables, *optimizer.variables]

    ours = make()
    for variable in ours:
        variable.assign(np.asarray(variable) + 3)
    Checkpoints(tmp_path).save(1, ours)
    theirs = make()
    assert hash_arrays(theirs) != hash_arrays(ours)
    Checkpoints(tmp_path).restore(1, theirs)
    assert hash_arrays(theirs) == hash_arrays(ours)
    assert len({str(a.dtype) for a in arrays(ours)}) > 1


def test_bfloat16_variables(tmp_path):
    variables = some_variables(dtype="bfloat16")
    expected = arrays(variables)
    Checkpoints(tmp_path).save(1, variables)
    Checkpoints(tmp_path).restore(1, zeroed(variables))
    for a, b in zip(expected, arrays(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_newest_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_1.npz").write_text("mine")
    for step in (5, 10, 123_456_789):
        checkpoints.save(step, some_variables())
    assert checkpoints.steps() == [10, 123_456_789]
    assert checkpoints.latest() == 123_456_789
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "step_1.npz").exists()
    assert Checkpoints(tmp_path, keep=1).save(3, some_variables()).exists()


@pytest.mark.parametrize("keep", [0, -1, 1.5, None, "2", True])
def test_bad_keep(tmp_path, keep):
    with pytest.raises(ConfigError, match="keep must be a whole number >= 1") as caught:
        Checkpoints(tmp_path, keep=keep)
    assert repr(keep) in str(caught.value)


def test_any_flipped_byte_is_found_or_harmless(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    expected = arrays(variables)
    path = checkpoints.save(1, variables)
    whole = path.read_bytes()
    found = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        zeroed(variables)
        with contextlib.suppress(CheckpointError):
            checkpoints.restore(1, variables)
            # Only bytes that mean nothing here, such as a zip member's date, come this far.
            for a, b in zip(expected, arrays(variables), strict=True):
                np.testing.assert_array_equal(a, b)
            continue
        assert_zero(variables)
        found += 1
    assert found > 0.75 * len(whole)


def test_any_cut_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    path = checkpoints.save(1, variables)
    whole = path.read_bytes()
    zeroed(variables)
    for length in [0, 1, 4, *range(10, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoints.restore(1, variables)
    assert_zero(variables)


def test_altered_values_are_found_by_the_checksum(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    path = checkpoints.save(1, variables)
    with np.load(path) as file:
        members = dict(file)
    members["0000"] = members["0000"] + 1
    np.savez(path, **members)
    with pytest.raises(CheckpointError, match=r"SHA-256 of its arrays is \w{64}, it should be"):
        checkpoints.restore(1, zeroed(variables))
    assert_zero(variables)


def test_a_header_that_lies_about_shapes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    path = checkpoints.save(1, variables)
    with np.load(path) as file:
        members = dict(file)
    # The same bytes, so the same checksum; the first variable is right and must not be set.
    members["0001"] = members["0001"].reshape(2, 2)
    np.savez(path, **members)
    with pytest.raises(CheckpointError):
        checkpoints.restore(1, zeroed(variables))
    assert_zero(variables)


@pytest.mark.parametrize(
    ("other", "quoted"),
    [
        ({"shapes": ((3, 2), (4,))}, r"\[2, 3\].*\[3, 2\]"),
        ({"names": ("kernel", "offset")}, "bias.*offset"),
        ({"dtype": "float16"}, "float32.*float16"),
        ({"shapes": ((2, 3),), "names": ("kernel",)}, "2 variables, the model has 1"),
        (
            {"shapes": ((2, 3), (4,), (1,)), "names": ("kernel", "bias", "more")},
            "2 variables, the model has 3",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, other, quoted):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some_variables())
    variables = zeroed(some_variables(**other))
    with pytest.raises(CheckpointError, match=f"is of another model: .*{quoted}"):
        checkpoints.restore(1, variables)
    assert_zero(variables)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    ours = {"seed": 0, "drop_epochs": (1.0,), "name": "mine"}
    variables = some_variables()
    Checkpoints(tmp_path, identity=ours).save(1, variables, score=1.0)
    zeroed(variables)
    for change, quoted in (
        ({"seed": 1}, "seed=0, not 1"),
        ({"drop_epochs": [2.0]}, r"drop_epochs=\[1.0\], not \[2.0\]"),
        ({"more": 3}, "more=None, not 3"),
    ):
        others = Checkpoints(tmp_path, identity={**ours, **change})
        for restore in (lambda c: c.restore(1, variables), lambda c: c.restore_best(variables)):
            with pytest.raises(CheckpointError, match=f"is of another run: {quoted}$"):
                restore(others)
    assert_zero(variables)
    Checkpoints(tmp_path).save(2, variables)
    with pytest.raises(CheckpointError, match=r"step_00000002.* another run: it does not say of"):
        Checkpoints(tmp_path, identity=ours).restore(2, variables)
    for same in (ours, {**ours, "drop_epochs": [1.0]}, {**ours, "none": None}, None):
        Checkpoints(tmp_path, identity=same).restore(1, zeroed(variables))
        assert np.asarray(variables[0]).all()
    # The best of another run is none of this one's.
    with pytest.warns(UserWarning, match=r"best\.npz' is of another run: .*, from step 3 on"):
        others.save(3, variables, score=2.0)
    assert others.restore_best(variables) == 3


@pytest.mark.parametrize("identity", [{"a": {1}}, [1], {"a": object()}])
def test_an_identity_that_is_not_json(tmp_path, identity):
    with pytest.raises(ConfigError, match="identity must be a mapping of JSON values, not"):
        Checkpoints(tmp_path, identity=identity)


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*step_00000009\.npz"):
        Checkpoints(tmp_path).restore(9, some_variables())


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_pickles_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    path = checkpoints.save(1, variables)
    zeroed(variables)
    with np.load(path) as file:
        members = dict(file)
    np.savez(path, **{**members, "0001": np.array([Bomb()], object)})
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(1, variables)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(1, variables)
    assert_zero(variables)


@pytest.mark.parametrize("header", [[], {}, {"variables": 3}, "x", None])
def test_a_header_that_is_none(tmp_path, header):
    path = Checkpoints(tmp_path).path(1)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8))
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoints(tmp_path).restore(1, some_variables())


def test_other_files_in_its_place(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with checkpoints.path(1).open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(1, some_variables())
    with zipfile.ZipFile(checkpoints.path(2), "w") as file:
        file.writestr("readme.txt", "nothing")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(2, some_variables())
    checkpoints.path(3).mkdir()
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.restore(3, some_variables())


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_a_folder_that_cannot_be_made(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(WorkdirError, match="cannot write checkpoint"):
        Checkpoints(file / below).save(1, some_variables())
    assert file.read_text() == "mine"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path, keep=1)
    variables = some_variables()
    path = checkpoints.save(1, variables)
    kept = path.read_bytes()

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, failing, disk_full)
        for step in (1, 2):
            with pytest.raises(WorkdirError, match="No space left on device"):
                checkpoints.save(step, zeroed(variables))
    assert path.read_bytes() == kept
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    checkpoints.restore(1, variables)


def test_a_half_written_file_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, some_variables())
    shutil.copy(path, path.with_name(".step_00000002.npz.99.tmp"))
    assert checkpoints.latest() == 1


def test_hash_arrays():
    one = [np.arange(4, dtype=np.int32), np.ones(2)]
    assert len(hash_arrays(one)) == 64
    assert hash_arrays(one) == hash_arrays([a.copy() for a in one])
    assert hash_arrays(one) == hash_arrays(iter(one))
    assert hash_arrays(one) != hash_arrays(one[::-1])
    assert hash_arrays([np.eye(3)[:, ::2]]) == hash_arrays([np.eye(3)[:, ::2].copy()])


# --- written in the background ---------------------------------------------------------------


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    variables = some_variables()
    expected = arrays(variables)
    go_on = threading.Event()
    write = module.np.savez

    def slowly(*args, **kwargs):
        assert go_on.wait(30)
        write(*args, **kwargs)

    monkeypatch.setattr(module.np, "savez", slowly)
    path = checkpoints.begin_save(3, variables)
    zeroed(variables)
    assert not path.exists()
    go_on.set()
    checkpoints.wait()
    checkpoints.wait()
    checkpoints.restore(3, variables)
    for a, b in zip(expected, arrays(variables), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_save_that_fails_is_told_once(tmp_path):
    folder = tmp_path / "file"
    folder.write_text("mine")
    checkpoints = Checkpoints(folder)
    checkpoints.begin_save(1, some_variables())
    with pytest.raises(WorkdirError, match="cannot write checkpoint"):
        checkpoints.begin_save(2, some_variables())
    checkpoints.wait()
    folder.unlink()
    checkpoints.save(3, some_variables())
    assert checkpoints.steps() == [3]


@pytest.mark.parametrize("is_before", [True, False])
def test_an_interrupt_while_a_save_begins(tmp_path, monkeypatch, is_before):
    start = threading.Thread.start

    def interrupted(thread):
        if not is_before:
            start(thread)
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.begin_save(1, some_variables())
    # What clears up after the interrupt finds nothing that is wrong.
    checkpoints.wait()
    assert checkpoints.steps() == ([] if is_before else [1])
    checkpoints.save(2, some_variables())
    assert checkpoints.latest() == 2


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".step_00000002.npz.0123456789abcdef"
    mine = tmp_path / ".step_00000002.npz.mine"
    for path in (left, mine):
        path.write_bytes(b"half")
    Checkpoints(tmp_path).save(3, some_variables())
    assert mine.exists()
    assert not left.exists()


# --- the best, and the one before --------------------------------------------------------------


def test_the_best_stays(tmp_path):
    variables = some_variables()
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
        # Another object each time, as after a restart.
        checkpoints = Checkpoints(tmp_path, keep=1)
        variables[1].assign(np.full(4, step))
        checkpoints.save(step, variables, score=score)
    assert checkpoints.steps() == [4]
    assert checkpoints.restore_best(variables) == 2
    np.testing.assert_array_equal(variables[1], np.full(4, 2.0))
    model_alone = zeroed(some_variables(shapes=((2, 3),), names=("kernel",)))
    assert checkpoints.restore_best(model_alone) == 2
    assert np.asarray(model_alone[0]).all()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*best\.npz"):
        Checkpoints(tmp_path / "other").restore_best(variables)
    with pytest.raises(ConfigError, match=r"score must be a finite number .* not nan"):
        checkpoints.save(5, variables, score=float("nan"))


def test_a_run_killed_between_a_file_and_the_best_comes_to_the_best_again(tmp_path, monkeypatch):
    variables, checkpoints = some_variables(), Checkpoints(tmp_path)
    checkpoints.save(1, variables, score=2.0)
    replace, done = os.replace, []

    def die_after_the_first(source, target):
        if done:
            raise OSError("killed")
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_after_the_first)
        with pytest.raises(WorkdirError, match="killed"):
            checkpoints.save(2, variables, score=1.0)
    # Who goes on from step 2 never looks at its score again; from step 1 on it is saved again.
    if checkpoints.latest_whole() == 1:
        checkpoints.save(2, variables, score=1.0)
    assert checkpoints.restore_best(variables) == 2


def test_a_best_that_is_lost(tmp_path):
    variables, checkpoints = some_variables(), Checkpoints(tmp_path, keep=1)
    assert checkpoints.lost_best() is None
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
        checkpoints.save(step, variables, score=score)
        assert checkpoints.lost_best() is None
    checkpoints.best_path.unlink()
    assert checkpoints.lost_best() == 2
    checkpoints.save(4, variables)
    with pytest.warns(UserWarning, match=r"there is no .*best\.npz': it was that of step 2"):
        checkpoints.save(5, variables, score=1.5)
    # The best of those that are left, and that is no longer the best of all.
    assert checkpoints.restore_best(variables) == 5
    assert checkpoints.lost_best() == 2
    damage(checkpoints.best_path)
    with pytest.warns(UserWarning, match=r"best\.npz' is damaged.*: it was that of step 2"):
        checkpoints.save(6, variables, score=1.0)
    assert checkpoints.lost_best() is None


def test_a_best_that_another_process_wrote_is_known_when_it_was_seen(tmp_path):
    Checkpoints(tmp_path).save(1, some_variables(), score=1.0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, some_variables(), score=2.0)
    assert checkpoints.lost_best() is None
    checkpoints.best_path.unlink()
    assert checkpoints.lost_best() == 1


def test_what_must_come_before_writing_may_fail(tmp_path):
    wrong = ["no such place"]

    def prepare():
        if wrong:
            raise WorkdirError(wrong[0])

    checkpoints = Checkpoints(tmp_path / "checkpoints", prepare=prepare)
    with pytest.raises(WorkdirError, match="no such place"):
        checkpoints.save(1, some_variables())
    assert not (tmp_path / "checkpoints").exists()
    wrong.clear()
    checkpoints.save(2, some_variables())
    assert checkpoints.steps() == [2]


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_of_a_rewound_time_goes(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (4, 6):
        checkpoints.save(step, some_variables())
    damage(checkpoints.path(6))
    with pytest.warns(UserWarning, match=r"step_00000006\.npz' is damaged"):
        assert checkpoints.latest_whole() == 4
    again = Checkpoints(tmp_path, keep=2)
    again.save(5, some_variables())
    assert again.steps() == [4, 5]
    assert again.latest_whole() == 5


def test_checkpoints_that_are_removed_meanwhile(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, some_variables())
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.warns(
        UserWarning, match=r"step_00000003\.npz' was removed meanwhile, as were 1 before.*of step 4"
    ):
        checkpoints.save(4, some_variables())
    checkpoints.save(5, some_variables())
    checkpoints.path(4).unlink()
    with pytest.warns(UserWarning, match=r"step_00000004\.npz' was removed meanwhile: that of"):
        checkpoints.save(6, some_variables())


@pytest.mark.parametrize("failing", ["is_dir", "iterdir"])
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, some_variables())

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, failing, refuse)
    for look in (checkpoints.steps, checkpoints.latest, checkpoints.latest_whole):
        with pytest.raises(WorkdirError, match=r"cannot read checkpoint folder .* denied$"):
            look()


def test_a_damaged_best_that_another_process_wrote(tmp_path):
    Checkpoints(tmp_path).save(1, some_variables(), score=1.0)
    damage(Checkpoints(tmp_path).best_path)
    with pytest.warns(UserWarning, match=r"best\.npz' is damaged.*: the best .* from step 2 on"):
        Checkpoints(tmp_path).save(2, some_variables(), score=2.0)


def test_the_one_before_a_damaged_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.latest_whole() is None
    for step in (1, 2, 3):
        checkpoints.save(step, some_variables())
    told = []
    assert checkpoints.latest_whole(report=told.append) == 3
    assert told == []
    damage(checkpoints.path(3))
    with pytest.warns(UserWarning, match=r"step_00000003\.npz' is damaged.*of step 2"):
        assert checkpoints.latest_whole() == 2
    checkpoints.path(2).write_bytes(b"")
    assert checkpoints.latest_whole(report=told.append) == 1
    assert [re.findall(r"step_0*(\d)\.npz", line) for line in told] == [["3"], ["2"]]
    damage(checkpoints.path(1))
    with pytest.raises(CheckpointError, match=r"is damaged: .*, and the 2 before it are too"):
        checkpoints.latest_whole(report=told.append)


# --- files that somebody made ------------------------------------------------------------------


def rewritten(path, change, *, compression=zipfile.ZIP_STORED):
    """The same zip file with other members."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members = change(members)
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)


def with_header(members, **changes):
    data = members["header.npy"]
    start = data.index(b"\n") + 1
    header = {**json.loads(data[start:]), **changes}
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(json.dumps(header).encode(), np.uint8))
    return {**members, "header.npy": buffer.getvalue()}


def of_shape(data, shape):
    """A member whose own header claims another shape."""
    old = re.search(rb"'shape': \(.*?\), }", data).group()
    new = f"'shape': {shape}, }}".encode()
    return data.replace(old + b" " * (len(new) - len(old)), new, 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: with_header(m, step=2), "it is of step 2, which its name is not"),
        (lambda m: with_header(m, extra={"pending": [1]}), "SHA-256"),
        (lambda m: with_header(m, score=-5.0), "SHA-256"),
        (lambda m: with_header(m, score="best"), "its score is no number"),
        (lambda m: with_header(m, step="2"), "its step is no number"),
        (lambda m: with_header(m, format=1), "it is of format 1, this version reads 3"),
        (lambda m: {**m, "more.npy": m["0000.npy"]}, "holds 1 members more than it says"),
        (lambda m: {**m, "0001.npy": of_shape(m["0001.npy"], (10**10,))}, "it ends after 16 of"),
        (lambda m: {**m, "0001.npy": m["0001.npy"] + b"xxxx"}, "it goes on after its 16"),
        (lambda m: with_header(m, variables={}), "its variables are no list"),
        (lambda m: with_header(m, variables=[1]), "cannot unpack"),
        (lambda m: with_header(m, identity={"seed": 1}), "SHA-256"),
        (lambda m: with_header(m, identity=[]), "what says which run it is of is no mapping"),
        (lambda m: with_header(m, extra=[]), "what is kept beside it no mapping"),
        (lambda m: with_header(m, more="x" * 5_000_000), "its header has 50"),
    ],
)
def test_a_file_that_somebody_changed(tmp_path, change, text):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, some_variables())
    rewritten(path, change)
    variables = zeroed(some_variables())
    with pytest.raises(CheckpointError, match=f"is damaged: .*{text}"):
        checkpoints.restore(1, variables)
    assert_zero(variables)


def test_a_compressed_member_is_not_unpacked(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, some_variables())
    rewritten(path, lambda members: members, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="a member is compressed, and none should be"):
        checkpoints.restore(1, some_variables())
