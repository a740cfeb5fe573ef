"""How long a recipe takes to what accuracy, over many seeds, and whether another does it better.

    python benchmarks/time_to_accuracy.py --recipe=fast75 --runs=10
    python benchmarks/time_to_accuracy.py --recipe=fast75 --runs=10 --compare=notebook
    python benchmarks/time_to_accuracy.py --recipe=fast94 --runs=20 --compare=torch
    python benchmarks/time_to_accuracy.py --recipe=fast75 --compare=fast75:precision=float32
    python benchmarks/time_to_accuracy.py --recipe=fast94 --compare=fast94:epochs=8 --tune

Each recipe is compiled once, and the one step serves all its runs.  With --compare both run in
turn, seed by seed, and Welch's test says which is faster and which is more accurate, or that the
runs are too few to say.  The test set is read once a run, at its end; with --tune it is not read at
all, and accuracy is that of images held out of the training set.  The files of --json and --plot
are written after each seed: whoever interrupts a long comparison keeps what it has measured.

`--compare=notebook` is the lab's final model the notebook's way: Keras `fit` in float32.  Between
our runs a process of its own runs some of its steps, whose time is multiplied by those of its 25
epochs; --notebook_full runs them all.

`--compare=torch` is the same recipe, a speednet trained by Muon, by a PyTorch loop in a process of
its own: written in the style of airbench, in half precision and channels-last, with the images and
their augmentation on the device; --torch_compile is the mode of `torch.compile`.  Its runs are
timed by the same rule and compared as those of a recipe.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import memory_ways
import torch_peer
import trial_report
import trial_runs
import trial_statistics
import ways
from absl import flags

from cifarflow.data.splits import Dataset
from cifarflow.errors import ConfigError, check_choice, check_float
from cifarflow.evaluation.statistics import summarise
from cifarflow.recipes.named import RECIPES
from cifarflow.recipes.recipe import Recipe
from cifarflow.trials import TIMING_RULE, Trial

FLAGS = flags.FLAGS
NOTEBOOK, TORCH = "notebook", "torch"
NOTEBOOK_RECIPE = RECIPES["lab_final"]
# What a recipe is for: the lab's bars, and those in the names of the fast ones.
BARS: Mapping[str, float] = {
    "lab_mlp": 0.45,
    "lab_cnn": 0.62,
    "lab_final": 0.75,
    "fast75": 0.75,
    "fast94": 0.94,
    "fast95": 0.95,
    "fast96": 0.96,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run, checked.

    Attributes:
      recipes: the recipe, and the one it is compared with, if that is a recipe.
      seeds: of the runs of each.
      read: "test" or "validation", the images that accuracy is of.
      bar: the accuracy to reach, None for that of each recipe.
      notebook: whether to measure a step the notebook's way.
      notebook_full: whether to run all of its steps, too.
      torch: whether to run the recipe by a PyTorch loop.
      torch_compile: how that is compiled, one of `torch_peer.COMPILE_CHOICES`.
    """

    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    read: str = "test"
    bar: float | None = None
    notebook: bool = False
    notebook_full: bool = False
    torch: bool = False
    torch_compile: str = "auto"


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    harness.define_flags(counts="runs")
    flags.DEFINE_string(
        "recipe", "fast75", "what to run: RECIPE or RECIPE:field=value,..., as fast75:epochs=2"
    )
    flags.DEFINE_string(
        "compare", "", f"what to compare it with: another such, {NOTEBOOK} or {TORCH}"
    )
    flags.DEFINE_integer("first_seed", 0, "seed of the first run; the others follow")
    flags.DEFINE_float("bar", None, "the accuracy to reach (default: the recipe's own)")
    flags.DEFINE_boolean("tune", False, "read validation images, not the test set")
    flags.DEFINE_boolean("notebook_full", False, f"with --compare={NOTEBOOK}: run all its epochs")
    flags.DEFINE_enum(
        "torch_compile",
        "auto",
        torch_peer.COMPILE_CHOICES,
        f"with --compare={TORCH}: mode of torch.compile; auto: default on a GPU, none on a CPU",
    )


