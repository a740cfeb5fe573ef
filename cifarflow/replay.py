"""A failed step run again, from its capsule alone.

    found = replay_capsule("runs/first/capsules/step_00000041")
    print(found.describe())

or `python -m cifarflow replay runs/first/capsules/step_00000041`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from cifarflow.device import prepare_gpus
from cifarflow.errors import CifarflowError
from cifarflow.recipes.build import build_model, build_optimizer
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.capsule import Capsule, CapsuleError, Findings, examine_step, load_capsule
from cifarflow.training.loop import explained
from cifarflow.training.step import cross_entropy


def replay_capsule(capsule: str | os.PathLike[str] | Capsule) -> Findings:
    """Builds a capsule's model by its recipe, restores it, and runs that one step.

    Neither the data set nor the run's folder is needed.

    Args:
      capsule: its folder, or what `load_capsule` read.

    Returns:
      The loss, and which gradients and weights are not finite.

    Raises:
      CapsuleError: if there is no such capsule, it is damaged, it has no recipe, or its recipe
        does not fit its state.
    """
    if not isinstance(capsule, Capsule):
        capsule = load_capsule(capsule)
    if capsule.recipe is None:
        raise CapsuleError(
            f"capsule {str(capsule.path)!r} has no recipe to build its model by: restore it into "
            "your own by capsule.restore, and run examine_step"
        )
    prepare_gpus()
    try:
        recipe = Recipe.from_json(capsule.recipe)
        height, width, channels = capsule.images.shape[1:]
        with _no_larger_than(capsule):
            model = build_model(
                recipe, image_shape=(height, width, channels), num_classes=capsule.num_classes
            )
            optimizer = build_optimizer(recipe, steps_per_epoch=capsule.steps_per_epoch)
            optimizer.build(model.trainable_variables)
    except (CifarflowError, TypeError) as error:
        raise CapsuleError(
            f"capsule {str(capsule.path)!r} has a recipe that cannot be built: {error}"
        ) from error
    capsule.restore([*model.variables, *optimizer.variables])
    freeze = {
        part: round(epochs * capsule.steps_per_epoch)
        for part, epochs in (recipe.freeze or {}).items()
    }
    with explained(model):
        return examine_step(
            model,
            optimizer,
            capsule.images,
            capsule.labels,
            loss_fn=cross_entropy(label_smoothing=recipe.label_smoothing),
            freeze=freeze,
            jit_compile=recipe.jit_compile == "true",
            accumulate_steps=recipe.accumulate_steps,
        )


@contextlib.contextmanager
def _no_larger_than(capsule: Capsule) -> Iterator[None]:
    """Refuses variables that all together have more bytes than the file of their values.

    A line of text may ask for a model of any size: they are counted before they take memory.

    Raises:
      CapsuleError: within, in place of the variable that is too much; without the capsule's name.
    """
    room = left = capsule.state_bytes()

    def create(next_creator: Callable[..., Any], **options: Any) -> Any:
        nonlocal left
        value = options["initial_value"]
        # In a graph that is never run what makes a value tells only its shape.
        with tf.Graph().as_default():
            value = tf.convert_to_tensor(value()) if callable(value) else value
        left -= math.prod(value.shape) * tf.as_dtype(value.dtype).size
        if left < 0:
            raise CapsuleError(f"its variables have more than the {room:,} bytes of the state")
        return next_creator(**options)

    with tf.variable_creator_scope(create):
        yield
