"""Profiles: the split of a step, what is said of it, the trace, and that nothing is trained."""

import dataclasses
import gzip
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from hypothesis import example, given
from hypothesis import strategies as st

import cifarflow
from cifarflow.data.augment import make_augment
from cifarflow.errors import ConfigError, DataError, WorkdirError
from cifarflow.optimizers.sgd import SGD
from cifarflow.recipes.run import train_recipe
from cifarflow.training import profile as module
from cifarflow.training import trace
from cifarflow.training.checkpoints import hash_arrays
from cifarflow.training.profile import OpTime, Profile, profile
from cifarflow.training.runner import INPUT_SCOPE
from cifarflow.training.trace import Line, Span, read_trace, split_time

MARK = "profiled_steps"


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    """Times shorter calls: nothing here depends on how exact the time of a step is."""
    monkeypatch.setattr(module, "_SECONDS_A_CALL", 0.01)


def profile_tiny(model=None, **kwargs):
    model = model if model is not None else tiny.tiny_mlp()
    options = {"batches": tiny.batches(), "steps": 5, **kwargs}
    return profile(model, options.pop("optimizer", SGD(0.05, momentum=0.9)), **options)


def state(model, optimizer):
    return hash_arrays([*model.variables, *optimizer.variables])


def check_split(found):
    parts = (found.input_ms, found.host_ms, found.device_ms)
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(found.step_ms, rel=1e-6)
    assert sum(op.ms for op in found.ops) == pytest.approx(found.device_ms, rel=1e-6)
    assert [op.ms for op in found.ops] == sorted((op.ms for op in found.ops), reverse=True)
    assert found.bound == {0: "input", 1: "host", 2: "device"}[parts.index(max(parts))]
    assert found.step_ms == np.median(found.rounds_ms)
    assert re.fullmatch(r"[A-Z][^.\n]*(\.\d[^.\n]*)*\.", found.verdict), found.verdict


def slow_batches():
    """Batches that each take 10 milliseconds to prepare, one after another."""
    data = tiny.split(64)

    def wait(labels):
        time.sleep(0.01)
        return labels

    def prepare(images, labels):
        waited = tf.py_function(wait, [labels], labels.dtype)
        waited.set_shape(labels.shape)
        return images, waited

    dataset = tf.data.Dataset.from_tensor_slices((data.images, data.labels))
    return dataset.batch(8, drop_remainder=True).map(prepare)


@pytest.fixture(scope="module")
def starved(tmp_path_factory):
    """A profile of a loop that waits for its batches, kept."""
    folder = tmp_path_factory.mktemp("kept") / "new" / "profile"
    optimizer = SGD(0.05, momentum=0.9)
    return profile(tiny.tiny_mlp(), optimizer, batches=slow_batches(), steps=6, directory=folder)


# ------------------------------------------------------------------------------- what is measured


def test_a_starved_loop_waits_for_input(starved):
    check_split(starved)
    assert starved.bound == "input"
    assert starved.input_ms > 0.5 * starved.step_ms
    assert starved.setting == "dataset"
    assert "Python's functions" in starved.verdict
    assert (starved.batch_size, starved.steps, starved.precision) == (8, 6, "float32")


def test_a_large_model_waits_for_the_device():
    batches = tiny.batches(count=256, batch_size=256)
    found = profile_tiny(tiny.tiny_mlp(units=(1024, 1024)), batches=batches, steps=3)
    check_split(found)
    assert found.bound == "device"
    assert found.device_ms > 0.5 * found.step_ms
    assert sum(op.ms for op in found.ops if op.family == "product") > 0.4 * found.device_ms


def test_an_all_but_empty_model_waits_for_the_host():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 2, 2, 3), dtype=np.uint8)
    batches = cifarflow.ArrayBatches(images, np.arange(16) % 3, batch_size=2)
    found = profile_tiny(tiny.linear(), batches=batches, steps=50)
    check_split(found)
    assert found.bound == "host"


