"""Whole runs of a recipe by a PyTorch loop: a speednet trained by Muon, then the final evaluation.

    python benchmarks/torch_trials.py    # a worker: see `worker.serve`; started by torch_peer.py

The first line on stdin says what to run: recipe (the fields of a `Recipe`, none of them "auto"),
augment (its parts, as `parse_augment` returns them), read ("test" or "validation"), device ("cpu"
or "gpu"), data_dir, compile (one of `COMPILE_MODES`).

The loop is written in the style of the airbench speed records.  What is done for speed: images stay
on the device, channels last; an epoch is shuffled and augmented at once, by one gather of pixels;
kernels of one shape are orthogonalised together; loss, update by Muon and evaluation are compiled
as `compile` says; once training has begun nothing is read back before its end.  Of a recipe in half
precision all but BatchNorm's parameters is float16 on a GPU, unscaled, which the loss, summed over
the batch, allows, and on a CPU float32 with bfloat16 by autocast; Muon's products are in bfloat16.
Model, optimiser and compiled step are made once and serve all seeds.

Source: K. Jordan, airbench94_muon (2024), for what is done where; the code is this project's own.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import nets
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import worker
from torch import nn

from cifarflow.data.dataset import load_data
from cifarflow.errors import ConfigError, DataError, NonFiniteError

COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune")
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_BATCH_NORM_EPSILON = 1e-12
# Of the polynomial that each Newton-Schulz step applies to the singular values.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 3
_EPSILON = 1e-7
_WHITENING_IMAGES, _WHITENING_EPSILON = 5_000, 5e-4
# Images whose patches are in memory at once.
_IMAGES_AT_ONCE = 1_000
# A brightness is in units of that many of the 0..1 scale, see `cifarflow.data.augment`.
_PIXEL_STD = 0.25
_EVALUATED_AT_ONCE = {"cuda": 2_000, "cpu": 500}
_WARM_UP_STEPS = 8
# Weight, row and column of the crop in an image with one pixel around it, and whether it is
# mirrored; the first is the image itself.
_VIEWS = {
    "none": ((1.0, 1, 1, False),),
    "mirror": ((1 / 2, 1, 1, False), (1 / 2, 1, 1, True)),
    "multicrop": tuple(
        (weight, corner, corner, mirrored)
        for weight, corner in ((1 / 4, 1), (1 / 8, 0), (1 / 8, 2))
        for mirrored in (False, True)
    ),
}


class Speednet(nn.Module):
    """`cifarflow.models.speednet` in PyTorch: normalised images [B, 3, H, W] -> logits float32.

    Args:
      options: the recipe's model_options.
      num_classes: how many outputs.
      device: where the parameters are.
      dtype: of the parameters, BatchNorm's aside, which are float32.
      autocast: whether all but the whitening computes in bfloat16.

    Attributes:
      trained: the trained parameters by their paths in the Keras model.
      kernels: the paths of those that Muon trains.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        num_classes: int = nets.CLASSES,
        device: Any = "cpu",
        dtype: Any = torch.float32,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        widths = options.get("widths", nets.SPEEDNET_WIDTHS)
        widths = widths if isinstance(widths, (list, tuple)) else (widths,)
        self._convs_per_block = options.get("convs_per_block", 2)
        self._residual = options.get("residual", False)
        self._activation = ACTIVATIONS[options.get("activation", "gelu")]
        self._logit_scale = options.get("logit_scale", 1 / 9)
        self._logit_stddev = options.get("logit_stddev")
        self._autocast = autocast
        momentum = 1 - options.get("batch_norm_momentum", 0.6)
        size = options.get("whitening_size", 2)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = 2 * 3 * size**2
        self.whitening = nn.Conv2d(3, channels, size, **where)
        self.whitening.weight.requires_grad_(False)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        names = []
        for block, width in enumerate(widths, 1):
            for number in range(1, self._convs_per_block + 1):
                self.convs.append(nn.Conv2d(channels, width, 3, padding=1, bias=False, **where))
                norm = nn.BatchNorm2d(width, _BATCH_NORM_EPSILON, momentum, device=device)
                norm.weight.requires_grad_(False)
                # Counting batches would be one more kernel a layer and step.
                norm.num_batches_tracked = None
                self.norms.append(norm)
                names.append(f"block{block}_{number}")
                channels = width
        self.classifier = nn.Linear(channels, num_classes, bias=False, **where)
        self.to(memory_format=torch.channels_last)
        layers = list(zip(names, self.convs, self.norms, strict=True))
        self.kernels = tuple(f"{name}_conv/kernel" for name in names)
        head = "classifier/kernel" if self._logit_scale != 1 else "logits/kernel"
        self.trained: dict[str, Any] = {
            "whitening/bias": self.whitening.bias,
            **{f"{name}_conv/kernel": conv.weight for name, conv, _ in layers},
            **{f"{name}_norm/beta": norm.bias for name, _, norm in layers},
            head: self.classifier.weight,
        }

    @torch.no_grad()
    def reset(self, generator: Any) -> None:
        """Draws all weights anew but those of the whitening, which `whiten` sets.

        Args:
          generator: a `torch.Generator` on the parameters' device.
        """

        def draw(parameter: Any, limit: float) -> None:
            # In float32 whatever it is kept in.
            values = torch.empty(parameter.shape, device=parameter.device)
            parameter.copy_(values.uniform_(-limit, limit, generator=generator))

        draw(self.whitening.bias, self.whitening.weight[0].numel() ** -0.5)
        for conv in self.convs:
            weight = conv.weight
            draw(weight, weight[0].numel() ** -0.5)
            # The first filters pass one channel each.
            count = min(weight.shape[:2])
            weight[:count] = 0
            passed = torch.arange(count, device=weight.device)
            weight[passed, passed, 1, 1] = 1
        for norm in self.norms:
            norm.bias.zero_()
            norm.running_mean.zero_()
            norm.running_var.fill_(1)
        stddev, inputs = self._logit_stddev, self.classifier.weight.shape[1]
        draw(self.classifier.weight, inputs**-0.5 if stddev is None else 3**0.5 * stddev)

    @torch.no_grad()
    def whiten(self, images: Any) -> None:
        """Sets the first layer's filters from normalised training images [N, H, W, 3]."""
        weight = self.whitening.weight
        size = weight.shape[-1]
        half = len(weight) // 2
        rows, columns = images.shape[1] - size + 1, images.shape[2] - size + 1
        places = list(itertools.product(range(size), repeat=2))
        images = images[:_WHITENING_IMAGES]
        products = torch.zeros(half, half, dtype=torch.float64, device=images.device)
        for some in images.split(_IMAGES_AT_ONCE):
            # In 64 bits: the smallest eigenvalues are a ten-thousandth of the largest.
            some = some.double()
            patches = torch.cat([some[:, r : r + rows, c : c + columns] for r, c in places], -1)
            patches = patches.flatten(1, 2)
            # Image by image: one product of so long matrices would keep one multiprocessor busy.
            products += (patches.mT @ patches).sum(0)
        # So small a matrix takes the processor less time than a GPU.
        values, vectors = np.linalg.eigh(products.cpu().numpy() / (len(images) * rows * columns))
        filters = (vectors / np.sqrt(np.maximum(values, 0) + _WHITENING_EPSILON))[:, ::-1]
        filters = filters * np.sign(filters[np.abs(filters).argmax(0), np.arange(half)])
        kernel = np.concatenate([filters, -filters], axis=1).T.reshape(2 * half, size, size, 3)
        weight.copy_(torch.tensor(kernel.transpose(0, 3, 1, 2).astype(np.float32)))

    def forward(self, images: Any, trains_bias: bool = True) -> Any:
        """See the class; with `trains_bias` False the whitening's bias gets no gradient."""
        bias = self.whitening.bias if trains_bias else self.whitening.bias.detach()
        # Not in bfloat16, which has too few digits for what the filters enlarge.
        x = F.conv2d(images, self.whitening.weight, bias)
        if not self._autocast:
            return self._rest(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self._rest(x.bfloat16())

    def _rest(self, x: Any) -> Any:
        act, last = self._activation, self._convs_per_block - 1
        x = act(x)
        first = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            number = index % self._convs_per_block
            x = conv(x)
            if number == 0:
                x = F.max_pool2d(x, 2)
            x = norm(x)
            if self._residual and number == last:
                x = x + first
            x = act(x)
            if number == 0:
                first = x
        x = F.max_pool2d(x, x.shape[2:]).flatten(1)
        return (self.classifier(x) * self._logit_scale).float()


class Rates(NamedTuple):
    """At which rates the parameters are trained, in PyTorch's terms: of a loss summed over a batch.

    Attributes:
      muon: that of the kernels.
      groups: (rate, L2, paths) of the others, for `torch.optim.SGD`.
    """

    muon: float
    groups: tuple[tuple[float, float, tuple[str, ...]], ...]


def rates_of(recipe: Mapping[str, Any], paths: Sequence[str], kernels: Sequence[str]) -> Rates:
    """The peak rates of a recipe for the parameters of these paths.

    A recipe's scale and L2 belong to the gradient of the mean loss: `lr * (scale * g + l2 * w)`.
    With a rate of `lr * scale / batch_size` the sum's gradient does the same, and L2 must be
    divided by what the rate was multiplied by.

    Args:
      recipe: the recipe's fields.
      paths: of all trained parameters.
      kernels: those among them that Muon trains.
    """
    peak, size = recipe["learning_rate"], recipe["batch_size"]
    factor = size / (recipe["learning_rate_examples"] or size)
    scales = recipe["learning_rate_scales"] or {}
    groups: dict[tuple[float, float], list[str]] = {}
    for path in paths:
        if path in kernels:
            continue
        found = [factor * scale for part, scale in scales.items() if re.search(part, path)]
        rate = peak * (found[0] if found else 1.0) / size
        decays = recipe["decay_biases"] or path.endswith("/kernel")
        l2 = factor * recipe["l2"] * peak / rate if decays else 0.0
        groups.setdefault((rate, l2), []).append(path)
    return Rates(peak, tuple((*key, tuple(names)) for key, names in groups.items()))


def one_cycle(recipe: Mapping[str, Any], total_steps: int) -> list[float]:
    """The share of the peak rate at each step, see `cifarflow.optimizers.schedules.OneCycle`."""
    start, end = recipe["start_fraction"], recipe["end_fraction"]
    peak_step = int(recipe["peak_fraction"] * total_steps)
    shares = []
    for step in range(total_steps):
        if step < peak_step:
            shares.append(start + (1 - start) * step / peak_step)
        else:
            shares.append(1 + (end - 1) * (step - peak_step) / max(1, total_steps - peak_step))
    return shares


def orthogonalize(matrices: Any, *, dtype: Any) -> Any:
    """Brings the singular values of matrices [K, rows, columns] towards 1, as float32.

    Args:
      matrices: of floating point.
      dtype: of the matrix products.
    """
    x = matrices.float()
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + _EPSILON)).to(dtype)
    standing = x.shape[1] > x.shape[2]
    x = x.mT if standing else x
    a, b, c = _COEFFICIENTS
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if standing else x).float()


