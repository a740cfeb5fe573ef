"""How long a training step takes, what bounds it, and how Keras, PyTorch and JAX compare.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --models=lab_cnn --compare=keras,torch,jax --json=cnn.json
    python benchmarks/step_time.py --models=speednet --batch_sizes=512 --precisions=mixed_bfloat16
    python benchmarks/step_time.py --models=lab_mlp --compare=keras --starts=5

Each way trains the same net on the same images in a process of its own; rounds are interleaved,
warm-up is left out, and every ratio is the median over rounds of the ratio within a round.  Ways
are described in `ways.py`.
"""

from __future__ import annotations

# First, since it keeps TensorFlow quiet while it loads.
from cifarflow import cli

# isort: split
import contextlib
import dataclasses
import importlib.util
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import harness
import nets
import step_report
import ways
from absl import flags

from cifarflow.data.dataset import Dataset
from cifarflow.errors import ConfigError, check_choice, check_float, check_int
from cifarflow.optimizers.precision import PRECISIONS

FLAGS = flags.FLAGS
PEERS = {
    "keras": ("keras_fit", "keras_fit_spe"),
    "torch": ("torch_eager", "torch_compile"),
    "jax": ("jax_jit",),
}
_PEER_PRECISIONS = tuple(name for name in PRECISIONS if name != "auto")
_BATCH_SIZES = {"cpu": "32", "gpu": "512,1024"}
_JIT_CHOICES = ("auto", "true", "false")
_PROFILE_STEPS = 20
_QUICK_MODELS = "lab_mlp"
Key = tuple[str, str]  # way, precision


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, checked.

    Attributes:
      models: names in `nets.NETS`, or `nets.EMPTY`.
      batch_sizes: examples a step.
      precisions: of our own steps; "auto" is the recipe's.
      peers: names in `PEERS`.
      peer_precisions: the precisions of each peer.
      skipped: for each peer that was left out, a line that says why.
      profile: whether to split the step into input, host and device.
      seconds_a_round: how long one turn of one way takes.
      jit_compile: whether XLA compiles our steps; "auto" is the recipe's.
      starts: how often each way of training is started, to time its first step.
    """

    models: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    precisions: tuple[str, ...]
    peers: tuple[str, ...] = ()
    peer_precisions: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    profile: bool = True
    seconds_a_round: float = 1.0
    jit_compile: str = "auto"
    starts: int = 1


def define_flags() -> None:
    """Defines the flags; where the script is run, not imported."""
    # On a noisy machine many short turns are steadier than a few long ones.
    harness.define_flags(rounds=9)
    everything = ",".join(nets.NETS)
    flags.DEFINE_string(
        "models",
        None,
        f"nets to train, joined by commas (default {everything}; quick: {_QUICK_MODELS})",
    )
    flags.DEFINE_string("batch_sizes", None, "examples a step (default 32; on a GPU 512,1024)")
    flags.DEFINE_string("precisions", "float32,auto", f"some of {', '.join(PRECISIONS)}")
    flags.DEFINE_string(
        "compare", "none", f"none, all that is installed, or some of {','.join(PEERS)}"
    )
    flags.DEFINE_string("peer_precisions", "float32,mixed_bfloat16", "the peers' precisions")
    flags.DEFINE_boolean("profile", True, "split our step into input, host and device time")
    flags.DEFINE_float("seconds_a_round", None, "of each way (default 1; quick: 0.1)")
    flags.DEFINE_enum("jit_compile", "auto", _JIT_CHOICES, "XLA for our step; auto: the recipe's")
    flags.DEFINE_integer("starts", 1, "how often each way is started, to time its first step")


def plan_from_flags(settings: harness.Settings) -> Plan:
    """The `Plan` that the command line asks for; errors as `make_plan`."""
    models, seconds, sizes = FLAGS.models, FLAGS.seconds_a_round, FLAGS.batch_sizes
    default_models = _QUICK_MODELS if settings.quick else ",".join(nets.NETS)
    return make_plan(
        models=models if models is not None else default_models,
        batch_sizes=sizes if sizes is not None else _BATCH_SIZES[settings.device],
        precisions=FLAGS.precisions,
        compare=FLAGS.compare,
        peer_precisions=FLAGS.peer_precisions,
        profile=FLAGS.profile,
        seconds_a_round=seconds if seconds is not None else (0.1 if settings.quick else 1.0),
        jit_compile=FLAGS.jit_compile,
        starts=FLAGS.starts,
    )


def make_plan(
    *,
    models: str = "lab_mlp",
    batch_sizes: str = "32",
    precisions: str = "float32",
    compare: str = "none",
    peer_precisions: str = "float32",
    profile: bool = True,
    seconds_a_round: float = 1.0,
    jit_compile: str = "auto",
    starts: int = 1,
) -> Plan:
    """Reads the flags, several of which are names or numbers joined by commas.

    Raises:
      ConfigError: if a name is unknown, a number out of range, or a peer not installed.
    """
    peers, skipped = choose_peers(compare)
    return Plan(
        models=harness.parse_choices("--models", models, (*nets.NETS, nets.EMPTY)),
        batch_sizes=harness.parse_batch_sizes(batch_sizes),
        precisions=harness.parse_choices("--precisions", precisions, PRECISIONS),
        peers=peers,
        peer_precisions=harness.parse_choices(
            "--peer_precisions", peer_precisions, _PEER_PRECISIONS
        ),
        skipped=skipped,
        profile=profile,
        seconds_a_round=check_float("--seconds_a_round", seconds_a_round, above_minimum=True),
        jit_compile=check_choice("--jit_compile", jit_compile, _JIT_CHOICES),
        starts=check_int("--starts", starts),
    )


def choose_peers(compare: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The peers that --compare asks for, and a line for each that "all" has to leave out.

    Raises:
      ConfigError: if one is unknown, or named and not installed.
    """
    if compare == "none":
        return (), ()
    names = list(PEERS) if compare == "all" else harness.split_words(compare)
    for name in names:
        check_choice("--compare", name, ["none", "all", *PEERS])
    if compare != "all" and {"none", "all"} & set(names):
        raise ConfigError(f"--compare must be none or all alone, or peers, not {compare!r}")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    lines = [f'{name} is not installed: pip install ".[compare]"' for name in missing]
    if missing and compare != "all":
        raise ConfigError(f"--compare={compare}: {lines[0]}")
    return tuple(name for name in names if name not in missing), tuple(lines)


