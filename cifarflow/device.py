"""Which device TensorFlow trains on, and what it can do.

    prepare_gpus()
    print(describe_device())                        # "cpu: AMD EPYC, 2 cores"

Nothing is asked or set up before a function is called.
"""

from __future__ import annotations

import os
import pathlib
import platform
from typing import Any

from cifarflow.lazy import tf

_CPUINFO = pathlib.Path("/proc/cpuinfo")
_STATM = pathlib.Path("/proc/self/statm")


def prepare_gpus() -> None:
    """Lets TensorFlow take GPU memory as it needs it, instead of all of it at once.

    To be called before the first operation; later it changes nothing.
    """
    for gpu in tf.config.get_visible_devices("GPU"):
        try:
            tf.config.experimental.set_memory_growth(gpu, True)
        except RuntimeError:
            # The GPU is in use already, and stays as whoever was first has set it up.
            return


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU."""
    return bool(tf.config.get_visible_devices("GPU"))


def count_gpus() -> int:
    """How many GPUs TensorFlow sees."""
    return len(tf.config.get_visible_devices("GPU"))


def describe_device() -> str:
    """The device that trains, in words: the first GPU, else the processor."""
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        return f"gpu: {gpu_details(gpus[0]).get('device_name', gpus[0].name)}"
    name = cpuinfo().get("model name") or platform.processor() or platform.machine()
    # The processors this process may use, which on a shared machine are fewer than it has.
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return f"cpu: {name}, {cores} cores"


def has_bfloat16() -> bool:
    """Whether the device that trains multiplies bfloat16 in hardware.

    That is a GPU of compute capability 8.0 (Ampere) or later, or, without a GPU, a processor with
    AVX512_BF16 or AMX_BF16 (read from /proc/cpuinfo, so on Linux only).
    """
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        return bool(gpu_details(gpus[0]).get("compute_capability", (0, 0)) >= (8, 0))
    return bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo().get("flags", "").split()))


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 in tiles, by Intel's AMX (from /proc/cpuinfo)."""
    return "amx_bf16" in cpuinfo().get("flags", "").split()


def resident_bytes() -> int | None:
    """The memory that this process has resident now; None where Linux does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def gpu_details(gpu: Any) -> dict[str, Any]:
    """What TensorFlow says of a GPU: device_name and compute_capability, if it knows them."""
    return dict(tf.config.experimental.get_device_details(gpu))


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty where there is no such file."""
    try:
        lines = _CPUINFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
