"""The batch-size finder: its search, its children, and what it says."""

import dataclasses
import io
import signal

import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import ConfigError
from cifarflow.recipes import find
from cifarflow.recipes.find import BatchTrial, find_batch_size, measure
from cifarflow.recipes.named import get_recipe

RECIPE = get_recipe("lab_mlp", **tiny.MLP)
GIB = 2**30


def spec(**changes):
    values = {"recipe": RECIPE.to_json(), "image_shape": [8, 8, 3], "num_classes": 10}
    return {**values, "examples": 64, "seconds": 1e-3, "batch_size": 16, **changes}


@pytest.mark.parametrize(
    ("room", "most", "tried", "expected"),
    [
        (10**9, 200, [32, 64, 128, 200], (200, 0)),
        (100, 1000, [32, 64, 128, 96], (96, 128)),
        (31, 1000, [32], (0, 32)),
        (5000, 50000, [2**n for n in range(5, 14)] + [6144, 5120, 4608, 4864], (4864, 5120)),
    ],
)
def test_the_search(room, most, tried, expected):
    seen = []

    def fits(size):
        seen.append(size)
        return size <= room

    assert find._search(fits, 32, most) == expected
    assert seen == tried


def fake(monkeypatch, *, room=100, rate=lambda size: 1000.0):
    calls = []

    def try_size(size, spec, limit):
        calls.append((size, spec, limit))
        if size > room:
            return BatchTrial(size, 5 * GIB, None, "over 4 GiB")
        return BatchTrial(size, size * GIB // 32, rate(size))

    monkeypatch.setattr(find, "_try_size", try_size)
    return calls


def test_what_is_found(monkeypatch):
    calls = fake(monkeypatch, rate=lambda size: {32: 500.0, 64: 960.0}.get(size, 1000.0))
    told = []
    data = tiny.dataset(train=2000)
    found = find_batch_size(RECIPE, dataset=data, memory_limit_gib=4, report=told.append)
    assert [trial.batch_size for trial in told] == [32, 64, 128, 96]
    assert [trial.batch_size for trial in found.trials] == [32, 64, 96, 128]
    assert (found.largest, found.efficient, found.is_bounded) == (96, 64, True)
    assert found.memory_limit_bytes == 4 * GIB
    assert found.table().splitlines() == [
        "batch size   peak memory    images/s",
        "        32      1.00 GiB         500",
        "        64      2.00 GiB         960",
        "        96      3.00 GiB       1,000",
        "       128      5.00 GiB  over 4 GiB",
    ]
    _, given, limit = calls[0]
    assert limit == 4 * GIB
    assert {**given, "recipe": None} == {
        "recipe": None,
        "image_shape": [8, 8, 3],
        "num_classes": 10,
        "examples": 2000,
        "seconds": 1.0,
    }
    assert "-" in BatchTrial(32, 0, None, "gone").describe()


def test_multiples_and_bounds(monkeypatch):
    calls = fake(monkeypatch, room=10**9)
    data = tiny.dataset(train=500)
    accumulating = dataclasses.replace(RECIPE, batch_size=30, accumulate_steps=3)
    options = {"multiple": 8, "seconds": 0.5, "dataset": data}
    assert find_batch_size(accumulating, largest=100, **options).largest == 96
    assert [size for size, *_ in calls] == [24, 48, 96]
    calls.clear()
    # By itself no limit but what is free, and the images.
    limited = dataclasses.replace(RECIPE, limit_examples=100)
    assert find_batch_size(limited, **options).largest == 96
    *_, limit = calls[-1]
    assert limit is None or GIB // 10 < limit < 2**60
    monkeypatch.setattr(find, "has_gpu", lambda: True)
    find_batch_size(RECIPE, **options)
    assert calls[-1][2] is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("memory_limit_gib", value) for value in (0, -1, float("nan"), "4")],
        *[("multiple", value) for value in (0, 1.5, None)],
        *[("largest", value) for value in (0, 31, 1.5)],
        *[("seconds", value) for value in (0, None)],
    ],
)
def test_bad_arguments(monkeypatch, option, value):
    fake(monkeypatch)
    with pytest.raises(ConfigError, match=f"{option} must be") as caught:
        find_batch_size(RECIPE, dataset=tiny.dataset(), **{option: value})
    assert repr(value) in str(caught.value)


def test_nothing_fits(monkeypatch):
    fake(monkeypatch, room=1)
    with pytest.raises(
        ConfigError, match=r"gib must be more than 4: even a batch of 32 .*: over 4"
    ):
        find_batch_size(RECIPE, dataset=tiny.dataset(), memory_limit_gib=4)
    with pytest.raises(
        ConfigError, match="multiple must be at most the 64 training images, not 65"
    ):
        find_batch_size(RECIPE, dataset=tiny.dataset(), multiple=65)


