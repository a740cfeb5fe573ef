"""The model of a run, from nothing but the run's folder.

    trained = load_trained("runs/first")                # as the run left it
    trained = load_trained("runs/first", which="best")  # at the least validation loss
    trained.model, trained.class_names, trained.describe()

Neither the data set nor an image of it is needed: all weights are in the checkpoint, those that a
model takes from its training images too.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from cifarflow.data import standin
from cifarflow.data.layouts import LAYOUTS
from cifarflow.errors import CheckpointError, ConfigError, DataError, WorkdirError, check_choice
from cifarflow.models.layers import check_image_shape
from cifarflow.recipes.build import build_averaging, build_model, build_optimizer
from cifarflow.recipes.recipe import Recipe
from cifarflow.recipes.redraw import load_recipe
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import shown

WHICH = ("last", "best")
# What a summary may leave out where the data is known.
_KNOWN_CLASSES = {
    **{name: layout.class_names for name, layout in LAYOUTS.items()},
    "cifar100-coarse": LAYOUTS["cifar100"].coarse_names,
    "standin": standin.CLASS_NAMES,
}
_KNOWN_SHAPE = (32, 32, 3)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A run's model, and what is known of it.

    Attributes:
      model: the Keras model, images [B, H, W, C], 0..255 -> logits [B, num_classes] or what the
        recipe's model ends in.
      recipe: the run's, every "auto" in it resolved.
      class_names: the classes, by label.
      image_shape: (H, W, C) of the images.
      step: steps that the weights were trained for.
      is_finished: whether the run has ended and these are weights that it ended with, or its best.
      summary: what came of the run; None of an unfinished one.
    """

    model: Any
    recipe: Recipe
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    step: int
    is_finished: bool
    summary: Mapping[str, Any] | None

    def describe(self) -> str:
        """The model in a line, which says so if its run is not finished."""
        state = "" if self.is_finished else ", of a run that is not finished"
        return f"{self.recipe.name} on {self.recipe.data}, step {self.step:,}{state}"


def load_trained(
    workdir: str | os.PathLike[str],
    *,
    which: str = "last",
    image_shape: tuple[int, int, int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Trained:
    """Builds the model of a run again, with the weights of its newest or its best checkpoint.

    Weights that the run averages are averaged here too: as the run leaves them at its end, and as
    its validation sees them before that.

    Args:
      workdir: the run's folder.  The run need not be finished, and may be running.
      which: "last", or "best" for the least validation loss.
      image_shape: (H, W, C), needed only where the folder does not say: an unfinished run on data
        of your own, and one of a version that did not write it down.
      class_names: the classes by label, needed likewise.

    Raises:
      ConfigError: if which is neither, or image_shape or class_names is needed and not given.
      WorkdirError: if there is no run, or it has no checkpoint yet.
      DataError: if recipe.json or summary.json is damaged, or the weights are not those that the
        summary is of.
      CheckpointError: if the checkpoint is damaged or of another model, or there is no best one.

    Warns:
      If the newest checkpoint is damaged: the one before it is taken.
    """
    check_choice("which", which, WHICH)
    recipe = load_recipe(workdir)
    folder = Workdir(workdir)
    summary = folder.read_summary(["steps", "weights_sha256", "class_names"])
    names = _class_names_of(recipe, summary, class_names)
    shape = _image_shape_of(recipe, summary, image_shape)
    checkpoints = Checkpoints(folder.checkpoints, identity=recipe.to_json())
    newest = checkpoints.latest_whole() if which == "last" else None
    if which == "last" and newest is None:
        raise WorkdirError(f"the run in {str(folder.path)!r} has no checkpoint yet: train it first")
    if which == "best" and not os.path.lexists(checkpoints.best_path):
        raise CheckpointError(
            f"the run in {str(folder.path)!r} has no best checkpoint: nothing was validated yet, "
            "or its recipe holds no validation images out"
        )
    model = build_model(recipe, image_shape=shape, num_classes=len(names))
    # The schedule has no variables; without it nothing depends on the size of the data set.
    plain = dataclasses.replace(recipe, schedule="constant", warmup_epochs=0, drop_epochs=())
    optimizer = build_optimizer(plain, steps_per_epoch=1)
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    averaging = build_averaging(recipe)
    if averaging is not None:
        averaging.build(model)
        variables += averaging.variables
    if newest is None:
        step = checkpoints.restore_best(variables)
    else:
        step = newest
        checkpoints.restore(step, variables)
    if averaging is not None:
        averaging.finish()
    is_last = summary is not None and step == summary["steps"] and which == "last"
    if is_last and hash_arrays(model.variables) != (summary or {})["weights_sha256"]:
        raise DataError(
            f"the weights in {str(checkpoints.path(step))!r} are not those that "
            f"{str(folder.path / 'summary.json')!r} is of: one of the two is another's"
        )
    is_finished = is_last or (summary is not None and which == "best")
    return Trained(model, recipe, names, shape, step, is_finished, summary)


def check_class_names(names: Any, *, source: str = "class_names") -> tuple[str, ...]:
    """Returns class names as a tuple of at least two.

    Args:
      names: the names, by label.
      source: where they are from, for the message.

    Raises:
      DataError: if they are not two printable texts or more.
    """
    good = isinstance(names, (list, tuple)) and all(
        isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200 for name in names
    )
    if not good or len(names) < 2:
        raise DataError(f"{source} must be two printable names or more, not {shown(names)}")
    return tuple(names)


def _class_names_of(
    recipe: Recipe, summary: Mapping[str, Any] | None, given: Sequence[str] | None
) -> tuple[str, ...]:
    if given is not None:
        return check_class_names(given)
    if summary is not None:
        return check_class_names(summary["class_names"], source="the summary's class_names")
    if recipe.data not in _KNOWN_CLASSES:
        raise ConfigError(
            f"class_names must be given: the run on {recipe.data!r} is not finished and does not "
            "say them"
        )
    return _KNOWN_CLASSES[recipe.data]


def _image_shape_of(
    recipe: Recipe, summary: Mapping[str, Any] | None, given: tuple[int, int, int] | None
) -> tuple[int, int, int]:
    written = (summary or {}).get("image_shape")
    if given is not None or written is not None:
        return check_image_shape(given if given is not None else written)
    if recipe.data not in _KNOWN_CLASSES:
        raise ConfigError(
            f"image_shape must be given: the run on {recipe.data!r} does not say of what shape its "
            "images are"
        )
    return _KNOWN_SHAPE