def muon_step(
    weights: Sequence[Any],
    gradients: Sequence[Any],
    velocities: Sequence[Any],
    rate: Any,
    *,
    momentum: float,
    dtype: Any,
) -> None:
    """One update of kernels by Muon's rule, see `cifarflow.optimizers.muon.Muon`; in place.

    Kernels of one shape are orthogonalised together.

    Args:
      weights: [filters, channels, rows, columns] each, channels last in memory.
      gradients: of the same shapes.
      velocities: the same, 0 at first.
      rate: scalar tensor, so that one compiled step serves all rates.
      momentum: with Nesterov's look ahead.
      dtype: of the matrix products.
    """
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_add_(velocities, gradients)
    directions = torch._foreach_add(gradients, velocities, alpha=momentum)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, weight in enumerate(weights):
        by_shape.setdefault(tuple(weight.shape), []).append(index)
    for (filters, channels, rows, columns), places in by_shape.items():
        # In the order in memory: an order of the columns changes nothing but that of the result.
        matrices = [directions[i].permute(0, 2, 3, 1).reshape(filters, -1) for i in places]
        updates = orthogonalize(torch.stack(matrices), dtype=dtype)
        for index, update in zip(places, updates.unbind(), strict=True):
            weight = weights[index]
            wide = weight.float()
            kernel = update.view(filters, rows, columns, channels).permute(0, 3, 1, 2)
            weight.copy_(wide * (filters**0.5 / wide.norm()) - rate * kernel)


