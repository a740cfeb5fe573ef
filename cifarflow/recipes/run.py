"""A recipe trained from one end to the other.

run = train_recipe("lab_cnn", workdir="runs/first", epochs=2)
print(run.summary["test_accuracy"])
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import evaluation_batches
from cifarflow.data.splits import Dataset
from cifarflow.device import describe_device, prepare_gpus
from cifarflow.errors import (
    ON_NONFINITE,
    ConfigError,
    DataError,
    NonFiniteError,
    WorkdirError,
    check_choice,
)
from cifarflow.evaluation.confidence import worst_mistakes
from cifarflow.evaluation.metrics import accuracy, confusion_matrix, per_class_accuracy
from cifarflow.evaluation.predict import predict, softmax
from cifarflow.evaluation.scores import score_outputs
from cifarflow.recipes.build import (
    Pieces,
    assemble,
    limit_as_asked,
    load_recipe_data,
    predict_options,
)
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.checkpoints import Checkpoints, hash_arrays
from cifarflow.training.contract import CHECKED, check_step
from cifarflow.training.distribution import Team, open_team
from cifarflow.training.history import History
from cifarflow.training.hooks import EarlyStopping, Every, Hook, epochs_to_steps
from cifarflow.training.loop import ProgressView, Run, train
from cifarflow.training.nonfinite import Capsules
from cifarflow.training.profile import profile as profile_steps
from cifarflow.training.tensorboard import TensorBoard, confusion_pictures, image_grid
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import one_line

# Of these an image can be made.
_CHANNELS_SHOWN = (1, 3)
# A row and a column of images each: more make a picture that nobody can open.
_MOST_CLASSES_SHOWN = 40
# What a finished run's summary must hold for the run to be shown again.
_SHOWN_KEYS = frozenset(
    [
        "recipe",
        "dataset",
        "parameters",
        "epochs",
        "steps",
        "seed",
        "precision",
        "device",
        "train_seconds",
        "images_per_second",
        "examples",
        "test_loss",
        "test_accuracy",
        "confusion_matrix",
        "weights_sha256",
    ]
)


def train_recipe(
    recipe: str | Recipe,
    *,
    workdir: str | pathlib.Path | None = None,
    resume: bool = False,
    data_dir: str | pathlib.Path | None = None,
    dataset: Dataset | None = None,
    hooks: Sequence[Hook] = (),
    progress: Callable[..., Any] | None = None,
    tensorboard: bool = False,
    profile: Callable[[str], object] | None = None,
    checkpoint_every: Every | None = None,
    on_nonfinite: str = "stop",
    check: bool = False,
    strategy: str = "none",
    worker_timeout_seconds: float = 60.0,
    **changes: Any,
) -> Run:
    """Trains a recipe, evaluates it on the test set once, and writes down what came out.

    Args:
      recipe: a name in `RECIPES`, or a recipe.
      workdir: the run's folder; None writes nothing.
      resume: go on with the run that is in workdir; starts afresh where there is none.
      data_dir: where the data is, see `load_data`.
      dataset: data that is loaded already, or data of your own; in place of loading the recipe's.
      hooks: what else to run during training, and when.
      progress: makes a context manager that shows progress, called with total_steps and the
        keywords steps_per_epoch, first_step and description; `Progress` is one.
      tensorboard: write event files into workdir: scalars, the first batch, and in the end which
        class was taken for which.
      profile: profile some steps before training, see `cifarflow.profile`: the trace goes into
        workdir's folder profile, where the time goes and what bounds the step to this function,
        such as `print`.  The run comes out the same.  A profile that is there already stays.
      checkpoint_every: when to save the state into workdir, as in `train`.
      on_nonfinite: "stop" or "skip", as in `train`.  No part of the recipe: a run that has stopped
        may go on by skipping.  In workdir a step that fails is kept in a folder capsules/step_N,
        of those that are skipped the first three; `python -m cifarflow replay` runs it again.
      check: whether to run `check_step` before training, and print a line when all is well.
      strategy: "none"; "mirrored" for all GPUs of this machine; "multiworker" for the processes
        that TF_CONFIG names, each of which calls this.  The recipe's batch is shared out among
        them, so the run is the same, see `cifarflow.training.distribution`.  Of several processes
        the chief alone has the workdir, and all return its summary.  A run that goes on with
        another number of replicas says so.
      worker_timeout_seconds: for multiworker: how long to wait for the others at the start.
      **changes: fields of the recipe and their new values.

    Returns:
      The `Run`.  Its summary is also summary.json.

    Raises:
      ConfigError: if a value is out of range, or does not fit the data.
      DataError, DataNotFoundError: see `load_data`.
      WorkdirError: if workdir cannot be written, or holds another run; or if it was removed
        meanwhile and, at the end, lacks what could not be written again.
      CheckpointError: if the checkpoint to resume from is damaged.
      ContractError: if `check` finds a fault.
      NonFiniteError: if the loss, a gradient or a weight is not finite, see `train`.
      TrainingInterrupted: after Ctrl-C.
      WorkerError: if a worker does not come up, is lost, or has another recipe.
    """
    started = time.perf_counter()
    recipe = get_recipe(recipe, **changes)
    _check_options(
        workdir=workdir,
        resume=resume,
        progress=progress,
        tensorboard=tensorboard,
        profile=profile,
        on_nonfinite=on_nonfinite,
        strategy=strategy,
    )
    prepare_gpus()
    # First of all: several workers must have met before TensorFlow computes anything.
    team = open_team(strategy, worker_timeout_seconds=worker_timeout_seconds)
    if team is not None:
        team.check_batch_size(recipe.batch_size, accumulate_steps=recipe.accumulate_steps)
        if not team.is_chief:
            workdir, resume, tensorboard, progress = None, False, False, None
    elif strategy != "none":
        print(f"strategy {strategy}: there is one device, which trains alone")
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    dataset = limit_as_asked(recipe, dataset)
    if not len(dataset.test):
        raise DataError(f"the data set {dataset.name!r} must have test images, not 0")
    pieces = assemble(recipe, dataset)
    hooks = [*hooks, *_hooks_of(pieces.recipe, dataset)]
    if check:
        check_pieces(pieces)
        print(CHECKED)
    if team is not None:
        team.check_same("a recipe", pieces.recipe.to_json())
    with contextlib.ExitStack() as opened:
        # Let go at the end, whatever it is.
        folder = opened.enter_context(Workdir(workdir)) if workdir is not None else None
        job = _begin(pieces, dataset, folder=folder, team=team, resume=resume)
        if folder is not None and profile is not None:
            _profile(folder.path / "profile", profile, pieces)
        finished = _finished_run(job)
        if finished is not None:
            return finished
        # A run that ended between its test and its summary is tested again.
        job.history.rows = [row for row in job.history.rows if row["split"] != "test"]
        board = None
        if folder is not None and tensorboard:
            board = TensorBoard(folder.path / "tensorboard")
            job.history.listeners.append(board.add_row)
            _show_first_batch(board, dataset, pieces.batches.batch_at(0)[0])
        run = _train(
            job,
            hooks=hooks,
            progress=progress,
            checkpoint_every=checkpoint_every,
            resume=resume,
            on_nonfinite=on_nonfinite,
        )
        if team is not None and not team.is_chief:
            # The chief tests, while the others wait for what comes out.
            return dataclasses.replace(run, summary=team.tell(None))
        outputs = predict(pieces.model, dataset.test.images, **predict_options(pieces.recipe))
        summary = _summary(job, run, outputs)
        if board is not None:
            _show_predictions(board, dataset, outputs, step=summary["steps"])
        job.history.flush()
        summary["total_seconds"] = round(time.perf_counter() - started, 3)
        _write(job, summary, outputs, also={"tensorboard": tensorboard, "profile": bool(profile)})
        if team is not None:
            team.tell(summary)
        return dataclasses.replace(run, summary=summary, test_outputs=outputs)


def _check_options(
    *,
    workdir: object,
    resume: bool,
    progress: object,
    tensorboard: bool,
    profile: object,
    on_nonfinite: str,
    strategy: str,
) -> None:
    """Refuses what cannot work, before anything is read or written."""
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress must be Progress or None, not {progress!r}")
    if profile is not None and not callable(profile):
        raise ConfigError(f"profile must be a function such as print, or None, not {profile!r}")
    check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    needy = {"resume=True": resume, "tensorboard=True": tensorboard, "profile": profile}
    needs = next((name for name, value in needy.items() if value), None)
    if workdir is None and needs is not None:
        raise ConfigError(f"{needs} needs a workdir, not None")
    if strategy != "none" and profile is not None:
        raise ConfigError(f"profile needs strategy none, not {strategy!r}: it looks at one replica")


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run from its opening on: what is trained, on what, by whom, and where all of it goes.

    Attributes:
      folder: None where nothing is written, and so checkpoints and capsules.
    """

    pieces: Pieces
    dataset: Dataset
    team: Team | None
    history: History
    folder: Workdir | None = None
    checkpoints: Checkpoints | None = None
    capsules: Capsules | None = None

    def run(self, summary: dict[str, Any], **values: Any) -> Run:
        """What is returned of it."""
        path = self.folder.path if self.folder is not None else None
        return Run(self.pieces.model, self.history, summary, path, dataset=self.dataset, **values)


