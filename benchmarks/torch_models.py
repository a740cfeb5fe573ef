"""The nets in PyTorch, written for speed: channels-last, the input scaled inside the model.

    model = build("lab_cnn").to(memory_format=torch.channels_last)
    logits = model(images)                          # [B, 32, 32, 3] uint8 -> [B, 10]

Scaling is inside so that `torch.compile` can fuse it.  Initial weights are PyTorch's own: they do
not change the time.
"""

from __future__ import annotations

import itertools
from typing import Any

import nets
import torch
from torch import nn

_KERAS_EPSILON = 1e-3


class _Scale(nn.Module):
    """uint8 [B, H, W, C], 0..255 -> float32 [B, C, H, W], channels last in memory."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        mean, std = (nets.MEAN, nets.STD) if normalised else ((0.0,) * 3, (1.0,) * 3)
        factor = 1 / (255 * torch.tensor(std))
        offset = -torch.tensor(mean) / torch.tensor(std)
        self.register_buffer("factor", factor.view(3, 1, 1), persistent=False)
        self.register_buffer("offset", offset.view(3, 1, 1), persistent=False)
        self.normalised = normalised

    def forward(self, images: Any) -> Any:
        # A view: the gather gave whole images with their channels last.
        x = images.permute(0, 3, 1, 2).float()
        return x * self.factor + self.offset if self.normalised else x * (1 / 255)


class _FirstPixel(nn.Module):
    """[B, C, H, W] -> [B, C], the top left pixel."""

    def forward(self, images: Any) -> Any:
        return images[:, :, 0, 0]


class _FlattenLast(nn.Module):
    """Flattens [B, C, H, W] in the order it has in memory, without a copy."""

    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1).flatten(1)


class _Residual(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int, width: int, strides: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *_conv_norm(channels, width, 3, strides),
            nn.ReLU(inplace=True),
            *_conv_norm(width, width, 3, 1),
        )
        changes = strides > 1 or channels != width
        self.shortcut = nn.Sequential(*(_conv_norm(channels, width, 1, strides) if changes else []))

    def forward(self, x: Any) -> Any:
        return torch.relu_(self.main(x) + self.shortcut(x))


class _Multiply(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Any) -> Any:
        return x * self.factor


def build(name: str) -> Any:
    """Builds the net of that name; one of `nets.NETS`, or `nets.EMPTY`."""
    scale = _Scale(name in nets.NORMALISED)
    if name == nets.EMPTY:
        return nn.Sequential(scale, _FirstPixel(), nn.Linear(3, nets.CLASSES))
    if name == "lab_mlp":
        return nn.Sequential(scale, _FlattenLast(), *_mlp())
    if name == "resnet":
        return nn.Sequential(scale, *_resnet())
    if name == "speednet":
        return nn.Sequential(scale, *_speednet())
    return nn.Sequential(scale, *_cnn(nets.CNNS[name]))


def count_parameters(model: Any) -> int:
    """The parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _mlp() -> list[Any]:
    sizes = (32 * 32 * 3, *nets.MLP_UNITS)
    parts: list[Any] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after), nn.Tanh()]
    return [*parts, nn.Linear(sizes[-1], nets.CLASSES)]


def _cnn(net: nets.Cnn) -> list[Any]:
    def activated(layer: Any, norm: Any, width: int) -> list[Any]:
        if net.batch_norm_momentum is None:
            return [layer, nn.ReLU(inplace=True)]
        momentum = 1 - net.batch_norm_momentum
        return [layer, norm(width, _KERAS_EPSILON, momentum), nn.ReLU(inplace=True)]

    parts: list[Any] = []
    channels, side = 3, 32
    for filters, rate in zip(net.filters, net.dropout, strict=False):
        parts += activated(nn.Conv2d(channels, filters, 5), nn.BatchNorm2d, filters)
        parts += [nn.MaxPool2d(2), *([nn.Dropout(rate)] if rate else [])]
        channels, side = filters, (side - 4) // 2
    parts.append(_FlattenLast())
    parts += activated(nn.Linear(channels * side * side, net.units), nn.BatchNorm1d, net.units)
    parts += [nn.Dropout(net.dropout[-1])] if net.dropout[-1] else []
    return [*parts, nn.Linear(net.units, nets.CLASSES)]


def _conv_norm(channels: int, width: int, size: int, strides: int) -> list[Any]:
    conv = nn.Conv2d(channels, width, size, strides, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(width, _KERAS_EPSILON, 0.1)]


def _resnet() -> list[Any]:
    channels = nets.RESNET_WIDTHS[0]
    parts: list[Any] = [*_conv_norm(3, channels, 3, 1), nn.ReLU(inplace=True)]
    for stage, width in enumerate(nets.RESNET_WIDTHS):
        for block in range(nets.RESNET_BLOCKS):
            parts.append(_Residual(channels, width, 2 if stage and not block else 1))
            channels = width
    return [*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, nets.CLASSES)]


def _speednet() -> list[Any]:
    def conv(channels: int, width: int) -> Any:
        return nn.Conv2d(channels, width, 3, padding=1, bias=False)

    def normalised(width: int) -> list[Any]:
        norm = nn.BatchNorm2d(width, 1e-12, 0.4)
        norm.weight.requires_grad_(False)
        return [norm, nn.GELU()]

    whitening = nn.Conv2d(3, 24, 2)
    whitening.weight.requires_grad_(False)
    parts, channels = [whitening, nn.GELU()], 24
    for width in nets.SPEEDNET_WIDTHS:
        parts += [conv(channels, width), nn.MaxPool2d(2), *normalised(width)]
        parts += [conv(width, width), *normalised(width)]
        channels = width
    parts += [nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels, nets.CLASSES, bias=False)]
    return [*parts, _Multiply(1 / 9)]
