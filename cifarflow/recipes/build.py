"""The parts of a training run, built as a recipe says.

recipe = get_recipe("fast75")
dataset = load_recipe_data(recipe)
pieces = assemble(recipe, dataset)
train(pieces.model, pieces.optimizer, batches=pieces.batches, epochs=1)
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from cifarflow.data.augment import make_augment
from cifarflow.data.dataset import load_data
from cifarflow.data.pipeline import ArrayBatches
from cifarflow.data.splits import Dataset
from cifarflow.device import has_gpu
from cifarflow.errors import ConfigError, check_choice
from cifarflow.models.cnn import cnn, final
from cifarflow.models.mlp import mlp
from cifarflow.models.resnet import resnet
from cifarflow.models.speednet import set_whitening, speednet
from cifarflow.optimizers import schedules
from cifarflow.optimizers.muon import Muon
from cifarflow.optimizers.precision import resolve_precision, scale_for
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.recipe import RESERVED_OPTIONS, Recipe
from cifarflow.training.averaging import Lookahead, WeightEMA
from cifarflow.training.hooks import epochs_to_steps
from cifarflow.training.step import LossFn, cross_entropy, freezing_stages

# For each of `recipe.MODELS`.
BUILDERS: Mapping[str, Callable[..., Any]] = {
    "mlp": mlp,
    "cnn": cnn,
    "final": final,
    "resnet": resnet,
    "speednet": speednet,
}
# Families with weights that are computed from the training images, and what sets them.
SET_FROM_IMAGES: Mapping[str, Callable[[Any, np.ndarray], None]] = {"speednet": set_whitening}


def build_model(
    recipe: Recipe,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    images: np.ndarray | None = None,
) -> Any:
    """Builds the recipe's model, initialised from its seed.

    Args:
      recipe: the recipe; precision "auto" is resolved for this machine.
      image_shape: (H, W, C).
      num_classes: how many classes.
      images: [N, H, W, C] uint8, the training images, for a model that takes some of its weights
        from them, as speednet does; without them it keeps the builder's.

    Raises:
      ConfigError: if model_options has an argument that the builder does not know or refuses.
      DataError: if the model cannot take its weights from these images.
    """
    builder = BUILDERS[recipe.model]
    options = dict(recipe.model_options or {})
    known = sorted(set(inspect.signature(builder).parameters) - RESERVED_OPTIONS)
    for name in options:
        check_choice(f"model_options of {recipe.model}", name, known)
    try:
        model = builder(
            image_shape=image_shape,
            num_classes=num_classes,
            dtype_policy=resolve_precision(recipe.precision),
            seed=recipe.seed,
            **options,
        )
    except ConfigError:
        raise
    # Sizes that no tensor can have are ValueErrors of TensorFlow.
    except (TypeError, ValueError, OverflowError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"model_options {options!r} do not fit {recipe.model}: {reason}"
        ) from None
    if images is not None:
        set_from_images(recipe, model, images)
    return model


def set_from_images(recipe: Recipe, model: Any, images: np.ndarray) -> None:
    """Sets the weights that a model takes from its training images, if it has such.

    Args:
      recipe: the recipe of the model.
      model: as `build_model` returns it.
      images: [N, H, W, C] uint8, the training images.

    Raises:
      DataError: if the model cannot take its weights from these images.
    """
    if recipe.model in SET_FROM_IMAGES:
        SET_FROM_IMAGES[recipe.model](model, images)


def build_schedule(recipe: Recipe, *, steps_per_epoch: int) -> Any:
    """Builds the recipe's learning-rate schedule: step -> learning rate.

    Args:
      recipe: the recipe.
      steps_per_epoch: turns its epochs into steps.
    """
    rate = recipe.learning_rate * rate_factor(recipe)
    warmup: dict[str, Any] = {"warmup_steps": round(recipe.warmup_epochs * steps_per_epoch)}
    total_steps = epochs_to_steps(recipe.epochs, steps_per_epoch=steps_per_epoch)
    if recipe.schedule == "constant":
        return schedules.Constant(rate, **warmup)
    if recipe.schedule == "inverse_time":
        return schedules.InverseTime(rate, recipe.decay, **warmup)
    if recipe.schedule == "cosine":
        return schedules.Cosine(rate, total_steps, **warmup)
    if recipe.schedule == "one_cycle":
        shape = {
            name: getattr(recipe, name)
            for name in ("start_fraction", "peak_fraction", "end_fraction")
        }
        return schedules.OneCycle(rate, total_steps, **shape, **warmup)
    boundaries = [round(epoch * steps_per_epoch) for epoch in recipe.drop_epochs]
    values = [rate * recipe.drop_factor**drops for drops in range(len(boundaries) + 1)]
    return schedules.Piecewise(boundaries, values, **warmup)


def rate_factor(recipe: Recipe) -> float:
    """What the recipe's learning_rate is multiplied by, for its batch size."""
    return _examples_factor(recipe) if recipe.optimizer == "sgd" else 1.0


def _examples_factor(recipe: Recipe) -> float:
    return recipe.batch_size / (recipe.learning_rate_examples or recipe.batch_size)


