"""The contract of a training step, checked on two tiny steps before a run.

    check_step(model, optimizer, batches=batches)
    check_step(model, optimizer, batches=batches, train_step=my_step)  # a step of your own

A layer that no gradient reaches, BatchNorm in the wrong mode, a weight decay that never arrives:
none of them raises an error, each only makes a worse model.  They are looked for one by one, by
what the step does to the variables and not by how it is written.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import Batches
from cifarflow.device import prepare_gpus
from cifarflow.errors import CifarflowError, ConfigError, check_micro_batches
from cifarflow.training.gradients import Gradients, make_gradients
from cifarflow.training.loop import as_batches, check_fits, explained
from cifarflow.training.snapshot import Snapshot, all_finite
from cifarflow.training.step import (
    LossFn,
    Sums,
    freezing_stages,
    is_float,
    make_eval_step,
    make_train_step,
)

# Enough for the statistics of a batch, few enough to take no time.
_EXAMPLES = 32
# Where the learning rate is looked at: a warm-up may begin at 0.
_LOOKED_AT = [0, *(digit * 10**power for power in range(7) for digit in (1, 2, 5))]
# A float16 loss scale may start so high that the gradients overflow until it has been halved.
_MOST_HALVINGS = 60
# A scale of the loss that does not come out again is off by its own size, which is far more.
_FAR_OFF = 8.0


# What is said when there is nothing to say.
CHECKED = "the training step was checked: all that should train does, and losses and decay reach it"


class ContractError(CifarflowError, RuntimeError):
    """A training step does not do what a training step must."""


def check_step(
    model: Any,
    optimizer: Any,
    *,
    batches: Batches | tf.data.Dataset,
    loss_fn: LossFn | None = None,
    freeze: Mapping[str, int] | None = None,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
    train_step: Any = None,
    eval_step: Any = None,
    at_rest: Sequence[str] = (),
) -> None:
    """Checks a model's training step on the first images of two batches.

    - Each trained variable gets a gradient that is finite, not all 0, and from more than its own
      regulariser; and the step changes the variable.
    - The regularisation losses are part of the step's loss.
    - The statistics of each BatchNormalization change in training, and nothing in evaluation.
    - The optimiser's `weight_decay` and `l2` change each variable that they are for.
    - The loss is scaled and the gradients unscaled, where the optimiser scales.

    Where the learning rate is higher later in its schedule, that step is looked at too.  Model and
    optimiser have the same bits afterwards; an optimiser that is not built is built.

    Args:
      model: as in `make_train_step`.
      optimizer: as there.
      batches: as in `train`; the first two are drawn.
      loss_fn: as in `make_train_step`.
      freeze: as there; variables that it freezes from the start on are not looked at.
      jit_compile: as there.
      fused: as there.
      accumulate_steps: as there; of batches of fewer images than are looked at all are.
      train_step: a step of your own in place of that of `make_train_step`: a function of (images,
        labels) that updates the model and returns `Sums`.
      eval_step: likewise in place of that of `make_eval_step`; what it returns is not looked at.
      at_rest: parts of the paths (regular expressions) of variables that are meant to rest, such
        as those of a BatchNormalization that is frozen on purpose.

    Raises:
      ContractError: if the step does not do all of this; it names all that fails.
      ConfigError: if an argument is out of range, or train_step does not return `Sums`.
      DataError: if the batches do not fit the model.
    """
    resting = _compiled(at_rest)
    batches = as_batches(batches)
    prepare_gpus()
    options: dict[str, Any] = {"loss_fn": loss_fn, "jit_compile": jit_compile, "fused": fused}
    if train_step is None:
        # Without `freeze`: when a variable freezes later is no matter of two steps.
        train_step = make_train_step(model, optimizer, accumulate_steps=accumulate_steps, **options)
    if eval_step is None:
        eval_step = make_eval_step(model, **options)
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    trained = freezing_stages(model.trainable_variables, freeze or {})[0][1]
    gradients_of = make_gradients(model, accumulate_steps=accumulate_steps, **options)
    drawn = batches.dataset(0, 2)
    check_fits(model, drawn.element_spec)
    check_micro_batches(drawn.element_spec[0].shape[0], accumulate_steps)
    check = _Check(
        model,
        optimizer,
        watched=[v for v in trained if not _is_any(v, resting)],
        statistics=[v for v in _statistics_of(model) if not _is_any(v, resting)],
    )
    state = Snapshot(check.state)
    try:
        with explained(model), warnings.catch_warnings():
            # What Keras says of some of the faults is told here in the one line.
            warnings.filterwarnings("ignore", "Gradients do not exist for variables")
            # Of each micro-batch at least one, and of all as many.
            most = max(1, _EXAMPLES // accumulate_steps) * accumulate_steps
            few = [(images[:most], labels[:most]) for images, labels in drawn]
            if check.training(train_step, gradients_of, few):
                check.evaluation(eval_step, *few[0])
                check.decay()
    finally:
        state.restore()
    if check.faults:
        raise ContractError(f"the training step of {model.name!r} fails: {'; '.join(check.faults)}")


class _Check:
    """What has been looked at so far.

    Args:
      model: the model.
      optimizer: its optimiser, built.
      watched: the variables that must train.
      statistics: those of BatchNormalization, which must change in training.

    Attributes:
      faults: found so far.
      state: all variables that a step may change.
    """

    def __init__(
        self, model: Any, optimizer: Any, *, watched: Sequence[Any], statistics: Sequence[Any]
    ) -> None:
        self.faults: list[str] = []
        self.state = [*model.variables, *optimizer.variables]
        self._model, self._optimizer = model, optimizer
        self._variables = list(model.trainable_variables)
        self._watched, self._statistics = list(watched), list(statistics)
        self._has_scale = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        # The one whose rule it is; the one around it only scales.
        self._rule = optimizer.inner_optimizer if self._has_scale else optimizer
        # Keras updates once in so many calls.
        self._calls = self._rule.gradient_accumulation_steps or 1
        self._kinds: defaultdict[int, set[str]] = defaultdict(set)
        self._moved: set[int] = set()
        self._ratios: list[float] = []
        self._peak, self._rate = self._find_peak()

    def training(self, train_step: Any, gradients_of: Any, few: Sequence[tuple[Any, Any]]) -> bool:
        """Runs the steps.  Returns whether there is any sense in going on."""
        # Twice: a layer that begins with zeros lets no gradient through before it has moved.
        plan = (0, self._peak, self._peak) if self._peak else (0, 1)
        for number, iteration in enumerate(plan):
            images, labels = few[number % len(few)]
            self._set_iteration(iteration)
            found = self._find_gradients(gradients_of, images, labels)
            if not np.isfinite(found.loss):
                self.faults.append(f"the loss of the first images is {found.loss:g}")
                return False
            for variable, gradient in zip(self._variables, found.values, strict=True):
                self._kinds[id(variable)].add(_kind_of(gradient, variable))
            if all(gradient is None for gradient in found.values):
                # Keras refuses to update by nothing at all.
                self.faults.append("no gradient reaches any variable")
                return False
            bad = [v for v in self._variables if "not finite" in self._kinds[id(v)]]
            if bad:
                self._add("the gradient of {} is not finite", bad)
                return False
            extra, noise = 0.0, 0.0
            if number == 0:
                again = self._find_gradients(gradients_of, images, labels)
                extra = self._due_penalty(found)
                noise = self._noise(found, again)
            due = self._due_update(found)
            before = Snapshot(self.state)
            sums, *_ = [train_step(images, labels) for _ in range(self._calls)]
            self._moved |= {id(variable) for variable in before.changed()}
            self._compare_updates(before, due)
            loss = _mean_loss(sums)
            # Any other loss is of a step in another mode, which shows elsewhere.
            if abs(extra) > 2 * noise and abs(loss - found.data_loss) <= noise:
                self.faults.append(
                    f"regularisation does not reach the loss: it is {loss:.6g}, "
                    f"and {found.data_loss + extra:.6g} is due"
                )
        self._note()
        return True

    def _note(self) -> None:
        """Adds the faults of gradients, movement, statistics and loss scaling."""
        best = {id(v): next(k for k in _KINDS if k in self._kinds[id(v)]) for v in self._watched}
        for kind, text in _KINDS.items():
            if text:
                self._add(text, [v for v in self._watched if best[id(v)] == kind])
        still = [v for v in self._watched if id(v) not in self._moved and best[id(v)] == "good"]
        if not self._rate:
            self.faults.append("the learning rate is 0 from the first step to the millionth")
        else:
            self._add("no step moves {}, though there is a gradient", still)
        resting = [v for v in self._statistics if id(v) not in self._moved]
        self._add("BatchNormalization's statistics {} rest in training", resting)
        if self._ratios:
            ratio = statistics.median(self._ratios)
            if not 1 / _FAR_OFF < ratio < _FAR_OFF:
                self.faults.append(
                    "loss scaling does not reach the update: weights move "
                    f"{ratio:.2g} times as far as they should"
                )

    def evaluation(self, eval_step: Any, images: Any, labels: Any) -> None:
        """Runs a step of evaluation, in which no number of the model may change."""
        before = Snapshot(self.state)
        eval_step(images, labels)
        # Random generators may go on: there is dropout that is meant for evaluation.
        self._add("evaluation changes {}", [v for v in before.changed() if is_float(v)])

    def decay(self) -> None:
        """Updates by gradients of 0 from a standstill: what moves then is moved by decay."""
        rates = {name: getattr(self._rule, name, None) for name in ("weight_decay", "l2")}
        given = {
            name: rate for name, rate in rates.items() if isinstance(rate, (int, float)) and rate
        }
        if not given or not self._rate:
            return
        # Keras asks by the TensorFlow variable, whose name is another, and remembers the answer.
        meant = [v for v in self._variables if self._rule._use_weight_decay(v.value)]
        for name, rate in given.items():
            if not meant:
                self.faults.append(f"{name}={rate:g} is for no variable that is trained")
                continue
            others = {other: getattr(self._rule, other) for other in given if other != name}
            for other in others:
                setattr(self._rule, other, None if other == "weight_decay" else 0.0)
            try:
                moved = self._moved_without_gradient()
            finally:
                for other, value in others.items():
                    setattr(self._rule, other, value)
            missed = [v for v in self._watched if id(v) in set(map(id, meant)) - moved]
            self._add(f"{name}={rate:g} does not reach {{}}", missed)

    def _moved_without_gradient(self) -> set[int]:
        state = Snapshot(self.state)
        self._set_iteration(self._peak)
        for slot in self._optimizer.variables:
            if is_float(slot) and len(slot.shape):
                slot.assign(tf.zeros_like(slot.value))
        for variable in self._variables:
            # Of zeros, as biases are at first, decay leaves zeros.
            if not np.any(variable):
                variable.assign(tf.ones_like(variable.value))
        before = Snapshot(self._variables)
        zeros = [tf.zeros_like(variable.value) for variable in self._variables]
        for _ in range(self._calls):
            self._optimizer.apply(zeros, self._variables)
        moved = {id(variable) for variable in before.changed()}
        state.restore()
        return moved

    def _add(self, text: str, variables: Sequence[Any]) -> None:
        if variables:
            self.faults.append(text.format(", ".join(repr(v.path) for v in variables)))

    def _find_peak(self) -> tuple[int, float]:
        """The update at which the learning rate is highest, of those looked at, and that rate."""
        start = Snapshot([self._rule._iterations])
        rates = []
        for iteration in _LOOKED_AT:
            self._set_iteration(iteration)
            rates.append(float(self._optimizer.learning_rate))
        start.restore()
        return _LOOKED_AT[int(np.argmax(rates))], max(rates)

    def _set_iteration(self, update: int) -> None:
        self._rule._iterations.assign(update * self._calls)

    def _find_gradients(self, gradients_of: Any, images: Any, labels: Any) -> Gradients:
        """The gradients of the next step; a loss scale at which they overflow is lowered."""
        before = Snapshot(self.state)
        first = scale = float(self._optimizer.dynamic_scale) if self._has_scale else 1.0
        for _ in range(_MOST_HALVINGS):
            found: Gradients = gradients_of(images, labels, scale=scale)
            before.restore()
            overflows = not all(all_finite(g) for g in found.values if g is not None)
            if not self._has_scale or not np.isfinite(found.loss) or not overflows:
                break
            scale /= 2
        if scale < first:
            # With something to spare: the step itself may round to other digits.
            self._optimizer.dynamic_scale.assign(scale / 4)
        return found

    def _due_penalty(self, found: Gradients) -> float:
        """What regularisation adds to the loss, by the model's variables as they are now."""
        penalised = [v for v in self._variables if v.regularizer is not None]
        if len(self._model.losses) > len(penalised):
            # Layers have added losses of their own, which depend on the images.
            return found.loss - found.data_loss
        return sum(float(variable.regularizer(variable)) for variable in penalised)

    def _noise(self, found: Gradients, again: Gradients) -> float:
        """What two losses of the same batch may differ by."""
        is_half = any(
            layer.compute_dtype in ("float16", "bfloat16") for layer in self._model.layers
        )
        rounding = (4e-3 if is_half else 4e-5) * abs(found.data_loss)
        # A layer may draw random numbers from a source that is no variable of the model.
        return rounding + 8 * abs(found.data_loss - again.data_loss)

    def _due_update(self, found: Gradients) -> list[np.ndarray] | None:
        """How the next step must change the variables; None where no loss is scaled."""
        factor = self._rule.loss_scale_factor
        if self._has_scale:
            factor = float(self._optimizer.dynamic_scale)
        if factor is None or 1 / _FAR_OFF**2 < factor < _FAR_OFF**2:
            return None
        state = Snapshot(self.state)
        before = [variable.numpy().copy() for variable in self._variables]
        scaled = [None if g is None else g * tf.cast(factor, g.dtype) for g in found.values]
        for _ in range(self._calls):
            self._optimizer.apply(scaled, self._variables)
        due = [v.numpy() - old for v, old in zip(self._variables, before, strict=True)]
        state.restore()
        return due

    def _compare_updates(self, before: Snapshot, due: Sequence[np.ndarray] | None) -> None:
        """Notes how far the variables have moved, over how far they should have."""
        if due is None:
            return
        for variable, movement in zip(self._variables, due, strict=True):
            length = float(np.linalg.norm(movement))
            if length:
                moved = variable.numpy() - before.value_of(variable)
                self._ratios.append(float(np.linalg.norm(moved)) / length)