class Optimizer:
    """Muon for the kernels of convolutions, `torch.optim.SGD` for the rest, one schedule for both.

    Args:
      net: what to train.
      recipe: the recipe's fields.
      total_steps: of a run.
      compile_mode: one of `COMPILE_MODES`; but for "none" the update by Muon is compiled, too.
    """

    def __init__(
        self,
        net: Speednet,
        recipe: Mapping[str, Any],
        *,
        total_steps: int,
        compile_mode: str = "none",
    ) -> None:
        rates = rates_of(recipe, list(net.trained), net.kernels)
        self._shares = one_cycle(recipe, total_steps)
        self._kernels = [net.trained[path] for path in net.kernels]
        # Aliases without a gradient, so that an update in place is no matter of autograd.
        self._weights = [kernel.detach() for kernel in self._kernels]
        self._velocities = [torch.zeros_like(weight) for weight in self._weights]
        device = self._weights[0].device
        self._peak, self._rate = rates.muon, torch.zeros((), device=device)
        self._momentum = recipe["muon_momentum"]
        self._dtype = torch.float32 if recipe["precision"] == "float32" else torch.bfloat16
        self._muon_step: Any = muon_step
        if compile_mode != "none":
            self._muon_step = torch.compile(muon_step, mode=compile_mode, dynamic=False)
        groups: list[dict[str, Any]] = [
            {"params": [net.trained[path] for path in paths], "lr": rate, "weight_decay": l2}
            for rate, l2, paths in rates.groups
        ]
        self.sgd = torch.optim.SGD(
            groups, momentum=recipe["momentum"], nesterov=recipe["nesterov"], fused=True
        )
        self._peaks = [rate for rate, _, _ in rates.groups]

    def reset(self) -> None:
        """Brings all velocities to rest."""
        for velocity in self._velocities:
            velocity.zero_()
        for state in self.sgd.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].zero_()

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Applies the gradients of step 0, 1, ... and drops them."""
        share = self._shares[step]
        # No copy from the host, which would have to wait: the number goes with the kernel's start.
        self._rate.fill_(share * self._peak)
        self._muon_step(
            self._weights,
            [kernel.grad for kernel in self._kernels],
            self._velocities,
            self._rate,
            momentum=self._momentum,
            dtype=self._dtype,
        )
        for group, peak in zip(self.sgd.param_groups, self._peaks, strict=True):
            group["lr"] = share * peak
        self.sgd.step()
        for kernel in self._kernels:
            kernel.grad = None
        self.sgd.zero_grad(set_to_none=True)


def _reflected(index: Any, size: int) -> Any:
    """Mirrors an index that left [0, size) back inside, the edge itself not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def take(images: Any, examples: Any, rows: Any, columns: Any) -> Any:
    """Pixel (rows[i, r], columns[i, c]) of images[examples[i]] as [N, H, W, C], in one gather.

    Args:
      images: [M, H, W, C].
      examples: [N] int64.
      rows: [N or 1, H] int64, may be up to H - 1 outside: the image is reflected at its edges.
      columns: [N or 1, W] int64, likewise.
    """
    rows, columns = _reflected(rows, images.shape[1]), _reflected(columns, images.shape[2])
    return images[examples[:, None, None], rows[:, :, None], columns[:, None, :]]


