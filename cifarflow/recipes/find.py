"""Settings of a recipe found by trying: its learning rate, and its batch size.

    found = find_recipe_learning_rate("lab_cnn")
    print(found.steepest, found.tenth_of_minimum)

    sizes = find_batch_size("lab_cnn", memory_limit_gib=4)
    print(sizes.table(), sizes.largest, sizes.efficient)

The rate is tried in this process, by `find_learning_rate`.  Each batch size is tried in a process
of its own, so that none is measured with what another has left, and that one which takes all the
memory there is ends alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from cifarflow.data.splits import Dataset, Split
from cifarflow.device import has_gpu
from cifarflow.errors import CifarflowError, ConfigError, check_float, check_int
from cifarflow.recipes.build import assemble, limit_as_asked, load_recipe_data, rate_factor
from cifarflow.recipes.named import get_recipe
from cifarflow.recipes.recipe import Recipe
from cifarflow.training.lr_finder import LearningRates, find_learning_rate
from cifarflow.training.runner import StepRunner
from cifarflow.training.step import make_train_step
from cifarflow.untrusted import one_line, parse_json

_GIB = 2**30
# Of the memory that is free, without a limit of one's own: the rest of the machine goes on.
_SHARE_OF_FREE = 0.9
# A batch size is as good as the fastest within this share of its throughput.
_NEAR_THE_BEST = 0.05
# The largest that fits is found to within this share of it.
_EXACTNESS = 1 / 16
_SECONDS_A_LOOK = 0.02
# A process that is slower than any that trains is stuck.
_MOST_SECONDS = 1800


def find_recipe_learning_rate(
    recipe: str | Recipe,
    *,
    data_dir: str | pathlib.Path | None = None,
    dataset: Dataset | None = None,
    steps: int = 300,
    low: float = 1e-5,
    high: float = 10.0,
    smoothing: float = 0.95,
    diverged_at: float = 4.0,
) -> LearningRates:
    """Tries learning rates for a recipe, on its own batches from its initial weights.

    Args:
      recipe: a name in `RECIPES`, or a recipe.
      data_dir: where the data is, see `load_data`.
      dataset: data that is loaded already, in place of loading the recipe's.
      steps: as in `find_learning_rate`.
      low: as there, in terms of the recipe's learning_rate.
      high: likewise.
      smoothing: as there.
      diverged_at: as there.

    Returns:
      As `find_learning_rate`, every rate in terms of the recipe's learning_rate.

    Raises:
      ConfigError: if an argument is out of range, or the recipe does not fit the data.
      DataError, DataNotFoundError: see `load_data`.
    """
    recipe = get_recipe(recipe)
    low = check_float("low", low, above_minimum=True)
    high = check_float("high", high, minimum=low, above_minimum=True)
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    pieces = assemble(recipe, limit_as_asked(recipe, dataset))
    # What the optimiser's own rate is, for a learning_rate of 1.
    factor = rate_factor(recipe)
    found = find_learning_rate(
        pieces.model,
        pieces.optimizer,
        batches=pieces.batches,
        steps=steps,
        low=low * factor,
        high=high * factor,
        smoothing=smoothing,
        diverged_at=diverged_at,
        loss_fn=pieces.loss_fn,
        freeze=pieces.freeze,
        jit_compile=pieces.recipe.jit_compile == "true",
        accumulate_steps=recipe.accumulate_steps,
    )
    return found.scaled(1 / factor)


@dataclasses.dataclass(frozen=True)
class BatchTrial:
    """One batch size, tried.

    Attributes:
      batch_size: examples a step.
      memory_bytes: the peak: of a GPU's memory what TensorFlow took, else what the process had
        resident; of one that was ended what was seen last, 0 where nothing was.
      images_per_second: in training; None where it does not fit.
      reason: why it does not fit; "" where it does.
    """

    batch_size: int
    memory_bytes: int
    images_per_second: float | None
    reason: str = ""

    def describe(self) -> str:
        """It as a line of `BatchSizes.table`."""
        memory = f"{self.memory_bytes / _GIB:.2f} GiB" if self.memory_bytes else "-"
        if self.images_per_second is None:
            return f"{self.batch_size:>10}  {memory:>12}  {self.reason}"
        return f"{self.batch_size:>10}  {memory:>12}  {self.images_per_second:>10,.0f}"


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """What batch sizes were tried, and what is best.

    Attributes:
      trials: all, the smallest first.
      memory_limit_bytes: what each was held to, None where by the device alone.
    """

    trials: tuple[BatchTrial, ...]
    memory_limit_bytes: int | None

    @property
    def largest(self) -> int:
        """The largest that fits, of those tried."""
        return max(trial.batch_size for trial in self._fitting())

    @property
    def is_bounded(self) -> bool:
        """Whether one was tried that does not fit, so that `largest` is the largest of all."""
        return len(self._fitting()) < len(self.trials)

    @property
    def efficient(self) -> int:
        """The smallest whose throughput is within 5 % of the best."""
        best = max(trial.images_per_second or 0.0 for trial in self._fitting())
        enough = (1 - _NEAR_THE_BEST) * best
        return min(t.batch_size for t in self._fitting() if (t.images_per_second or 0.0) >= enough)

    def table(self) -> str:
        """A line a trial, and a heading."""
        heading = f"{'batch size':>10}  {'peak memory':>12}  {'images/s':>10}"
        return "\n".join([heading, *(trial.describe() for trial in self.trials)])

    def _fitting(self) -> list[BatchTrial]:
        return [trial for trial in self.trials if trial.images_per_second is not None]


def find_batch_size(
    recipe: str | Recipe,
    *,
    memory_limit_gib: float | None = None,
    multiple: int = 32,
    largest: int | None = None,
    seconds: float = 1.0,
    data_dir: str | pathlib.Path | None = None,
    dataset: Dataset | None = None,
    report: Callable[[BatchTrial], object] = lambda _: None,
) -> BatchSizes:
    """Tries ever larger batches until memory is exhausted, each in a process of its own.

    Sizes double from `multiple` on; once one does not fit, the largest that does is looked for
    between the last two, to within a sixteenth or `multiple`.  Measured is training alone, on
    drawn images as many as the recipe trains on; evaluation has a batch size of its own.

    Args:
      recipe: a name in `RECIPES`, or a recipe; its own batch_size is not used.
      memory_limit_gib: what a process may take, > 0, in GiB of 2**30 bytes: of memory on a CPU, of
        the GPU's on a GPU.  None means nine tenths of what is free, or what the GPU gives.  On
        Linux a process on a CPU is ended as it goes beyond, elsewhere that is seen afterwards.
      multiple: sizes are multiples of this, and of the recipe's accumulate_steps.
      largest: no larger one is tried; by default, and at most, the number of training images.
      seconds: how long each is timed, at least, > 0.
      data_dir: where the data is, see `load_data`.
      dataset: data that is loaded already, in place of loading the recipe's.
      report: called with each `BatchTrial` as it is done.

    Returns:
      The `BatchSizes`.

    Raises:
      ConfigError: if an argument is out of range, no batch fits, or the recipe cannot be built.
      DataError, DataNotFoundError: see `load_data`.
    """
    recipe = get_recipe(recipe)
    multiple = math.lcm(check_int("multiple", multiple), recipe.accumulate_steps)
    seconds = check_float("seconds", seconds, above_minimum=True)
    limit = None
    if memory_limit_gib is not None:
        given = check_float("memory_limit_gib", memory_limit_gib, above_minimum=True)
        limit = round(given * _GIB)
    if largest is not None:
        largest = check_int("largest", largest, minimum=multiple)
    if dataset is None:
        dataset = load_recipe_data(recipe, data_dir=data_dir)
    dataset = limit_as_asked(recipe, dataset)
    most = min(len(dataset.train), largest or len(dataset.train)) // multiple * multiple
    if not most:
        raise ConfigError(
            f"multiple must be at most the {len(dataset.train)} training images, not {multiple}"
        )
    if limit is None and not has_gpu():
        limit = _free_bytes()
    spec = {
        "recipe": recipe.to_json(),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "examples": len(dataset.train),
        "seconds": seconds,
    }

    def fits(size: int) -> bool:
        trials[size] = _try_size(size, spec, limit)
        report(trials[size])
        return not trials[size].reason

    trials: dict[int, BatchTrial] = {}
    good, bad = _search(fits, multiple, most)
    if not good:
        raise ConfigError(
            f"memory_limit_gib must be more than {(limit or 0) / _GIB:.3g}: even a batch of {bad} "
            f"does not fit: {trials[bad].reason}"
        )
    return BatchSizes(tuple(trials[size] for size in sorted(trials)), limit)


def _search(fits: Callable[[int], bool], multiple: int, most: int) -> tuple[int, int]:
    """The largest multiple that fits, 0 for none, and the least tried that does not, 0 likewise."""
    good, size = 0, multiple
    while fits(size):
        good = size
        if size == most:
            return good, 0
        size = min(2 * size, most)
    bad = size
    while good and bad - good > max(multiple, _EXACTNESS * good):
        middle = (good + bad) // (2 * multiple) * multiple
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good, bad


def _try_size(size: int, spec: Mapping[str, Any], limit: int | None) -> BatchTrial:
    """Measures one batch size in a child process."""
    # Where this package is found, the child finds it too.
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    # A GPU's memory is not the process's.
    watched = limit if not has_gpu() else None
    text = json.dumps({**spec, "batch_size": size})
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifarflow.recipes.find"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=environ,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
        try:
            seen = _wait(process, text, watched)
        finally:
            process.kill()
            process.wait()
        if watched is not None and seen > watched:
            return BatchTrial(size, seen, None, f"over {watched / _GIB:.3g} GiB")
        out.seek(0)
        err.seek(0)
        answer, said = out.read(), err.read().decode(errors="replace")
    # By the kernel, for want of memory; or by the C++ library, which has no other way to say so.
    if process.returncode == -9 or (process.returncode and "bad_alloc" in said):
        return BatchTrial(size, seen, None, "the machine's memory is exhausted")
    try:
        found = parse_json(answer.splitlines()[-1])
    except (ValueError, IndexError):
        last = said.strip().rpartition("\n")[2]
        raise ConfigError(
            f"a batch of {size} could not be tried, exit status {process.returncode}: "
            f"{one_line(last)}"
        ) from None
    if "error" in found:
        raise ConfigError(found["error"])
    if "reason" in found:
        return BatchTrial(size, seen, None, found["reason"])
    memory = int(found["memory_bytes"])
    if limit is not None and memory > limit:
        return BatchTrial(size, memory, None, f"over {limit / _GIB:.3g} GiB")
    return BatchTrial(size, memory, float(found["images_per_second"]))


def _wait(process: subprocess.Popen[bytes], text: str, limit: int | None) -> int:
    """Waits until a child ends or has more memory than it may; returns what it was seen to have."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(text.encode())
        process.stdin.close()
    seen, started = 0, time.monotonic()
    while time.monotonic() - started < _MOST_SECONDS:
        try:
            process.wait(timeout=_SECONDS_A_LOOK)
            break
        except subprocess.TimeoutExpired:
            seen = max(seen, _status_bytes(process.pid, "VmHWM:"))
            if limit is not None and seen > limit:
                break
    return seen


