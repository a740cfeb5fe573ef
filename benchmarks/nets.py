"""The sizes of the nets that are compared, written once for the Keras twins and the PyTorch twins.

They are those of the recipes and builders of cifarflow; the benchmark checks that each twin has as
many trainable parameters as the original.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Cnn:
    """[conv 5x5 -> (BatchNorm) -> ReLU -> 2x2 max pool -> dropout]..., dense block, logits.

    Attributes:
      filters: of each convolution.
      units: width of the hidden dense layer.
      dropout: rate after each pool and after the hidden dense layer; 0 for no layer.
      batch_norm_momentum: Keras's, the weight of the running value; None for no BatchNorm.
    """

    filters: tuple[int, ...] = (96, 80)
    units: int = 256
    dropout: tuple[float, ...] = (0.0, 0.0, 0.0)
    batch_norm_momentum: float | None = None


CNNS: Mapping[str, Cnn] = {
    "lab_cnn": Cnn(),
    "lab_dropout": Cnn(dropout=(0.25, 0.25, 0.5)),
    "lab_batchnorm": Cnn(dropout=(0.25, 0.25, 0.5), batch_norm_momentum=0.75),
    "lab_final": Cnn((64, 128), 512, (0.25, 0.3, 0.5), 0.8),
}
MLP_UNITS = (512, 256)  # tanh
RESNET_WIDTHS, RESNET_BLOCKS = (16, 32, 64), 3  # of each stage: 20 layers
SPEEDNET_WIDTHS = (64, 256, 256)
NETS = ("lab_mlp", *CNNS, "resnet", "speednet")
# One pixel and ten outputs: nothing to compute, so what its step takes is what a step costs.
EMPTY = "empty"
# These take images of mean 0 and deviation 1, the others 0..1.
NORMALISED = ("resnet", "speednet")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = 10
