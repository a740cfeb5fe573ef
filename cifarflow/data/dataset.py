"""The one way to the data: CIFAR-10, or the stand-in set where there is none; or what is asked for.

    dataset = load_data()                        # auto: CIFAR-10 if any source has it
    dataset = load_data("cifar10", "~/data")     # CIFAR-10 or an error
    dataset = load_data("cifar100")              # CIFAR-100; "cifar100-coarse": its 20 superclasses
    dataset = load_data("folder", "~/flowers")   # pictures, each class a folder
    dataset = load_data("tfds:mnist")            # any set of images of TensorFlow Datasets
    dataset = load_data("standin")               # generated images, ten classes of their own
    dataset.is_standin, dataset.source, dataset.class_names

The stand-in set lets everything run on a machine with neither data nor network.  It is never
used in silence: a banner on stderr says so, and `dataset.name` goes into everything written.
"""

from __future__ import annotations

import os
import sys
import textwrap
from typing import Any

from cifarflow.data.cifar10 import load_cifar10
from cifarflow.data.cifar100 import load_cifar100
from cifarflow.data.folder import load_folder
from cifarflow.data.prepared import load_prepared
from cifarflow.data.splits import (
    Dataset,
    Split,
    check_images_and_labels,
    split_validation,
)
from cifarflow.data.standin import load_standin
from cifarflow.errors import ConfigError, DataNotFoundError

__all__ = ["Dataset", "Split", "check_images_and_labels", "load_data", "split_validation"]

DATA_CHOICES = ("auto", "cifar10", "cifar100", "cifar100-coarse", "standin")


def check_data(data: object) -> str:
    """Returns `data` if `load_data` knows what it means.

    Raises:
      ConfigError: if it does not.
    """
    if isinstance(data, str):
        kind, colon, rest = data.partition(":")
        if data in (*DATA_CHOICES, "folder") or (kind in ("folder", "tfds") and colon and rest):
            return data
    raise ConfigError(
        f"data must be one of {', '.join(DATA_CHOICES)}, folder, tfds:NAME, not {data!r}"
    )


def load_data(
    data: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 32,
    validation_fraction: float = 0.2,
    validation_split: str = "last",
    seed: int = 0,
    verify: bool = True,
    download: bool = True,
    download_timeout_seconds: float = 10.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Loads a data set.

    Args:
      data: "auto" takes CIFAR-10 if any source has it and else the stand-in set, with a banner;
        "cifar10" never falls back; "cifar100" and "cifar100-coarse" are CIFAR-100 with its 100
        classes and with its 20 superclasses; "folder" is the pictures in data_dir, and
        "folder:NAME" those if it has that name; "tfds:NAME" is a set of TensorFlow Datasets;
        "standin" asks for the stand-in set.
      data_dir: where the data is, see `load_cifar10`, `load_folder` and `load_prepared`; not for
        "standin".
      image_size: for "folder" and "tfds:NAME": the side to which images are brought.
      validation_fraction: share of the training set held out, from 0 to below 1.
      validation_split: "last" or "stratified".
      seed: for "stratified". The stand-in images are the same whatever it is.
      verify: whether to check the official checksums.
      download: whether a download may be tried.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache.

    Returns:
      The data set; its `name` is `data`, but "cifar10" or "standin" under "auto", and that of the
      folder under "folder".

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if the data is nowhere, or `data_dir` or $CIFARFLOW_DATA was given and
        holds none (under "auto" as well: what was named is meant).
      DataError: if data was found and is damaged, under "auto" as well.
    """
    data = check_data(data)
    if data == "standin" and data_dir is not None:
        raise ConfigError(f"data_dir must be left out with data=standin, not {str(data_dir)!r}")
    split: dict[str, Any] = {
        "validation_fraction": validation_fraction,
        "validation_split": validation_split,
        "seed": seed,
        "cache_dir": cache_dir,
    }
    fetching: dict[str, Any] = {
        "download": download,
        "download_timeout_seconds": download_timeout_seconds,
    }
    kind, _, name = data.partition(":")
    if kind == "folder":
        return _load_named_folder(name, data_dir, image_size=image_size, **split)
    if kind == "tfds":
        return load_prepared(name, data_dir, image_size=image_size, **split, **fetching)
    if data in ("cifar100", "cifar100-coarse"):
        coarse = data.endswith("coarse")
        return load_cifar100(data_dir, coarse=coarse, verify=verify, **split, **fetching)
    reason = ""
    if data != "standin":
        try:
            return load_cifar10(data_dir, verify=verify, **split, **fetching)
        except DataNotFoundError as error:
            is_named = data_dir is not None or os.environ.get("CIFARFLOW_DATA")
            if data == "cifar10" or is_named:
                raise
            # The banner says itself what is done instead.
            reason = str(error).partition(" To try everything without CIFAR-10")[0]
    dataset = load_standin(**split)
    print(_banner(reason), file=sys.stderr, flush=True)
    return dataset


def _load_named_folder(
    name: str, data_dir: str | os.PathLike[str] | None, **options: Any
) -> Dataset:
    if name and data_dir is None:
        raise ConfigError(
            f"data=folder:{name} needs data_dir, the folder {name!r} of the pictures: "
            "--data_dir=PATH"
        )
    dataset = load_folder(data_dir, **options)
    if name and dataset.name != name:
        raise DataNotFoundError(f"data=folder:{name} is not in the folder {dataset.source!r}")
    return dataset


def _banner(reason: str) -> str:
    """Returns a box that says these are not CIFAR-10 results; longer if nobody asked for it."""
    lines = ["STAND-IN DATA: these are NOT CIFAR-10 results", ""]
    if reason:
        lines += textwrap.wrap(reason, 84, break_long_words=False, break_on_hyphens=False)
    else:
        lines += ["Generated images with ten classes of their own, because data=standin asks so."]
    width = max(map(len, lines))
    edge = "#" * (width + 6)
    return "\n".join(
        ["", edge, edge, *(f"## {line:<{width}} ##" for line in lines), edge, edge, ""]
    )
