"""The gradients of a training step, as the optimiser would be given them.

    gradients_of = make_gradients(model, loss_fn=loss_fn)
    found = gradients_of(images, labels)
    print(found.loss, [gradient is None for gradient in found.values])

It is the step of `make_train_step` itself, with an optimiser that keeps what it is given and
updates nothing: what is seen here is what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from cifarflow.training.step import LossFn, default_loss, make_train_step


class Gradients(NamedTuple):
    """What a step finds before it updates.

    Attributes:
      loss: mean over the batch, regularisation included.
      data_loss: the same without the model's own losses.
      values: a tensor for each trainable variable in order, of the loss without any scaling; None
        where no gradient comes.
    """

    loss: float
    data_loss: float
    values: list[Any]


def make_gradients(
    model: Any,
    *,
    loss_fn: LossFn | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
) -> Callable[..., Gradients]:
    """Compiles the gradients of a model's training step.

    Args:
      model: as in `make_train_step`.
      loss_fn: as there.
      jit_compile: as there.
      fused: as there.
      accumulate_steps: as there.

    Returns:
      A function of (images [B, H, W, C], labels [B] or [B, num_classes], scale=1.0) that returns
      `Gradients`.  The loss is multiplied by the scale and the gradients divided by it, as under
      mixed_float16.  It updates no weight; statistics of BatchNorm and random generators go on.

    Raises:
      ConfigError: if the model has no variable to train.
    """
    keeper = _Keeper()
    losses_fn = loss_fn or default_loss(model)
    data_loss = tf.Variable(0.0, trainable=False)

    def noted_loss(labels: Any, outputs: Any) -> Any:
        losses = losses_fn(labels, outputs)
        # Once for each micro-batch.
        data_loss.assign_add(tf.cast(tf.reduce_mean(losses), tf.float32) / accumulate_steps)
        return losses

    step = make_train_step(
        model,
        keeper,
        loss_fn=noted_loss,
        jit_compile=jit_compile,
        fused=fused,
        accumulate_steps=accumulate_steps,
    )

    def gradients_of(images: Any, labels: Any, *, scale: float = 1.0) -> Gradients:
        keeper.scale.assign(scale)
        data_loss.assign(0.0)
        sums = step(images, labels)
        values = [
            tf.convert_to_tensor(kept) / tf.cast(scale, kept.dtype) if is_there else None
            for kept, is_there in zip(keeper.kept, keeper.are_there, strict=True)
        ]
        return Gradients(float(sums.loss / sums.examples), float(data_loss), values)

    return gradients_of


class _Keeper(keras.optimizers.LossScaleOptimizer):
    """Keeps the gradients it is given.  It scales the loss, so that float16 models take it."""

    def __init__(self) -> None:
        # Names of their own: those that Keras numbers are for the optimisers that train.
        super().__init__(keras.optimizers.SGD(0.0, name="none"), name="gradient_keeper")
        self.scale = tf.Variable(1.0, trainable=False)
        self.kept: tuple[Any, ...] = ()
        self.are_there: tuple[bool, ...] = ()

    def build(self, variables: Sequence[Any]) -> None:
        self.kept = tuple(
            tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)
            for variable in variables
        )
        self.built = True

    def scale_loss(self, loss: Any) -> Any:
        return loss * self.scale

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        self.are_there = tuple(gradient is not None for gradient in grads)
        for kept, gradient in zip(self.kept, grads, strict=True):
            if gradient is not None:
                kept.assign(tf.cast(tf.convert_to_tensor(gradient), kept.dtype))
