"""The schedules at their corners, against their formulas, and through Keras's serialisation."""

import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.errors import ConfigError
from cifarflow.optimizers.schedules import (
    Constant,
    Cosine,
    InverseTime,
    OneCycle,
    Piecewise,
    WarmedSchedule,
)
from cifarflow.optimizers.sgd import SGD

EXAMPLES = [
    Constant(0.1),
    Constant(0.1, warmup_steps=10, warmup_start=0.5),
    InverseTime(0.1, 1e-6),
    InverseTime(0.1, 0.5, warmup_steps=10),
    Cosine(0.1, 100),
    Cosine(0.1, 100, final_fraction=0.01, warmup_steps=10, warmup_start=0.1),
    OneCycle(0.1, 100),
    OneCycle(
        0.1,
        100,
        start_fraction=0.1,
        peak_fraction=0.5,
        end_fraction=0.0,
        anneal="cosine",
        warmup_steps=10,
        warmup_start=0.05,
    ),
    Piecewise([20, 60], [0.1, 0.01, 0.0]),
    Piecewise([20, 60], [0.1, 0.01, 0.001], warmup_steps=10, warmup_start=0.3),
]


def at(schedule, *steps):
    return [float(schedule(step)) for step in steps]


CORNERS = [
    (Constant(0.5), {0: 0.5, 1000: 0.5}),
    # rises over 4 steps from a quarter: .125 + .375 n / 4
    (
        Constant(0.5, warmup_steps=4, warmup_start=0.25),
        {0: 0.125, 1: 0.21875, 3: 0.40625, 4: 0.5, 9: 0.5},
    ),
    (InverseTime(0.5, 0.25), {0: 0.5, 1: 0.4, 4: 0.25, 12: 0.125}),
    # the decay counts from the end of the warm-up
    (InverseTime(0.5, 0.25, warmup_steps=2), {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.4, 6: 0.25}),
    (Cosine(0.5, 8), {0: 0.5, 2: 0.25 + 0.25 * math.sqrt(0.5), 4: 0.25, 8: 0.0, 20: 0.0}),
    (Cosine(0.5, 8, final_fraction=0.2), {0: 0.5, 4: 0.3, 8: 0.1, 20: 0.1}),
    (Cosine(0.5, 10, warmup_steps=2), {0: 0.0, 1: 0.25, 2: 0.5, 6: 0.25, 10: 0.0}),
    (Cosine(0.5, 4, warmup_steps=4), {0: 0.0, 2: 0.25, 3: 0.375, 4: 0.5}),
    # airbench's triangle: .2 -> 1 over 23 steps, -> .07 over 77
    (
        OneCycle(2.0, 100),
        {0: 0.4, 1: 0.4 + 1.6 / 23, 23: 2.0, 24: 2 - 1.86 / 77, 100: 0.14, 300: 0.14},
    ),
    # the peak is at a step: floor(.23 * 10) = 2
    (OneCycle(2.0, 10), {0: 0.4, 1: 1.2, 2: 2.0, 6: 1.07, 10: 0.14}),
    (
        OneCycle(2.0, 8, start_fraction=0.0, peak_fraction=0.5, end_fraction=0.0, anneal="cosine"),
        {0: 0.0, 1: 1 - math.sqrt(0.5), 2: 1.0, 4: 2.0, 5: 1 + math.sqrt(0.5), 6: 1.0, 8: 0.0},
    ),
    (OneCycle(2.0, 10, peak_fraction=0.0, end_fraction=0.5), {0: 2.0, 5: 1.5, 10: 1.0}),
    (OneCycle(2.0, 10, peak_fraction=1.0), {0: 0.4, 5: 1.2, 10: 2.0, 11: 2 - 1.86, 12: 0.14}),
    # up to the start of the rise, then ten steps as above
    (OneCycle(2.0, 14, warmup_steps=4), {0: 0.0, 2: 0.2, 4: 0.4, 5: 1.2, 6: 2.0, 14: 0.14}),
    (Piecewise([2, 5], [0.5, 0.2, 0.0]), {0: 0.5, 1: 0.5, 2: 0.2, 4: 0.2, 5: 0.0, 9: 0.0}),
    # the warm-up does not move the boundaries
    (Piecewise([3], [0.5, 0.2], warmup_steps=2), {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.2}),
]


@pytest.mark.parametrize(("schedule", "expected"), CORNERS, ids=lambda part: type(part).__name__)
def test_corners(schedule, expected):
    np.testing.assert_allclose(
        at(schedule, *expected), list(expected.values()), rtol=1e-6, atol=1e-7
    )


