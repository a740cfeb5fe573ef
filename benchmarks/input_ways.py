"""The ways of bringing batches to a training step that are compared, each a process of its own.

    python benchmarks/input_ways.py     # a worker: see `worker.serve`; started by input_pipeline.py

The first line on stdin says which way and what it works on: way, batch_size, augment ("none", or
parts of flip,crop:PIXELS), data, data_dir, examples.  All but the bare copy draw shuffled batches
of the same images.  With an augmentation all deliver float32 of mean 0 and deviation 1; without
one, the bytes as they are stored, but for Keras's layers, the least of which makes them float32.
Each way is written as well as its library allows.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import nets
import ways
import worker

_SHUFFLE_BUFFER = 10_000  # examples; as tutorials have it
# Batches made ahead, by all ways.  AUTOTUNE would double this at each turn of the benchmark, up to
# hundreds of batches, made while it is another way's turn: that is no speed.
_PREFETCH = 4
_SIDE = 32  # of the images, in pixels


class InputWay(ways.Way):
    """One way of bringing batches.

    Attributes:
      lead_in: batches at the start of a round that are not timed: those that are ready by then.
      facts: `delivers`, the dtype of the images; `idle_rss_bytes`, what the process has resident
        when its library and the images are loaded and nothing else is done.
    """

    lead_in = 2 * _PREFETCH

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.load_library()
        self.images, self.labels = ways.load_dataset(spec).train
        # Reading the images took more for a moment; that is not the way's.
        worker.forget_peak()
        idle = worker.rss_bytes()
        self.facts = {"idle_rss_bytes": idle, "delivers": self.prepare()}

    def load_library(self) -> None:
        """Imports what the way needs, and lets it make its threads."""
        import tensorflow as tf

        tf.zeros([]).numpy()

    def prepare(self) -> str:
        """Makes the pipeline and returns the dtype of its images."""
        raise NotImplementedError

    def bring(self, count: int) -> None:
        """Brings so many batches, and reads one number of them, so that all is done."""
        raise NotImplementedError

    def round(self, steps: int) -> float:
        """Brings so many batches; returns their seconds."""
        if self.lead_in:
            self.bring(self.lead_in)
        start = time.perf_counter()
        self.bring(steps)
        return time.perf_counter() - start


def normalise(images: Any) -> Any:
    """Images 0..255 as float32 of mean 0 and deviation 1: (x / 255 - mean) / deviation."""
    import tensorflow as tf

    scale, shift = _scale_and_shift()
    return tf.cast(images, tf.float32) * scale - shift


def _scale_and_shift() -> tuple[Any, Any]:
    """The same as one product and one difference, [32, 32, 3] float32 each.

    As large as an image: repeating three numbers over 1,024 pixels takes TensorFlow five times as
    long (174,000 against 944,000 images/s on two cores).
    """
    import numpy as np

    mean, deviation = np.array(nets.MEAN), np.array(nets.STD)
    both = (1 / (255 * deviation), mean / deviation)
    scale, shift = (np.tile(part.astype("float32"), (_SIDE, _SIDE, 1)) for part in both)
    return scale, shift


class Normalised:
    """An augmentation and `normalise` after it.

    Args:
      augment: as `make_augment` returns.
    """

    def __init__(self, augment: Any) -> None:
        self._augment = augment
        self.needs_examples, self.needs_labels = augment.needs_examples, augment.needs_labels

    def __call__(self, images: Any, seed: Any, **about: Any) -> Any:
        """Images, and labels where the augmentation mixes them."""
        found = self._augment(images, seed, **about)
        return (normalise(found[0]), found[1]) if self.needs_labels else normalise(found)


class Cifarflow(InputWay):
    """`ArrayBatches` through `tf.data`, drained by the training loop's own compiled call."""

    resident = False

    def load_library(self) -> None:
        """Also what the loop imports."""
        super().load_library()
        import cifarflow.training.runner  # noqa: F401

    def prepare(self) -> str:
        """The loop's runner with a step that reads one number of the batch."""
        import tensorflow as tf

        from cifarflow.data.augment import make_augment
        from cifarflow.data.pipeline import ArrayBatches
        from cifarflow.training.runner import StepRunner
        from cifarflow.training.step import Sums

        augment = make_augment(self.spec["augment"])
        self.batches = ArrayBatches(
            self.images,
            self.labels,
            batch_size=self.spec["batch_size"],
            augment=None if augment is None else Normalised(augment),
            num_classes=int(self.labels.max()) + 1,
            resident=self.resident,
        )

        @tf.function
        def take(images: Any, labels: Any) -> Sums:
            return Sums(*(tf.cast(part, tf.float32) for part in (*_read(images, labels), 1)))

        self._runner = StepRunner(take, self.batches, first_step=0, last_step=2**40)
        return str(self._runner.element_spec[0].dtype.name)

    def bring(self, count: int) -> None:
        """One compiled call; if batches are drawn inside, one for each epoch."""
        float(self._runner.run(count).loss)


class CifarflowDrawn(Cifarflow):
    """`ArrayBatches` drawn inside the compiled call, as `cifarflow.train` does by default."""

    resident, lead_in = True, 0


class CifarflowPython(Cifarflow):
    """`ArrayBatches` through `tf.data`, drained by a loop in Python, as in one's own script."""

    def prepare(self) -> str:
        """The dataset without the compiled loop."""
        delivers = super().prepare()
        self._iterator = iter(self.batches.dataset())
        return delivers

    def bring(self, count: int) -> None:
        """A `for` over the batches."""
        batch: Any = None
        for images, labels in itertools.islice(self._iterator, count):
            batch = images, labels
        float(_read(*batch)[0])