@functools.cache
def _statistics(device: Any) -> tuple[Any, Any]:
    """Mean and standard deviation [3] of the channels on the 0..1 scale.

    Made once: a device might have to wait for a copy from the host.
    """
    return torch.tensor(nets.MEAN, device=device), torch.tensor(nets.STD, device=device)


def relight(images: Any, *, contrast: Any = None, brightness: Any = None) -> Any:
    """What `cifarflow.data.augment` does to pixels on the 0..255 scale, of normalised images.

    There an image's pixels keep their mean over all channels, and one number is added to all;
    here mean and number are another in each channel.

    Args:
      images: [N, H, W, 3] normalised; is written over if there is no contrast.
      contrast: [N] float32, the factor less 1; None for 0.
      brightness: [N] float32, 1 for a quarter of the scale; None for 0.

    Returns:
      [N, H, W, 3] of the same dtype.
    """
    if contrast is None and brightness is None:
        return images
    mean, std = _statistics(images.device)
    offset = torch.zeros(len(images), 1, device=images.device)
    if brightness is not None:
        offset = offset + _PIXEL_STD * brightness[:, None]
    if contrast is not None:
        means = images.mean((1, 2), dtype=torch.float32)
        level = (means * std + mean).mean(1, keepdim=True)
        # mean + std * new = level + (1 + contrast) * (mean + std * old - level) + offset
        offset = offset + contrast[:, None] * (mean - level)
    offset = (offset / std).to(images.dtype)[:, None, None, :]
    if contrast is None:
        return images.add_(offset)
    return torch.addcmul(offset, images, (1 + contrast).to(images.dtype)[:, None, None, None])