def test_one_cycle_is_airbench_interpolation():
    steps, peak = 391, 11.5
    corners = [0, int(0.23 * steps), steps], [0.2 * peak, peak, 0.07 * peak]
    expected = np.interp(np.arange(steps + 1), *corners)
    np.testing.assert_allclose(at(OneCycle(peak, steps), *range(steps + 1)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            InverseTime(0.01, 1e-6),
            keras.optimizers.schedules.InverseTimeDecay(0.01, decay_steps=1, decay_rate=1e-6),
        ),
        (Cosine(0.1, 500), keras.optimizers.schedules.CosineDecay(0.1, 500)),
        (
            Cosine(0.1, 500, final_fraction=0.1, warmup_steps=50),
            keras.optimizers.schedules.CosineDecay(
                0.0, 450, alpha=0.1, warmup_target=0.1, warmup_steps=50
            ),
        ),
    ],
)
def test_equals_keras(ours, theirs):
    steps = [0, 1, 49, 50, 51, 250, 499, 500, 501]
    np.testing.assert_allclose(at(ours, *steps), at(theirs, *steps), rtol=1e-5, atol=1e-8)


def test_piecewise_changes_one_step_before_keras():
    ours = Piecewise([4, 6], [3.0, 2.0, 1.0])
    theirs = keras.optimizers.schedules.PiecewiseConstantDecay([3, 5], [3.0, 2.0, 1.0])
    assert at(ours, *range(9)) == at(theirs, *range(9))


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_step_may_be_an_int_or_a_tensor(schedule, jit_compile):
    compiled = tf.function(schedule, jit_compile=jit_compile)
    for step in (0, 5, 10, 23, 60, 100, 200):
        value = schedule(step)
        assert value.dtype == tf.float32
        assert value.shape == ()
        for dtype in (tf.int64, tf.int32):
            assert float(schedule(tf.constant(step, dtype))) == float(value)
        traced = compiled(tf.constant(step, tf.int64))
        assert traced.dtype == tf.float32
        np.testing.assert_allclose(float(traced), float(value), rtol=1e-5, atol=1e-8)
    assert compiled.experimental_get_tracing_count() == 1
    assert float(schedule(tf.Variable(5, dtype=tf.int64))) == float(schedule(5))


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)
def test_round_trip(schedule):
    config = json.loads(json.dumps(schedule.get_config()))
    again = type(schedule).from_config(config)
    assert again.get_config() == schedule.get_config()
    serialized = keras.optimizers.schedules.serialize(schedule)
    assert serialized["registered_name"] == f"cifarflow>{type(schedule).__name__}"
    loaded = keras.optimizers.schedules.deserialize(serialized)
    steps = range(0, 120, 7)
    assert at(loaded, *steps) == at(schedule, *steps)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda s: type(s).__name__)
def test_optimizer_counts_from_zero(schedule):
    optimizer = SGD(schedule)
    variable = keras.Variable([1.0])
    for step in range(3):
        np.testing.assert_allclose(float(optimizer.learning_rate), float(schedule(step)))
        optimizer.apply([tf.ones(1)], [variable])
    np.testing.assert_allclose(variable.numpy(), [1 - sum(at(schedule, 0, 1, 2))], rtol=1e-6)


FRACTIONS = st.floats(0, 1)


@settings(max_examples=15, deadline=None)
@given(
    peak=st.floats(1e-4, 10),
    total=st.integers(1, 15),
    warmup=st.integers(0, 15),
    warmup_start=FRACTIONS,
    start=FRACTIONS,
    turn=FRACTIONS,
    end=FRACTIONS,
    anneal=st.sampled_from(["linear", "cosine"]),
)
def test_any_setting_rises_then_falls(peak, total, warmup, warmup_start, start, turn, end, anneal):
    warm = {"warmup_steps": min(warmup, total), "warmup_start": warmup_start}
    cosine = Cosine(peak, total, final_fraction=end, **warm)
    cycle = OneCycle(
        peak,
        total,
        start_fraction=start,
        peak_fraction=turn,
        end_fraction=end,
        anneal=anneal,
        **{**warm, "warmup_start": warmup_start * start},
    )
    inverse = InverseTime(peak, end, **warm)
    for schedule in (cosine, cycle, inverse):
        values = np.array(at(schedule, *range(0, total + 2)))
        assert np.all(values >= 0)
        assert np.all(values <= peak * (1 + 1e-6))
        top = int(np.argmax(values))
        assert np.all(np.diff(values[: top + 1]) >= -1e-6 * peak)
        assert np.all(np.diff(values[top:]) <= 1e-6 * peak)
        if warm["warmup_steps"]:
            first = schedule.warmup_start * peak
            np.testing.assert_allclose(values[0], first, rtol=1e-5, atol=1e-7)
    for schedule in (cosine, cycle):
        # One step more: a fall of no length, with the peak at the very end, takes one.
        np.testing.assert_allclose(at(schedule, total + 2)[0], end * peak, rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    boundaries=st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(sorted),
    values=st.lists(st.floats(0.001, 10), min_size=6, max_size=6),
)
def test_any_piecewise_is_a_search(boundaries, values):
    values = values[: len(boundaries) + 1]
    schedule = Piecewise(boundaries, values)
    steps = np.arange(0, 55, 3)
    expected = np.float32(values)[np.searchsorted(boundaries, steps, side="right")]
    assert at(schedule, *steps) == expected.tolist()


