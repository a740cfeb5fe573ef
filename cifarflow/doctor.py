"""This machine as training sees it: what it has, how fast that is, and what is slow, and why.

    machine = probe_machine("runs")
    speeds = measure_speeds(machine)                    # some ten seconds
    for advice in advise(machine, speeds):
        print(advice.what, advice.remedy)

`advise` is a function of what the other two found, and of nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from cifarflow.data.splits import Dataset, Split
from cifarflow.device import cpuinfo, gpu_details
from cifarflow.lazy import tf
from cifarflow.models.flops import count_flops
from cifarflow.optimizers.precision import resolve_precision
from cifarflow.recipes.build import assemble, resolve_jit_compile
from cifarflow.recipes.named import get_recipe
from cifarflow.training.profile import profile

# Those that change what TensorFlow or this library does.
ENVIRONMENT = (
    "CIFARFLOW_DATA",
    "CIFARFLOW_CACHE",
    "CUDA_VISIBLE_DEVICES",
    "KERAS_BACKEND",
    "OMP_NUM_THREADS",
    "TFDS_DATA_DIR",
    "TF_CONFIG",
    "TF_CPP_MIN_LOG_LEVEL",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
_PACKAGES = ("cifarflow", "tensorflow", "keras", "numpy")
# Of those that a processor has, the ones that matter to matrix products, slowest first.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_fp16")
_RECIPE = "lab_cnn"

_PROC, _CGROUP = pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup")
_GOVERNOR = pathlib.Path("/sys/devices/system/cpu/cpu0/cpufreq")
_GIB = 1 << 30
# A checkpoint of lab_final, weights and velocities, is about as large.
_DISK_BYTES = 16 << 20


# --- the machine --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that TensorFlow sees.

    Attributes:
      name: its model.
      memory_bytes: all of its memory; None if the driver does not say.
      capability: its compute capability, (0, 0) if TensorFlow does not know it.
    """

    name: str
    memory_bytes: int | None
    capability: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a machine has, and lets this process use.

    Attributes:
      processor: its model.
      architecture: as "x86_64".
      cores_of_machine: those there are.
      cores: those this process may run on.
      quota: how many cores' time its control group may take; None without such a limit.
      load: programs that ran or waited for a core in the last minute, on average; None if unknown.
      is_virtual: whether the processor is a virtual machine's.
      instructions: which of `INSTRUCTIONS` it has; empty where it does not say.
      governor: how its frequency is set, as "performance"; "" if unknown.
      memory_bytes: all memory, or what the control group may take of it; 0 if unknown.
      available_bytes: what can be had of it without swapping.
      swapped_bytes: what is swapped out.
      gpus: those TensorFlow sees.
      driver_gpus: names of those the driver lists, whether or not TensorFlow sees them.
      precision: what precision=auto takes.
      jit_compile: whether jit_compile=auto takes XLA.
      versions: of Python and the packages.
      environment: the variables of `ENVIRONMENT` that are set.
      workdir: the folder whose disk is looked at.
      can_write: whether it can be written, or made.
      disk_bytes: what is free on that disk.
    """

    processor: str
    architecture: str
    cores_of_machine: int
    cores: int
    quota: float | None
    load: float | None
    is_virtual: bool
    instructions: tuple[str, ...]
    governor: str
    memory_bytes: int
    available_bytes: int
    swapped_bytes: int
    gpus: tuple[Gpu, ...]
    driver_gpus: tuple[str, ...]
    precision: str
    jit_compile: bool
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    workdir: pathlib.Path
    can_write: bool
    disk_bytes: int


def probe_machine(
    workdir: str | os.PathLike[str] = "runs", *, environment: Mapping[str, str] | None = None
) -> Machine:
    """Looks at this machine; measures nothing.

    Args:
      workdir: the folder where runs would be kept; it need not exist.
      environment: variables; None takes the process's own.  A runner sets some before it loads
        TensorFlow, which are not news to anybody.
    """
    variables = os.environ if environment is None else environment
    processor = cpuinfo()
    flags = processor.get("flags", "").split()
    memory = _meminfo()
    limit = _number(_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes")
    total = memory.get("MemTotal", 0)
    driver = _driver_gpus()
    gpus = tuple(_gpu(gpu, driver) for gpu in tf.config.get_visible_devices("GPU"))
    folder = pathlib.Path(os.path.expanduser(workdir))
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    affinity = getattr(os, "sched_getaffinity", None)
    load: float | None = None
    with contextlib.suppress(OSError, AttributeError):
        load = os.getloadavg()[0]
    return Machine(
        processor=processor.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores_of_machine=os.cpu_count() or 1,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        quota=_quota(),
        load=load,
        is_virtual="hypervisor" in flags,
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        governor=_text(_GOVERNOR / "scaling_governor"),
        memory_bytes=int(min(total, limit)) if limit else total,
        available_bytes=memory.get("MemAvailable", 0),
        swapped_bytes=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
        gpus=gpus,
        driver_gpus=tuple(driver),
        precision=resolve_precision("auto"),
        jit_compile=resolve_jit_compile("auto") == "true",
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES if _has(name)},
        },
        environment={name: variables[name] for name in ENVIRONMENT if name in variables},
        workdir=folder,
        can_write=nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        disk_bytes=shutil.disk_usage(nearest).free,
    )


def _has(package: str) -> bool:
    """Whether it is installed; from a clone of this repository cifarflow need not be."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(*paths: pathlib.Path) -> float:
    """The number in the first of these files that holds one; 0 for "max", or none."""
    for path in paths:
        with contextlib.suppress(ValueError):
            return float(_text(path).split(" ")[0])
    return 0.0