class Augment:
    """A recipe's augmentation of many normalised images at once, on their device.

    Args:
      parts: "altflip" or "flip", "crop", "brightness" and "contrast", as `parse_augment` has them.
    """

    def __init__(self, parts: Mapping[str, Any]) -> None:
        self._parts = dict(parts)

    def start(self, count: int, generator: Any) -> Any:
        """What a run needs for `count` images: those that "altflip" mirrors in even epochs."""
        return torch.rand(count, device=generator.device, generator=generator) < 0.5

    def __call__(
        self, images: Any, examples: Any, *, mirrored: Any, epoch: int, generator: Any
    ) -> Any:
        """Draws views of images.

        Args:
          images: [M, H, W, C].
          examples: [N] int64, which of them.
          mirrored: what `start` returned.
          epoch: 0 for the first.
          generator: on their device.

        Returns:
          [N, H, W, C] of the same dtype.
        """
        parts, device, count = self._parts, images.device, len(examples)
        height, width = images.shape[1:3]
        rows = torch.arange(height, device=device)[None, :]
        columns = torch.arange(width, device=device)[None, :]
        if "crop" in parts:
            most = parts["crop"]
            drawn = {"size": (2, count, 1), "device": device, "generator": generator}
            down, right = torch.randint(-most, most + 1, **drawn)
            rows, columns = rows + down, columns + right
        flip = None
        if "altflip" in parts:
            flip = mirrored[examples] ^ bool(epoch % 2)
        elif "flip" in parts:
            flip = torch.rand(count, device=device, generator=generator) < 0.5
        if flip is not None:
            columns = torch.where(flip[:, None], width - 1 - columns, columns)
        light = {
            name: parts[name] * (2 * torch.rand(count, device=device, generator=generator) - 1)
            for name in ("contrast", "brightness")
            if name in parts
        }
        return relight(take(images, examples, rows, columns), **light)


