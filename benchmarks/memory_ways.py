"""Whole runs whose memory is measured, each a process of its own.

    python benchmarks/memory_ways.py         # a worker: see `worker.serve`; started by memory.py

The first line on stdin says which way and what it works on: way, model (a recipe's name), precision
(of our way), epochs, batch_size, learning_rate, data, data_dir, examples (0 for all).  The run is
the worker's first and only step.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from typing import Any

import ways
import worker


class MemoryWay(ways.Way):
    """One way of training and evaluating a model; `figures` is to be asked for afterwards."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        # Both ways need both, and nothing else is in the process yet.
        import keras  # noqa: F401
        import tensorflow as tf

        tf.zeros([]).numpy()
        self._alone = worker.rss_bytes()
        self._epochs: list[int] = []
        self._ran: dict[str, Any] = {}

    def round(self, steps: int) -> float:
        """The run, once."""
        start = time.perf_counter()
        self._ran = self.run()
        return time.perf_counter() - start

    def run(self) -> dict[str, Any]:
        """Trains, validates and tests; returns what came out."""
        raise NotImplementedError

    def note_epoch(self, *_: object) -> None:
        """Notes what is resident at the end of an epoch, after its validation."""
        self._epochs.append(worker.rss_bytes())

    def figures(self) -> dict[str, Any]:
        """Bytes resident: with TensorFlow and Keras alone, after each epoch, at the peak."""
        return {
            "alone_bytes": self._alone,
            "peak_bytes": worker.peak_rss_bytes(),
            "epochs_bytes": self._epochs,
            **self._ran,
        }


class Cifarflow(MemoryWay):
    """`cifarflow.train_recipe`, as examples/train.py calls it: with checkpoints in a workdir."""

    def run(self) -> dict[str, Any]:
        """Trains the recipe."""
        import cifarflow as cf

        spec = self.spec
        recipe = cf.get_recipe(
            spec["model"],
            precision=spec["precision"],
            epochs=spec["epochs"],
            batch_size=spec["batch_size"],
            learning_rate=spec["learning_rate"],
            data=spec["data"],
            limit_examples=spec["examples"],
        )
        dataset = cf.load_recipe_data(recipe, data_dir=spec["data_dir"])
        with tempfile.TemporaryDirectory() as folder:
            run = cf.train_recipe(
                recipe,
                dataset=dataset,
                workdir=pathlib.Path(folder) / "run",
                hooks=[cf.Hook(cf.Every(epochs=1), self.note_epoch)],
            )
        names = ("test_accuracy", "precision", "steps")
        return {name: run.summary[name] for name in names}


class Notebook(MemoryWay):
    """The notebook's way: float32 images and one-hot labels in Keras's `fit` and `evaluate`.

    The bytes that the images were read from are let go, as in the notebook, where the float32
    images take over their name.
    """

    def run(self) -> dict[str, Any]:
        """Trains a plain Keras model; nothing but the reading of the images is cifarflow's."""
        import keras
        import keras_models

        spec = self.spec
        train, validation, test = self._load()
        model = keras_models.build(spec["model"])
        model.compile(
            optimizer=keras_models.make_sgd(spec["learning_rate"]),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        start = time.perf_counter()
        model.fit(
            *train,
            batch_size=spec["batch_size"],
            epochs=spec["epochs"],
            validation_data=validation,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=self.note_epoch)],
        )
        seconds = time.perf_counter() - start
        accuracy = model.evaluate(*test, batch_size=128, verbose=0)[1]
        steps = spec["epochs"] * -(-len(train[0]) // spec["batch_size"])
        return {
            "test_accuracy": accuracy,
            "precision": "float32",
            "steps": steps,
            "fit_seconds": seconds,
        }

    def _load(self) -> list[tuple[Any, Any]]:
        """Images and labels of the three splits, as the notebook makes them."""
        import keras_models

        dataset = ways.load_dataset(self.spec)
        splits = (dataset.train, dataset.validation, dataset.test)
        return [keras_models.as_notebook(split, dataset.num_classes) for split in splits]


WAYS: dict[str, type[MemoryWay]] = {"cifarflow": Cifarflow, "notebook": Notebook}

if __name__ == "__main__":
    worker.serve(lambda spec: ways.make_way(spec, WAYS))
