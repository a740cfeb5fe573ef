"""Confusion matrix and accuracies."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cifarflow.errors import ConfigError, DataError
from cifarflow.evaluation.metrics import (
    accuracy,
    check_matrix,
    class_scores,
    confusion_matrix,
    per_class_accuracy,
    top_k_accuracy,
)

pairs_of_three_classes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=50)


def matrix_of(pairs):
    labels = np.array([pair[0] for pair in pairs], dtype=np.int32)
    predictions = np.array([pair[1] for pair in pairs], dtype=np.int64)
    return confusion_matrix(labels, predictions, num_classes=3)


def test_rows_are_true_and_columns_predicted():
    matrix = confusion_matrix([0, 0, 0, 2], [0, 1, 1, 0], num_classes=3)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 2, 0], [0, 0, 0], [1, 0, 0]]


@given(pairs_of_three_classes)
def test_every_cell_is_the_count_of_its_pair(pairs):
    matrix = matrix_of(pairs)
    for true in range(3):
        for predicted in range(3):
            assert matrix[true, predicted] == pairs.count((true, predicted))


@given(pairs_of_three_classes, pairs_of_three_classes)
def test_matrices_of_two_parts_add_up(first, second):
    assert (matrix_of(first) + matrix_of(second) == matrix_of(first + second)).all()


@given(pairs_of_three_classes.filter(bool))
def test_accuracy_is_the_share_of_equal_pairs(pairs):
    right = sum(true == predicted for true, predicted in pairs)
    assert accuracy(matrix_of(pairs)) == right / len(pairs)


def test_small_dtypes_do_not_overflow():
    labels = np.full(3, 99, dtype=np.uint8)
    assert confusion_matrix(labels, labels, num_classes=100)[99, 99] == 3


def test_no_examples():
    matrix = confusion_matrix([], [], num_classes=2)
    assert matrix.tolist() == [[0, 0], [0, 0]]
    assert math.isnan(accuracy(matrix))


def test_class_without_examples_has_no_accuracy():
    shares = per_class_accuracy([[3, 1], [0, 0]])
    assert shares[0] == 0.75
    assert math.isnan(shares[1])


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([[0], [1]], [0, 1], r"labels must be of shape \[N\], not \[2, 1\]"),
        ([0, 1], [0.2, 0.8], "predictions must be integers, not float64"),
        ([0, 3], [0, 1], r"labels must be in 0\.\.2, not 3"),
        ([0, 1], [-1, 1], r"predictions must be in 0\.\.2, not -1"),
        ([0, 1], [0], "must be equally many, not 2 and 1"),
    ],
)
def test_confusion_matrix_quotes_bad_input(labels, predictions, message):
    with pytest.raises(DataError, match=message):
        confusion_matrix(labels, predictions, num_classes=3)


def test_num_classes_must_be_positive():
    with pytest.raises(ConfigError, match="num_classes must be a whole number >= 1, not 0"):
        confusion_matrix([], [], num_classes=0)


@pytest.mark.parametrize("measure", [accuracy, per_class_accuracy, class_scores, check_matrix])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1, 2, 3], [4, 5, 6]], r"must be of shape \[C, C\], not \[2, 3\]"),
        ([1, 2], r"must be of shape \[C, C\], not \[2\]"),
        (np.zeros((0, 0), int), r"must be of shape \[C, C\], not \[0, 0\]"),
        ([[0.5, 0.5], [0.0, 1.0]], "must hold whole numbers, not float64"),
        ([[1, -2], [0, 1]], "must hold counts >= 0, not -2"),
    ],
)
def test_bad_matrix(measure, matrix, message):
    with pytest.raises(DataError, match=message):
        measure(matrix)


# --- precision, recall, F1


def test_class_scores_by_hand():
    # Of class 0 three of four are found, among five that are taken for it.
    found = class_scores([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    np.testing.assert_allclose(found.precision, [3 / 5, 4 / 5, np.nan])
    np.testing.assert_allclose(found.recall, [3 / 4, 4 / 6, np.nan])
    np.testing.assert_allclose(found.f1, [2 * 0.6 * 0.75 / 1.35, 8 / 11, np.nan])


def test_a_class_that_is_only_predicted_or_only_there():
    found = class_scores([[0, 2], [0, 5]])
    np.testing.assert_array_equal(found.precision, [np.nan, 5 / 7])
    np.testing.assert_array_equal(found.recall, [0, 1])
    np.testing.assert_array_equal(found.f1, [0, 10 / 12])


@given(pairs_of_three_classes)
def test_class_scores_are_what_counting_gives(pairs):
    found = class_scores(matrix_of(pairs))
    for c in range(3):
        hits = pairs.count((c, c))
        predicted = sum(guess == c for _, guess in pairs)
        true = sum(label == c for label, _ in pairs)
        for score, part, whole in (
            (found.precision, hits, predicted),
            (found.recall, hits, true),
            (found.f1, 2 * hits, predicted + true),
        ):
            assert score[c] == part / whole if whole else math.isnan(score[c])


# --- top-k accuracy

# Few values: ties are common.
few = hnp.arrays(np.float64, st.tuples(st.integers(1, 8), st.just(4)), elements=st.integers(-2, 2))


@settings(deadline=None)
@given(few, st.integers(1, 4), st.integers(0, 99))
def test_top_k_is_what_sorting_gives(outputs, k, seed):
    labels = np.random.default_rng(seed).integers(0, 4, len(outputs))
    hits = 0
    for row, label in zip(outputs, labels, strict=True):
        hits += label in sorted(range(4), key=lambda c, row=row: (-row[c], c))[:k]
    assert top_k_accuracy(labels, outputs, k=k) == hits / len(outputs)
    if k == 1:
        assert top_k_accuracy(labels, outputs, k=1) == np.mean(outputs.argmax(1) == labels)
    if k == 4:
        assert top_k_accuracy(labels, outputs, k=4) == 1


def test_top_k_of_no_examples():
    assert math.isnan(top_k_accuracy([], np.zeros((0, 3)), k=1))


@pytest.mark.parametrize(
    ("labels", "outputs", "k", "error", "message"),
    [
        ([0], [[1, 2]], 0, ConfigError, "k must be a whole number >= 1, not 0"),
        ([0], [[1, 2]], 3, ConfigError, "k must be at most the 2 classes, not 3"),
        ([0, 1], [[1, 2]], 1, DataError, "labels must be 1, one an example, not 2"),
        ([2], [[1, 2]], 1, DataError, r"labels must be in 0\.\.1, not 2"),
        ([0], [1, 2], 1, DataError, r"outputs must be of shape \[N, C\], not \[2\]"),
        ([0], np.zeros((1, 0)), 1, DataError, r"outputs must be of shape .* not \[1, 0\]"),
        ([0], [["a", "b"]], 1, DataError, "outputs must be numbers, not <U1"),
        ([0], [[math.nan, 1.0]], 1, DataError, "outputs must be finite, not nan"),
        ([0], [[1.0, -math.inf]], 1, DataError, "outputs must be finite, not -inf"),
    ],
)
def test_top_k_quotes_bad_input(labels, outputs, k, error, message):
    with pytest.raises(error, match=message):
        top_k_accuracy(labels, outputs, k=k)