def test_operations_are_named_after_their_layers():
    model = tiny.tiny_cnn(filters=(4, 4), kernel_size=3, padding="same", dropout=0.2)
    optimizer = SGD(0.05, momentum=0.9)
    found = profile_tiny(model, optimizer=optimizer)
    names = {layer.name for layer in model.layers}
    named = {op.kind: re.search(r"\((.*)\)", op.kind) for op in found.ops}
    assert {match[1] for match in named.values() if match} <= {*names, "sgd"}
    convolutions = [layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 2
    for name in convolutions:
        of_layer = {op.kind.split()[0]: op for op in found.ops if op.kind.endswith(f"({name})")}
        assert of_layer["Conv2D"].family == "convolution"
        assert of_layer["Conv2D"].count == 1
        assert any(kind.startswith("Conv2DBackpropFilter") for kind in of_layer)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_gradients_made_by_hand_are_named_too(policy):
    # Wide and of large batches, so that each of the gradients of `fuse` is in it.
    options = {"filters": (64, 64), "padding": "same", "activation": "relu"}
    model = tiny.tiny_cnn(**options, dtype_policy=policy)
    found = profile_tiny(model, batches=tiny.batches(count=64, batch_size=32), steps=2)
    unnamed = {op.kind for op in found.ops if op.family == "convolution" and "(" not in op.kind}
    assert not unnamed
    assert not {"MaxPoolGrad", "ReluGrad"} & {op.kind for op in found.ops}
    convolutions = {layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D)}
    named = {op.kind.partition("(")[2][:-1] for op in found.ops if op.family == "convolution"}
    assert named == convolutions


def test_with_xla():
    found = profile_tiny(jit_compile=True)
    check_split(found)
    assert found.jit_compile
    products = {op.kind for op in found.ops if op.family == "product"}
    assert {"MatMul (logits)", "MatMul gradient (logits)"} <= products
    assert not any(op.kind.startswith("while") for op in found.ops)
    assert "with XLA" in found.table()


@pytest.mark.parametrize("fused", [True, False])
def test_with_and_without_fused_kernels(fused):
    # By which integers dropout draws is one of the differences.
    found = profile_tiny(tiny.tiny_cnn(dropout=0.5), fused=fused)
    check_split(found)
    draws = {op.kind for op in found.ops if op.kind.startswith("StatelessRandomUniform")}
    assert draws
    assert all(kind.startswith("StatelessRandomUniformFullInt") for kind in draws) is fused


def test_the_table():
    ops = [OpTime(f"Op{i} (layer)", 0.5, 1.0, "other") for i in range(10)]
    found = made(input_ms=1.0, host_ms=2.0, device_ms=5.0, ops=tuple(ops))
    lines = found.table().splitlines()
    assert lines[0] == "where the time of a step goes, on cpu: some, 2 cores:"
    assert [line.split()[0] for line in lines[1:5]] == ["step", "input", "host", "device"]
    assert len(lines) == 5 + 8 + 1
    assert re.fullmatch(r" {4}others +1\.000 ms +12 %  2 more kinds", lines[-1])
    # Aligned: each figure ends in the same column.
    assert len({line.index(" ms ") for line in lines[1:]}) == 1
    assert "4,000 a second" in lines[1]


# ------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_nothing_is_trained(policy):
    model = tiny.tiny_cnn(batch_norm_momentum=0.9, dropout=0.5, dtype_policy=policy)
    optimizer = SGD(0.05, momentum=0.9)
    weights = hash_arrays(model.variables)
    found = profile_tiny(model, optimizer=optimizer)
    assert found.precision == policy.removeprefix("mixed_")
    assert hash_arrays(model.variables) == weights
    assert optimizer.built
    assert int(optimizer.iterations) == 0
    assert not any(np.asarray(v).any() for v in optimizer.variables if v.path.endswith("momentum"))

    cifarflow.train(model, optimizer, batches=tiny.batches(), total_steps=3)
    before = state(model, optimizer)
    profile_tiny(model, optimizer=optimizer)
    assert state(model, optimizer) == before
    assert int(optimizer.iterations) == 3


def test_it_can_be_done_twice_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, optimizer = tiny.tiny_mlp(), SGD(0.05, momentum=0.9)
    first = profile_tiny(model, optimizer=optimizer)
    second = profile_tiny(model, optimizer=optimizer)
    assert first.directory is None
    # What is compiled is the same each time.
    assert {op.kind for op in first.ops} & {op.kind for op in second.ops}
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_leaves_all_as_it_was(tmp_path):
    data = tiny.split(16)
    labels = np.where(np.arange(16) == 15, 99, data.labels)
    batches = cifarflow.ArrayBatches(data.images, labels, batch_size=8)
    model, optimizer = tiny.tiny_mlp(), SGD(0.05, momentum=0.9)
    weights = hash_arrays(model.variables)
    with pytest.raises(DataError, match=r"labels must be from 0 to 9 .* not 99"):
        profile(model, optimizer, batches=batches, directory=tmp_path / "profile")
    assert hash_arrays(model.variables) == weights
    assert not any(np.asarray(v).any() for v in optimizer.variables if v.path.endswith("momentum"))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- what is kept


