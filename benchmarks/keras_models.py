"""The nets in plain Keras layers, as a user of Keras writes them, and what `fit` is given.

    model = build("lab_cnn")
    model.compile(make_sgd(0.01), keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(*as_notebook(dataset.train, dataset.num_classes))

The nets take float32 images [B, 32, 32, 3], 0..1 or normalised (see `nets.NORMALISED`), under the
global dtype policy, and return logits [B, 10] in float32, as Keras's guide to mixed precision has
it.  cifarflow's own builders are not used: they may rewrite a layer into a faster equal one.
"""

from __future__ import annotations

from typing import Any

import keras
import nets
import numpy as np
from keras import layers

from cifarflow.data.splits import Split


def build(name: str) -> Any:
    """Builds the net of that name; one of `nets.NETS`, or `nets.EMPTY`."""
    inputs = keras.Input((32, 32, 3))
    if name == nets.EMPTY:
        outputs = _logits(layers.Flatten()(layers.Cropping2D(((0, 31), (0, 31)))(inputs)))
    elif name == "lab_mlp":
        outputs = _mlp(inputs)
    elif name == "resnet":
        outputs = _resnet(inputs)
    elif name == "speednet":
        outputs = _speednet(inputs)
    else:
        outputs = _cnn(inputs, nets.CNNS[name])
    return keras.Model(inputs, outputs, name=name)


def make_sgd(
    learning_rate: float, *, decay: float = 1e-6, momentum: float = 0.9, nesterov: bool = True
) -> Any:
    """Keras's SGD as the lab has it, its rate learning_rate / (1 + decay * step)."""
    schedule = keras.optimizers.schedules.InverseTimeDecay(learning_rate, 1, decay)
    return keras.optimizers.SGD(schedule, momentum=momentum, nesterov=nesterov)


def as_notebook(split: Split, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as the notebook makes them.

    Args:
      split: images [N, H, W, C] uint8 and labels [N].
      num_classes: how many classes there are.

    Returns:
      Images [N, H, W, C] float32, 0..1, and one-hot labels [N, num_classes] float.
    """
    images = split.images.astype("float32") / 255
    return images, keras.utils.to_categorical(split.labels, num_classes=num_classes)


def _logits(x: Any) -> Any:
    return layers.Dense(nets.CLASSES, dtype="float32")(x)


def _mlp(x: Any) -> Any:
    x = layers.Flatten()(x)
    for units in nets.MLP_UNITS:
        x = layers.Dense(units, activation="tanh")(x)
    return _logits(x)


def _cnn(x: Any, net: nets.Cnn) -> Any:
    def activated(layer: Any, x: Any) -> Any:
        if net.batch_norm_momentum is None:
            return layers.Activation("relu")(layer(x))
        x = layers.BatchNormalization(momentum=net.batch_norm_momentum)(layer(x))
        return layers.Activation("relu")(x)

    for filters, rate in zip(net.filters, net.dropout, strict=False):
        x = layers.MaxPooling2D(2)(activated(layers.Conv2D(filters, 5), x))
        x = layers.Dropout(rate)(x) if rate else x
    x = activated(layers.Dense(net.units), layers.Flatten()(x))
    x = layers.Dropout(net.dropout[-1])(x) if net.dropout[-1] else x
    return _logits(x)


def _resnet(x: Any) -> Any:
    def conv_norm(x: Any, width: int, size: int, strides: int) -> Any:
        x = layers.Conv2D(width, size, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    x = layers.Activation("relu")(conv_norm(x, nets.RESNET_WIDTHS[0], 3, 1))
    for stage, width in enumerate(nets.RESNET_WIDTHS):
        for block in range(nets.RESNET_BLOCKS):
            strides = 2 if stage and not block else 1
            shortcut = conv_norm(x, width, 1, strides) if strides > 1 else x
            x = layers.Activation("relu")(conv_norm(x, width, 3, strides))
            x = layers.Add()([conv_norm(x, width, 3, 1), shortcut])
            x = layers.Activation("relu")(x)
    return _logits(layers.GlobalAveragePooling2D()(x))


def _speednet(x: Any) -> Any:
    def conv(x: Any, width: int) -> Any:
        return layers.Conv2D(width, 3, padding="same", use_bias=False)(x)

    def normalised(x: Any) -> Any:
        x = layers.BatchNormalization(momentum=0.6, epsilon=1e-12, scale=False)(x)
        return layers.Activation("gelu")(x)

    whitening = layers.Conv2D(24, 2)
    x = layers.Activation("gelu")(whitening(x))
    whitening.kernel.trainable = False
    for width in nets.SPEEDNET_WIDTHS:
        x = normalised(layers.MaxPooling2D(2)(conv(x, width)))
        x = normalised(conv(x, width))
    x = layers.Flatten()(layers.MaxPooling2D(3)(x))
    x = layers.Dense(nets.CLASSES, use_bias=False, dtype="float32")(x)
    return layers.Rescaling(1 / 9, dtype="float32")(x)
