"""When hooks run, and early stopping."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.errors import ConfigError
from cifarflow.training.hooks import EarlyStopping, Every, Hook, LoopState, Metrics

PER_EPOCH = 10


def state_at(epoch, loss=None, accuracy=0.5):
    state = LoopState(None, None, None, round(epoch * PER_EPOCH), PER_EPOCH, 1000)
    if loss is not None:
        state.validation, state.validation_step = Metrics(loss, accuracy), state.step
    return state


@pytest.mark.parametrize(
    "given_",
    [
        {},
        {"steps": 1, "epochs": 1},
        {"steps": 1, "seconds": 1.0},
        {"steps": 1, "epochs": 1, "seconds": 1},
    ],
)
def test_exactly_one_unit(given_):
    with pytest.raises(ConfigError, match="exactly one of steps, epochs and seconds, not"):
        Every(**given_)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "2", True, [1]])
@pytest.mark.parametrize("unit", ["steps", "epochs", "seconds"])
def test_bad_intervals(unit, value):
    with pytest.raises(ConfigError, match=f"{unit} must be") as caught:
        Every(**{unit: value})
    assert repr(value) in str(caught.value)


def test_steps_must_be_whole():
    with pytest.raises(ConfigError, match=r"steps must be a whole number >= 1, not 1\.5"):
        Every(steps=1.5)


def test_steps():
    every = Every(steps=7)
    nexts = [every.next_step(step, steps_per_epoch=PER_EPOCH) for step in (0, 6, 7, 8, 14)]
    assert nexts == [7, 7, 14, 14, 21]


def test_parts_of_epochs_are_rounded_to_steps():
    every = Every(epochs=0.25)
    step, seen = 0, []
    for _ in range(8):
        step = every.next_step(step, steps_per_epoch=PER_EPOCH)
        seen.append(step)
    # Ends of epochs are hit exactly, however the parts are rounded.
    assert seen == [2, 5, 8, 10, 12, 15, 18, 20]


def test_seconds_have_no_step():
    every = Every(seconds=2)
    assert every.next_step(5, steps_per_epoch=PER_EPOCH) is None
    assert every.seconds == 2


def test_an_interval_below_a_step_is_every_step():
    for epochs in (1e-12, 0.01, 0.1):
        assert Every(epochs=epochs).next_step(7, steps_per_epoch=PER_EPOCH) == 8


@settings(deadline=None, max_examples=200)
@given(
    epochs=st.floats(1e-6, 50),
    per_epoch=st.integers(1, 2000),
    start=st.integers(0, 5000),
)
def test_moments_do_not_depend_on_where_one_starts(epochs, per_epoch, start):
    every = Every(epochs=epochs)
    after = every.next_step(start, steps_per_epoch=per_epoch)
    assert after > start
    assert after - start <= max(1, math.ceil(epochs * per_epoch) + 1)
    for between in {start, (start + after) // 2, after - 1}:
        if between >= start:
            assert every.next_step(between, steps_per_epoch=per_epoch) == after


def test_a_hook_calls_its_function():
    seen = []
    Hook(Every(steps=1), seen.append).run("the state")
    assert seen == ["the state"]
    idle = Hook(Every(steps=1))
    idle.run(None)
    assert idle.get_state() == {}
    idle.set_state({})


def test_state_knows_its_epoch():
    state = state_at(1.5)
    assert state.epoch == 1.5
    assert state.stop_reason == ""
    state.stop("enough")
    assert state.stop_reason == "enough"


def stopped_at(stopping, values):
    """The epoch at which training stops, given a validation value for each."""
    for epoch, value in enumerate(values, 1):
        state = state_at(epoch, **value)
        stopping.run(state)
        if state.stop_reason:
            return epoch, state.stop_reason
    return None, ""


def test_early_stopping_on_the_loss():
    losses = [2.0, 1.0, 1.5, 0.9, 0.95, 0.9]
    epoch, reason = stopped_at(EarlyStopping(patience_epochs=2), [{"loss": x} for x in losses])
    assert epoch == 6
    assert reason == "validation loss has not improved since epoch 4"
    patient = EarlyStopping(patience_epochs=3)
    assert stopped_at(patient, [{"loss": x} for x in losses]) == (None, "")


def test_early_stopping_on_the_accuracy():
    values = [{"loss": 1.0, "accuracy": a} for a in (0.3, 0.5, 0.4, 0.45)]
    stopping = EarlyStopping(patience_epochs=2, monitor="accuracy")
    epoch, reason = stopped_at(stopping, values)
    assert epoch == 4
    assert reason == "validation accuracy has not improved since epoch 2"


def test_an_improvement_below_min_delta_does_not_count():
    losses = [{"loss": 1.0 - 0.01 * epoch} for epoch in range(5)]
    assert stopped_at(EarlyStopping(patience_epochs=2), losses)[0] is None
    assert stopped_at(EarlyStopping(patience_epochs=2, min_delta=0.1), losses)[0] == 3


def test_a_loss_that_is_nan_is_no_improvement():
    values = [{"loss": 1.0}, {"loss": math.nan}, {"loss": math.nan}]
    assert stopped_at(EarlyStopping(patience_epochs=2), values)[0] == 3


def test_one_validation_is_not_counted_twice():
    stopping = EarlyStopping(patience_epochs=1)
    stopping.run(state_at(1))
    state = state_at(2, 1.0)
    stopping.run(state)
    state.step += PER_EPOCH
    stopping.run(state)
    assert state.stop_reason == ""


def test_its_state_goes_through_json():
    losses = [{"loss": x} for x in (2.0, 1.0, 1.5, 1.5, 1.5)]
    for cut in range(4):
        first, second = (EarlyStopping(patience_epochs=2) for _ in range(2))
        assert stopped_at(first, losses[:cut])[0] is None or cut == 4
        second.set_state(json.loads(json.dumps(first.get_state(), allow_nan=False)))
        for epoch in range(cut + 1, 5):
            state = state_at(epoch, **losses[epoch - 1])
            second.run(state)
            assert bool(state.stop_reason) == (epoch == 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patience_epochs", 0),
        ("patience_epochs", -1),
        ("patience_epochs", 1.5),
        ("patience_epochs", "3"),
        ("monitor", "f1"),
        ("monitor", None),
        ("min_delta", -0.1),
        ("min_delta", math.nan),
    ],
)
def test_bad_options(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be") as caught:
        EarlyStopping(**{name: value})
    assert repr(value) in str(caught.value)