def test_what_is_in_the_directory(starved):
    folder = starved.directory
    assert {path.name for path in folder.iterdir()} == {"plugins", "trace.json.gz", "profile.json"}
    (plane,) = folder.glob("plugins/profile/*/*.xplane.pb")
    split = split_time(read_trace(plane), mark=MARK)
    assert split.input / split.total == pytest.approx(starved.input_ms / starved.step_ms)
    values = json.loads((folder / "profile.json").read_text())
    assert values.pop("versions")["tensorflow"] == tf.__version__
    assert values == json.loads(json.dumps(starved.to_json()))
    assert values["ops"][0]["kind"] == starved.ops[0].kind
    assert "directory" not in values


def test_the_chrome_trace(starved):
    with gzip.open(starved.directory / "trace.json.gz", "rt") as file:
        found = json.load(file)
    assert found["displayTimeUnit"] == "ms"
    names = [event for event in found["traceEvents"] if event["ph"] == "M"]
    events = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert len(names) + len(events) == len(found["traceEvents"])
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in names if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in names if e["name"] == "process_name"}
    assert "/host:CPU" in processes.values()
    assert any(name.startswith("tf_Compute") for name in threads.values())
    assert all((e["pid"], e["tid"]) in threads and e["pid"] in processes for e in events)
    times = [event["ts"] for event in events]
    assert times == sorted(times)
    assert min(times) >= 0
    assert min(event["dur"] for event in events) >= 0
    called = [event["name"] for event in events]
    assert called.count(MARK) == 1
    assert called.count("IteratorGetNextOp::DoCompute") >= 6
    assert not any(name.startswith("ThreadpoolListener") for name in called)


def test_numbers_too_large_for_javascript_stay_whole(tmp_path):
    spans = [Span("b", 5.0, 7.5, {"id": 2**60 + 1, "of": 3, "_hidden": 1, "raw": b"\xff"})]
    spans += [Span("a", 1.0, 0.5, {})]
    lines = [Line("/host:CPU", "python", spans), Line("/host:CPU", "idle", [])]
    trace.write_chrome_trace(tmp_path / "trace.json.gz", lines)
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert [event["name"] for event in events] == ["process_name", "thread_name", "a", "b"]
    assert events[2]["dur"] == 0
    assert events[3] == {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "name": "b",
        "ts": 5.0,
        "dur": 2.5,
        "args": {"id": str(2**60 + 1), "of": 3, "raw": "b'\\xff'"},
    }


# ------------------------------------------------------------------------------- reading traces


def span(name, start, end, **stats):
    return Span(name, float(start), float(end), stats)


def host(name, *spans):
    spans = sorted(spans, key=lambda each: (each.start, -each.end))
    return Line("/host:CPU", name, spans)


CALL = "EagerLocalExecute: __inference_run_steps_17"
PYTHON = host("python", span(MARK, 0, 120), span(CALL, 10, 110))


