"""How many images a second the input pipeline brings, plain and augmented, and how others do.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --batch_sizes=512 --json=input.json --plot=input.png
    python benchmarks/input_pipeline.py --ways=cifarflow_drawn,keras_layers --augment=flip
    python benchmarks/input_pipeline.py --ways=cifarflow,cifarflow_drawn --augment=randaugment,mixup

Each way, plain and augmented, is a process of its own that brings batches and does nothing with
them; rounds are interleaved, warm-up is left out, and every ratio is the median over rounds of the
ratio within a round.  Ways are described in `input_ways.py`.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import harness
import input_report
import input_ways
from absl import flags

from cifarflow.data.augment import parse_augment
from cifarflow.errors import ConfigError, check_float

FLAGS = flags.FLAGS
PLAIN, AUGMENTED = "plain", "augmented"
_IMAGE_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, checked.

    Attributes:
      rows: (way, kind): names in `input_ways.WAYS`, `PLAIN` or `AUGMENTED`.
      batch_sizes: images a batch.
      augment: of the augmented rows, as --augment has it.
      seconds_a_round: how long one turn of one way takes.
    """

    rows: tuple[tuple[str, str], ...]
    batch_sizes: tuple[int, ...]
    augment: str
    seconds_a_round: float = 1.0


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags()
    flags.DEFINE_string("ways", ",".join(input_ways.WAYS), "what is measured, joined by commas")
    flags.DEFINE_string("batch_sizes", None, "images a batch (default 32,128,512; quick: 32)")
    flags.DEFINE_string(
        "augment",
        "flip,crop:4",
        "parts of flip,crop:PIXELS, or none; with --ways of cifarflow alone all that a recipe has",
    )
    flags.DEFINE_float("seconds_a_round", None, "of each way (default 1; quick: 0.02)")


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    seconds, sizes = FLAGS.seconds_a_round, FLAGS.batch_sizes
    return make_plan(
        ways=FLAGS.ways,
        batch_sizes=sizes if sizes is not None else ("32" if settings.quick else "32,128,512"),
        augment=FLAGS.augment,
        seconds_a_round=seconds if seconds is not None else (0.02 if settings.quick else 1.0),
    )


def make_plan(
    *,
    ways: str = ",".join(input_ways.WAYS),
    batch_sizes: str = "32",
    augment: str = "flip,crop:4",
    seconds_a_round: float = 1.0,
) -> Plan:
    """Reads the flags, some of which are names or numbers joined by commas.

    Raises:
      ConfigError: if a name is unknown, a number out of range, or nothing is left to measure.
    """
    names = harness.parse_choices("--ways", ways, input_ways.WAYS)
    parts = _parse_augment(augment, names)
    rows = [
        (name, kind) for kind in (PLAIN, AUGMENTED) for name in names if kind in _kinds(name, parts)
    ]
    if not rows:
        raise ConfigError(f"--ways={ways} measures nothing with --augment={augment}")
    return Plan(
        rows=tuple(rows),
        batch_sizes=harness.parse_batch_sizes(batch_sizes),
        augment=augment,
        seconds_a_round=check_float("--seconds_a_round", seconds_a_round, above_minimum=True),
    )


def _parse_augment(augment: str, ways: Sequence[str]) -> dict[str, Any]:
    """Reads what every one of the ways can do; an error is better here than in a worker."""
    if all(issubclass(input_ways.WAYS[way], input_ways.Cifarflow) for way in ways):
        try:
            parts = parse_augment(augment)
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None
    else:
        good = "--augment must be parts of flip,crop:PIXELS, which all ways have, or none"
        try:
            parts = parse_augment(augment)
        except ConfigError:
            raise ConfigError(f"{good}, not {augment!r}") from None
        if set(parts) - {"flip", "crop"}:
            raise ConfigError(f"{good}, not {augment!r}")
    if parts.get("crop", 0) >= _IMAGE_SIDE:
        raise ConfigError(
            f"--augment must crop by less than the image side {_IMAGE_SIDE}, not {augment!r}"
        )
    if parts.get("cutout", 0) > _IMAGE_SIDE:
        raise ConfigError(
            f"--augment must cut out at most the image side {_IMAGE_SIDE}, not {augment!r}"
        )
    return parts


