"""The training step and the evaluation step: tape, gradients, update; nothing else.

    train_step = make_train_step(model, optimizer)
    for images, labels in batches.dataset(0, 1000):
        sums = train_step(images, labels)
    print(float(sums.loss / sums.examples))

Both return sums over the batch, so that batches of any size add up right.  A step belongs to the
model and optimiser it was made for; make another one for another model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from cifarflow.errors import ConfigError, check_float, check_int, check_micro_batches
from cifarflow.models.fusion import fuse
from cifarflow.models.registry import released_gradients
from cifarflow.optimizers.sgd import check_pattern, path_of, quote_some

LossFn = Callable[[Any, Any], Any]
# Of images, labels and variables: the mean loss, the sums, and the gradients of the scaled loss.
Look = Callable[[Any, Any, Sequence[Any]], tuple[Any, "Sums", list[Any]]]


class Sums(NamedTuple):
    """Sums over examples, as scalar float32 tensors.

    Attributes:
      loss: of the losses, regularisation included (times the examples).
      correct: of the examples whose largest output is at their label.
      examples: how many.
      skipped: batches that were left out, for `skip_nonfinite`; their examples count nowhere.
    """

    loss: Any
    correct: Any
    examples: Any
    skipped: Any = 0.0

    def __add__(self, other: Any) -> Sums:
        """Adds two sums, as over both sets of examples."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @classmethod
    def zero(cls) -> Sums:
        """The sums over no example."""
        return cls(*(tf.zeros([]) for _ in cls._fields))


def cross_entropy(*, from_logits: bool = True, label_smoothing: float = 0.0) -> LossFn:
    """Makes the categorical cross-entropy loss.

    With smoothing s over C classes the target is (1 - s) * one_hot + s / C.

    Args:
      from_logits: whether the model's outputs are logits; False means probabilities.
      label_smoothing: s, in [0, 1).

    Returns:
      A function of (labels [B] integers or [B, C] probabilities, outputs [B, C]) that returns the
      losses [B] float32.

    Raises:
      ConfigError: if label_smoothing is out of range.
    """
    smoothing = check_float("label_smoothing", label_smoothing, maximum=1.0, below_maximum=True)

    def loss_fn(labels: Any, outputs: Any) -> Any:
        # Half precision has too few digits for a sum of exponentials.
        logits = tf.cast(outputs, tf.float32)
        if not from_logits:
            logits = tf.math.log(tf.clip_by_value(logits, 1e-7, 1.0))
        if labels.shape.rank == 1 and not smoothing:
            # The kernel knows no uint8, which is what Keras's own CIFAR-10 has.
            labels = tf.cast(labels, tf.int32)
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        classes = logits.shape[-1]
        targets = tf.one_hot(labels, classes) if labels.shape.rank == 1 else labels
        targets = (1 - smoothing) * tf.cast(targets, tf.float32) + smoothing / classes
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    return loss_fn


def default_loss(model: Any) -> LossFn:
    """Cross-entropy of what the model ends in: probabilities after a softmax, else logits."""
    last = getattr(model, "layers", [None])[-1]
    softmax = getattr(last, "activation", None) is keras.activations.softmax
    return cross_entropy(from_logits=not (softmax or isinstance(last, keras.layers.Softmax)))