def _hooks_of(recipe: Recipe, dataset: Dataset) -> list[Hook]:
    """The hooks that the recipe itself asks for."""
    if not recipe.patience_epochs:
        return []
    if not len(dataset.validation):
        raise ConfigError(
            "patience_epochs must be 0 where there are no validation images, not "
            f"{recipe.patience_epochs!r}"
        )
    return [EarlyStopping(patience_epochs=recipe.patience_epochs)]


def _begin(
    pieces: Pieces,
    dataset: Dataset,
    *,
    folder: Workdir | None,
    team: Team | None,
    resume: bool,
) -> _Job:
    """Opens the run's folder, if it has one, and the log that is there."""
    tags = {"dataset": dataset.name}
    if folder is None:
        return _Job(pieces, dataset, team, History(tags=tags))
    identity = pieces.recipe.to_json()
    there = folder.open(identity, resume=resume)
    log: dict[str, Any] = {"tags": tags, "prepare": folder.ensure, "table": folder.table}
    open_log = History.load if there and folder.metrics.exists() else History
    return _Job(
        pieces,
        dataset,
        team,
        open_log(folder.metrics, **log),
        folder,
        Checkpoints(folder.checkpoints, prepare=folder.ensure, identity=identity),
        Capsules(folder.capsules, recipe=identity),
    )


