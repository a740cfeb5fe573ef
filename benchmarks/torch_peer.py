"""A recipe by a PyTorch loop beside ours: a process of its own that is asked for a run a seed.

    check_recipe(recipe)                       # what the loop cannot run is found out at once
    peer = TorchPeer(trials, dataset, settings, read="test")
    with contextlib.ExitStack() as stack:
        run = peer.start(stack)
        print(run(0).accuracy)

The loop is `torch_trials.py`, which this process does not import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import harness
import nets
import trial_runs

from cifarflow.data.augment import parse_augment
from cifarflow.data.splits import Dataset
from cifarflow.errors import ConfigError, check_choice, check_int
from cifarflow.models.layers import check_sizes
from cifarflow.optimizers.sgd import check_pattern
from cifarflow.recipes.recipe import Recipe
from cifarflow.trials import Trial, Trials

COMPILE_CHOICES = ("auto", "none", "default", "reduce-overhead", "max-autotune")
_SCRIPT = pathlib.Path(__file__).with_name("torch_trials.py")
# As `torch_trials.ACTIVATIONS`.
ACTIVATIONS = ("relu", "gelu", "silu")
_OPTIONS = (
    "widths",
    "convs_per_block",
    "residual",
    "whitening_size",
    "activation",
    "batch_norm_momentum",
    "logit_scale",
    "logit_stddev",
)
# What the loop has no other way for, by the recipe's field.
_FIXED = {
    "model": "speednet",
    "optimizer": "muon",
    "scaled_velocity": False,
    "schedule": "one_cycle",
    "warmup_epochs": 0.0,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "averaging": "none",
}
_AUGMENTATIONS = ("flip", "altflip", "crop", "brightness", "contrast")
_FROZEN = "whitening/bias"


class Paths(NamedTuple):
    """The variables of a speednet that are trained, by their paths.

    Attributes:
      kernels: those of convolutions, which Muon trains.
      others: all others.
    """

    kernels: tuple[str, ...]
    others: tuple[str, ...]


def trained_paths(options: Mapping[str, Any]) -> Paths:
    """What is trained of the speednet with these model_options.

    Raises:
      ConfigError: if widths are not sizes, or convs_per_block is no whole number >= 1.
    """
    widths = check_sizes("widths", options.get("widths", nets.SPEEDNET_WIDTHS))
    convs = check_int("convs_per_block", options.get("convs_per_block", 2))
    layers = [
        f"block{block}_{number}"
        for block in range(1, len(widths) + 1)
        for number in range(1, convs + 1)
    ]
    head = "classifier/kernel" if options.get("logit_scale", 1 / 9) != 1 else "logits/kernel"
    return Paths(
        tuple(f"{layer}_conv/kernel" for layer in layers),
        (_FROZEN, *(f"{layer}_norm/beta" for layer in layers), head),
    )


def check_recipe(recipe: Recipe) -> None:
    """Checks that the loop can run a recipe, and that PyTorch is there.

    Raises:
      ConfigError: if not.
    """
    flag = "--compare=torch"
    for field, value in _FIXED.items():
        found = getattr(recipe, field)
        if found != value:
            raise ConfigError(f"{flag} needs a recipe with {field}={value}, not {found!r}")
    options = recipe.model_options or {}
    for name in options:
        check_choice(f"model_options of a recipe for {flag}", name, _OPTIONS)
    check_choice(
        f"activation of a recipe for {flag}", options.get("activation", "gelu"), ACTIVATIONS
    )
    for part in parse_augment(recipe.augment):
        check_choice(f"augment of a recipe for {flag}", part, _AUGMENTATIONS)
    paths = trained_paths(options)
    for part in recipe.freeze or {}:
        check_pattern("freeze's keys", part)
        if [path for path in (*paths.kernels, *paths.others) if re.search(part, path)] != [_FROZEN]:
            raise ConfigError(f"{flag} needs a recipe that freezes {_FROZEN} alone, not {part!r}")
    for part, scale in (recipe.learning_rate_scales or {}).items():
        check_pattern("learning_rate_scales's keys", part)
        if not scale or any(re.search(part, path) for path in paths.kernels):
            raise ConfigError(
                f"{flag} needs learning_rate_scales above 0, and none of convolutions, "
                f"not {part!r}: {scale!r}"
            )
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f'{flag}: torch is not installed: pip install ".[compare]"')


class TorchPeer:
    """The PyTorch loop for the recipe of some trials.

    Args:
      trials: ours, compiled; the loop is told the same recipe, nothing in it "auto".
      dataset: the images of the recipe, which the process loads by itself.
      settings: the flags of all benchmarks.
      read: "test" or "validation", the images that a run reads in the end.
      compile_mode: one of `COMPILE_CHOICES`; "auto" is "default" on a GPU and "none" on a CPU.

    Attributes:
      name: what its runs go by.
    """

    def __init__(
        self,
        trials: Trials,
        dataset: Dataset,
        settings: harness.Settings,
        *,
        read: str = "test",
        compile_mode: str = "auto",
    ) -> None:
        self.name = f"{trials.recipe.name} by PyTorch"
        self._trials, self._dataset, self._read = trials, dataset, read
        if compile_mode == "auto":
            compile_mode = "default" if settings.device == "gpu" else "none"
        self._spec = {
            "recipe": trials.recipe.to_json(),
            "augment": parse_augment(trials.recipe.augment),
            "read": read,
            "device": settings.device,
            "data_dir": settings.data_dir,
            "compile": compile_mode,
        }
        self._facts: dict[str, Any] = {}

    def start(self, stack: contextlib.ExitStack) -> Callable[[int], Trial]:
        """Starts the process, which compiles and warms up.

        Args:
          stack: ends it.

        Returns:
          A function of the seed that runs one trial, and prints its line.
        """
        worker = stack.enter_context(harness.Worker(self.name, _SCRIPT, self._spec))
        self._facts = facts = worker.facts
        split = trial_runs.split_of(self._dataset, self._read)
        ours = (self._trials.total_steps, len(self._dataset.train), len(split))
        theirs = tuple(facts[name] for name in ("steps", "train_images", "read_images"))
        if ours != theirs:
            raise RuntimeError(f"{self.name} does other steps, or of other images: {ours} {theirs}")
        print(
            f"{self.name}: compiled in {facts['compile_seconds']:.1f} s; torch "
            f"{facts['torch']}, {facts['precision']}, compile={facts['compile']}, "
            f"{facts['device']}",
            file=sys.stderr,
        )

        def run(seed: int) -> Trial:
            found = worker.ask("run", seed=seed)
            trial = Trial(
                seed=seed,
                steps=facts["steps"],
                epochs=facts["steps"] / facts["steps_per_epoch"],
                read=self._read,
                curve=(),
                **found,
            )
            print(
                f"{self.name}, seed {seed}: {trial.read} accuracy {trial.accuracy:.4f} in "
                f"{trial.seconds:.1f} s",
                flush=True,
            )
            return trial

        return run

    def to_json(self, runs: Sequence[Trial]) -> dict[str, Any]:
        """The recipe and its runs, as `trial_runs.to_json` has ours, and `torch`: how they ran."""
        return {
            **trial_runs.to_json(self._trials, runs, self._dataset),
            "name": self.name,
            "compile_seconds": self._facts["compile_seconds"],
            "torch": {name: self._facts[name] for name in ("torch", "precision", "compile")},
        }