def test_a_trace_taken_apart():
    lines = [
        PYTHON,
        host(
            "tf_Compute/1",
            # Before the part in question, and across its beginning.
            span("early:Mul", 0, 5),
            span("across:Mul", 5, 15),
            span("ExecutorState::Process", 15, 60, id=7),
            span("while/conv:_MklConv2D", 20, 40),
            # Only holds others; only the innermost counts.
            span("call:StatefulPartitionedCall", 40, 60),
            span("outer:MatMul", 42, 50),
            span("inner:Cast", 44, 46),
            # A wait in which another thread computes.
            span("IteratorGetNextOp::DoCompute", 62, 72),
        ),
        host("tf_Compute/2", span("while/add:AddV2", 30, 50), span("late:Mul", 100, 130)),
        host(
            "tf_data_iterator_get_next/3",
            span("IteratorGetNextOp::DoCompute", 70, 90),
            span("Iterator::Root", 70, 90),
            span("Iterator::Root::Prefetch[7]::ParallelMapV2", 72, 86),
            span("Iterator::Root::Prefetch[7]::ParallelMapV2::Batch", 74, 80),
        ),
        host("tf_data_private_threadpool/4", span("GatherV2:GatherV2", 75, 95)),
        # The input pipeline on the loop's own threads.
        host(
            "tf_Compute/5",
            span("InstantiatedCapturedFunction::Run", 60, 61, id=9),
            span("ExecutorState::Process", 75, 85, id=9),
            span("Cast:Cast", 76, 84),
            span("ExecutorState::Process", 85, 88, id=7),
            span("while/sub:Sub", 86, 88),
        ),
        Line("/host:metadata", "tf_Compute/6", [span("x:Mul", 20, 90)]),
    ]
    split = split_time(lines, mark=MARK)
    assert split.total == 100
    computing = [(10, 15), (20, 50), (86, 88), (100, 110)]
    assert split.device == sum(end - start for start, end in computing)
    assert split.input == (86 - 62) + (90 - 88)
    assert split.host == 100 - split.device - split.input
    assert split.operations == {
        ("across", "Mul"): (5, 1),
        ("while/conv", "_MklConv2D"): (10 + 10 / 2, 1),
        ("while/add", "AddV2"): (10 / 2 + 2 + 8 / 2, 1),
        ("outer", "MatMul"): ((2 + 4) / 2, 1),
        ("inner", "Cast"): (2 / 2, 1),
        ("while/sub", "Sub"): (2, 1),
        ("late", "Mul"): (10, 1),
    }
    assert split.data == {("GatherV2", "GatherV2"): 20, ("Cast", "Cast"): 8}
    assert split.stages == {"Root": 6, "ParallelMap": 8, "Batch": 6}


def test_xla_hands_work_to_other_threads():
    lines = [
        PYTHON,
        host(
            "tf_Compute/1", span("dot.3", 20, 30, hlo_op="dot.3"), span("add", 30, 35, hlo_op="add")
        ),
        host("tf_XLAEigen/2", span("end: dot.3", 50, 52, hlo_op="dot.3"), span("end: add", 34, 35)),
    ]
    split = split_time(lines, mark=MARK)
    assert split.device == 30
    # A loop only holds others.
    lines[1].spans.append(span("while.2", 36, 100, hlo_op="while.2"))
    assert split_time(lines, mark=MARK) == split
    # `add` began last on its line; once it has ended the line is the other's again.
    assert split.operations == {("dot.3", ""): (25, 1), ("add", ""): (5, 1)}


def test_batches_drawn_within_the_call_are_input():
    lines = [
        PYTHON,
        host(
            "tf_Compute/1",
            span("while/draw_batch/GatherV2:GatherV2", 20, 30),
            span("while/draw_batch_1/dense:MatMul", 30, 50),
        ),
        # Half of it beside the step.
        host("tf_Compute/2", span("while/draw_batch/augment/Mul:Mul", 40, 60)),
        host("tf_Compute/3", span("add.7", 70, 75, hlo_op="add.7", scope="while/draw_batch")),
    ]
    split = split_time(lines, mark=MARK, input_scope=INPUT_SCOPE)
    assert (split.total, split.device, split.input) == (100, 20, 10 + 10 + 5)
    assert split.operations == {("while/draw_batch_1/dense", "MatMul"): (20, 1)}
    assert split.data == {
        ("while/draw_batch/GatherV2", "GatherV2"): 10,
        ("while/draw_batch/augment/Mul", "Mul"): 20,
        ("while/draw_batch/add.7", ""): 5,
    }
    # Without the scope they are operations like others.
    assert split_time(lines, mark=MARK).device == 40 + 5


def test_several_calls():
    # What is between them, such as drawing the order of an epoch, is in none.
    run = "EagerLocalExecute: "
    python = host(
        "python",
        span(MARK, 0, 120),
        span(CALL, 10, 40),
        span(f"{run}TopKV2", 50, 60),
        span(CALL, 70, 110),
        span(CALL, 130, 140),
    )
    lines = [
        python,
        host("tf_Compute/1", span("a:Mul", 30, 80), span("IteratorGetNextOp::DoCompute", 100, 120)),
        host("tf_Compute/2", span("TopKV2:TopKV2", 50, 60), span("b:Add", 90, 95)),
    ]
    split = split_time(lines, mark=MARK)
    assert (split.total, split.device, split.input) == (30 + 40, 10 + 10 + 5, 10)
    assert split.operations == {("a", "Mul"): (20, 1), ("b", "Add"): (5, 1)}
    # A GPU goes on when the call has returned, at most until the mark ends or the next call.
    for ends, total in ((45, 35 + 40), (75, 60 + 40)):
        kernels = [span("k", 35, ends), span("k", 100, 118), span("k", 121, 130)]
        lines = [python, Line("/device:GPU:0", "Stream #1", kernels)]
        assert split_time(lines, mark=MARK, on_gpu=True).total == total + 8


