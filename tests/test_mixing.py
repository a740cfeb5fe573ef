"""MixUp and CutMix: pixels, labels and shares, alone, in batches and in a run."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from cifarflow.data.augment import make_augment
from cifarflow.data.draws import MIX_KIND, draw
from cifarflow.data.mixing import cutmix, mix, mixup
from cifarflow.data.pipeline import ArrayBatches
from cifarflow.errors import ConfigError, DataError
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.redraw import batch_at
from cifarflow.recipes.run import train_recipe
from cifarflow.training.capsule import examine_step, load_capsule, save_capsule
from cifarflow.training.contract import check_step
from cifarflow.training.hooks import Every, Hook
from cifarflow.training.loop import TrainingInterrupted
from cifarflow.training.step import Sums, count_correct, cross_entropy, make_train_step
from cifarflow.trials import Trials

SEED = (3, 17)
CLASSES = 7
MIXUP = functools.partial(mixup, num_classes=CLASSES, alpha=0.7)
CUTMIX = functools.partial(cutmix, num_classes=CLASSES, alpha=0.7)
BOTH = functools.partial(mix, num_classes=CLASSES, alphas={"mixup": 0.7, "cutmix": 1.0})
WAYS = {"mixup": MIXUP, "cutmix": CUTMIX, "both": BOTH}
SPECS = ["mixup:0.4", "flip,cutmix", "altflip,crop:1,erase:0.5,mixup,cutmix"]
each_way = pytest.mark.parametrize("name", WAYS)
each_spec = pytest.mark.parametrize("spec", SPECS)


def distinct(count, height=8, width=8):
    """Images of one value each, none that of its neighbour, each of another class than those."""
    values = (np.arange(count) * 37 % 251).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()
    return images, np.arange(count) % CLASSES


def shares_of(mixed, labels):
    """The share of its own label of each image; the rest must be its neighbour's."""
    mixed = np.asarray(mixed)
    own = mixed[np.arange(len(labels)), labels]
    other = mixed[np.arange(len(labels)), np.roll(labels, 1)]
    different = labels != np.roll(labels, 1)
    np.testing.assert_array_equal((own + other)[different], 1)
    np.testing.assert_array_equal(own[~different], 1)
    assert (np.count_nonzero(mixed, axis=1) <= 2).all()
    return own


def test_mixup_is_exactly_what_its_labels_say(some_images):
    images, labels = some_images[0][:300], some_images[1][:300]
    found, mixed = mixup(images, labels, SEED, num_classes=10, alpha=1.0)
    assert (found.dtype, mixed.dtype) == (tf.uint8, tf.float32)
    np.testing.assert_array_equal(mixed.numpy().sum(axis=1), 1)
    different = labels != np.roll(labels, 1)
    share = mixed.numpy()[np.arange(300), labels].astype(float)[:, None, None, None]
    np.testing.assert_array_equal(share * 4096, np.round(share * 4096))
    exact = share * images + (1 - share) * np.roll(images, 1, axis=0)
    expected = np.floor(exact + 0.5)
    np.testing.assert_array_equal(found.numpy()[different], expected[different])
    unrounded, _ = make_augment("mixup:1")(images, SEED, labels=labels, num_classes=10)
    assert unrounded.dtype == tf.float32
    np.testing.assert_array_equal(unrounded.numpy()[different], exact[different])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (2, 9)])
