"""Batches for training and evaluation.

    batches = ArrayBatches(images, labels, batch_size=32, seed=0, augment=make_augment("flip"))
    for images, labels in batches.dataset(first_step=0, last_step=100):
        ...
    images, labels = batches.batch_at(57)           # the 58th batch again, augmentation included

A training batch is a pure function of (seed, step): the order of an epoch is a permutation drawn
from (seed, epoch), and augmentation is drawn from (seed, step).  So there is no shuffle buffer,
nothing to save, and a run that resumes at step N draws exactly the batches it would have drawn.

The arrays stay in memory as uint8, a quarter of their size in float32; a batch is one gather.
`train` makes it within its compiled calls, where the arrays are, on a GPU in its memory; `dataset`
has the same batches as a `tf.data.Dataset`, for any other loop.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from cifarflow.data.augment import AugmentFn
from cifarflow.data.splits import check_images_and_labels
from cifarflow.device import has_gpu, prepare_gpus
from cifarflow.errors import ConfigError, DataError, check_int, check_seed

_PREFETCH = 4
# Larger arrays stay on the host: a GPU's memory is for activations too.
_MOST_RESIDENT_BYTES = 4 * 2**30


class Batches(Protocol):
    """What the training loop needs of its data.

    Attributes:
      steps_per_epoch: batches in one pass over the data.
    """

    steps_per_epoch: int

    def dataset(self, first_step: int, last_step: int) -> Any:
        """Steps first_step..last_step-1, as a `tf.data.Dataset` of (images, labels)."""


def epoch_order(num_examples: int, *, seed: Any, epoch: Any) -> Any:
    """The order in which one epoch visits the examples.

    Args:
      num_examples: N.
      seed: the run's seed, 0..2**31-1; a number or an integer tensor.
      epoch: scalar, 0 for the first; a number or an integer tensor.

    Returns:
      A permutation of 0..N-1, [N] int32, a pure function of the three arguments.
    """
    # Sorting random keys costs next to nothing an epoch and needs no state.  int64 keys make a
    # tie as good as impossible; a stable sort makes even a tie come out the same everywhere.
    keys = tf.random.stateless_uniform(
        [num_examples],
        tf.stack([tf.cast(seed, tf.int64), tf.cast(epoch, tf.int64)]),
        minval=None,
        maxval=None,
        dtype=tf.int64,
        alg="philox",
    )
    return tf.argsort(keys, stable=True)


class ArrayBatches:
    """Training batches of arrays held in memory.

    Each epoch visits the examples in a new order; the examples that do not fill a last batch are
    left out of that epoch (others in the next), so that every batch has one shape and the step is
    compiled once.

    Args:
      images: [N, H, W, C] uint8, 0..255.
      labels: [N] integers, 0..num_classes-1.
      batch_size: examples a batch, 1..N.
      seed: seed of order and augmentation, 0..2**31-1.
      augment: a function of (images [B, H, W, C], seed [2] int64), see `make_augment`.  One with a
        true attribute `needs_examples` is also given examples, the indices [B] int32 of the images
        in the arrays, and epoch, a scalar int64.  One with a true attribute `needs_labels` is also
        given labels [B] int32 and num_classes, and returns images and labels.
      shuffle: whether an epoch has a new order; False keeps the order of the arrays.
      num_classes: if given, labels are checked against it; an augmentation that mixes labels
        needs it.
      resident: whether training draws the batches inside its compiled calls, from arrays on the
        device that trains, and not through `tf.data`.  The batches are the same; drawing them
        inside costs less, unless `augment` takes long; one that calls Python needs False under
        XLA.  None means yes, if the images take at most 4 GiB.

    Attributes:
      steps_per_epoch: N // batch_size.
      augment: as given.
      resident: whether training draws the batches itself.
      element_spec: `tf.TensorSpec` of the images and of the labels of a batch.

    Raises:
      ConfigError: if batch_size or seed is out of range, or augment is no function, needs a
        num_classes that is not given, or its settings do not fit the images.
      DataError: if images or labels have another shape, dtype or range.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int = 32,
        seed: int = 0,
        augment: AugmentFn | None = None,
        shuffle: bool = True,
        num_classes: int | None = None,
        resident: bool | None = None,
    ) -> None:
        check_images_and_labels(images, labels, num_classes=num_classes)
        self.num_examples = len(images)
        self.batch_size = check_int("batch_size", batch_size)
        if self.batch_size > self.num_examples:
            raise ConfigError(
                f"batch_size must be at most the {self.num_examples} training examples, "
                f"not {batch_size}"
            )
        self.seed = check_seed(seed)
        self.steps_per_epoch = self.num_examples // self.batch_size
        if augment is not None and not callable(augment):
            raise ConfigError(
                "augment must be a function of (images, seed), such as make_augment returns, "
                f"not {augment!r}"
            )
        if resident not in (None, False, True):
            raise ConfigError(f"resident must be True, False or None, not {resident!r}")
        self.resident = images.nbytes <= _MOST_RESIDENT_BYTES if resident is None else resident
        self.augment = augment
        self._needs_examples = bool(getattr(augment, "needs_examples", False))
        self._needs_labels = bool(getattr(augment, "needs_labels", False))
        self._num_classes = num_classes
        if self._needs_labels and num_classes is None:
            raise ConfigError(
                "num_classes must be given for an augmentation that mixes labels, not None"
            )
        self._shuffle = shuffle
        prepare_gpus()
        # On the host even where there is a GPU: tf.data runs there.
        with tf.device("CPU"):
            self._images = tf.constant(images)
            self._labels = tf.constant(labels, tf.int32)
            self.element_spec = (
                tf.TensorSpec([self.batch_size, *images.shape[1:]], tf.uint8),
                tf.TensorSpec([self.batch_size], tf.int32),
            )
            if augment is not None:
                # Tried at once: from within tf.data its errors come late, as a StagingError.
                self.element_spec = tuple(map(tf.TensorSpec.from_tensor, self._draw_at(0)))
        self._on_device: tuple[Any, Any] | None = None

    def dataset(self, first_step: int = 0, last_step: int | None = None) -> Any:
        """Batches first_step..last_step-1 of the run.

        Args:
          first_step: 0 for a new run, N to go on after N steps.
          last_step: where the dataset ends; by default it never does.

        Returns:
          A `tf.data.Dataset` of (images [B, H, W, C] uint8, labels [B] int32), or what `augment`
          makes of them: labels that are mixed are [B, num_classes] float32.

        Raises:
          ConfigError: if first_step is negative, or last_step less than first_step.
        """
        first_step = check_int("first_step", first_step, minimum=0)
        end = np.iinfo(np.int64).max if last_step is None else last_step
        end = check_int("last_step", end, minimum=first_step)
        first_epoch, skipped = divmod(first_step, self.steps_per_epoch)
        batches = tf.data.Dataset.range(first_epoch, np.iinfo(np.int64).max)
        # A permutation an epoch, ready one epoch ahead; unbatch hands out its rows.
        batches = batches.map(self._epoch_indices).prefetch(1).unbatch()
        batches = batches.skip(skipped).take(end - first_step)
        # The order is kept either way; augmenting uses both the cores of a small machine.
        calls = 2 if self.augment else None
        batches = batches.map(self._host_batch, num_parallel_calls=calls).prefetch(_PREFETCH)
        return batches.with_options(_options())

    def batch_at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws one batch of the run again.

        Args:
          step: which, 0 for the first.

        Returns:
          images and labels as the step got them, see `dataset`.

        Raises:
          ConfigError: if step is negative.
        """
        images, labels = self._draw_at(check_int("step", step, minimum=0))
        return images.numpy(), labels.numpy()

    def order(self, epoch: int, *, seed: Any = None) -> Any:
        """The examples that each step of an epoch takes.

        Args:
          epoch: which, 0 for the first.
          seed: of the run, a scalar; None means the batches' own.

        Returns:
          Indices [steps_per_epoch, B] int32.

        Raises:
          ConfigError: if epoch is negative.
        """
        with tf.device("CPU"):
            return self._epoch_indices(check_int("epoch", epoch, minimum=0), seed)[1]

    def draw(self, order: Any, step: Any, *, seed: Any = None) -> tuple[Any, Any]:
        """Draws a batch of an epoch, within a compiled function and on the device it runs on.

        Args:
          order: what `order` returned for the epoch of the step, and for the same seed.
          step: scalar int64, of the run.
          seed: scalar int64, the run's; None means the batches' own, as a constant.

        Returns:
          images and labels as `dataset` has them.
        """
        if self._on_device is None:
            self._on_device = (self._images, self._labels)
            if has_gpu():
                with tf.init_scope(), tf.device("GPU:0"):
                    self._on_device = (tf.identity(self._images), tf.identity(self._labels))
        # Not order[...]: XLA would compile anew for each first step.
        indices = tf.gather(order, step % self.steps_per_epoch)
        # TensorFlow's own gather of uint8 has no kernel for a GPU: XLA makes one.
        batch = tf.function(self._batch, jit_compile=True) if has_gpu() else self._batch
        return batch(step, indices, *self._on_device, self._seed_or_own(seed))

    def _draw_at(self, step: int) -> tuple[Any, Any]:
        epoch, position = divmod(step, self.steps_per_epoch)
        steps, indices = self._epoch_indices(epoch)
        return self._host_batch(steps[position], indices[position])

    def _seed_or_own(self, seed: Any) -> Any:
        return tf.cast(self.seed if seed is None else seed, tf.int64)

    def _epoch_indices(self, epoch: Any, seed: Any = None) -> tuple[Any, Any]:
        """The steps [S] int64 of an epoch and their examples [S, B] int32."""
        if self._shuffle:
            seed = self._seed_or_own(seed)
            order = epoch_order(self.num_examples, seed=seed, epoch=epoch)
        else:
            order = tf.range(self.num_examples)
        used = self.steps_per_epoch * self.batch_size
        indices = tf.reshape(order[:used], [self.steps_per_epoch, self.batch_size])
        first = tf.cast(epoch, tf.int64) * self.steps_per_epoch
        return first + tf.range(self.steps_per_epoch, dtype=tf.int64), indices

    def _host_batch(self, step: Any, indices: Any) -> tuple[Any, Any]:
        seed = self._seed_or_own(None)
        return self._batch(step, indices, self._images, self._labels, seed)

    def _batch(
        self, step: Any, indices: Any, images: Any, labels: Any, seed: Any
    ) -> tuple[Any, Any]:
        images, labels = tf.gather(images, indices), tf.gather(labels, indices)
        if self.augment is not None:
            about: dict[str, Any] = {}
            if self._needs_examples:
                about = {"examples": indices, "epoch": step // self.steps_per_epoch}
            if self._needs_labels:
                about |= {"labels": labels, "num_classes": self._num_classes}
            augmented = self.augment(images, tf.stack([seed, step]), **about)
            images, labels = augmented if self._needs_labels else (augmented, labels)
        return images, labels


class DatasetBatches:
    """A user's own `tf.data.Dataset` of (images, labels) batches, for the training loop.

    The dataset is repeated for as many epochs as are asked for.  To resume, the batches before
    the first step are drawn and thrown away, so the data must come in the same order each time:
    give `shuffle` a seed and `reshuffle_each_iteration=False`, or leave shuffling to
    `ArrayBatches`.

    Args:
      dataset: batches of (images [B, H, W, C], labels [B] or [B, num_classes]).
      steps_per_epoch: batches in one epoch; by default the length of the dataset.

    Attributes:
      steps_per_epoch: batches in one epoch.

    Raises:
      DataError: if it is no dataset, does not hold such pairs, or is empty.
      ConfigError: if its length is unknown or infinite and steps_per_epoch is not given.
    """

    def __init__(self, dataset: Any, *, steps_per_epoch: int | None = None) -> None:
        if not isinstance(dataset, tf.data.Dataset):
            raise DataError(f"dataset must be a tf.data.Dataset, not {dataset!r}")
        spec = dataset.element_spec
        ranks = [_rank(part) for part in spec] if isinstance(spec, tuple) else []
        if len(ranks) != 2 or ranks[0] != 4 or ranks[1] not in (1, 2):
            raise DataError(
                "the dataset must hold batches of (images [B, H, W, C], labels [B] or "
                "[B, num_classes]), "
                f"not elements of {spec!r}"
            )
        length = int(dataset.cardinality())
        if length == 0:
            raise DataError("the dataset must hold at least one batch, not 0")
        if steps_per_epoch is None:
            if length < 1:
                raise ConfigError(
                    f"steps_per_epoch must be given: the dataset's length is {length} "
                    "(-1 is infinite, -2 unknown)"
                )
            steps_per_epoch = length
        self.steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch)
        self._dataset = dataset

    def dataset(self, first_step: int = 0, last_step: int | None = None) -> Any:
        """Batches first_step..last_step-1, as `ArrayBatches.dataset`."""
        first_step = check_int("first_step", first_step, minimum=0)
        repeated = self._dataset.repeat().skip(first_step)
        if last_step is not None:
            last_step = check_int("last_step", last_step, minimum=first_step)
            repeated = repeated.take(last_step - first_step)
        return repeated.prefetch(_PREFETCH)


def _rank(spec: Any) -> int | None:
    """The rank of one part of a dataset's elements; None if unknown or not a tensor."""
    return spec.shape.rank if isinstance(spec, tf.TensorSpec) else None


