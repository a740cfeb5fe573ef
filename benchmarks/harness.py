"""What the benchmarks share: flags, workers in turn, statistics, what a figure stands with, output.

    harness.define_flags()                       # --rounds --quick --device --data --json --plot
    settings = harness.settings_from_flags()     # checked, before anything runs
    dataset = harness.load_images(settings, [32])
    record = harness.begin_record(settings, plan, dataset=dataset, how="median of 5 rounds")
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(harness.Worker(name, script, spec)) for ...}
        seconds = harness.interleave(workers, rounds=settings.rounds, seconds_a_round=1.0)
    print(seconds["ours"].median, seconds["theirs"].over(seconds["ours"]).median)
    harness.write_outputs(settings, {**record, "results": ...}, draw=draw)

Each way of doing the work is a process of its own, so that no library's threads, memory or
compiled code are in another's way.  Only one of them computes at a time: a worker that has answered
waits in `readline`.  The machine's speed drifts, so ways are compared round by round.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import secrets
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from absl import flags

# A script needs one import for all; a child process imports `worker` alone, which is light.
from tables import format_megabytes as format_megabytes
from tables import format_number as format_number
from tables import format_table as format_table
from worker import Worker as Worker
from worker import WorkerError as WorkerError
from worker import count_cores as count_cores

from cifarflow.data.dataset import Dataset, load_data
from cifarflow.errors import ConfigError, WorkdirError, check_choice, check_float, check_int
from cifarflow.files import replacing

Key = TypeVar("Key", bound=Hashable)
DEVICES = ("auto", "cpu", "gpu")
_QUICK_ROUNDS, _QUICK_EXAMPLES = 2, 2048
FLAGS = flags.FLAGS
# Flags belong to the script that asks for them, so that its `--help` shows them.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class Settings:
    """The flags that all benchmarks have, checked.

    Attributes:
      rounds: how often each way has its turn.
      quick: whether sizes are tiny, for the test suite.
      device: "cpu" or "gpu", the one that is used.
      data: which images, see `cifarflow.load_data`.
      data_dir: where CIFAR-10 is, None to search.
      json: where the figures go, None for nowhere.
      plot: where the picture goes, None for nowhere.

    Raises:
      ConfigError: if a value is out of range, or a GPU is asked for and there is none.
      WorkdirError: if a file could not be written later.
    """

    rounds: int = 5
    quick: bool = False
    device: str = "auto"
    data: str = "auto"
    data_dir: str | None = None
    json: pathlib.Path | None = None
    plot: pathlib.Path | None = None

    def __post_init__(self) -> None:
        check_int("--rounds", self.rounds)
        object.__setattr__(self, "device", choose_device(self.device))
        for name in ("json", "plot"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, check_output(f"--{name}", path))
        if self.json is not None and self.json == self.plot:
            raise ConfigError(f"--json and --plot must be two files, not both {str(self.json)!r}")

    @property
    def data_options(self) -> dict[str, Any]:
        """What a worker needs to load the images, for its spec."""
        return {"data": self.data, "data_dir": self.data_dir}

    def count_examples(self, batch_size: int) -> int:
        """How many training images a worker takes, for its spec; 0 for all."""
        return max(_QUICK_EXAMPLES, batch_size) if self.quick else 0


def define_flags(*, rounds: int = 5, counts: str = "rounds") -> None:
    """Defines the flags of `Settings`; to be called where the script is run, not imported.

    Args:
      rounds: the default of --rounds, unless --quick is given.
      counts: another name for --rounds.
    """
    flags.DEFINE_integer(
        counts, rounds, f"how often each way has its turn (with --quick: {_QUICK_ROUNDS})"
    )
    flags.DEFINE_boolean("quick", False, "tiny sizes: whether it works, not how fast it is")
    flags.DEFINE_enum("device", "auto", DEVICES, "where to compute; auto: on a GPU if there is one")
    # The models that are compared are written for ten classes.
    choices = ("auto", "cifar10", "standin")
    flags.DEFINE_enum("data", "auto", choices, "auto: CIFAR-10, or the stand-in set")
    flags.DEFINE_string("data_dir", None, "where CIFAR-10 is, a file or folder (default: search)")
    flags.DEFINE_string("json", None, "write all figures to this file")
    flags.DEFINE_string("plot", None, "draw the figures into this PNG file")


def settings_from_flags(*, counts: str = "rounds") -> Settings:
    """The `Settings` that the command line asks for.

    Args:
      counts: as in `define_flags`.

    Raises:
      ConfigError, WorkdirError: see `Settings`.
    """
    is_quick_default = FLAGS.quick and not FLAGS[counts].present
    rounds = _QUICK_ROUNDS if is_quick_default else check_int(f"--{counts}", FLAGS[counts].value)
    names = ("quick", "device", "data", "data_dir", "json", "plot")
    others: dict[str, Any] = {name: FLAGS[name].value for name in names}
    return Settings(rounds, **others)


def split_words(text: str) -> list[str]:
    """What is joined by commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",")))