def test_cutmix_counts_the_pixels_of_one_rectangle(height, width):
    images, labels = distinct(1000, height, width)
    found, mixed = cutmix(images, labels, SEED, num_classes=CLASSES)
    share = shares_of(mixed, labels)
    inside = (found.numpy() == np.roll(images, 1, axis=0)).all(axis=3)
    outside = (found.numpy() == images).all(axis=3)
    np.testing.assert_array_equal(inside, ~outside)
    different = labels != np.roll(labels, 1)
    kept = outside.mean(axis=(1, 2))
    np.testing.assert_array_equal(share[different], kept.astype(np.float32)[different])
    for mask in inside:
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows)
    # Every pixel is cut now and then.
    assert inside.any(axis=0).all()


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0, 10.0])
def test_shares_are_betas(alpha):
    images, labels = distinct(4096 - 4096 % CLASSES, 1, 1)
    _, mixed = mixup(images, labels, SEED, num_classes=CLASSES, alpha=alpha)
    share = np.sort(shares_of(mixed, labels))
    expected = np.sort(np.random.default_rng(0).beta(alpha, alpha, 400_000))
    places = np.linspace(0, len(expected) - 1, len(share)).astype(int)
    # The largest distance of the two distributions, by Kolmogorov and Smirnov.
    rank = np.searchsorted(share, expected[places], side="right") / len(share)
    low = np.searchsorted(share, expected[places] - 1e-3, side="left") / len(share)
    high = np.searchsorted(share, expected[places] + 1e-3, side="right") / len(share)
    wanted = np.linspace(0, 1, len(rank))
    assert np.maximum(low - wanted, wanted - high).max() < 2 / np.sqrt(len(share))
    assert abs(share.mean() - 0.5) < 5 * expected.std() / np.sqrt(len(share))
    assert abs(share.std() / expected.std() - 1) < 0.05


@each_way
def test_nothing_is_mixed_at_alpha_0_or_with_nobody(name):
    images, labels = distinct(21)
    way = WAYS[name]
    zero = {"alphas": {"mixup": 0.0, "cutmix": 0.0}} if name == "both" else {"alpha": 0}
    found, mixed = way(images, labels, SEED, **zero)
    np.testing.assert_array_equal(found, images)
    np.testing.assert_array_equal(mixed, np.eye(CLASSES)[labels])
    found, mixed = way(images[:1], labels[:1], SEED)
    np.testing.assert_array_equal(found, images[:1])
    np.testing.assert_array_equal(mixed, np.eye(CLASSES)[labels[:1]])
    found, mixed = way(images[:0], labels[:0], SEED)
    assert (found.shape, mixed.shape) == ((0, 8, 8, 3), (0, CLASSES))


def test_of_both_each_image_takes_one_by_a_fair_coin():
    images, labels = distinct(1400)
    found, mixed = BOTH(images, labels, SEED)
    cut = draw(SEED, MIX_KIND, [1400], 2).numpy() == 1
    assert abs(cut.mean() - 0.5) < 5 * 0.5 / np.sqrt(1400)
    up = mix(images, labels, SEED, num_classes=CLASSES, alphas={"mixup": 0.7})
    out = mix(images, labels, SEED, num_classes=CLASSES, alphas={"cutmix": 1.0})
    for both, one, other in zip((found, mixed), up, out, strict=True):
        one, other = one.numpy(), other.numpy()
        at = cut.reshape(-1, *[1] * (one.ndim - 1))
        np.testing.assert_array_equal(both, np.where(at, other, one))


