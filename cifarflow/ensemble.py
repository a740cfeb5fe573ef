"""Several models of one recipe that differ in their seed, and what they say together.

    ensemble = train_ensemble("fast75", members=5, workdir="runs/five")
    print(ensemble.one.augmented, ensemble.average.augmented, ensemble.vote.augmented)
    classes = ensemble.predict(images).by_average

The members are trained one after the other by one compiled step.  Of each one its outputs stay in
memory and its weights go into a file, so that memory does not grow with their number.  In the
folder are

    recipe.json                     the recipe, and which images the members were read on
    members/seed_S/step_N.npz       a member's weights, a verified checkpoint
    members/seed_S/outputs.npy      its outputs [2, N, num_classes], without and with TTA
    members/seed_S/member.json      what its training took; written last
    ensemble.json                   what came of them all

One after the other is also the faster way.  Five convolutions of fast75's sizes stacked into one of
five groups took 1.2 to 2.0 times as long, forward and backward (the best of five calls each, two
Zen 4 cores that others used too, float32 and bfloat16, TensorFlow 2.21), and `tf.vectorized_map`
1.0 to 2.3 times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import platform
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.splits import Dataset
from cifarflow.device import describe_device, prepare_gpus, resident_bytes
from cifarflow.errors import (
    ConfigError,
    DataError,
    WorkdirError,
    check_choice,
    check_int,
    check_seed,
)
from cifarflow.evaluation.predict import Predictor
from cifarflow.evaluation.voting import Combined, combine_outputs
from cifarflow.files import replacing
from cifarflow.recipes.build import (
    build_model,
    limit_as_asked,
    load_recipe_data,
    predict_options,
    resolve,
)
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.workdir import ArrayKind, Workdir, read_npy
from cifarflow.trials import READ_CHOICES, Trials

_OUTPUTS = ArrayKind("f", 3, "float32 of shape (2, images, classes)")
_HOW = ("plain", "augmented")


class Accuracy(NamedTuple):
    """The share of the images that is predicted right, 0..1.

    Attributes:
      plain: of the images as they are.
      augmented: with test-time augmentation.
    """

    plain: float
    augmented: float


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of an ensemble.

    Attributes:
      seed: of its weights, order, dropout and augmentation.
      accuracy: on the images that were read.
      steps: how many were trained.
      train_seconds: those of the training steps.
      resident_bytes: memory of the process when it was done; None where Linux does not tell.
      weights_sha256: hash of its weights.
    """

    seed: int
    accuracy: Accuracy
    steps: int
    train_seconds: float
    resident_bytes: int | None
    weights_sha256: str


class Together(NamedTuple):
    """The accuracy of the first few members together.

    Attributes:
      members: how many.
      average: by the largest mean probability.
      vote: by the most votes; of equally many the larger mean probability decides.
    """

    members: int
    average: Accuracy
    vote: Accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Trained members, and what they came to.

    Attributes:
      recipe: theirs, every "auto" in it resolved, with the first one's seed.
      read: "test" or "validation", the images that they were read on.
      members: in the order of their seeds.
      by_size: of the first member alone, the first two together, and so on up to all.
      outputs: [members, 2, N, num_classes] float32: of each for the images that were read, without
        and with test-time augmentation.
      summary: JSON values, as in ensemble.json.
      workdir: the folder, None if there is none.
    """

    recipe: Recipe
    read: str
    members: tuple[Member, ...]
    by_size: tuple[Together, ...]
    outputs: np.ndarray = dataclasses.field(repr=False)
    summary: dict[str, Any] = dataclasses.field(repr=False)
    workdir: pathlib.Path | None
    _shelf: _Shelf = dataclasses.field(repr=False)

    @property
    def one(self) -> Accuracy:
        """The mean of the members' accuracies: what one of them can be expected to reach."""
        return Accuracy(*np.mean([member.accuracy for member in self.members], axis=0).tolist())

    @property
    def average(self) -> Accuracy:
        """The accuracy of all by average of their probabilities."""
        return self.by_size[-1].average

    @property
    def vote(self) -> Accuracy:
        """The accuracy of all by majority vote."""
        return self.by_size[-1].vote

    def predict(self, images: np.ndarray, *, tta: bool = True) -> Combined:
        """What the members say of other images, one after the other through one model.

        Args:
          images: [N, H, W, C] uint8, 0..255, N >= 1, of the size that they were trained on.
          tta: whether with the recipe's test-time augmentation.

        Returns:
          The `Combined`.

        Raises:
          ConfigError: if tta is neither True nor False.
          DataError: if the images are not of the shape and dtype that the model takes.
          CheckpointError: if a member's weights are damaged, or gone.
        """
        if not isinstance(tta, bool):
            raise ConfigError(f"tta must be True or False, not {tta!r}")
        return combine_outputs(self._shelf.outputs_of(self.members, images, tta=tta))


