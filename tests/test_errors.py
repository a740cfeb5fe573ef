"""The error classes, and the checks that quote the bad value."""

import inspect
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow import errors
from cifarflow.errors import (
    CifarflowError,
    ConfigError,
    check_choice,
    check_float,
    check_int,
    check_seed,
)

BUILT_IN = {
    errors.ConfigError: ValueError,
    errors.DataError: ValueError,
    errors.DataNotFoundError: FileNotFoundError,
    errors.WorkdirError: OSError,
    errors.CheckpointError: ValueError,
    errors.NonFiniteError: FloatingPointError,
}


def test_every_error_is_also_the_built_in_one_that_a_caller_expects():
    classes = {
        value
        for _, value in inspect.getmembers(errors, inspect.isclass)
        if issubclass(value, CifarflowError) and value is not CifarflowError
    }
    assert classes == set(BUILT_IN)
    for error, built_in in BUILT_IN.items():
        with pytest.raises(built_in, match=r"^a message$") as caught:
            raise error("a message")
        assert isinstance(caught.value, CifarflowError)


@pytest.mark.parametrize("value", [1, 7, np.int32(7), np.uint8(7), np.array(7), tf.constant(7)])
def test_check_int_takes_any_whole_number_and_returns_a_plain_one(value):
    number = check_int("size", value)
    assert number == int(value)
    assert type(number) is int


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.0,
        "1",
        b"1",
        None,
        True,
        np.True_,
        np.float32(1),
        [1],
        np.array([1, 2]),
        np.array(1.0),
        math.nan,
        math.inf,
    ],
)
def test_check_int_refuses_the_rest(value):
    with pytest.raises(ConfigError) as caught:
        check_int("size", value)
    assert str(caught.value) == f"size must be a whole number >= 1, not {value!r}"


@settings(deadline=None, max_examples=100)
@given(st.integers(), st.integers())
def test_check_int_has_one_bound(value, minimum):
    if value >= minimum:
        assert check_int("size", value, minimum=minimum) == value
    else:
        with pytest.raises(ConfigError, match=f">= {minimum}, not {value}$"):
            check_int("size", value, minimum=minimum)


@pytest.mark.parametrize("value", [0, 2**31 - 1, np.int64(5)])
def test_check_seed_takes_31_bits(value):
    assert check_seed(value) == value
    assert type(check_seed(value)) is int


@pytest.mark.parametrize("value", [-1, 2**31, 2**70, 0.0, "0", None, True])
def test_check_seed_refuses_the_rest(value):
    with pytest.raises(ConfigError, match="seed must be ") as caught:
        check_seed(value)
    assert str(caught.value).endswith(f"not {value!r}")


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.5), np.array(0.5), 10**30])
def test_check_float_takes_any_number_and_returns_a_plain_one(value):
    number = check_float("rate", value)
    assert number == float(value)
    assert type(number) is float


@pytest.mark.parametrize(
    "value",
    [-1e-9, math.nan, math.inf, -math.inf, "0.5", b"1", None, True, [0.5], 1j, 10**400],
)
def test_check_float_refuses_the_rest(value):
    with pytest.raises(ConfigError) as caught:
        check_float("rate", value)
    assert str(caught.value) == f"rate must be a finite number >= 0, not {value!r}"


@settings(deadline=None, max_examples=200)
@given(
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.booleans(),
    st.booleans(),
)
def test_check_float_keeps_to_its_bounds(value, minimum, width, above, below):
    maximum = minimum + width
    bounds = {
        "minimum": minimum,
        "maximum": maximum,
        "above_minimum": above,
        "below_maximum": below,
    }
    is_good = minimum <= value <= maximum
    is_good &= not (above and value == minimum) and not (below and value == maximum)
    if is_good:
        assert check_float("rate", value, **bounds) == value
    else:
        with pytest.raises(ConfigError):
            check_float("rate", value, **bounds)


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ({}, ">= 0"),
        ({"above_minimum": True}, "> 0"),
        ({"minimum": -1, "maximum": 0.5}, ">= -1 and <= 0.5"),
        ({"maximum": 1.0, "below_maximum": True}, ">= 0 and < 1"),
    ],
)
def test_check_float_says_what_would_be_good(bounds, good):
    with pytest.raises(ConfigError) as caught:
        check_float("rate", math.nan, **bounds)
    assert str(caught.value) == f"rate must be a finite number {good}, not nan"


def test_check_choice_returns_what_it_knows():
    assert check_choice("kind", "b", ["a", "b"]) == "b"
    assert check_choice("kind", "b", (name for name in "ab")) == "b"


@pytest.mark.parametrize("value", ["c", "", "ab", None, 1, ["a"]])
def test_check_choice_names_the_choices(value):
    with pytest.raises(ConfigError) as caught:
        check_choice("kind", value, {"a": 1, "b": 2})
    assert str(caught.value) == f"kind must be one of a, b, not {value!r}"
