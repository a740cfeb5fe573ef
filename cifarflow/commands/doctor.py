"""Looks at this machine: what it has, how fast it is, and what is slow, and why.

    cifarflow doctor
    cifarflow doctor --quick

It measures for some ten seconds, --quick not at all.  Exit status: 0 when nothing is wrong, also
where the machine is slow and cannot help it; 1 when there is something to put right, which stands
first and is marked.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from absl import flags
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cifarflow.errors import ConfigError

if TYPE_CHECKING:
    from cifarflow.doctor import Advice, Machine, Speeds

FLAGS = flags.FLAGS
EXIT_WRONG = 1
_GIB = 1 << 30


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_boolean("quick", False, "measure nothing")
    flags.DEFINE_string("workdir", "runs", "the folder whose disk is looked at; it need not exist")


def main() -> int:
    """Prints what is found; returns the exit status.

    Raises:
      ConfigError: if --workdir is no path.
    """
    if not FLAGS.workdir.strip():
        raise ConfigError(f"--workdir must be a path, not {FLAGS.workdir!r}")
    environment = dict(os.environ)
    # Loaded here: what is wrong with a flag is said without waiting for TensorFlow.
    from cifarflow.doctor import advise, measure_speeds, probe_machine

    console = Console(highlight=False)
    machine = probe_machine(FLAGS.workdir, environment=environment)
    print_machine(machine, console)
    speeds = None
    if not FLAGS.quick:
        # Redrawn seldom, since that takes time too.
        waiting = Console(stderr=True)
        with waiting.status("measuring for some ten seconds", refresh_per_second=2):
            speeds = measure_speeds(machine)
        print_speeds(speeds, console)
    found = advise(machine, speeds)
    print_advice(found, console)
    return EXIT_WRONG if any(advice.is_wrong for advice in found) else 0


def print_machine(machine: Machine, console: Console) -> None:
    """Prints what a machine has, and what "auto" takes there."""
    cores = f"{machine.cores} cores"
    if machine.cores < machine.cores_of_machine:
        cores = f"{machine.cores} of {machine.cores_of_machine} cores"
    if machine.quota is not None:
        cores += f", a quota of {machine.quota:g}"
    if machine.load is not None:
        cores += f", load {machine.load:.1f}"
    memory = (
        f"{machine.memory_bytes / _GIB:.1f} GiB, {machine.available_bytes / _GIB:.1f} free"
        if machine.memory_bytes
        else "unknown"
    )
    if machine.swapped_bytes > 0:
        memory += f", {machine.swapped_bytes / _GIB:.1f} swapped out"
    gpus = [
        f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}"
        + (f", {gpu.memory_bytes / _GIB:.0f} GiB" if gpu.memory_bytes else "")
        for gpu in machine.gpus
    ]
    xla = "XLA" if machine.jit_compile else "no XLA"
    rows = {
        "processor": machine.processor + (", virtual" if machine.is_virtual else ""),
        "cores": cores,
        "instructions": ", ".join(machine.instructions) or "unknown",
        "memory": memory,
        "GPU": "; ".join(gpus) or "none that TensorFlow sees",
        "disk": f"{machine.disk_bytes / _GIB:.1f} GiB free for {machine.workdir}",
        "auto takes": f"--precision={machine.precision}, {xla}",
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "environment": "  ".join(f"{name}={value}" for name, value in machine.environment.items())
        or "nothing set that matters",
    }
    _print_section("this machine", rows, console)


def print_speeds(speeds: Speeds, console: Console) -> None:
    """Prints what was measured."""
    products = [f"{dtype} {speed:,.0f}" for dtype, speed in speeds.products.items()]
    share = speeds.products_ms / speeds.step_ms
    rows = {
        "products": f"{', '.join(products)} GFLOP/s",
        "memory": f"{speeds.copy:.1f} GB/s read and written",
        "disk": "not written" if speeds.disk is None else f"{speeds.disk:,.0f} MB/s",
        "lab_cnn": f"a step of 32 images {speeds.step_ms:.1f} ms, {speeds.images_per_second:,.0f} "
        f"images/s in {speeds.precision}",
        "of it": f"{100 * share:.0f} % is what its {speeds.step_gflop:.1f} GFLOP of products take "
        f"at full speed, {speeds.products_ms:.1f} ms; {100 * speeds.input_share:.0f} % waiting for "
        f"images, {100 * speeds.host_share:.0f} % between operations",
        "bound by": speeds.verdict,
    }
    _print_section("how fast it is", rows, console)


def print_advice(found: list[Advice], console: Console) -> None:
    """Prints what is slow, and why."""
    console.print(Text("what is slow, and why", style="bold"))
    if not found:
        console.print("  nothing that could be found")
    for advice in found:
        mark, style = ("wrong: ", "bold red") if advice.is_wrong else ("note: ", "yellow")
        console.print(Padding(Text.assemble((mark, style), advice.what), (0, 0, 0, 2)))
        console.print(Padding(Text(f"-> {advice.remedy}"), (0, 0, 0, 4)))


def _print_section(title: str, rows: dict[str, str], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(Text(title, style="bold"))
    console.print(Padding(table, (0, 0, 1, 2)))