def train_ensemble(
    recipe: str | Recipe,
    members: int,
    *,
    read: str = "test",
    dataset: Dataset | None = None,
    data_dir: str | pathlib.Path | None = None,
    workdir: str | pathlib.Path | None = None,
    resume: bool = False,
    progress: Callable[..., Any] | None = None,
    **changes: Any,
) -> Ensemble:
    """Trains a recipe with several seeds by one compiled step, and reads the test set with each.

    A member is, bit for bit on the same CPU, what `train_recipe` trains with its seed.

    Args:
      recipe: a name in `RECIPES`, or a recipe.  Its test-time augmentation is taken; "mirror" where
        it has none.
      members: how many, with the recipe's seed, the next one, and so on.
      read: "test": each member reads the test set, once, at its end.  "validation": the validation
        images instead, for choosing among recipes; the test set is left alone.
      dataset: data that is loaded already, or data of your own; in place of loading the recipe's.
      data_dir: where the data is, see `load_data`.
      workdir: the folder; with None the weights are in a temporary one, which goes with the
        `Ensemble`.
      resume: go on with the ensemble in workdir, after its last whole member; a finished one may
        get more members so.
      progress: as in `train_recipe`; one for each member.
      **changes: fields of the recipe and their new values.

    Returns:
      The `Ensemble`.

    Raises:
      ConfigError: if a value is out of range or does not fit the data, or workdir has more members.
      DataError, DataNotFoundError: see `load_data`; or if a file in workdir is damaged.
      WorkdirError: if workdir cannot be written, or holds something else; or if at the end it lacks
        a member, removed meanwhile.
      NonFiniteError: if a training loss, or an output in the end, is not finite.
    """
    started = time.perf_counter()
    recipe = get_recipe(recipe, **changes)
    members = check_int("members", members)
    check_seed(recipe.seed + members - 1)
    check_choice("read", read, READ_CHOICES)
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be Progress or None, not {progress!r}")
    if workdir is None and resume:
        raise ConfigError("resume=True needs a workdir, not None")
    if recipe.tta == "none":
        recipe = dataclasses.replace(recipe, tta="mirror", tta_share=1.0)
    prepare_gpus()
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    dataset = limit_as_asked(recipe, dataset)
    recipe = resolve(recipe, dataset)
    labels = (dataset.test if read == "test" else dataset.validation).labels
    seeds = range(recipe.seed, recipe.seed + members)
    with contextlib.ExitStack() as opened:
        shelf = _Shelf(workdir, recipe, dataset, read=read)
        if shelf.is_begun():
            # Before a minute of compiling.
            opened.enter_context(shelf.opened(resume=resume))
            shelf.refuse_fewer(members)
        kept = {seed: shelf.load(seed, len(labels)) for seed in seeds}
        trials = None
        if None in kept.values():
            trials = Trials(recipe, dataset, read=read)
            if not shelf.is_begun():
                opened.enter_context(shelf.opened(resume=resume))
        for number, seed in enumerate(seeds, 1):
            if kept[seed] is None:
                assert trials is not None
                name = f"{recipe.name}, member {number} of {members}"
                kept[seed] = _train_member(trials, shelf, seed, name=name, progress=progress)
        found = [entry for entry in kept.values() if entry is not None]
        outputs = np.stack([entry.outputs for entry in found])
        trained = tuple(_member(entry, labels) for entry in found)
        by_size = tuple(_together(outputs[:size], labels) for size in range(1, members + 1))
        summary = _summary(recipe, dataset, read, trained, by_size)
        if trials is not None:
            summary["compile_seconds"] = round(trials.compile_seconds, 3)
            summary["step_traces"] = trials.traces
        summary["total_seconds"] = round(time.perf_counter() - started, 3)
        # What is there stays, unless there is more to tell.
        summary = shelf.finish(seeds, summary, is_new=trials is not None)
    path = None if workdir is None else shelf.path
    return Ensemble(recipe, read, trained, by_size, outputs, summary, path, shelf)