def test_on_a_gpu_its_kernels_compute():
    lines = [
        PYTHON,
        host("tf_Compute/1", span("while/conv:Conv2D", 20, 30)),
        host("tf_data_iterator_get_next/2", span("IteratorGetNextOp::DoCompute", 60, 70)),
        Line(
            "/device:GPU:0",
            "Stream #14(Compute,MemcpyH2D)",
            [
                span("sm90_xmma", 25, 65, tf_op="while/conv:Conv2D"),
                span("MemcpyH2D", 66, 68),
                span("fusion_7", 70, 80, hlo_op="fusion.7"),
                # Still running when the call has returned.
                span("cutlass", 105, 118),
                span("after", 125, 130),
            ],
        ),
        Line("/device:GPU:0", "XLA Ops", [span("sum", 0, 120)]),
    ]
    split = split_time(lines, mark=MARK, on_gpu=True)
    assert split.total == 108
    assert split.device == 40 + 10 + 13
    assert split.input == 70 - 65
    assert split.operations == {
        ("while/conv", "Conv2D"): (40, 1),
        ("fusion.7", ""): (10, 1),
        ("cutlass", ""): (13, 1),
    }
    with pytest.raises(ConfigError, match="no kernel of the GPU: is CUPTI there"):
        split_time(lines[:3], mark=MARK, on_gpu=True)


def test_traces_that_say_nothing():
    with pytest.raises(ConfigError, match="a part marked 'profiled_steps', and has none"):
        split_time([host("python", span("other", 0, 10))], mark=MARK)
    with pytest.raises(ConfigError, match=r"has no operation$"):
        split_time([PYTHON], mark=MARK)
    # Without the runtime's own span the whole mark counts.
    lines = [host("python", span(MARK, 0, 120)), host("tf_Compute/1", span("a:Mul", 0, 30))]
    assert split_time(lines, mark=MARK).total == 120


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (
            ("while/cnn_1/conv2d_1/BiasAdd", "_MklNativeFusedConv2D"),
            ("Conv2D (conv2d)", "convolution"),
        ),
        (
            ("w/gradient_tape/cnn_1/conv2d_1_2/c", "_MklNativeConv2DBackpropInput"),
            ("Conv2DBackpropInput (conv2d_1)", "convolution"),
        ),
        (("gradient_tape/dense_1/MatMul", "_MklMatMul"), ("MatMul gradient (dense)", "product")),
        (("dense_1/Relu", "_FusedMatMul"), ("MatMul (dense)", "product")),
        (
            ("w/sgd_3/R_1", "ResourceApplyKerasMomentum"),
            ("ResourceApplyKerasMomentum (sgd)", "update"),
        ),
        (("w/sgd_3/mul", "Mul"), ("Mul (sgd)", "update")),
        (("Assign", "AssignAddVariableOp"), ("AssignAddVariableOp", "update")),
        (("gradient_tape/ReluGrad", "ReluGrad"), ("ReluGrad", "other")),
        (("convolution.12", ""), ("convolution", "convolution")),
        (("convert_reduce_fusion.1", ""), ("convert_reduce_fusion", "other")),
        (("sm90_xmma_dgrad_implicit_gemm", ""), ("sm90_xmma_dgrad_implicit_gemm", "convolution")),
        (("w/conv2d_1/fusion.3", ""), ("fusion (conv2d)", "other")),
        (("gradient_tape/dense_1/dot.3", ""), ("dot gradient (dense)", "product")),
        (("Cast", "Cast"), ("Cast", "other")),
    ],
)
def test_kinds_of_operations(operation, expected):
    layers = {"conv2d_1": "conv2d", "conv2d_1_2": "conv2d_1", "dense_1": "dense"}
    assert module._describe(operation, layers, "sgd_3") == expected


# ------------------------------------------------------------------------------- what is said