def make_specs(
    model: str, batch_size: int, plan: Plan, settings: harness.Settings, *, dataset: Dataset
) -> dict[Key, dict[str, Any]]:
    """What each worker is told, by (way, precision)."""
    common = {
        "model": model,
        "batch_size": batch_size,
        "device": settings.device,
        "quick": settings.quick,
        "examples": settings.count_examples(batch_size),
        "jit_compile": plan.jit_compile,
        **settings.data_options,
    }
    # Resolved here, so that "auto" is not measured twice under two names.
    ours = [ways.get_recipe(model, dataset, precision=name).precision for name in plan.precisions]
    specs = {("cifarflow", precision): common for precision in ours}
    for way in [way for peer in plan.peers for way in PEERS[peer]]:
        specs.update({(way, precision): common for precision in plan.peer_precisions})
    used = dict.fromkeys(precision for _, precision in specs)
    specs.update({("gemm", precision): common for precision in used})
    rate = ways.get_recipe(model, dataset).learning_rate
    return {
        (way, precision): {**spec, "way": way, "precision": precision, "learning_rate": rate}
        for (way, precision), spec in specs.items()
    }


def start_workers(
    specs: Mapping[Key, dict[str, Any]],
    stack: contextlib.ExitStack,
    *,
    model: str,
    starts: int,
) -> tuple[dict[Key, harness.Worker], dict[Key, harness.Samples]]:
    """Starts the ways in turn, every second time in reverse; what the last start made is kept.

    Matrix products are no training: they are started once.

    Args:
      specs: what each worker is told.
      stack: ends the workers that are kept.
      model: the net, for messages.
      starts: how often.

    Returns:
      The workers, and the seconds from the start of the process to the end of its first step, both
      in the order of the specs.
    """
    script = pathlib.Path(ways.__file__)
    seconds: dict[Key, list[float]] = {key: [] for key in specs}
    kept: dict[Key, harness.Worker] = {}

    def start(key: Key, where: contextlib.ExitStack) -> harness.Worker:
        name = f"{model}, {step_report.label(*key)}"
        worker = where.enter_context(harness.Worker(name, script, specs[key]))
        seconds[key].append(worker.facts["seconds_to_first_step"])
        print(f"{name}: first step after {seconds[key][-1]:.1f} s", file=sys.stderr)
        return worker

    training = [key for key in specs if key[0] != "gemm"]
    *earlier, last = harness.in_turn(training, rounds=starts)
    for keys in earlier:
        for key in keys:
            with contextlib.ExitStack() as at_once:
                start(key, at_once)
    for key in [*last, *(key for key in specs if key[0] == "gemm")]:
        kept[key] = start(key, stack)
    samples = {key: harness.Samples(tuple(values)) for key, values in seconds.items()}
    return {key: kept[key] for key in specs}, samples


