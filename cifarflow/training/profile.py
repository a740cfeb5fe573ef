"""Where the time of a training step goes: waiting for input, the host's work, the device's.

    found = profile(model, optimizer, batches=batches, directory="runs/first/profile")
    print(found.table())
    print(found.verdict)

The loop is the one that `train` runs, compiled in the same way.  The time of a step is measured
without the profiler; then some steps are traced, and the trace says how that time is shared out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import json
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from cifarflow.data.pipeline import ArrayBatches, Batches
from cifarflow.device import describe_device, has_bfloat16, has_gpu, prepare_gpus
from cifarflow.errors import ConfigError, WorkdirError, check_int, check_micro_batches
from cifarflow.files import replacing
from cifarflow.training.loop import as_batches, check_fits, explained
from cifarflow.training.runner import INPUT_SCOPE, StepRunner
from cifarflow.training.step import LossFn, make_train_step
from cifarflow.training.trace import (
    Split,
    check_readable,
    read_trace,
    split_time,
    write_chrome_trace,
)

# What `profile` leaves in its directory.
_SUMMARY, _CHROME, _PLUGIN = "profile.json", "trace.json.gz", "plugins/profile"
_MARK = "profiled_steps"
# Around the operations of the augmentation, by which a trace knows them.
_AUGMENT_SCOPE = "augment"
# As long as the calls of `train`, so that Python's share of one is as small as there.
_SECONDS_A_CALL = 0.3
_ROUNDS, _FEWEST_ROUNDS, _SECONDS_OF_ROUNDS = 5, 3, 10.0
# More batches than are drawn ahead: after so many steps the loop waits as it would in the long run.
_STEPS_AHEAD = 6
_MANY_STEPS = 10**9
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class OpTime:
    """What one kind of operation takes of a step.

    Attributes:
      kind: its type and the layer it is of, as "Conv2DBackpropFilter (conv2d_1)".
      ms: milliseconds a step; where several computed at once each has its equal share.
      count: how often a step.
      family: "convolution", "product" (of matrices), "update" (of weights) or "other".
    """

    kind: str
    ms: float
    count: float
    family: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a training step goes.

    `input_ms`, `device_ms` and `host_ms` sum to `step_ms`, which was measured without the
    profiler: they are its shares in the trace.  The profiler takes some time for each operation,
    so for a model of many small ones the host's share comes out somewhat high.

    Attributes:
      step_ms: milliseconds a step, the median of `rounds_ms`.
      input_ms: in which no operation of the step computed, and the loop waited for a batch or
        drew one itself, within the compiled call.  Drawing while the step computes is not in it.
      device_ms: in which at least one operation of the step computed.
      host_ms: the rest: between operations, and Python's share of a call.
      ops: what computed, by kind, the costliest first; their times sum to `device_ms`.
      bound: "input", "device" or "host", whichever is largest.
      batch_size: examples a step.
      precision: dtype that the model's layers compute in.
      jit_compile: whether XLA compiled the step.
      device: what it ran on, in words.
      steps: how many were traced.
      traced_step_ms: milliseconds a step under the profiler.
      rounds_ms: milliseconds a step of each call measured.
      directory: where the trace is, None if it was not kept.
      verdict: one sentence: what bounds the step, and the one setting to change.
      setting: that setting: "augment", "dataset", "batch_size", "jit_compile", "precision" or
        "model".
    """

    step_ms: float
    input_ms: float
    device_ms: float
    host_ms: float
    ops: tuple[OpTime, ...]
    bound: str
    batch_size: float
    precision: str
    jit_compile: bool
    device: str
    steps: int
    traced_step_ms: float
    rounds_ms: tuple[float, ...]
    directory: pathlib.Path | None = None
    verdict: str = ""
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, without the directory."""
        values = dataclasses.asdict(self)
        del values["directory"]
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def table(self) -> str:
        """The times in aligned lines, for a terminal; the verdict is not among them."""
        xla = " with XLA" if self.jit_compile else ""
        rate = 1000 * self.batch_size / self.step_ms
        rows = [
            ("step", self.step_ms, f"{self.batch_size:g} images, {rate:,.0f} a second"),
            ("  input", self.input_ms, "waiting for a batch, or drawing it"),
            ("  host", self.host_ms, "between operations"),
            ("  device", self.device_ms, f"computing in {self.precision}{xla}"),
        ]
        rows += [(f"    {op.kind}", op.ms, f"{op.count:g} a step") for op in self.ops[:_SHOWN]]
        others = self.ops[_SHOWN:]
        if others:
            rows.append(("    others", sum(op.ms for op in others), f"{len(others)} more kinds"))
        width = max(len(name) for name, _, _ in rows)
        lines = [
            f"{name:<{width}}  {ms:10.3f} ms  {_percent(ms / self.step_ms):>5}  {note}"
            for name, ms, note in rows
        ]
        return "\n".join([f"where the time of a step goes, on {self.device}:", *lines])


def profile(
    model: Any,
    optimizer: Any,
    *,
    batches: Batches | tf.data.Dataset,
    steps: int = 20,
    jit_compile: bool = False,
    fused: bool = True,
    accumulate_steps: int = 1,
    loss_fn: LossFn | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Profile:
    """Measures a training step and says what bounds it.

    Nothing is trained: the steps are real ones, but the variables of model and optimiser get the
    values back that they had.  An optimiser that was not built for the model yet is built then.

    Args:
      model: a Keras model, as for `train`.
      optimizer: a Keras optimiser, as for `train`.
      batches: `ArrayBatches`, `DatasetBatches` or a `tf.data.Dataset`; the first ones are drawn.
      steps: how many to trace, after others that warm up and are timed.
      jit_compile: whether XLA compiles the steps.
      fused: whether the model trains by fused kernels, see `make_train_step`.
      accumulate_steps: micro-batches that a batch is cut into, see there.
      loss_fn: function of (labels, outputs) that returns losses [B]; cross-entropy by default.
      directory: where to keep the trace: `plugins/profile/` is for TensorBoard's profiler,
        `trace.json.gz` for Perfetto and chrome://tracing, `profile.json` has the figures.  None
        keeps nothing.

    Returns:
      The `Profile`.

    Raises:
      ConfigError: if an argument is of a wrong kind or out of range, another profiler is running,
        or this TensorFlow's traces cannot be read.
      DataError: if images or labels do not fit the model.
      WorkdirError: if the directory cannot be written, or has a profile in it already.

    Source: TensorFlow's profiler and its XPlane format, `tf.profiler.experimental`.
    """
    check_int("steps", steps)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"optimizer must be a Keras optimizer, not {optimizer!r:.80}")
    for name, value in (("jit_compile", jit_compile), ("fused", fused)):
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")
    batches = as_batches(batches)
    folder = None if directory is None else _check_directory(directory)
    check_readable()
    prepare_gpus()
    train_step = make_train_step(
        model,
        optimizer,
        loss_fn=loss_fn,
        jit_compile=jit_compile,
        fused=fused,
        accumulate_steps=accumulate_steps,
    )
    with _named_augment(batches):
        runner = StepRunner(
            train_step, batches, first_step=0, last_step=_MANY_STEPS, jit_compile=jit_compile
        )
        check_fits(model, runner.element_spec)
        check_micro_batches(runner.element_spec[0].shape[0], accumulate_steps)
        run_steps = runner.compile()
    variables = [*model.variables, *optimizer.variables]
    scratch_folder = tempfile.TemporaryDirectory(prefix="cifarflow-profile-")
    with _restored(variables), explained(model), scratch_folder as scratch:

        def call(count: int) -> tuple[float, float]:
            """Runs so many steps; returns seconds and examples of one."""
            started = time.perf_counter()
            # Reading the sums waits until the device has finished.
            examples = float(runner.run(count).examples)
            return (time.perf_counter() - started) / count, examples / count

        rounds = _time_steps(call, steps)
        traced_seconds, batch_size = _trace_steps(call, steps, scratch)
        planes = sorted(pathlib.Path(scratch).rglob("*.xplane.pb"))
        lines = [line for path in planes for line in read_trace(path)]
        split = split_time(lines, mark=_MARK, input_scope=INPUT_SCOPE, on_gpu=has_gpu())
        step_ms = 1e3 * statistics.median(rounds)
        scale = step_ms / split.total
        shares = {"input": split.input, "host": split.host, "device": split.device}
        found = Profile(
            step_ms=step_ms,
            input_ms=split.input * scale,
            host_ms=split.host * scale,
            device_ms=split.device * scale,
            ops=_kinds(
                split.operations,
                _layers_of_scopes(model, run_steps),
                optimizer.name,
                scale=scale,
                steps=steps,
            ),
            bound=max(shares, key=lambda name: shares[name]),
            batch_size=batch_size,
            precision=_precision(model),
            jit_compile=jit_compile,
            device=describe_device(),
            steps=steps,
            traced_step_ms=1e3 * traced_seconds,
            rounds_ms=tuple(1e3 * seconds for seconds in rounds),
            directory=folder,
        )
        found = _judge(found, split, batches)
        if folder is not None:
            for path in planes:
                with replacing(folder / path.relative_to(scratch), what="trace") as file:
                    file.write(path.read_bytes())
            write_chrome_trace(folder / _CHROME, lines)
            _write_summary(folder / _SUMMARY, found)
    return found


@contextlib.contextmanager
def _restored(variables: Sequence[Any]) -> Iterator[None]:
    """Gives the variables the values back that they had, whatever happens."""
    # Copies: the step updates in place.
    kept = [np.asarray(variable).copy() for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)


def _check_directory(directory: str | os.PathLike[str]) -> pathlib.Path:
    """The directory as a path, if a profile can be written there; it makes nothing."""
    if not isinstance(directory, (str, os.PathLike)) or not str(directory).strip():
        raise ConfigError(f"directory must be a path, or None to keep nothing, not {directory!r}")
    folder = pathlib.Path(os.path.expanduser(directory))
    try:
        kept = (name for name in (_SUMMARY, _CHROME, _PLUGIN) if (folder / name).exists())
        there = next(kept, None)
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        is_good = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError:
        # A name that is too long, a folder that may not be looked into.
        there, is_good = None, False
    if there is not None:
        raise WorkdirError(
            f"{str(folder)!r} has a profile in it already, {there}: give another directory"
        )
    if not is_good:
        raise WorkdirError(
            f"cannot write to directory {str(folder)!r}: give one that can be made and written"
        )
    return folder


@contextlib.contextmanager
def _named_augment(batches: Batches) -> Iterator[None]:
    """Puts a scope around the operations of an augmentation that is traced meanwhile."""
    if not isinstance(batches, ArrayBatches) or batches.augment is None:
        yield
        return
    augment = batches.augment

    def named(images: Any, seed: Any, **about: Any) -> Any:
        with tf.name_scope(_AUGMENT_SCOPE):
            return augment(images, seed, **about)

    # Not a copy of the batches, which would take its own copy of the arrays to a GPU, where
    # training needs them too.
    batches.augment = named
    try:
        yield
    finally:
        batches.augment = augment


def _precision(model: Any) -> str:
    """The dtype of most layers with weights; of any where none has."""
    weighted = [layer for layer in model.layers if layer.weights] or model.layers
    return statistics.mode(str(layer.compute_dtype) for layer in weighted)


def _time_steps(call: Callable[[int], tuple[float, float]], steps: int) -> list[float]:
    """Seconds a step in each of several calls, after a warm-up."""
    # The first one optimises the graph and, with XLA, compiles.
    call(1)
    seconds, _ = call(min(steps, _STEPS_AHEAD))
    count = max(steps, round(_SECONDS_A_CALL / seconds))
    rounds: list[float] = []
    while len(rounds) < _ROUNDS:
        rounds.append(call(count)[0])
        if len(rounds) >= _FEWEST_ROUNDS and sum(rounds) * count > _SECONDS_OF_ROUNDS:
            break
    return rounds


def _trace_steps(
    call: Callable[[int], tuple[float, float]], steps: int, folder: str
) -> tuple[float, float]:
    """Traces some steps into a folder; returns seconds and examples of one."""
    try:
        tf.profiler.experimental.start(folder)
    except tf.errors.AlreadyExistsError:
        raise ConfigError(
            "another profiler is running, and there can be one only: stop it first"
        ) from None
    done = False
    try:
        # Starting took a while, in which batches were drawn ahead.
        call(_STEPS_AHEAD)
        with tf.profiler.experimental.Trace(_MARK):
            result = call(steps)
        done = True
    finally:
        tf.profiler.experimental.stop(save=done)
    return result


def _layers_of_scopes(model: Any, function: Any) -> dict[str, str]:
    """Says of which layer the operations in a name scope of the graph are.

    `fuse` opens a scope `model/layer` for each.  A model that it calls as a whole opens its own:
    TensorFlow numbers scopes that have one name, and Keras opens two for each call of a layer, so
    the scope of layer `conv2d` is `conv2d_1` in the end, that of `conv2d_1` is `conv2d_1_2`.
    Both come in the order in which the layers run.
    """
    names = [layer.name for layer in model.layers]
    functions = function.graph.as_graph_def().library.function
    scopes_of_nodes = {tuple(n.name.split("/")[:2]) for each in functions for n in each.node_def}
    if any((model.name, name) in scopes_of_nodes for name in names):
        return {name: name for name in names}
    layers = [(name, re.compile(rf"{re.escape(name)}(_\d+)?")) for name in names]
    scopes: dict[str, str | None] = {}
    position = 0
    for definition in functions:
        for node in definition.node_def:
            segments = node.name.split("/")[:-1]
            if "gradient_tape" in segments:
                continue
            for segment in segments:
                if segment in scopes:
                    continue
                scopes[segment] = None
                # From the layer that runs now on, and only then from the first.
                for index in [*range(position, len(layers)), *range(position)]:
                    name, pattern = layers[index]
                    if pattern.fullmatch(segment):
                        scopes[segment], position = name, index
                        break
    return {scope: name for scope, name in scopes.items() if name is not None}


def _describe(
    operation: tuple[str, str], layers: Mapping[str, str], optimizer: str
) -> tuple[str, str]:
    """The kind of an operation, and its family."""
    name, of_type = operation
    segments = name.split("/")
    # What the operation does, whichever library's kernel does it; XLA numbers its own.
    what = re.sub(r"^_(Mkl)?(Native)?(Fused)?", "", of_type)
    what = what or re.sub(r"[.\d]+$", "", segments[-1])
    scope = next((layers[segment] for segment in segments if segment in layers), "")
    is_update = any(re.fullmatch(rf"{re.escape(optimizer)}(_\d+)?", part) for part in segments)
    if is_update or re.match(r"ResourceApply|Assign", what):
        family = "update"
        # Keras numbers its optimisers through the whole process.
        scope = scope or (re.sub(r"_\d+$", "", optimizer) if is_update else "")
    elif re.search(r"conv(?!ert)|[fdw](prop|grad)_", what, re.IGNORECASE):
        family = "convolution"
    elif re.search(r"matmul|gemm|\bdot\b", what, re.IGNORECASE):
        family = "product"
    else:
        family = "other"
    if "gradient_tape" in segments and not re.search("Grad|Backprop", what):
        what += " gradient"
    return (f"{what} ({scope})" if scope else what), family


def _kinds(
    operations: Mapping[tuple[str, str], tuple[float, int]],
    layers: Mapping[str, str],
    optimizer: str,
    *,
    scale: float,
    steps: int,
) -> tuple[OpTime, ...]:
    """Sums operations up by kind, the costliest kind first."""
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    for operation, (microseconds, count) in operations.items():
        kind = _describe(operation, layers, optimizer)
        times[kind] += microseconds * scale
        counts[kind] += count
    kinds = [
        OpTime(kind, ms, counts[kind, family] / steps, family)
        for (kind, family), ms in times.items()
    ]
    return tuple(sorted(kinds, key=lambda op: -op.ms))


def _judge(found: Profile, split: Split, batches: Batches) -> Profile:
    """Adds to a profile what bounds it and the one setting to change."""
    if found.bound == "input":
        what, ms = "Input", found.input_ms
        setting, advice = _input_advice(found, split, batches)
    elif found.bound == "host":
        what, ms = "The host, between operations,", found.host_ms
        setting, advice = _host_advice(found)
    else:
        what, ms = "The device", found.device_ms
        setting, advice = _device_advice(found)
    share = _percent(ms / found.step_ms)
    verdict = f"{what} takes {share} of the step's {_plain(found.step_ms)} ms: {advice}."
    return dataclasses.replace(found, verdict=verdict, setting=setting)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _plain(value: float) -> str:
    """Three digits that count, never as a power of ten: 1,030 or 26.2 or 0.061."""
    return f"{decimal.Decimal(f'{value:.3g}'):,f}"


# Stages of tf.data that wait for others, and do nothing themselves.
_WAITING_STAGES = {"Root", "Prefetch", "Options", "MaxIntraOpParallelism", "PrivateThreadPool"}


def _input_advice(found: Profile, split: Split, batches: Batches) -> tuple[str, str]:
    """The setting to change where the loop waits for batches, and why."""
    larger = f"try a larger batch_size than {found.batch_size:g}"
    if isinstance(batches, ArrayBatches):
        augmenting = sum(
            ms for (name, _), ms in split.data.items() if _AUGMENT_SCOPE in name.split("/")
        )
        if augmenting > sum(split.data.values()) / 2:
            return "augment", (
                "lighten or drop augment, which takes most of the time of preparing a batch"
            )
        return "batch_size", f"{larger}, as preparing one costs the same for few images as for many"
    if any("PyFunc" in kind for _, kind in split.data):
        return "dataset", (
            "take Python's functions out of your dataset, or cache() what they make: "
            "only one of them runs at a time"
        )
    stages = {name: ms for name, ms in split.stages.items() if name not in _WAITING_STAGES}
    if not stages:
        return "batch_size", larger
    slowest = max(stages, key=lambda name: stages[name])
    remedy = "give num_parallel_calls to" if slowest == "Map" else "lighten or cache()"
    return "dataset", f"{remedy} the slowest stage of your dataset, {slowest}"


def _host_advice(found: Profile) -> tuple[str, str]:
    """The setting to change where starting operations takes longer than computing, and why."""
    # Measured once on two Zen 4 cores: a call of XLA's program takes .2 ms, and its convolutions
    # take up to twice as long as TensorFlow's, so that small models gain and lab_cnn loses.
    convolutions = sum(op.ms for op in found.ops if op.family == "convolution")
    spare = found.host_ms - (0 if _is_gpu(found) else convolutions)
    if not found.jit_compile and spare > 0.3:
        return "jit_compile", (
            "try jit_compile=True, which makes one call of all the operations of a step"
        )
    return "batch_size", (
        f"try a larger batch_size than {found.batch_size:g}, as starting an operation costs the "
        "same for few images as for many"
    )


def _device_advice(found: Profile) -> tuple[str, str]:
    """The setting to change where computing takes the time, and why."""
    ms = {
        family: sum(op.ms for op in found.ops if op.family == family)
        for family in ("convolution", "product", "update")
    }
    most = found.device_ms / 2
    if found.jit_compile and not _is_gpu(found) and ms["convolution"] > most:
        return "jit_compile", (
            "try jit_compile=False, as on a CPU TensorFlow's own convolutions are faster than XLA's"
        )
    # With fewer examples a dense layer's weights are read, or converted, more than multiplied by.
    # Measured once on two Zen 4 cores: the mlp and small cnns were slower in bfloat16 at batch 32
    # and faster from 128 on.
    is_dense = found.batch_size >= 128 or ms["convolution"] > most
    multiplies = ms["convolution"] + ms["product"]
    is_long = _is_gpu(found) or multiplies > 2
    if found.precision == "float32" and multiplies > most and is_dense and is_long:
        if has_bfloat16():
            return "precision", (
                f"try precision=mixed_bfloat16, as {_percent(multiplies / found.device_ms)} of "
                "that time is in products, which this device does faster in bfloat16"
            )
    elif _is_gpu(found) and not found.jit_compile and multiplies < most:
        return "jit_compile", "try jit_compile=True, which fuses operations on the same elements"
    elif not is_dense and ms["product"] + ms["update"] > most:
        return "batch_size", (
            f"try a larger batch_size than {found.batch_size:g}, as each step reads and updates "
            "all weights, however few the images"
        )
    costliest = found.ops[0]
    return "model", (
        "what is left is a smaller model, where the costliest operation is "
        f"{costliest.kind}, {_percent(costliest.ms / found.device_ms)} of that time"
    )


def _is_gpu(found: Profile) -> bool:
    return found.device.startswith("gpu")


def _write_summary(path: pathlib.Path, found: Profile) -> None:
    versions = {
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }
    values = {**found.to_json(), "versions": versions}
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
