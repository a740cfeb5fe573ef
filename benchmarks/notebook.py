"""The lab the notebook's way, as a control: float32 arrays, one-hot labels, Keras `fit`.

    python benchmarks/notebook.py --recipe=lab_mlp --seeds=3

Trains a lab recipe's model with plain Keras (its SGD, its shuffling, its loop, no code of the
training loop) at the recipe's settings, and prints test loss, test accuracy and seconds for each
seed, and their means.  What the loop reaches should be no different.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import json
import statistics
import time
from typing import Any

import keras
import keras_models
from absl import flags

from cifarflow.data.splits import Dataset
from cifarflow.device import describe_device
from cifarflow.errors import check_int
from cifarflow.recipes import build, named
from cifarflow.recipes.recipe import Recipe

FLAGS = flags.FLAGS
cli.define_recipe_flags("lab_mlp")
flags.DEFINE_string("data_dir", None, "where CIFAR-10 is, a file or folder")
flags.DEFINE_integer("seeds", 1, "runs, with seeds --seed, --seed+1, ...")


def main() -> None:
    recipe = cli.recipe_from_flags()
    count = check_int("--seeds", FLAGS.seeds)
    dataset = build.load_recipe_data(recipe, data_dir=FLAGS.data_dir)
    recipe = build.resolve(recipe, dataset)
    results = []
    for seed in range(recipe.seed, recipe.seed + count):
        results.append(fit(named.get_recipe(recipe, seed=seed), dataset))
        print(json.dumps(results[-1]), flush=True)
    accuracies = [result["test_accuracy"] for result in results]
    print(
        f"{recipe.name} by Keras fit on {dataset.name}, {recipe.precision}, {describe_device()}: "
        f"test accuracy {statistics.mean(accuracies):.4f} (n={count}), "
        f"{statistics.mean(result['seconds'] for result in results):.1f} s"
    )


def fit(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """Trains and evaluates as the notebook does."""
    # Only the model is seeded.  After `keras.utils.set_random_seed`, `fit` (Keras 3.15) shuffles
    # arrays into the same order in every epoch, which the notebook did not.
    classes = dataset.num_classes
    # The builder scales 0..255 itself, so the notebook's division by 255 is undone in its input.
    inner = build.build_model(recipe, image_shape=dataset.image_shape, num_classes=classes)
    inputs = keras.Input(dataset.image_shape)
    outputs = keras.layers.Softmax(dtype="float32")(inner(inputs * 255.0))
    model = keras.Model(inputs, outputs)
    model.compile(
        keras_models.make_sgd(
            recipe.learning_rate,
            decay=recipe.decay,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
        ),
        loss="categorical_crossentropy",
        metrics=["accuracy"],
    )
    images, labels = keras_models.as_notebook(dataset.train, classes)
    start = time.perf_counter()
    fitted = model.fit(
        images,
        labels,
        batch_size=recipe.batch_size,
        epochs=max(1, round(recipe.epochs)),
        validation_data=keras_models.as_notebook(dataset.validation, classes),
        verbose=0,
    )
    seconds = time.perf_counter() - start
    images, labels = keras_models.as_notebook(dataset.test, classes)
    loss, accuracy = model.evaluate(images, labels, 128, verbose=0)
    return {
        "seed": recipe.seed,
        "train_accuracy": round(fitted.history["accuracy"][-1], 4),
        "validation_accuracy": round(fitted.history["val_accuracy"][-1], 4),
        "test_loss": round(loss, 4),
        "test_accuracy": round(accuracy, 4),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    cli.run(main)
