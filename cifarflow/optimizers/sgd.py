"""SGD with momentum, Nesterov, decay and both weight decays, one fused kernel a variable.

    from cifarflow.optimizers.sgd import SGD

    optimizer = SGD(0.01, momentum=0.9, nesterov=True, decay=1e-6)  # the lab's
    model.compile(optimizer, loss="sparse_categorical_crossentropy")  # as any Keras optimiser,
    optimizer.apply(gradients, model.trainable_variables)  # or in one's own loop

The rule of the update stands in the docstring of `SGD`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from cifarflow.errors import ConfigError, check_float
from cifarflow.optimizers.schedules import InverseTime


@keras.saving.register_keras_serializable(package="cifarflow")
class SGD(keras.optimizers.SGD):
    """`keras.optimizers.SGD` with `decay`, `l2` and a fused update.

    Update number `t` (0, 1, ...; a call of `apply` each) of a weight `w` with gradient `g` and
    velocity `v`, which starts at 0::

        lr = learning_rate / (1 + decay * t)    learning_rate(t) if it is a schedule
        g  = clip(g)                            clipnorm, clipvalue or global_clipnorm
        w  = w - lr * weight_decay * w          decoupled weight decay
        g  = g + l2 * w                         L2 in the gradient
        v  = momentum * v - lr * g
        w  = w + v                              nesterov=False; momentum 0: w = w - lr * g
        w  = w + momentum * v - lr * g          nesterov=True

    The velocity holds the learning rate, as everywhere in Keras and TensorFlow: a step taken at
    a high rate keeps its size while it fades.  PyTorch keeps `v = momentum * v + g` and scales
    when it applies, `w - lr * v`, so that a change of `lr` acts on old gradients too.  With a
    constant rate the two are the same; under a schedule they part.

    `l2` against the regularisers of Keras: those add `c * w**2` to the loss, whose gradient is
    `2 * c * w`, so `l2 = 2 * c` does the same, without the cost of the sum and without showing
    in the loss.  One difference: clipping sees a regulariser's gradient, and does not see `l2`.
    PyTorch's `weight_decay` is this `l2`.

    The update of one variable is one kernel (`ResourceApplyKerasMomentum`, without momentum
    `ResourceApplyGradientDescent`) in place of Keras's four multiplications, two subtractions
    and two assignments.  Sparse gradients and variables under a `tf.distribute` strategy take the
    way of the parent class; the numbers are the same.

    Args:
      learning_rate: a number >= 0, a `LearningRateSchedule`, or a callable without arguments.
        (Zero is allowed since callbacks may set it, and such a model must load again; not
        with `decay`.)
      momentum: in [0, 1).
      nesterov: whether to look ahead; needs momentum.
      decay: of the learning rate, per update, >= 0; the argument of that name in Keras 2.
        Short for `learning_rate=InverseTime(learning_rate, decay)`, which is what
        `get_config` then holds; as with any schedule `learning_rate` cannot be set later.
      l2: coefficient of the L2 penalty in the gradient, >= 0.
      weight_decay: coefficient of the decoupled weight decay, >= 0; None and 0 are the same.
      no_decay: parts of variable paths (regular expressions) that `l2` and `weight_decay` leave
        alone, such as `("bias", "gamma", "beta")` for biases and batch normalisation.  The path
        holds the layer's name too: `"dense_1/kernel"`.
      clipnorm: largest norm of each variable's gradient, > 0.
      clipvalue: largest absolute value of each gradient entry, > 0.
      global_clipnorm: largest norm of all gradients together, > 0.
      **kwargs: `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
        `gradient_accumulation_steps` and `name`, as in `keras.optimizers.Optimizer`.

    Raises:
      ConfigError: if a number is not finite or out of bounds, `nesterov` comes without momentum,
        `decay` with a schedule, `no_decay` is not a list or tuple of valid expressions, more
        than one kind of clipping is asked for, or Keras refuses one of the other arguments.

    Source:
      Sutskever et al., "On the importance of initialization and momentum" (2013); the lab's
      `SGD(lr, momentum=.9, nesterov=True, decay=1e-6)`.
    """

    def __init__(
        self,
        learning_rate: Any = 0.01,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        decay: float = 0.0,
        l2: float = 0.0,
        weight_decay: float | None = None,
        no_decay: Sequence[str] = (),
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        **kwargs: Any,
    ) -> None:
        momentum = check_float("momentum", momentum, maximum=1.0, below_maximum=True)
        if not isinstance(nesterov, bool) or (nesterov and not momentum):
            raise ConfigError(
                f"nesterov must be False, or True with momentum > 0,"
                f" not {nesterov!r} with momentum {momentum}"
            )
        decay = check_float("decay", decay)
        if not callable(learning_rate):  # schedules are callable
            learning_rate = check_float("learning_rate", learning_rate)
            if decay:
                learning_rate = InverseTime(learning_rate, decay)
        elif decay:
            raise ConfigError(f"decay must be 0 with a learning-rate schedule, not {decay}")
        clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
        for name, value in clips.items():
            if value is not None:
                clips[name] = check_float(name, value, above_minimum=True)
        if weight_decay is not None:
            weight_decay = check_float("weight_decay", weight_decay) or None
        l2 = check_float("l2", l2)
        try:
            super().__init__(
                learning_rate=learning_rate,
                momentum=momentum,
                nesterov=nesterov,
                weight_decay=weight_decay,
                **clips,
                **kwargs,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.l2 = l2
        self.exclude_from_weight_decay(var_names=no_decay)

    def exclude_from_weight_decay(
        self,
        var_list: Sequence[Any] | None = None,
        var_names: Sequence[str] | None = None,
    ) -> None:
        """Leaves variables out of `weight_decay` and `l2`, in place of earlier exclusions.

        Args:
          var_list: variables to leave out.  These are not saved with the optimiser.
          var_names: as the constructor's `no_decay`, and saved as that.

        Raises:
          ConfigError: if the optimiser is built already (a traced step would not notice), or
            `var_names` is not a list or tuple of valid regular expressions.
        """
        if self.built:
            raise ConfigError("exclude_from_weight_decay must be called before the first update")
        names = [] if var_names is None else var_names
        # A lone string is a sequence too: of letters, which would match nearly every variable.
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, str) and name for name in names
        ):
            raise ConfigError(f"no_decay must be a list of non-empty strings, not {names!r}")
        try:
            super().exclude_from_weight_decay(var_list=var_list, var_names=names)
        except re.error as error:
            raise ConfigError(
                f"no_decay must hold regular expressions, not {names!r}: {error}"
            ) from error
        self.no_decay = tuple(names)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable; Keras calls this after clipping and decoupled weight decay.

        Args:
          gradient: `tf.Tensor` of the variable's shape, or `tf.IndexedSlices`.
          variable: the `tf.Variable` behind a model variable.
          learning_rate: scalar.
        """
        if self.l2 and self._use_weight_decay(variable):
            gradient = _add_l2(gradient, variable, self.l2)
        if not _can_fuse(gradient, variable):
            super().update_step(gradient, variable, learning_rate)
            return
        dtype = variable.dtype
        gradient = tf.cast(gradient, dtype)
        learning_rate = tf.cast(learning_rate, dtype)
        if not self.momentum:
            tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=learning_rate, delta=gradient
            )
            return
        velocity = self.momentums[self._get_variable_index(variable)].value
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=velocity.handle,
            lr=learning_rate,
            grad=gradient,
            momentum=tf.constant(self.momentum, dtype),
            use_nesterov=self.nesterov,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON; `decay` as a schedule."""
        return {**super().get_config(), "l2": self.l2, "no_decay": list(self.no_decay)}


def _can_fuse(gradient: Any, variable: Any) -> bool:
    """Whether the raw kernels are right for this pair.

    They write to one buffer.  A variable under a strategy is several, kept equal by the
    strategy's own `assign`; a sparse gradient has no buffer of the variable's shape.  bfloat16
    variables (not those of mixed_bfloat16, which are float32) stay with the parent, as not every
    device has the kernels for them.
    """
    return (
        isinstance(gradient, tf.Tensor)
        and isinstance(variable, tf.Variable)
        and variable.dtype in (tf.float16, tf.float32, tf.float64)
        and not isinstance(variable, tf.distribute.DistributedValues)
        and not tf.distribute.has_strategy()
    )


def _add_l2(gradient: Any, variable: Any, l2: float) -> Any:
    """`gradient + l2 * variable`: always dense, as every row shrinks, with a gradient or not."""
    penalty = tf.convert_to_tensor(variable) * l2
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.cast(gradient.values, penalty.dtype)
        return tf.tensor_scatter_nd_add(penalty, gradient.indices[:, tf.newaxis], rows)
    return tf.cast(gradient, penalty.dtype) + penalty
