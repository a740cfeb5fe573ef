"""A small residual net for 32x32 images.

    model = resnet()                                # 20 layers, 274,042 parameters
    model = resnet(depth=8, widths=(32, 64, 128))

It ends in global average pooling, so any image side of 8 pixels or more will do.
"""

from __future__ import annotations

from typing import Any

import keras

from cifarflow.errors import ConfigError, check_float, check_int
from cifarflow.models.layers import (
    LayerFactory,
    channel_statistics,
    check_image_shape,
    check_sizes,
)


def resnet(
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    depth: int = 20,
    widths: tuple[int, ...] = (16, 32, 64),
    activation: Any = "relu",
    batch_norm_momentum: float = 0.9,
    dropout: float = 0.0,
    l2: float = 0.0,
    softmax: bool = False,
    dtype_policy: str = "float32",
    seed: int | None = None,
    name: str = "resnet",
) -> Any:
    """Builds a stem, `len(widths)` stages of two-convolution residual blocks, and global pooling.

    Args:
      image_shape: (H, W, C) of the images.
      num_classes: outputs, at least 2.
      depth: layers with weights along the main path, 2 * len(widths) * n + 2 with n >= 1 blocks a
        stage: 8, 14, 20, 26, ... for three stages.
      widths: filters of each stage; each stage after the first halves the image.
      activation: name of a Keras activation, or a callable.
      batch_norm_momentum: weight of BatchNorm's running statistics, in [0, 1).
      dropout: rate in [0, 1) before the classifier.
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

    Source: He et al., "Deep Residual Learning for Image Recognition" (2015), section 4.2.
    Different here: Glorot initial weights, and a 1x1 convolution with BatchNorm (their option B)
    where a shortcut changes its shape.
    """
    sizes = check_sizes("widths", widths)
    blocks, rest = divmod(check_int("depth", depth) - 2, 2 * len(sizes))
    if rest or blocks < 1:
        step = 2 * len(sizes)
        raise ConfigError(
            f"depth must be {step} * n + 2, such as {step + 2}, {2 * step + 2} or "
            f"{3 * step + 2}, not {depth}"
        )
    momentum = check_float(
        "batch_norm_momentum", batch_norm_momentum, maximum=1.0, below_maximum=True
    )
    check_float("dropout", dropout, maximum=1.0, below_maximum=True)
    parts = LayerFactory(dtype_policy=dtype_policy, activation=activation, l2=l2, seed=seed)

    def conv_norm(x: Any, width: int, kernel_size: int, strides: int) -> Any:
        # BatchNorm's own offset makes a bias of the convolution useless.
        x = parts.conv(x, width, kernel_size, strides=strides, padding="same", use_bias=False)
        return parts.batch_norm(x, momentum)

    mean, std = channel_statistics(check_image_shape(image_shape)[-1])
    inputs, x = parts.image_input(image_shape, mean=mean, std=std)
    x = parts.activate(conv_norm(x, sizes[0], 3, 1))
    for stage, width in enumerate(sizes):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            shortcut = x
            if strides > 1 or x.shape[-1] != width:
                shortcut = conv_norm(x, width, 1, strides)
            x = parts.activate(conv_norm(x, width, 3, strides))
            x = conv_norm(x, width, 3, 1)
            x = keras.layers.Add(dtype=parts.policy)([x, shortcut])
            x = parts.activate(x)
    x = parts.dropout(parts.to_vector(x, "average"), dropout)
    return keras.Model(inputs, parts.classifier(x, num_classes, softmax=softmax), name=name)
