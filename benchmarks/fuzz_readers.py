"""Hostile files for every reader: does each end in a result or in one clear error, soon and small?

    python benchmarks/fuzz_readers.py --inputs=100000 --json=fuzz.json
    python benchmarks/fuzz_readers.py --readers=npz,checkpoint --inputs=5000 --seed=3

Each reader is a child process, one at a time.  The memory that it takes at most is measured, and
more than 1 GiB for an input breaks a rule; most readers have no room for more either.  Those of
recipes, capsules, summaries and TFDS sets need TensorFlow, whose threads take address space
without using it: for them there is no such limit, and what is asked for and never touched goes
unseen.

An input that breaks a rule is kept in the folder of --found, and what lies there is tried again by
every later run; the exit status is 1 then.  The same seed gives the same inputs.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import fuzz_ways
import harness
from absl import flags

from cifarflow.errors import WorkdirError, check_int, check_seed
from cifarflow.files import replacing

FLAGS = flags.FLAGS
SCRIPT = pathlib.Path(__file__).with_name("fuzz_ways.py")
# Shares of the inputs: more for what is decoded from more, few where one takes 10 ms.
WEIGHTS = {
    **{"pickle": 16, "binary": 2, "folder": 4, "archive": 16, "npz": 14, "tfrecord": 4},
    **{"verified": 4, "workdir": 5, "summary": 5, "history": 8, "outputs": 6, "checkpoint": 11},
    **{"recipe": 4, "capsule": 1, "tfds": 1, "mistakes": 6, "picture": 8, "prepared": 1},
}
# Asked of a child at a time, so that there is something to see.
_INPUTS_AT_ONCE = 5000


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is tried, checked.

    Attributes:
      inputs: how many.
      seed: of the inputs.
      readers: who is given them.
      found: the folder of the inputs that broke a rule.
    """

    inputs: int
    seed: int
    readers: tuple[str, ...]
    found: pathlib.Path


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    flags.DEFINE_integer("inputs", 100_000, "how many inputs, over all readers")
    flags.DEFINE_integer("seed", 0, "seed of the inputs")
    flags.DEFINE_string("readers", ",".join(fuzz_ways.READERS), "who is tried, joined by commas")
    flags.DEFINE_string("found", "runs/fuzz", "folder for inputs that break a rule")
    flags.DEFINE_string("json", None, "write all figures to this file")


def make_plan(
    *, inputs: int, seed: int = 0, readers: str = "", found: str | os.PathLike[str] = "runs/fuzz"
) -> Plan:
    """Reads the flags.

    Raises:
      ConfigError: if a number is out of range or a reader unknown.
      WorkdirError: if found is a file.
    """
    known = tuple(fuzz_ways.READERS)
    chosen = harness.parse_choices("--readers", readers, known) if readers else known
    folder = pathlib.Path(os.path.expanduser(found))
    if not str(found).strip() or (folder.exists() and not folder.is_dir()):
        raise WorkdirError(f"--found must be a folder, not {str(found)!r}")
    count = check_int("--inputs", inputs, minimum=len(chosen))
    return Plan(count, check_seed(seed), chosen, folder)


