"""The one place that decides dtypes and loss scaling.

    precision = resolve_precision("auto")            # "mixed_bfloat16" where it is in hardware
    model = cnn(dtype_policy=precision)
    optimizer = scale_for(precision, SGD(0.01, momentum=0.9))

Weights, optimiser state, losses and BatchNorm statistics are float32 in every precision; "mixed"
is about the activations and the matrix products.  Keras's global policy is never changed.
"""

from __future__ import annotations

from typing import Any

from cifarflow.device import has_bfloat16
from cifarflow.errors import check_choice

PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


def resolve_precision(precision: str = "auto") -> str:
    """Turns "auto" into the precision that this machine is fast in.

    Args:
      precision: "float32", "mixed_bfloat16", "mixed_float16", or "auto": mixed_bfloat16 where
        the device that will train has it in hardware, else float32.

    Returns:
      The name of a Keras dtype policy.

    Raises:
      ConfigError: if precision is none of the four.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "mixed_bfloat16" if has_bfloat16() else "float32"


def scale_for(precision: str, optimizer: Any) -> Any:
    """Wraps an optimiser for dynamic loss scaling where the precision needs it.

    float16 has no numbers under 6e-8, so small gradients vanish: the loss is multiplied by a
    large factor, the gradients divided by it.  When a gradient overflows, the update is skipped
    and the factor halved; after 2,000 good steps it is doubled.  bfloat16 has float32's range and
    needs none of this.

    Args:
      precision: "float32", "mixed_bfloat16" or "mixed_float16".
      optimizer: a Keras optimiser.

    Returns:
      The optimiser itself, or a `keras.optimizers.LossScaleOptimizer` around it for float16.

    Raises:
      ConfigError: if precision is unknown.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "mixed_float16":
        return optimizer
    # Loaded here: who only asks for a recipe's precision does not wait for it.
    import keras

    # A fresh scale of 2^15 overflows for a few steps at most before it has found its place.
    return keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=2.0**15, dynamic_growth_steps=2000
    )