def _finished_run(job: _Job) -> Run | None:
    """The run, if its folder, or the chief's, says that it is over: it is not tested again."""
    team, model = job.team, job.pieces.model
    summary = _restore_finished(job)
    if team is not None:
        summary = team.tell(summary)
        if summary is not None:
            team.hand_out(model.variables)
    if summary is None:
        return None
    return job.run(summary, test_outputs=job.folder.read_test_outputs() if job.folder else None)


def _restore_finished(job: _Job) -> dict[str, Any] | None:
    """The summary of a finished run, after taking back its weights; None of any other."""
    if job.folder is None or job.checkpoints is None:
        return None
    summary = job.folder.read_summary(_SHOWN_KEYS)
    newest = job.checkpoints.latest_whole() if summary is not None else None
    # From an older checkpoint, where the last is damaged, its end is trained once more.
    if summary is None or newest is None or newest != summary["steps"]:
        return None
    model, averaging = job.pieces.model, job.pieces.averaging
    variables = [*model.variables, *job.pieces.optimizer.variables]
    if averaging is not None:
        averaging.build(model)
        variables += averaging.variables
    job.checkpoints.restore(newest, variables)
    if averaging is not None:
        averaging.finish()
    if hash_arrays(model.variables) != summary["weights_sha256"]:
        warnings.warn(
            f"the weights in {str(job.checkpoints.path(newest))!r} are not those that "
            f"{str(job.folder.path / 'summary.json')!r} is of: one of the two is another's",
            stacklevel=4,
        )
    return summary