BAD = [
    *[
        (make, {"learning_rate": value}, "learning_rate", value)
        for make in (
            lambda **k: Constant(**k),
            lambda **k: InverseTime(decay=0.1, **k),
            lambda **k: Cosine(total_steps=9, **k),
            lambda **k: OneCycle(total_steps=9, **k),
        )
        for value in (0, -1, math.nan, math.inf, "0.1", None)
    ],
    *[
        (make, {"total_steps": value}, "total_steps", value)
        for make in (lambda **k: Cosine(0.1, **k), lambda **k: OneCycle(0.1, **k))
        for value in (0, -5, 1.5, math.nan, True, "9")
    ],
    *[
        (make, {name: value}, name, value)
        for make in (
            lambda **k: Constant(0.1, **k),
            lambda **k: InverseTime(0.1, 0.1, **k),
            lambda **k: Cosine(0.1, 9, **k),
            lambda **k: OneCycle(0.1, 9, **k),
            lambda **k: Piecewise([5], [0.1, 0.2], **k),
        )
        for name, values in {"warmup_steps": (-1, 0.5), "warmup_start": (-0.1, 1.1)}.items()
        for value in values
    ],
    *[
        (make, {"warmup_steps": 10}, "warmup_steps", 10)
        for make in (
            lambda **k: Cosine(0.1, 9, **k),
            lambda **k: OneCycle(0.1, 9, **k),
            lambda **k: Piecewise([10], [0.1, 0.2], **k),
        )
    ],
    *[(InverseTime, {"learning_rate": 1, "decay": v}, "decay", v) for v in (-0.5, math.nan)],
    *[
        (lambda **k: Cosine(0.1, 9, **k), {"final_fraction": value}, "final_fraction", value)
        for value in (-0.1, 1.5, math.nan)
    ],
    *[
        (lambda **k: OneCycle(0.1, 9, **k), {name: value}, name, value)
        for name in ("start_fraction", "peak_fraction", "end_fraction")
        for value in (-0.1, 1.5, math.nan)
    ],
    (lambda **k: OneCycle(0.1, 9, **k), {"anneal": "sine"}, "anneal", "sine"),
    *[
        (Piecewise, {"boundaries": boundaries, "values": values}, name, quoted)
        for boundaries, values, name, quoted in [
            ([], [0.1], "boundaries", []),
            ([5], [0.1], "values", [0.1]),
            ([5], [0.1, 0.2, 0.3], "values", [0.1, 0.2, 0.3]),
            ([5, 5], [0.1, 0.2, 0.3], "boundaries", [5, 5]),
            ([7, 5], [0.1, 0.2, 0.3], "boundaries", [7, 5]),
            ([0], [0.1, 0.2], "boundaries", 0),
            ([2.5], [0.1, 0.2], "boundaries", 2.5),
            ([5], [0.1, -0.2], "values", -0.2),
            ([5], [0.1, math.nan], "values", math.nan),
            ([5], [0.0, 0.1], "learning_rate", 0.0),
        ]
    ],
]


@pytest.mark.parametrize(
    ("make", "arguments", "name", "value"),
    BAD,
    ids=lambda part: str(part).partition(" at 0x")[0][:30],
)
def test_bad_arguments_are_quoted(make, arguments, name, value):
    with pytest.raises(ConfigError) as error:
        make(**arguments)
    message = str(error.value)
    assert name in message
    assert repr(value) in message
    assert "\n" not in message


def test_arguments_after_the_second_are_keyword_only():
    for make in (Constant, InverseTime, Cosine, OneCycle, Piecewise):
        with pytest.raises(TypeError):
            make(0.1, 10, 0.5)


def test_the_base_is_abstract():
    with pytest.raises(NotImplementedError, match="must define after_warmup"):
        WarmedSchedule(0.1, warmup_steps=0, warmup_start=0.0)(0)
