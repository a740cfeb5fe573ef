"""Kills runs again and again and goes on with them: do they come out as if nothing had happened?

    python benchmarks/resume_proof.py
    python benchmarks/resume_proof.py --kills=20 --recipes=fast94 --precisions=mixed_float16
    python benchmarks/resume_proof.py --json=resume.json --plot=resume.png

Each run is a process that SIGKILL ends at moments drawn over all of it: while it starts, between
two checkpoints, while a checkpoint is written, after the last step.  Each time another process goes
on with what is left in its folder.  In the end hashes of its weights, of its newest and best
checkpoints (weights and optimiser), of its log without the times and of its test are compared with
those of a run that nothing was done to.  Exit status 1 if any differ, or a file under a final name
is cut.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import dataclasses
import pathlib
import shutil
import signal
import sys
import tempfile
from typing import Any

import child_runs
import harness
import trial_runs
from absl import flags
from child_runs import Course, Moment, Whole

from cifarflow.errors import check_seed

FLAGS = flags.FLAGS
# Short, but so long that a kill is not over before it has come: as batches of a small net.
_STEPS, _QUICK_STEPS = 120, 300
# Runs that were over before all their kills came are begun anew, but not for ever.
_MOST_RUNS = 10
_KINDS = {
    "start-up": "in start-up",
    "training": "between checkpoints",
    "writing": "while one was written",
    "end": "after the last step",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run, checked.

    Attributes:
      courses: each recipe in each precision, shortened.
      kills: of each.
      seed: of the moments.
    """

    courses: tuple[Course, ...]
    kills: int
    seed: int


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags(rounds=6, counts="kills")
    flags.DEFINE_string(
        "recipes", None, "joined by commas, as lab_cnn,fast75:epochs=2 (default: these two)"
    )
    flags.DEFINE_string("precisions", None, "joined by commas (default float32,mixed_bfloat16)")
    flags.DEFINE_string("augment", "flip,crop:4", "for recipes without augmentation of their own")
    flags.DEFINE_integer("steps", None, f"of a run (default {_STEPS}; quick: {_QUICK_STEPS})")
    flags.DEFINE_integer("epoch_steps", 16, "batches of images that are used: steps an epoch")
    flags.DEFINE_integer("checkpoint_steps", 7, "steps from one checkpoint to the next")
    flags.DEFINE_integer("seed", 0, "of the moments")