def make_train_step(
    model: Any,
    optimizer: Any,
    *,
    loss_fn: LossFn | None = None,
    freeze: Mapping[str, int] | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    skip_nonfinite: bool = False,
    accumulate_steps: int = 1,
    spread: Callable[[Callable[[Any], Look], Any], Look] | None = None,
) -> Any:
    """Compiles one step of training.

    The step runs the model in training mode (dropout on, BatchNorm statistics updated), adds the
    model's own regularisation losses, and applies the gradients.  Under mixed_float16 the
    optimiser is a `keras.optimizers.LossScaleOptimizer`: the loss is scaled here, the gradients
    unscaled there.

    Args:
      model: a Keras model: images [B, H, W, C] -> outputs [B, num_classes].
      optimizer: a Keras optimiser; it is built for the model's variables here.
      loss_fn: function of (labels, outputs) that returns losses [B]; by default cross-entropy, of
        logits or, if the model ends in a softmax, of probabilities.
      freeze: part of a variable's path (a regular expression) -> after how many updates of the
        optimiser the variables in whose path it is found stop to train: they and their velocities
        keep their values, and no time goes into their gradients from then on, nor into those
        of activations that only they need (but on a CPU, where activations are large, into those of
        kernels with something trained before them).
      jit_compile: whether XLA compiles the step.
      fused: whether the model runs by fused kernels, see `cifarflow.models.fusion`; False calls
        the model itself, layer by layer as Keras has them.
      skip_nonfinite: whether a batch whose loss or gradients are not finite is left out: weights,
        statistics and the optimiser keep their values, the sums are 0 but for `skipped`.  Under
        loss scaling a gradient that overflows at a finite loss is the optimiser's to skip, and no
        such batch.  It takes one more look at every gradient.
      accumulate_steps: micro-batches that a batch is cut into; their activations are in memory one
        after the other, and the weights are updated once, by the mean of their gradients.  The
        step is the same up to rounding, but for what looks at a whole batch: BatchNorm takes the
        statistics of each micro-batch, and moves its running ones as often; dropout draws other
        masks; what a layer adds to the loss itself, as an activity regulariser does, is the mean
        of what it adds in each.
      spread: has the gradients computed by several replicas, such as `Team.spread`; XLA then
        compiles what each of them computes, and not the update.

    Returns:
      A `tf.function` of (images [B, H, W, C], labels [B] or [B, num_classes]) that updates the
      model and returns `Sums` of the batch, from before the update.  Where accumulate_steps is
      not 1, B must be known when it is traced, and a multiple of it: else tracing fails and says
      so.

    Raises:
      ConfigError: if the model has no variable to train, or computes in float16 without loss
        scaling; if `freeze` is no mapping from expressions to numbers of updates, an expression is
        found in no path, or nothing would be left to train; if accumulate_steps is not a whole
        number >= 1.
    """
    check_int("accumulate_steps", accumulate_steps)
    variables = model.trainable_variables
    if not variables:
        raise ConfigError(f"model {model.name!r} has no trainable variable: nothing to train")
    is_half = any(layer.compute_dtype == "float16" for layer in model.layers)
    has_scale = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if is_half and not has_scale:
        raise ConfigError(
            f"model {model.name!r} computes in float16, where small gradients vanish: wrap the "
            f"optimizer by scale_for('mixed_float16', ...), not {type(optimizer).__name__} alone"
        )
    # Slot variables must exist before tracing: a function that creates variables is traced twice.
    if not optimizer.built:
        optimizer.build(variables)
    stages = freezing_stages(variables, freeze or {})
    losses_fn = loss_fn or default_loss(model)

    def make_look(model: Any) -> Look:
        forward = fuse(model) if fused else lambda images: model(images, training=True)
        find = functools.partial(
            gradients_of, model, forward, losses_fn=losses_fn, scale_loss=optimizer.scale_loss
        )
        look = functools.partial(_look, find, accumulate_steps)
        return functools.partial(_by_xla, look) if jit_compile and spread is not None else look

    look = make_look(model) if spread is None else spread(make_look, model)

    @released_gradients()
    def update(images: Any, labels: Any, variables: Sequence[Any]) -> Sums:
        # What the forward pass itself changes: the statistics of BatchNorm.
        resting = [v for v in model.non_trainable_variables if skip_nonfinite and is_float(v)]
        before = [tf.identity(variable.value) for variable in resting]
        loss, sums, gradients = look(images, labels, variables)

        def apply() -> Sums:
            optimizer.apply(gradients, variables)
            return sums

        def undo() -> Sums:
            for variable, value in zip(resting, before, strict=True):
                variable.value.assign(value)
            return Sums.zero()._replace(skipped=tf.ones([]))

        if not skip_nonfinite:
            return apply()
        looked_at = [loss] if has_scale else [loss, *(g for g in gradients if g is not None)]
        finite = [tf.reduce_all(tf.math.is_finite(value)) for value in looked_at]
        done: Sums = tf.cond(tf.reduce_all(finite), apply, undo)
        return done

    @tf.function(jit_compile=jit_compile and spread is None)
    def train_step(images: Any, labels: Any) -> Sums:
        if len(stages) == 1:
            return update(images, labels, stages[0][1])
        # All stages are in one graph, so that a run has one step from its start to its end.
        over = [tf.cast(optimizer.iterations >= start, tf.int32) for start, _ in stages[1:]]
        branches = [functools.partial(update, images, labels, left) for _, left in stages]
        sums: Sums = tf.switch_case(tf.add_n(over), branches)
        return sums

    return train_step


