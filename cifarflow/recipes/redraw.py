"""Any batch of a run drawn again, from nothing but its recipe and the data set.

images, labels = batch_at(load_recipe("runs/first"), 57)
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from cifarflow.data.splits import Dataset
from cifarflow.errors import ConfigError, DataError, check_int
from cifarflow.recipes.build import build_batches, limit_as_asked, load_recipe_data
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.workdir import Workdir


def load_recipe(workdir: str | os.PathLike[str]) -> Recipe:
    """Reads the recipe of a run, with each "auto" in it as it was resolved.

    Args:
      workdir: the run's folder.

    Raises:
      WorkdirError: if it holds no run, but an ensemble for one; says what is there.
      DataError: if its recipe.json is damaged.
    """
    folder = Workdir(workdir)
    values = folder.read_recipe()
    try:
        return Recipe.from_json(values)
    except ConfigError as error:
        path = folder.path / "recipe.json"
        raise DataError(f"{str(path)!r} is no recipe: {error}") from error


def batch_at(
    recipe: str | Recipe,
    step: int,
    *,
    data_dir: str | pathlib.Path | None = None,
    dataset: Dataset | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the batch that a run of a recipe trains on at a step.

    For many batches of one run take `ArrayBatches.batch_at`: this loads the data each time.

    Args:
      recipe: a name in `RECIPES`, or a recipe; that of a run by `load_recipe`.
      step: which, 0 for the first.
      data_dir: where the data is, see `load_data`.
      dataset: the data, in place of loading the recipe's; a run on data of your own needs it.

    Returns:
      images [B, H, W, C] and labels as the step gets them, augmented: uint8 and [B] int32, if the
      augmentation makes no others of them.

    Raises:
      ConfigError: if step is negative, or the recipe does not fit the data.
      DataError, DataNotFoundError: see `load_data`.
    """
    step, recipe = check_int("step", step, minimum=0), get_recipe(recipe)
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    return build_batches(recipe, limit_as_asked(recipe, dataset)).batch_at(step)