def make_plan(
    settings: harness.Settings,
    *,
    recipes: str | None = None,
    precisions: str | None = None,
    augment: str = "flip,crop:4",
    steps: int | None = None,
    epoch_steps: int = 16,
    checkpoint_steps: int = 7,
    seed: int = 0,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if a recipe or precision is unknown, or a number out of range.
    """
    quick = settings.quick
    recipes = recipes or ("lab_mlp" if quick else "lab_cnn,fast75")
    precisions = precisions or ("float32" if quick else "float32,mixed_bfloat16")
    courses = [
        child_runs.make_course(
            recipe.name,
            settings,
            steps=steps if steps is not None else (_QUICK_STEPS if quick else _STEPS),
            epoch_steps=epoch_steps,
            checkpoint_steps=checkpoint_steps,
            augment=augment,
            precision=precision,
            flag="--recipes",
        )
        for recipe in trial_runs.read_recipes("--recipes", recipes)
        for precision in child_runs.parse_precisions(precisions)
    ]
    return Plan(tuple(courses), settings.rounds, check_seed(seed))


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("recipes", "precisions", "augment", "steps", "epoch_steps", "checkpoint_steps", "seed")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


def prove(course: Course, *, kills: int, seed: int, folder: pathlib.Path) -> dict[str, Any]:
    """Kills a run so many times, and compares what it comes to.

    Args:
      course: the run.
      kills: how many times it is killed.
      seed: of the moments.
      folder: where the runs' folders are made.

    Returns:
      The figures, as they go into the JSON file.

    Raises:
      WorkerError: if the run does not even end well when it is left alone.
    """
    name = f"{course.recipe.name}, {course.recipe.precision}"
    whole = child_runs.run_whole(course, folder / "whole")
    print(f"{name}: {course.steps} steps without a break", file=sys.stderr)
    result: dict[str, Any] = {
        "recipe": course.recipe.name,
        "precision": course.recipe.precision,
        "steps": course.steps,
        "whole": whole._asdict(),
        "kills": [],
        "runs": [],
    }
    left = child_runs.draw_moments(kills, seed=seed)
    for number in range(_MOST_RUNS):
        workdir = folder / f"run{number}"
        run: dict[str, Any] = {"differs": [], "damaged": [], "failed": ""}
        result["runs"].append(run)
        if not _kill(course, whole, workdir, left, result["kills"], run):
            break
        run["differs"] = child_runs.differing(child_runs.fingerprint(workdir), whole.fingerprint)
        run["damaged"] += child_runs.damaged(workdir)
        shutil.rmtree(workdir)
        if not left:
            break
    else:
        result["runs"][-1]["failed"] = f"{len(left)} kills came too late, {_MOST_RUNS} times"
    parts = [p for p in child_runs.PARTS if any(p in run["differs"] for run in result["runs"])]
    result["differs"] = parts
    wrong = [run for run in result["runs"] if run["damaged"] or run["failed"]]
    result["is_identical"] = not parts and not wrong
    return result


def _kill(
    course: Course,
    whole: Whole,
    workdir: pathlib.Path,
    left: list[Moment],
    kills: list[dict[str, Any]],
    run: dict[str, Any],
) -> bool:
    """Runs the course in one folder to its end, through as many kills as come before that.

    Args:
      course: the run.
      whole: what is known of it.
      workdir: its folder.
      left: the moments left; those that came are taken away.
      kills: takes what is known of each kill.
      run: takes what went wrong.

    Returns:
      Whether it came to its end; if not, `run["failed"]` says why.
    """
    while True:
        with child_runs.Child(course.command(workdir)) as child:
            moment, written = left[0] if left else None, child_runs.unfinished(workdir)
            met = moment is not None and child.meet(moment, course, whole, workdir)
            if met:
                child.signal(signal.SIGKILL)
            ended = child.finish()
        if ended.status == -signal.SIGKILL and moment is not None:
            del left[0]
            # Of a file that had its name by then nothing is left: that was between two.
            is_cut = bool(child_runs.unfinished(workdir) - written)
            kind = "training" if moment.kind == "writing" and not is_cut else moment.kind
            kill = {
                "kind": kind,
                "resumed_step": child.resumed_step,
                "step": child.step,
                "seconds": round(child.times[-1][0], 3) if child.times else None,
                "newest_step": child_runs.newest_step(workdir),
            }
            kills.append(kill)
            run["damaged"] += child_runs.damaged(workdir)
            print(f"  killed {describe_kill(kill)}", file=sys.stderr)
            continue
        if ended.status:
            line = child_runs.last_line(ended.stderr)
            run["failed"] = f"{child_runs.describe_status(ended.status)}: {line}"
            return False
        if moment is not None:
            # It was over first: the same moment comes earlier in the next run.
            left[0] = moment._replace(share=moment.share / 2)
        return True


def describe_kill(kill: dict[str, Any]) -> str:
    """When a kill came, for a table: the last step known to be done, and what it was in."""
    if kill["step"] is None:
        return "start-up"
    note = {"writing": " writing", "end": " end"}.get(kill["kind"], "")
    return f"{kill['step']}{note}"


def describe(results: list[dict[str, Any]]) -> str:
    """A table of all runs, and what follows."""
    header = ["recipe", "precision", "steps", "kills", "last step before each kill"]
    header += ["steps run again", "end"]
    rows = []
    for result in results:
        kills = result["kills"]
        again = sum(max(0, (kill["step"] or 0) - kill["newest_step"]) for kill in kills)
        rows.append(
            [
                result["recipe"],
                result["precision"].removeprefix("mixed_"),
                str(result["steps"]),
                str(len(kills)),
                ", ".join(map(describe_kill, kills)),
                str(again),
                _describe_end(result),
            ]
        )
    kills = [kill for result in results for kill in result["kills"]]
    counts = {kind: sum(kill["kind"] == kind for kill in kills) for kind in _KINDS}
    good = sum(result["is_identical"] for result in results)
    lines = [
        harness.format_table(header, rows),
        "",
        f"{len(kills)} kills: "
        + ", ".join(f"{count} {_KINDS[kind]}" for kind, count in counts.items()),
        f"{good} of {len(results)} runs identical to the uninterrupted one in weights, newest "
        "and best checkpoint (weights and optimiser), log and test",
    ]
    return "\n".join(lines)


def _describe_end(result: dict[str, Any]) -> str:
    if result["is_identical"]:
        return "identical"
    troubles = [run["failed"] for run in result["runs"] if run["failed"]]
    troubles += [f"{name} cut" for run in result["runs"] for name in run["damaged"]]
    return "; ".join(
        troubles + ([child_runs.describe_end(result["differs"])] if result["differs"] else [])
    )


def draw(results: list[dict[str, Any]], path: pathlib.Path, *, about: str) -> None:
    """Draws each life of each run as a line from the step it went on from to its kill.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from panels import drawn_panels

    from cifarflow.reporting.plots import BLUE, MUTED

    title = f"Runs killed and gone on with, {about}"
    with drawn_panels(path, len(results), title=title, inches=1.6) as panels:
        for axes, result in zip(panels, results, strict=True):
            for life, kill in enumerate(result["kills"]):
                last = kill["step"] or 0
                first = kill["resumed_step"] if kill["resumed_step"] is not None else last
                axes.plot([first, last], [life, life], color=BLUE)
                axes.plot(last, life, "x", color=BLUE if kill["step"] is not None else MUTED)
            axes.set_xlim(-1, result["steps"] + 1)
            axes.set_ylabel("kill")
            axes.invert_yaxis()
            precision = result["precision"].removeprefix("mixed_")
            axes.set_title(f"{result['recipe']}, {precision}: {_describe_end(result)}")
        panels[-1].set_xlabel("step")


def main() -> None:
    settings = harness.settings_from_flags(counts="kills")
    plan = plan_from_flags(settings)
    sets = trial_runs.load_sets([course.recipe for course in plan.courses], settings)
    record = harness.begin_record(
        settings,
        plan,
        dataset=sets[0],
        how=f"{plan.kills} kills a run, moments from seed {plan.seed}",
    )
    results: list[dict[str, Any]] = []
    for number, course in enumerate(plan.courses):
        with tempfile.TemporaryDirectory() as folder:
            seed = plan.seed + number
            found = prove(course, kills=plan.kills, seed=seed, folder=pathlib.Path(folder))
        results.append(found)
        # Whoever interrupts it keeps what has been proved.
        harness.write_outputs(
            settings,
            {**record, "results": results},
            draw=lambda path, about: draw(results, path, about=about),
        )
    print("\n" + describe(results), flush=True)
    if not all(result["is_identical"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
