"""Averages of the weights: lookahead pulls training back to one, an EMA is kept beside it.

    run = train(model, optimizer, batches=batches, epochs=10, averaging=Lookahead())

or in a loop of one's own:

    averaging = WeightEMA(decay=0.99)
    train_step = averaging.around(make_train_step(model, optimizer), model, total_steps=1000)
    for images, labels in batches.dataset(0, 1000):
        train_step(images, labels)
    averaging.finish()  # from here on the model holds the averages

The averages are part of the compiled step, so many steps still share one call.  They are over all
of the model's numbers: weights, frozen ones too, and the statistics of BatchNorm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from cifarflow.errors import ConfigError, check_float, check_int


class Averaging:
    """Averages of a model's variables, brought up to date every so many steps.

    With `d = decay_at(t)` after step `t` (1, 2, ...; every `every_steps`-th), `net` a variable of
    the model and `average` its average, which starts at the variable's first value::

        average = d * average + (1 - d) * net

    Every step counts, one whose update is skipped for an overflow under mixed_float16 too, so `t`
    is the loop's step and not the optimiser's.  Averages of 16-bit variables are in float32, as
    1 - d may be less than their last digit.

    An object belongs to one run at a time: a second one starts its averages afresh.

    Args:
      every_steps: whole number of steps between two updates, >= 1.
      pulls_back: whether the model's variables take the averages' values at each update.

    Raises:
      ConfigError: if every_steps is out of range.
    """

    _name = "averaging"

    def __init__(self, *, every_steps: int, pulls_back: bool) -> None:
        self.every_steps = check_int("every_steps", every_steps)
        self._pulls_back = pulls_back
        self._steps: Any = None
        self._pairs: list[tuple[Any, Any]] = []

    def decay_at(self, step: Any, *, total_steps: int) -> Any:
        """The weight `d` of the old average in the update after a step.

        Args:
          step: steps done, this one included, >= 1: Python int or scalar integer tensor.
          total_steps: steps of the whole run.

        Returns:
          Scalar float32 tensor, in [0, 1).
        """
        raise NotImplementedError(f"{type(self).__name__} must define decay_at(step)")

    @property
    def variables(self) -> list[Any]:
        """Keras variables that a checkpoint keeps: the count of steps, then the averages."""
        return [] if self._steps is None else [self._steps, *(mean for _, mean in self._pairs)]

    def build(self, model: Any) -> None:
        """Makes the state, at the start of a run: the averages are the model's present values.

        Args:
          model: a Keras model, whose float variables are averaged.
        """
        # 64 bits, since TensorFlow keeps 32-bit integers in the host's memory.
        self._steps = keras.Variable(0, dtype="int64", trainable=False, name=f"{self._name}_steps")
        self._pairs = []
        for variable in model.variables:
            dtype = tf.as_dtype(variable.dtype)
            if dtype.is_floating:  # not the states of random generators
                # A tensor of the value: Keras makes no variable of its own out of a tf.Variable.
                value = tf.convert_to_tensor(variable.value)
                average = keras.Variable(
                    tf.cast(value, tf.float32 if dtype.size < 4 else dtype),
                    trainable=False,
                    name=f"{self._name}_{variable.path.replace('/', '_')}",
                )
                self._pairs.append((variable, average))

    def around(self, train_step: Any, model: Any, *, total_steps: int) -> Any:
        """Returns the step followed by the update of the averages, and builds their state.

        Args:
          train_step: a `tf.function` as `make_train_step` returns.
          model: the model that it trains.
          total_steps: steps of the whole run.

        Returns:
          A `tf.function` of the same arguments and result.

        Raises:
          ConfigError: if total_steps is out of range.
        """
        check_int("total_steps", total_steps)
        self.build(model)
        # A later run has others.
        counter, pairs = self._steps.value, self._pairs

        @tf.function
        def averaged_step(images: Any, labels: Any) -> Any:
            sums = train_step(images, labels)
            step = counter + 1
            counter.assign(step)
            # A condition in the graph only where there is something to decide.
            if self.every_steps == 1 or step % self.every_steps == 0:
                self._update(pairs, self.decay_at(step, total_steps=total_steps))
            return sums

        return averaged_step

    def _update(self, pairs: list[tuple[Any, Any]], decay: Any) -> None:
        for variable, average in pairs:
            net = tf.cast(tf.convert_to_tensor(variable.value), average.dtype)
            # The same as in the docstring; like this, what does not change keeps its every bit.
            mean = net + tf.cast(decay, net.dtype) * (average.value - net)
            average.value.assign(mean)
            if self._pulls_back:
                variable.value.assign(tf.cast(mean, variable.dtype))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Lets the model hold the averages within the block, and its own values again after it.

        Before the first update there are no averages: the model keeps its own values.
        """
        # Tensors, which no assignment changes: bit for bit the same values come back.
        own = [tf.identity(variable.value) for variable, _ in self._pairs]
        try:
            self._take_averages()
            yield
        finally:
            for (variable, _), value in zip(self._pairs, own, strict=True):
                variable.value.assign(value)

    def finish(self) -> None:
        """Gives the model the averages for good, at the end of training.

        Before the first update there are none: the model keeps its own values.
        """
        self._take_averages()

    def reset(self) -> None:
        """Starts over from the model's present values, for another run by the same compiled step.

        Whoever trains several seeds sets the model's and the optimiser's variables first.
        """
        if self._steps is not None:
            self._steps.value.assign(0)
        for variable, average in self._pairs:
            average.value.assign(tf.cast(variable.value, average.dtype))

    def _take_averages(self) -> None:
        if self._steps is None or int(self._steps.value) < self.every_steps:
            return
        for variable, average in self._pairs:
            variable.value.assign(tf.cast(average.value, variable.dtype))


