"""A Keras model trained by pure JAX: many steps in one compiled loop, or a compiled step at a time.

    run = Training(model, optimizer, images, labels, batch_size=32, in_one_loop=True)
    run.train(100)
    print(run.mean_loss())                       # waits for the device

Keras must be on its JAX backend.  It gives the layers and the update rule as pure functions of
their variables (`stateless_call`, `stateless_apply`); `fit` and its metrics are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np


class State(NamedTuple):
    """What a step changes; its memory is donated to the step, which writes the new state there.

    Attributes:
      trainable: the model's trainable variables.
      fixed: its others: statistics of BatchNorm, seeds of dropout.
      optimizer: the optimizer's variables.
      loss: sum of the steps' losses, a scalar.
    """

    trainable: list[Any]
    fixed: list[Any]
    optimizer: list[Any]
    loss: Any


class Training:
    """A model in training on images that lie on the device.

    Args:
      model: takes float32 images, gives logits.  Its own variables are not changed.
      optimizer: a Keras optimizer, not built yet.
      images: [N, H, W, C] uint8, as a JAX array.
      labels: [N] int32, as a JAX array.
      batch_size: examples a step; a new order every epoch, the rest that fills no batch left out.
      in_one_loop: whether the steps of a call are one loop inside XLA.
      mean: of each channel, in units of 255; the model gets (image / 255 - mean) / std.
      std: the same for the deviation.
      seed: of the orders.

    Attributes:
      state: the `State` after the last step.
      traces: how often the steps have been traced, and so compiled.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        images: Any,
        labels: Any,
        *,
        batch_size: int,
        in_one_loop: bool,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        seed: int = 0,
    ) -> None:
        self._data, self._batch_size = (images, labels), batch_size
        self._in_one_loop = in_one_loop
        self._steps_per_epoch = len(images) // batch_size
        self._rng = np.random.default_rng(seed)
        self._order, self._position = None, self._steps_per_epoch
        self._steps = 0
        self.traces = 0
        optimizer.build(model.trainable_variables)
        step = make_step(model, optimizer, mean=mean, std=std)

        def one_step(state: State, data: Any, order: Any, position: Any) -> State:
            self.traces += 1
            return step(state, *draw(data, order[position]))

        # The bounds are arguments: a loop of another length is the same program.
        def steps(state: State, data: Any, order: Any, first: Any, last: Any) -> State:
            self.traces += 1
            return jax.lax.fori_loop(
                first, last, lambda i, state: step(state, *draw(data, order[i])), state
            )

        self._run = jax.jit(steps if in_one_loop else one_step, donate_argnums=0)
        variables = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
        # Copies, as what is donated is gone.
        trainable, fixed, others = (
            [jnp.array(v.value, copy=True) for v in group] for group in variables
        )
        self.state = State(trainable, fixed, others, jnp.zeros(()))

    def train(self, steps: int) -> None:
        """Starts so many steps, and returns, it may be, before the device has finished."""
        self._steps = steps
        self.state = self.state._replace(loss=jnp.zeros(()))
        while steps:
            if self._position == self._steps_per_epoch:
                order = self._rng.permutation(len(self._data[0])).astype(np.int32)
                used = order[: self._steps_per_epoch * self._batch_size]
                self._order, self._position = jnp.asarray(used.reshape(-1, self._batch_size)), 0
            first = self._position
            last = min(first + steps, self._steps_per_epoch)
            if self._in_one_loop:
                self.state = self._run(self.state, self._data, self._order, first, last)
            else:
                for position in range(first, last):
                    self.state = self._run(self.state, self._data, self._order, position)
            self._position = last
            steps -= last - first

    def mean_loss(self) -> float:
        """Waits for the last call of `train` and returns the mean of its steps' losses."""
        return float(jax.block_until_ready(self.state).loss) / self._steps


def make_step(
    model: Any, optimizer: Any, *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[State, Any, Any], State]:
    """The training step as a pure function of (state, uint8 images, labels) -> state."""
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    factor, offset = np.float32(1 / (255 * np.array(std))), np.float32(-np.divide(mean, std))

    def forward(trainable: Any, state: State, images: Any, labels: Any) -> Any:
        inputs = images.astype("float32") * factor + offset
        logits, fixed = model.stateless_call(trainable, state.fixed, inputs, training=True)
        loss = loss_fn(labels, logits)
        # For float16 the optimizer scales the loss, by a factor that is one of its variables.
        mapping = list(zip(optimizer.variables, state.optimizer, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return optimizer.scale_loss(loss), (loss, fixed)

    def step(state: State, images: Any, labels: Any) -> State:
        grads, (loss, fixed) = jax.grad(forward, has_aux=True)(
            state.trainable, state, images, labels
        )
        trainable, variables = optimizer.stateless_apply(state.optimizer, grads, state.trainable)
        return State(trainable, fixed, variables, state.loss + loss)

    return step


def draw(data: Any, index: Any) -> Any:
    """The images and labels of a batch, by their indices, which are known to be in range."""
    return [array.at[index].get(mode="promise_in_bounds") for array in data]


class BlockMaxPooling(keras.layers.Layer):
    """`MaxPooling2D` with strides as large as its windows, as a maximum over an axis.

    XLA has only a slow gradient for the maximum over windows that may overlap: in lab_cnn, batch
    32, on two cores, 27.1 ms forward and back for the first pool, against 2.8 like this.

    Args:
      size: of the windows, in both directions; rows and columns that fill none are left out.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def call(self, x: Any) -> Any:
        """[B, H, W, C] -> [B, H // size, W // size, C]."""
        size, (_, height, width, channels) = self.size, x.shape
        rows, columns = height // size, width // size
        blocks = x[:, : rows * size, : columns * size]
        shape = (-1, rows, size, columns, size, channels)
        return keras.ops.max(keras.ops.reshape(blocks, shape), axis=(2, 4))


def with_block_pooling(model: Any) -> Any:
    """The same model, of the same other layers, with `BlockMaxPooling` for its `MaxPooling2D`."""

    def replace(layer: Any) -> Any:
        if not isinstance(layer, keras.layers.MaxPooling2D):
            return layer
        return BlockMaxPooling(layer.pool_size[0])

    return keras.models.clone_model(model, clone_function=replace)
