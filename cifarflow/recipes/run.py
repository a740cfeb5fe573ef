"""A recipe trained from one end to the other.

run = train_recipe("lab_cnn", workdir="runs/first", epochs=2)
print(run.summary["test_accuracy"])
"""

from __future__ import annotations

import contextlib
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Sequence
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
from cifarflow.training.distribution import open_team
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
        the chief alone has the workdir, and all return its summary.
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
    prepare_gpus()
    team = open_team(strategy, worker_timeout_seconds=worker_timeout_seconds)
    if team is not None:
        team.check_batch_size(recipe.batch_size)
        if not team.is_chief:
            workdir, resume, tensorboard, progress = None, False, False, None
    elif strategy != "none":
        print("strategy mirrored: there is one device, which trains alone")
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    dataset = limit_as_asked(recipe, dataset)
    if not len(dataset.test):
        raise DataError(f"the data set {dataset.name!r} must have test images, not 0")
    pieces = assemble(recipe, dataset)
    recipe, model, optimizer = pieces.recipe, pieces.model, pieces.optimizer
    batches, loss_fn = pieces.batches, pieces.loss_fn
    validation = None
    if len(dataset.validation):
        validation = evaluation_batches(
            dataset.validation.images, dataset.validation.labels, batch_size=recipe.eval_batch_size
        )

    if recipe.patience_epochs:
        if validation is None:
            raise ConfigError(
                "patience_epochs must be 0 where there are no validation images, not "
                f"{recipe.patience_epochs!r}"
            )
        hooks = [*hooks, EarlyStopping(patience_epochs=recipe.patience_epochs)]
    if check:
        check_pieces(pieces)
        print(CHECKED)
    if team is not None:
        team.check_same("a recipe", recipe.to_json())
    with contextlib.ExitStack() as opened:
        # Let go at the end, whatever it is.
        folder = opened.enter_context(Workdir(workdir)) if workdir is not None else None
        tags = {"dataset": dataset.name}
        checkpoints, capsules, board = None, None, None
        history = History(tags=tags)
        if folder is not None:
            there = folder.open(recipe.to_json(), resume=resume)
            checkpoints = Checkpoints(
                folder.checkpoints, prepare=folder.ensure, identity=recipe.to_json()
            )
            capsules = Capsules(folder.capsules, recipe=recipe.to_json())
            log: dict[str, Any] = {"tags": tags, "prepare": folder.ensure, "table": folder.table}
            if there and folder.metrics.exists():
                history = History.load(folder.metrics, **log)
            else:
                history = History(folder.metrics, **log)
            if profile is not None:
                _profile(
                    folder.path / "profile",
                    profile,
                    model,
                    optimizer,
                    batches=batches,
                    loss_fn=loss_fn,
                    jit_compile=recipe.jit_compile == "true",
                    accumulate_steps=recipe.accumulate_steps,
                )
            summary = folder.read_summary(_SHOWN_KEYS)
            newest = checkpoints.latest_whole() if summary is not None else None
            # From an older checkpoint, where the last is damaged, its end is trained once more.
            if summary is not None and newest is not None and newest == summary["steps"]:
                # A finished run: the test set is not read a second time.
                variables = [*model.variables, *optimizer.variables]
                if pieces.averaging is not None:
                    pieces.averaging.build(model)
                    variables += pieces.averaging.variables
                checkpoints.restore(newest, variables)
                if pieces.averaging is not None:
                    pieces.averaging.finish()
                if hash_arrays(model.variables) != summary["weights_sha256"]:
                    warnings.warn(
                        f"the weights in {str(checkpoints.path(newest))!r} are not those that "
                        f"{str(folder.path / 'summary.json')!r} is of: one of the two is another's",
                        stacklevel=2,
                    )
                outputs = folder.read_test_outputs()
                if team is not None:
                    team.tell(summary)
                    team.hand_out(model.variables)
                return Run(model, history, summary, folder.path, test_outputs=outputs)
            # A run that ended between its test and its summary is tested again.
            history.rows = [row for row in history.rows if row["split"] != "test"]
            if tensorboard:
                board = TensorBoard(folder.path / "tensorboard")
                history.listeners.append(board.add_row)
                _show_first_batch(board, dataset, batches.batch_at(0)[0])

        if team is not None:
            # The chief's summary, if the run is over already.
            summary = team.tell(None)
            if summary is not None:
                team.hand_out(model.variables)
                return Run(model, history, summary)

        first_step = (checkpoints.latest() or 0) if checkpoints is not None and resume else 0
        total_steps = epochs_to_steps(recipe.epochs, steps_per_epoch=batches.steps_per_epoch)
        with contextlib.ExitStack() as stack:
            view = None
            if progress is not None:
                shown = progress(
                    total_steps,
                    steps_per_epoch=batches.steps_per_epoch,
                    first_step=first_step,
                    description=f"{recipe.name}, {dataset.name}",
                )
                view = stack.enter_context(shown)
                _announce(view, recipe, dataset, model)
                if team is not None:
                    view.line(f"{team.describe()}; each has a share of every batch")
            run = train(
                model,
                optimizer,
                batches=batches,
                total_steps=total_steps,
                validation=validation,
                hooks=hooks,
                loss_fn=loss_fn,
                freeze=pieces.freeze,
                averaging=pieces.averaging,
                jit_compile=recipe.jit_compile == "true",
                accumulate_steps=recipe.accumulate_steps,
                history=history,
                checkpoints=checkpoints,
                checkpoint_every=checkpoint_every,
                resume=resume,
                on_nonfinite=on_nonfinite,
                capsules=capsules,
                progress=view,
                team=team,
            )
        if team is not None and not team.is_chief:
            # The chief tests, while the others wait for what comes out.
            return Run(model, history, team.tell(None))
        outputs = predict(model, dataset.test.images, **predict_options(recipe))
        summary = _summary(recipe, dataset, run, loss_fn, outputs)
        if board is not None:
            _show_predictions(board, dataset, outputs, step=summary["steps"])
        history.flush()
        summary["total_seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None and checkpoints is not None:
            _write_tested(folder, dataset, outputs)
            folder.write_json("summary.json", summary)
            asked = {"tensorboard": tensorboard, "profile": profile is not None}
            paths = [folder.path / name for name in asked if asked[name]]
            lost = folder.missing(checkpoints.path(summary["steps"]), *paths)
            best = checkpoints.lost_best()
            if best is not None:
                lost.append(f"the best checkpoint, of step {best}")
            if lost:
                raise WorkdirError(
                    f"workdir {str(workdir)!r} lacks {', '.join(lost)}, removed while the run went "
                    "on: all else is there; to have that too, run it again in another folder"
                )
        if team is not None:
            team.tell(summary)
        path = folder.path if folder is not None else None
        return Run(model, history, summary, path, test_outputs=outputs)


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


def _profile(
    directory: pathlib.Path, show: Callable[[str], object], *arguments: Any, **options: Any
) -> None:
    """Profiles some steps and shows what came out, unless the run has a profile already."""
    if directory.exists():
        show(f"the run has a profile already, in {directory}: it stays, and no other is made")
        return
    found = profile_steps(*arguments, directory=directory, **options)
    show(f"{found.table()}\n{found.verdict}")
    show(f"the trace is in {directory}: https://ui.perfetto.dev opens trace.json.gz")


def _write_tested(folder: Workdir, dataset: Dataset, outputs: np.ndarray) -> None:
    """Keeps what the test came to, image by image."""
    images, labels = dataset.test
    folder.write_test_outputs(outputs)
    folder.write_test_labels(labels)
    worst = worst_mistakes(labels, softmax(outputs))
    folder.write_mistakes(images=images[worst.indices], **worst._asdict())


def _summary(
    recipe: Recipe, dataset: Dataset, run: Run, loss_fn: Any, outputs: np.ndarray
) -> dict[str, Any]:
    """Says what came of the run; `outputs` are the model's for the test set."""
    model, test = run.model, dataset.test
    losses = loss_fn(tf.constant(test.labels), tf.constant(outputs)).numpy()
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
