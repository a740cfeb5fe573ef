"""Runs of one recipe that differ in their seed, for figures that need many of them.

    trials = Trials(get_recipe("fast75"), load_recipe_data(get_recipe("fast75")))
    for seed in range(10):
        trial = trials.run(seed)
        print(trial.seed, trial.seconds, trial.accuracy)

    trials.train(10)  # the same in parts: the weights are then those of trials.model
    outputs, outputs_with_tta = trials.outputs()

A trial computes what `train_recipe` computes with that seed, bit for bit on the same CPU, and
writes nothing.  The step is compiled once and serves all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import evaluation_batches
from cifarflow.data.splits import Dataset
from cifarflow.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    check_choice,
    check_float,
    check_seed,
)
from cifarflow.evaluation.metrics import accuracy, confusion_matrix
from cifarflow.evaluation.predict import Predictor
from cifarflow.recipes.build import (
    assemble,
    build_model,
    limit_as_asked,
    predict_options,
    set_from_images,
)
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.run import check_pieces
from cifarflow.training.checkpoints import hash_arrays
from cifarflow.training.hooks import epochs_to_steps
from cifarflow.training.loop import ProgressView, explained, make_evaluate
from cifarflow.training.runner import StepRunner
from cifarflow.training.step import make_eval_step, make_train_step

TIMING_RULE = (
    "seconds count the whitening from the training images, all training steps and the final "
    "evaluation with its test-time augmentation; not counted are loading the images, building and "
    "initialising the model, and compiling the step and the evaluation, with a warm-up call of each"
)
READ_CHOICES = ("test", "validation")
# Between two calls Python can show progress and be interrupted.
_SECONDS_A_CALL = 0.5


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one run came to.

    Attributes:
      seed: of initial weights, order, dropout and augmentation.
      steps: how many were trained.
      epochs: the same in passes over the training images.
      seconds: by `TIMING_RULE`.
      train_seconds: those of the training steps among them.
      read: "test" or "validation", the images that were evaluated on.
      accuracy: on these, 0..1.
      loss: on these, mean cross-entropy with the recipe's label smoothing.
      curve: (seconds of training, epochs, validation accuracy) along the way.
      weights_sha256: hash of the weights in the end.
    """

    seed: int
    steps: int
    epochs: float
    seconds: float
    train_seconds: float
    read: str
    accuracy: float
    loss: float
    curve: tuple[tuple[float, float, float], ...]
    weights_sha256: str


@dataclasses.dataclass(frozen=True)
class Training:
    """What training with one seed took.

    Attributes:
      steps: how many were trained.
      seconds: of the training steps, and of what else `TIMING_RULE` counts before the evaluation.
      train_seconds: those of the training steps among them.
      curve: as in `Trial`.
    """

    steps: int
    seconds: float
    train_seconds: float
    curve: tuple[tuple[float, float, float], ...]