def _quota() -> float | None:
    """How many cores' time the control group has, by version 2 or version 1 of them."""
    parts = _text(_CGROUP / "cpu.max").split()
    if not parts:
        folder = _CGROUP / "cpu"
        parts = [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
    try:
        quota, period = map(float, parts)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _meminfo() -> dict[str, int]:
    """Linux's account of the memory, in bytes; empty where there is none."""
    found = {}
    for line in _text(_PROC / "meminfo").splitlines():
        name, _, value = line.partition(":")
        with contextlib.suppress(ValueError, IndexError):
            found[name] = int(value.split()[0]) << 10
    return found


def _driver_gpus() -> dict[str, int]:
    """The GPUs that NVIDIA's driver lists, by name, and their memory in bytes."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    words = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        name, _, mebibytes = line.rpartition(",")
        with contextlib.suppress(ValueError):
            found[name.strip()] = int(mebibytes) << 20
    return found


def _gpu(gpu: Any, driver: Mapping[str, int]) -> Gpu:
    details = gpu_details(gpu)
    name = str(details.get("device_name", gpu.name))
    return Gpu(name, driver.get(name), tuple(details.get("compute_capability", (0, 0))))


# --- its speed ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
      products: GFLOP/s of one large matrix product, by dtype; the best of several.
      copy: GB/s that are read and written when a large array is worked through.
      disk: MB/s of a file that is written through to the disk; None where it cannot be written.
      step_ms: milliseconds of a step of lab_cnn, the median of several calls.
      step_gflop: what such a step multiplies, in GFLOP.
      images_per_second: that the steps take.
      input_share: of a step, in which nothing computed and it waited for images, 0..1.
      host_share: of a step, between its operations.
      spread: the slowest call over the fastest.
      precision: what the step computed in.
      verdict: what bounds the step, in a sentence.
    """

    products: Mapping[str, float]
    copy: float
    disk: float | None
    step_ms: float
    step_gflop: float
    images_per_second: float
    input_share: float
    host_share: float
    spread: float
    precision: str
    verdict: str

    @property
    def products_ms(self) -> float:
        """Milliseconds that the step's products alone would take, at the speed of large ones."""
        return 1e3 * self.step_gflop / self.products[self.precision]


def measure_speeds(machine: Machine) -> Speeds:
    """Measures products, memory, disk and the training step of lab_cnn; takes some ten seconds.

    Args:
      machine: what was found of the machine.
    """
    on_gpu = bool(machine.gpus)
    dtypes = ("float32", "bfloat16", "float16") if on_gpu else ("float32", "bfloat16")
    pieces = assemble(get_recipe(_RECIPE, data="noise"), _noise())
    found = profile(
        pieces.model,
        pieces.optimizer,
        batches=pieces.batches,
        # Few, so that a machine on which each takes a second answers soon too; where they are
        # fast a call has more of them.
        steps=3,
        jit_compile=machine.jit_compile,
    )
    return Speeds(
        products={dtype: _time_products(dtype, 8192 if on_gpu else 1024) for dtype in dtypes},
        copy=_time_copy(1 << 28 if on_gpu else 1 << 25),
        disk=_time_disk(machine.workdir) if machine.can_write else None,
        step_ms=found.step_ms,
        step_gflop=found.batch_size * count_flops(pieces.model, training=True) / 1e9,
        images_per_second=1e3 * found.batch_size / found.step_ms,
        input_share=found.input_ms / found.step_ms,
        host_share=found.host_ms / found.step_ms,
        spread=max(found.rounds_ms) / min(found.rounds_ms),
        precision=found.precision,
        verdict=found.verdict,
    )


def _noise() -> Dataset:
    """Images of CIFAR-10's size, of which nothing is to be learnt: only the time counts."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Split(images, (np.arange(count) % 10).astype(np.int32))

    return Dataset("noise", split(2000), split(10), split(10), tuple("abcdefghij"), "drawn")


def _best_seconds(call: Callable[[], object], *, seconds: float = 0.6) -> float:
    """The least time of several calls, after one to warm up."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return best


def _time_products(dtype: str, size: int) -> float:
    """GFLOP/s of a square matrix product."""
    values = tf.cast(tf.random.stateless_uniform((size, size), (0, 0)), dtype)
    # Reading a value waits until the device has finished.
    seconds = _best_seconds(lambda: float(tf.matmul(values, values)[0, 0]))
    return 2 * size**3 / seconds / 1e9


def _time_copy(count: int) -> float:
    """GB/s of adding to each of so many float32."""
    values = tf.zeros([count])
    seconds = _best_seconds(lambda: float((values + 1.0)[0]))
    return 2 * 4 * count / seconds / 1e9


def _time_disk(folder: pathlib.Path) -> float:
    """MB/s of a file that is written into a folder, or the one it would be made in."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    data = np.random.default_rng(0).bytes(_DISK_BYTES)
    with tempfile.TemporaryFile(dir=nearest) as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - started) / 1e6


# --- what is slow, and why ----------------------------------------------------------------


class Advice(NamedTuple):
    """Something that makes training slow, or keeps it from running.

    Attributes:
      what: is slow or wrong, and why.
      remedy: what to do about it.
      is_wrong: whether it is a setting or a fault that should be put right; otherwise it is as the
        machine is, and worth knowing.
    """

    what: str
    remedy: str
    is_wrong: bool = False


def advise(machine: Machine, speeds: Speeds | None = None) -> list[Advice]:
    """Says what is slow and why, what is wrong first.

    Args:
      machine: what was found of the machine.
      speeds: what was measured; None leaves out what follows from it.
    """
    found = [
        *_about_gpus(machine),
        *(() if machine.gpus else _about_processor(machine)),
        *_about_cores(machine),
        *_about_room(machine),
        *(() if speeds is None else _about_speeds(machine, speeds)),
    ]
    return sorted(found, key=lambda advice: not advice.is_wrong)


def _about_gpus(machine: Machine) -> Iterator[Advice]:
    if machine.driver_gpus and not machine.gpus:
        name = machine.driver_gpus[0]
        hidden = machine.environment.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None:
            yield Advice(
                f"{name} is there, and CUDA_VISIBLE_DEVICES={hidden!r} hides it",
                "unset CUDA_VISIBLE_DEVICES to train on it",
            )
        else:
            yield Advice(
                f"{name} is there, but TensorFlow finds no CUDA to use it with",
                'pip install "cifarflow[gpu]"',
                is_wrong=True,
            )
    for gpu in machine.gpus[:1]:
        if (7, 0) <= gpu.capability < (8, 0):
            yield Advice(
                f"{gpu.name} multiplies float16 in hardware and bfloat16 not: auto is float32",
                "--precision=mixed_float16 is faster here",
            )
    if len(machine.gpus) > 1:
        yield Advice(
            f"of {len(machine.gpus)} GPUs a run uses one, unless told otherwise",
            "--strategy=mirrored shares each batch out among all of them",
        )
    is_fixed = machine.environment.get("TF_DETERMINISTIC_OPS", "").lower() in ("1", "true")
    if machine.gpus and is_fixed:
        yield Advice(
            "TF_DETERMINISTIC_OPS is on: the GPU adds up in a fixed order, which is slower",
            "unset it, unless runs have to be the same to the bit",
        )


def _about_processor(machine: Machine) -> Iterator[Advice]:
    onednn = machine.environment.get("TF_ENABLE_ONEDNN_OPTS", "")
    if onednn.lower() in ("0", "false"):
        yield Advice(
            f"TF_ENABLE_ONEDNN_OPTS={onednn} switches oneDNN off: steps take many times as "
            "long, in bfloat16 up to fifty",
            "unset TF_ENABLE_ONEDNN_OPTS",
            is_wrong=True,
        )
    threads = machine.environment.get("TF_NUM_INTRAOP_THREADS", "")
    if threads.isdecimal() and 0 < int(threads) < machine.cores:
        yield Advice(
            f"TF_NUM_INTRAOP_THREADS={threads} leaves cores idle: {machine.cores} may be used",
            "unset TF_NUM_INTRAOP_THREADS",
            is_wrong=True,
        )
    if machine.architecture in ("x86_64", "AMD64") and machine.instructions:
        missing = "avx512f" not in machine.instructions
        where = "the virtual machine's processor" if machine.is_virtual else "the processor"
        if missing:
            hidden = "if the host has it, pass its processor through" if machine.is_virtual else ""
            yield Advice(
                f"{where} has no AVX512: products run at half the speed or less of one that has",
                hidden or "nothing to set; a newer processor, or a GPU",
            )
    if machine.governor == "powersave" and not machine.is_virtual:
        yield Advice(
            "the frequency governor is powersave, which on some drivers holds the clock down",
            "cpupower frequency-set -g performance",
        )


def _about_cores(machine: Machine) -> Iterator[Advice]:
    if machine.cores < machine.cores_of_machine:
        yield Advice(
            f"this process may run on {machine.cores} of {machine.cores_of_machine} cores",
            "taskset, numactl, a container or a batch system has set that",
        )
    if machine.quota is not None and machine.quota < machine.cores:
        yield Advice(
            f"a quota of {machine.quota:g} cores on {machine.cores}: threads are stopped in turns",
            f"raise the container's limit, or run on whole cores: taskset -c 0-"
            f"{max(math.floor(machine.quota) - 1, 0)}",
            is_wrong=True,
        )
    if machine.load is not None and machine.load > 0.5 * machine.cores:
        yield Advice(
            f"a load of {machine.load:.1f} on {machine.cores} cores: other programs are running",
            "times will be longer, and vary, until they are done",
        )


def _about_room(machine: Machine) -> Iterator[Advice]:
    if machine.memory_bytes and machine.available_bytes < 1.5 * _GIB:
        yield Advice(
            f"{machine.available_bytes / _GIB:.1f} GiB of memory are free: a run takes about 1.5",
            "end other programs",
            is_wrong=True,
        )
    if machine.swapped_bytes > 0.1 * machine.memory_bytes > 0:
        yield Advice(
            f"{machine.swapped_bytes / _GIB:.1f} GiB are swapped out: memory has been short",
            "what is swapped back in during a run stops it for a while",
        )
    if not machine.can_write:
        yield Advice(
            f"{str(machine.workdir)!r} cannot be written: no run could be kept there",
            "give a folder that can: --workdir",
            is_wrong=True,
        )
    elif machine.disk_bytes < _GIB:
        yield Advice(
            f"{machine.disk_bytes / _GIB:.1f} GiB are free on the disk of {str(machine.workdir)!r}",
            "a run keeps its state three times, up to 300 MB in all: make room",
            is_wrong=True,
        )


def _about_speeds(machine: Machine, speeds: Speeds) -> Iterator[Advice]:
    products = speeds.products
    if machine.precision == "mixed_bfloat16" and products["bfloat16"] < products["float32"]:
        yield Advice(
            f"bfloat16, which auto takes, multiplies slower ({products['bfloat16']:,.0f} GFLOP/s) "
            f"than float32 ({products['float32']:,.0f})",
            "--precision=float32, if it stays so when the machine is idle",
            is_wrong=True,
        )
    if speeds.disk is not None and speeds.disk < 20:
        yield Advice(
            f"the disk of {str(machine.workdir)!r} takes {speeds.disk:.0f} MB/s: checkpoints are "
            "written while training goes on, and the last one is waited for",
            "a --workdir on another disk",
        )
    if speeds.spread > 1.5:
        yield Advice(
            f"the same steps took from 1 to {speeds.spread:.1f} times as long: cores are shared, "
            "or their clock changes",
            "measure again when nothing else runs",
        )
    if speeds.input_share > 0.1:
        yield Advice(
            f"{100 * speeds.input_share:.0f} % of a step is spent waiting for images",
            speeds.verdict,
        )
    if speeds.host_share > 0.3:
        yield Advice(
            f"{100 * speeds.host_share:.0f} % of a step is spent between its operations",
            speeds.verdict,
        )