def make_plan(
    *,
    recipe: str,
    compare: str = "",
    runs: int = 5,
    first_seed: int = 0,
    bar: float | None = None,
    tune: bool = False,
    notebook_full: bool = False,
    torch_compile: str = "auto",
    settings: harness.Settings | None = None,
) -> Plan:
    """Reads the flags.

    Raises:
      ConfigError: if a recipe is unknown, a number out of range, or two flags do not fit together.
    """
    settings = settings or harness.Settings()
    seeds = trial_runs.read_seeds("--runs", runs, first_seed)
    is_notebook, is_torch = compare == NOTEBOOK, compare == TORCH
    recipes = [trial_runs.read_recipe("--recipe", recipe)]
    if compare and not (is_notebook or is_torch):
        recipes.append(trial_runs.read_recipe("--compare", compare))
        if compare == recipe:
            raise ConfigError(f"--compare must be another recipe than --recipe, not {compare!r}")
    if notebook_full and not is_notebook:
        raise ConfigError(f"--notebook_full needs --compare={NOTEBOOK}, not {compare!r}")
    if notebook_full and tune:
        raise ConfigError("--notebook_full reads the test set: it does not go with --tune")
    check_choice("--torch_compile", torch_compile, torch_peer.COMPILE_CHOICES)
    if is_torch:
        torch_peer.check_recipe(recipes[0])
    elif torch_compile != "auto":
        raise ConfigError(f"--torch_compile needs --compare={TORCH}, not {compare!r}")
    if bar is not None:
        bar = check_float("--bar", bar, above_minimum=True, maximum=1.0)
    held_out = 0.0
    if tune:
        # The same of all, so that accuracies are of the same images.
        held_out = max(r.validation_fraction for r in recipes) or trial_runs.HELD_OUT
    return Plan(
        recipes=tuple(trial_runs.adapt(r, settings, held_out=held_out) for r in recipes),
        seeds=tuple(seeds),
        read="validation" if tune else "test",
        bar=bar,
        notebook=is_notebook,
        notebook_full=notebook_full,
        torch=is_torch,
        torch_compile=torch_compile,
    )


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    return make_plan(
        recipe=FLAGS.recipe,
        compare=FLAGS.compare,
        runs=settings.rounds,
        first_seed=FLAGS.first_seed,
        bar=FLAGS.bar,
        tune=FLAGS.tune,
        notebook_full=FLAGS.notebook_full,
        torch_compile=FLAGS.torch_compile,
        settings=settings,
    )


