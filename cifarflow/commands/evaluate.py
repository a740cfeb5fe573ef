"""Measures a trained model, or two and whether one of them is better.

    cifarflow evaluate runs/first
    cifarflow evaluate runs/first runs/second --split=test
    cifarflow evaluate runs/first some/model.keras

A target is a run's folder, or a .keras file of anybody's.  By default it is measured on the
validation images: a test set of which settings were chosen is none any more.  A file does not say
what it was trained on; if that was the validation images too, nothing of what is printed holds.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cifarflow.data.pictures import check_image_size
from cifarflow.errors import ConfigError, check_int
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import TTA_CHOICES, Recipe
from cifarflow.untrusted import one_line

if TYPE_CHECKING:
    from cifarflow.data.splits import Dataset
    from cifarflow.evaluation.evaluate import Evaluation

FLAGS = flags.FLAGS
_SPLITS = ("validation", "test")
_SUFFIX = ".keras"
# The fields of a recipe that decide what the images are, and which are held out.
_IMAGES = ("data", "image_size")
_HELD_OUT = (*_IMAGES, "validation_fraction", "validation_split", "limit_examples")


@dataclasses.dataclass(frozen=True)
class Target:
    """What is measured.

    Attributes:
      name: as it was given.
      model: the Keras model.
      about: what it is, in words.
      recipe: the run's; None of a file.
    """

    name: str
    model: Any
    about: str
    recipe: Recipe | None


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_enum("split", "validation", _SPLITS, "which images it is measured on")
    # `recipes.trained` has these too; it would load TensorFlow.
    flags.DEFINE_enum(
        "which", "last", ("last", "best"), "a run's newest weights, or those of its best validation"
    )
    flags.DEFINE_string("data", "auto", "which data, for files; a run knows its own")
    flags.DEFINE_integer(
        "image_size", 32, "the side of the images of data=folder and tfds:NAME, for files likewise"
    )
    flags.DEFINE_string(
        "data_dir", None, "where the data is, a file or folder (default: search, see README)"
    )
    flags.DEFINE_enum(
        "tta",
        None,
        TTA_CHOICES,
        "test-time augmentation, of all images (default: the run's own, of its tta_share of them; "
        "for files none)",
    )
    flags.DEFINE_integer("batch_size", 500, "images a call; changes time and memory only")


def main(words: list[str]) -> None:
    """Measures the targets, and prints what came out.

    Args:
      words: one or two targets.

    Raises:
      ConfigError: if they are not one or two, or cannot be measured on the same images.
      CifarflowError: if one cannot be loaded, or there is no data.
    """
    if not 1 <= len(words) <= 2 or not all(word.strip() for word in words):
        raise ConfigError(
            f"evaluate must be given TARGET or two, each a run's folder or a {_SUFFIX} file, "
            f"not {words!r}"
        )
    check_int("--batch_size", FLAGS.batch_size)
    check_image_size(FLAGS.image_size)
    # Loaded here: what is wrong with a flag is said without waiting for TensorFlow.
    from cifarflow.evaluation.comparison import mcnemar
    from cifarflow.evaluation.evaluate import evaluate_model
    from cifarflow.recipes.build import load_recipe_data

    targets = [_load(word) for word in words]
    recipe = _recipe_of_data(targets)
    dataset = load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    split = dataset.validation if FLAGS.split == "validation" else dataset.test
    found = []
    for target in targets:
        # What is asked for is done to all images; what a run did, to as many as there.
        tta, share = FLAGS.tta or "none", 1.0
        if FLAGS.tta is None and target.recipe is not None:
            tta, share = target.recipe.tta, target.recipe.tta_share
        found.append(
            evaluate_model(
                target.model,
                split,
                num_classes=dataset.num_classes,
                batch_size=FLAGS.batch_size,
                tta=tta,
                tta_share=share,
            )
        )
    console = Console(highlight=False)
    print_evaluations(targets, found, dataset, console)
    if len(found) == 2:
        first, second = (each.probabilities.argmax(-1) for each in found)
        names = (targets[0].name, targets[1].name)
        verdict = mcnemar(split.labels, first, second, names=names).verdict
        console.print(Text(f"\n{verdict}"))


def _load(word: str) -> Target:
    """Loads what a word names."""
    from cifarflow.evaluation.model_files import load_model_file
    from cifarflow.recipes.trained import load_trained

    path = os.path.expanduser(word)
    if word.endswith(_SUFFIX) and not os.path.isdir(path):
        return Target(word, load_model_file(word), "a model file", None)
    if os.path.isfile(path):
        raise ConfigError(f"TARGET must be a run's folder or a {_SUFFIX} file, not {word!r}")
    trained = load_trained(word, which=FLAGS.which)
    return Target(word, trained.model, trained.describe(), trained.recipe)


def _recipe_of_data(targets: list[Target]) -> Recipe:
    """A recipe that loads the images for all the targets.

    Raises:
      ConfigError: if a run held no images out, or other ones than another.
    """
    recipes = [target.recipe for target in targets if target.recipe is not None]
    if not recipes:
        recipes = [get_recipe("lab_cnn", data=FLAGS.data, image_size=FLAGS.image_size)]
    first = recipes[0]
    for target in targets:
        recipe = target.recipe or first
        if FLAGS.split == "validation" and not recipe.validation_fraction:
            raise ConfigError(
                f"{target.name!r} is a run that held no validation images out: give --split=test"
            )
        differs = next((f for f in _HELD_OUT if getattr(recipe, f) != getattr(first, f)), None)
        if differs is not None and (FLAGS.split == "validation" or differs in _IMAGES):
            raise ConfigError(
                f"{targets[0].name!r} and {target.name!r} must be measured on the same images, "
                f"not with {differs}={getattr(first, differs)} and "
                f"{getattr(recipe, differs)}"
            )
    return first


def print_evaluations(
    targets: list[Target], found: list[Evaluation], dataset: Dataset, console: Console
) -> None:
    """Prints what each target came to, side by side.

    Args:
      targets: what was measured.
      found: what each came to.
      dataset: the data, whose `--split` was measured on.
      console: where to.
    """
    from cifarflow.evaluation.scores import score_outputs

    labels = (dataset.validation if FLAGS.split == "validation" else dataset.test).labels
    # Of probabilities softmax makes logits again; the least number keeps a 0 finite.
    least = np.finfo(np.float32).tiny
    scores = [score_outputs(labels, np.log(np.maximum(e.probabilities, least))) for e in found]
    for letter, target in zip("AB", targets, strict=False):
        mark = f"{letter}  " if len(targets) > 1 else ""
        name, about = one_line(target.name), one_line(target.about)
        console.print(Text.assemble((mark, "bold cyan"), (name, "bold"), f": {about}"))
    console.print(f"on {len(labels):,} {FLAGS.split} images of {dataset.name}\n")
    letters = [f" {letter}" if len(targets) > 1 else "" for letter in "AB"[: len(targets)]]
    style: dict[str, Any] = {"box": None, "pad_edge": False, "header_style": "bold"}
    style["padding"] = (0, 2, 0, 0)
    table = Table(**style, show_header=len(targets) > 1)
    table.add_column("")
    for letter in letters:
        table.add_column(letter.strip(), justify="right")
    rows = {
        "accuracy": [f"{each.accuracy:.4f}" for each in found],
        "loss": [f"{each.loss:.4f}" for each in found],
        **{
            f"top-{k} accuracy": [f"{each[key]:.4f}" for each in scores]
            # Of as many as there are classes there is none.
            for k, key in ((2, "top_2_accuracy"), (3, "top_3_accuracy"), (5, "top_5_accuracy"))
            if key in scores[0]
        },
        "calibration error": [f"{each['expected_calibration_error']:.4f}" for each in scores],
    }
    for name, values in rows.items():
        table.add_row(name, *values)
    console.print(Padding(table, (0, 0, 1, 2), expand=False))
    table = Table(**style)
    table.add_column("class")
    for letter in letters:
        for name in ("precision", "recall"):
            table.add_column(f"{name}{letter}", justify="right")
    for index, name in enumerate(dataset.class_names):
        shares = [each[key][index] for each in scores for key in ("precision", "recall")]
        table.add_row(Text(name), *("-" if share is None else f"{share:.3f}" for share in shares))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
