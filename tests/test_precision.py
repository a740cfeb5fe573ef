"""Which dtypes and which loss scaling a precision means."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from cifarflow import device
from cifarflow.errors import ConfigError
from cifarflow.models.cnn import cnn
from cifarflow.optimizers.precision import PRECISIONS, resolve_precision, scale_for
from cifarflow.optimizers.sgd import SGD

FIXED = ("float32", "mixed_bfloat16", "mixed_float16")


@pytest.fixture
def cpu_with(tmp_path, monkeypatch):
    """Lets the processor have these flags, and takes the GPU away."""

    def patch(flags):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {flags} sse2\n")
        monkeypatch.setattr(device, "_CPUINFO", path)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [])

    return patch


def test_there_are_four_precisions():
    assert set(PRECISIONS) == {"auto", *FIXED}


@pytest.mark.parametrize("flags", ["", "avx512_bf16"])
@pytest.mark.parametrize("precision", FIXED)
def test_a_named_precision_stays_what_it_is(precision, flags, cpu_with):
    cpu_with(flags)
    assert resolve_precision(precision) == precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx512_bf16", "mixed_bfloat16"),
        ("avx2 amx_bf16 avx512f", "mixed_bfloat16"),
        ("avx2 avx512f", "float32"),
        # Only the whole word counts.
        ("avx512_bf16_not", "float32"),
        ("", "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_processor_has_it(flags, expected, cpu_with):
    cpu_with(flags)
    assert resolve_precision("auto") == expected
    assert resolve_precision() == expected


@pytest.mark.parametrize("bad", ["float16", "bfloat16", "", "AUTO", None, 16, ["auto"]])
def test_an_unknown_precision_is_quoted(bad):
    good = "precision must be one of auto, float32, mixed_bfloat16, mixed_float16"
    for function in (resolve_precision, lambda value: scale_for(value, SGD(0.1))):
        with pytest.raises(ConfigError) as caught:
            function(bad)
        assert str(caught.value) == f"{good}, not {bad!r}"


@pytest.mark.parametrize("precision", FIXED)
def test_resolving_and_building_leave_the_global_policy_alone(precision):
    before = keras.config.dtype_policy()
    model = cnn(filters=(4,), dense_units=4, dtype_policy=resolve_precision(precision))
    scale_for(precision, SGD(0.1)).build(model.trainable_variables)
    assert keras.config.dtype_policy() == before
    assert {variable.dtype for variable in model.variables} == {"float32"}


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_only_float16_needs_a_scale(precision):
    optimizer = SGD(0.1)
    assert scale_for(precision, optimizer) is optimizer


def test_float16_gets_a_dynamic_scale():
    inner = SGD(0.5)
    optimizer = scale_for("mixed_float16", inner)
    assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    assert optimizer.inner_optimizer is inner
    assert optimizer.initial_scale == 2.0**15
    assert optimizer.dynamic_growth_steps == 2000

    weight = keras.Variable([1.0, 2.0])
    optimizer.build([weight])
    assert float(optimizer.scale_loss(tf.constant(3.0))) == 3 * 2.0**15
    # An overflow skips the update and halves the scale.
    optimizer.apply([tf.constant([np.inf, 1.0])])
    np.testing.assert_array_equal(weight.numpy(), [1, 2])
    assert float(optimizer.dynamic_scale) == 2.0**14
    # A good step divides the gradient by the scale again.
    optimizer.apply([tf.constant([1.0, -2.0]) * 2.0**14])
    np.testing.assert_array_equal(weight.numpy(), [0.5, 3])
    assert float(optimizer.dynamic_scale) == 2.0**14
