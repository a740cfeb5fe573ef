"""CIFAR-100 as a data set: the sources and formats of CIFAR-10, and 100 classes or 20.

dataset = load_cifar100()               # searches, and downloads if nothing is found
dataset = load_cifar100("~/data")       # this folder, archive, .npz or TFDS directory
dataset.class_names                     # ("apple", "aquarium_fish", ...)
load_cifar100(coarse=True).class_names  # ("aquatic_mammals", "fish", ...)
"""

from __future__ import annotations

import os

import numpy as np

from cifarflow.data import sources
from cifarflow.data.layouts import LAYOUTS
from cifarflow.data.splits import Dataset, Split, check_split_options, split_validation


def load_cifar100(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    coarse: bool = False,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    verify: bool = True,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads CIFAR-100 from the first source that has it.

    Args:
      data_dir: a file or folder that holds CIFAR-100 in any known format; None searches.
      coarse: whether labels are the 20 superclasses and not the 100 classes.  They follow from the
        classes, as in every file.
      validation_fraction: see `load_cifar10`, as all that follows.
      validation_split: "last" or "stratified", by the labels asked for.
      seed: for "stratified".
      verify: whether to hold the data against the official checksums.
      download: whether a download may be tried when nothing is found.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache.

    Returns:
      The data set: images [N, 32, 32, 3] uint8, labels [N] int32, always in the same order; its
      name is "cifar100" or "cifar100-coarse".

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if no source has the data, or one that was named holds none.
      DataError: if data was found and is damaged, incomplete, altered, unsafe or CIFAR-10.
    """
    options = check_split_options(validation_fraction, validation_split, seed)
    layout = LAYOUTS["cifar100"]
    arrays, source = sources.load(
        layout,
        data_dir,
        verify=verify,
        download=download,
        download_timeout_seconds=download_timeout_seconds,
        cache_dir=cache_dir,
    )
    name, class_names = layout.name, layout.class_names
    train_labels, test_labels = arrays.train_labels, arrays.test_labels
    if coarse:
        name, class_names = f"{name}-coarse", layout.coarse_names
        coarse_of = np.array(layout.coarse, np.int32)
        train_labels, test_labels = coarse_of[train_labels], coarse_of[test_labels]
    train, validation = split_validation(arrays.train_images, train_labels, **options)
    test = Split(arrays.test_images, test_labels)
    return Dataset(name, train, validation, test, class_names, source)