def made(**values):
    """A profile as it is before the verdict."""
    base = {"input_ms": 0.0, "host_ms": 0.0, "device_ms": 0.0, "ops": (), "batch_size": 32.0}
    base |= {"precision": "float32", "jit_compile": False, "device": "cpu: some, 2 cores"}
    values = {**base, **values}
    parts = {part: values[f"{part}_ms"] for part in ("input", "host", "device")}
    step = sum(parts.values())
    bound = max(parts, key=parts.get)
    more = {"steps": 5, "traced_step_ms": step, "rounds_ms": (step,)}
    return Profile(step_ms=step, bound=bound, **more, **values)


def judged(batches=None, data=(), stages=(), **values):
    split = trace.Split(1.0, 0.0, 0.0, {}, dict(data), dict(stages))
    found = module._judge(made(**values), split, batches)
    check = dataclasses.replace(found, verdict="", setting="")
    assert check == made(**values)
    assert found.verdict.count("\n") == 0
    assert found.verdict.endswith(".")
    return found.setting, found.verdict


def ops(**families):
    kinds = {"product": "MatMul (dense)", "update": "Apply (sgd)", "other": "Relu"}
    kinds["convolution"] = "Conv2D (conv2d)"
    found = [OpTime(kinds[family], ms, 1.0, family) for family, ms in families.items()]
    return {"ops": tuple(sorted(found, key=lambda op: -op.ms)), "device_ms": sum(families.values())}


GPU = {"device": "gpu: some"}


@pytest.mark.parametrize(
    ("values", "setting"),
    [
        ({"host_ms": 0.2}, "batch_size"),
        ({"host_ms": 2.0}, "jit_compile"),
        ({"host_ms": 2.0, "jit_compile": True}, "batch_size"),
        # XLA's convolutions would cost what it saves.
        ({"host_ms": 2.0, **ops(convolution=1.8)}, "batch_size"),
        ({"host_ms": 2.0, **ops(convolution=0.01, product=1.9)}, "jit_compile"),
        ({"host_ms": 2.0, **ops(convolution=1.9), **GPU}, "jit_compile"),
        (ops(convolution=9.0, other=3.0), "precision"),
        (ops(convolution=9.0, other=10.0), "model"),
        (ops(convolution=1.0), "model"),
        ({**ops(convolution=1.0), **GPU}, "precision"),
        ({**ops(convolution=9.0), "precision": "bfloat16"}, "model"),
        ({**ops(convolution=9.0), "jit_compile": True}, "jit_compile"),
        ({**ops(convolution=9.0), "jit_compile": True, **GPU}, "precision"),
        (ops(product=2.0, update=1.0), "batch_size"),
        ({**ops(product=9.0, update=1.0), "batch_size": 256.0}, "precision"),
        ({**ops(product=9.0, update=1.0), "precision": "bfloat16"}, "batch_size"),
        (ops(other=9.0), "model"),
        ({**ops(other=9.0), **GPU}, "jit_compile"),
    ],
)
def test_the_setting_to_change(values, setting, monkeypatch):
    monkeypatch.setattr(module, "has_bfloat16", lambda: True)
    found, verdict = judged(**values)
    assert found == setting, verdict
    if setting == "jit_compile":
        assert f"jit_compile={not values.get('jit_compile', False)}" in verdict


def test_a_machine_without_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)
    setting, verdict = judged(**ops(convolution=9.0, other=1.0))
    assert setting == "model"
    assert verdict == (
        "The device takes 100 % of the step's 10 ms: what is left is a smaller model, where the "
        "costliest operation is Conv2D (conv2d), 90 % of that time."
    )


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (1030.4, "1,030"),
        (26.24, "26.2"),
        (0.061, "0.061"),
        (10, "10"),
        (999.6, "1,000"),
        (123456.0, "123,000"),
        (1.0049, "1"),
        (0.00012345, "0.000123"),
    ],
)
def test_times_as_they_are_said(ms, text):
    assert module._plain(ms) == text
    assert f" takes 100 % of the step's {text} ms: " in judged(host_ms=ms)[1]


@given(st.floats(1e-7, 1e15))
@example(9.995)
def test_times_are_said_without_powers_of_ten(ms):
    text = module._plain(ms)
    assert re.fullmatch(r"\d{1,3}(,\d{3})*(\.\d+)?", text)
    assert float(text.replace(",", "")) == pytest.approx(ms, rel=5.1e-3)


