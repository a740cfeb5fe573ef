"""Images with labels in memory: `Split`, `Dataset`, and how a validation split is taken.

    train, validation = split_validation(images, labels, fraction=0.2, how="last", seed=0)
    dataset = Dataset("mine", train, validation, test, class_names=("cat", "dog"), source="here")
    dataset.limit(100)  # the same with 100 training images, for a quick try

    check_images_and_labels(images, labels, num_classes=10)  # DataError with the bad value

All are plain NumPy arrays; nothing here knows where they come from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cifarflow.errors import ConfigError, DataError, check_choice, check_float, check_int

SPLIT_METHODS = ("last", "stratified")
_MANY_PIXELS = 10_000


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, checked when made.

    `images, labels = split` takes it apart; `len(split)` is the number of examples.

    Attributes:
      images: [N, H, W, C] uint8, 0..255; N may be 0.
      labels: [N] int32, from 0.

    Raises:
      DataError: if a rank, dtype, length or label is wrong.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        check_images_and_labels(self.images, self.labels)
        object.__setattr__(self, "labels", self.labels.astype(np.int32, copy=False))

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.images, self.labels))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training.

    Attributes:
      name: "cifar10", "standin", or a name of your own.
      train: what is trained on.
      validation: what is held out of the training set; may be empty.
      test: what is looked at last.
      class_names: the classes, by label.
      source: where it was found, for logs.

    Raises:
      DataError: if a label has no class name, or the image shapes differ.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        for split in (self.train, self.validation, self.test):
            check_images_and_labels(split.images, split.labels, num_classes=self.num_classes)
            if split.images.shape[1:] != self.image_shape:
                raise DataError(
                    f"all images of a data set must have one shape, not {self.image_shape} "
                    f"and {split.images.shape[1:]}"
                )

    @property
    def is_standin(self) -> bool:
        """Whether these are the generated stand-in images and not CIFAR-10."""
        return self.name == "standin"

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def limit(self, examples: int) -> Dataset:
        """Returns a smaller data set, for a quick try.

        Args:
          examples: how many training images to keep, the first ones. Validation and test set
            shrink by the same factor, to at least one image each (an empty one stays empty).

        Raises:
          ConfigError: if `examples` is not from 1 to the number of training images.
        """
        examples = check_int("limit_examples", examples)
        if examples > len(self.train):
            raise ConfigError(
                f"limit_examples must be at most the {len(self.train)} training images, "
                f"not {examples}"
            )

        def first(split: Split) -> Split:
            count = max(1, len(split) * examples // len(self.train))
            return Split(split.images[:count], split.labels[:count])

        return dataclasses.replace(
            self, train=first(self.train), validation=first(self.validation), test=first(self.test)
        )


def check_images_and_labels(
    images: np.ndarray, labels: np.ndarray, *, num_classes: int | None = None
) -> None:
    """Checks a user's arrays before anything is built on them.

    Args:
      images: must be [N, H, W, C] uint8, of 0..255 and not of 0 and 1 alone.
      labels: must be [N] integers from 0 to num_classes - 1.
      num_classes: how many classes there are; None only asks for labels of at least 0.

    Raises:
      DataError: quoting what is wrong.
    """
    for name, array in (("images", images), ("labels", labels)):
        if not isinstance(array, np.ndarray):
            raise DataError(f"{name} must be a numpy array, not {type(array).__name__}")
    if images.ndim != 4:
        raise DataError(
            f"images must have the shape [N, height, width, channels], not {images.shape}"
        )
    if images.dtype != np.uint8:
        raise DataError(f"images must be uint8 (0 to 255), not {images.dtype}")
    # A few small pictures may well be as dark as that.
    if images.size >= _MANY_PIXELS and images.max() == 1:
        raise DataError(
            "images must be pixels of 0 to 255, and the largest here is 1: were they scaled to "
            "0..1 before they became uint8? Give them as they were"
        )
    if labels.ndim != 1:
        raise DataError(f"labels must have the shape [N], not {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise DataError(f"labels must be integers, not {labels.dtype}")
    if len(images) != len(labels):
        raise DataError(
            f"images and labels must be equally many, not {len(images)} and {len(labels)}"
        )
    if not labels.size:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        most = "" if num_classes is None else f" to {num_classes - 1}"
        wrong = low if low < 0 else high
        raise DataError(f"labels must be from 0{most}, not {wrong}")


def check_split_options(fraction: object, how: object, seed: object) -> dict[str, Any]:
    """Checks how a validation split is to be taken, before the data is looked for.

    Args:
      fraction: see `split_validation`, as the others.
      how: "last" or "stratified".
      seed: for "stratified".

    Returns:
      The three, for `split_validation`.

    Raises:
      ConfigError: if one is out of range.
    """
    return {
        "fraction": check_float("validation_fraction", fraction, maximum=1.0, below_maximum=True),
        "how": check_choice("validation_split", how, SPLIT_METHODS),
        "seed": check_int("seed", seed, minimum=0),
    }


def split_validation(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    fraction: float = 0.2,
    how: str = "last",
    seed: int = 0,
) -> tuple[Split, Split]:
    """Splits a training set in two.

    Args:
      images: [N, H, W, C] uint8.
      labels: [N] integers.
      fraction: share held out, from 0 (an empty validation split) to below 1.
      how: "last" holds out the last images in file order, to the image what Keras's
        `validation_split` takes; "stratified" draws the same share of every class by `seed`.
        Both leave the order as it is.
      seed: for "stratified".

    Returns:
      The training split and the validation split.

    Raises:
      ConfigError: if an option is out of range, or the fraction leaves one side without images.
      DataError: if the arrays are not images and labels.
    """
    fraction, how, seed = check_split_options(fraction, how, seed).values()
    check_images_and_labels(images, labels)
    if how == "last" or fraction == 0.0:
        # Keras rounds like this: 1 - fraction first, then down.
        split_at = math.floor(len(labels) * (1.0 - fraction))
        train = Split(images[:split_at], labels[:split_at])
        validation = Split(images[split_at:], labels[split_at:])
    else:
        held_out = _stratified(labels, fraction, seed)
        train = Split(images[~held_out], labels[~held_out])
        validation = Split(images[held_out], labels[held_out])
    if fraction > 0.0 and not (len(train) and len(validation)):
        raise ConfigError(
            f"validation_fraction {fraction!r} of {len(labels)} images leaves {len(train)} to "
            f"train on and {len(validation)} to validate on; both need at least 1"
        )
    return train, validation


def _stratified(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns [N] bool, true where an example is held out: the same share of each class."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = len(rows) - math.floor(len(rows) * (1.0 - fraction))
        held_out[generator.permutation(rows)[:count]] = True
    return held_out