class Lookahead(Averaging):
    """Pulls the weights back to their moving average every few steps, ever harder.

    After step `t` of `total_steps`, if it is a multiple of `every_steps`, for every float
    variable of the model, trained or not::

        d       = decay * (t / total_steps)**power
        average = d * average + (1 - d) * net
        net     = average

    At first it does next to nothing; towards the end it damps what the noise of single batches
    does to the weights, so that they may be trained at a high learning rate for longer.  The
    optimiser's velocity stays as it is.

    At the end `net = average`: the model is the last average, and the steps after it, fewer than
    `every_steps`, are dropped.  Validation sees the averages too.  A run that ends before the
    first update keeps its own weights.

    Args:
      every_steps: whole number of steps between two updates, >= 1.
      decay: d at the last step, in [0, 1).
      power: how late it grows, >= 0; 0 for a constant d.

    Raises:
      ConfigError: if an argument is out of range.

    Source:
      `LookaheadState` of airbench94 (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
      2024), after Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (2019), where
      the slow weights move by a constant share.  Airbench evaluates the weights in training
      between epochs, here it is the average; training is the same.
    """

    _name = "lookahead"

    def __init__(self, *, every_steps: int = 5, decay: float = 0.95**5, power: float = 3.0) -> None:
        super().__init__(every_steps=every_steps, pulls_back=True)
        self.decay = check_float("decay", decay, maximum=1.0, below_maximum=True)
        self.power = check_float("power", power)

    def decay_at(self, step: Any, *, total_steps: int) -> Any:
        """See `Averaging.decay_at`: decay * (step / total_steps)**power."""
        return self.decay * (tf.cast(step, tf.float32) / total_steps) ** self.power


class WeightEMA(Averaging):
    """Keeps an exponential moving average of the weights beside them, for evaluation.

    After step `t`, if it is a multiple of `every_steps`, for every float variable of the model,
    trained or not::

        n       = t / every_steps
        d       = decay, with a warm-up min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * net

    Training itself does not see it, and does not change by a bit.  Validation sees the averages;
    at the end the model holds them.  A run that ends before the first update keeps its own
    weights.

    Args:
      decay: share of the old average that stays in an update, in [0, 1).  It averages over about
        every_steps / (1 - decay) steps.
      every_steps: whole number of steps between two updates, >= 1.
      warmup: whether the first updates forget faster, so that the initial weights count for
        little in a short run.
      keep_last: whether the model keeps its own last weights at the end; validation and
        `averaged()` have the averages even so.

    Raises:
      ConfigError: if an argument is out of range.

    Source:
      Polyak and Juditsky, "Acceleration of stochastic approximation by averaging" (1992); the
      warm-up is that of `tf.train.ExponentialMovingAverage(num_updates=...)`.
    """

    _name = "weight_ema"

    def __init__(
        self,
        *,
        decay: float = 0.999,
        every_steps: int = 1,
        warmup: bool = True,
        keep_last: bool = False,
    ) -> None:
        super().__init__(every_steps=every_steps, pulls_back=False)
        self.decay = check_float("decay", decay, maximum=1.0, below_maximum=True)
        for name, value in (("warmup", warmup), ("keep_last", keep_last)):
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, not {value!r}")
        self.warmup, self.keep_last = warmup, keep_last

    def decay_at(self, step: Any, *, total_steps: int) -> Any:
        """See `Averaging.decay_at`: decay, less while it warms up, whatever total_steps is."""
        if not self.warmup:
            return tf.constant(self.decay)
        updates = tf.cast(step // self.every_steps, tf.float32)
        return tf.minimum(self.decay, (1 + updates) / (10 + updates))

    def finish(self) -> None:
        """Gives the model the averages for good, unless `keep_last`."""
        if not self.keep_last:
            super().finish()
