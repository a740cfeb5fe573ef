"""SGD with momentum, Nesterov, decay and both weight decays, one fused kernel a variable.

    from cifarflow.optimizers.sgd import SGD

    optimizer = SGD(0.01, momentum=0.9, nesterov=True, decay=1e-6)  # the lab's
    model.compile(optimizer, loss="sparse_categorical_crossentropy")  # as any Keras optimiser,
    optimizer.apply(gradients, model.trainable_variables)  # or in one's own loop

The rule of the update stands in the docstring of `SGD`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from cifarflow.errors import ConfigError, check_float
from cifarflow.optimizers.schedules import InverseTime


@keras.saving.register_keras_serializable(package="cifarflow")
class SGD(keras.optimizers.SGD):
    """`keras.optimizers.SGD` with `decay`, `l2`, rates by variable and a fused update.

    Update number `t` (0, 1, ...; a call of `apply` each) of a weight `w` with gradient `g` and
    velocity `v`, which starts at 0::

        lr = learning_rate / (1 + decay * t)    learning_rate(t) if it is a schedule
        g  = clip(g)                            clipnorm, clipvalue or global_clipnorm
        w  = w - lr * weight_decay * w          decoupled weight decay
        g  = scale * g + l2 * w                 scale of learning_rate_scales, else 1; L2
        v  = momentum * v - lr * g
        w  = w + v                              nesterov=False; momentum 0: w = w - lr * g
        w  = w + momentum * v - lr * g          nesterov=True

    and with `scaled_velocity=False` the last three are::

        v  = momentum * v + g
        w  = w - lr * v                         nesterov=False; momentum 0: w = w - lr * g
        w  = w - lr * (g + momentum * v)        nesterov=True

    The velocity of the first rule holds the learning rate, as everywhere in Keras and TensorFlow:
    a step taken at a high rate keeps its size while it fades.  That of the second is PyTorch's,
    where a change of `lr` acts on old gradients too.  With a constant rate the two are the same;
    under a schedule they part.  A recipe from PyTorch needs its own, as does a velocity saved
    under one rule when training goes on.

    `learning_rate_scales` multiplies the rate at which some variables follow their gradients: it
    is a factor on the gradient, after clipping, so both weight decays go on at the unscaled rate.
    A scale of 64 is thus PyTorch's "64 times the learning rate, 1/64 of the weight decay".  Under
    a schedule of its own a scale is that of the step which a gradient came in, so a scale fallen
    to 0 lets the velocity run out, and `l2` go on; add the variable to `no_decay` to bring it to
    rest.

    `l2` against the regularisers of Keras: those add `c * w**2` to the loss, whose gradient is
    `2 * c * w`, so `l2 = 2 * c` does the same, without the cost of the sum and without showing
    in the loss.  One difference: clipping sees a regulariser's gradient, and does not see `l2`.
    PyTorch's `weight_decay` is this `l2`.

    The update of one variable is one kernel (`ResourceApplyKerasMomentum`; with
    `scaled_velocity=False` `ResourceApplyMomentum`, without momentum
    `ResourceApplyGradientDescent`) in place of Keras's four multiplications, two subtractions
    and two assignments.  Sparse gradients and variables under a `tf.distribute` strategy take
    those of the parent class, or their like; the numbers are the same.

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
      learning_rate_scales: part of a variable's path (a regular expression) -> scale of its
        learning rate: a number >= 0, or a `LearningRateSchedule` of `t` that gives one, such as
        `{"whitening/bias": Piecewise([294], [1.0, 0.0]), "beta": 64.0}`.  The first expression
        that is found in a path counts; where none is, the scale is 1.
      scaled_velocity: whether the velocity holds the learning rate; False is PyTorch's rule.
      clipnorm: largest norm of each variable's gradient, > 0.
      clipvalue: largest absolute value of each gradient entry, > 0.
      global_clipnorm: largest norm of all gradients together, > 0.
      **kwargs: `use_ema`, `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`,
        `gradient_accumulation_steps` and `name`, as in `keras.optimizers.Optimizer`.

    Raises:
      ConfigError: if a number is not finite or out of bounds, `nesterov` comes without momentum,
        `decay` with a schedule, `no_decay` is not a list or tuple of valid expressions,
        `learning_rate_scales` no mapping from them to scales, more than one kind of clipping is
        asked for, or Keras refuses one of the other arguments.  By `build`, if an expression of
        `learning_rate_scales` is found in no variable's path.

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
        learning_rate_scales: Mapping[str, Any] | None = None,
        scaled_velocity: bool = True,
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
        scales = _check_scales(learning_rate_scales)
        if not isinstance(scaled_velocity, bool):
            raise ConfigError(f"scaled_velocity must be True or False, not {scaled_velocity!r}")
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
        self.scaled_velocity = scaled_velocity
        # Tuples, here and in `build`: TensorFlow would make a dict or list part of checkpoints.
        self._scales = scales
        self.exclude_from_weight_decay(var_names=no_decay)

    @property
    def learning_rate_scales(self) -> dict[str, Any]:
        """Expression -> number or schedule, as given to the constructor."""
        return dict(self._scales)

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the velocities; the first update does so too.

        Args:
          variables: the `keras.Variable`s to train.

        Raises:
          ConfigError: if an expression of `learning_rate_scales` is found in no variable's path.
        """
        if self.built:
            return
        paths = [path_of(variable) for variable in variables]
        for pattern, _ in self._scales:
            if not any(re.search(pattern, path) for path in paths):
                raise ConfigError(
                    f"learning_rate_scales must match trainable variables, not {pattern!r}:"
                    f" there are {quote_some(paths)}"
                )
        self._scale_by_index = tuple(
            next((scale for pattern, scale in self._scales if re.search(pattern, path)), None)
            for path in paths
        )
        super().build(variables)

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
        scale = self.learning_rate_scale(variable)
        if scale is not None:
            gradient = _multiply(gradient, scale)
        if self.l2 and self._use_weight_decay(variable):
            gradient = _add_l2(gradient, variable, self.l2)
        if not _can_fuse(gradient, variable):
            if self.scaled_velocity or not self.momentum:
                super().update_step(gradient, variable, learning_rate)
            else:
                self._update_unscaled(gradient, variable, learning_rate)
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
        apply = (
            tf.raw_ops.ResourceApplyKerasMomentum
            if self.scaled_velocity
            else tf.raw_ops.ResourceApplyMomentum
        )
        apply(
            var=variable.handle,
            accum=velocity.handle,
            lr=learning_rate,
            grad=gradient,
            momentum=tf.constant(self.momentum, dtype),
            use_nesterov=self.nesterov,
        )

    def learning_rate_scale(self, variable: Any) -> Any:
        """The scale of one variable's learning rate at this update.

        Args:
          variable: one of those that the optimiser is built for.

        Returns:
          A number or scalar tensor; None where no expression of `learning_rate_scales` is found.
        """
        scale = self._scale_by_index[self._get_variable_index(variable)]
        return scale(self._iterations) if callable(scale) else scale

    def _update_unscaled(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """The rule of `scaled_velocity=False` where the kernel cannot be used."""
        dtype = variable.dtype
        gradient = tf.cast(tf.convert_to_tensor(gradient), dtype)
        velocity = self.momentums[self._get_variable_index(variable)]
        momentum = tf.constant(self.momentum, dtype)
        direction = momentum * tf.convert_to_tensor(velocity.value) + gradient
        self.assign(velocity, direction)
        if self.nesterov:
            direction = gradient + momentum * direction
        self.assign_sub(variable, tf.cast(learning_rate, dtype) * direction)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON; `decay` as a schedule."""
        schedules = keras.optimizers.schedules
        scales = {
            pattern: schedules.serialize(scale) if callable(scale) else scale
            for pattern, scale in self._scales
        }
        return {
            **super().get_config(),
            "l2": self.l2,
            "no_decay": list(self.no_decay),
            "learning_rate_scales": scales,
            "scaled_velocity": self.scaled_velocity,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Makes an optimiser from what `get_config` returned.

        Args:
          config: that dictionary.
          custom_objects: names -> classes of schedules that Keras does not know, if any.
        """
        config = dict(config)
        config["learning_rate_scales"] = {
            pattern: keras.optimizers.schedules.deserialize(scale, custom_objects=custom_objects)
            if isinstance(scale, dict)
            else scale
            for pattern, scale in (config.get("learning_rate_scales") or {}).items()
        }
        return super().from_config(config, custom_objects=custom_objects)


def check_pattern(name: str, pattern: object) -> str:
    """Returns `pattern` if it is a regular expression that is not empty.

    Raises:
      ConfigError: if it is not.
    """
    good = f"{name} must be non-empty regular expressions, not {pattern!r}"
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(good)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{good}: {error}") from error
    return pattern


def path_of(variable: Any) -> str:
    """The path of a `keras.Variable`, such as "dense_1/kernel"; a `tf.Variable` has a name only."""
    path: str = getattr(variable, "path", variable.name)
    return path


def quote_some(paths: Sequence[str], *, most: int = 6) -> str:
    """The first paths, quoted, and how many more there are: for one line of an error."""
    more = len(paths) - most
    return ", ".join(map(repr, paths[:most])) + (f" and {more} more" if more > 0 else "")


def _check_scales(scales: Any) -> tuple[tuple[str, Any], ...]:
    """The items of `learning_rate_scales`, numbers as floats; see the class for what is good."""
    if scales is None:
        return ()
    if not isinstance(scales, Mapping):
        raise ConfigError(
            "learning_rate_scales must be a mapping from expressions to scales,"
            f" such as {{'bias': 64.0}}, not {scales!r}"
        )
    checked = []
    for pattern, scale in scales.items():
        check_pattern("learning_rate_scales' keys", pattern)
        if not isinstance(scale, keras.optimizers.schedules.LearningRateSchedule):
            name = f"learning_rate_scales[{pattern!r}], where it is no LearningRateSchedule,"
            scale = check_float(name, scale)
        checked.append((pattern, scale))
    return tuple(checked)


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


def _multiply(gradient: Any, scale: Any) -> Any:
    """`scale * gradient`, sparse where that is."""
    if isinstance(gradient, tf.IndexedSlices):
        values = _multiply(gradient.values, scale)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(scale, gradient.dtype)


def _add_l2(gradient: Any, variable: Any, l2: float) -> Any:
    """`gradient + l2 * variable`: always dense, as every row shrinks, with a gradient or not."""
    penalty = tf.convert_to_tensor(variable) * l2
    if isinstance(gradient, tf.IndexedSlices):
        rows = tf.cast(gradient.values, penalty.dtype)
        return tf.tensor_scatter_nd_add(penalty, gradient.indices[:, tf.newaxis], rows)
    return tf.cast(gradient, penalty.dtype) + penalty