class Notebook:
    """The lab's final model by Keras `fit`, in a process of its own.

    Args:
      dataset: the images that the recipes are trained on, for their name and number.
      settings: the flags of all benchmarks.
      examples: how many training images; 0 for all.

    Attributes:
      epochs: of its run.
      steps: of its run; 0 before `start`.
    """

    def __init__(self, dataset: Dataset, settings: harness.Settings, *, examples: int) -> None:
        self.epochs = 1 if settings.quick else round(NOTEBOOK_RECIPE.epochs)
        self.steps = 0
        self._seconds_a_round = 0.1 if settings.quick else 5.0
        self._spec = {
            "model": NOTEBOOK_RECIPE.name,
            "precision": "float32",
            "batch_size": NOTEBOOK_RECIPE.batch_size,
            "learning_rate": NOTEBOOK_RECIPE.learning_rate,
            "epochs": self.epochs,
            "device": settings.device,
            "data": dataset.name,
            "data_dir": settings.data_dir,
            "examples": examples,
        }

    def start(self, stack: contextlib.ExitStack) -> Callable[[int], float]:
        """Starts the process that runs single steps.

        Args:
          stack: ends it.

        Returns:
          A function of a seed, which it does not use, that returns seconds a step.
        """
        spec = {**self._spec, "way": "keras_fit"}
        path = pathlib.Path(ways.__file__)
        worker = stack.enter_context(harness.Worker("the notebook's way", path, spec))
        self.steps = self.epochs * int(worker.facts["max_steps"])
        steps = harness.calibrate(worker, seconds_a_round=self._seconds_a_round)

        def measure(seed: int) -> float:
            # While ours ran, caches, and pages of memory, went to it.
            worker.round(max(1, steps // 4))
            seconds = worker.round(steps) / steps
            print(f"the notebook's way: {1000 * seconds:.3g} ms a step", flush=True)
            return seconds

        return measure

    def run(self) -> dict[str, float]:
        """Runs all epochs, with validation after each, and the test.

        Returns:
          `seconds` of `fit`, and `accuracy` on the test images.
        """
        spec = {**self._spec, "way": "notebook"}
        path = pathlib.Path(memory_ways.__file__)
        with harness.Worker("the notebook's way in full", path, spec) as worker:
            found = worker.ask("figures")
        print(
            f"the notebook's way in full: test accuracy {found['test_accuracy']:.4f} in "
            f"{found['fit_seconds']:,.1f} s",
            flush=True,
        )
        return {"seconds": found["fit_seconds"], "accuracy": found["test_accuracy"]}


def measure(
    plan: Plan,
    settings: harness.Settings,
    sets: Sequence[Dataset],
    *,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Runs everything.

    Args:
      plan: what to run.
      settings: the flags of all benchmarks.
      sets: the images of each recipe.
      keep: is called with the figures so far after each seed but the last, and before the full run
        of the notebook's way.

    Returns:
      The figures, as they go into the JSON file.
    """
    trials = {
        recipe.name: trial_runs.start(recipe, dataset, read=plan.read)
        for recipe, dataset in zip(plan.recipes, sets, strict=True)
    }
    runs: dict[str, Callable[[int], Any]] = {
        name: trial_runs.run_with(each) for name, each in trials.items()
    }
    # What makes a row of the figures of runs, by their name.
    rows: dict[str, Callable[[Sequence[Trial]], dict[str, Any]]] = {
        name: functools.partial(trial_runs.to_json, each, dataset=dataset)
        for (name, each), dataset in zip(trials.items(), sets, strict=True)
    }
    notebook = None
    examples = plan.recipes[0].limit_examples

    def result_of(
        found: Mapping[str, Sequence[Any]],
        *,
        full: Mapping[str, float] | None = None,
        is_complete: bool = False,
    ) -> dict[str, Any]:
        result: dict[str, Any] = {
            "timing_rule": TIMING_RULE,
            "complete": is_complete,
            **_compared(plan, rows, found),
            "notebook": None,
        }
        if notebook is not None:
            seconds = [run.seconds for run in found[plan.recipes[0].name]]
            result["notebook"] = _notebook(notebook, found[NOTEBOOK], seconds, full)
        return result

    with contextlib.ExitStack() as stack:
        if plan.notebook:
            print(f"starting {NOTEBOOK_RECIPE.name} the notebook's way", file=sys.stderr)
            notebook = Notebook(sets[0], settings, examples=examples)
            runs[NOTEBOOK] = notebook.start(stack)
        if plan.torch:
            peer = torch_peer.TorchPeer(
                trials[plan.recipes[0].name],
                sets[0],
                settings,
                read=plan.read,
                compile_mode=plan.torch_compile,
            )
            print(f"starting {peer.name}", file=sys.stderr)
            runs[peer.name], rows[peer.name] = peer.start(stack), peer.to_json
        found = trial_runs.run_in_turn(
            runs, seeds=plan.seeds, keep=lambda found: keep(result_of(found))
        )
    full = None
    if notebook is not None and plan.notebook_full:
        keep(result_of(found))
        full = notebook.run()
    return result_of(found, full=full, is_complete=True)


def _compared(
    plan: Plan,
    rows: Mapping[str, Callable[[Sequence[Trial]], dict[str, Any]]],
    found: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """The figures of each recipe, that of the PyTorch loop among them, and what both say."""
    figures = []
    for name, to_json in rows.items():
        row = to_json(found[name])
        bar = plan.bar or bar_of(row["recipe"]["name"])
        figures.append({**row, **_figures(found[name], bar=bar)})
    return {"recipes": figures, "verdicts": _verdicts({name: found[name] for name in rows})}


def bar_of(name: str) -> float | None:
    """The accuracy that a recipe, or a variant of it, is for; None if there is none."""
    return BARS.get(name.partition(":")[0])


def _figures(runs: Sequence[Trial], *, bar: float | None) -> dict[str, Any]:
    accuracies = [run.accuracy for run in runs]
    reached = None if bar is None else sum(accuracy >= bar for accuracy in accuracies) / len(runs)
    return {
        "accuracy": dataclasses.asdict(summarise(accuracies)),
        "seconds": dataclasses.asdict(summarise([run.seconds for run in runs])),
        "bar": bar,
        "share_that_reach_it": reached,
    }


def _verdicts(runs: Mapping[str, Sequence[Trial]]) -> list[dict[str, Any]]:
    """What can be said of two recipes; nothing of one."""
    if len(runs) < 2:
        return []
    verdicts = []
    for figure in (trial_statistics.SECONDS, trial_statistics.ACCURACY):
        values = {name: [getattr(t, figure.name) for t in ts] for name, ts in runs.items()}
        verdict = dataclasses.asdict(trial_statistics.compare(values, figure))
        test = verdict["test"]
        verdicts.append({**verdict, "test": test and test._asdict()})
    return verdicts


def _notebook(
    notebook: Notebook,
    seconds_a_step: Sequence[float],
    ours: Sequence[float],
    full: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The notebook's way beside our first recipe.

    Args:
      notebook: what was measured.
      seconds_a_step: measured beside each of our runs.
      ours: seconds of each of our runs.
      full: what the full run came to, None if there was none.
    """
    step, mine = harness.Samples(tuple(seconds_a_step)), harness.Samples(tuple(ours))
    estimate = harness.Samples(tuple(notebook.steps * seconds for seconds in step.values))
    return {
        "recipe": NOTEBOOK_RECIPE.name,
        "epochs": notebook.epochs,
        "steps": notebook.steps,
        "seconds_a_step": step.to_json(),
        "estimated_seconds": estimate.to_json(),
        "our_seconds": mine.to_json(),
        # Pairs were measured one right after the other.
        "ratio": estimate.over(mine).to_json(),
        "full_run": None if full is None else dict(full),
        "ratio_of_full_run": None if full is None else full["seconds"] / mine.median,
    }


def main() -> None:
    settings = harness.settings_from_flags(counts="runs")
    plan = plan_from_flags(settings)
    sets = trial_runs.load_sets(plan.recipes, settings)
    trial_runs.check_same_images(plan.recipes, sets, read=plan.read)
    record = harness.begin_record(
        settings,
        plan,
        dataset=sets[0],
        how=f"{trial_report.describe_seeds(plan.seeds)}; "
        f"{trial_runs.describe_reading(sets, read=plan.read)}",
    )
    print(f"{TIMING_RULE}\n", flush=True)

    def write(result: dict[str, Any]) -> None:
        def draw(path: pathlib.Path, about: str) -> None:
            # Plotting is loaded here: whoever wants no picture does not wait for it.
            import trial_plots

            trial_plots.draw_runs(result, path, about=about)

        harness.write_outputs(settings, {**record, "result": result}, draw=draw)

    result = measure(plan, settings, sets, keep=write)
    print("\n" + trial_report.describe(result), flush=True)
    write(result)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
