"""What is found of a machine, and what is said of it: with machines that are not there."""

import dataclasses
import importlib.metadata
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tensorflow as tf
from own_flags import no_flags
from rich.console import Console

from cifarflow import __main__ as command_line
from cifarflow import device, doctor
from cifarflow.commands import doctor as command
from cifarflow.doctor import Gpu, Machine, Speeds, advise, measure_speeds, probe_machine

GIB = 1 << 30
SOUND = Machine(
    processor="Fast CPU",
    architecture="x86_64",
    cores_of_machine=8,
    cores=8,
    quota=None,
    load=0.3,
    is_virtual=False,
    instructions=("avx2", "avx512f", "avx512_bf16"),
    governor="performance",
    memory_bytes=32 * GIB,
    available_bytes=20 * GIB,
    swapped_bytes=0,
    gpus=(),
    driver_gpus=(),
    precision="mixed_bfloat16",
    jit_compile=False,
    versions={"python": "3.12", "tensorflow": "2.21.0"},
    environment={},
    workdir=Path("runs"),
    can_write=True,
    disk_bytes=100 * GIB,
)
FAST = Speeds(
    products={"float32": 200.0, "bfloat16": 400.0},
    copy=20.0,
    disk=500.0,
    step_ms=25.0,
    step_gflop=4.5,
    images_per_second=1280.0,
    input_share=0.01,
    host_share=0.05,
    spread=1.1,
    precision="bfloat16",
    verdict="The device takes 95 % of the step's 25.0 ms.",
)
H100 = Gpu("NVIDIA H100", 80 * GIB, (9, 0))
ON_GPU = {"gpus": (H100,), "driver_gpus": (H100.name,), "jit_compile": True}
BLIND = {"driver_gpus": (H100.name,)}


def test_a_sound_machine_is_given_no_advice():
    assert advise(SOUND) == []
    assert advise(SOUND, FAST) == []
    assert advise(dataclasses.replace(SOUND, **ON_GPU), FAST) == []


