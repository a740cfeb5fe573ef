"""Two workers against one process: same weights? And how fast?

    python benchmarks/distribution.py
    python benchmarks/distribution.py --recipe=lab_batchnorm --batch_size=512 --precision=auto
    python benchmarks/distribution.py --json=team.json --plot=team.png

One recipe is trained by one process on all cores, by one on a single core, and by two workers that
speak over the loopback, each pinned to a core of its own: all with the same batches, of which each
worker has half.  Compared are the weights after some steps; then the three take turns, and their
images a second are compared round by round.

Two workers of one machine share its cores and its memory, so they cannot be faster than one process
that has both: what is seen here is what the exchange of gradients costs, not what a second machine
brings.

Weights are equal but for the order in which floats are added, in a recipe without BatchNorm and
dropout.  Where a net has kinks even that much becomes another run within some steps: one process on
one core ends some 1e-4 away from the same process on two.  So lab_cnn has average pooling and tanh
here, unless --model_options says otherwise, and beside the workers stands the process on one core.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import harness
import numpy as np
import team_ways
from absl import flags

from cifarflow.errors import ConfigError, check_choice, check_float, check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES
from cifarflow.recipes.options import parse_options

FLAGS = flags.FLAGS
WAYS = {"one": "one process", "one_core": "one process, one core", "workers": "two workers"}
# The largest difference of a weight in float32, after 20 steps of lab_cnn.
GOAL_DIFFERENCE, GOAL_STEPS = 1e-5, 20
SMOOTH = "pooling=average,activation=tanh"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared, checked.

    Attributes:
      recipe: a name in `RECIPES`.
      batch_size: of all workers together.
      precision: of all ways.
      model_options: over the recipe's.
      steps: after which the weights are compared.
      seconds_a_round: how long a turn takes.
    """

    recipe: str
    batch_size: int
    precision: str
    model_options: dict[str, Any]
    steps: int
    seconds_a_round: float


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags()
    flags.DEFINE_enum("recipe", "lab_cnn", sorted(RECIPES), "what is trained")
    flags.DEFINE_integer("batch_size", 128, "examples a step, of all workers together")
    flags.DEFINE_enum("precision", "float32", PRECISIONS, "of all ways; auto: the recipe's")
    flags.DEFINE_string(
        "model_options",
        None,
        f"over the recipe's, key=value,... (default: none; for lab_cnn {SMOOTH})",
    )
    flags.DEFINE_integer("steps", GOAL_STEPS, "after which the weights are compared")
    flags.DEFINE_float("seconds_a_round", None, "of one turn of one way (default 2; quick: 0.1)")


