"""Muon for the kernels of convolutions, SGD for everything else.

    from cifarflow.optimizers.muon import Muon

    optimizer = Muon(0.24, learning_rate_scales={"beta": 0.22, "dense/kernel": 2.8}, l2=1e-5)
    model.compile(optimizer, loss="sparse_categorical_crossentropy")  # as any Keras optimiser

    update = orthogonalize(gradient_matrix)  # the idea alone: all singular values near 1

A gradient of a weight matrix has a few large singular values and many small ones, and so a
gradient step moves the weight in few directions.  Muon gives all of them about the same size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from cifarflow.device import has_gpu
from cifarflow.errors import ConfigError, check_choice, check_float, check_int
from cifarflow.optimizers.sgd import SGD, check_pattern, path_of, quote_some

NEWTON_SCHULZ_DTYPES = ("float32", "bfloat16")
# Of the polynomial a*x + b*x^3 + c*x^5 that each iteration applies to every singular value.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
# Rounding leaves eigenvalues a little below 0, which no Gram matrix has and which grow twelvefold
# a step; so it is taken from X anew after so many.
_GRAM_STEPS = 4


def orthogonalize(matrix: Any, *, steps: int = 3, dtype: str = "float32") -> Any:
    """Brings the singular values of a matrix towards 1, and leaves its singular vectors.

    The limit is `U V'` of the singular value decomposition `U S V'`, the orthogonal matrix nearest
    to this one.  Newton-Schulz iterations approach it by matrix products alone; with `X` the matrix
    over its Frobenius norm, and lying (rows <= columns; else its transpose) ::

        X <- a X + (b A + c A A) X,    A = X X',    (a, b, c) = (3.4445, -4.7750, 2.0315)

    Three steps take singular values of 0.02 of the norm and more to within 0.68..1.21, and the
    smallest to 41 times what they were, 3.4 times by each step.  Further steps bring smaller
    values into that band, which they hardly narrow: the polynomial is made to climb fast, not to
    come to rest at 1.

    In float32, on a CPU, only the smaller of `X X'` and `X' X` is iterated.  The steps multiply X
    by polynomials of it, which commute with each other, so X itself is needed at the start and at
    the end alone.  Its eigenvalues are the squares of the singular values, for which bfloat16 has
    too few digits, and so have float32 products on a GPU, where TensorFlow takes TF32 for them:
    there X is iterated as it stands above.

    Args:
      matrix: [rows, columns] floating point, of known shape.
      steps: iterations, >= 1.
      dtype: of the matrix products, "float32" or "bfloat16".

    Returns:
      [rows, columns] of the matrix's dtype.  All zeros for a matrix of zeros.

    Raises:
      ConfigError: if the matrix is none, or of integers, or another argument is out of range.

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    check_int("steps", steps)
    check_choice("dtype", dtype, NEWTON_SCHULZ_DTYPES)
    matrix = tf.convert_to_tensor(matrix)
    if matrix.shape.rank != 2 or not matrix.shape.is_fully_defined():
        raise ConfigError(f"matrix must be [rows, columns] of known size, not {matrix.shape}")
    if not matrix.dtype.is_floating:
        raise ConfigError(f"matrix must be of floating point, not {matrix.dtype.name}")
    x = tf.cast(matrix, tf.float32)
    x = tf.cast(x / (tf.norm(x) + _EPSILON), dtype)
    # A standing matrix is multiplied from the other side, which transposes nothing.
    standing = matrix.shape[0] > matrix.shape[1]

    def gram_of(x: Any) -> Any:
        return tf.matmul(x, x, transpose_a=standing, transpose_b=not standing)

    def multiplied(x: Any, polynomial: Any) -> Any:
        return tf.matmul(x, polynomial) if standing else tf.matmul(polynomial, x)

    a, b, c = (tf.constant(value, x.dtype) for value in _COEFFICIENTS)
    if dtype == "bfloat16" or has_gpu():
        for _ in range(steps):
            gram = gram_of(x)
            x = a * x + multiplied(x, b * gram + c * tf.matmul(gram, gram))
        return tf.cast(x, matrix.dtype)
    one = tf.eye(min(matrix.shape), dtype=x.dtype)
    for start in range(0, steps, _GRAM_STEPS):
        gram, factors = gram_of(x), []
        for _ in range(min(_GRAM_STEPS, steps - start)):
            factor = a * one + b * gram + c * tf.matmul(gram, gram)
            # Of X after this step; what the last one makes of it is read by nobody.
            gram = factor @ gram @ factor
            factors.append(factor)
        x = multiplied(x, functools.reduce(tf.matmul, factors))
    return tf.cast(x, matrix.dtype)