def test_the_setting_to_change_for_input():
    arrays, own = tiny.batches(), slow_batches()
    starving = {"input_ms": 6.0, "device_ms": 4.0}
    # Augmentation gathers pixels.
    gathering = {("w/GatherV2", "GatherV2"): 5.0}
    augmenting = {("w/augment/Gather", "GatherV2"): 4.0, ("augment/mul", "Mul"): 3.0}
    plain = judged(arrays, gathering, **starving)
    assert plain[0] == "batch_size"
    assert plain[1].startswith("Input takes 60 % of the step's 10 ms: try a larger batch_size")
    assert judged(arrays, {**gathering, **augmenting}, **starving)[0] == "augment"
    order = {("argsort/TopKV2", "TopKV2"): 3.0}
    assert judged(arrays, {**gathering, **augmenting, **order}, **starving)[0] == "batch_size"
    work = {("wait", "EagerPyFunc"): 1.0}
    assert "Python's functions" in judged(own, work, **starving)[1]
    work = {("mul", "Mul"): 1.0}
    stages = {"Root": 90.0, "Prefetch": 80.0, "Batch": 2.0}
    _, verdict = judged(own, work, {**stages, "Map": 3.0}, **starving)
    assert "give num_parallel_calls to the slowest stage of your dataset, Map" in verdict
    _, verdict = judged(own, work, {**stages, "ParallelMap": 3.0}, **starving)
    assert "lighten or cache() the slowest stage of your dataset, ParallelMap" in verdict
    assert judged(own, {}, {"Root": 9.0}, **starving)[0] == "batch_size"


@pytest.mark.parametrize(("resident", "jit_compile"), [(True, False), (True, True), (False, False)])
def test_augmentation_is_seen_in_a_trace(resident, jit_compile, tmp_path):
    data = tiny.split(512)
    augment = make_augment("flip,crop:2,cutout:2")
    options = {"batch_size": 128, "augment": augment, "resident": resident}
    batches = cifarflow.ArrayBatches(data.images, data.labels, **options)
    found = profile_tiny(batches=batches, directory=tmp_path, jit_compile=jit_compile)
    check_split(found)
    # Drawn beside the step it may cost next to nothing, but never as one of the step's operations.
    assert not any("RandomUniform" in op.kind for op in found.ops)
    (plane,) = tmp_path.rglob("*.xplane.pb")
    split = split_time(read_trace(plane), mark=MARK, input_scope=INPUT_SCOPE)
    # Judged as if the loop had waited: what ran beside it is known either way.
    starving = dataclasses.replace(found, bound="input")
    assert module._judge(starving, split, batches).setting == "augment"
    assert batches.augment is augment


def test_batches_are_drawn_from_their_own_arrays(monkeypatch):
    # Those of a copy would come to a GPU a second time.
    drawn_by, draw = [], cifarflow.ArrayBatches.draw

    def noted(self, *args, **kwargs):
        drawn_by.append(self)
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(cifarflow.ArrayBatches, "draw", noted)
    batches = tiny.batches(augment=make_augment("flip"))
    profile_tiny(batches=batches)
    assert drawn_by
    assert all(each is batches for each in drawn_by)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, not 0"),
        ({"steps": 1.5}, "steps must be a whole number >= 1, not 1.5"),
        ({"batches": [1, 2]}, r"batches must be ArrayBatches or .*, not \[1, 2\]"),
        ({"optimizer": "sgd"}, "optimizer must be a Keras optimizer, not 'sgd'"),
        ({"jit_compile": "auto"}, "jit_compile must be True or False, not 'auto'"),
        ({"fused": "auto"}, "fused must be True or False, not 'auto'"),
        ({"fused": None}, "fused must be True or False, not None"),
        ({"directory": ""}, "directory must be a path, or None to keep nothing, not ''"),
        ({"directory": 3}, "directory must be a path, or None to keep nothing, not 3"),
    ],
)
def test_bad_arguments(values, message, monkeypatch):
    # Before anything is compiled.
    monkeypatch.setattr(module, "make_train_step", None)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        profile_tiny(**values)


def test_images_that_do_not_fit(monkeypatch):
    # Before anything is compiled.
    monkeypatch.setattr(module.StepRunner, "compile", None)
    augment = make_augment("flip")
    batches = tiny.batches(augment=augment)
    with pytest.raises(DataError, match="images must be"):
        profile_tiny(tiny.tiny_mlp(image_shape=(4, 4, 3)), batches=batches)
    assert batches.augment is augment