# --- the child ------------------------------------------------------------------------------


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Trains some steps of a recipe on drawn images, in the child process.

    Args:
      spec: recipe, as JSON has it, batch_size, image_shape, num_classes, examples and seconds.

    Returns:
      memory_bytes and images_per_second; or reason, why it does not fit; or error, of a recipe that
      cannot be built.
    """
    try:
        return _measured(spec)
    except CifarflowError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"reason": "the machine's memory is exhausted"}
    except tf.errors.OpError as error:
        # XLA's own allocator raises an error of another type, with this in its text.
        is_memory = isinstance(error, tf.errors.ResourceExhaustedError)
        if is_memory or "RESOURCE_EXHAUSTED" in str(error):
            return {"reason": "the device's memory is exhausted"}
        raise


def _measured(spec: Mapping[str, Any]) -> dict[str, Any]:
    recipe = dataclasses.replace(
        Recipe.from_json(spec["recipe"]),
        batch_size=spec["batch_size"],
        # With a step or two an epoch there may be none of another; it takes no memory.
        schedule="constant",
        drop_epochs=(),
        warmup_epochs=0.0,
        limit_examples=0,
    )
    draw = np.random.default_rng(0)
    count, classes = spec["examples"], spec["num_classes"]
    images = draw.integers(0, 256, (count, *spec["image_shape"]), np.uint8)
    train = Split(images, draw.integers(0, classes, count).astype(np.int32))
    none = Split(images[:0], train.labels[:0])
    names = tuple(map(str, range(classes)))
    pieces = assemble(recipe, Dataset("drawn", train, none, none, names, "drawn"))
    jit_compile = pieces.recipe.jit_compile == "true"
    step = make_train_step(
        pieces.model,
        pieces.optimizer,
        loss_fn=pieces.loss_fn,
        freeze=pieces.freeze,
        jit_compile=jit_compile,
        accumulate_steps=recipe.accumulate_steps,
    )
    most_steps = 2**31
    if pieces.averaging is not None:
        step = pieces.averaging.around(step, pieces.model, total_steps=most_steps)
    runner = StepRunner(
        step, pieces.batches, first_step=0, last_step=most_steps, jit_compile=jit_compile
    )
    # The first call compiles, the second one has all the memory it wants.
    for _ in range(2):
        float(runner.run(1).examples)
    done, taken, steps = 0.0, 0.0, 1
    while taken < spec["seconds"]:
        started = time.perf_counter()
        # Reading the sums waits until the device has finished.
        done += float(runner.run(steps).examples)
        taken += time.perf_counter() - started
        steps *= 2
    return {"memory_bytes": _peak_bytes(), "images_per_second": done / taken}


def _peak_bytes() -> int:
    """The most memory so far: of the GPU, else of this process."""
    if has_gpu():
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    peak = _status_bytes("self", "VmHWM:")
    if peak:
        return peak
    # Not first: its peak includes that of the parent this process was forked from.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(process: int | str, field: str) -> int:
    """A size that Linux tells of a process; 0 on other systems, and of one that has ended."""
    return _bytes_in(pathlib.Path(f"/proc/{process}/status"), field)


def _free_bytes() -> int | None:
    """Nine tenths of the memory that is free; None where that is not known."""
    free = [_bytes_in(pathlib.Path("/proc/meminfo"), "MemAvailable:")]
    group = pathlib.Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    known = [value for value in free if value > 0]
    return int(_SHARE_OF_FREE * min(known)) if known else None


def _bytes_in(path: pathlib.Path, field: str) -> int:
    try:
        return int(path.read_text().partition(field)[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return 0


if __name__ == "__main__":
    print(json.dumps(measure(parse_json(sys.stdin.buffer.read()))))
