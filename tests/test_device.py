"""What the library says of the machine, with processors and GPUs that are not there."""

import os
import platform
import types

import pytest
import tensorflow as tf

from cifarflow import device
from cifarflow.device import (
    count_gpus,
    describe_device,
    has_amx,
    has_bfloat16,
    has_gpu,
    prepare_gpus,
    resident_bytes,
)

CPUINFO = """processor\t: 0
vendor_id\t: SomeVendor
model name\t: Fast CPU 9000 @ 3.00GHz: special
flags\t\t: fpu sse2 {flags}
power management:

processor\t: 1
model name\t: Another CPU
flags\t\t: fpu avx512_bf16 amx_bf16
"""


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [])


@pytest.fixture
def cpuinfo(tmp_path, monkeypatch, no_gpu):
    """Writes a /proc/cpuinfo; None for a system that has no such file."""

    def write(text):
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(device, "_CPUINFO", path)

    return write


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there are two GPUs, the first with the details given."""

    def pretend(**details):
        gpus = [types.SimpleNamespace(name=f"/physical_device:GPU:{i}") for i in range(2)]
        monkeypatch.setattr(
            tf.config, "get_visible_devices", lambda kind=None: gpus if kind == "GPU" else []
        )
        monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda g: details if g is gpus[0] else {}
        )
        return gpus

    return pretend


def test_the_processor_is_named_with_the_cores_that_may_be_used(cpuinfo, monkeypatch):
    cpuinfo(CPUINFO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert describe_device() == "cpu: Fast CPU 9000 @ 3.00GHz: special, 3 cores"
    assert not has_gpu()
    assert count_gpus() == 0


def test_without_affinity_all_cores_count(cpuinfo, monkeypatch):
    cpuinfo(CPUINFO)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert describe_device().endswith(", 12 cores")


@pytest.mark.parametrize("text", [None, "", "processor\t: 0\nflags\t: fpu\n"])
@pytest.mark.parametrize(("processor", "name"), [("some chip", "some chip"), ("", "riscv64")])
def test_without_cpuinfo_python_names_the_processor(text, processor, name, cpuinfo, monkeypatch):
    cpuinfo(text)
    monkeypatch.setattr(platform, "processor", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert describe_device().startswith(f"cpu: {name}, ")
    assert not has_bfloat16()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx512_bf16", True), ("amx_bf16 x", True), ("avx512f", False), ("no_avx512_bf16", False)],
)
def test_bfloat16_is_read_from_the_first_processor(flags, expected, cpuinfo):
    cpuinfo(CPUINFO.format(flags=flags))
    assert has_bfloat16() is expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("amx_bf16 x", True), ("amx_tile amx_int8 avx512_bf16", False)]
)
def test_amx_is_read_from_the_first_processor(flags, expected, cpuinfo):
    cpuinfo(CPUINFO.format(flags=flags))
    assert has_amx() is expected


def test_this_machine_has_a_description():
    kind, _, name = describe_device().partition(": ")
    assert kind == ("gpu" if has_gpu() else "cpu")
    assert name
    assert has_bfloat16() in (True, False)


def test_the_first_gpu_is_named(gpu):
    gpu(device_name="NVIDIA Something", compute_capability=(9, 0))
    assert has_gpu()
    assert describe_device() == "gpu: NVIDIA Something"


def test_a_gpu_without_details_goes_by_its_place(gpu):
    gpu()
    assert describe_device() == "gpu: /physical_device:GPU:0"
    assert not has_bfloat16()


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((10, 0), True)]
)
def test_bfloat16_on_a_gpu_begins_with_ampere(capability, expected, gpu):
    gpu(compute_capability=capability)
    assert has_bfloat16() is expected


def test_memory_growth_is_set_for_every_gpu(gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda g, on: calls.append((g, on))
    )
    gpus = gpu()
    prepare_gpus()
    assert calls == [(gpus[0], True), (gpus[1], True)]


def test_a_gpu_in_use_is_left_as_it_is(gpu, monkeypatch):
    def in_use(gpu, on):
        raise RuntimeError("Physical devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", in_use)
    gpu()
    prepare_gpus()


def test_without_a_gpu_there_is_nothing_to_prepare(no_gpu, monkeypatch):
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda *_: pytest.fail("there is no GPU")
    )
    prepare_gpus()


@pytest.mark.parametrize(
    ("text", "pages"), [("900 300 20 1 0 5 0\n", 300), ("", None), ("9 x", None), (None, None)]
)
def test_resident_memory(tmp_path, monkeypatch, text, pages):
    path = tmp_path / "statm"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(device, "_STATM", path)
    assert resident_bytes() == (pages and pages * os.sysconf("SC_PAGE_SIZE"))
