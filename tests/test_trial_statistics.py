"""Welch's test held to a published example and to what must hold, and the verdicts in words."""

import benchmark_suite  # noqa: F401
import hypothesis
import hypothesis.strategies as st
import pytest

# isort: split
import trial_statistics as ts

# Student (1908), hours of sleep gained by two drugs: R's data set `sleep`, whose
# t.test(extra ~ group) prints t = -1.8608, df = 17.776, p-value = 0.07939, interval -3.3654832 to
# 0.2054832, means 0.75 and 2.33.
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)
values = st.lists(st.floats(-1000, 1000).map(lambda x: round(x, 3)), min_size=2, max_size=8)
quickly = hypothesis.settings(max_examples=40, deadline=None)


def test_welch_is_that_of_the_published_example():
    found = ts.welch(*SLEEP)
    assert found.t == pytest.approx(-1.8608, abs=5e-5)
    assert found.degrees == pytest.approx(17.776, abs=5e-4)
    assert found.p == pytest.approx(0.07939, abs=5e-6)
    assert found.interval == pytest.approx((-3.3654832, 0.2054832), abs=5e-7)
    assert found.difference == pytest.approx(0.75 - 2.33)


@pytest.mark.parametrize(
    "runs", [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([1.0, 1.0], [2.0, 2.0, 2.0])]
)
def test_nothing_to_test_with(runs):
    assert ts.welch(*runs) is None


def vary(*runs):
    """Enough for the arithmetic not to be about the last digits of a double."""
    return all(max(each) - min(each) > 1e-2 for each in runs)


@quickly
@hypothesis.given(first=values, second=values)
def test_what_holds_of_welch(first, second):
    hypothesis.assume(vary(first, second))
    found = ts.welch(first, second)
    least = min(len(first), len(second)) - 1
    assert least - 1e-9 <= found.degrees <= len(first) + len(second) - 2 + 1e-9
    assert 0 <= found.p <= 1
    low, high = found.interval
    assert low < found.difference < high
    # The test and the interval say the same.
    hypothesis.assume(abs(found.p - ts.LEVEL) > 1e-9)
    assert (found.p < ts.LEVEL) == (low > 0 or high < 0)
    # The other way round it is the same, with the sign turned.
    turned = ts.welch(second, first)
    assert turned.t == pytest.approx(-found.t)
    assert turned.p == pytest.approx(found.p)
    assert turned.interval == pytest.approx((-high, -low))


@quickly
@hypothesis.given(first=values, second=values, shift=st.floats(-100, 100), log=st.floats(-3, 3))
def test_welch_knows_no_unit_and_no_zero(first, second, shift, log):
    hypothesis.assume(vary(first, second))
    found = ts.welch(first, second)
    scale = 10**log
    moved = ts.welch(*[[scale * (x + shift) for x in runs] for runs in (first, second)])
    assert moved.t == pytest.approx(found.t, rel=1e-6, abs=1e-6)
    assert moved.degrees == pytest.approx(found.degrees, rel=1e-6)
    assert moved.p == pytest.approx(found.p, rel=1e-5, abs=1e-9)


@quickly
@hypothesis.given(runs=values)
def test_equal_spread_is_students_own_test(runs):
    hypothesis.assume(vary(runs))
    other = [x + 1 for x in runs]
    assert ts.welch(runs, other).degrees == pytest.approx(2 * len(runs) - 2, rel=1e-6)


# Verdicts


def verdict(first, second, measure=ts.SECONDS):
    return ts.compare({"ours": first, "theirs": second}, measure)


def test_the_faster_one():
    ours, theirs = [25.1, 24.9, 25.4], [31.0, 30.2, 30.9]
    for found, counts in (
        (verdict(ours, theirs), "n = 3 of ours and 3 of theirs"),
        # Which is named first makes no difference.
        (
            ts.compare({"theirs": theirs, "ours": ours}, ts.SECONDS),
            "n = 3 of theirs and 3 of ours",
        ),
    ):
        assert found.winner == "ours"
        assert found.measure == "seconds"
        assert found.sentence == (
            "ours is faster: mean 25.1 s against 30.7 s, by 5.57 s, 1.22 times as fast (95 % "
            "interval 4.67 s to 6.46 s; Welch's t = 19.16, 3.2 degrees of freedom, p = 0.00021; "
            f"{counts})"
        )
        assert found.runs_needed is None


def test_the_more_accurate_one():
    found = verdict([0.751, 0.752, 0.753], [0.741, 0.742, 0.743], ts.ACCURACY)
    assert found.winner == "ours"
    assert "more accurate: mean 0.7520 against 0.7420, by 1.00 points" in found.sentence
    assert "4.0 degrees of freedom" in found.sentence


def test_within_chance():
    found = verdict([25.0, 27.0, 29.0], [26.0, 28.0, 30.0])
    assert found.winner is None
    assert found.sentence.startswith("which is faster cannot be said: ours came out ahead, mean")
    assert "1 s are within chance (95 % interval -3.53 s to 5.53 s; Welch's t = 0.61" in (
        found.sentence
    )
    assert found.test.p == pytest.approx(0.573, abs=1e-3)
    # 2 * (1.960 + .842)^2 * 2^2 / 1^2 = 62.8
    assert found.runs_needed == 63
    assert found.sentence.endswith("takes about 63 runs of each")


def test_hardly_any_difference():
    found = verdict([1.0, 2.0, 3.0], [1.0, 2.0, 3.0 + 1e-9])
    assert found.sentence.endswith("takes more than 10,000 runs of each")
    found = verdict([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert (found.winner, found.runs_needed) == (None, None)


def test_runs_needed_are_more_than_there_are():
    found = verdict([10.0, 11.0], [12.5, 14.0])
    assert found.test.p > ts.LEVEL
    assert found.runs_needed == 3


@pytest.mark.parametrize("runs", [([25.0], [31.0]), ([25.0], [31.0, 31.2]), ([25, 26.0], [31])])
def test_too_few_runs(runs):
    found = verdict(*runs)
    assert (found.winner, found.test) == (None, None)
    assert "which is faster cannot be said: n is too small (n = " in found.sentence
    assert "ours came out ahead, mean 25" in found.sentence


def test_no_variance_at_all():
    found = verdict([0.5, 0.5], [0.25, 0.25], ts.ACCURACY)
    assert found.winner == "ours"
    assert found.sentence.startswith("ours is more accurate in every run: mean 0.5000 against")
    assert "neither varies at all" in found.sentence
    found = verdict([0.5, 0.5], [0.5, 0.5, 0.5], ts.ACCURACY)
    assert found.winner is None
    assert found.sentence.startswith("neither is more accurate: every run came to 0.5000")


def test_seconds_as_text():
    assert [ts.SECONDS.show(s) for s in (0.01234, 25.34, 999.4, 1290.6)] == [
        "0.0123 s",
        "25.3 s",
        "999 s",
        "1,291 s",
    ]