def test_directories_that_cannot_be_used(tmp_path, starved, monkeypatch):
    monkeypatch.setattr(module, "make_train_step", None)
    before = {p: p.read_bytes() for p in starved.directory.rglob("*") if p.is_file()}
    with pytest.raises(WorkdirError, match=r"a profile in it already, profile\.json: give another"):
        profile_tiny(directory=starved.directory)
    assert before == {p: p.read_bytes() for p in starved.directory.rglob("*") if p.is_file()}
    for name in ("plugins/profile", "trace.json.gz"):
        half = tmp_path / name.replace("/", "_")
        (half / name).mkdir(parents=True)
        with pytest.raises(WorkdirError, match=f"has a profile in it already, {name}"):
            profile_tiny(directory=half)
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "below", str(file / "further" / "below"), tmp_path / ("x" * 300)):
        with pytest.raises(WorkdirError, match=f"^cannot write to directory '{path}': give one"):
            profile_tiny(directory=path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WorkdirError, match=r"^cannot write to directory"):
        profile_tiny(directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_profiler(tmp_path):
    model, optimizer = tiny.tiny_mlp(), SGD(0.05, momentum=0.9)
    weights = hash_arrays(model.variables)
    tf.profiler.experimental.start(str(tmp_path))
    try:
        with pytest.raises(ConfigError, match="another profiler is running"):
            profile_tiny(model, optimizer=optimizer)
    finally:
        tf.profiler.experimental.stop(save=False)
    assert hash_arrays(model.variables) == weights
    profile_tiny(model, optimizer=optimizer)


def test_a_tensorflow_whose_traces_cannot_be_read(monkeypatch):
    import tensorflow.tsl.profiler.protobuf as package

    monkeypatch.setattr(module, "make_train_step", None)
    monkeypatch.delattr(package, "xplane_pb2", raising=False)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.xplane_pb2", None)
    wanted = f"^TensorFlow {re.escape(tf.__version__)} has no .*xplane_pb2, which reading a trace"
    with pytest.raises(ConfigError, match=wanted):
        profile_tiny()
    with pytest.raises(ConfigError, match=wanted):
        read_trace(Path("some.xplane.pb"))


def test_the_public_name_is_the_function():
    assert cifarflow.profile is profile
    assert cifarflow.Profile is Profile


# ------------------------------------------------------------------------------- with a recipe

BASE = {**tiny.MLP, "epochs": 1.0, "batch_size": 8}


def run_tiny(**kwargs):
    return train_recipe("lab_mlp", dataset=tiny.dataset(), **BASE, **kwargs)


def test_a_run_comes_out_the_same_with_a_profile(tmp_path):
    # Dropout and augmentation, so that any state left behind would show.
    options = {"model_options": {"units": (8,), "dropout": 0.5}, "augment": "flip,crop:2"}
    base = {**BASE, **options}
    plain = train_recipe("lab_mlp", dataset=tiny.dataset(), **base)
    said = []
    with_profile = {**base, "workdir": tmp_path / "run", "profile": said.append}
    run = train_recipe("lab_mlp", dataset=tiny.dataset(), **with_profile)
    assert run.summary["weights_sha256"] == plain.summary["weights_sha256"]
    assert run.summary["step_traces"] == 1
    assert len(run.history.rows) == len(plain.history.rows)

    folder = tmp_path / "run" / "profile"
    values = json.loads((folder / "profile.json").read_text())
    assert said[0].startswith("where the time of a step goes")
    assert said[0].endswith(values["verdict"])
    assert str(folder) in said[1]
    assert (values["steps"], values["batch_size"]) == (20, 8)

    # Going on with the run keeps the profile.
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said.clear()
    train_recipe("lab_mlp", dataset=tiny.dataset(), **with_profile, resume=True)
    assert said == [f"the run has a profile already, in {folder}: it stays, and no other is made"]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_run_is_not_profiled(tmp_path):
    run_tiny(workdir=tmp_path)
    with pytest.raises(WorkdirError, match="holds a run of this recipe already"):
        run_tiny(workdir=tmp_path, profile=print)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profile": print}, "profile needs a workdir, not None"),
        ({"profile": True}, "profile must be a function such as print, or None, not True"),
    ],
)
def test_a_recipes_bad_arguments(values, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        run_tiny(**values)