def make_plan(
    settings: harness.Settings,
    *,
    recipe: str = "lab_cnn",
    batch_size: int = 128,
    precision: str = "float32",
    model_options: str | None = None,
    steps: int = GOAL_STEPS,
    seconds_a_round: float | None = None,
) -> Plan:
    """Checks the flags; None is the default, which --quick makes small.

    Raises:
      ConfigError: if a name is unknown, a number out of range, or the device no processor.
    """
    if settings.device != "cpu":
        raise ConfigError("--device must be cpu: two workers cannot be measured on one GPU")
    if check_int("--batch_size", batch_size) % 2:
        raise ConfigError(f"--batch_size must be even, for two workers, not {batch_size}")
    if seconds_a_round is None:
        seconds_a_round = 0.1 if settings.quick else 2.0
    if model_options is None:
        model_options = SMOOTH if recipe == "lab_cnn" else "{}"
    return Plan(
        recipe=check_choice("--recipe", recipe, sorted(RECIPES)),
        model_options=parse_options(model_options),
        batch_size=batch_size,
        precision=check_choice("--precision", precision, PRECISIONS),
        steps=check_int("--steps", steps),
        seconds_a_round=check_float("--seconds_a_round", seconds_a_round, above_minimum=True),
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    names = ("recipe", "batch_size", "precision", "model_options", "steps", "seconds_a_round")
    values: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return make_plan(settings, **values)


class Together:
    """Workers that must do everything at the same time.

    Args:
      workers: not started yet.

    Attributes:
      facts: those of the first.
    """

    def __init__(self, workers: list[harness.Worker]) -> None:
        self._workers = workers
        self.facts: dict[str, Any] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(len(workers))

    @contextlib.contextmanager
    def running(self) -> Iterator[Together]:
        """Starts all, and ends them after the block."""
        with self._threads, contextlib.ExitStack() as stack:
            started = [self._threads.submit(each.__enter__) for each in self._workers]
            for each in self._workers:
                stack.push(each.__exit__)
            for future in started:
                future.result()
            self.facts = self._workers[0].facts
            yield self

    def round(self, steps: int) -> float:
        """Runs the steps and returns the seconds of the slowest."""
        futures = [self._threads.submit(each.round, steps) for each in self._workers]
        return max(future.result() for future in futures)

    def save_weights(self, steps: int, path: pathlib.Path) -> None:
        """Trains from the start; the file has the weights of the first."""
        futures = [
            self._threads.submit(
                each.ask, "save_weights", steps=steps, path=f"{path}{number or ''}.npz"
            )
            for number, each in enumerate(self._workers)
        ]
        for future in futures:
            future.result()


def free_addresses(count: int) -> list[str]:
    """Addresses on the loopback where nobody listens."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]


def measure(plan: Plan, settings: harness.Settings) -> dict[str, Any]:
    """Runs all ways.

    Returns:
      The figures, as they go into the JSON file.
    """
    spec = {
        "recipe": plan.recipe,
        "batch_size": plan.batch_size,
        "precision": plan.precision,
        "model_options": plan.model_options,
        "examples": settings.count_examples(plan.batch_size),
        "cores": None,
        "addresses": [],
        "index": 0,
        **settings.data_options,
    }
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pins = [[cores[0]], [cores[-1]]] if cores else [None, None]
    addresses = free_addresses(2)
    script = pathlib.Path(team_ways.__file__)

    def child(way: str, **changes: Any) -> harness.Worker:
        return harness.Worker(way, script, {**spec, **changes})

    made = {
        "one": [child("one")],
        "one_core": [child("one_core", cores=pins[0])],
        "workers": [
            child(f"worker {index}", cores=pins[index], addresses=addresses, index=index)
            for index in range(2)
        ],
    }
    with contextlib.ExitStack() as stack:
        ways = {}
        for name, workers in made.items():
            print(f"starting {WAYS[name]}", file=sys.stderr)
            ways[name] = stack.enter_context(Together(workers).running())
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        weights = {}
        for name, way in ways.items():
            way.save_weights(plan.steps, folder / name)
            with np.load(folder / f"{name}.npz") as file:
                weights[name] = list(file.values())
        seconds = harness.interleave(
            ways, rounds=settings.rounds, seconds_a_round=plan.seconds_a_round
        )
    return summarise(plan, weights, seconds, is_pinned=bool(cores), is_quick=settings.quick)


def summarise(
    plan: Plan,
    weights: Mapping[str, list[np.ndarray]],
    seconds: Mapping[str, harness.Samples],
    *,
    is_pinned: bool,
    is_quick: bool = False,
) -> dict[str, Any]:
    """Puts the figures together.

    Args:
      plan: what was compared.
      weights: after `plan.steps` steps, by way.
      seconds: a step, by way.
      is_pinned: whether each worker had a core of its own.
      is_quick: whether the times are worth nothing.
    """
    results: list[dict[str, Any]] = []
    for name in WAYS:
        pairs = zip(weights[name], weights["one"], strict=True)
        results.append(
            {
                "way": name,
                "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
                "images_per_second": seconds[name].rate(plan.batch_size).to_json(),
                "speed_over_one": seconds["one"].over(seconds[name]).to_json(),
                "speed_over_one_core": seconds["one_core"].over(seconds[name]).to_json(),
            }
        )
    is_smooth = plan.model_options == parse_options(SMOOTH)
    has_bar = (plan.recipe, plan.precision, is_smooth) == ("lab_cnn", "float32", True)
    has_bar = has_bar and plan.steps <= GOAL_STEPS
    is_reached = results[-1]["largest_difference"] <= GOAL_DIFFERENCE
    return {
        "ways": results,
        "is_pinned": is_pinned,
        "times_count": not is_quick,
        "goal": {"at_most": GOAL_DIFFERENCE, "is_reached": is_reached} if has_bar else None,
    }


def describe(result: dict[str, Any], plan: Plan) -> str:
    """The figures for a reader: a table, and the bar."""
    header = ["way", "images/s", "over one process", "over one core", "spread", "n"]
    header += [f"largest difference of a weight after {plan.steps} steps"]
    rows = []
    for way in result["ways"]:
        rows.append(
            [
                WAYS[way["way"]],
                harness.format_number(way["images_per_second"]["median"]),
                f"{way['speed_over_one']['median']:.2f}",
                f"{way['speed_over_one_core']['median']:.2f}",
                f"{100 * way['speed_over_one']['spread']:.1f} %",
                str(way["speed_over_one"]["n"]),
                f"{way['largest_difference']:.1e}",
            ]
        )
    lines = [f"## {plan.recipe}, {plan.precision}, batches of {plan.batch_size} in all", ""]
    lines += [harness.format_table(header, rows), ""]
    pinned = ", each pinned to one core" if result["is_pinned"] else ""
    lines.append(f"the workers share this machine{pinned}: what they show is what exchange costs")
    if result["goal"] is not None:
        reached = "reached" if result["goal"]["is_reached"] else "missed"
        lines.append(
            f"largest difference between one process and two workers at most "
            f"{result['goal']['at_most']:g}: {reached}, "
            f"{result['ways'][-1]['largest_difference']:.1e}"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: pathlib.Path, *, about: str) -> None:
    """Draws the images a second of each way in each round.

    Raises:
      WorkdirError: if the file cannot be written.
    """
    # Plotting is loaded here: whoever wants no picture does not wait for it.
    from panels import drawn_panels

    from cifarflow.reporting.plots import BLUE, MUTED

    title = f"One process and two workers, {about}"
    with drawn_panels(path, 1, title=title, inches=2.6) as panels:
        (axes,) = panels
        for way, style in zip(result["ways"], ("-", "--", ".-"), strict=True):
            values = way["images_per_second"]["values"]
            colour = BLUE if way["way"] == "workers" else MUTED
            rounds = range(1, len(values) + 1)
            axes.plot(rounds, values, style, color=colour, label=WAYS[way["way"]])
        axes.set_ylim(bottom=0)
        axes.set_title("images a second")
        axes.set_xlabel("round")
        axes.legend(loc="best")


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    record = harness.begin_record(
        settings,
        plan,
        dataset=harness.load_images(settings, [plan.batch_size]),
        how=f"median of {settings.rounds} rounds in turn, spread = range of the quartiles / median",
    )
    result = measure(plan, settings)
    harness.write_outputs(
        settings,
        {**record, "results": result},
        draw=lambda path, about: draw(result, path, about=about),
    )
    print("\n" + describe(result, plan), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