def gradients_of(
    model: Any,
    forward: Callable[[Any], Any],
    images: Any,
    labels: Any,
    variables: Sequence[Any],
    *,
    losses_fn: LossFn,
    scale_loss: Callable[[Any], Any],
) -> tuple[Any, Any, list[Any]]:
    """The tape: one forward and one backward pass.

    Args:
      model: whose own losses are added.
      forward: runs it in training mode, images -> outputs.
      images: [B, H, W, C].
      labels: [B] or [B, num_classes].
      variables: those that the gradients are of.
      losses_fn: function of (labels, outputs) that returns losses [B].
      scale_loss: multiplies the loss before its gradients are taken, under mixed_float16.

    Returns:
      The mean loss with regularisation, how many are right, and the gradients of the scaled loss,
      None where there is none.
    """
    with tf.GradientTape() as tape:
        outputs = forward(images)
        loss = tf.reduce_mean(losses_fn(labels, outputs))
        if model.losses:
            loss += tf.add_n([tf.cast(extra, tf.float32) for extra in model.losses])
        scaled_loss = scale_loss(loss)
    correct = count_correct(labels, outputs)
    return loss, correct, tape.gradient(scaled_loss, variables)


def _look(
    find: Callable[..., tuple[Any, Any, list[Any]]],
    accumulate_steps: int,
    images: Any,
    labels: Any,
    variables: Sequence[Any],
) -> tuple[Any, Sums, list[Any]]:
    """What `find` finds in a batch, whole or in parts; see `Look`."""
    if accumulate_steps == 1:
        loss, correct, gradients = find(images, labels, variables)
    else:
        loss, correct, gradients = _accumulated(find, images, labels, variables, accumulate_steps)
    count = tf.cast(tf.shape(images)[0], tf.float32)
    return loss, Sums(loss * count, correct, count, tf.zeros([])), gradients


def _by_xla(look: Look, images: Any, labels: Any, variables: Sequence[Any]) -> Any:
    """A look that is a program of XLA's."""
    compiled = tf.function(lambda x, y: look(x, y, variables), jit_compile=True)
    return compiled(images, labels)


