"""Batches as pure functions of (seed, step), and a user's own datasets."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.augment import alternating_flip, make_augment, random_flip
from cifarflow.data.pipeline import (
    ArrayBatches,
    DatasetBatches,
    epoch_order,
    evaluation_batches,
)
from cifarflow.errors import ConfigError, DataError


def numbered(count, height=4, width=4):
    """Images that hold their own number, which is also (mod 10) their label."""
    numbers = np.arange(count)
    images = np.empty((count, height, width, 3), np.uint8)
    images[:] = numbers[:, None, None, None]
    return images, (numbers % 10).astype(np.int32)


def batches_of(count=23, batch_size=5, **options):
    return ArrayBatches(*numbered(count), batch_size=batch_size, **options)


def numbers(images):
    """Which examples a batch holds; every pixel of an image must say the same."""
    images = np.asarray(images)
    first = images[:, 0, 0, 0]
    np.testing.assert_array_equal(images, np.broadcast_to(first[:, None, None, None], images.shape))
    return first.tolist()


def drawn(dataset):
    """The examples of each batch, their labels checked on the way."""
    result = []
    for images, labels in dataset:
        result.append(numbers(images))
        np.testing.assert_array_equal(labels, np.array(result[-1]) % 10)
    return result


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def assert_same(dataset, other):
    """Two datasets, or lists of batches, hold the same bytes."""
    for (images, labels), (other_images, other_labels) in zip(dataset, other, strict=True):
        np.testing.assert_array_equal(images, other_images)
        np.testing.assert_array_equal(labels, other_labels)


def test_an_epoch_visits_every_example_at_most_once():
    batches = batches_of(23, 5)
    assert batches.steps_per_epoch == 4
    steps = drawn(batches.dataset(0, 12))
    epochs = [flat(steps[i : i + 4]) for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 20
    # The three left out of one epoch come in the next ones.
    assert set().union(*epochs) == set(range(23))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_that_divides_visits_every_example_once():
    steps = drawn(batches_of(20, 5).dataset(0, 8))
    assert sorted(flat(steps[:4])) == sorted(flat(steps[4:])) == list(range(20))


def test_the_order_is_the_seeds():
    first = drawn(batches_of(seed=1).dataset(0, 8))
    assert drawn(batches_of(seed=1).dataset(0, 8)) == first
    assert drawn(batches_of(seed=2).dataset(0, 8)) != first
    assert drawn(batches_of(seed=2**31 - 1).dataset(0, 8)) != first
    # Not the same orders an epoch later either.
    assert drawn(batches_of(seed=2).dataset(0, 4)) != first[4:]


def test_the_default_seed_is_zero_and_the_default_batch_32():
    images, labels = numbered(70)
    batches = ArrayBatches(images, labels)
    assert batches.steps_per_epoch == 2
    expected = ArrayBatches(images, labels, batch_size=32, seed=0, shuffle=True)
    assert_same(batches.dataset(0, 3), expected.dataset(0, 3))


def test_without_shuffling_the_order_is_the_arrays():
    epoch = [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    batches = batches_of(23, 5, shuffle=False)
    assert drawn(batches.dataset(0, 8)) == epoch * 2
    assert drawn(batches.dataset(6, 8)) == epoch[2:]
    assert numbers(batches.batch_at(6)[0]) == epoch[2]


@pytest.mark.parametrize(
    "augment", [None, "flip,crop:1,cutout:2", "altflip,crop:1,brightness,contrast"]
)
@pytest.mark.parametrize("first_step", [0, 1, 3, 4, 5, 8, 11])
def test_resuming_goes_on_where_the_run_would_have_been(first_step, augment):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3)).astype(np.uint8)
    labels = np.arange(23) % 10
    options = {"batch_size": 5, "seed": 3, "augment": make_augment(augment or "none")}
    whole = list(ArrayBatches(images, labels, **options).dataset(0, 13))
    resumed = ArrayBatches(images, labels, **options)
    assert_same(resumed.dataset(first_step, 13), whole[first_step:])
    assert_same(resumed.dataset(0, 13).skip(first_step), whole[first_step:])
    # Any batch of the past can be drawn again.
    assert_same([resumed.batch_at(first_step)], [whole[first_step]])


def test_a_dataset_without_end_goes_on():
    batches = batches_of(6, 3)
    endless = batches.dataset(5)
    assert_same(itertools.islice(endless, 7), batches.dataset(5, 12))
    assert len(list(batches.dataset(5, 12))) == 7
    assert list(batches.dataset(5, 5)) == []


def test_a_step_far_in_the_future_needs_no_way_there():
    batches = batches_of(20, 5, augment=random_flip)
    step = 2**40 + 1
    assert_same(batches.dataset(step, step + 1), [batches.batch_at(step)])


def test_the_same_example_is_augmented_anew_each_epoch(some_images):
    images, labels = some_images[0][:64], some_images[1][:64]
    augment = make_augment("flip,crop:4,cutout:8")
    batches = ArrayBatches(images, labels, batch_size=64, shuffle=False, augment=augment)
    first, second = (batches.batch_at(step)[0] for step in (0, 1))
    assert (first != second).any(axis=(1, 2, 3)).mean() > 0.95
    # The draw's seed is (the run's seed, the step).
    np.testing.assert_array_equal(second, augment(images, (0, 1)))
    other = ArrayBatches(images, labels, batch_size=64, shuffle=False, augment=augment, seed=5)
    np.testing.assert_array_equal(other.batch_at(1)[0], augment(images, (5, 1)))


def test_an_alternating_flip_shows_every_example_both_ways_in_two_epochs(some_images):
    images, labels = some_images[0][:48], some_images[1][:48]
    augment = make_augment("altflip")
    batches = ArrayBatches(images, labels, batch_size=12, seed=9, augment=augment)
    place = {image.tobytes(): (index, 0) for index, image in enumerate(images)}
    place |= {image[:, ::-1].tobytes(): (index, 1) for index, image in enumerate(images)}
    assert len(place) == 96
    views = np.zeros((4, 48), int)
    for epoch in range(4):
        seen = []
        for step in range(4 * epoch, 4 * epoch + 4):
            drawn_images, drawn_labels = batches.batch_at(step)
            for image, label in zip(drawn_images, drawn_labels, strict=True):
                index, views[epoch, index] = place[image.tobytes()]
                assert labels[index] == label
                seen.append(index)
        assert sorted(seen) == list(range(48))
    np.testing.assert_array_equal(views[1:], 1 - views[:-1])
    assert 10 < views[0].sum() < 38
    # An example keeps its turn whatever the batch it is in; another run has its own turns.
    about = {"examples": np.arange(48), "epoch": 2}
    expected = alternating_flip(images, (9, 0), **about)
    np.testing.assert_array_equal(views[2], (expected.numpy() != images).any(axis=(1, 2, 3)))
    larger = ArrayBatches(images, labels, batch_size=48, seed=9, augment=augment, shuffle=False)
    np.testing.assert_array_equal(larger.batch_at(2)[0], expected)
    other = alternating_flip(images, (10, 0), **about)
    assert (other.numpy() != expected.numpy()).any()


def test_an_augmentation_of_ones_own_may_ask_for_examples():
    class Named:
        needs_examples = True

        def __call__(self, images, seed, *, examples, epoch):
            assert (examples.dtype, epoch.dtype, epoch.shape) == (tf.int32, tf.int64, [])
            told = tf.stack([examples, tf.fill(tf.shape(examples), tf.cast(epoch, tf.int32))], 1)
            return tf.concat([tf.cast(images[:, 0, 0, :1], tf.int32), told], 1)[:, None, None, :]

    batches = batches_of(23, 5, augment=Named())
    for step, (images, _) in enumerate(batches.dataset(0, 9)):
        numbers_there, examples, epochs = np.asarray(images)[:, 0, 0].T
        np.testing.assert_array_equal(numbers_there, examples)
        assert set(epochs) == {step // 4}
        np.testing.assert_array_equal(images, batches.batch_at(step)[0])


def test_real_images_keep_their_labels(some_images):
    images, labels = some_images
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert len(label_of) == len(images)
    for batch, batch_labels in ArrayBatches(images, labels, batch_size=500).dataset(0, 4):
        expected = [label_of[image.tobytes()] for image in batch.numpy()]
        np.testing.assert_array_equal(batch_labels, expected)


@pytest.mark.parametrize("augment", [None, make_augment("flip,crop:1,cutout:2")])
def test_shapes_are_static_and_dtypes_small(augment):
    dataset = batches_of(augment=augment).dataset(0, 2)
    assert dataset.element_spec == (
        tf.TensorSpec([5, 4, 4, 3], tf.uint8),
        tf.TensorSpec([5], tf.int32),
    )
    images, labels = batches_of(augment=augment).batch_at(1)
    assert isinstance(images, np.ndarray)
    assert isinstance(labels, np.ndarray)
    assert (images.dtype, images.shape) == (np.uint8, (5, 4, 4, 3))
    assert (labels.dtype, labels.shape) == (np.int32, (5,))


def test_an_augmentation_of_ones_own_may_change_the_dtype():
    def to_unit_range(images, seed):
        assert seed.shape == [2]
        assert seed.dtype == tf.int64
        return tf.cast(images, tf.float32) / 255

    batches = batches_of(augment=to_unit_range, shuffle=False)
    assert batches.dataset(0, 1).element_spec[0] == tf.TensorSpec([5, 4, 4, 3], tf.float32)
    np.testing.assert_allclose(batches.batch_at(0)[0][:, 0, 0, 0], np.arange(5) / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16])
def test_labels_of_any_integer_dtype_become_int32(dtype):
    images, labels = numbered(10)
    for dataset in (
        ArrayBatches(images, labels.astype(dtype), batch_size=10, shuffle=False).dataset(0, 1),
        evaluation_batches(images, labels.astype(dtype)),
    ):
        [(_, drawn_labels)] = dataset
        assert drawn_labels.dtype == tf.int32
        np.testing.assert_array_equal(drawn_labels, labels)


def test_the_arrays_are_neither_modified_nor_tied_to_the_batches():
    images, labels = numbered(20)
    before = images.copy(), labels.copy()
    batches = ArrayBatches(images, labels, batch_size=5, augment=make_augment("crop:1,cutout:2"))
    first = list(batches.dataset(0, 4))
    list(evaluation_batches(images, labels, batch_size=8))
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])
    images[:], labels[:] = 0, 0
    assert_same(batches.dataset(0, 4), first)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 40), st.data())
def test_any_sizes(count, data):
    batch_size = data.draw(st.integers(1, count))
    first = data.draw(st.integers(0, 30))
    batches = batches_of(count, batch_size, seed=data.draw(st.integers(0, 2**31 - 1)))
    steps = batches.steps_per_epoch
    assert steps == count // batch_size
    assert batches.num_examples == count
    whole = drawn(batches.dataset(first // steps * steps, first + 3))
    resumed = drawn(batches.dataset(first, first + 3))
    assert resumed == whole[first % steps :]
    for i in range(0, len(whole), steps):
        epoch = flat(whole[i : i + steps])
        assert len(epoch) == len(set(epoch))
    assert all(0 <= example < count for batch in whole for example in batch)


# ---------------------------------------------------------------------------- order of an epoch


def test_epoch_order_is_a_permutation_and_pure():
    order = epoch_order(1000, seed=4, epoch=7)
    assert order.dtype == tf.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    np.testing.assert_array_equal(order, epoch_order(1000, seed=4, epoch=tf.constant(7)))
    graph = tf.function(lambda epoch: epoch_order(1000, seed=4, epoch=epoch))
    np.testing.assert_array_equal(order, graph(tf.constant(7, tf.int64)))
    for seed, epoch in [(4, 8), (5, 7), (7, 4)]:
        assert (epoch_order(1000, seed=seed, epoch=epoch).numpy() != order.numpy()).any()


def test_every_example_comes_to_every_place_equally_often():
    size, epochs = 12, 3000
    order = tf.function(lambda epoch: epoch_order(size, seed=0, epoch=epoch))
    orders = np.array([order(tf.constant(epoch)) for epoch in range(epochs)])
    counts = np.zeros((size, size))
    for place in range(size):
        counts[place] = np.bincount(orders[:, place], minlength=size)
    expected = epochs / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    # Chi-square with (size - 1)^2 degrees of freedom, times size / (size - 1): 132 +- 17.  The
    # seeds are fixed, so this never fails by chance.
    assert 132 - 5 * 17 < statistic < 132 + 5 * 17
    # One epoch tells nothing of the next: neighbours differ by any rotation equally often.
    turns = np.bincount((orders[1:, 0] - orders[:-1, 0]) % size, minlength=size)
    assert ((turns - expected) ** 2 / expected).sum() < 11 + 5 * np.sqrt(22)


def test_orders_of_neighbouring_seeds_and_epochs_are_unrelated():
    size = 4000
    orders = [epoch_order(size, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    correlations = np.corrcoef(np.array(orders))[np.triu_indices(6, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(size)
    against_file_order = [np.corrcoef(order, np.arange(size))[0, 1] for order in orders]
    assert np.abs(against_file_order).max() < 5 / np.sqrt(size)


# ------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("bad", [0, -1, 2.5, "5", None, True])
def test_batch_size_must_be_a_whole_number(bad):
    with pytest.raises(ConfigError, match=f"batch_size must be a whole number >= 1, not {bad!r}"):
        batches_of(batch_size=bad)
    with pytest.raises(ConfigError, match=f"batch_size must be a whole number >= 1, not {bad!r}"):
        evaluation_batches(*numbered(5), batch_size=bad)


def test_a_batch_cannot_be_larger_than_the_data():
    assert batches_of(23, 23).steps_per_epoch == 1
    with pytest.raises(ConfigError, match="at most the 23 training examples, not 24"):
        batches_of(23, 24)
    with pytest.raises(ConfigError, match="at most the 0 training examples, not 1"):
        batches_of(0, 1)


@pytest.mark.parametrize("bad", [-1, 2**31, 0.0, "0", None])
def test_the_seed_must_be_in_range(bad):
    with pytest.raises(ConfigError, match=f"seed must be .* not {bad!r}"):
        batches_of(seed=bad)


def test_steps_must_be_in_range():
    batches = batches_of()
    for bad in (-1, 1.5, "x", None):
        with pytest.raises(ConfigError, match=f"first_step .* >= 0, not {bad!r}"):
            batches.dataset(bad)
        with pytest.raises(ConfigError, match=f"step .* >= 0, not {bad!r}"):
            batches.batch_at(bad)
    for bad in (4, -1, 7.5):
        with pytest.raises(ConfigError, match=f"last_step .* >= 5, not {bad!r}"):
            batches.dataset(5, bad)


BAD_ARRAYS = {
    "a list": (lambda x, y: (x.tolist(), y), "images must be a numpy array, not list"),
    "a tensor": (lambda x, y: (x, tf.constant(y)), "labels must be a numpy array, not Eager"),
    "float images": (lambda x, y: (x / 255, y), "images must be uint8 .* not float64"),
    "one image": (lambda x, y: (x[0], y), r"images must have the shape .* not \(4, 4, 3\)"),
    "float labels": (lambda x, y: (x, y / 1), "labels must be integers, not float64"),
    "one-hot": (lambda x, y: (x, np.eye(10)[y]), r"labels must have the shape .* not \(6, 10\)"),
    "lengths": (lambda x, y: (x, y[:5]), "equally many, not 6 and 5"),
    "negative": (lambda x, y: (x, y - 1), "labels must be from 0, not -1"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("make", [ArrayBatches, evaluation_batches])
def test_arrays_must_be_images_and_labels(make, name):
    change, message = BAD_ARRAYS[name]
    with pytest.raises(DataError, match=message):
        make(*change(*numbered(6)), batch_size=2)


def test_labels_are_held_against_the_number_of_classes():
    assert batches_of(10, num_classes=10).num_examples == 10
    with pytest.raises(DataError, match="labels must be from 0 to 8, not 9"):
        batches_of(10, num_classes=9)


@pytest.mark.parametrize("bad", ["flip", 5, {"flip": 1}])
def test_augment_must_be_a_function(bad):
    with pytest.raises(ConfigError, match="augment must be a function of"):
        batches_of(augment=bad)


@pytest.mark.parametrize("spec", ["crop:4", "flip,crop:9", "cutout:5"])
def test_an_augmentation_that_does_not_fit_the_images_is_an_error_at_once(spec):
    with pytest.raises(ConfigError, match="the image side 4, not"):
        batches_of(augment=make_augment(spec))


# ---------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 4, [3]), (1, 1, [1]), (0, 4, [])],
)
def test_evaluation_keeps_the_order_and_counts_the_last_batch_right(count, batch_size, sizes):
    dataset = evaluation_batches(*numbered(count), batch_size=batch_size)
    assert int(dataset.cardinality()) == len(sizes)
    # Twice: a dataset may be gone through again.
    for _ in range(2):
        steps = drawn(dataset)
        assert [len(step) for step in steps] == sizes
        assert flat(steps) == list(range(count))


def test_evaluation_batches_hold_128_unless_told_otherwise():
    assert [len(step) for step in drawn(evaluation_batches(*numbered(200)))] == [128, 72]


def test_evaluation_shapes():
    assert evaluation_batches(*numbered(10), batch_size=4).element_spec == (
        tf.TensorSpec([None, 4, 4, 3], tf.uint8),
        tf.TensorSpec([None], tf.int32),
    )


# --------------------------------------------------------------------------- a dataset of one's own


def own_dataset(count=20, batch_size=5):
    images, labels = numbered(count)
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(batch_size)


def test_a_dataset_of_known_length_is_repeated():
    batches = DatasetBatches(own_dataset())
    assert batches.steps_per_epoch == 4
    epoch = drawn(own_dataset())
    assert drawn(batches.dataset(0, 10)) == (epoch * 3)[:10]
    assert drawn(itertools.islice(batches.dataset(), 10)) == (epoch * 3)[:10]


@pytest.mark.parametrize("first_step", [0, 1, 4, 6])
def test_a_dataset_of_ones_own_resumes_by_skipping(first_step):
    dataset = own_dataset().shuffle(4, seed=1, reshuffle_each_iteration=False)
    whole = drawn(DatasetBatches(dataset).dataset(0, 9))
    assert drawn(DatasetBatches(dataset).dataset(first_step, 9)) == whole[first_step:]
    assert list(DatasetBatches(dataset).dataset(first_step, first_step)) == []


@pytest.mark.parametrize(
    ("change", "length"),
    [(lambda data: data.repeat(), -1), (lambda data: data.filter(lambda *_: True), -2)],
    ids=["infinite", "unknown"],
)
def test_an_unknown_or_infinite_length_needs_steps_per_epoch(change, length):
    dataset = change(own_dataset())
    with pytest.raises(ConfigError, match=f"steps_per_epoch must be given: .* length is {length} "):
        DatasetBatches(dataset)
    batches = DatasetBatches(dataset, steps_per_epoch=3)
    assert batches.steps_per_epoch == 3
    assert drawn(batches.dataset(2, 10)) == (drawn(own_dataset()) * 3)[2:10]


def test_steps_per_epoch_may_differ_from_the_length():
    batches = DatasetBatches(own_dataset(), steps_per_epoch=7)
    assert batches.steps_per_epoch == 7
    assert len(drawn(batches.dataset(0, 14))) == 14


@pytest.mark.parametrize("bad", [0, -1, 2.5, "4", True])
def test_steps_per_epoch_must_be_a_whole_number(bad):
    with pytest.raises(ConfigError, match=f"steps_per_epoch .* >= 1, not {bad!r}"):
        DatasetBatches(own_dataset(), steps_per_epoch=bad)


def test_steps_of_ones_own_dataset_must_be_in_range():
    batches = DatasetBatches(own_dataset())
    for bad in (-1, 1.5, "x"):
        with pytest.raises(ConfigError, match=f"first_step .* >= 0, not {bad!r}"):
            batches.dataset(bad)
    for bad in (4, -1, 7.5):
        with pytest.raises(ConfigError, match=f"last_step .* >= 5, not {bad!r}"):
            batches.dataset(5, bad)


def test_an_empty_dataset_is_an_error():
    with pytest.raises(DataError, match="at least one batch, not 0"):
        DatasetBatches(own_dataset().take(0), steps_per_epoch=4)


def test_one_hot_labels_and_float_images_are_welcome():
    images, labels = numbered(6)
    pairs = (images / np.float32(255), np.eye(10, dtype=np.float32)[labels])
    batches = DatasetBatches(tf.data.Dataset.from_tensor_slices(pairs).batch(3))
    [(first, one_hot)] = batches.dataset(0, 1)
    assert first.dtype == tf.float32
    np.testing.assert_array_equal(one_hot, pairs[1][:3])


WRONG_DATASETS = {
    "not batched": lambda x, y: ((x, y), ()),
    "no labels": lambda x, y: (x, (2,)),
    "a dictionary": lambda x, y: ({"images": x, "labels": y}, (2,)),
    "a dictionary within": lambda x, y: ((x, {"labels": y}), (2,)),
    "two inputs": lambda x, y: (((x, x), y), (2,)),
    "three parts": lambda x, y: ((x, y, y), (2,)),
    "flat images": lambda x, y: ((x.reshape(6, -1), y), (2,)),
    "images as labels": lambda x, y: ((x, x), (2,)),
    "batched twice": lambda x, y: ((x, y), (2, 2)),
}


@pytest.mark.parametrize("name", WRONG_DATASETS)
def test_a_dataset_must_hold_pairs_of_images_and_labels(name):
    parts, batch_sizes = WRONG_DATASETS[name](*numbered(6))
    dataset = tf.data.Dataset.from_tensor_slices(parts)
    for size in batch_sizes:
        dataset = dataset.batch(size)
    with pytest.raises(DataError, match=r"must hold batches of \(images .* not elements of"):
        DatasetBatches(dataset)


@pytest.mark.parametrize("bad", [None, "cifar10", [1, 2]])
def test_a_dataset_must_be_a_dataset(bad):
    with pytest.raises(DataError, match=r"must be a tf\.data\.Dataset, not ") as caught:
        DatasetBatches(bad)
    assert repr(bad) in str(caught.value)


def test_the_order_of_an_epoch():
    batches = batches_of(batch_size=5, seed=3)
    orders = [batches.order(epoch).numpy() for epoch in (0, 0, 1)]
    assert orders[0].shape == (batches.steps_per_epoch, 5)
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0] != orders[2]).any()
    assert len(np.unique(orders[0])) == orders[0].size
    with pytest.raises(ConfigError, match="epoch must be a whole number >= 0, not -1"):
        batches.order(-1)


def test_order_and_draw_of_another_seed_are_those_of_its_own_batches(some_images):
    images, labels = some_images[0][:30], some_images[1][:30]
    options = {"batch_size": 7, "augment": make_augment("altflip,crop:2,brightness,cutout:12")}
    batches = ArrayBatches(images, labels, seed=3, **options)
    draw = tf.function(lambda order, step, seed: batches.draw(order, step, seed=seed))
    drawn_ones = []
    for seed in (3, 4, 2**31 - 1):
        own = ArrayBatches(images, labels, seed=seed, **options)
        for step in (0, 5, 9):
            order = batches.order(step // 4, seed=tf.constant(seed, tf.int64))
            np.testing.assert_array_equal(order, own.order(step // 4))
            step_tensor = tf.constant(step, tf.int64)
            found = draw(order, step_tensor, tf.constant(seed, tf.int64))
            assert_same([found], [own.batch_at(step)])
            assert_same([found], [own.draw(order, step_tensor)])
            drawn_ones.append(found[0].numpy())
    assert draw.experimental_get_tracing_count() == 1
    assert len(np.unique(drawn_ones, axis=0)) == 9


def test_without_shuffling_every_seed_has_the_order_of_the_arrays():
    batches = batches_of(23, 5, shuffle=False)
    np.testing.assert_array_equal(batches.order(1, seed=7), np.arange(20).reshape(4, 5))


def test_resident_must_be_said_plainly():
    with pytest.raises(ConfigError, match="resident must be True, False or None, not 'yes'"):
        batches_of(resident="yes")
