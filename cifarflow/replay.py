"""A failed step run again, from its capsule alone.

    found = replay_capsule("runs/first/capsules/step_00000041")
    print(found.describe())

or `python -m cifarflow replay runs/first/capsules/step_00000041`.
"""

from __future__ import annotations

import os

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
        )
