"""What the model families share: the input, seeds a layer, and the order within a block.

    parts = LayerFactory(dtype_policy="float32", activation="relu", l2=0.0, seed=0)
    inputs, x = parts.image_input((32, 32, 3))
    x = parts.conv(x, 96, 5)
    logits = parts.classifier(x, 10)

All layers are Keras's own, so a saved model loads without this library (the optimiser of a
compiled one does not).
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from cifarflow.errors import (
    ConfigError,
    DataError,
    check_choice,
    check_float,
    check_int,
    check_seed,
)

# Per-channel mean and standard deviation of the CIFAR-10 training images on the 0..1 scale.
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


class LayerFactory:
    """Makes layers that agree on dtype policy, activation and regularisation.

    Args:
      dtype_policy: Keras dtype policy of every layer, such as "float32" or "mixed_bfloat16".
        It is given to each layer, so the global policy is left alone.
      activation: any Keras activation's name, or a callable.
      l2: coefficient of the L2 penalty l2 * sum(w^2) on every kernel; 0 for none.
      seed: seed of all initial weights and dropout masks; None draws them from Keras's own.

    Raises:
      ConfigError: if an argument is unknown or out of range.
    """

    def __init__(
        self,
        *,
        dtype_policy: str = "float32",
        activation: Any = "relu",
        l2: float = 0.0,
        seed: int | None = None,
    ) -> None:
        try:
            self.policy = keras.dtype_policies.get(dtype_policy)
        except (ValueError, TypeError):
            raise ConfigError(
                "dtype_policy must be a Keras policy such as float32, mixed_bfloat16 or "
                f"mixed_float16, not {dtype_policy!r}"
            ) from None
        try:
            keras.activations.get(activation)
        except (ValueError, TypeError):
            raise ConfigError(
                f"activation must be the name of a Keras activation such as relu, tanh or gelu, "
                f"not {activation!r}"
            ) from None
        self.activation = activation
        self._l2 = check_float("l2", l2)
        # One stream of seeds, handed out in the order in which layers are made.
        self._seeds = None
        if seed is not None:
            self._seeds = np.random.Generator(np.random.Philox(key=check_seed(seed)))

    def next_seed(self) -> int | None:
        """A seed for one more layer, or None if the builder has none."""
        if self._seeds is None:
            return None
        return int(self._seeds.integers(2**31 - 1))

    def _kernel(self, initializer: Any = None) -> dict[str, Any]:
        if initializer is None:
            initializer = keras.initializers.GlorotUniform(seed=self.next_seed())
        return {
            "kernel_initializer": initializer,
            "kernel_regularizer": keras.regularizers.L2(self._l2) if self._l2 else None,
            "dtype": self.policy,
        }

    def image_input(
        self,
        image_shape: tuple[int, int, int],
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
    ) -> tuple[Any, Any]:
        """The model's input, and the same scaled to ((pixel / 255) - mean) / std.

        Scaling is part of the model, so that whoever has the model can feed it raw images.

        Args:
          image_shape: (H, W, C).
          mean: of each channel on the 0..1 scale, or one number for all.
          std: likewise.

        Returns:
          The input [B, H, W, C], 0..255, and the scaled tensor of the same shape.
        """
        inputs = keras.Input(check_image_shape(image_shape), name="images")
        scale = [1 / (255 * s) for s in std]
        offset = [-m / s for m, s in zip(mean, std, strict=True)]
        if len(std) == 1:
            scaled = keras.layers.Rescaling(scale[0], offset[0], dtype=self.policy)(inputs)
        else:
            scaled = keras.layers.Rescaling(scale, offset, dtype=self.policy)(inputs)
        return inputs, scaled

    def conv(
        self,
        x: Any,
        filters: int,
        kernel_size: int,
        *,
        strides: int = 1,
        padding: str = "valid",
        use_bias: bool = True,
        activation: Any = None,
        kernel_initializer: Any = None,
        bias_initializer: Any = "zeros",
        trainable: bool = True,
        name: str | None = None,
    ) -> Any:
        """Convolves [B, H, W, C] with square filters: Glorot's, and biases of 0, by default."""
        # Keras's own message for an image that has become too small is about shapes only.
        if padding == "valid" and min(x.shape[1:3]) < kernel_size:
            raise ConfigError(
                f"the image is {x.shape[1]}x{x.shape[2]} pixels before a {kernel_size}x"
                f"{kernel_size} convolution: give fewer or smaller layers, or a larger image"
            )
        return keras.layers.Conv2D(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            use_bias=use_bias,
            activation=activation,
            bias_initializer=bias_initializer,
            trainable=trainable,
            name=name,
            **self._kernel(kernel_initializer),
        )(x)

    def dense(self, x: Any, units: int, *, activation: Any = None) -> Any:
        """Maps [B, D] to [B, units]."""
        return keras.layers.Dense(units, activation=activation, **self._kernel())(x)

    def activate(self, x: Any) -> Any:
        """Applies the activation as a layer of its own."""
        return keras.layers.Activation(self.activation, dtype=self.policy)(x)

    def batch_norm(
        self,
        x: Any,
        momentum: float,
        *,
        scale: bool = True,
        epsilon: float = 1e-3,
        name: str | None = None,
    ) -> Any:
        """Normalises over the batch; momentum is Keras's, the weight of the running value."""
        return keras.layers.BatchNormalization(
            momentum=momentum, scale=scale, epsilon=epsilon, dtype=self.policy, name=name
        )(x)

    def dropout(self, x: Any, rate: float) -> Any:
        """Drops with the given probability; 0 adds no layer."""
        if not rate:
            return x
        return keras.layers.Dropout(rate, seed=self.next_seed(), dtype=self.policy)(x)

    def to_vector(self, x: Any, pooling: str) -> Any:
        """Turns [B, H, W, C] into a vector by "flatten", "average" or "max" over the image."""
        layers = {
            "flatten": keras.layers.Flatten,
            "average": keras.layers.GlobalAveragePooling2D,
            "max": keras.layers.GlobalMaxPooling2D,
        }
        return layers[check_choice("pooling", pooling, layers)](dtype=self.policy)(x)

    def classifier(
        self,
        x: Any,
        num_classes: int,
        *,
        softmax: bool,
        use_bias: bool = True,
        kernel_initializer: Any = None,
        scale: float = 1.0,
    ) -> Any:
        """Logits [B, num_classes] times `scale`, or probabilities in float32 if `softmax`."""
        logits = keras.layers.Dense(
            check_int("num_classes", num_classes, minimum=2),
            use_bias=use_bias,
            name="logits" if scale == 1 else "classifier",
            **self._kernel(kernel_initializer),
        )(x)
        if scale != 1:
            logits = keras.layers.Rescaling(scale, name="logits", dtype=self.policy)(logits)
        if softmax:
            # Half precision has too few digits for small probabilities.
            return keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
        return logits


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to normalise by, on the 0..1 scale.

    Returns:
      CIFAR-10's for images of 3 channels, else about those of any photographs, one for all.
    """
    return (CIFAR10_MEAN, CIFAR10_STD) if channels == 3 else ((0.5,), (0.25,))


def check_image_shape(image_shape: Any) -> tuple[int, int, int]:
    """Returns `image_shape` if it is three whole numbers (H, W, C).

    Raises:
      DataError: if it is not.
    """
    try:
        height, width, channels = (check_int("side", side) for side in image_shape)
    except (TypeError, ValueError):
        raise DataError(
            f"image_shape must be (height, width, channels), such as (32, 32, 3), "
            f"not {image_shape!r}"
        ) from None
    return height, width, channels


def check_rates(rates: Any, count: int) -> tuple[float, ...]:
    """Returns dropout rates as a tuple of `count` numbers in [0, 1).

    Raises:
      ConfigError: if they are not.
    """
    values = tuple(rates) if isinstance(rates, (tuple, list)) else (rates,) * count
    if len(values) != count:
        raise ConfigError(f"dropout must be {count} rates, one for each block, not {rates!r}")
    return tuple(check_float("dropout", rate, maximum=1.0, below_maximum=True) for rate in values)


def check_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Returns layer sizes as a tuple of whole numbers >= 1.

    Raises:
      ConfigError: if they are not, or there are none.
    """
    values = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    if not values:
        raise ConfigError(f"{name} must hold at least one size, not {sizes!r}")
    return tuple(check_int(name, size) for size in values)