@keras.saving.register_keras_serializable(package="cifarflow")
class Muon(SGD):
    """Momentum, orthogonalised, for the kernels of convolutions; `SGD` for all other variables.

    Update number `t` of a kernel `w` [H, W, C_in, C_out] with gradient `g` and velocity `v`, which
    starts at 0; as matrices, `w` and `g` are [H * W * C_in, C_out]::

        lr = learning_rate(t) * scale(t)        scale of learning_rate_scales, else 1
        g  = clip(g)
        v  = muon_momentum * v + g
        u  = orthogonalize(g + muon_momentum * v)
        w  = w * sqrt(C_out) / norm(w)          Frobenius norm
        w  = w - lr * u

    The size of `g` has no influence on that of `u`, so the scale must act on the rate itself here,
    not on the gradient as in `SGD`.  The norm of the kernels is set, so `l2` and `weight_decay`
    leave them alone; it is meant for convolutions that a normalisation follows, whose outputs do
    not depend on the norm.

    All other variables, biases and dense kernels among them, follow the rule of `SGD` with the
    same `learning_rate`; to give them a rate of their own name them in `learning_rate_scales`.

    Args:
      learning_rate: as in `SGD`; of a kernel whose norm is sqrt(C_out), so 0.24 is much.
      muon_momentum: of the kernels, in [0, 1); always with Nesterov's look ahead.
      newton_schulz_steps: iterations of `orthogonalize`, >= 1.
      newton_schulz_dtype: dtype of its matrix products, "float32" or "bfloat16".
      muon_variables: parts of variable paths (regular expressions): a variable with four axes,
        the output's last, in whose path one of them is found takes Muon's rule.
      momentum: of the other variables, in [0, 1).
      nesterov: of the other variables; needs momentum.
      scaled_velocity: of the other variables, as in `SGD`; False is that of the source.
      **kwargs: the other arguments of `SGD`.

    Raises:
      ConfigError: for the reasons of `SGD`, or if an argument is out of range, or `muon_variables`
        is not a list or tuple of valid expressions.  By `build`, if no variable takes Muon's rule.

    Source:
      K. Jordan, airbench94_muon (2024).  Different here: the products are in float32 unless
      asked for in bfloat16.  `keras.optimizers.Muon` takes matrices only, and gives every
      kernel of a convolution to AdamW.
    """

    def __init__(
        self,
        learning_rate: Any = 0.24,
        *,
        muon_momentum: float = 0.6,
        newton_schulz_steps: int = 3,
        newton_schulz_dtype: str = "float32",
        muon_variables: Sequence[str] = ("kernel",),
        momentum: float = 0.85,
        nesterov: bool = True,
        scaled_velocity: bool = False,
        **kwargs: Any,
    ) -> None:
        muon_momentum = check_float("muon_momentum", muon_momentum, maximum=1.0, below_maximum=True)
        newton_schulz_steps = check_int("newton_schulz_steps", newton_schulz_steps)
        check_choice("newton_schulz_dtype", newton_schulz_dtype, NEWTON_SCHULZ_DTYPES)
        # A lone string is a sequence too: of letters, which would match nearly every variable.
        if not isinstance(muon_variables, (list, tuple)) or not muon_variables:
            raise ConfigError(
                f"muon_variables must be a non-empty list of expressions, not {muon_variables!r}"
            )
        patterns = tuple(check_pattern("muon_variables", pattern) for pattern in muon_variables)
        super().__init__(
            learning_rate,
            momentum=momentum,
            nesterov=nesterov,
            scaled_velocity=scaled_velocity,
            **kwargs,
        )
        self.muon_momentum = muon_momentum
        self.newton_schulz_steps = newton_schulz_steps
        self.newton_schulz_dtype = newton_schulz_dtype
        self.muon_variables = patterns

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the velocities; the first update does so too.

        Args:
          variables: the `keras.Variable`s to train.

        Raises:
          ConfigError: if no variable takes Muon's rule, or an expression of
            `learning_rate_scales` is found in no variable's path.
        """
        if self.built:
            return
        # A tuple: TensorFlow would make a list part of checkpoints.
        self._is_muon = tuple(
            len(variable.shape) == 4
            and any(re.search(pattern, path_of(variable)) for pattern in self.muon_variables)
            for variable in variables
        )
        if not any(self._is_muon):
            raise ConfigError(
                "muon_variables must match a trainable variable with four axes, not"
                f" {list(self.muon_variables)!r}: there are"
                f" {quote_some([path_of(variable) for variable in variables])}"
            )
        super().build(variables)
        if not self.momentum:  # those of the kernels are needed all the same
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable; Keras calls this after clipping and decoupled weight decay.

        Args:
          gradient: `tf.Tensor` of the variable's shape, or `tf.IndexedSlices`.
          variable: the `tf.Variable` behind a model variable.
          learning_rate: scalar.
        """
        index = self._get_variable_index(variable)
        if not self._is_muon[index]:
            super().update_step(gradient, variable, learning_rate)
            return
        rate = tf.cast(learning_rate, tf.float32)
        scale = self.learning_rate_scale(variable)
        if scale is not None:
            rate *= scale
        gradient = tf.cast(tf.convert_to_tensor(gradient), tf.float32)
        velocity = self.momentums[index]
        new_velocity = self.muon_momentum * tf.cast(velocity.value, tf.float32) + gradient
        self.assign(velocity, new_velocity)
        filters = variable.shape[-1]
        update = orthogonalize(
            tf.reshape(
                gradient + self.muon_momentum * new_velocity,
                (variable.shape.num_elements() // filters, filters),
            ),
            steps=self.newton_schulz_steps,
            dtype=self.newton_schulz_dtype,
        )
        weights = tf.cast(variable, tf.float32)
        # A kernel of zeros has no direction to keep: it starts with the update alone.
        rescale = tf.math.divide_no_nan(filters**0.5, tf.norm(weights))
        self.assign(variable, rescale * weights - rate * tf.reshape(update, variable.shape))

    def _use_weight_decay(self, variable: Any) -> bool:
        if self._is_muon[self._get_variable_index(variable)]:
            return False
        use: bool = super()._use_weight_decay(variable)
        return use

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, ready for JSON; `decay` as a schedule."""
        return {
            **super().get_config(),
            "muon_momentum": self.muon_momentum,
            "newton_schulz_steps": self.newton_schulz_steps,
            "newton_schulz_dtype": self.newton_schulz_dtype,
            "muon_variables": list(self.muon_variables),
        }