@each_way
def test_pure_and_the_same_in_every_way(name, some_images):
    way, labels = WAYS[name], tf.constant(some_images[1][:32] % CLASSES)
    images, seed = tf.constant(some_images[0][:32]), tf.constant(SEED, tf.int64)
    first = [part.numpy() for part in way(images, labels, seed)]
    for jit_compile in (True, False):
        graph = tf.function(lambda i, n, s: way(i, n, s), jit_compile=jit_compile)
        for found, expected in zip(graph(images, labels, seed), first, strict=True):
            np.testing.assert_array_equal(found, expected)
    signature = [
        tf.TensorSpec([None, 32, 32, 3], tf.uint8),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([2], tf.int64),
    ]
    graph = tf.function(lambda i, n, s: way(i, n, s), input_signature=signature)
    np.testing.assert_array_equal(graph(images[:5], labels[:5], seed)[1].shape, [5, CLASSES])
    for other in ((4, 17), (3, 18)):
        found, mixed = way(images, labels, other)
        assert (found.numpy() != first[0]).any()
        assert (mixed.numpy() != first[1]).any()
    # Labels that are probabilities already, such as those of an earlier mixing.
    again = way(images, tf.one_hot(labels, CLASSES, dtype=tf.float64), seed)
    np.testing.assert_array_equal(again[1], first[1])
    for dtype in (tf.int32, tf.float32, tf.float16):
        found, mixed = way(tf.cast(images, dtype), labels, seed)
        assert found.dtype == dtype
        assert np.abs(found.numpy().astype(float) - first[0]).max() <= 0.51
        np.testing.assert_array_equal(mixed, first[1])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31 - 1), st.data()
)
def test_any_shape_any_labels(count, height, width, seed, data):
    labels = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), int)
    images = np.arange(count * height * width).reshape(count, height, width, 1).astype(np.uint8)
    for name in ("mixup", "cutmix"):
        alphas = {name: data.draw(st.floats(0, 10))}
        found, mixed = mix(images, labels, (seed, 1), num_classes=3, alphas=alphas)
        low, high = (f(images, np.roll(images, 1, axis=0)) for f in (np.minimum, np.maximum))
        assert ((found >= low) & (found <= high)).numpy().all()
        np.testing.assert_allclose(mixed.numpy().sum(axis=1), 1, atol=1e-7)
        assert (mixed.numpy() >= 0).all()


BAD_LABELS = [np.zeros(3, np.int32), np.zeros(4), np.zeros((4, 6)), np.zeros((3, 7)), 5]


@each_way
def test_bad_input(name):
    way, (images, labels) = WAYS[name], distinct(4)
    for bad in BAD_LABELS:
        with pytest.raises(DataError, match="labels must be one integer an image"):
            way(images, bad, SEED)
    for bad in (1, 2.5, None):
        with pytest.raises(ConfigError, match="num_classes must be a whole number >= 2"):
            way(images, labels, SEED, num_classes=bad)
    with pytest.raises(DataError, match=r"images must be \[B, H, W, C\]"):
        way(images[0], labels, SEED)
    for bad in (-1, 10.5, "1", None):
        options = {"alphas": {"mixup": bad}} if name == "both" else {"alpha": bad}
        with pytest.raises(ConfigError, match=r"alpha must be a finite number >= 0 and <= 10"):
            way(images, labels, SEED, **options)


# --- in batches