class TorchTrials:
    """A recipe as a PyTorch loop, to be run with many seeds: what `Trials` is in TensorFlow.

    Args:
      spec: see the module.

    Attributes:
      facts: what the worker says of itself: steps, steps_per_epoch, train_images, read_images,
        parameters, precision, compile, torch (its version) and device; and compile_seconds, what
        the warm-up took, as `Trials` has it: with compiling, without loading and building.

    Raises:
      ConfigError: if there is no GPU to use, or the batch is larger than the set.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        recipe = self._recipe = spec["recipe"]
        on_gpu = spec["device"] == "gpu"
        if on_gpu and not torch.cuda.is_available():
            raise ConfigError("--device=gpu needs a PyTorch built for the GPU: this one is not")
        device = self._device = torch.device("cuda" if on_gpu else "cpu")
        torch.set_num_threads(worker.count_cores())
        torch.set_flush_denormal(True)  # as TensorFlow does
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # as TensorFlow has it on a GPU
        is_half = recipe["precision"] != "float32"
        # Of images, and of all parameters but BatchNorm's.
        self._dtype = torch.float16 if is_half and on_gpu else torch.float32
        dataset = load_data(
            recipe["data"],
            spec["data_dir"],
            validation_fraction=recipe["validation_fraction"],
            validation_split=recipe["validation_split"],
        )
        if recipe["limit_examples"] not in (0, len(dataset.train)):
            dataset = dataset.limit(recipe["limit_examples"])
        split = dataset.test if spec["read"] == "test" else dataset.validation
        if not len(split):
            raise DataError(f"the data set {dataset.name!r} must have {spec['read']} images, not 0")
        self._train, self._labels = self._upload(dataset.train)
        self._read, self._read_labels = self._upload(split)
        self._batch_size = recipe["batch_size"]
        self._steps_per_epoch = len(self._train) // self._batch_size
        if not self._steps_per_epoch:
            raise ConfigError(
                f"batch_size must be at most the {len(self._train)} training examples, "
                f"not {self._batch_size}"
            )
        self._total_steps = max(1, round(recipe["epochs"] * self._steps_per_epoch))
        self._augment = Augment(spec["augment"])
        self._generator = torch.Generator(device)
        self._net = Speednet(
            recipe["model_options"] or {},
            num_classes=dataset.num_classes,
            device=device,
            dtype=self._dtype,
            autocast=is_half and not on_gpu,
        )
        mode = spec["compile"]
        self._optimizer = Optimizer(
            self._net, recipe, total_steps=self._total_steps, compile_mode=mode
        )
        # In these a compiled call's results are overwritten by those of the next step's.
        self._marks_steps = mode in ("reduce-overhead", "max-autotune")
        net, smoothing = self._net, recipe["label_smoothing"]

        def loss_of(images: Any, labels: Any, trains_bias: bool) -> Any:
            logits = net(images, trains_bias)
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

        def outputs_of(images: Any) -> Any:
            return net(images, False)

        self._loss_of: Any = loss_of
        self._outputs_of: Any = outputs_of
        if mode != "none":
            self._loss_of = torch.compile(loss_of, mode=mode, dynamic=False)
            self._outputs_of = torch.compile(outputs_of, mode=mode, dynamic=False)
        precision = "float32"
        if is_half:
            precision = "float16" if on_gpu else "bfloat16 by autocast"
        self.facts: dict[str, Any] = {
            "steps": self._total_steps,
            "steps_per_epoch": self._steps_per_epoch,
            "train_images": len(self._train),
            "read_images": len(self._read),
            "parameters": sum(p.numel() for p in self._net.trained.values()),
            "precision": precision,
            "compile": mode,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }

    def round(self, steps: int) -> float:
        """The warm-up: some steps of both kinds, and an evaluation of black images.

        Args:
          steps: not used; `worker.serve` calls this once, with a number of steps.

        Returns:
          Its seconds, which are `compile_seconds` of the facts too.
        """
        start = time.perf_counter()
        self._start_again(0)
        images = self._normalised(self._train)
        self._net.whiten(images)
        # As large as in a run, so that the memory for it is there; several steps of each kind, as
        # CUDA graphs are recorded after a few only.
        batches = self._epoch(images, 0, min(self._steps_per_epoch, self._total_steps))
        some = list(itertools.islice(batches, min(_WARM_UP_STEPS, self._total_steps)))
        # First with all gradients: the fused kernel takes velocities all of them or none.
        for trains_bias in dict.fromkeys(map(self._trains_bias, (0, self._total_steps - 1))):
            for step, batch in enumerate(some):
                self._train_step(step, *batch, trains_bias=trains_bias)
        self._evaluate(torch.zeros_like(self._read))
        self._wait()
        seconds = time.perf_counter() - start
        self.facts["compile_seconds"] = seconds
        return seconds

    def run(self, seed: int) -> dict[str, Any]:
        """Trains from the beginning with a seed, and evaluates at the end.

        Returns:
          The figures of a `cifarflow.trials.Trial` that the worker knows.

        Raises:
          NonFiniteError: if an output in the end is not finite.
        """
        self._start_again(seed)
        self._wait()
        start = time.perf_counter()
        images = self._normalised(self._train)
        self._net.whiten(images)
        self._wait()
        begin = time.perf_counter()
        step = 0
        for epoch in itertools.count():
            count = min(self._steps_per_epoch, self._total_steps - step)
            if not count:
                break
            for batch in self._epoch(images, epoch, count):
                self._train_step(step, *batch, trains_bias=self._trains_bias(step))
                step += 1
        self._wait()
        end = time.perf_counter()
        outputs = self._evaluate(self._read)
        hits = (outputs.argmax(1) == self._read_labels).sum().item()
        seconds = time.perf_counter() - start
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(
                f"the outputs of PyTorch's seed {seed} are not finite after the last step: try a "
                f"smaller learning_rate than {self._recipe['learning_rate']:g}"
            )
        loss = F.cross_entropy(
            outputs, self._read_labels, label_smoothing=self._recipe["label_smoothing"]
        )
        return {
            "seconds": seconds,
            "train_seconds": end - begin,
            "accuracy": hits / len(self._read),
            "loss": loss.item(),
            "weights_sha256": self._hash_weights(),
        }

    def _upload(self, split: Any) -> tuple[Any, Any]:
        """Images [N, H, W, C] uint8 and labels [N] int64 of a `Split` on the device."""
        # Copies: a tensor would share the memory of arrays that may not be written to.
        images = torch.tensor(split.images, device=self._device)
        return images, torch.tensor(split.labels, dtype=torch.int64, device=self._device)

    def _normalised(self, images: Any) -> Any:
        """uint8 pixels with mean 0 and standard deviation 1, rounded once."""
        mean, std = _statistics(self._device)
        return torch.addcmul(-mean / std, images.float(), 1 / (255 * std)).to(self._dtype)

    def _wait(self) -> None:
        """Until the device has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _start_again(self, seed: int) -> None:
        self._generator.manual_seed(seed)
        self._net.reset(self._generator)
        self._optimizer.reset()
        self._net.train()
        self._mirrored = self._augment.start(len(self._train), self._generator)

    def _trains_bias(self, step: int) -> bool:
        """Whether the whitening's bias still trains at a step."""
        frozen = (self._recipe["freeze"] or {}).values()
        ends = [round(epochs * self._steps_per_epoch) for epochs in frozen]
        return all(step < end for end in ends)

    def _epoch(self, images: Any, epoch: int, steps: int) -> Iterator[tuple[Any, Any]]:
        """The batches of one epoch, of normalised images [M, H, W, C]."""
        used = steps * self._batch_size
        order = torch.randperm(len(images), device=self._device, generator=self._generator)[:used]
        views = self._augment(
            images, order, mirrored=self._mirrored, epoch=epoch, generator=self._generator
        )
        # A view: channels stay last in memory.
        views = views.permute(0, 3, 1, 2)
        labels = self._labels[order]
        yield from zip(views.split(self._batch_size), labels.split(self._batch_size), strict=True)

    def _train_step(self, step: int, images: Any, labels: Any, *, trains_bias: bool) -> None:
        if self._marks_steps:
            torch.compiler.cudagraph_mark_step_begin()
        self._loss_of(images, labels, trains_bias).backward()
        self._optimizer.step(step)

    @torch.no_grad()
    def _evaluate(self, images: Any) -> Any:
        """Outputs [N, classes] float32 for uint8 images, by the rule of `cifarflow.predict`."""
        self._net.train(False)
        images = self._normalised(images)
        plain, *others = _VIEWS[self._recipe["tta"]]
        outputs = self._outputs(images)
        if others:
            count = max(1, round(self._recipe["tta_share"] * len(images)))
            confidence = outputs.softmax(1).amax(1)
            chosen = confidence.argsort(stable=True)[:count]
            mean = plain[0] * outputs[chosen]
            rows = torch.arange(images.shape[1], device=self._device)[None, :]
            columns = torch.arange(images.shape[2], device=self._device)[None, :]
            for weight, row, column, mirrored in others:
                across = columns.flip(1) if mirrored else columns
                view = take(images, chosen, rows + row - 1, across + column - 1)
                mean += weight * self._outputs(view)
            outputs[chosen] = mean
        self._net.train()
        return outputs

    def _outputs(self, images: Any) -> Any:
        """Outputs of normalised images [N, H, W, C], in batches as equal as may be."""
        count = math.ceil(len(images) / _EVALUATED_AT_ONCE[self._device.type])
        found = []
        for batch in images.permute(0, 3, 1, 2).tensor_split(count):
            if self._marks_steps:
                torch.compiler.cudagraph_mark_step_begin()
            # A copy: a compiled call may write its results where the last one's are.
            found.append(self._outputs_of(batch).clone())
        return torch.cat(found)

    def _hash_weights(self) -> str:
        digest = hashlib.sha256()
        for value in self._net.state_dict().values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


if __name__ == "__main__":
    worker.serve(TorchTrials)
