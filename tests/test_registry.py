"""Custom gradients end with their graphs: models that are gone leave nothing behind."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf
import tiny
from tensorflow.python.framework import ops

from cifarflow.data.pipeline import evaluation_batches
from cifarflow.evaluation.predict import predict
from cifarflow.models.registry import released_gradients
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.loop import train


def registered():
    gc.collect()
    return set(ops.gradient_registry._registry)


@tf.custom_gradient
def triple(x):
    # Not its gradient, so that it is known from TensorFlow's own.
    return 3 * x, lambda upstream: 5 * upstream


@tf.function
def released(x):
    with released_gradients():
        return triple(x)


@pytest.mark.parametrize("freeze", [None, {"logits": 1}])
def test_models_that_are_gone_leave_no_gradients(freeze):
    known = registered()
    during = []
    for seed in range(2):
        model, data = tiny.tiny_cnn(seed=seed), tiny.split(20, 1)
        train(
            model,
            SGD(0.05, momentum=0.9),
            batches=tiny.batches(),
            total_steps=2,
            validation=evaluation_batches(data.images, data.labels),
            freeze=freeze,
        )
        predict(model, data.images)
        during.append(set(ops.gradient_registry._registry) - known)
    # Some were there: fused kernels have their own, and Keras sums gradients by one.
    assert all(during)
    del model
    assert registered() == known


def test_a_gradient_is_there_as_long_as_its_graph():
    known = registered()
    function = tf.function(released.python_function)
    x = tf.constant([1.0, 2.0])
    for _ in range(2):
        with tf.GradientTape() as tape:
            tape.watch(x)
            # Differentiated from outside, by what is registered.
            y = function(x)
        np.testing.assert_array_equal(tape.gradient(y, x), [5.0, 5.0])
        gc.collect()
    assert len(registered() - known) == 1
    graph = weakref.ref(function.get_concrete_function(x).graph)
    del function, tape, y
    assert registered() == known
    assert graph() is None


def test_without_a_trace_nothing_happens():
    known = registered()
    with released_gradients(), tf.GradientTape() as tape:
        x = tf.Variable(2.0)
        y = triple(x)
    assert float(tape.gradient(y, x)) == 5.0
    assert registered() == known
