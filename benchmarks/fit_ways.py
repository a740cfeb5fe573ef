"""Keras `fit` and our own loop on the same batches, from the same weights, each its own process.

    python benchmarks/fit_ways.py        # a worker: see `worker.serve`; started by fit_parity.py

The first line on stdin says which way and what it works on: way, model (a lab recipe's name),
precision, fit_optimizer ("ours" or "keras"), data, data_dir, examples (0 for all).  Dropout is off:
its masks depend on how often a layer's seed was used, which differs between two ways of tracing.
"""

from __future__ import annotations

import time
from typing import Any

import ways
import worker


class Parity(ways.Way):
    """What both ways share; `losses` begins anew, `round` goes on from where the last one ended."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        import keras

        import cifarflow as cf
        from cifarflow.recipes import build

        self._dataset = ways.load_dataset(spec)
        recipe = cf.get_recipe(
            spec["model"], model_options={"dropout": 0.0}, precision=spec["precision"]
        )
        self._recipe = build.resolve(recipe, self._dataset)
        self._keras, self._build = keras, build
        images, labels = self._dataset.train
        self._batches = cf.ArrayBatches(
            images, labels, batch_size=self._recipe.batch_size, seed=self._recipe.seed
        )
        self._prepare()

    def _prepare(self) -> None:
        """Makes what the rounds run."""

    def _make_model(self) -> Any:
        """The net with its first weights, the same each time."""
        dataset = self._dataset
        return self._build.build_model(
            self._recipe, image_shape=dataset.image_shape, num_classes=dataset.num_classes
        )

    def _make_optimizer(self) -> Any:
        """The recipe's optimiser."""
        steps = self._batches.steps_per_epoch
        return self._build.build_optimizer(self._recipe, steps_per_epoch=steps)

    def losses(self, steps: int) -> list[float]:
        """The loss of each of the first steps, from before its update."""
        raise NotImplementedError


class Fit(Parity):
    """`model.compile` and `model.fit` over the batches as a `tf.data.Dataset`."""

    def _prepare(self) -> None:
        self._model = self._make_compiled()
        self.facts["warms_up"] = True

    def _make_compiled(self) -> Any:
        keras, optimizer = self._keras, self._make_optimizer()
        if self.spec["fit_optimizer"] == "keras":
            import keras_models

            recipe = self._recipe
            optimizer = keras_models.make_sgd(recipe.learning_rate, decay=recipe.decay)
        model = self._make_model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
        return model

    def losses(self, steps: int) -> list[float]:
        """Keras reports the mean so far; with its sums set back at each batch it is the batch's."""
        found: list[float] = []
        model = self._make_compiled()
        record = self._keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs=None: model.reset_metrics(),
            on_train_batch_end=lambda batch, logs=None: found.append(float(logs["loss"])),
        )
        dataset = self._batches.dataset(0, steps)
        model.fit(dataset, shuffle=False, verbose=0, callbacks=[record])
        return found

    def round(self, steps: int) -> float:
        """Two epochs of `fit`, the second timed from its begin to its end, when the loss is read.

        The first is the warm-up, and begins with what `fit` does but once in so many steps.
        """
        times: list[float] = []

        def note(epoch: int, logs: Any = None) -> None:
            times.append(time.perf_counter())
            self.loss = (logs or {}).get("loss")

        callback = self._keras.callbacks.LambdaCallback(on_epoch_begin=note, on_epoch_end=note)
        self._model.fit(
            self._batches.dataset(),
            steps_per_epoch=steps,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[callback],
        )
        return times[-1] - times[-2]


class Loop(Parity):
    """`cifarflow.train`: compiled calls of many steps, which draw their batches themselves."""

    fused = False

    def _prepare(self) -> None:
        from cifarflow.training.runner import StepRunner
        from cifarflow.training.step import make_train_step

        self._options: dict[str, Any] = {"jit_compile": self._recipe.jit_compile == "true"}
        step = make_train_step(
            self._make_model(), self._make_optimizer(), fused=self.fused, **self._options
        )
        self._runner = StepRunner(
            step, self._batches, first_step=0, last_step=2**40, **self._options
        )

    def losses(self, steps: int) -> list[float]:
        """As the loop logs them."""
        import cifarflow as cf

        run = cf.train(
            self._make_model(),
            self._make_optimizer(),
            batches=self._batches,
            total_steps=steps,
            log_every=cf.Every(steps=1),
            fused=self.fused,
            **self._options,
        )
        return run.history.series("train", "loss")[1]

    def round(self, steps: int) -> float:
        """One compiled call, and one more a new epoch."""
        seconds, self.loss = ways.run_timed(self._runner, steps)
        return seconds


class FusedLoop(Loop):
    """The same by fused kernels, as it is unless one asks for Keras's own layers."""

    fused = True


WAYS: dict[str, type[Parity]] = {"fit": Fit, "loop": Loop, "loop_fused": FusedLoop}

if __name__ == "__main__":
    worker.serve(lambda spec: ways.make_way(spec, WAYS))