def _accumulated(
    find: Callable[..., tuple[Any, Any, list[Any]]],
    images: Any,
    labels: Any,
    variables: Sequence[Any],
    count: int,
) -> tuple[Any, Any, list[Any]]:
    """What `find` finds in a batch cut into `count` parts: mean loss, correct, mean gradients."""
    check_micro_batches(images.shape[0], count)
    parts = [tf.reshape(x, [count, x.shape[0] // count, *x.shape[1:]]) for x in (images, labels)]
    are_there: list[bool] = []

    def add(index: Any, loss: Any, correct: Any, *totals: Any) -> tuple[Any, ...]:
        part_loss, part_correct, gradients = find(*(part[index] for part in parts), variables)
        are_there[:] = [gradient is not None for gradient in gradients]
        totals = tuple(
            total if gradient is None else total + tf.cast(gradient, total.dtype)
            for total, gradient in zip(totals, map(_dense, gradients), strict=True)
        )
        return index + 1, loss + part_loss, correct + part_correct, *totals

    # Half precision has too few digits for a sum of many.
    zeros = [
        tf.zeros(v.shape, tf.float32 if tf.as_dtype(v.dtype).size < 4 else v.dtype)
        for v in variables
    ]
    # One after the other: side by side their activations would take as much memory as uncut.
    _, loss, correct, *totals = tf.while_loop(
        lambda index, *_: index < count,
        add,
        [tf.zeros([], tf.int32), tf.zeros([]), tf.zeros([]), *zeros],
        parallel_iterations=1,
    )
    means = [
        tf.cast(total / count, variable.dtype) if is_there else None
        for total, variable, is_there in zip(totals, variables, are_there, strict=True)
    ]
    return loss / count, correct, means


def _dense(gradient: Any) -> Any:
    return None if gradient is None else tf.convert_to_tensor(gradient)


def is_float(variable: Any) -> bool:
    """Whether a variable holds floating-point numbers."""
    return bool(tf.as_dtype(variable.dtype).is_floating)


def freezing_stages(
    variables: Sequence[Any], freeze: Mapping[str, int]
) -> list[tuple[int, list[Any]]]:
    """The stages of training under `freeze`.

    Args:
      variables: those that are trained at first.
      freeze: as in `make_train_step`.

    Returns:
      For each stage the update it begins with, and the variables that are trained in it.

    Raises:
      ConfigError: if `freeze` is no mapping from expressions to numbers of updates, an expression
        is found in no path, or nothing would be left to train.
    """
    if not isinstance(freeze, Mapping):
        raise ConfigError(
            "freeze must be parts of variables' paths and after how many updates they freeze, "
            f"such as {{'whitening/bias': 100}}, not {freeze!r}"
        )
    ends: dict[int, int] = {}
    for pattern, count in freeze.items():
        check_pattern("freeze's keys", pattern)
        check_int(f"freeze[{pattern!r}]", count, minimum=0)
        paths = [path_of(variable) for variable in variables]
        found = [index for index, path in enumerate(paths) if re.search(pattern, path)]
        if not found:
            raise ConfigError(
                f"freeze must match trainable variables, not {pattern!r}: there are "
                f"{quote_some(paths)}"
            )
        for index in found:
            ends[index] = min(count, ends.get(index, count))
    if len(ends) == len(variables):
        raise ConfigError(f"freeze must leave a variable to train, not {dict(freeze)!r}")
    stages = []
    for start in sorted({0, *ends.values()}):
        left = [v for index, v in enumerate(variables) if ends.get(index, start + 1) > start]
        stages.append((start, left))
    return stages


def make_eval_step(
    model: Any,
    *,
    loss_fn: LossFn | None = None,
    jit_compile: bool = False,
    fused: bool = True,
) -> Any:
    """Compiles one step of evaluation.

    Args:
      model: a Keras model: images [B, H, W, C] -> outputs [B, num_classes].
      loss_fn: as in `make_train_step`.
      jit_compile: whether XLA compiles the step.
      fused: as in `make_train_step`.

    Returns:
      A `tf.function` of (images [B, H, W, C], labels [B] or [B, num_classes]) that runs the model
      in inference mode and returns the batch's `Sums`, regularisation included as Keras does.
    """
    losses_fn = loss_fn or default_loss(model)
    forward = fuse(model, training=False) if fused else lambda images: model(images, training=False)

    @tf.function(jit_compile=jit_compile)
    def eval_step(images: Any, labels: Any) -> Sums:
        with released_gradients():
            outputs = forward(images)
        count = tf.cast(tf.shape(images)[0], tf.float32)
        loss = tf.reduce_sum(losses_fn(labels, outputs))
        if model.losses:
            loss += count * tf.add_n([tf.cast(extra, tf.float32) for extra in model.losses])
        return Sums(loss, count_correct(labels, outputs), count)

    return eval_step


def count_correct(labels: Any, outputs: Any) -> Any:
    """Counts the examples whose largest output is at their (likeliest) label.

    Args:
      labels: [B] integers or [B, num_classes] probabilities.
      outputs: [B, num_classes].

    Returns:
      Scalar float32.
    """
    if labels.shape.rank == 2:
        labels = tf.argmax(labels, -1)
    hits = tf.equal(tf.argmax(outputs, -1), tf.cast(labels, tf.int64))
    return tf.reduce_sum(tf.cast(hits, tf.float32))