@each_spec
def test_batches_are_the_same_however_they_are_drawn(spec):
    batches = tiny.batches(24, 8, seed=5, augment=make_augment(spec), num_classes=10)
    images, labels = batches.element_spec
    assert (labels.shape, labels.dtype) == ([8, 10], tf.float32)
    assert images.dtype == (tf.float32 if "mixup" in spec else tf.uint8)
    assert batches.dataset().element_spec == batches.element_spec
    whole = [[part.numpy() for part in batch] for batch in batches.dataset(0, 5)]
    order = batches.order(1)
    for jit_compile in (False, True):
        drawn = tf.function(batches.draw, jit_compile=jit_compile)
        for step in (3, 4):
            for found, expected in zip(
                drawn(order, tf.constant(step, tf.int64)), whole[step], strict=True
            ):
                np.testing.assert_array_equal(found, expected)
    for step in range(5):
        for found, expected in zip(batches.batch_at(step), whole[step], strict=True):
            np.testing.assert_array_equal(found, expected)
    for found, expected in zip(next(iter(batches.dataset(4))), whole[4], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_mixes_needs_labels_and_says_so():
    images, labels = distinct(8)
    for spec, names in (("mixup", "mixup"), ("flip,cutmix", "cutmix"), (SPECS[2], "mixup and cut")):
        augment = make_augment(spec)
        assert augment.needs_labels
        for missing in ({}, {"labels": labels}, {"num_classes": 7}):
            with pytest.raises(
                ConfigError, match=f"{names}.* must be given labels and num_classes"
            ):
                augment(images, SEED, **missing)
        with pytest.raises(ConfigError, match=r"num_classes must be given for .* mixes labels"):
            ArrayBatches(images, labels, batch_size=4, augment=augment)
    assert not make_augment("flip,crop,randaugment,hue,erase").needs_labels


def test_an_augmentation_of_ones_own_may_change_labels():
    def smoothed(images, seed, *, labels, num_classes):
        return images, tf.one_hot(labels, num_classes) * 0.5 + 0.5 / num_classes

    smoothed.needs_labels = True
    batches = tiny.batches(augment=smoothed, num_classes=10)
    _, labels = batches.batch_at(2)
    plain = tiny.batches().batch_at(2)[1]
    np.testing.assert_allclose(labels, np.eye(10)[plain] * 0.5 + 0.05, rtol=1e-6)


# --- in a run

MIXED = {"augment": "flip,mixup:0.4,cutmix", "label_smoothing": 0.1, "batch_size": 8}
RECIPE = Recipe("mixed", **tiny.MLP, **MIXED, epochs=1.5, eval_batch_size=16)


def test_a_run_that_died_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    dataset = tiny.dataset()
    nothing = Hook(Every(steps=1000))
    whole = train_recipe(RECIPE, dataset=dataset, workdir=tmp_path / "whole", hooks=[nothing])
    options = {"dataset": dataset, "workdir": tmp_path / "cut"}

    def stop(state):
        if state.step == 11:
            raise TrainingInterrupted(state.step, None)

    with pytest.raises(TrainingInterrupted):
        train_recipe(RECIPE, hooks=[Hook(Every(steps=11), stop)], **options)
    assert not (tmp_path / "cut" / "summary.json").exists()
    again = train_recipe(RECIPE, resume=True, hooks=[nothing], **options)
    assert again.summary["weights_sha256"] == whole.summary["weights_sha256"]
    # Another alpha is another run, by the labels of its first batch.
    drawn = batch_at(RECIPE, 5, dataset=dataset)
    assert drawn[1].shape == (8, 10)
    np.testing.assert_array_equal(drawn[1], batch_at(RECIPE, 5, dataset=dataset)[1])
    other = dataclasses.replace(RECIPE, augment="flip,mixup:0.5,cutmix")
    assert (batch_at(other, 5, dataset=dataset)[1] != drawn[1]).any()


def test_trials_train_on_mixed_labels():
    recipe = dataclasses.replace(RECIPE, epochs=1.0)
    trials = Trials(recipe, tiny.dataset())
    first = trials.run(0)
    assert first.weights_sha256 == trials.run(0).weights_sha256
    assert first.weights_sha256 != trials.run(1).weights_sha256
    assert 0 <= first.accuracy <= 1


def test_steps_checks_and_capsules_take_mixed_labels(tmp_path):
    batches = tiny.batches(augment=make_augment("mixup,cutmix"), num_classes=10)
    model, optimizer = tiny.tiny_mlp(), SGD(0.05)
    loss_fn = cross_entropy(label_smoothing=0.1)
    check_step(model, optimizer, batches=batches, loss_fn=loss_fn)
    images, labels = batches.batch_at(0)
    found = examine_step(model, optimizer, images, labels, loss_fn=loss_fn)
    assert np.isfinite(found.loss)
    about = {"step": 0, "num_classes": 10, "steps_per_epoch": 8, "found": found}
    variables = [*model.variables, *optimizer.variables]
    folder = save_capsule(
        tmp_path / "capsule", images=images, labels=labels, variables=variables, **about
    )
    np.testing.assert_array_equal(load_capsule(folder).labels, labels)
    outputs = model(images)
    # Smoothing of a mixed target, by its definition.
    targets = 0.9 * labels + 0.1 / 10
    expected = -(targets * tf.nn.log_softmax(outputs).numpy()).sum(axis=1)
    np.testing.assert_allclose(loss_fn(tf.constant(labels), outputs), expected, rtol=1e-5)
    assert float(count_correct(tf.constant(labels), outputs)) == np.sum(
        labels.argmax(axis=1) == outputs.numpy().argmax(axis=1)
    )
    sums = make_train_step(model, optimizer, loss_fn=loss_fn)(images, labels)
    assert isinstance(sums, Sums)