# What a gradient can be, the best first, and what is said of a variable that has no better one in
# any step.
_KINDS = {
    "not finite": "",  # told before
    "good": "",
    "penalty": "only its own regulariser gives a gradient to {}",
    "zero": "the gradient of {} is 0",
    "missing": "no gradient reaches {}",
}


def _kind_of(gradient: Any, variable: Any) -> str:
    """What a gradient is, a key of `_KINDS`."""
    if gradient is None:
        return "missing"
    if not all_finite(gradient):
        return "not finite"
    if not np.any(gradient):
        return "zero"
    if variable.regularizer is not None:
        with tf.GradientTape() as tape:
            penalty = tf.convert_to_tensor(variable.regularizer(variable))
        alone = tape.gradient(penalty, variable.value)
        if alone is not None:
            rest = np.abs(np.asarray(gradient - alone)).max()
            if rest <= 1e-5 * np.abs(np.asarray(alone)).max():
                return "penalty"
    return "good"


def _statistics_of(model: Any) -> list[Any]:
    return [
        statistic
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built
        for statistic in (layer.moving_mean, layer.moving_variance)
    ]


def _mean_loss(sums: Any) -> float:
    if not isinstance(sums, Sums):
        raise ConfigError(f"train_step must return the Sums of its batch, not {sums!r:.80}")
    return float(sums.loss) / float(sums.examples)


def _compiled(expressions: Any) -> list[re.Pattern[str]]:
    good = f"at_rest must be a list of non-empty regular expressions, not {expressions!r}"
    # A lone string is a sequence too: of letters, which would match nearly every variable.
    if not isinstance(expressions, (list, tuple)):
        raise ConfigError(good)
    if not all(isinstance(expression, str) and expression for expression in expressions):
        raise ConfigError(good)
    try:
        return [re.compile(expression) for expression in expressions]
    except re.error as error:
        raise ConfigError(f"{good}: {error}") from error


def _is_any(variable: Any, patterns: Iterable[re.Pattern[str]]) -> bool:
    return any(pattern.search(variable.path) for pattern in patterns)
