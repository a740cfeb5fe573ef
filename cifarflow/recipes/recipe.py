"""The recipe: all that decides a training run, as one frozen value.

    recipe = get_recipe("lab_final", learning_rate=0.02, augment="flip,crop:4")
    run = train_recipe(recipe)

A named recipe, the flags of a runner and the keyword arguments of a script are all this one
dataclass.  It is saved with the run, and the run can be repeated from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cifarflow.data.augment import parse_augment
from cifarflow.data.dataset import DATA_CHOICES
from cifarflow.data.pictures import check_image_size
from cifarflow.data.splits import SPLIT_METHODS
from cifarflow.errors import (
    ConfigError,
    check_choice,
    check_float,
    check_int,
    check_micro_batches,
    check_seed,
)
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.untrusted import one_line

# What builds each is in `recipes.build`: to make a recipe nobody waits for TensorFlow.
MODELS = ("mlp", "cnn", "final", "resnet", "speednet")
OPTIMIZERS = ("sgd", "muon")
TTA_CHOICES = ("none", "mirror", "multicrop")
AVERAGINGS = ("none", "lookahead", "ema")
SCHEDULES = ("inverse_time", "constant", "cosine", "one_cycle", "piecewise")


# Arguments of the builders that a recipe sets by its other fields, or from the data.
RESERVED_OPTIONS = {"dtype_policy", "image_shape", "name", "num_classes", "seed", "softmax"}


def _field(default: Any, text: str, choices: Iterable[str] = ()) -> Any:
    """A field with what `--help` says of it."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that decides a training run.

    The fields say what they are in their own help texts, from which the runners' flags come too.

    Raises:
      ConfigError: if a field is out of range, or two do not fit together.
    """

    name: str
    model: str = _field("cnn", "model family", MODELS)
    model_options: Mapping[str, Any] | None = _field(
        None, "arguments of the model's builder, over the recipe's: key=value,... or JSON"
    )
    data: str = _field(
        "auto",
        f"{', '.join(DATA_CHOICES)}, folder (of pictures, in data_dir) or tfds:NAME; "
        "auto: CIFAR-10, or the stand-in set if there is none",
    )
    image_size: int = _field(
        32, "for data=folder and tfds:NAME: the side of the images, others are cropped and resized"
    )
    validation_fraction: float = _field(
        0.2, "share of the training set held out, 0 up to but not 1"
    )
    validation_split: str = _field(
        "last",
        "which are held out: the last in file order, or the same share a class (by one fixed draw)",
        SPLIT_METHODS,
    )
    limit_examples: int = _field(
        0,
        "train on the first so many examples, validate and test on as large a share; 0 for all",
    )
    batch_size: int = _field(32, "examples a step")
    accumulate_steps: int = _field(
        1,
        "micro-batches that a step's batch is cut into: memory for the activations of one of them, "
        "one update; must divide batch_size",
    )
    eval_batch_size: int = _field(500, "examples a step of evaluation; changes the time only")
    epochs: float = _field(5.0, "passes over the training data; a part of one is fine")
    patience_epochs: int = _field(
        0, "stop when the validation loss has not improved for so many epochs; 0: never"
    )
    learning_rate: float = _field(0.01, "learning rate, at the schedule's peak")
    learning_rate_examples: int = _field(
        0,
        "the batch size that SGD's rates are meant for: learning_rate, or for optimizer=muon "
        "learning_rate_scales and l2, is multiplied by batch_size over this; 0: by nothing",
    )
    learning_rate_scales: Mapping[str, float] | None = _field(
        None, "learning rates of some variables, as factors by part of their path: key=value,..."
    )
    optimizer: str = _field(
        "sgd", "muon: convolutions by Muon, all else by SGD as below", OPTIMIZERS
    )
    muon_momentum: float = _field(0.6, "for optimizer=muon: momentum, 0 up to but not 1")
    momentum: float = _field(0.9, "SGD momentum, 0 up to but not 1")
    nesterov: bool = _field(True, "Nesterov momentum")
    scaled_velocity: bool = _field(
        True, "the velocity holds the learning rate, as in Keras; false: as in PyTorch"
    )
    schedule: str = _field(
        "inverse_time", "how the learning rate changes from step to step", SCHEDULES
    )
    decay: float = _field(1e-6, "for schedule=inverse_time: learning_rate / (1 + decay * step)")
    warmup_epochs: float = _field(0.0, "epochs over which the learning rate rises from 0 first")
    drop_epochs: tuple[float, ...] = _field(
        (), "for schedule=piecewise: epochs at which the learning rate drops, as 10,20"
    )
    drop_factor: float = _field(0.1, "for schedule=piecewise: what it is multiplied by then")
    start_fraction: float = _field(0.2, "for schedule=one_cycle: the first rate over the peak")
    peak_fraction: float = _field(0.23, "for schedule=one_cycle: share of the steps up to the peak")
    end_fraction: float = _field(0.07, "for schedule=one_cycle: the last rate over the peak")
    freeze: Mapping[str, float] | None = _field(
        None,
        "variables that stop to train, by part of their path, and after how many epochs: "
        "key=epochs,...",
    )
    l2: float = _field(0.0, "L2 added to the gradient of every kernel: l2 * weight")
    weight_decay: float = _field(
        0.0, "decoupled weight decay of every kernel: learning_rate * weight_decay * weight"
    )
    decay_biases: bool = _field(False, "l2 and weight_decay hold for biases and BatchNorm too")
    clip_norm: float = _field(0.0, "clip all gradients together to this norm; 0 for none")
    label_smoothing: float = _field(
        0.0, "share of each target spread over all classes, 0 up to but not 1"
    )
    augment: str = _field(
        "none",
        "none, or parts of flip|altflip,crop:PIXELS,randaugment:[OPSx]MAGNITUDE,saturation:S,hue:S,"
        "brightness:S,contrast:S,cutout:PIXELS,erase:PROBABILITY,mixup:ALPHA,cutmix:ALPHA; numbers "
        "may be left out",
    )
    averaging: str = _field(
        "none",
        "lookahead: every 5 steps weights are pulled to their average; ema: the average is kept "
        "beside and taken in the end",
        AVERAGINGS,
    )
    tta: str = _field(
        "none",
        "test-time augmentation: mirror, or multicrop with shifts by a pixel too",
        TTA_CHOICES,
    )
    tta_share: float = _field(
        1.0, "share of the images, the least confident ones, that tta is spent on"
    )
    precision: str = _field(
        "auto", "auto: mixed_bfloat16 where the hardware has it, else float32", PRECISIONS
    )
    jit_compile: str = _field(
        "auto", "compile the step with XLA; auto: on a GPU only", ("auto", "true", "false")
    )
    seed: int = _field(0, "seed of initial weights, order, dropout and augmentation")

    def __post_init__(self) -> None:
        """Checks every field; what depends on the data is checked when the run starts."""
        for field in dataclasses.fields(self):
            if field.metadata.get("choices"):
                check_choice(field.name, getattr(self, field.name), field.metadata["choices"])
        options = self.model_options or {}
        # A data set of one's own has a name of its own.
        for name in ("name", "data"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ConfigError(f"{name} must be a word or more, not {value!r}")
        if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
            raise ConfigError(f"model_options must be a mapping of names, not {options!r}")
        reserved = RESERVED_OPTIONS & set(options)
        if reserved:
            raise ConfigError(
                f"model_options must leave {sorted(reserved)[0]!r} to the recipe, not {options!r}"
            )
        try:
            json.dumps(_thawed(options), allow_nan=False)
        except RecursionError:
            raise ConfigError("model_options must be nested less deep than they are") from None
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model_options must hold what JSON has, not {options!r}: {error}"
            ) from None
        if not isinstance(self.drop_epochs, (list, tuple)):
            raise ConfigError(f"drop_epochs must be a list of epochs, not {self.drop_epochs!r}")

        def keep(check: Callable[..., Any], name: str, **bounds: Any) -> None:
            # What is kept is a plain number: a recipe must go into JSON, NumPy's numbers do not.
            object.__setattr__(self, name, check(name, getattr(self, name), **bounds))

        object.__setattr__(self, "model_options", _frozen(options))
        for name in ("validation_fraction", "momentum", "muon_momentum", "label_smoothing"):
            keep(check_float, name, maximum=1.0, below_maximum=True)
        object.__setattr__(self, "image_size", check_image_size(self.image_size))
        if self.data in DATA_CHOICES and self.image_size != 32:
            raise ConfigError(
                f"image_size must be 32, the side of {self.data}'s images, not "
                f"{self.image_size!r}: other sizes are for data=folder and tfds:NAME"
            )
        keep(check_int, "limit_examples", minimum=0)
        keep(check_int, "patience_epochs", minimum=0)
        keep(check_int, "batch_size")
        keep(check_int, "accumulate_steps")
        check_micro_batches(self.batch_size, self.accumulate_steps)
        keep(check_int, "eval_batch_size")
        if self.eval_batch_size >= 2**31:
            raise ConfigError(
                f"eval_batch_size must be at most {2**31 - 1}, not {self.eval_batch_size!r}"
            )
        keep(check_float, "epochs", above_minimum=True)
        keep(check_float, "learning_rate", above_minimum=True)
        keep(check_int, "learning_rate_examples", minimum=0)
        for name in ("start_fraction", "peak_fraction", "end_fraction"):
            keep(check_float, name, maximum=1.0)
        keep(check_float, "tta_share", above_minimum=True, maximum=1.0)
        for name, meant in (("learning_rate_scales", "factors"), ("freeze", "epochs")):
            numbers = getattr(self, name) or {}
            try:
                numbers = {str(key): check_float(name, value) for key, value in numbers.items()}
            except (AttributeError, ConfigError):
                raise ConfigError(
                    f"{name} must be parts of variables' paths and their {meant} >= 0, "
                    f"not {numbers!r}"
                ) from None
            object.__setattr__(self, name, numbers)
        for name in ("scaled_velocity", "decay_biases"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.nesterov, bool) or (self.nesterov and not self.momentum):
            raise ConfigError(
                f"nesterov must be False, or True with momentum > 0, not {self.nesterov!r} with "
                f"momentum {self.momentum!r}"
            )
        for name in (
            *("decay", "warmup_epochs"),
            *("l2", "weight_decay", "clip_norm"),
        ):
            keep(check_float, name)
        keep(check_float, "drop_factor", above_minimum=True)
        epochs = [check_float("drop_epochs", e, above_minimum=True) for e in self.drop_epochs]
        object.__setattr__(self, "drop_epochs", tuple(epochs))
        if (self.schedule == "piecewise") != bool(self.drop_epochs):
            raise ConfigError(
                "drop_epochs must be given for schedule=piecewise and for no other, "
                f"not {self.drop_epochs!r} with schedule={self.schedule}"
            )
        if list(self.drop_epochs) != sorted(set(self.drop_epochs)):
            raise ConfigError(f"drop_epochs must increase, not {self.drop_epochs!r}")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"warmup_epochs must be at most epochs ({self.epochs:g}), "
                f"not {self.warmup_epochs!r}"
            )
        parse_augment(self.augment)
        object.__setattr__(self, "seed", check_seed(self.seed))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of which `to_json` gave these values, or which a file says it did.

        Raises:
          ConfigError: if a field is unknown or out of range, or there is no name; in a short line,
            whatever the values are.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = next((name for name in values if name not in known), None)
        try:
            if unknown is not None:
                raise ConfigError(f"a recipe has no field {unknown!r}")
            return cls(**{"name": None, **values})
        except ConfigError as error:
            raise ConfigError(one_line(str(error))) from None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them; `from_json` makes the recipe again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: _thawed(value) for key, value in values.items()}


def _frozen(value: Any) -> Any:
    """Lists become tuples, so that a recipe from JSON equals the one it was written from."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _thawed(value: Any) -> Any:
    """The reverse: only what JSON has."""
    if isinstance(value, Mapping):
        return {key: _thawed(entry) for key, entry in value.items()}
    return list(map(_thawed, value)) if isinstance(value, (list, tuple)) else value