def _kinds(way: str, parts: Mapping[str, Any]) -> tuple[str, ...]:
    """What of plain and augmented there is of a way."""
    if way == "copy":
        return (PLAIN,)
    if way == "keras_crop":
        # Without a crop it is no different from the other Keras way.
        return (AUGMENTED,) if "crop" in parts else ()
    return (PLAIN, AUGMENTED) if parts else (PLAIN,)


def make_specs(
    batch_size: int, plan: Plan, settings: harness.Settings
) -> dict[tuple[str, str], dict[str, Any]]:
    """What each worker is told, by (way, kind)."""
    common = {
        "batch_size": batch_size,
        "device": settings.device,
        "examples": settings.count_examples(batch_size),
        **settings.data_options,
    }
    return {
        (way, kind): {
            **common,
            "way": way,
            "augment": plan.augment if kind == AUGMENTED else "none",
        }
        for way, kind in plan.rows
    }


def measure(batch_size: int, plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Measures all ways at one batch size.

    Returns:
      The figures, as they go into the JSON file.
    """
    script = pathlib.Path(input_ways.__file__)
    with contextlib.ExitStack() as stack:
        workers = {}
        for (way, kind), spec in make_specs(batch_size, plan, settings).items():
            name = f"{input_report.LABELS[way]}, {kind}, batch {batch_size}"
            worker = stack.enter_context(harness.Worker(name, script, spec))
            workers[way, kind] = worker
            first = worker.facts["seconds_to_first_step"]
            print(f"{name}: first batch after {first:.1f} s", file=sys.stderr)
        seconds = harness.interleave(
            workers, rounds=settings.rounds, seconds_a_round=plan.seconds_a_round
        )
        copy = seconds.get(("copy", PLAIN))
        rows = []
        for (way, kind), worker in workers.items():
            took, peak = seconds[way, kind], worker.ask("peak_rss_bytes")
            idle = worker.facts["idle_rss_bytes"]
            rows.append(
                {
                    "way": way,
                    "kind": kind,
                    "label": input_report.LABELS[way],
                    "delivers": worker.facts["delivers"],
                    "seconds_a_batch": took.to_json(),
                    "images_per_second": took.rate(batch_size).to_json(),
                    # Of the speed of a copy of the bytes as they are stored.
                    "share_of_copy": copy.over(took).to_json() if copy else None,
                    "idle_rss_bytes": idle,
                    "peak_rss_bytes": peak,
                    "growth_bytes": peak - idle,
                }
            )
    result = {"batch_size": batch_size, "augment": plan.augment, "ways": rows}
    result["ratios"] = list(input_report.ratios(rows))
    # Tiny sizes reach no goal and miss none.
    result["goals"] = [] if settings.quick else list(input_report.goals(result))
    return result


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    dataset = harness.load_images(settings, plan.batch_sizes)
    record = harness.begin_record(
        settings,
        plan,
        dataset=dataset,
        how=f"median of {settings.rounds} interleaved rounds of {plan.seconds_a_round:g} s, "
        "spread = range of the quartiles / median; "
        "MB = 10^6 bytes resident: idle with the library and the images loaded, and at the peak",
    )
    results = []
    for batch_size in plan.batch_sizes:
        results.append(measure(batch_size, plan, settings))
        print("\n" + input_report.describe(results[-1]), flush=True)
        # Each time, so that an error in the next one loses nothing.
        harness.write_outputs(
            settings,
            {**record, "results": results},
            draw=lambda path, about: input_report.draw(results, path, about=about),
        )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