class Trials:
    """A recipe compiled once, to be run with many seeds.

    Args:
      recipe: the recipe; its own seed is not used.
      dataset: what to train on; the recipe's limit_examples holds for it, as in `train_recipe`.
      read: "test": each trial ends by reading the test set, once.  "validation": it evaluates on
        the validation images instead, and leaves the test set alone, for choosing among recipes.

    Attributes:
      recipe: the recipe, every "auto" in it resolved.
      steps_per_epoch: batches in one pass over the training images.
      total_steps: steps of a trial.
      compile_seconds: what tracing, compiling and the warm-up took, of the step and the evaluation.
      traces: how often the training step has been traced, which is once.

    Raises:
      ConfigError: if a value is out of range, does not fit the data, the images are too many to
        draw batches within the compiled call, or the recipe stops early.
      DataError: if there are no images to read in the end, or the model cannot take its weights
        from the training images, such as too few patches to whiten by.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, *, read: str = "test") -> None:
        self._read = check_choice("read", read, READ_CHOICES)
        if recipe.patience_epochs:
            raise ConfigError(
                "patience_epochs must be 0 for trials, which all run to their end, not "
                f"{recipe.patience_epochs!r}"
            )
        dataset = limit_as_asked(recipe, dataset)
        self._split = dataset.test if read == "test" else dataset.validation
        if not len(self._split):
            raise DataError(f"the data set {dataset.name!r} must have {read} images, not 0")
        self._dataset = dataset
        self._seed = recipe.seed
        self._pieces = pieces = assemble(recipe, dataset)
        self.recipe = pieces.recipe
        if not pieces.batches.resident:
            raise ConfigError(
                "trials draw batches within the compiled call: the images must take at most 4 GiB, "
                f"not {dataset.train.images.nbytes / 2**30:.1f} GiB"
            )
        self.steps_per_epoch = pieces.batches.steps_per_epoch
        self.total_steps = epochs_to_steps(recipe.epochs, steps_per_epoch=self.steps_per_epoch)
        start = time.perf_counter()
        jit_compile = self.recipe.jit_compile == "true"
        self._train_step = make_train_step(
            pieces.model,
            pieces.optimizer,
            loss_fn=pieces.loss_fn,
            freeze=pieces.freeze,
            jit_compile=jit_compile,
            accumulate_steps=self.recipe.accumulate_steps,
        )
        step = self._train_step
        if pieces.averaging is not None:
            step = pieces.averaging.around(step, pieces.model, total_steps=self.total_steps)
        self._runner = StepRunner(
            step, pieces.batches, first_step=0, last_step=self.total_steps, jit_compile=jit_compile
        )
        self._evaluate = make_evaluate(
            pieces.model,
            make_eval_step(pieces.model, loss_fn=pieces.loss_fn, jit_compile=jit_compile),
        )
        # What an optimiser starts from is not all zeros: a loss scale, say.
        self._optimizer_start = [np.asarray(v) for v in pieces.optimizer.variables]
        # Kernels choose their way of working, and memory is taken, at the first call.
        with explained(pieces.model):
            self._runner.run(min(2, self.total_steps))
            for update in set((pieces.freeze or {}).values()) - {0}:
                # Where something freezes the step goes another way.
                rule = getattr(pieces.optimizer, "inner_optimizer", pieces.optimizer)
                rule.iterations.assign(update)
                self._runner.run(1)
        # On black images: those that are read in the end are not touched before.
        self._predict = Predictor(pieces.model, **predict_options(self.recipe))
        self._predict.compile(dataset.image_shape, num_images=len(self._split))
        self.compile_seconds = time.perf_counter() - start

    @property
    def traces(self) -> int:
        """How often the training step has been traced."""
        return int(self._train_step.experimental_get_tracing_count())

    @property
    def model(self) -> Any:
        """The model, of the weights that the last training left; the next one changes them."""
        return self._pieces.model

    def check(self) -> None:
        """Checks what the training step does, outside the clock, see `check_step`.

        Raises:
          ContractError: if it does not train what it should.
        """
        check_pieces(self._pieces)

    def run(
        self, seed: int, *, curve_epochs: float = 0.0, progress: ProgressView | None = None
    ) -> Trial:
        """Trains from the beginning with a seed, and evaluates at the end.

        Args:
          seed: 0..2**31-1.
          curve_epochs: evaluate on the validation images this often, outside the clock; 0: never.
          progress: shows how far training is.

        Returns:
          The `Trial`.

        Raises:
          ConfigError: if an argument is out of range, or a curve is asked for without validation
            images.
          NonFiniteError: if the training loss, or an output in the end, is not finite.
        """
        trained = self.train(seed, curve_epochs=curve_epochs, progress=progress)
        start = time.perf_counter()
        outputs = self._predict(self._split.images)
        seconds = trained.seconds + time.perf_counter() - start
        self._check_finite(outputs)
        matrix = confusion_matrix(
            self._split.labels, outputs.argmax(-1), num_classes=self._dataset.num_classes
        )
        losses = self._pieces.loss_fn(tf.constant(self._split.labels), tf.constant(outputs))
        return Trial(
            seed=seed,
            steps=trained.steps,
            epochs=trained.steps / self.steps_per_epoch,
            seconds=seconds,
            train_seconds=trained.train_seconds,
            read=self._read,
            accuracy=float(accuracy(matrix)),
            loss=float(np.mean(losses.numpy(), dtype=np.float64)),
            curve=trained.curve,
            weights_sha256=hash_arrays(self.model.variables),
        )

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        """Reads the images that `read` names, by the weights that the last training left.

        Returns:
          Outputs [N, num_classes] float32 without and with the recipe's test-time augmentation.

        Raises:
          NonFiniteError: if one is not finite.
        """
        found = self._predict.plain_and_mean(self._split.images)
        self._check_finite(*found)
        return found

    def _check_finite(self, *outputs: np.ndarray) -> None:
        if not all(np.isfinite(values).all() for values in outputs):
            raise NonFiniteError(
                f"the outputs of seed {self._seed} are not finite after the last step: try a "
                f"smaller learning_rate than {self.recipe.learning_rate:g}"
            )

    def train(
        self, seed: int, *, curve_epochs: float = 0.0, progress: ProgressView | None = None
    ) -> Training:
        """Trains from the beginning with a seed; the model then has the weights.

        Args:
          seed: as in `run`, as are the others.
          curve_epochs: how often to evaluate on the validation images.
          progress: shows how far training is.

        Returns:
          The `Training`.

        Raises:
          ConfigError: as `run`.
          NonFiniteError: if the training loss is not finite.
        """
        seed = check_seed(seed)
        check_float("curve_epochs", curve_epochs)
        validation = self._dataset.validation
        if curve_epochs and not len(validation):
            raise ConfigError(
                f"curve_epochs must be 0 without validation images, not {curve_epochs!r}"
            )
        self._seed = seed
        self._start_again(seed)
        model = self._pieces.model
        start = time.perf_counter()
        set_from_images(self.recipe, model, self._dataset.train.images)
        if self._pieces.averaging is not None:
            self._pieces.averaging.reset()
        seconds = time.perf_counter() - start
        every = 0
        if curve_epochs:
            every = epochs_to_steps(curve_epochs, steps_per_epoch=self.steps_per_epoch)
        curve: list[tuple[float, float, float]] = []
        train_seconds, step, count = 0.0, 0, 1
        while step < self.total_steps:
            until_point = every - step % every if every else self.total_steps
            count = min(count, until_point, self.total_steps - step)
            start = time.perf_counter()
            with explained(model):
                sums = self._runner.run(count)
                # Reading the sums waits until the device has finished.
                loss, examples = float(sums.loss), float(sums.examples)
            took = time.perf_counter() - start
            train_seconds += took
            step += count
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"the training loss became {loss} within steps {step - count + 1} to {step} of "
                    f"seed {seed}: try a smaller learning_rate than {self.recipe.learning_rate:g}"
                )
            if progress is not None:
                progress.update(
                    step,
                    loss=loss / examples,
                    accuracy=float(sums.correct) / examples,
                    images_per_second=examples / took,
                )
            if every and (step % every == 0 or step == self.total_steps):
                batches = evaluation_batches(*validation, batch_size=self.recipe.eval_batch_size)
                averaging = self._pieces.averaging
                with averaging.averaged() if averaging is not None else contextlib.nullcontext():
                    found = self._evaluate(batches).accuracy
                curve.append((train_seconds, step / self.steps_per_epoch, found))
            count = max(1, round(_SECONDS_A_CALL * count / took))
        start = time.perf_counter()
        if self._pieces.averaging is not None:
            self._pieces.averaging.finish()
        seconds += train_seconds + time.perf_counter() - start
        return Training(step, seconds, train_seconds, tuple(curve))

    def _start_again(self, seed: int) -> None:
        """Sets all state to what a new process would start with."""
        dataset, pieces = self._dataset, self._pieces
        fresh = build_model(
            dataclasses.replace(self.recipe, seed=seed),
            image_shape=dataset.image_shape,
            num_classes=dataset.num_classes,
        )
        for variable, new in zip(pieces.model.variables, fresh.variables, strict=True):
            variable.assign(new)
        for variable, value in zip(pieces.optimizer.variables, self._optimizer_start, strict=True):
            variable.assign(value)
        self._runner.restart(seed=seed)