# What is different, what is said, what is to be done, whether it is wrong.
ADVICE = [
    (
        {"environment": {"TF_ENABLE_ONEDNN_OPTS": "0"}},
        ("TF_ENABLE_ONEDNN_OPTS=0 switches oneDNN off", "unset TF_ENABLE_ONEDNN_OPTS", True),
    ),
    (
        {"environment": {"TF_ENABLE_ONEDNN_OPTS": "False"}},
        ("TF_ENABLE_ONEDNN_OPTS=False switches", "unset", True),
    ),
    (
        {"environment": {"TF_NUM_INTRAOP_THREADS": "2"}},
        ("TF_NUM_INTRAOP_THREADS=2 leaves cores idle: 8", "unset TF_NUM_INTRAOP_THREADS", True),
    ),
    (
        {"instructions": ("avx2",)},
        ("the processor has no AVX512", "a newer processor, or a GPU", False),
    ),
    (
        {"instructions": ("avx2",), "is_virtual": True},
        ("the virtual machine's processor has no AVX512", "pass its processor through", False),
    ),
    (
        {"governor": "powersave"},
        ("the frequency governor is powersave", "cpupower frequency-set", False),
    ),
    ({"cores": 2}, ("may run on 2 of 8 cores", "taskset", False)),
    (
        {"quota": 2.5},
        ("a quota of 2.5 cores on 8: threads are stopped", "taskset -c 0-1", True),
    ),
    ({"quota": 0.5}, ("a quota of 0.5 cores", "taskset -c 0-0", True)),
    ({"load": 5.2}, ("a load of 5.2 on 8 cores: other programs", "until they are done", False)),
    (
        {"available_bytes": GIB},
        ("1.0 GiB of memory are free", "end other programs", True),
    ),
    (
        {"swapped_bytes": 4 * GIB},
        ("4.0 GiB are swapped out", "stops it for a while", False),
    ),
    ({"can_write": False}, ("'runs' cannot be written", "--workdir", True)),
    (
        {"disk_bytes": GIB // 2},
        ("0.5 GiB are free on the disk of 'runs'", "make room", True),
    ),
    (
        BLIND,
        ("NVIDIA H100 is there, but TensorFlow finds no CUDA", 'install "cifarflow[gpu]"', True),
    ),
    (
        {**BLIND, "environment": {"CUDA_VISIBLE_DEVICES": "-1"}},
        ("CUDA_VISIBLE_DEVICES='-1' hides it", "unset CUDA_VISIBLE_DEVICES", False),
    ),
    (
        {**ON_GPU, "gpus": (Gpu("Tesla V100", None, (7, 0)),), "precision": "float32"},
        ("Tesla V100 multiplies float16 in hardware", "--precision=mixed_float16", False),
    ),
    (
        {**ON_GPU, "gpus": (H100, H100)},
        ("of 2 GPUs a run uses one", "--strategy=mirrored", False),
    ),
    (
        {**ON_GPU, "environment": {"TF_DETERMINISTIC_OPS": "1"}},
        ("TF_DETERMINISTIC_OPS is on", "unless runs have to be the same", False),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), ADVICE)
def test_advice_about_a_machine(changes, expected):
    what, remedy, is_wrong = expected
    (found,) = advise(dataclasses.replace(SOUND, **changes))
    assert what in found.what
    assert remedy in found.remedy
    assert found.is_wrong is is_wrong


FASTER_AS = [
    (
        {"products": {"float32": 200.0, "bfloat16": 36.0}},
        ("multiplies slower (36 GFLOP/s) than float32 (200)", "--precision=float32", True),
    ),
    (
        {"disk": 5.0},
        ("the disk of 'runs' takes 5 MB/s", "--workdir on another disk", False),
    ),
    (
        {"spread": 2.26},
        ("from 1 to 2.3 times as long", "when nothing else runs", False),
    ),
    (
        {"input_share": 0.4},
        ("40 % of a step is spent waiting for images", FAST.verdict, False),
    ),
    (
        {"host_share": 0.5},
        ("50 % of a step is spent between its operations", FAST.verdict, False),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), FASTER_AS)
def test_advice_about_what_was_measured(changes, expected):
    what, remedy, is_wrong = expected
    (found,) = advise(SOUND, dataclasses.replace(FAST, **changes))
    assert what in found.what
    assert remedy in found.remedy
    assert found.is_wrong is is_wrong


@pytest.mark.parametrize(
    "changes",
    [
        # As slow as it is, it is not what auto takes.
        {"precision": "float32"},
        # Its host decides, not this process.
        {"governor": "powersave", "is_virtual": True},
        {"instructions": (), "architecture": "aarch64"},
        {"environment": {"TF_NUM_INTRAOP_THREADS": "8", "TF_ENABLE_ONEDNN_OPTS": "1"}},
        {"environment": {"TF_NUM_INTRAOP_THREADS": "many", "TF_DETERMINISTIC_OPS": "1"}},
        {"quota": 8.0},
        {"load": None},
        {"memory_bytes": 0, "available_bytes": 0},
        {**ON_GPU, "environment": {"TF_ENABLE_ONEDNN_OPTS": "0"}, "instructions": ("avx2",)},
    ],
)
def test_what_is_no_reason_for_advice(changes):
    slow = {"float32": 200.0, "bfloat16": 36.0} if "precision" in changes else FAST.products
    speeds = dataclasses.replace(FAST, products=slow, disk=None)
    assert advise(dataclasses.replace(SOUND, **changes), speeds) == []


def test_what_is_wrong_comes_first():
    machine = dataclasses.replace(SOUND, load=9.0, can_write=False, cores=2)
    assert [advice.is_wrong for advice in advise(machine)] == [True, False, False]


# --- probing ----------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path, monkeypatch):
    """An empty /proc and /sys, and a function that writes files there."""
    for name in ("_PROC", "_CGROUP", "_GOVERNOR"):
        monkeypatch.setattr(doctor, name, tmp_path / name)
    monkeypatch.setattr(device, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind=None: [])

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def test_a_machine_that_says_nothing(system, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    found = probe_machine(tmp_path / "runs", environment={})
    assert (found.cores, found.cores_of_machine) == (1, 1)
    assert (found.quota, found.load, found.governor) == (None, None, "")
    assert (found.memory_bytes, found.available_bytes, found.swapped_bytes) == (0, 0, 0)
    assert (found.instructions, found.gpus, found.driver_gpus) == ((), (), ())
    assert (found.precision, found.jit_compile, found.environment) == ("float32", False, {})
    assert found.processor
    assert (found.can_write, found.disk_bytes > 0) == (True, True)
    assert found.versions["tensorflow"] == importlib.metadata.version("tensorflow")


def test_a_machine_that_says_all(system, monkeypatch, tmp_path):
    flags = "fpu hypervisor avx512f avx2 avx512_bf16"
    system("cpuinfo", f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    system("_PROC/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\nSwapTotal: 2048 kB\n")
    system("_CGROUP/cpu.max", "150000 100000\n")
    system("_CGROUP/memory.max", f"{2 * GIB}\n")
    system("_GOVERNOR/scaling_governor", "powersave\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    given = {"XLA_FLAGS": "--x", "TF_CONFIG": "{}", "TFDS_DATA_DIR": "/d"}
    found = probe_machine(tmp_path, environment={**given, "HOME": "/h"})
    assert (found.processor, found.is_virtual) == ("Some CPU", True)
    assert found.instructions == ("avx2", "avx512f", "avx512_bf16")
    assert (found.cores, found.cores_of_machine, found.quota, found.load) == (2, 4, 1.5, 1.5)
    assert (found.memory_bytes, found.available_bytes) == (2 * GIB, 4 * GIB)
    assert found.swapped_bytes == 2 << 20
    assert found.governor == "powersave"
    assert found.precision == "mixed_bfloat16"
    assert found.environment == given


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_quota_of_a_control_group(system, files, quota):
    for name, text in files.items():
        system(f"_CGROUP/{name}", text)
    assert probe_machine().quota == quota


def test_no_limit_of_memory(system):
    system("_PROC/meminfo", "MemTotal: 1024 kB\nHugePages: x kB\nEmpty:\n")
    for text in ("max", str(1 << 62)):
        system("_CGROUP/memory.max", text)
        assert probe_machine().memory_bytes == 1 << 20


def test_gpus(system, monkeypatch):
    gpus = [types.SimpleNamespace(name=f"GPU:{i}") for i in range(2)]
    details = [{"device_name": "NVIDIA H100, 80 GB", "compute_capability": (9, 0)}, {}]
    monkeypatch.setattr(
        tf.config, "get_visible_devices", lambda kind=None: gpus if kind == "GPU" else []
    )
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: details[gpus.index(gpu)]
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")

    def smi(words, **options):
        assert words[0] == "/bin/nvidia-smi"
        text = "NVIDIA H100, 80 GB, 81559\nbroken\n"
        return types.SimpleNamespace(stdout=text, returncode=0)

    monkeypatch.setattr(subprocess, "run", smi)
    found = probe_machine()
    assert found.gpus == (
        Gpu("NVIDIA H100, 80 GB", 81559 << 20, (9, 0)),
        Gpu("GPU:1", None, (0, 0)),
    )
    assert found.driver_gpus == ("NVIDIA H100, 80 GB",)
    assert (found.precision, found.jit_compile) == ("mixed_bfloat16", True)


@pytest.mark.parametrize(
    "end", [OSError(), subprocess.TimeoutExpired("nvidia-smi", 10), "No devices were found"]
)
def test_a_driver_that_does_not_answer(system, monkeypatch, end):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")

    def smi(words, **options):
        if isinstance(end, Exception):
            raise end
        return types.SimpleNamespace(stdout=end, returncode=6)

    monkeypatch.setattr(subprocess, "run", smi)
    assert probe_machine().driver_gpus == ()


def test_a_folder_below_a_file_cannot_be_written(system, tmp_path):
    (tmp_path / "file").touch()
    assert not probe_machine(tmp_path / "file" / "runs").can_write
    assert not probe_machine(tmp_path / "file").can_write


def test_a_clone_that_is_not_installed(system, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert list(probe_machine().versions) == ["python"]


# --- measuring --------------------------------------------------------------------------------


def test_measuring(monkeypatch, tmp_path):
    from cifarflow.training import profile

    monkeypatch.setattr(doctor, "_DISK_BYTES", 1000)
    monkeypatch.setattr(profile, "_SECONDS_A_CALL", 0.01)
    best = doctor._best_seconds
    monkeypatch.setattr(doctor, "_best_seconds", lambda measured: best(measured, seconds=0))
    found = measure_speeds(dataclasses.replace(SOUND, workdir=tmp_path / "runs"))
    assert list(found.products) == ["float32", "bfloat16"]
    assert min(found.products.values()) > 0.1
    assert found.copy > 0.01
    assert found.disk > 0
    assert found.images_per_second == pytest.approx(32e3 / found.step_ms)
    # 32 images of the lab's cnn.
    assert found.step_gflop == pytest.approx(4.5, abs=0.1)
    assert found.products_ms == pytest.approx(
        1e3 * found.step_gflop / found.products[found.precision]
    )
    assert 0 <= found.input_share + found.host_share < 1
    assert found.spread >= 1
    assert found.verdict.endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_not_measured(monkeypatch):
    machine = dataclasses.replace(SOUND, can_write=False)
    profile = types.SimpleNamespace(
        batch_size=32.0,
        step_ms=1.0,
        input_ms=0.1,
        host_ms=0.2,
        rounds_ms=(1.0, 2.0),
        precision="float32",
        verdict="x",
    )
    monkeypatch.setattr(doctor, "profile", lambda *args, **options: profile)
    monkeypatch.setattr(doctor, "_best_seconds", lambda measured: 1.0)
    found = measure_speeds(machine)
    assert found.disk is None
    assert (found.input_share, found.host_share, found.spread) == (0.1, 0.2, 2.0)
    assert found.products["float32"] == pytest.approx(2 * 1024**3 / 1e9)


# --- the command ------------------------------------------------------------------------------


def shown(machine, speeds, *, columns=100):
    """What the command prints of a machine."""
    console = Console(width=columns, highlight=False)
    with console.capture() as capture:
        command.print_machine(machine, console)
        command.print_speeds(speeds, console)
        command.print_advice(advise(machine, speeds), console)
    return capture.get()


def test_what_is_printed():
    out = shown(SOUND, FAST)
    for text in (
        "processor     Fast CPU ",
        "8 cores, load 0.3",
        "32.0 GiB, 20.0 free",
        "none that TensorFlow sees",
        "100.0 GiB free for runs",
        "--precision=mixed_bfloat16, no XLA",
        "python 3.12, tensorflow 2.21.0",
        "nothing set that matters",
        "float32 200, bfloat16 400 GFLOP/s",
        "a step of 32 images 25.0 ms, 1,280 images/s in bfloat16",
        "45 % is what its 4.5 GFLOP of products take",
    ):
        assert text in out
    assert out.endswith("what is slow, and why\n  nothing that could be found\n")


def test_what_is_printed_of_a_machine_with_all_sorts_of_things():
    more = {**ON_GPU, "cores": 2, "quota": 1.5, "is_virtual": True, "swapped_bytes": 2 * GIB}
    more |= {"environment": {"XLA_FLAGS": "[red]"}, "load": None}
    out = shown(dataclasses.replace(SOUND, **more), dataclasses.replace(FAST, disk=None))
    for text in (
        "Fast CPU, virtual",
        "2 of 8 cores, a quota of 1.5",
        "2.0 swapped out",
        "NVIDIA H100, compute capability 9.0, 80 GiB",
        "XLA_FLAGS=[red]",
        "not written",
        "  wrong: a quota of 1.5 cores on 2",
        "  note: this process may run on 2 of 8 cores",
        "    -> taskset",
    ):
        assert text in out
    assert "load" not in out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_fits_the_terminal(columns):
    out = shown(dataclasses.replace(SOUND, cores=2), FAST, columns=columns)
    assert max(map(len, out.splitlines())) <= columns


@pytest.fixture
def call(monkeypatch, capfd):
    """Runs the command; returns exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["cifarflow", "doctor", *words])
        with no_flags(), pytest.raises(SystemExit) as caught:
            command_line.main()
        return (caught.value.code or 0, *capfd.readouterr())

    return run


@pytest.mark.parametrize(("changes", "status"), [({}, 0), ({"load": 9.0}, 0), ({"quota": 1.5}, 1)])
def test_the_exit_status(call, monkeypatch, changes, status):
    seen = []

    def probe(workdir, *, environment):
        seen.append((workdir, environment["CUDA_VISIBLE_DEVICES"]))
        return dataclasses.replace(SOUND, **changes)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(doctor, "probe_machine", probe)
    monkeypatch.setattr(doctor, "measure_speeds", lambda machine: FAST)
    code, out, err = call("--workdir=some")
    assert (code, err) == (status, "")
    assert "how fast it is" in out
    code, out, _ = call("--quick")
    assert code == status
    assert "how fast it is" not in out
    assert seen == [("some", "-1"), ("runs", "-1")]


def test_this_machine(call):
    code, out, err = call("--quick")
    assert code in (0, 1)
    assert err == ""
    assert f"tensorflow {tf.__version__}" in " ".join(out.split())
    assert "what is slow, and why" in out
    assert sys.version.split()[0] in out
