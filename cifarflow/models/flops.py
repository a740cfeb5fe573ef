"""Floating-point operations of a model, counted from its layers' shapes.

    count_flops(cnn())                              # 50,718,720 an image
    32 * count_flops(cnn(), training=True)          # 4.5e9 in a training step of 32 images

Divided by the time of a step it says how near the step comes to what the machine can multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from graphlib import TopologicalSorter
from typing import Any

import keras

from cifarflow.errors import ConfigError

# A call of a layer: the layer, and which of its calls.
_Call = tuple[Any, int]


def count_flops(model: Any, *, training: bool = False) -> float:
    """Counts the floating-point operations of one image.

    Two for each multiply-add of `Conv2D` (and subclasses) and `Dense` layers, padding included.
    Nothing else is counted: biases, activations, normalisation, pooling, other layers with
    weights, the loss, the optimiser.  In a CNN that is nearly all there is to compute, though not
    nearly all of the time.  Counted is what Keras's layers compute; the fused passes of
    `cifarflow.models.fusion` leave out what a pool does not read, of `speednet` a ninth.

    In training each layer is counted up to three times: forward; the gradient of its kernel,
    which is as much again unless the kernel is frozen; and the gradient of its input, again as
    much, unless nothing before the layer is trained, as before the first one.

    Args:
      model: a functional or Sequential Keras model, of images or whatever else it takes.
      training: whether to count a training step instead of a forward pass.

    Returns:
      The operations for one example, a whole number.

    Raises:
      ConfigError: if the model has no graph of layers, a size in it is unknown, or a layer has
        such layers inside, where they cannot be seen.
    """
    if not getattr(model, "outputs", None):
        raise ConfigError(
            f"model must be a functional or built Sequential Keras model to count its operations, "
            f"not {model!r:.80}"
        )
    flops, _ = _count(model, training, [False] * len(model.inputs))
    return float(flops)


def _count(model: Any, training: bool, trained_inputs: Sequence[bool]) -> tuple[int, list[bool]]:
    """Counts one call of a model.

    Args:
      model: the model.
      training: whether to count gradients.
      trained_inputs: for each of its inputs whether something before it is trained.

    Returns:
      The operations, and for each of its outputs whether something before it is trained.
    """
    total = 0
    trained = {
        _producer(tensor): before
        for tensor, before in zip(model.inputs, trained_inputs, strict=True)
    }
    inbound = _read_graph(model)
    for call in TopologicalSorter(inbound).static_order():
        if call in trained:
            continue
        layer, node_index = call
        before = [trained[source] for source in inbound[call]]
        after = any(before) or any(v.trainable for v in getattr(layer, "variables", ()))
        if isinstance(layer, keras.Model) and getattr(layer, "outputs", None):
            flops, outputs = _count(layer, training, before)
            total += flops
            after = any(outputs)
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            forward = 2 * _multiply_adds(layer, layer._inbound_nodes[node_index].output_tensors[0])
            gradients = int(layer.kernel.trainable) + int(any(before)) if training else 0
            total += forward * (1 + gradients)
        else:
            _check_nothing_inside(layer)
        trained[call] = after
    return total, [trained[_producer(tensor)] for tensor in model.outputs]


def _multiply_adds(layer: Any, output: Any) -> int:
    """Products of one call for one example: each kernel entry once at each place of the output."""
    places = list(output.shape[1:])
    places.pop(0 if getattr(layer, "data_format", None) == "channels_first" else -1)
    if None in places:
        raise ConfigError(
            f"layer {layer.name!r} must have an output of known size to count its operations, "
            f"not {tuple(output.shape)}"
        )
    return math.prod(layer.kernel.shape) * math.prod(places)


def _check_nothing_inside(layer: Any) -> None:
    """Refuses a layer whose operations would be missed without a word."""
    if not isinstance(layer, keras.layers.Layer):
        return
    for inner in layer._flatten_layers(include_self=False):
        if isinstance(inner, (keras.layers.Conv2D, keras.layers.Dense)):
            raise ConfigError(
                f"layer {layer.name!r} has {inner.name!r} inside, whose calls cannot be counted: "
                "build it as layers of the model, or as a functional model in it"
            )


def _read_graph(model: Any) -> dict[_Call, list[_Call]]:
    """For each call of a layer the calls that its inputs come from, one for each input."""
    inbound: dict[_Call, list[_Call]] = {_producer(tensor): [] for tensor in model.inputs}
    waiting = [_producer(tensor) for tensor in model.outputs]
    while waiting:
        call = waiting.pop()
        if call not in inbound:
            layer, node_index = call
            # Keras has no public way to the inputs of a second call, or to a tensor's layer.
            tensors = layer._inbound_nodes[node_index].input_tensors
            inbound[call] = [_producer(tensor) for tensor in tensors]
            waiting += inbound[call]
    return inbound


def _producer(tensor: Any) -> _Call:
    history = tensor._keras_history
    return history.operation, history.node_index