def parse_choices(flag: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Reads names joined by commas.

    Raises:
      ConfigError: if one is not known.
    """
    known = list(known)
    return tuple(check_choice(flag, word, known) for word in split_words(text))


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Reads --batch_sizes, numbers joined by commas.

    Raises:
      ConfigError: if one is not a whole number >= 1.
    """
    # What is no whole number is quoted as it was written.
    return tuple(
        # Python does not read numbers of thousands of figures.
        check_int("--batch_sizes", int(word) if re.fullmatch("[0-9]{1,18}", word) else word)
        for word in split_words(text)
    )


def load_images(settings: Settings, batch_sizes: Iterable[int]) -> Dataset:
    """The images that are worked on; a set that is missing is found out before all else.

    Raises:
      ConfigError: if a batch would be larger than the set, and as `cifarflow.load_data`.
      DataError, DataNotFoundError: as `cifarflow.load_data`.
    """
    dataset = load_data(settings.data, settings.data_dir)
    count, size = len(dataset.train), max(batch_sizes)
    if size > count:
        raise ConfigError(f"--batch_sizes must be at most the {count} training images, not {size}")
    return dataset


def choose_device(device: str) -> str:
    """Makes this process and its workers use the device.

    Args:
      device: "auto", "cpu" or "gpu".

    Returns:
      "cpu" or "gpu".

    Raises:
      ConfigError: if it is none of the three, or there is no GPU to use.
    """
    check_choice("--device", device, DEVICES)
    import tensorflow as tf

    if device == "cpu":
        # For the workers, whatever library they use; then for this process.
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        tf.config.set_visible_devices([], "GPU")
        return "cpu"
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    if device == "gpu" and not has_gpu:
        raise ConfigError("--device=gpu needs a GPU that TensorFlow sees: there is none here")
    return "gpu" if has_gpu else "cpu"


def check_output(name: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path if a file can be written there; it writes none.

    Args:
      name: what the option is called, for the message.
      path: the file that is going to be written.

    Raises:
      WorkdirError: if it cannot.
    """
    target = pathlib.Path(os.path.expanduser(path))
    try:
        # Names may be too long, folders closed: looking is part of what can fail.
        if not str(path).strip() or target.is_dir() or (target.exists() and not target.is_file()):
            raise WorkdirError(f"{name} must be a file to write, not {str(path)!r}")
        probe = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        probe.touch(exist_ok=False)
        probe.unlink()
    except WorkdirError:
        raise  # it is an OSError too
    except OSError as error:
        raise WorkdirError(f"{name} cannot be written: {str(path)!r}: {error.strerror}") from None
    return target


def environment() -> dict[str, Any]:
    """What a figure stands with: device, cores, versions, commit and date.

    `device` is what TensorFlow would train on in this process.
    """
    from cifarflow.device import describe_device

    versions = {"python": platform.python_version()}
    for package in ("tensorflow", "keras", "numpy", "torch", "jax", "jaxlib"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": describe_device(),
        "cores": count_cores(),
        "versions": versions,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe_environment(environment: Mapping[str, Any]) -> str:
    """What `environment` returned as one line, without the date."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['device']}; {versions}; commit {environment['commit']}"


def _commit() -> str:
    """The commit of this checkout.

    "-dirty" follows it if tracked files differ, or if there is code in cifarflow/ or benchmarks/
    that git neither tracks nor ignores; other new files cannot change a figure.
    """

    def git(*words: str) -> str:
        folder = pathlib.Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        code = (":(top)cifarflow/*.py", ":(top)benchmarks/*.py")
        new = git("ls-files", "--others", "--exclude-standard", "--", *code)
        dirty = "-dirty" if changed or new else ""
        return (git("rev-parse", "--short=12", "HEAD") or "unknown") + dirty
    except OSError:
        return "unknown"


@dataclasses.dataclass(frozen=True)
class Samples:
    """One figure measured once a round.

    Attributes:
      values: the figure in each round, in the order of the rounds.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("samples must hold at least one value, not none")

    @property
    def n(self) -> int:
        """How many rounds."""
        return len(self.values)

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The least."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The greatest."""
        return max(self.values)

    @property
    def spread(self) -> float:
        """The range between the quartiles as a share of the median; 0 for a single round."""
        if self.n < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return (third - first) / self.median

    def rate(self, amount: float) -> Samples:
        """Of seconds: so much work a second, as the amount over each value."""
        return Samples(tuple(amount / value for value in self.values))

    def over(self, other: Samples) -> Samples:
        """The ratio to another figure in each round; its median is the ratio to report.

        Rounds are paired because the machine's speed drifts: what slows both leaves it alone.

        Raises:
          ValueError: if the other has another number of rounds.
        """
        pairs = zip(self.values, other.values, strict=True)
        return Samples(tuple(ours / theirs for ours, theirs in pairs))

    def to_json(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        names = ("n", "median", "low", "high", "spread")
        return {**{name: getattr(self, name) for name in names}, "values": list(self.values)}


class Runner(Protocol):
    """A way of doing the work, ready to run.

    Attributes:
      facts: what it says of itself.  `multiple`: steps must be a multiple of it; `max_steps`: and
        at most so many in a round, its warm-up included; `warms_up`: whether a round runs all of
        its steps twice, the first time as its warm-up.  Any may be missing.
    """

    facts: dict[str, Any]

    def round(self, steps: int) -> float:
        """Runs the steps, to their end, and returns the seconds they took."""


def calibrate(runner: Runner, *, seconds_a_round: float) -> int:
    """How many steps take about so long; the steps run to find out are the warm-up.

    Args:
      runner: the way.
      seconds_a_round: how long a round should take.

    Returns:
      The steps, at least 1, within the bounds of the runner's facts.

    Raises:
      ConfigError: if seconds_a_round is not a finite number > 0.
    """
    check_float("--seconds_a_round", seconds_a_round, above_minimum=True)
    multiple = runner.facts.get("multiple", 1)
    most = runner.facts.get("max_steps", 10**9)
    if runner.facts.get("warms_up"):
        most //= 2
    most = max(most // multiple * multiple, multiple)
    steps = multiple
    while True:
        seconds = runner.round(steps)
        if seconds >= seconds_a_round / 4 or steps >= most:
            wanted = round(seconds_a_round * steps / seconds / multiple) * multiple
            return min(max(wanted, multiple), most)
        steps = min(2 * steps, most)


def in_turn(names: Iterable[Key], *, rounds: int) -> Iterator[list[Key]]:
    """The names in the order of each round: as they are, then in reverse, and so on.

    So none always comes after the same one, and none is always the first.
    """
    names = list(names)
    for turn in range(rounds):
        yield names[::-1] if turn % 2 else names


def interleave(
    runners: Mapping[Key, Runner],
    *,
    rounds: int,
    seconds_a_round: float,
    settle_seconds: float = 0.05,
) -> dict[Key, Samples]:
    """Runs one round of each way in turn, again and again; every second time in reverse.

    Each turn begins with a quarter of a round that is not counted, unless the way warms itself up.

    Args:
      runners: the ways, by name or any other key.
      rounds: how often.
      seconds_a_round: how long one turn of one way should take.
      settle_seconds: pause between turns, in which the last one's threads fall asleep.

    Returns:
      Seconds a step of each way.

    Raises:
      ConfigError: if rounds is not a whole number >= 1, or seconds_a_round not a finite number > 0.
    """
    check_int("--rounds", rounds)
    steps = {
        name: calibrate(runner, seconds_a_round=seconds_a_round) for name, runner in runners.items()
    }
    multiples = {name: runner.facts.get("multiple", 1) for name, runner in runners.items()}
    warm_up = {
        name: max(count // 4 // multiples[name], 1) * multiples[name]
        for name, count in steps.items()
    }
    found: dict[Key, list[float]] = {name: [] for name in runners}
    for names in in_turn(runners, rounds=rounds):
        for name in names:
            time.sleep(settle_seconds)
            # While the others had their turns, caches, and pages of memory, went to them.
            if not runners[name].facts.get("warms_up"):
                runners[name].round(warm_up[name])
            found[name].append(runners[name].round(steps[name]) / steps[name])
    return {name: Samples(tuple(values)) for name, values in found.items()}


def begin_record(settings: Settings, plan: Any, *, dataset: Dataset, how: str) -> dict[str, Any]:
    """Prints what the figures will stand with.

    Args:
      settings: the flags of all benchmarks.
      plan: the script's own, a dataclass.
      dataset: the images that are worked on.
      how: how it is measured, in words.

    Returns:
      The same as the beginning of the JSON record: environment, data, rounds, plan.
    """
    stands_with = environment()
    print(describe_environment(stands_with))
    print(f"{stands_with['date']}; {dataset.name} images; {how}")
    return {
        "environment": stands_with,
        "data": {"name": dataset.name, "source": dataset.source},
        "rounds": settings.rounds,
        "plan": dataclasses.asdict(plan),
    }


def write_outputs(
    settings: Settings, record: Mapping[str, Any], *, draw: Callable[[pathlib.Path, str], object]
) -> None:
    """Writes the files that --json and --plot ask for.

    Args:
      settings: the flags of all benchmarks.
      record: what `begin_record` returned, and the figures.
      draw: draws the picture into a file, given that and what to name in its title.

    Raises:
      WorkdirError: if a file cannot be written.
    """
    if settings.json is not None:
        write_json(settings.json, record)
    if settings.plot is not None:
        draw(settings.plot, f"{record['data']['name']}, {record['environment']['device']}")


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
      WorkdirError: if it cannot be written.
    """
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