class _Kept(NamedTuple):
    """A member as it is in its folder, but for its weights."""

    record: dict[str, Any]
    outputs: np.ndarray


# Of member.json, each with what it must be.
_RECORD: dict[str, Callable[[Any], bool]] = {
    "seed": lambda value: type(value) is int and 0 <= value < 2**31,
    "steps": lambda value: type(value) is int and 0 < value < 2**40,
    "train_seconds": lambda value: type(value) in (int, float) and 0 <= value < 1e12,
    "resident_bytes": lambda value: value is None or (type(value) is int and 0 < value < 2**60),
    "weights_sha256": lambda value: isinstance(value, str) and value.isprintable(),
}


class _Shelf:
    """The folder of an ensemble, and the one model that all members' weights go through.

    Args:
      workdir: the folder; None makes a temporary one that goes with this object.
      recipe: resolved, with the first member's seed.
      dataset: what they are trained on.
      read: "test" or "validation".
    """

    def __init__(
        self, workdir: str | pathlib.Path | None, recipe: Recipe, dataset: Dataset, *, read: str
    ) -> None:
        self._recipe = recipe
        self._identity = {**recipe.to_json(), "ensemble": read}
        self._image_shape, self._num_classes = dataset.image_shape, dataset.num_classes
        self._model: Any = None
        self._predictors: dict[bool, Predictor] = {}
        if workdir is None:
            try:
                workdir = tempfile.mkdtemp(prefix="cifarflow-ensemble-")
            except OSError as error:
                raise WorkdirError(
                    f"cannot make a temporary folder for weights: {error.strerror}: give a workdir"
                ) from error
            weakref.finalize(self, shutil.rmtree, workdir, ignore_errors=True)
        self._folder = Workdir(workdir)
        self._is_open = False
        self.path = self._folder.path

    def is_begun(self) -> bool:
        """Whether a run is in the folder already, or it was opened."""
        return self._is_open or os.path.lexists(self.path / "recipe.json")

    @contextlib.contextmanager
    def opened(self, *, resume: bool) -> Iterator[None]:
        """Keeps other processes out of the folder within the block; errors as `Workdir.open`."""
        with self._folder:
            self._folder.open(self._identity, resume=resume)
            self._is_open = True
            yield

    def refuse_fewer(self, members: int) -> None:
        """Refuses a folder that is of more members.

        Raises:
          ConfigError: if it is.
          DataError: if its ensemble.json is damaged.
        """
        there = self._folder.read_json("ensemble.json")
        count = there.get("members") if there is not None else None
        if isinstance(count, list) and len(count) > members:
            raise ConfigError(
                f"members must be at least the {len(count)} that workdir {str(self.path)!r} has, "
                f"not {members}"
            )

    def load(self, seed: int, examples: int) -> _Kept | None:
        """Reads a member, but for its weights; None if it is not there, or not whole.

        What is in a folder that has not been opened is not this ensemble's.

        Args:
          seed: its seed.
          examples: how many images it must have been read on.

        Raises:
          DataError: if a file is damaged, or of other data.
        """
        path = self._member(seed)
        if not self._is_open:
            return None
        record = Workdir(path).read_json("member.json")
        if record is None:
            return None
        wrong = next((key for key, is_good in _RECORD.items() if not is_good(record.get(key))), "")
        if wrong or record["seed"] != seed:
            raise DataError(
                f"{str(path / 'member.json')!r} is no record of this member, its "
                f"{wrong or 'seed'!r} is not one's: remove it to have the member trained again"
            )
        outputs = read_npy(path / "outputs.npy", _OUTPUTS)
        if outputs is None or not os.path.exists(self._checkpoints(seed).path(record["steps"])):
            return None
        shape = (2, examples, self._num_classes)
        if outputs.shape != shape or not np.isfinite(outputs).all():
            raise DataError(
                f"{str(path / 'outputs.npy')!r} must hold finite outputs of shape {shape}, as this "
                f"data set has images and classes, not of shape {outputs.shape}"
            )
        return _Kept(record, outputs)

    def save(self, seed: int, kept: _Kept, variables: Sequence[Any]) -> None:
        """Writes a member.

        Raises:
          WorkdirError: if that is not possible.
        """
        path = self._member(seed)
        self._folder.ensure()
        with replacing(path / "outputs.npy") as file:
            np.save(file, kept.outputs, allow_pickle=False)
        self._checkpoints(seed).save(kept.record["steps"], variables)
        Workdir(path).write_json("member.json", kept.record)

    def finish(self, seeds: range, summary: dict[str, Any], *, is_new: bool) -> dict[str, Any]:
        """Writes ensemble.json, if there is none or this one says more; returns what it holds.

        Raises:
          DataError: if the file that is there cannot be read.
          WorkdirError: if it cannot be written, or a member is gone by now.
        """
        there = None if is_new else self._folder.read_json("ensemble.json")
        if there is not None:
            return there
        self._folder.ensure()
        paths = [self._member(seed) for seed in seeds]
        lost = [path for path in paths if not os.path.exists(path / "member.json")]
        if lost:
            names = ", ".join(str(path.relative_to(self.path)) for path in lost)
            raise WorkdirError(
                f"workdir {str(self.path)!r} lacks {names}, removed while the ensemble was "
                "trained: with --resume (resume=True) it is trained again"
            )
        self._folder.write_json("ensemble.json", summary)
        return summary

    def outputs_of(
        self, members: Sequence[Member], images: np.ndarray, *, tta: bool
    ) -> Iterator[np.ndarray]:
        """The outputs [N, num_classes] of one member after the other; errors as `predict`."""
        if self._model is None:
            self._model = build_model(
                self._recipe, image_shape=self._image_shape, num_classes=self._num_classes
            )
        if tta not in self._predictors:
            options = predict_options(self._recipe)
            if not tta:
                options["tta"] = "none"
            self._predictors[tta] = Predictor(self._model, **options)
        for member in members:
            self._checkpoints(member.seed).restore(member.steps, self._model.variables)
            yield self._predictors[tta](images)

    def _member(self, seed: int) -> pathlib.Path:
        return self.path / "members" / f"seed_{seed}"

    def _checkpoints(self, seed: int) -> Checkpoints:
        identity = {**self._recipe.to_json(), "seed": seed}
        return Checkpoints(self._member(seed), identity=identity)