def build_optimizer(recipe: Recipe, *, steps_per_epoch: int) -> Any:
    """Builds the recipe's optimiser, scaled for float16 if its precision is that.

    Args:
      recipe: the recipe; precision "auto" is resolved for this machine.
      steps_per_epoch: turns its epochs into steps.
    """
    precision = resolve_precision(recipe.precision)
    # Muon's own rate is that of an update whose size does not depend on the batch.
    factor = _examples_factor(recipe) if recipe.optimizer == "muon" else 1.0
    scales = {part: factor * scale for part, scale in (recipe.learning_rate_scales or {}).items()}
    options: dict[str, Any] = {
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "scaled_velocity": recipe.scaled_velocity,
        "learning_rate_scales": scales,
        "l2": factor * recipe.l2,
        "weight_decay": recipe.weight_decay or None,
        "no_decay": () if recipe.decay_biases else ("bias", "gamma", "beta"),
        "global_clipnorm": recipe.clip_norm or None,
    }
    schedule = build_schedule(recipe, steps_per_epoch=steps_per_epoch)
    if recipe.optimizer == "muon":
        return scale_for(precision, Muon(schedule, muon_momentum=recipe.muon_momentum, **options))
    return scale_for(precision, SGD(schedule, **options))


def build_averaging(recipe: Recipe) -> Any:
    """Makes the recipe's averaging of the weights; None for none."""
    averaging = {"none": None, "lookahead": Lookahead, "ema": WeightEMA}[recipe.averaging]
    return averaging and averaging()


def build_batches(recipe: Recipe, dataset: Dataset) -> ArrayBatches:
    """The batches that a recipe trains on, augmentation included.

    Args:
      recipe: the recipe.
      dataset: what to train on, limited as the recipe says.

    Raises:
      ConfigError: if batch_size or augment does not fit the images.
    """
    images, labels = dataset.train
    return ArrayBatches(
        images,
        labels,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        augment=make_augment(recipe.augment),
        num_classes=dataset.num_classes,
    )


def resolve_jit_compile(jit_compile: str) -> str:
    """Turns "auto" into "true" or "false", whichever is faster on this machine."""
    if jit_compile != "auto":
        return jit_compile
    # On a CPU oneDNN's convolutions are faster than XLA's.  On a GPU XLA saves launches of
    # kernels: with it the steps of fast94 keep an H200 busy all but 3 % of the time.
    return "true" if has_gpu() else "false"


def resolve(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Replaces every "auto" by what it means on this machine with this data."""
    # The name alone would not say that it is a folder's.
    is_folder = recipe.data.partition(":")[0] == "folder"
    return dataclasses.replace(
        recipe,
        data=f"folder:{dataset.name}" if is_folder else dataset.name,
        precision=resolve_precision(recipe.precision),
        jit_compile=resolve_jit_compile(recipe.jit_compile),
    )


class Pieces(NamedTuple):
    """What a recipe is trained with.

    Attributes:
      recipe: every "auto" in it resolved.
      batches: of the training images, augmented.
      model: initialised from the recipe's seed.
      optimizer: scaled for float16 if the precision is that.
      loss_fn: of (labels, outputs).
      freeze: part of a variable's path -> after how many steps it stops to train.
      averaging: of the weights, None for none.
    """

    recipe: Recipe
    batches: ArrayBatches
    model: Any
    optimizer: Any
    loss_fn: LossFn
    freeze: dict[str, int]
    averaging: Any


def assemble(recipe: Recipe, dataset: Dataset) -> Pieces:
    """Builds all that a recipe is trained with.

    Args:
      recipe: the recipe.
      dataset: what to train on.

    Raises:
      ConfigError: if a value does not fit the data or the model.
      DataError: if the model cannot take its weights from these images.
    """
    recipe = resolve(recipe, dataset)
    batches = build_batches(recipe, dataset)
    model = build_model(
        recipe,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        images=dataset.train.images,
    )
    optimizer = build_optimizer(recipe, steps_per_epoch=batches.steps_per_epoch)
    # Before a run's folder is made: here and below it is found out that a variable is not there.
    optimizer.build(model.trainable_variables)
    loss_fn = cross_entropy(label_smoothing=recipe.label_smoothing)
    total_steps = epochs_to_steps(recipe.epochs, steps_per_epoch=batches.steps_per_epoch)
    freeze = {
        part: round(epochs * batches.steps_per_epoch)
        for part, epochs in (recipe.freeze or {}).items()
    }
    freezing_stages(model.trainable_variables, freeze)
    # Each is another step to compile: none that would not be reached.
    freeze = {part: step for part, step in freeze.items() if step < total_steps}
    averaging = build_averaging(recipe)
    return Pieces(recipe, batches, model, optimizer, loss_fn, freeze, averaging)


def predict_options(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of `predict` that a recipe decides, every "auto" in it resolved."""
    return {
        "batch_size": recipe.eval_batch_size,
        "tta": recipe.tta,
        "tta_share": recipe.tta_share,
        "jit_compile": recipe.jit_compile == "true",
    }


def load_recipe_data(recipe: Recipe, *, data_dir: str | pathlib.Path | None = None) -> Dataset:
    """Loads the data that a recipe asks for, split and limited as it says.

    Args:
      recipe: the recipe.
      data_dir: where the data is, see `load_data`.

    Raises:
      ConfigError: if limit_examples is more than there are.
      DataError, DataNotFoundError: see `load_data`.
    """
    dataset = load_data(
        recipe.data,
        data_dir,
        image_size=recipe.image_size,
        validation_fraction=recipe.validation_fraction,
        validation_split=recipe.validation_split,
    )
    return limit_as_asked(recipe, dataset)


def limit_as_asked(recipe: Recipe, dataset: Dataset) -> Dataset:
    """Returns as much of the data as the recipe's limit_examples says.

    Raises:
      ConfigError: if limit_examples is more than there are.
    """
    if recipe.limit_examples in (0, len(dataset.train)):
        return dataset
    return dataset.limit(recipe.limit_examples)