def _read(images: Any, labels: Any) -> tuple[Any, Any]:
    """One number of each, so that neither can be left out."""
    return images[0, 0, 0, 0], labels[0] if labels.shape.rank == 1 else labels[0, 0]


class TfData(InputWay):
    """Examples one by one through `tf.data`, as its tutorials have it."""

    def prepare(self) -> str:
        """The dataset, and a compiled loop that drains it: no Python a batch here either."""
        import tensorflow as tf

        self.dataset = self.make_dataset()
        self._iterator = iter(self.dataset)

        @tf.function
        def drain(iterator: Any, steps: Any) -> Any:
            total = tf.zeros([])
            for _ in tf.range(steps):
                images, labels = next(iterator)
                for number in _read(images, labels):
                    total += tf.cast(number, tf.float32)
            return total

        self._drain = drain.get_concrete_function(self._iterator, tf.TensorSpec([], tf.int64))
        return str(self.dataset.element_spec[0].dtype.name)

    def make_dataset(self) -> Any:
        """Cached, shuffled, augmented with `tf.image`, batched."""
        import tensorflow as tf

        examples = self._examples()
        if self.spec["augment"] != "none":
            examples = examples.map(self._make_augment(), num_parallel_calls=tf.data.AUTOTUNE)
        return self._forever(examples.batch(self.spec["batch_size"], drop_remainder=True))

    def _examples(self) -> Any:
        import tensorflow as tf

        examples = tf.data.Dataset.from_tensor_slices((self.images, self.labels))
        return examples.cache().shuffle(_SHUFFLE_BUFFER)

    def _forever(self, batches: Any) -> Any:
        return batches.repeat().prefetch(_PREFETCH)

    def _make_augment(self) -> Any:
        import tensorflow as tf

        parts = _parts(self.spec)

        def augment(image: Any, label: Any) -> tuple[Any, Any]:
            if "crop" in parts:
                side = _SIDE + 2 * parts["crop"]
                image = tf.image.resize_with_crop_or_pad(image, side, side)
                image = tf.image.random_crop(image, [_SIDE, _SIDE, 3])
            if "flip" in parts:
                image = tf.image.random_flip_left_right(image)
            return normalise(image), label

        return augment

    def bring(self, count: int) -> None:
        """One compiled call."""
        import tensorflow as tf

        float(self._drain(self._iterator, tf.constant(count, tf.int64)))


def _parts(spec: dict[str, Any]) -> dict[str, int]:
    from cifarflow.data.augment import parse_augment

    return parse_augment(spec["augment"])


class KerasLayers(TfData):
    """Keras's preprocessing layers on batches within `tf.data`, where its guide wants them.

    Each image is moved by itself, as the other ways do it.  Moved by whole pixels: the layer's own
    choice, to interpolate, is slower.
    """

    def load_library(self) -> None:
        """Keras too."""
        super().load_library()
        import keras  # noqa: F401

    def make_dataset(self) -> Any:
        """Cached, shuffled, batched, and mapped by the layers."""
        import keras
        import tensorflow as tf

        layers = keras.Sequential(self._make_layers())

        def augment(images: Any, labels: Any) -> tuple[Any, Any]:
            return layers(images, training=True), labels

        batches = self._examples().batch(self.spec["batch_size"], drop_remainder=True)
        return self._forever(batches.map(augment, num_parallel_calls=tf.data.AUTOTUNE))

    def _make_layers(self) -> list[Any]:
        import keras

        if self.spec["augment"] == "none":
            return [keras.layers.Rescaling(1 / 255)]
        parts, (scale, shift) = _parts(self.spec), _scale_and_shift()
        chosen = [keras.layers.RandomFlip("horizontal")] if "flip" in parts else []
        if "crop" in parts:
            chosen += self._make_crop(parts["crop"])
        return [*chosen, keras.layers.Rescaling(scale, offset=-shift)]

    def _make_crop(self, padding: int) -> list[Any]:
        import keras

        share = padding / _SIDE
        return [
            keras.layers.RandomTranslation(
                share, share, fill_mode="constant", interpolation="nearest"
            )
        ]


class KerasCrop(KerasLayers):
    """The same with RandomCrop, which takes one window for all images of a batch: less work."""

    def _make_crop(self, padding: int) -> list[Any]:
        import keras

        return [keras.layers.ZeroPadding2D(padding), keras.layers.RandomCrop(_SIDE, _SIDE)]


class Copy(InputWay):
    """A bare copy of the bytes of a batch, in the order of the array, into memory that is there."""

    lead_in = 0

    def load_library(self) -> None:
        """NumPy alone."""
        import numpy  # noqa: F401

    def prepare(self) -> str:
        """The slices to copy."""
        import numpy as np

        size = self.spec["batch_size"]
        slices = [self.images[i : i + size] for i in range(0, len(self.images) - size + 1, size)]
        self._slices, self._copyto = itertools.cycle(slices), np.copyto
        self.batch = np.zeros_like(slices[0])
        return str(self.batch.dtype)

    def bring(self, count: int) -> None:
        """Nothing but copies."""
        for images in itertools.islice(self._slices, count):
            self._copyto(self.batch, images)


WAYS: dict[str, type[InputWay]] = {
    "cifarflow_drawn": CifarflowDrawn,
    "cifarflow": Cifarflow,
    "cifarflow_python": CifarflowPython,
    "tf_data": TfData,
    "keras_layers": KerasLayers,
    "keras_crop": KerasCrop,
    "copy": Copy,
}

if __name__ == "__main__":
    worker.serve(lambda spec: ways.make_way(spec, WAYS))
