"""Hurts runs in every way that disks, people and schedulers do, and says what was lost.

    python benchmarks/fault_table.py
    python benchmarks/fault_table.py --signals=30 --faults=signals,checkpoints
    python benchmarks/fault_table.py --recipe=fast75 --json=faults.json --plot=faults.png

Every run is a process of its own.  After each fault another one goes on with what is left, by the
command that the first one printed if it did, and is compared bit for bit with a run that nothing
was done to.  Lost are the steps that it had to run again.  What the library promises:

- SIGTERM and SIGINT stop at the next event, save, print the command that goes on, and end with
  status 143 or 130; before training begins the signal itself may end the process, with nothing to
  save.  A second signal stops at once, and the last checkpoint is whole.  The process is over 6 s
  after the signal: 2 s of work, and the end of a process on a machine that may be busy.
- A checkpoint that cannot be written is a warning while others may follow, and an error at the end.
- A folder that cannot be written, and data that is damaged, end in one line and status 2.
- A folder that is removed is made anew, which is told: status 0 stands for all that a run leaves.
- A damaged checkpoint is reported in a line, and the one before it is taken.
- No file under a final name is ever cut, and whoever goes on ends with the same bits.

Exit status 1 if a promise is broken.  What cannot be tried here is said to be.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import child_runs
import fault_places
import faults
import harness
import trial_runs
from absl import flags
from child_runs import Course
from faults import GROUPS, Outcome

from cifarflow.errors import ConfigError, check_seed

FLAGS = flags.FLAGS
_STEPS, _QUICK_STEPS = 120, 300


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is tried, checked.

    Attributes:
      course: the run that is hurt.
      faults: names in `GROUPS`.
      signals: at how many moments SIGTERM is sent.
      seed: of moments and of places in files.
    """

    course: Course
    faults: tuple[str, ...]
    signals: int
    seed: int


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags(rounds=10, counts="signals")
    flags.DEFINE_string(
        "recipe", None, "what is run, RECIPE or RECIPE:field=value,... (default lab_cnn)"
    )
    flags.DEFINE_string("faults", ",".join(GROUPS), "which, joined by commas")
    flags.DEFINE_integer("steps", None, f"of a run (default {_STEPS}; quick: {_QUICK_STEPS})")
    flags.DEFINE_integer("seed", 0, "of moments and of places in files")


def make_plan(
    settings: harness.Settings,
    *,
    recipe: str | None = None,
    faults: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if a recipe or a fault is unknown, or a number out of range.
    """
    course = child_runs.make_course(
        recipe or ("lab_mlp" if settings.quick else "lab_cnn"),
        settings,
        steps=steps if steps is not None else (_QUICK_STEPS if settings.quick else _STEPS),
        augment="flip,crop:4",
    )
    chosen = tuple(GROUPS)
    if faults is not None:
        chosen = harness.parse_choices("--faults", faults, GROUPS)
    if settings.plot is not None and "signals" not in chosen:
        raise ConfigError("--plot draws seconds from signal to end: it needs --faults=signals")
    return Plan(course, chosen, settings.rounds, check_seed(seed))


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("recipe", "faults", "steps", "seed")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


def describe(outcomes: Sequence[Outcome]) -> str:
    """The table, and what follows."""
    words = {True: "yes", False: "NO", None: "not tried"}
    rows = [
        [
            each.fault,
            each.happened.replace("|", "/"),
            "-" if each.lost_steps is None else str(each.lost_steps),
            each.end,
            words[each.is_kept],
        ]
        for each in outcomes
    ]
    header = ["fault", "what happened", "steps lost", "gone on with", "as promised"]
    lines = [harness.format_table(header, rows), ""]
    tried = [each for each in outcomes if each.is_kept is not None]
    lines.append(f"{sum(map(_is_kept, tried))} of {len(tried)} faults ended as promised")
    seconds = [each.seconds for each in outcomes if each.seconds is not None]
    if seconds:
        lines.append(
            f"from a signal to the end of the process: at most {max(seconds):.2f} s "
            f"(n={len(seconds)})"
        )
    return "\n".join(lines)


def _is_kept(outcome: Outcome) -> bool:
    return outcome.is_kept is True


def draw(outcomes: Sequence[Outcome], path: pathlib.Path, *, about: str) -> None:
    """Draws the seconds from each signal to the end of its process.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    import bars

    lines = [
        bars.Bar(
            each.fault,
            harness.Samples((each.seconds,)),
            f"{each.seconds:.2f} s, {each.lost_steps} steps lost, {each.end}",
            is_ours=_is_kept(each),
        )
        for each in outcomes
        if each.seconds is not None
    ]
    if lines:
        title = f"Signals, {about}"
        bars.draw_bars({"From signal to end": lines}, unit="s", title=title, path=path)


def find_files(source: str) -> pathlib.Path | None:
    """The folder with CIFAR-10's own files that the images were read from, if it is that."""
    folder = pathlib.Path(source)
    return folder if folder.is_dir() and any(folder.glob("data_batch_1*")) else None


def main() -> None:
    settings = harness.settings_from_flags(counts="signals")
    plan = plan_from_flags(settings)
    (dataset,) = trial_runs.load_sets([plan.course.recipe], settings)
    record = harness.begin_record(
        settings, plan, dataset=dataset, how=f"moments and places from seed {plan.seed}"
    )
    mounts = fault_places.own_mounts()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        whole = child_runs.run_whole(plan.course, folder / "whole")
        data = find_files(dataset.source)
        scene = faults.Scene(
            plan.course,
            whole,
            folder,
            data,
            mounts=mounts,
            quick=settings.quick,
            signals=plan.signals,
            seed=plan.seed,
        )
        for group in plan.faults:
            for outcome in GROUPS[group](scene):
                print(f"{outcome.fault}: {outcome.happened}", file=sys.stderr)
                outcomes.append(outcome)
    print("\n" + describe(outcomes), flush=True)
    results = [dataclasses.asdict(outcome) for outcome in outcomes]
    harness.write_outputs(
        settings,
        {**record, "mounts": mounts, "results": results},
        draw=lambda path, about: draw(outcomes, path, about=about),
    )
    if any(outcome.is_kept is False for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