def _train(
    job: _Job,
    *,
    hooks: Sequence[Hook],
    progress: Callable[..., Any] | None,
    checkpoint_every: Every | None,
    resume: bool,
    on_nonfinite: str,
) -> Run:
    """Trains to the end; the run's summary is that of `train`."""
    pieces, dataset, team, checkpoints = job.pieces, job.dataset, job.team, job.checkpoints
    recipe, batches = pieces.recipe, pieces.batches
    validation = None
    if len(dataset.validation):
        validation = evaluation_batches(
            dataset.validation.images, dataset.validation.labels, batch_size=recipe.eval_batch_size
        )
    total_steps = epochs_to_steps(recipe.epochs, steps_per_epoch=batches.steps_per_epoch)
    with contextlib.ExitStack() as stack:
        view = None
        if progress is not None:
            shown = progress(
                total_steps,
                steps_per_epoch=batches.steps_per_epoch,
                first_step=(checkpoints.latest() or 0) if checkpoints and resume else 0,
                description=f"{recipe.name}, {dataset.name}",
            )
            view = stack.enter_context(shown)
            _announce(view, recipe, dataset, pieces.model)
            if team is not None:
                view.line(f"{team.describe()}; each has a share of every batch")
        run = train(
            pieces.model,
            pieces.optimizer,
            batches=batches,
            total_steps=total_steps,
            validation=validation,
            hooks=hooks,
            loss_fn=pieces.loss_fn,
            freeze=pieces.freeze,
            averaging=pieces.averaging,
            jit_compile=recipe.jit_compile == "true",
            accumulate_steps=recipe.accumulate_steps,
            history=job.history,
            checkpoints=checkpoints,
            checkpoint_every=checkpoint_every,
            resume=resume,
            on_nonfinite=on_nonfinite,
            capsules=job.capsules,
            progress=view,
            team=team,
        )
    return job.run(run.summary)


def _write(
    job: _Job, summary: dict[str, Any], outputs: np.ndarray, *, also: Mapping[str, bool]
) -> None:
    """Writes what the test came to, if the run has a folder, and looks whether all else is there.

    Args:
      job: the run.
      summary: what came of it.
      outputs: the model's for the test set.
      also: files and folders in its folder -> whether they were asked for.

    Raises:
      WorkdirError: if something was removed meanwhile, and cannot be written again.
    """
    folder, checkpoints = job.folder, job.checkpoints
    if folder is None or checkpoints is None:
        return
    _write_tested(folder, job.dataset, outputs)
    folder.write_json("summary.json", summary)
    paths = [folder.path / name for name, is_asked in also.items() if is_asked]
    lost = folder.missing(checkpoints.path(summary["steps"]), *paths)
    best = checkpoints.lost_best()
    if best is not None:
        lost.append(f"the best checkpoint, of step {best}")
    if lost:
        raise WorkdirError(
            f"workdir {str(folder.path)!r} lacks {', '.join(lost)}, removed while the run went "
            "on: all else is there; to have that too, run it again in another folder"
        )


def check_pieces(pieces: Pieces) -> None:
    """Runs `check_step` on what a recipe is trained with.

    Raises:
      ContractError: if the step does not train what it should.
    """
    check_step(
        pieces.model,
        pieces.optimizer,
        batches=pieces.batches,
        loss_fn=pieces.loss_fn,
        freeze=pieces.freeze,
        jit_compile=pieces.recipe.jit_compile == "true",
        accumulate_steps=pieces.recipe.accumulate_steps,
    )


def _show_first_batch(board: TensorBoard, dataset: Dataset, images: np.ndarray) -> None:
    """Writes what the first step gets."""
    if images.shape[-1] in _CHANNELS_SHOWN:
        said = f"{one_line(dataset.name)}, augmented, as the first step gets it"
        board.add_images("train", "first_batch", [image_grid(images)], step=0, description=said)


def _show_predictions(board: TensorBoard, dataset: Dataset, outputs: Any, *, step: int) -> None:
    """Writes what the model made of the test images."""
    test = dataset.test
    if test.images.shape[-1] not in _CHANNELS_SHOWN or dataset.num_classes > _MOST_CLASSES_SHOWN:
        return
    names = ", ".join(one_line(name) for name in dataset.class_names)
    said = f"the true class from top to bottom, the predicted one from left to right: {names}"
    said = f"{one_line(dataset.name)}; {said}"
    pictures = confusion_pictures(test.images, test.labels, outputs)
    for name, picture in zip(("confusion_matrix", "predictions"), pictures, strict=True):
        board.add_images("test", name, [picture], step=step, description=said)


