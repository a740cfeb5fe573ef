"""The one way to the data: CIFAR-10, or the stand-in set where there is no CIFAR-10.

    dataset = load_data()                        # auto: CIFAR-10 if any source has it
    dataset = load_data("cifar10", "~/data")     # CIFAR-10 or an error
    dataset = load_data("standin")               # generated images, ten classes of their own
    dataset.is_standin, dataset.source, dataset.class_names

The stand-in set lets everything run on a machine with neither data nor network.  It is never
used in silence: a banner on stderr says so, and `dataset.name` goes into everything written.
"""

from __future__ import annotations

import os
import sys
import textwrap

from cifarflow.data.cifar10 import load_cifar10
from cifarflow.data.splits import (
    Dataset,
    Split,
    check_images_and_labels,
    split_validation,
)
from cifarflow.data.standin import load_standin
from cifarflow.errors import ConfigError, DataNotFoundError, check_choice

__all__ = ["Dataset", "Split", "check_images_and_labels", "load_data", "split_validation"]

DATA_CHOICES = ("auto", "cifar10", "standin")


def load_data(
    data: str = "auto",
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
    """Loads CIFAR-10 or the stand-in set.

    Args:
      data: "auto" takes CIFAR-10 if any source has it and else the stand-in set, with a banner;
        "cifar10" never falls back; "standin" asks for the stand-in set.
      data_dir: where CIFAR-10 is, see `load_cifar10`; not for "standin".
      validation_fraction: share of the training set held out, from 0 to below 1.
      validation_split: "last" or "stratified".
      seed: for "stratified". The stand-in images are the same whatever it is.
      verify: whether to check the official checksums.
      download: whether a download may be tried.
      download_timeout_seconds: how long the host of the download may take to answer.
      cache_dir: the project's cache.

    Returns:
      The data set; its `name` is "cifar10" or "standin".

    Raises:
      ConfigError: if an argument is out of range.
      DataNotFoundError: if "cifar10" is nowhere, or `data_dir` or $CIFARFLOW_DATA was given and
        holds none (under "auto" as well: what was named is meant).
      DataError: if data was found and is damaged, under "auto" as well.
    """
    check_choice("data", data, DATA_CHOICES)
    if data == "standin" and data_dir is not None:
        raise ConfigError(f"data_dir must be left out with data=standin, not {str(data_dir)!r}")
    reason = ""
    if data != "standin":
        try:
            return load_cifar10(
                data_dir,
                validation_fraction=validation_fraction,
                validation_split=validation_split,
                seed=seed,
                verify=verify,
                download=download,
                download_timeout_seconds=download_timeout_seconds,
                cache_dir=cache_dir,
            )
        except DataNotFoundError as error:
            is_named = data_dir is not None or os.environ.get("CIFARFLOW_DATA")
            if data == "cifar10" or is_named:
                raise
            # The banner says itself what is done instead.
            reason = str(error).partition(" To try everything without CIFAR-10")[0]
    dataset = load_standin(
        validation_fraction=validation_fraction,
        validation_split=validation_split,
        seed=seed,
        cache_dir=cache_dir,
    )
    print(_banner(reason), file=sys.stderr, flush=True)
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