def evaluation_batches(
    images: np.ndarray, labels: np.ndarray, *, batch_size: int = 128
) -> tf.data.Dataset:
    """Batches in the arrays' order, the last one smaller where they do not divide.

    Args:
      images: [N, H, W, C] uint8, 0..255.
      labels: [N] integers.
      batch_size: examples a batch; more than N means one batch of N.

    Returns:
      A `tf.data.Dataset` of (images [b, H, W, C] uint8, labels [b] int32), b <= batch_size.

    Raises:
      ConfigError: if batch_size is not a whole number >= 1.
      DataError: if images or labels have another shape or dtype.
    """
    check_images_and_labels(images, labels)
    size = check_int("batch_size", batch_size)
    prepare_gpus()
    with tf.device("CPU"):
        all_images, all_labels = tf.constant(images), tf.constant(labels, tf.int32)
    count = len(images)

    def batch(first: Any) -> tuple[Any, Any]:
        last = tf.minimum(first + size, count)
        return all_images[first:last], all_labels[first:last]

    # Slices of whole batches: per-example slicing costs more than a small model's step.
    return tf.data.Dataset.range(0, count, size).map(batch).prefetch(2).with_options(_options())


def _options() -> Any:
    options = tf.data.Options()
    options.deterministic = True
    # The few stages have fixed sizes: a tuning thread would only take time from the step.
    options.autotune.enabled = False
    return options
