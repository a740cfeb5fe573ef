"""Many training steps in one compiled call.

    runner = StepRunner(train_step, batches, first_step=0, last_step=1000)
    runner.compile()
    sums = runner.run(100)  # steps 0 to 99
    sums = runner.run(100)  # steps 100 to 199

Batches of arrays are drawn inside the call, from arrays on the device that trains; others come
through `tf.data`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from cifarflow.data.pipeline import ArrayBatches, Batches
from cifarflow.device import has_gpu
from cifarflow.errors import ConfigError, check_int, check_seed
from cifarflow.training.step import Sums

# Around the operations that draw a batch inside a call: a trace knows them by it.
INPUT_SCOPE = "draw_batch"


class StepRunner:
    """Runs the steps of a training run in their order, as many a call as asked for.

    Args:
      train_step: a `tf.function` as `make_train_step` returns.
      batches: where the batches come from.
      first_step: the first step that `run` runs.
      last_step: the step at which the run ends.
      jit_compile: whether XLA compiles the steps.  On a GPU, where batches are drawn inside, it
        compiles the loop over them too, so that a call is a single program.

    Attributes:
      element_spec: `tf.TensorSpec` of the images and of the labels of a batch.
    """

    def __init__(
        self,
        train_step: Any,
        batches: Batches,
        *,
        first_step: int,
        last_step: int,
        jit_compile: bool = False,
    ) -> None:
        self._arrays = batches if isinstance(batches, ArrayBatches) and batches.resident else None
        if self._arrays is not None:
            self.element_spec = self._arrays.element_spec
            # On a CPU, XLA's loops have only slow kernels for convolutions: a step takes many times
            # as long within one as outside.
            whole = jit_compile and has_gpu()
            self._function = _drawing(train_step, self._arrays, jit_compile=whole)
            # An iterator keeps its own count.
            self._next_step, self._epoch, self._order = first_step, -1, None
            self._seed = self._arrays.seed
        else:
            self._dataset = functools.partial(batches.dataset, last_step=last_step)
            dataset = self._dataset(first_step)
            self.element_spec = dataset.element_spec
            self._function = make_run_steps(train_step)
            self._iterator = iter(dataset)
        self._compiled: Any = None

    def compile(self) -> Any:
        """Traces the call, once and for all, and returns it as a concrete function."""
        if self._compiled is None:
            count = tf.TensorSpec([], tf.int64)
            if self._arrays is not None:
                shape = [self._arrays.steps_per_epoch, self._arrays.batch_size]
                order = tf.TensorSpec(shape, tf.int32)
                self._compiled = self._function.get_concrete_function(order, count, count, count)
            else:
                self._compiled = self._function.get_concrete_function(self._iterator, count)
        return self._compiled

    def run(self, count: int) -> Sums:
        """Runs the next `count` steps.

        Returns:
          The `Sums` over all their examples, in float64.
        """
        run_steps = self.compile()
        if self._arrays is None:
            return Sums(*run_steps(self._iterator, tf.constant(count, tf.int64)))
        total: Any = None
        while count:
            epoch, position = divmod(self._next_step, self._arrays.steps_per_epoch)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._arrays.order(epoch, seed=self._seed)
            part = min(count, self._arrays.steps_per_epoch - position)
            sums = run_steps(
                self._order,
                tf.constant(self._next_step, tf.int64),
                tf.constant(self._next_step + part, tf.int64),
                tf.constant(self._seed, tf.int64),
            )
            total = sums if total is None else total + sums
            self._next_step += part
            count -= part
        return Sums(*total)

    @contextlib.contextmanager
    def visiting(self, step: int) -> Iterator[None]:
        """Within the block `run` runs the steps from another on; after it, those it would have run.

        Args:
          step: the step that `run` runs next, of the same compiled call.
        """
        if self._arrays is not None:
            kept, self._next_step = self._next_step, step
        else:
            kept, self._iterator = self._iterator, iter(self._dataset(step))
        try:
            yield
        finally:
            if self._arrays is not None:
                self._next_step = kept
            else:
                self._iterator = kept

    def restart(self, *, seed: int | None = None, first_step: int = 0) -> None:
        """Goes to the start of a run of another seed, or of the same, in the same compiled call.

        The batches are the same as of `ArrayBatches` with that seed.  Model and optimiser stay as
        they are.

        Args:
          seed: of order and augmentation, 0..2**31-1; None means the batches' own.
          first_step: the step that `run` runs next.

        Raises:
          ConfigError: if seed or first_step is out of range, or the batches come through `tf.data`.
        """
        if self._arrays is None:
            raise ConfigError(
                "batches must be ArrayBatches with resident=True to start over, not batches that "
                "come through tf.data"
            )
        self._seed = self._arrays.seed if seed is None else check_seed(seed)
        self._next_step = check_int("first_step", first_step, minimum=0)
        self._epoch, self._order = -1, None


def make_run_steps(train_step: Any) -> Any:
    """Compiles many steps into one call, over batches that an iterator brings.

    Args:
      train_step: a `tf.function` as `make_train_step` returns.

    Returns:
      A `tf.function` of (iterator over batches, number of steps as a scalar tensor) that returns
      the `Sums` over all their examples, in float64.  Traced once: the number is a tensor.
    """

    @tf.function
    def run_steps(iterator: Any, num_steps: Any) -> Sums:
        sums = _no_sums()
        for _ in tf.range(num_steps):
            images, labels = next(iterator)
            sums = _add(sums, train_step(images, labels))
        return Sums(*sums)

    return run_steps


def _drawing(train_step: Any, batches: ArrayBatches, *, jit_compile: bool) -> Any:
    """Compiles many steps of one epoch into one call that draws their batches itself."""

    @tf.function(jit_compile=jit_compile)
    def run_steps(order: Any, first_step: Any, last_step: Any, seed: Any) -> Sums:
        sums = _no_sums()
        with tf.name_scope(INPUT_SCOPE):
            images, labels = batches.draw(order, first_step, seed=seed)
        # XLA would compile a loop over tf.range(first_step, last_step) anew for each of its bounds.
        step = first_step
        while step < last_step:
            step += 1
            # A batch ahead, as nothing of it depends on the step: the two run side by side.
            with tf.name_scope(INPUT_SCOPE):
                next_images, next_labels = batches.draw(order, step, seed=seed)
            sums = _add(sums, train_step(images, labels))
            images, labels = next_images, next_labels
        return Sums(*sums)

    return run_steps


def _no_sums() -> list[Any]:
    # In 64 bits, so that the sums do not depend on how many steps share a call.
    return [tf.zeros([], tf.float64)] * len(Sums._fields)


def _add(sums: list[Any], step_sums: Sums) -> list[Any]:
    return [a + tf.cast(b, tf.float64) for a, b in zip(sums, Sums(*step_sums), strict=True)]