def _profile(directory: pathlib.Path, show: Callable[[str], object], pieces: Pieces) -> None:
    """Profiles some steps and shows what came out, unless the run has a profile already."""
    if directory.exists():
        show(f"the run has a profile already, in {directory}: it stays, and no other is made")
        return
    found = profile_steps(
        pieces.model,
        pieces.optimizer,
        directory=directory,
        batches=pieces.batches,
        loss_fn=pieces.loss_fn,
        jit_compile=pieces.recipe.jit_compile == "true",
        accumulate_steps=pieces.recipe.accumulate_steps,
    )
    show(f"{found.table()}\n{found.verdict}")
    show(f"the trace is in {directory}: https://ui.perfetto.dev opens trace.json.gz")


def _write_tested(folder: Workdir, dataset: Dataset, outputs: np.ndarray) -> None:
    """Keeps what the test came to, image by image."""
    images, labels = dataset.test
    folder.write_test_outputs(outputs)
    folder.write_test_labels(labels)
    worst = worst_mistakes(labels, softmax(outputs))
    folder.write_mistakes(images=images[worst.indices], **worst._asdict())


def _summary(job: _Job, run: Run, outputs: np.ndarray) -> dict[str, Any]:
    """Says what came of the run; `outputs` are the model's for the test set."""
    recipe, dataset, team = job.pieces.recipe, job.dataset, job.team or Team()
    model, test = run.model, dataset.test
    losses = job.pieces.loss_fn(tf.constant(test.labels), tf.constant(outputs)).numpy()
    extra = float(sum(float(loss) for loss in model.losses))
    matrix = confusion_matrix(test.labels, outputs.argmax(-1), num_classes=dataset.num_classes)
    test_loss = float(np.mean(losses, dtype=np.float64)) + extra
    test_accuracy = accuracy(matrix)
    if not np.isfinite(test_loss):
        raise NonFiniteError(
            f"the test loss is {test_loss} after the last step: try a smaller learning_rate than "
            f"{recipe.learning_rate:g}"
        )
    run.history.add(
        step=run.summary["steps"],
        epoch=run.summary["epochs"],
        split="test",
        loss=test_loss,
        accuracy=test_accuracy,
    )
    return {
        "recipe": recipe.name,
        "dataset": dataset.name,
        "data_source": dataset.source,
        "examples": {
            "train": len(dataset.train),
            "validation": len(dataset.validation),
            "test": len(test),
        },
        "parameters": model.count_params(),
        "epochs": run.summary["epochs"],
        "steps": run.summary["steps"],
        "seed": recipe.seed,
        "precision": recipe.precision,
        "jit_compile": recipe.jit_compile == "true",
        "device": describe_device(),
        "strategy": team.strategy,
        "replicas": team.replicas,
        "train_seconds": run.summary["train_seconds"],
        "compile_seconds": run.summary["compile_seconds"],
        "images_per_second": run.summary["images_per_second"],
        "step_traces": run.summary["step_traces"],
        "stop_reason": run.summary["stop_reason"],
        "skipped_steps": run.summary["skipped_steps"],
        "loss_scale_skips": run.summary["loss_scale_skips"],
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "per_class_accuracy": [
            None if np.isnan(share) else round(float(share), 4)
            for share in per_class_accuracy(matrix)
        ],
        "confusion_matrix": matrix.tolist(),
        "scores": score_outputs(test.labels, outputs),
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.image_shape),
        "weights_sha256": hash_arrays(model.variables),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
    }


def _announce(view: ProgressView, recipe: Recipe, dataset: Dataset, model: Any) -> None:
    """Says what is about to be trained, on what, and where."""
    view.line(
        f"{recipe.name}: {model.count_params():,} parameters, {recipe.epochs:g} epochs of "
        f"{len(dataset.train):,} {dataset.name} images, batch {recipe.batch_size}, "
        f"{recipe.precision}, seed {recipe.seed}"
    )
    view.line(f"data from {dataset.source}; on {describe_device()}")