def shares(inputs: int, readers: Sequence[str]) -> dict[str, int]:
    """How many inputs each reader is given: at least one, and all together `inputs`."""
    whole = sum(WEIGHTS[reader] for reader in readers)
    spare = inputs - len(readers)
    counts = {reader: 1 + spare * WEIGHTS[reader] // whole for reader in readers}
    counts[readers[0]] += inputs - sum(counts.values())
    return counts


def fuzz_reader(
    reader: str,
    count: int,
    *,
    seed: int,
    found: pathlib.Path,
    script: pathlib.Path = SCRIPT,
) -> dict[str, Any]:
    """Gives one reader its inputs, in a child process; in another one after each that kills it.

    Args:
      reader: a key of `fuzz_ways.READERS`.
      count: how many.
      seed: of the inputs.
      found: the folder of inputs that broke a rule: its own are tried too.
      script: what the child runs.

    Returns:
      The figures, as they go into the JSON file.
    """
    total: dict[str, Any] = {"inputs": 0, "read": 0, "refused": 0, "seconds": 0.0, "grown": 0}
    total.update(slowest=(0.0, 0), broke=[])
    again = [path for path in sorted(found.glob(f"{reader}-*.bin")) if path.is_file()]
    todo = [(0, count)]
    with tempfile.TemporaryDirectory() as scratch:
        note = fuzz_ways.note_of(pathlib.Path(scratch))
        spec = {"reader": reader, "seed": seed, "scratch": scratch}
        while again or todo:
            try:
                with harness.Worker(reader, script, spec) as worker:
                    while again:
                        why = worker.ask("replay", path=str(again[0].resolve()))
                        _add_again(total, again.pop(0), why)
                    while todo:
                        first, end = todo[0]
                        some = min(_INPUTS_AT_ONCE, end - first)
                        _add(total, worker.ask("run", first=first, count=some))
                        todo[:1] = [(first + some, end)] if first + some < end else []
            except harness.WorkerError as error:
                last = note.read_text().strip() if note.exists() else ""
                if not last:
                    raise  # not by an input
                note.write_text("")
                if again:
                    _add_again(total, again.pop(0), str(error))
                    continue
                # What was found before it is lost: all but this one are tried again.
                (first, end), index = todo[0], int(last)
                todo[:1] = [(a, b) for a, b in ((first, index), (index + 1, end)) if a < b]
                total["broke"].append({"index": index, "why": str(error)})
                total["inputs"] += 1
    for broken in total["broke"]:
        if "index" in broken:
            data = fuzz_ways.make_input(reader, seed=seed, index=broken["index"])
            path = found / f"{reader}-{seed}-{broken['index']}.bin"
            with replacing(path, what="input") as file:
                file.write(data)
            broken["input"] = str(path)
    return total


def _add_again(total: dict[str, Any], path: pathlib.Path, why: str | None) -> None:
    """Adds what came of an input that broke a rule before."""
    total["inputs"] += 1
    if why:
        total["broke"].append({"input": str(path), "why": why})
    else:
        total["read"] += 1


def _add(total: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Adds the figures of some inputs to those of all."""
    for key in ("read", "refused", "seconds"):
        total[key] += found[key]
    total["inputs"] += found["read"] + found["refused"] + len(found["broke"])
    total["grown"] = max(total["grown"], found["grown"])
    total["slowest"] = max(total["slowest"], tuple(found["slowest"]))
    total["broke"] += [{"index": index, "why": why} for index, why in found["broke"]]


def describe(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a table."""
    header = ["reader", "inputs", "read", "refused", "broke a rule", "seconds", "slowest, ms"]
    rows = [
        [
            *(reader, f"{r['inputs']:,}", f"{r['read']:,}", f"{r['refused']:,}"),
            *(str(len(r["broke"])), f"{r['seconds']:.1f}", f"{1000 * r['slowest'][0]:.1f}"),
            f"{r['grown'] / 1e6:.1f}",
        ]
        for reader, r in results.items()
    ]
    return harness.format_table([*header, "memory grew, MB"], rows)


def measure(plan: Plan, *, script: pathlib.Path = SCRIPT) -> dict[str, dict[str, Any]]:
    """Tries everything; a line on stdout for each reader."""
    results = {}
    for reader, count in shares(plan.inputs, plan.readers).items():
        result = fuzz_reader(reader, count, seed=plan.seed, found=plan.found, script=script)
        results[reader] = result
        print(f"{reader}: {result['inputs']:,} inputs in {result['seconds']:.1f} s", flush=True)
        for broken in result["broke"]:
            print(f"{reader}: {broken['input']}: {broken['why']}", flush=True)
    return results


def main() -> None:
    plan = make_plan(inputs=FLAGS.inputs, seed=FLAGS.seed, readers=FLAGS.readers, found=FLAGS.found)
    path = harness.check_output("--json", FLAGS.json) if FLAGS.json is not None else None
    stands_with = harness.environment()
    print(f"{harness.describe_environment(stands_with)}\n{stands_with['date']}; seed {plan.seed}")
    results = measure(plan)
    print(f"\n{describe(results)}")
    tried = sum(result["inputs"] for result in results.values())
    broke = sum(len(result["broke"]) for result in results.values())
    print(f"{tried:,} inputs, {broke} broke a rule")
    if path is not None:
        settings = {**dataclasses.asdict(plan), "found": str(plan.found)}
        record = {"environment": stands_with, "plan": settings, "inputs": tried, "broke": broke}
        harness.write_json(path, {**record, "results": results})
    if broke:
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
