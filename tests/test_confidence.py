"""Calibration and worst mistakes, against naive counting and values by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.confidence import calibration, worst_mistakes
from cifarflow.evaluation.predict import softmax
from cifarflow.evaluation.scores import score_outputs

quickly = settings(max_examples=60, deadline=None)
logits = hnp.arrays(
    np.float64, st.tuples(st.integers(0, 30), st.just(3)), elements=st.floats(-6, 6, width=16)
)


def labels_of(outputs, seed):
    return np.random.default_rng(seed).integers(0, 3, len(outputs))


def two(confidences):
    """Probabilities of two classes, of which the first is predicted."""
    first = np.asarray(confidences, np.float64)
    return np.stack([first, 1 - first], axis=1)


# --- calibration


def test_a_calibration_by_hand():
    # Of two predictions at 0.6 none is right, of two at 0.9 both are.
    found = calibration([1, 1, 0, 0], two([0.6, 0.6, 0.9, 0.9]), bins=2)
    assert found.bins[0] == (None, None, 0)
    assert found.bins[1] == pytest.approx((0.75, 0.5, 4))
    assert found.error == pytest.approx(0.25)
    found = calibration([1, 1, 0, 0], two([0.6, 0.6, 0.9, 0.9]), bins=4)
    assert found.bins[2:] == (pytest.approx((0.6, 0.0, 2)), pytest.approx((0.9, 1.0, 2)))
    assert found.error == pytest.approx((2 * 0.6 + 2 * 0.1) / 4)


@quickly
@given(logits, st.integers(0, 99), st.sampled_from([1, 2, 7, 15]))
def test_the_error_is_what_a_loop_gives(outputs, seed, bins):
    labels, chances = labels_of(outputs, seed), softmax(outputs).astype(np.float64)
    found = calibration(labels, chances, bins=bins)
    total, seen = 0.0, 0
    for m, part in enumerate(found.bins, 1):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(chances, labels, strict=True)
            if (m - 1) / bins < row.max() <= m / bins or (row.max() > 1 and m == bins)
        ]
        assert part.examples == len(inside)
        if inside:
            sure, right = (float(np.mean(column)) for column in zip(*inside, strict=True))
            assert part == pytest.approx((sure, right, len(inside)))
            total += len(inside) * abs(right - sure)
        seen += len(inside)
    assert seen == len(labels)
    if seen:
        assert found.error == pytest.approx(total / seen)
    else:
        assert math.isnan(found.error)


def test_the_upper_edge_belongs_to_the_bin():
    counts = [part.examples for part in calibration([0] * 3, two([0.6, 0.8, 1.0]), bins=5).bins]
    assert counts == [0, 0, 1, 1, 1]
    assert len(calibration([0], two([0.6])).bins) == 15


def test_half_precision_may_be_a_little_off():
    assert calibration([0], [[1.01, 0.0]]).bins[-1] == (1.0, 1.0, 1)


# --- worst mistakes


def test_the_most_confident_mistake_comes_first():
    # The second and the last are right.
    chances = two([0.7, 0.99, 0.9, 0.7, 0.6])
    found = worst_mistakes(np.array([1, 0, 1, 1, 0]), chances)
    assert found.indices.tolist() == [2, 0, 3]
    assert found.labels.tolist() == [1, 1, 1]
    assert found.predicted.tolist() == [0, 0, 0]
    np.testing.assert_array_equal(found.probabilities, chances[[2, 0, 3]].astype(np.float32))
    assert [array.dtype for array in found] == [np.int32] * 3 + [np.float32]
    assert worst_mistakes([1, 0, 1, 1, 0], chances, count=2).indices.tolist() == [2, 0]


@quickly
@given(logits, st.integers(0, 99), st.integers(1, 9))
def test_the_worst_are_what_sorting_gives(outputs, seed, count):
    labels, chances = labels_of(outputs, seed), softmax(outputs)
    wrong = [n for n, row in enumerate(chances) if row.argmax() != labels[n]]
    wrong.sort(key=lambda n: (-chances[n].max(), n))
    assert worst_mistakes(labels, chances, count=count).indices.tolist() == wrong[:count]


def test_no_mistakes():
    found = worst_mistakes([0, 0], two([0.6, 0.9]))
    assert [array.shape for array in found] == [(0,), (0,), (0,), (0, 2)]


@pytest.mark.parametrize("measure", [calibration, worst_mistakes])
@pytest.mark.parametrize(
    ("labels", "chances", "message"),
    [
        (
            [0],
            [[0.5, 0.4]],
            r"add up to 1 \(apply softmax to logits\), not 0\.4\.\.0\.5 with sums 0\.9",
        ),
        ([0], [[1.5, -0.5]], r"must be >= 0 .* not -0\.5\.\.1\.5"),
        ([0], [[math.nan, 0.5]], "probabilities must be finite, not nan"),
        ([0], [0.5, 0.5], r"probabilities must be of shape \[N, C\], not \[2\]"),
        ([0, 1], [[0.5, 0.5]], "labels must be 1, one an example, not 2"),
        ([2], [[0.5, 0.5]], r"labels must be in 0\.\.1, not 2"),
    ],
)
def test_bad_input(measure, labels, chances, message):
    with pytest.raises(DataError, match=message):
        measure(labels, chances)


def test_counts_must_be_positive():
    with pytest.raises(ConfigError, match="bins must be a whole number >= 1, not 0"):
        calibration([0], [[0.5, 0.5]], bins=0)
    with pytest.raises(ConfigError, match="count must be a whole number >= 1, not 0"):
        worst_mistakes([0], [[0.5, 0.5]], count=0)


# --- scores, as a summary keeps them


def test_scores_are_json_and_few_classes_have_few():
    scores = score_outputs(np.array([0, 0, 1]), np.array([[2.0, 1, 0], [0, 1, 2], [0, 9, 1]]))
    assert [key for key in scores if key.startswith("top")] == ["top_2_accuracy"]
    assert scores["top_2_accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert scores["precision"] == [1.0, 1.0, 0.0]
    assert scores["recall"] == [0.5, 1.0, None]
    assert scores["f1"] == [pytest.approx(2 / 3, abs=1e-6), 1.0, 0.0]
    assert scores["calibration_bins"][0] == [None, None, 0]
    assert sum(part[2] for part in scores["calibration_bins"]) == 3


def test_scores_quote_bad_input():
    with pytest.raises(DataError, match="outputs must be finite, not inf"):
        score_outputs(np.array([0]), np.array([[np.inf, 0.0]]))
