"""Summaries of runs, held to tables, closed forms and what must hold."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from cifarflow.errors import ConfigError
from cifarflow.evaluation.statistics import (
    LEVEL,
    Summary,
    student_quantile,
    student_tail,
    summarise,
)

# Fisher and Yates, Statistical Tables: the t that is exceeded, on either side, with probability p.
TABLE = [
    (0.05, 1, 12.706),
    (0.05, 2, 4.303),
    (0.05, 5, 2.571),
    (0.05, 10, 2.228),
    (0.05, 30, 2.042),
    (0.05, 120, 1.980),
    (0.10, 10, 1.812),
    (0.50, 3, 0.765),
    (0.01, 4, 4.604),
    (0.001, 1, 636.62),
    (0.001, 9, 4.781),
]
values = st.lists(st.floats(-1000, 1000).map(lambda x: round(x, 3)), min_size=2, max_size=8)
quickly = hypothesis.settings(max_examples=40, deadline=None)


@pytest.mark.parametrize(("tail", "degrees", "t"), TABLE)
def test_quantiles_are_those_of_the_table(tail, degrees, t):
    # The table has three decimals, or five digits.
    assert student_quantile(tail, degrees) == pytest.approx(t, abs=max(5e-4, t * 1e-5))
    assert student_tail(student_quantile(tail, degrees), degrees) == pytest.approx(tail)


@quickly
@hypothesis.given(t=st.floats(-1e6, 1e6))
def test_tails_of_one_and_two_degrees_are_the_closed_forms(t):
    # The second forms lose no digits where the tail is small.
    assert student_tail(t, 1) == pytest.approx(2 / math.pi * math.atan2(1, abs(t)), rel=1e-9)
    root = math.sqrt(2 + t * t)
    assert student_tail(t, 2) == pytest.approx(2 / (root * (root + abs(t))), rel=1e-9)


def test_far_tails():
    assert student_tail(0.0, 3.7) == 1
    assert student_tail(math.inf, 3.7) == 0
    assert student_tail(1e200, 3.7) == 0
    assert 0 < student_tail(20.0, 50) < 1e-20
    # With many degrees it is the normal distribution.
    assert student_quantile(0.05, 1e7) == pytest.approx(1.959964, abs=1e-5)


def test_a_summary_by_hand():
    # The squares add up to 2, of three degrees, for which the table has 3.182.
    found = summarise([4.0, 6.0, 5.0, 5.0])
    assert (found.n, found.mean) == (4, 5)
    assert found.deviation == pytest.approx(math.sqrt(2 / 3))
    half = 3.1824463 * math.sqrt(2 / 3) / 2
    assert found.interval == pytest.approx((5 - half, 5 + half), abs=1e-6)


def test_one_run_has_a_mean_only():
    assert summarise([0.75]) == Summary(1, 0.75, None, None)


def test_runs_that_do_not_vary():
    assert summarise([2.0, 2.0]) == Summary(2, 2.0, 0.0, (2.0, 2.0))


@quickly
@hypothesis.given(runs=values)
def test_what_holds_of_a_summary(runs):
    found = summarise(runs)
    low, high = found.interval
    assert low <= found.mean <= high
    assert (found.deviation == 0) == (low == high) == (len(set(runs)) == 1)
    # One mean against zero: the interval touches it where the test is at its level.
    if found.deviation:
        end = max(abs(low), abs(high)) - abs(found.mean)
        t = end / (found.deviation / math.sqrt(found.n))
        assert student_tail(t, found.n - 1) == pytest.approx(LEVEL, rel=1e-4)


def test_an_interval_covers_the_mean_in_95_of_100_cases():
    draws = np.random.default_rng(0).normal(5.0, 2.0, (1000, 4))
    half = student_quantile(LEVEL, 3) * draws.std(1, ddof=1) / 2
    covered = np.mean(abs(draws.mean(1) - 5.0) < half)
    # Three standard deviations of a share of 1,000.
    assert abs(covered - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1000)
    assert summarise(draws[0].tolist()).interval[1] == pytest.approx(draws[0].mean() + half[0])


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], ["many"], [None]])
def test_values_must_be_finite_numbers(bad):
    with pytest.raises(ConfigError) as caught:
        summarise(bad)
    assert str(caught.value) == f"values must be finite numbers, at least one, not {bad!r}"
