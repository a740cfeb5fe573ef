"""Fully connected nets.

    model = mlp()                                   # the lab's section 2: 1,707,274 parameters
    model = mlp(units=(1024,), activation="relu", dropout=0.3)

Images are scaled and flattened inside.
"""

from __future__ import annotations

from typing import Any

import keras

from cifarflow.models.layers import LayerFactory, check_rates, check_sizes


def mlp(
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    units: tuple[int, ...] = (512, 256),
    activation: Any = "tanh",
    dropout: float | tuple[float, ...] = 0.0,
    l2: float = 0.0,
    softmax: bool = False,
    dtype_policy: str = "float32",
    seed: int | None = None,
    name: str = "mlp",
) -> Any:
    """Builds flatten -> [dense -> activation -> dropout] for each size -> dense.

    Args:
      image_shape: (H, W, C) of the images.
      num_classes: outputs, at least 2.
      units: width of each hidden layer.
      activation: name of a Keras activation, or a callable.
      dropout: rate in [0, 1) after each hidden layer, one for all or one each.
      l2: coefficient of the L2 penalty on every kernel.
      softmax: whether the model ends in probabilities instead of logits.
      dtype_policy: Keras dtype policy of every layer.
      seed: seed of initial weights and dropout; None takes Keras's own.
      name: the model's name.

    Returns:
      A functional `keras.Model`: images [B, H, W, C], 0..255 -> logits [B, num_classes].

    Raises:
      ConfigError: if an argument is out of range.
      DataError: if image_shape is not three sizes.

    Source: the lab's section 2.
    """
    sizes = check_sizes("units", units)
    rates = check_rates(dropout, len(sizes))
    parts = LayerFactory(dtype_policy=dtype_policy, activation=activation, l2=l2, seed=seed)
    inputs, x = parts.image_input(image_shape)
    x = parts.to_vector(x, "flatten")
    for size, rate in zip(sizes, rates, strict=True):
        x = parts.dense(x, size, activation=activation)
        x = parts.dropout(x, rate)
    return keras.Model(inputs, parts.classifier(x, num_classes, softmax=softmax), name=name)
