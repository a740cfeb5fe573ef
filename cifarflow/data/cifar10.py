"""CIFAR-10 as a data set: found wherever it is, verified, split.

    dataset = load_cifar10()            # searches, and downloads if nothing is found
    dataset = load_cifar10("~/data")    # this folder, archive, .npz or TFDS directory, or an error
    dataset.train.images                # [40000, 32, 32, 3] uint8
    dataset.validation.labels           # [10000] int32

Where it is looked for, and what is remembered, is the business of `sources`.
"""

from __future__ import annotations

import os

from cifarflow.data import sources
from cifarflow.data.layouts import LAYOUTS
from cifarflow.data.splits import Dataset, Split, check_split_options, split_validation


def load_cifar10(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    verify: bool = True,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads CIFAR-10 from the first source that has it.

    Args:
      data_dir: a file or folder that holds CIFAR-10 in any known format; None searches.
      validation_fraction: share of the training set held out, from 0 to below 1.
      validation_split: "last" holds out the last images in file order (what Keras's
        `validation_split` does), "stratified" the same share of each class.
      seed: for "stratified".
      verify: whether to hold the data against the official checksums.
      download: whether a download may be tried when nothing is found.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache; None takes $CIFARFLOW_CACHE, else
        $XDG_CACHE_HOME/cifarflow, else ~/.cache/cifarflow.

    Returns:
      The data set: images [N, 32, 32, 3] uint8, labels [N] int32, always in the same order.

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if no source has the data, or one that was named holds none.
      DataError: if data was found and is damaged, incomplete, altered, unsafe or CIFAR-100.
    """
    options = check_split_options(validation_fraction, validation_split, seed)
    layout = LAYOUTS["cifar10"]
    arrays, source = sources.load(
        layout,
        data_dir,
        verify=verify,
        download=download,
        download_timeout_seconds=download_timeout_seconds,
        cache_dir=cache_dir,
    )
    train, validation = split_validation(arrays.train_images, arrays.train_labels, **options)
    test = Split(arrays.test_images, arrays.test_labels)
    return Dataset(layout.name, train, validation, test, layout.class_names, source)
