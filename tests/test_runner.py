"""Many steps in one compiled call: drawn inside or brought by tf.data, split as one likes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.data.augment import make_augment
from cifarflow.errors import ConfigError
from cifarflow.optimizers.sgd import SGD
from cifarflow.training import runner
from cifarflow.training.loop import train
from cifarflow.training.runner import StepRunner
from cifarflow.training.step import make_train_step

ALL = "altflip,crop:2,brightness,contrast,cutout:3"


def runner_of(batches, model=None, jit_compile=False, first_step=0):
    model = model if model is not None else tiny.tiny_mlp()
    step = make_train_step(model, SGD(0.05, momentum=0.9, nesterov=True), jit_compile=jit_compile)
    steps = StepRunner(step, batches, first_step=first_step, last_step=99, jit_compile=jit_compile)
    return steps, step, model


def run_all(counts, jit_compile=False, model=None, **kwargs):
    steps, step, model = runner_of(tiny.batches(**kwargs), model, jit_compile)
    sums = np.sum([[float(each) for each in steps.run(count)] for count in counts], axis=0)
    assert step.experimental_get_tracing_count() == 1
    return sums, tiny.weights(model)


@pytest.mark.parametrize("augment", ["none", ALL, "flip,crop:2,cutout:3"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_drawn_inside_or_brought_by_tf_data_the_steps_are_the_same(augment, shuffle):
    options = {"augment": make_augment(augment), "shuffle": shuffle, "seed": 4}
    inside = run_all([19], resident=True, **options)
    brought = run_all([19], resident=False, **options)
    np.testing.assert_array_equal(inside[0], brought[0])
    for a, b in zip(inside[1], brought[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("counts", [[1] * 19, [8, 8, 3], [7, 12], [3, 16]])
def test_calls_may_end_anywhere_also_within_the_next_epoch(counts):
    sums, weights = run_all(counts)
    whole, whole_weights = run_all([19])
    np.testing.assert_array_equal(sums, whole)
    assert whole[2] == 19 * 8
    for a, b in zip(weights, whole_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("resident", [True, False])
def test_a_runner_starts_at_any_step(resident):
    batches = tiny.batches(resident=resident)
    seen = []

    def noting(images, labels):
        # Only a step that trains nothing shows which batch it got.
        return tf.reduce_sum(tf.cast(images, tf.float64)), tf.zeros([]), tf.ones([])

    for first in range(12):
        steps = StepRunner(tf.function(noting), batches, first_step=first, last_step=99)
        seen.append(float(steps.run(1).loss))
    assert seen == [float(batches.batch_at(step)[0].astype(float).sum()) for step in range(12)]
    assert len(set(seen)) == 12


def trained_anew(steps, step, model, variables, start, *, seed, counts):
    """Sums and weights of a run from the same first weights, in the same runner."""
    for variable, value in zip(variables, start, strict=True):
        variable.assign(value)
    if seed is not None:
        steps.restart(seed=seed)
    sums = np.sum([[float(each) for each in steps.run(count)] for count in counts], axis=0)
    assert step.experimental_get_tracing_count() == 1
    return sums, tiny.weights(model)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_restarted_runner_is_a_new_one(jit_compile):
    def new(seed):
        model = tiny.tiny_mlp()
        optimizer = SGD(0.05, momentum=0.9, nesterov=True)
        optimizer.build(model.trainable_variables)
        step = make_train_step(model, optimizer, jit_compile=jit_compile)
        batches = tiny.batches(seed=seed, augment=make_augment(ALL))
        steps = StepRunner(step, batches, first_step=0, last_step=99, jit_compile=jit_compile)
        variables = [*model.variables, *optimizer.variables]
        return steps, step, model, variables, [np.asarray(each).copy() for each in variables]

    one = new(3)
    again = [trained_anew(*one, seed=seed, counts=[5, 9, 3]) for seed in (None, 8, 3)]
    for seed, found in zip((3, 8, 3), again, strict=True):
        expected = trained_anew(*new(seed), seed=None, counts=[17])
        np.testing.assert_array_equal(found[0], expected[0])
        for a, b in zip(found[1], expected[1], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (again[0][1][0] != again[1][1][0]).any()
    assert one[0]._function.experimental_get_tracing_count() == 1


def test_a_runner_restarts_at_any_step_and_with_the_batches_own_seed():
    def noting(images, labels):
        return tf.reduce_sum(tf.cast(images, tf.float64)), tf.zeros([]), tf.ones([])

    batches = tiny.batches(seed=5, augment=make_augment("altflip,crop:2"))
    steps = StepRunner(tf.function(noting), batches, first_step=0, last_step=99)
    for seed, first in ((6, 11), (None, 3), (5, 0), (6, 0)):
        steps.restart(seed=seed, first_step=first)
        expected = tiny.batches(seed=5 if seed is None else seed, augment=batches.augment)
        for step in (first, first + 1):
            assert float(steps.run(1).loss) == expected.batch_at(step)[0].astype(float).sum()


def test_a_restart_needs_arrays_and_good_numbers():
    steps, _, _ = runner_of(tiny.batches(resident=False))
    with pytest.raises(ConfigError, match="must be ArrayBatches with resident=True to start over"):
        steps.restart(seed=1)
    steps, _, _ = runner_of(tiny.batches())
    with pytest.raises(ConfigError, match="seed must be a whole number >= 0, not -1"):
        steps.restart(seed=-1)
    with pytest.raises(ConfigError, match="first_step must be a whole number >= 0, not -2"):
        steps.restart(first_step=-2)


@pytest.fixture
def whole_loop(monkeypatch):
    """XLA compiles the loop too, as on a GPU."""
    monkeypatch.setattr(runner, "has_gpu", lambda: True)


def test_on_a_cpu_xla_compiles_the_steps_only():
    function = runner_of(tiny.batches(), jit_compile=True)[0].compile()
    assert not function.function_def.attr["_XlaMustCompile"].b
    with_xla, without = run_all([5, 9], jit_compile=True), run_all([5, 9])
    np.testing.assert_allclose(with_xla[0], without[0], rtol=1e-5)


def test_xla_compiles_the_loop_and_everything_in_it(whole_loop):
    options = {"augment": make_augment(ALL)}
    with_xla = run_all([5, 9], jit_compile=True, **options)
    without = run_all([5, 9], **options)
    np.testing.assert_allclose(with_xla[0], without[0], rtol=1e-5)
    for a, b in zip(with_xla[1], without[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    graph = runner_of(tiny.batches(), jit_compile=True)[0].compile().function_def
    assert graph.attr["_XlaMustCompile"].b


def test_xla_need_not_compile_anew_for_other_steps(whole_loop):
    function = runner_of(tiny.batches(), jit_compile=True)[0].compile()
    types = {operation.type for operation in function.graph.get_operations()}
    # Their arguments must be constants for XLA: it would compile a program for each first step.
    assert "While" in types or "StatelessWhile" in types
    assert not types & {"Range", "StridedSlice", "Slice"}


def test_xla_trains_a_convolutional_net_with_all_its_parts(whole_loop):
    def model():
        return tiny.tiny_cnn(dropout=0.25, batch_norm_momentum=0.7, activation="gelu")

    with_xla = run_all([4, 4], jit_compile=True, model=model())
    without = run_all([4, 4], model=model())
    # Dropout draws the same in both: the generator is the same function everywhere.
    np.testing.assert_allclose(with_xla[0], without[0], rtol=1e-3)
    for a, b in zip(with_xla[1], without[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_the_spec_of_a_batch_is_known_before_it_is_drawn():
    batches = tiny.batches()
    images, labels = batches.batch_at(0)
    for spec, array in zip(batches.element_spec, (images, labels), strict=True):
        assert (tuple(spec.shape), spec.dtype.as_numpy_dtype) == (array.shape, array.dtype)
    assert batches.element_spec == batches.dataset().element_spec
    grown = tiny.batches(augment=lambda images, seed: tf.cast(images, tf.float32)[:, :4])
    assert grown.element_spec == grown.dataset().element_spec
    assert grown.element_spec[0].shape == (8, 4, 8, 3)


def test_arrays_are_resident_unless_they_are_large(monkeypatch):
    assert tiny.batches().resident
    assert not tiny.batches(resident=False).resident
    monkeypatch.setattr("cifarflow.data.pipeline._MOST_RESIDENT_BYTES", 100)
    assert not tiny.batches().resident
    assert tiny.batches(resident=True).resident


def test_a_whole_run_is_the_same_either_way():
    results = []
    for resident in (True, False):
        model = tiny.tiny_mlp()
        optimizer = SGD(0.05, momentum=0.9)
        train(model, optimizer, batches=tiny.batches(resident=resident), epochs=2.5)
        results.append(tiny.weights(model))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sums_of_a_users_dataset_are_over_all_its_examples():
    data = tiny.split(64)
    dataset = tf.data.Dataset.from_tensor_slices((data.images, data.labels)).batch(16)
    model = keras.Sequential(
        [keras.Input(tiny.SHAPE), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    run = train(model, SGD(1e-6), batches=dataset, epochs=2)
    assert run.summary["steps"] == 8
