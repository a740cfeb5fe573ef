"""What the named recipes came to: accuracy and seconds, on which machine, and when.

    for record in records_of("fast94"):
        print(record.accuracy, record.seconds, record.machine)

The commands that printed these figures are in benchmarks/README.md.  All are of real CIFAR-10, on
the whole test set, by TensorFlow 2.21 and Keras 3.15.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cifarflow.errors import check_choice

ZEN4 = "2 CPU cores, Zen 4"
XEON = "2 CPU cores, AMX"
H200 = "NVIDIA H200"

# What the seconds are of.
TRAINING = "training"
# Whitening, training and the final evaluation with its test-time augmentation; not compiling.
WHOLE = "all but compiling"


@dataclasses.dataclass(frozen=True)
class Record:
    """What some runs of a recipe came to.

    Attributes:
      recipe: its name.
      machine: what they ran on.
      precision: what the layers computed in.
      accuracy: mean test accuracy, 0..1.
      runs: of how many runs, each with a seed of its own.
      seconds: mean seconds of a run.
      counted: of what they are: `TRAINING` or `WHOLE`.
      date: when, as YYYY-MM-DD.
      deviation: standard deviation of the accuracy; None of a single run, or where it was not
        computed.
      epochs: where they were not the recipe's.
    """

    recipe: str
    machine: str
    precision: str
    accuracy: float
    runs: int
    seconds: float
    counted: str
    date: str
    deviation: float | None = None
    epochs: float | None = None


def _lab(
    recipe: str, accuracy: float, runs: int, seconds: float, deviation: float | None = None
) -> Record:
    """One of the lab's, whose seconds are upper bounds: other programs were on the two cores."""
    precision = "float32" if recipe == "lab_mlp" else "mixed_bfloat16"
    return Record(
        recipe, ZEN4, precision, accuracy, runs, seconds, TRAINING, "2026-11-23", deviation
    )


def _fast(
    recipe: str,
    machine: str,
    accuracy: float,
    runs: int,
    seconds: float,
    date: str,
    deviation: float | None = None,
    epochs: float | None = None,
) -> Record:
    """One of the recipes against the clock."""
    return Record(
        *(recipe, machine, "mixed_bfloat16", accuracy, runs, seconds, WHOLE, date),
        deviation,
        epochs,
    )


RECORDS = (
    _lab("lab_mlp", 0.4735, 3, 97, 0.004),
    _lab("lab_cnn", 0.6601, 3, 233, 0.005),
    _lab("lab_dropout", 0.6487, 3, 418, 0.004),
    _lab("lab_batchnorm", 0.7721, 1, 1050),
    _lab("lab_final", 0.7831, 1, 1185),
    _fast("fast75", ZEN4, 0.7830, 10, 18.2, "2026-11-24", 0.0059),
    _fast("fast94", H200, 0.9413, 20, 2.0, "2026-11-26", 0.0014),
    _fast("fast94", XEON, 0.9418, 3, 503, "2026-11-26", 0.0016),
    _fast("fast94", ZEN4, 0.9411, 1, 732, "2026-11-26"),
    _fast("fast95", XEON, 0.9511, 1, 1891, "2026-11-26"),
    _fast("fast95", H200, 0.9502, 5, 6.0, "2026-11-26", 0.0009, epochs=16.0),
    _fast("fast96", H200, 0.9587, 2, 14.6, "2026-11-26"),
)

# The accuracy that a recipe is for: the lab's bar of its section, or what its name says.
AIMS: Mapping[str, float] = {
    "lab_mlp": 0.45,
    "lab_cnn": 0.62,
    "lab_final": 0.75,
    "fast75": 0.75,
    "fast94": 0.94,
    "fast95": 0.95,
    "fast96": 0.96,
}

# Weights of the model, without the optimiser's, for images of 32x32x3 and ten classes.
PARAMETERS: Mapping[str, int] = {
    "lab_mlp": 1_707_274,
    "lab_cnn": 714_202,
    "lab_dropout": 714_202,
    "lab_batchnorm": 715_930,
    "lab_final": 1_856_650,
    "fast75": 498_680,
    "fast94": 1_973_944,
    "fast95": 4_608_312,
    "fast96": 9_921_848,
}


def records_of(recipe: str) -> list[Record]:
    """The records of a recipe, in the order in which they are kept.

    Args:
      recipe: its name.

    Raises:
      ConfigError: if no recipe of that name has a record.
    """
    check_choice("recipe", recipe, PARAMETERS)
    return [record for record in RECORDS if record.recipe == recipe]
