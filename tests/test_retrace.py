"""The retrace guard, on real compiled functions."""

import warnings

import numpy as np
import pytest
import tensorflow as tf
import tiny

from cifarflow.errors import CifarflowError, ConfigError
from cifarflow.optimizers.sgd import SGD
from cifarflow.training.averaging import WeightEMA
from cifarflow.training.retrace import RetraceError, RetraceGuard
from cifarflow.training.step import make_eval_step, make_train_step


def batch(count=8, dtype=tf.int32):
    data = tiny.split(count)
    return tf.constant(data.images), tf.constant(data.labels, dtype)


def scaled(traces=None):
    """A compiled function of a tensor, a Python value and a nest, that notes its traces."""

    @tf.function
    def scale(values, factor=2.0, *, more=None):
        if traces is not None:
            traces.append(1)
        del more
        return values * tf.cast(factor, values.dtype)

    return scale


def refused(guard, *args, **kwargs):
    with pytest.raises(RetraceError) as caught:
        guard(*args, **kwargs)
    assert isinstance(caught.value, CifarflowError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_training_step():
    model = tiny.tiny_mlp()
    train_step = RetraceGuard(make_train_step(model, SGD(0.1)))
    for count in (8, 8, 8):
        sums = train_step(*batch(count))
    assert float(sums.examples) == 8
    assert refused(train_step, *batch(7)) == (
        "train_step was traced again at call 4: argument 'images' has the shape (7, 8, 8, 3) after "
        "(8, 8, 8, 3), argument 'labels' has the shape (7,) after (8,)"
    )
    assert refused(train_step, *batch(8, tf.int64)) == (
        "train_step was traced again at call 5: argument 'labels' has the dtype int64 after int32"
    )
    # A trace that is there already is no new one.
    for count in (7, 8):
        assert float(train_step(*batch(count)).examples) == count
    assert train_step.calls == 7


def test_shapes_of_the_warm_up_are_welcome():
    eval_step = RetraceGuard(make_eval_step(tiny.tiny_mlp()), warmup_calls=3)
    for _ in range(2):
        for count in (8, 8, 5):
            eval_step(*batch(count))
    # Against the nearest of them.
    assert "argument 'labels' has the dtype int64 after int32" in refused(
        eval_step, *batch(5, tf.int64)
    )
    # NumPy's arrays are traced as tensors.
    eval_step(*(part.numpy() for part in batch()))


def test_a_step_with_averaging_and_a_step_within_a_function():
    model = tiny.tiny_mlp()
    step = WeightEMA().around(make_train_step(model, SGD(0.1)), model, total_steps=5)
    guard = RetraceGuard(step)

    # AutoGraph would make an error of its own of any that it does not know.
    @tf.function(autograph=False)
    def twice(images, labels):
        guard(images, labels)
        return guard(images, labels)

    twice(*batch())
    twice(*batch())
    assert guard.calls == 2
    with pytest.raises(RetraceError, match="averaged_step was traced again at call 3"):
        twice(*batch(4))


@pytest.mark.parametrize(
    ("args", "kwargs", "what"),
    [
        ((3.0,), {}, "argument 'factor' is the Python value 3.0 after the Python value 2.0"),
        ((tf.constant(2.0),), {}, "argument 'factor' is float32 after the Python value 2.0"),
        (
            (2.0,),
            {"more": {"a": [1, 7]}},
            "argument \"more['a'][1]\" is the Python value 7 after the Python value False",
        ),
        (
            (2.0,),
            {"more": {"b": [1]}},
            "argument \"more['b'][0]\" is new, argument \"more['a'][0]\" is left out, "
            "argument \"more['a'][1]\" is left out",
        ),
        ((Ellipsis,), {}, "argument 'factor' is the Python value Ellipsis after the Python value"),
        ((tf.ragged.constant([[1.0], []]),), {}, "argument 'factor' is RaggedTensorSpec(Tensor"),
    ],
)
def test_python_values_and_nests(args, kwargs, what):
    traces = []

    @tf.function
    def scale(values, factor=2.0, *, more=None):
        traces.append(factor)
        del more
        return values

    guard = RetraceGuard(scale)
    same = {"more": {"a": [1, False]}}
    values = tf.ones([2])
    guard(values, **same)
    guard(values, 2.0, **same)
    guard(values=values, factor=2.0, **same)
    assert len(traces) == 1
    text = refused(guard, values, *args, **{**same, **kwargs})
    assert text.startswith(f"scale was traced again at call 4: {what}")
    assert len(traces) == 2


def test_what_it_uses_beside_its_arguments():
    @tf.function
    def double(x):
        return 2 * x

    guard = RetraceGuard(double)
    guard(tf.ones([2]))
    # It is traced for the graph that it is called in, too.
    with tf.Graph().as_default():
        text = refused(guard, tf.ones([2]))
    assert "its arguments are as before, what it uses beside them is not" in text


def test_warnings_are_once_a_trace():
    guard = RetraceGuard(scaled(), on_retrace="warn")
    guard(tf.ones([2]))
    with pytest.warns(RuntimeWarning, match=r"scale was traced again at call 2") as caught:
        assert guard(tf.ones([3])).shape == [3]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard(tf.ones([3]))
        guard(tf.ones([2]))


def test_shapes_that_need_no_trace_of_their_own():
    traces = []

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def double(x):
        traces.append(x)
        return 2 * x

    guard = RetraceGuard(double)
    for count in (1, 2, 3):
        assert guard(tf.ones([count])).shape == [count]
    assert len(traces) == 1


def test_the_function_s_own_attributes():
    function = scaled()
    guard = RetraceGuard(function)
    guard(tf.ones([2]))
    assert guard.experimental_get_tracing_count() == 1
    assert guard.python_function is function.python_function
    concrete = guard.get_concrete_function(tf.TensorSpec([2]))
    np.testing.assert_array_equal(concrete(tf.ones([2])), [2, 2])
    with pytest.raises(AttributeError, match="nothing"):
        guard.nothing  # noqa: B018


def test_functions_that_run_eagerly_are_not_traced():
    traces = []
    guard = RetraceGuard(scaled(traces))
    tf.config.run_functions_eagerly(True)
    try:
        for count in (1, 2, 3):
            guard(tf.ones([count]))
    finally:
        tf.config.run_functions_eagerly(False)
    assert len(traces) == 3  # run, each time


@pytest.mark.parametrize(
    ("function", "options", "quoted"),
    [
        (len, {}, "function must be a tf.function, .* not <built-in function len>"),
        (None, {}, "function must be a tf.function, .* not None"),
        (..., {"warmup_calls": 0}, "warmup_calls must be a whole number >= 1, not 0"),
        (..., {"on_retrace": "stop"}, "on_retrace must be one of raise, warn, not 'stop'"),
    ],
)
def test_bad_arguments(function, options, quoted):
    with pytest.raises(ConfigError, match=quoted):
        RetraceGuard(scaled() if function is ... else function, **options)
