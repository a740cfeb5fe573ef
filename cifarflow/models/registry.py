"""TensorFlow's registry of gradients, kept from growing with every model.

    with released_gradients():
        ...  # traced: a model's pass by fused kernels, an optimiser's update

`tf.custom_gradient` registers each gradient that is traced, under a name of its own, for as long as
the process lives, and by it keeps the graph and all that was compiled for that: megabytes a model.
Keras's optimisers call it too, where they sum gradients over replicas.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops

# TensorFlow has no other name for it; where that has changed, gradients stay as they always did.
_ENTRIES: dict[str, dict[str, Any]] = getattr(
    getattr(ops, "gradient_registry", None), "_registry", {}
)


@contextmanager
def released_gradients() -> Iterator[None]:
    """Lets the custom gradients that are traced in this block end with the graph they are in.

    The graph keeps them from now on, so that it can be differentiated as long as it is there; the
    registry only refers to them.  Outside of a trace nothing happens.
    """
    known = set(_ENTRIES)
    yield
    if tf.executing_eagerly():
        return
    graph = tf.compat.v1.get_default_graph()
    for name in _ENTRIES.keys() - known:
        gradient = _ENTRIES[name]["type"]
        graph.add_to_collection("cifarflow_gradients", gradient)
        _ENTRIES[name]["type"] = _referring(gradient)
        weakref.finalize(graph, _ENTRIES.pop, name, None)


def _referring(gradient: Any) -> Any:
    reference = weakref.ref(gradient)

    def call(*args: Any) -> Any:
        kept = reference()
        assert kept is not None, "the graph of this gradient is gone"
        return kept(*args)

    return call
