"""All the pictures of one run, into one folder.

    paths = draw_run(run, dataset, "runs/first/plots")

In the folder are then

    model_eval.png          curves, confusion matrix and sample predictions in one
    history.png             loss and accuracy over the epochs
    confusion_matrix.png    which class was taken for which
    mistakes.png            the mistakes that the model is most confident of
    reliability.png         how often it is right when it is how sure
    model.png               the model's layers and shapes

Each names recipe and data set in its heading.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np

from cifarflow.data.splits import Dataset
from cifarflow.evaluation.confidence import calibration
from cifarflow.evaluation.predict import predict, softmax
from cifarflow.reporting.diagram import plot_model
from cifarflow.reporting.plots import (
    plot_confusion_matrix,
    plot_history,
    plot_mistakes,
    plot_model_eval,
    plot_reliability,
)
from cifarflow.training.loop import Run


def draw_run(
    run: Run, dataset: Dataset, directory: str | os.PathLike[str]
) -> dict[str, pathlib.Path]:
    """Draws a finished run.

    Args:
      run: as `train_recipe` returns it.
      dataset: the data it was trained on.
      directory: where the PNG files go; made if it is not there.

    Returns:
      The files by what they show: "model_eval", "history", "confusion_matrix", "mistakes",
      "reliability", "model".

    Raises:
      WorkdirError: if they cannot be written.
    """
    folder = pathlib.Path(directory)
    names = ("model_eval", "history", "confusion_matrix", "mistakes", "reliability", "model")
    paths = {name: folder / f"{name}.png" for name in names}
    summary, test = run.summary, dataset.test
    title = f"{summary['recipe']}, {summary['dataset']}"
    tested = f"{title}: test accuracy {summary['test_accuracy']:.3f}"
    outputs = run.test_outputs
    if outputs is None:
        outputs = predict(run.model, test.images)
    probabilities = softmax(outputs)
    matrix = np.array(summary["confusion_matrix"])
    class_names = dataset.class_names
    plot_model_eval(
        run.history,
        matrix,
        test.images,
        test.labels,
        probabilities,
        class_names=class_names,
        seed=summary["seed"],
        title=tested,
        path=paths["model_eval"],
    )
    plot_history(run.history, title=title, path=paths["history"])
    plot_confusion_matrix(
        matrix, class_names=class_names, title=tested, path=paths["confusion_matrix"]
    )
    plot_mistakes(
        test.images,
        test.labels,
        probabilities,
        class_names=class_names,
        title=tested,
        path=paths["mistakes"],
    )
    # Not those of the summary: one from before has none.
    found = calibration(test.labels, probabilities)
    plot_reliability(found.bins, title=tested, path=paths["reliability"])
    plot_model(run.model, title=title, path=paths["model"])
    return paths