def _train_member(
    trials: Trials,
    shelf: _Shelf,
    seed: int,
    *,
    name: str,
    progress: Callable[..., Any] | None,
) -> _Kept:
    """Trains one member and keeps it."""
    with contextlib.ExitStack() as stack:
        view = None
        if progress is not None:
            shown = progress(
                trials.total_steps,
                steps_per_epoch=trials.steps_per_epoch,
                first_step=0,
                description=name,
            )
            view = stack.enter_context(shown)
        trained = trials.train(seed, progress=view)
    outputs = np.stack(trials.outputs())
    record = {
        "seed": seed,
        "steps": trained.steps,
        "train_seconds": round(trained.train_seconds, 3),
        "resident_bytes": resident_bytes(),
        "weights_sha256": hash_arrays(trials.model.variables),
    }
    kept = _Kept(record, outputs)
    shelf.save(seed, kept, trials.model.variables)
    return kept


def _member(kept: _Kept, labels: np.ndarray) -> Member:
    accuracy = Accuracy(*(_share(outputs.argmax(-1), labels) for outputs in kept.outputs))
    return Member(accuracy=accuracy, **{name: kept.record[name] for name in _RECORD})


def _together(outputs: np.ndarray, labels: np.ndarray) -> Together:
    """The accuracy of members by their outputs [members, 2, N, num_classes]."""
    plain, augmented = (combine_outputs(outputs[:, how]) for how in range(len(_HOW)))
    return Together(
        len(outputs),
        Accuracy(_share(plain.by_average, labels), _share(augmented.by_average, labels)),
        Accuracy(_share(plain.by_vote, labels), _share(augmented.by_vote, labels)),
    )


def _share(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predicted == labels))


def _summary(
    recipe: Recipe,
    dataset: Dataset,
    read: str,
    members: Sequence[Member],
    by_size: Sequence[Together],
) -> dict[str, Any]:
    """What ensemble.json holds, but for its own seconds."""
    return {
        "recipe": recipe.name,
        "dataset": dataset.name,
        "data_source": dataset.source,
        "examples": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(dataset.test),
        },
        "read": read,
        "epochs": recipe.epochs,
        "precision": recipe.precision,
        "tta": recipe.tta,
        "tta_share": recipe.tta_share,
        "device": describe_device(),
        "members": [
            {**dataclasses.asdict(member), "accuracy": member.accuracy._asdict()}
            for member in members
        ],
        "by_size": [
            {
                "members": together.members,
                "average": together.average._asdict(),
                "vote": together.vote._asdict(),
            }
            for together in by_size
        ],
        "class_names": list(dataset.class_names),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }
