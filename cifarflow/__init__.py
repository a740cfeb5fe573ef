"""A fast, exact custom training loop in TensorFlow for CIFAR-10-size images.

    import cifarflow

    run = cifarflow.train_recipe("lab_cnn", epochs=1)
    print(run.summary["test_accuracy"])

Names are loaded when first used: importing the package imports neither TensorFlow nor plotting.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cifarflow.classifier import Classifier, load_classifier
    from cifarflow.data.augment import (
        alternating_flip,
        cutout,
        make_augment,
        random_brightness,
        random_contrast,
        random_crop,
        random_erasing,
        random_flip,
    )
    from cifarflow.data.cifar10 import load_cifar10
    from cifarflow.data.cifar100 import load_cifar100
    from cifarflow.data.color import random_hue, random_saturation
    from cifarflow.data.dataset import DATA_CHOICES, load_data
    from cifarflow.data.folder import load_folder
    from cifarflow.data.image_files import read_image
    from cifarflow.data.inspect import DataSource, find_data
    from cifarflow.data.mixing import cutmix, mixup
    from cifarflow.data.pipeline import ArrayBatches, DatasetBatches, evaluation_batches
    from cifarflow.data.prepared import load_prepared
    from cifarflow.data.randaugment import rand_augment
    from cifarflow.data.splits import Dataset, Split
    from cifarflow.ensemble import Ensemble, Member, train_ensemble
    from cifarflow.errors import CifarflowError, NonFiniteError
    from cifarflow.evaluation.comparison import Comparison, mcnemar
    from cifarflow.evaluation.confidence import Calibration, Mistakes, calibration, worst_mistakes
    from cifarflow.evaluation.evaluate import Evaluation, evaluate_model
    from cifarflow.evaluation.metrics import (
        ClassScores,
        class_scores,
        confusion_matrix,
        per_class_accuracy,
        top_k_accuracy,
    )
    from cifarflow.evaluation.model_files import load_model_file
    from cifarflow.evaluation.predict import Predictor, predict, softmax
    from cifarflow.evaluation.statistics import Summary, summarise
    from cifarflow.evaluation.voting import Combined, combine_outputs
    from cifarflow.export import Export, Exported, ExportError, export_model
    from cifarflow.models.cnn import cnn, final
    from cifarflow.models.flops import count_flops
    from cifarflow.models.mlp import mlp
    from cifarflow.models.resnet import resnet
    from cifarflow.models.speednet import set_whitening, speednet, whitening_kernel
    from cifarflow.optimizers.muon import Muon, orthogonalize
    from cifarflow.optimizers.precision import resolve_precision, scale_for
    from cifarflow.optimizers.schedules import Constant, Cosine, InverseTime, OneCycle, Piecewise
    from cifarflow.optimizers.sgd import SGD
    from cifarflow.recipes.build import load_recipe_data
    from cifarflow.recipes.compare import compare_runs
    from cifarflow.recipes.find import (
        BatchSizes,
        BatchTrial,
        find_batch_size,
        find_recipe_learning_rate,
    )
    from cifarflow.recipes.named import RECIPES, get_recipe
    from cifarflow.recipes.recipe import Recipe
    from cifarflow.recipes.redraw import batch_at, load_recipe
    from cifarflow.recipes.run import train_recipe
    from cifarflow.recipes.trained import Trained, load_trained
    from cifarflow.replay import replay_capsule
    from cifarflow.reporting.diagram import model_summary, plot_model
    from cifarflow.reporting.plots import (
        plot_augmentations,
        plot_comparison,
        plot_confusion_matrix,
        plot_ensemble,
        plot_history,
        plot_learning_rates,
        plot_mistakes,
        plot_model_eval,
        plot_predictions,
        plot_random_from_each_class,
        plot_reliability,
    )
    from cifarflow.reporting.progress import Progress
    from cifarflow.reporting.report import write_report
    from cifarflow.sweeps import (
        Point,
        PointResult,
        Ranked,
        make_points,
        parse_grid,
        rank,
        run_points,
    )
    from cifarflow.training.averaging import Lookahead, WeightEMA
    from cifarflow.training.capsule import (
        Capsule,
        CapsuleError,
        Findings,
        examine_step,
        load_capsule,
    )
    from cifarflow.training.checkpoints import Checkpoints
    from cifarflow.training.contract import ContractError, check_step
    from cifarflow.training.distribution import WorkerError, open_team
    from cifarflow.training.history import History
    from cifarflow.training.hooks import EarlyStopping, Every, Hook
    from cifarflow.training.loop import Run, TrainingInterrupted, train
    from cifarflow.training.lr_finder import LearningRates, find_learning_rate
    from cifarflow.training.nonfinite import Capsules
    from cifarflow.training.profile import Profile, profile
    from cifarflow.training.retrace import RetraceError, RetraceGuard
    from cifarflow.training.step import Sums, cross_entropy, make_eval_step, make_train_step
    from cifarflow.trials import TIMING_RULE, Trial, Trials

__version__ = "0.1.0"

_MODULES = {
    "classifier": ("Classifier", "load_classifier"),
    "data.augment": (
        "alternating_flip",
        "cutout",
        "make_augment",
        "random_brightness",
        "random_contrast",
        "random_crop",
        "random_erasing",
        "random_flip",
    ),
    "data.cifar10": ("load_cifar10",),
    "data.cifar100": ("load_cifar100",),
    "data.color": ("random_hue", "random_saturation"),
    "data.dataset": ("DATA_CHOICES", "load_data"),
    "data.folder": ("load_folder",),
    "data.image_files": ("read_image",),
    "data.inspect": ("DataSource", "find_data"),
    "data.mixing": ("cutmix", "mixup"),
    "data.pipeline": ("ArrayBatches", "DatasetBatches", "evaluation_batches"),
    "data.prepared": ("load_prepared",),
    "data.randaugment": ("rand_augment",),
    "data.splits": ("Dataset", "Split"),
    "ensemble": ("Ensemble", "Member", "train_ensemble"),
    "errors": ("CifarflowError", "NonFiniteError"),
    "evaluation.comparison": ("Comparison", "mcnemar"),
    "evaluation.confidence": ("Calibration", "Mistakes", "calibration", "worst_mistakes"),
    "evaluation.evaluate": ("Evaluation", "evaluate_model"),
    "evaluation.metrics": (
        "ClassScores",
        "class_scores",
        "confusion_matrix",
        "per_class_accuracy",
        "top_k_accuracy",
    ),
    "evaluation.model_files": ("load_model_file",),
    "evaluation.predict": ("Predictor", "predict", "softmax"),
    "evaluation.statistics": ("Summary", "summarise"),
    "evaluation.voting": ("Combined", "combine_outputs"),
    "export": ("Export", "Exported", "ExportError", "export_model"),
    "models.cnn": ("cnn", "final"),
    "models.flops": ("count_flops",),
    "models.mlp": ("mlp",),
    "models.resnet": ("resnet",),
    "models.speednet": ("set_whitening", "speednet", "whitening_kernel"),
    "optimizers.muon": ("Muon", "orthogonalize"),
    "optimizers.precision": ("resolve_precision", "scale_for"),
    "optimizers.schedules": ("Constant", "Cosine", "InverseTime", "OneCycle", "Piecewise"),
    "optimizers.sgd": ("SGD",),
    "recipes.build": ("load_recipe_data",),
    "recipes.compare": ("compare_runs",),
    "recipes.find": ("BatchSizes", "BatchTrial", "find_batch_size", "find_recipe_learning_rate"),
    "recipes.named": ("RECIPES", "get_recipe"),
    "recipes.recipe": ("Recipe",),
    "recipes.redraw": ("batch_at", "load_recipe"),
    "recipes.run": ("train_recipe",),
    "recipes.trained": ("Trained", "load_trained"),
    "replay": ("replay_capsule",),
    "reporting.diagram": ("model_summary", "plot_model"),
    "reporting.plots": (
        "plot_augmentations",
        "plot_comparison",
        "plot_confusion_matrix",
        "plot_ensemble",
        "plot_history",
        "plot_learning_rates",
        "plot_mistakes",
        "plot_model_eval",
        "plot_predictions",
        "plot_random_from_each_class",
        "plot_reliability",
    ),
    "reporting.progress": ("Progress",),
    "reporting.report": ("write_report",),
    "sweeps": ("Point", "PointResult", "Ranked", "make_points", "parse_grid", "rank", "run_points"),
    "training.averaging": ("Lookahead", "WeightEMA"),
    "training.capsule": ("Capsule", "CapsuleError", "Findings", "examine_step", "load_capsule"),
    "training.checkpoints": ("Checkpoints",),
    "training.contract": ("ContractError", "check_step"),
    "training.distribution": ("WorkerError", "open_team"),
    "training.history": ("History",),
    "training.hooks": ("EarlyStopping", "Every", "Hook"),
    "training.loop": ("Run", "TrainingInterrupted", "train"),
    "training.lr_finder": ("LearningRates", "find_learning_rate"),
    "training.nonfinite": ("Capsules",),
    "training.profile": ("Profile", "profile"),
    "training.retrace": ("RetraceError", "RetraceGuard"),
    "training.step": ("Sums", "cross_entropy", "make_eval_step", "make_train_step"),
    "trials": ("TIMING_RULE", "Trial", "Trials"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cifarflow' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"cifarflow.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