def test_what_a_child_measures():
    averaging = dataclasses.replace(
        RECIPE, averaging="ema", schedule="piecewise", drop_epochs=(1.0,), accumulate_steps=2
    )
    found = measure(spec(recipe=averaging.to_json()))
    assert found["images_per_second"] > 0
    assert found["memory_bytes"] > 100e6  # TensorFlow alone takes more


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), {"reason": "the machine's memory is exhausted"}),
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
            {"reason": "the device's memory is exhausted"},
        ),
        (
            tf.errors.InternalError(None, None, "RESOURCE_EXHAUSTED: Out of memory"),
            {"reason": "the device's memory is exhausted"},
        ),
        (ConfigError("no such thing"), {"error": "no such thing"}),
    ],
)
def test_what_goes_wrong_in_a_child(monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(find, "make_train_step", fail)
    assert measure(spec()) == expected
    monkeypatch.setattr(
        find,
        "make_train_step",
        lambda *_, **__: fail.nothing,  # a bug stays one
    )
    with pytest.raises(AttributeError):
        measure(spec())


def test_another_error_of_tensorflow_is_not_memory(monkeypatch):
    def fail(*_, **__):
        raise tf.errors.InternalError(None, None, "something else")

    monkeypatch.setattr(find, "make_train_step", fail)
    with pytest.raises(tf.errors.InternalError):
        measure(spec())


class Child:
    """A process that has ended as it is told."""

    def __init__(self, words, *, stdin, stdout, stderr, env, start_new_session):
        self.stdin, self.pid = io.BytesIO(), 2**22
        stdout.write(self.out)
        stderr.write(self.err)

    def wait(self, timeout=None):
        return self.returncode

    def kill(self):
        pass


@pytest.mark.parametrize(
    ("code", "out", "err", "expected"),
    [
        (0, b'{"memory_bytes": 7, "images_per_second": 3.5}\n', b"", BatchTrial(8, 7, 3.5)),
        (-signal.SIGKILL, b"", b"", "the machine's memory is exhausted"),
        (-signal.SIGABRT, b"", b"terminate called: std::bad_alloc\n", "the machine's memory"),
        (0, b'{"reason": "too much"}', b"", "too much"),
        (0, b'noise\n{"memory_bytes": 7000, "images_per_second": 1.0}\n', b"", "over 9.31e-07"),
        (0, b'{"error": "no \'x\'"}', b"", ConfigError("no 'x'")),
        (1, b"", b"Traceback\nValueError: a\x1bbug\n", ConfigError("exit status 1: ValueError: a")),
        (0, b"", b"", ConfigError("a batch of 8 could not be tried, exit status 0: ")),
    ],
)
def test_how_a_child_may_end(monkeypatch, code, out, err, expected):
    monkeypatch.setattr(Child, "returncode", code, raising=False)
    monkeypatch.setattr(Child, "out", out, raising=False)
    monkeypatch.setattr(Child, "err", err, raising=False)
    monkeypatch.setattr(find.subprocess, "Popen", Child)
    if isinstance(expected, Exception):
        with pytest.raises(ConfigError) as caught:
            find._try_size(8, spec(), 1000)
        assert str(expected) in str(caught.value)
        assert str(caught.value).isprintable()
        return
    trial = find._try_size(8, spec(), 1000)
    if isinstance(expected, BatchTrial):
        assert trial == expected
    else:
        assert trial.reason.startswith(expected)
        assert trial.images_per_second is None


def test_a_real_child_that_hits_its_limit():
    told = []
    # TensorFlow alone takes more.
    with pytest.raises(
        ConfigError, match=r"must be more than 0.2: even a batch of 32 .*: over 0.2"
    ):
        find_batch_size(RECIPE, dataset=tiny.dataset(), memory_limit_gib=0.2, report=told.append)
    (ended,) = told
    assert 0.2 < ended.memory_bytes / GIB < 0.5  # it was ended, and did not end
    assert ended.images_per_second is None


def test_the_memory_that_is_free(monkeypatch, tmp_path):
    assert find._bytes_in(tmp_path / "none", "x") == 0
    path = tmp_path / "status"
    path.write_text("Name: x\nVmHWM:\t  12 kB\nVmRSS: many\n")
    assert find._bytes_in(path, "VmHWM:") == 12 * 1024
    assert find._bytes_in(path, "VmRSS:") == find._bytes_in(path, "VmNone:") == 0
    monkeypatch.setattr(find, "_bytes_in", lambda *_: 0)
    assert find._free_bytes() is None or find._free_bytes() > 0
    assert find._peak_bytes() > 50e6  # as the system counts it
    monkeypatch.setattr(find, "_bytes_in", lambda *_: 1000)
    assert find._free_bytes() <= 900
