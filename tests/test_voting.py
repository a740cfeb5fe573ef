"""Several models' outputs made one, against a loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cifarflow.errors import DataError
from cifarflow.evaluation.predict import softmax
from cifarflow.evaluation.voting import combine_outputs

# Members, images, classes.
some = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(0, 6), st.just(3)),
    elements=st.floats(-4, 4, width=16),
)


@settings(max_examples=80, deadline=None)
@given(some)
def test_it_is_what_a_loop_gives(outputs):
    found = combine_outputs(outputs)
    assert found.members == len(outputs)
    assert (found.probabilities.dtype, found.votes.dtype) == (np.float32, np.int32)
    assert found.probabilities.shape == found.votes.shape == outputs.shape[1:]
    for image in range(outputs.shape[1]):
        chances = [softmax(member[image : image + 1])[0] for member in outputs]
        np.testing.assert_allclose(found.probabilities[image], np.mean(chances, 0), atol=1e-6)
        votes = [int(member[image].argmax()) for member in outputs]
        assert found.votes[image].tolist() == [votes.count(c) for c in range(3)]
        assert found.by_average[image] == found.probabilities[image].argmax()
        most = max(map(votes.count, votes))
        leaders = [c for c in range(3) if votes.count(c) == most]
        expected = max(leaders, key=lambda c, image=image: (found.probabilities[image, c], -c))
        assert found.by_vote[image] == expected


def test_vote_and_average_may_differ():
    # Two are a little for the first class, one is very much for the second.
    outputs = np.log([[[0.55, 0.45]], [[0.55, 0.45]], [[0.01, 0.99]]])
    found = combine_outputs(outputs)
    assert (found.by_vote.tolist(), found.by_average.tolist()) == ([0], [1])
    # Of one vote each the larger mean probability decides.
    assert combine_outputs(outputs[1:]).by_vote.tolist() == [1]


def test_outputs_may_come_one_by_one():
    outputs = np.random.default_rng(0).normal(size=(3, 5, 4))
    one_by_one = combine_outputs(member for member in outputs)
    for found, expected in zip(one_by_one, combine_outputs(outputs), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "outputs must be those of at least one model, not 0"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"the same shape .* not \[2, 3\] and \[2, 4\]"),
        ([np.zeros(3)], r"outputs must be of shape \[N, C\], not \[3\]"),
        ([np.full((1, 2), np.nan)], "outputs must be finite, not nan"),
    ],
)
def test_bad_input(outputs, message):
    with pytest.raises(DataError, match=message):
        combine_outputs(outputs)
