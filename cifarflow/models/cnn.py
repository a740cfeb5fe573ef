"""The lab's convolutional nets.

    model = cnn()                                                 # section 3: 714,202 parameters
    model = cnn(dropout=(0.25, 0.25, 0.5))                        # section 4.1
    model = cnn(dropout=(0.25, 0.25, 0.5), batch_norm_momentum=0.75)   # section 4.2
    model = final()                                               # section 5: 1,856,650
    model = cnn(pooling="average", activation="gelu", l2=1e-4)    # the extra challenge

Filters, kernels, padding, dropout and the rest are arguments of `cnn`.
"""

from __future__ import annotations

from typing import Any

import keras

from cifarflow.errors import ConfigError, check_float, check_int
from cifarflow.models.layers import LayerFactory, check_rates, check_sizes


def cnn(
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    filters: tuple[int, ...] = (96, 80),
    kernel_size: int = 5,
    padding: str = "valid",
    dense_units: int = 256,
    activation: Any = "relu",
    batch_norm_momentum: float | None = None,
    dropout: float | tuple[float, ...] = 0.0,
    pooling: str = "flatten",
    l2: float = 0.0,
    softmax: bool = False,
    dtype_policy: str = "float32",
    seed: int | None = None,
    name: str = "cnn",
) -> Any:
    """Builds [conv -> (batch norm) -> activation -> max pool -> dropout]..., dense, dense.

    Args:
      image_shape: (H, W, C) of the images.
      num_classes: outputs, at least 2.
      filters: filters of each convolution.
      kernel_size: side of the square filters, pixels.
      padding: "valid" or "same".
      dense_units: width of the hidden dense layer; 0 leaves it out.
      activation: name of a Keras activation, or a callable.
      batch_norm_momentum: if given, BatchNorm before every activation, with this weight of the
        running statistics, in [0, 1).
      dropout: rate in [0, 1) after each pool and after the hidden dense layer, one for all or one
        each.
      pooling: from image to vector by "flatten", or global "average" or "max".
      l2: coefficient of the L2 penalty on every kernel.
      softmax: whether the model ends in probabilities instead of logits.
      dtype_policy: Keras dtype policy of every layer.
      seed: seed of initial weights and dropout; None takes Keras's own.
      name: the model's name.

    Returns:
      A functional `keras.Model`: images [B, H, W, C], 0..255 -> logits [B, num_classes].

    Raises:
      ConfigError: if an argument is out of range, or the image too small for the layers.
      DataError: if image_shape is not three sizes.

    Source: the lab's sections 3 and 4.
    """
    sizes = check_sizes("filters", filters)
    check_int("kernel_size", kernel_size)
    check_int("dense_units", dense_units, minimum=0)
    if padding not in ("valid", "same"):
        raise ConfigError(f"padding must be valid or same, not {padding!r}")
    rates = check_rates(dropout, len(sizes) + (1 if dense_units else 0))
    if batch_norm_momentum is not None:
        check_float("batch_norm_momentum", batch_norm_momentum, maximum=1.0, below_maximum=True)
    parts = LayerFactory(dtype_policy=dtype_policy, activation=activation, l2=l2, seed=seed)

    def normalised(make: Any, *arguments: Any, **options: Any) -> Any:
        """A layer and its activation, BatchNorm between them if there is one."""
        if batch_norm_momentum is None:
            return make(*arguments, activation=activation, **options)
        return parts.activate(parts.batch_norm(make(*arguments, **options), batch_norm_momentum))

    inputs, x = parts.image_input(image_shape)
    for size, rate in zip(sizes, rates, strict=False):
        x = normalised(parts.conv, x, size, kernel_size, padding=padding)
        if min(x.shape[1:3]) < 2:
            raise ConfigError(
                f"the image is {x.shape[1]}x{x.shape[2]} pixels before a 2x2 pool: "
                "give fewer or smaller layers, or a larger image"
            )
        x = keras.layers.MaxPooling2D(2, dtype=parts.policy)(x)
        x = parts.dropout(x, rate)
    x = parts.to_vector(x, pooling)
    if dense_units:
        x = normalised(parts.dense, x, dense_units)
        x = parts.dropout(x, rates[-1])
    return keras.Model(inputs, parts.classifier(x, num_classes, softmax=softmax), name=name)


def final(**options: Any) -> Any:
    """Builds the lab's final model: `cnn` with other defaults, each of which can be overridden.

    Args:
      **options: arguments of `cnn`.  The defaults here are filters=(64, 128), dense_units=512,
        batch_norm_momentum=0.8, dropout=(0.25, 0.3, 0.5).

    Returns:
      As `cnn`; 1,856,650 parameters, 1,408 of them not trainable.

    Raises:
      ConfigError: as `cnn`.

    Source: the lab's section 5.
    """
    defaults = {
        "filters": (64, 128),
        "dense_units": 512,
        "batch_norm_momentum": 0.8,
        "dropout": (0.25, 0.3, 0.5),
        "name": "final",
    }
    return cnn(**{**defaults, **options})


# So that `inspect.signature` and `help` show which arguments there are.
final.__wrapped__ = cnn  # type: ignore[attr-defined]
