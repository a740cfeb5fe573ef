"""McNemar's test by hand and against counting; two runs compared by their folders."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.errors import DataError, WorkdirError
from cifarflow.evaluation.comparison import LEVEL, mcnemar
from cifarflow.recipes.compare import compare_runs
from cifarflow.recipes.run import train_recipe


def compared(first_only, second_only, both=10, neither=5, **options):
    """Two models of which so many examples are right by one, the other, both, neither."""
    first = [0] * first_only + [1] * second_only + [0] * both + [1] * neither
    second = [1] * first_only + [0] * second_only + [0] * both + [2] * neither
    return mcnemar(np.zeros(len(first), int), np.array(first), np.array(second), **options)


@pytest.mark.parametrize(
    ("first_only", "second_only", "p"),
    [
        # Exact: twice the tail of a fair coin.
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (0, 5, 2 / 2**5),
        (0, 6, 2 / 2**6),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (1, 9, 2 * (1 + 10) / 2**10),
        # The chi-square: a table's 3.841 is 0.05, 6.635 is 0.01 and 10.828 is 0.001.
        (20, 20, 1.0),
        (10, 20, math.erfc(math.sqrt(81 / 30 / 2))),
        (5, 25, math.erfc(math.sqrt(361 / 30 / 2))),
    ],
)
def test_p_by_hand(first_only, second_only, p):
    assert compared(first_only, second_only).p == pytest.approx(p, rel=1e-9)
    assert compared(second_only, first_only).p == pytest.approx(p, rel=1e-9)


def test_p_of_the_textbook():
    # Agresti's table of approval, 150 and 86 discordant: 17.36 without the correction, so
    # 63**2 / 236 with it.
    found = compared(86, 150)
    assert not found.is_exact
    assert found.p == pytest.approx(math.erfc(math.sqrt(16.8178 / 2)), rel=1e-3)
    # The 95 % and 99 % points of the normal distribution are those of chi-square, squared.
    for statistic, p in ((3.841459, 0.05), (6.634897, 0.01), (10.827566, 0.001)):
        assert math.erfc(math.sqrt(statistic / 2)) == pytest.approx(p, rel=1e-5)


def test_exact_up_to_24():
    assert compared(10, 14).is_exact
    assert not compared(10, 15).is_exact
    # The two agree where one takes over from the other.
    exact = 2 * sum(math.comb(25, k) for k in range(8)) / 2**25
    assert compared(7, 18).p == pytest.approx(exact, rel=0.1)


labels_of_three = st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(labels_of_three)
def test_the_counts_are_what_a_loop_gives(rows):
    labels, first, second = (np.array(column) for column in zip(*rows, strict=True))
    found = mcnemar(labels, first, second)
    right = [(a == label, b == label) for label, a, b in rows]
    assert found.examples == len(rows)
    assert found.both_right == right.count((True, True))
    assert found.first_only == right.count((True, False))
    assert found.second_only == right.count((False, True))
    assert found.neither_right == right.count((False, False))
    assert found.discordant == found.first_only + found.second_only
    assert found.accuracies == pytest.approx(
        [sum(a for a, _ in right) / len(rows), sum(b for _, b in right) / len(rows)]
    )
    assert 0 < found.p <= 1
    other = mcnemar(labels, second, first)
    assert other.p == found.p
    assert other.accuracies == found.accuracies[::-1]


@pytest.mark.parametrize("discordant", [0, 3, 5, 6, 12, 24, 25, 60, 301])
def test_the_least_difference_is_where_p_crosses_the_level(discordant):
    least = compared(discordant, 0).least_difference
    if discordant < 6:
        assert least is None
        return
    examples = discordant + 15
    excess = round(least * examples)
    more, less = (discordant + excess) // 2, (discordant - excess) // 2
    assert more + less == discordant
    assert compared(more, less).p < LEVEL
    assert compared(more - 1, less + 1).p >= LEVEL


def test_verdicts():
    few = compared(5, 0, names=("a", "b"))
    assert few.verdict == (
        "too few images to say which is better: the two differ in only 5 (accuracy 0.7500 against "
        "0.5000 on 20 images, 5 right by 'a' alone and 0 by 'b' alone, p = 0.062)"
    )
    same = compared(30, 32, both=1000, neither=100, names=("a", "b"))
    assert same.verdict.startswith("no difference that chance could not make: a difference of 0.0")
    better = compared(10, 60, both=1000, names=("a", "b"))
    assert better.verdict.startswith("'b' is better than 'a' (accuracy 0.9395 against 0.9860 on 1")
    assert compared(60, 10, names=("a", "b")).verdict.startswith("'a' is better than 'b' (")
    assert compared(60, 10).names == ("first", "second")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([], [], []), "labels must hold at least one example, not 0"),
        (([0, 1], [0], [0, 1]), "first must be 2, one an example, not 1"),
        (([0, 1], [0, 1], [0]), "second must be 2, one an example, not 1"),
        (([0], [-1], [0]), r"first must be in 0\.\..*, not -1"),
        (([0], [0], [0.5]), "second must be integers, not float64"),
        (([[0]], [0], [0]), r"labels must be of shape \[N\], not \[1, 1\]"),
        ((0, [0], [0]), r"labels must be of shape \[N\], not \[\]"),
    ],
)
def test_bad_input(arrays, message):
    with pytest.raises(DataError, match=message):
        mcnemar(*map(np.asarray, arrays))


# --- two runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"dataset": tiny.dataset(), "epochs": 1.0, "batch_size": 8, **tiny.MLP}
    for seed in (0, 1):
        train_recipe("lab_mlp", workdir=folder / f"{seed}", seed=seed, **options)
    return folder


@pytest.fixture
def copies(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs" / "0", tmp_path / "runs" / "1"


def test_runs_are_compared_by_their_folders(runs):
    found = compare_runs(runs / "0", runs / "1")
    summaries = [json.loads((runs / f"{s}" / "summary.json").read_text()) for s in (0, 1)]
    assert found.accuracies == pytest.approx([s["test_accuracy"] for s in summaries])
    assert found.names == (str(runs / "0"), str(runs / "1"))
    assert found.examples == 30
    first, second = (np.load(runs / f"{s}" / "test_outputs.npy").argmax(1) for s in (0, 1))
    assert found == mcnemar(tiny.dataset().test.labels, first, second, names=found.names)
    same = compare_runs(str(runs / "0"), str(runs / "0"))
    assert (same.p, same.discordant) == (1.0, 0)
    assert same.verdict.startswith("too few images")


@pytest.mark.parametrize("name", ["summary.json", "test_labels.npy", "test_outputs.npy"])
def test_a_run_that_is_not_finished_or_older(copies, name):
    (copies[1] / name).unlink()
    with pytest.raises(WorkdirError, match=rf"1' has no {name}: a run to be compared must be fin"):
        compare_runs(*copies)


def test_runs_on_other_data(copies):
    first, second = copies
    path = second / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "dataset": "other"}))
    with pytest.raises(DataError, match=r"are of other data sets: 'tiny' and 'other'$") as caught:
        compare_runs(first, second)
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(summary))
    labels, outputs = (np.load(second / f"test_{name}.npy") for name in ("labels", "outputs"))

    def replace(new_labels, new_outputs):
        np.save(second / "test_labels.npy", new_labels)
        np.save(second / "test_outputs.npy", new_outputs)

    replace(labels[:20], outputs[:20])
    with pytest.raises(DataError, match="are of other test sets: 30 images and 20 images"):
        compare_runs(first, second)
    replace(labels, np.pad(outputs, ((0, 0), (0, 1))))
    with pytest.raises(DataError, match="are of other numbers of classes: 10 and 11"):
        compare_runs(first, second)
    replace(labels[::-1], outputs)
    with pytest.raises(DataError, match=r"the test sets of .* have other labels"):
        compare_runs(first, second)
    replace(labels[:20], outputs)
    with pytest.raises(
        DataError, match=r"has 20 labels and outputs of shape \[30, 10\]: there must"
    ):
        compare_runs(first, second)
    replace(labels[:0], outputs[:0])
    with pytest.raises(DataError, match="has 0 labels"):
        compare_runs(first, second)
    for bad_labels, bad_outputs in (
        (labels, np.where(outputs > 0, np.nan, outputs)),
        (labels - 1, outputs),
        (labels + 1, outputs),
    ):
        replace(bad_labels, bad_outputs)
        with pytest.raises(DataError, match="outputs that are not finite, or labels that are none"):
            compare_runs(first, second)
