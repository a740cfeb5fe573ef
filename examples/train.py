"""Trains one recipe, evaluates it on the test set once, and draws what came out.

    python examples/train.py
    python examples/train.py --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final
    python examples/train.py --recipe=lab_final --augment=flip,crop:4 --workdir=runs/final --resume

Any field of the recipe is a flag; one that is not given keeps the recipe's value.  Without
CIFAR-10 and without a network it trains on generated stand-in images, and says so.  It is the
command `cifarflow train`, for a clone of which nothing is installed.
"""

from __future__ import annotations

from cifarflow import cli
from cifarflow.commands import train

train.define_flags()
main = train.main

if __name__ == "__main__":
    cli.run(main)