def measure(
    model: str, batch_size: int, plan: Plan, settings: harness.Settings, *, dataset: Dataset
) -> dict[str, Any]:
    """Measures all ways of training one net at one batch size.

    Returns:
      The figures, as they go into the JSON file.

    Raises:
      RuntimeError: if the ways do not train the same net, or one of them does not train.
    """
    specs = make_specs(model, batch_size, plan, settings, dataset=dataset)
    with contextlib.ExitStack() as stack:
        workers, starts = start_workers(specs, stack, model=model, starts=plan.starts)
        _check_same_net(workers)
        seconds = harness.interleave(
            workers, rounds=settings.rounds, seconds_a_round=plan.seconds_a_round
        )
        # The peak is the best of all rounds: the others say how slow the machine was just then.
        gemm = {
            precision: seconds[way, precision].rate(worker.facts["flops_per_step"] / 1e9)
            for (way, precision), worker in workers.items()
            if way == "gemm"
        }
        training = {key: worker for key, worker in workers.items() if key[0] != "gemm"}
        losses = {key: _last_loss(worker) for key, worker in training.items()}
        facts = next(worker.facts for (way, _), worker in workers.items() if way == "cifarflow")
        gflop = facts["flops_per_image"] * batch_size / 1e9
        rows = []
        for (way, precision), worker in training.items():
            took = seconds[way, precision]
            row = {
                "way": way,
                "precision": precision,
                "label": step_report.label(way, precision),
                "seconds_a_step": took.to_json(),
                "images_per_second": took.rate(batch_size).to_json(),
                "gflops": took.rate(gflop).to_json(),
                "share_of_gemm_peak": took.rate(gflop / gemm[precision].high).to_json(),
                "seconds_to_first_step": starts[way, precision].to_json(),
                "last_loss": losses[way, precision],
                "peak_rss_bytes": worker.ask("peak_rss_bytes"),
            }
            if way == "cifarflow":
                row["jit_compile"] = worker.facts["jit_compile"]
                if plan.profile:
                    steps = 2 if settings.quick else _PROFILE_STEPS
                    row["profile"] = worker.ask("profile", steps=steps)
            rows.append(row)
        return {
            "model": model,
            "batch_size": batch_size,
            "trainable_parameters": facts["parameters"],
            "training_flops_per_image": facts["flops_per_image"],
            "gemm_gflops": {precision: found.to_json() for precision, found in gemm.items()},
            "ways": rows,
            "ratios": list(step_report.ratios(rows, PEERS)),
            "start_ratios": list(step_report.start_ratios(rows)),
        }


def _check_same_net(workers: Mapping[Key, harness.Worker]) -> None:
    counts = {w.name: w.facts["parameters"] for w in workers.values() if "parameters" in w.facts}
    if len(set(counts.values())) > 1:
        raise RuntimeError(f"these are not the same net, by their trainable parameters: {counts}")


def _last_loss(worker: harness.Worker) -> float:
    """The loss in the last round, finite: the speed of a training that broke down says nothing."""
    loss = worker.ask("last_loss")
    if loss is None or not math.isfinite(loss):
        raise RuntimeError(f"{worker.name} does not train: its loss in the last round is {loss}")
    return float(loss)


def main() -> None:
    settings = harness.settings_from_flags()
    plan = plan_from_flags(settings)
    dataset = harness.load_images(settings, plan.batch_sizes)
    record = harness.begin_record(
        settings,
        plan,
        dataset=dataset,
        how=f"median of {settings.rounds} interleaved rounds of {plan.seconds_a_round:g} s, "
        "spread = range of the quartiles / median",
    )
    for line in plan.skipped:
        print(f"skipped: {line}")
    results = []
    for model in plan.models:
        for batch_size in plan.batch_sizes:
            results.append(measure(model, batch_size, plan, settings, dataset=dataset))
            print("\n" + step_report.describe(results[-1]), flush=True)
            # Each time, so that an error in the next one loses nothing.
            harness.write_outputs(
                settings,
                {**record, "results": results},
                draw=lambda path, about: step_report.draw(results, path, about=about),
            )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
