"""Training runs as processes of their own: watched, met at a moment, compared when they are over.

    course = make_course("lab_cnn", settings, steps=120, precision="float32")
    whole = run_whole(course, folder / "whole")
    for moment in draw_moments(5, seed=0, steps=course.steps):
        with Child(course.command(folder / "run")) as child:
            if child.meet(moment, course, whole):
                child.signal(signal.SIGKILL)
            child.finish()
    ...
    differing(fingerprint(folder / "run"), whole.fingerprint)

The process is `watched_run.py`, which always goes on with the run that is in its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, NamedTuple

import harness
import numpy as np
import trial_runs

from cifarflow import cli
from cifarflow.errors import check_int
from cifarflow.optimizers.precision import PRECISIONS
from cifarflow.recipes.named import RECIPES, get_recipe
from cifarflow.recipes.recipe import Recipe

SCRIPT = pathlib.Path(__file__).with_name("watched_run.py")
# A child that takes longer for anything hangs.
MOST_SECONDS = 600.0
# What bit for bit equal runs have in common, see `fingerprint`.
PARTS = ("weights", "state", "metrics", "test")
_NAME = re.compile(r"step_(\d+)\.npz")
_TIMES = ("seconds", "per_second")
_POLL_SECONDS = 0.0005


@dataclasses.dataclass(frozen=True)
class Course:
    """What the processes run.

    Attributes:
      recipe: the recipe, shortened.
      steps: of the whole run.
      checkpoint_steps: from one checkpoint to the next.
      data_dir: where CIFAR-10 is, None to search.
    """

    recipe: Recipe
    steps: int
    checkpoint_steps: int
    data_dir: str | None = None

    def command(self, workdir: pathlib.Path, *, data_dir: pathlib.Path | None = None) -> list[str]:
        """The command that starts the run in a folder, or goes on with it."""
        words = [sys.executable, str(SCRIPT), *_recipe_words(self.recipe)]
        data = data_dir or self.data_dir
        words += [f"--data_dir={data}"] if data else []
        words += [f"--checkpoint_steps={self.checkpoint_steps}", f"--workdir={workdir}"]
        return [*words, "--resume"]


def make_course(
    text: str,
    settings: harness.Settings,
    *,
    steps: int,
    epoch_steps: int = 16,
    checkpoint_steps: int = 7,
    augment: str = "none",
    precision: str = "auto",
    flag: str = "--recipe",
) -> Course:
    """Makes a recipe short, by fewer images and fewer epochs.

    Args:
      text: RECIPE or RECIPE:field=value,...
      settings: --data and --data_dir are taken from it.
      steps: of the whole run.
      epoch_steps: steps of an epoch: so many batches of images are used.
      checkpoint_steps: from one checkpoint to the next.
      augment: for a recipe that has no augmentation of its own.
      precision: of the run; "auto" is the recipe's.
      flag: where the text comes from, for messages.

    Raises:
      ConfigError: if the recipe is unknown, or a number out of range.
    """
    recipe = trial_runs.read_recipe(flag, text)
    steps = check_int("--steps", steps, minimum=2)
    epochs = steps / check_int("--epoch_steps", epoch_steps)
    changes: dict[str, Any] = {
        "epochs": epochs,
        "warmup_epochs": min(recipe.warmup_epochs, epochs),
        "limit_examples": epoch_steps * recipe.batch_size,
        "augment": augment if recipe.augment == "none" else recipe.augment,
        "data": settings.data if recipe.data == "auto" else recipe.data,
        "precision": recipe.precision if precision == "auto" else precision,
    }
    recipe = get_recipe(recipe, **changes)
    check_int("--checkpoint_steps", checkpoint_steps)
    return Course(recipe, steps, checkpoint_steps, settings.data_dir)


def parse_precisions(text: str) -> tuple[str, ...]:
    """Reads --precisions, joined by commas; errors as `harness.parse_choices`."""
    return harness.parse_choices("--precisions", text, PRECISIONS)


def _recipe_words(recipe: Recipe) -> list[str]:
    """The flags that ask a runner for the recipe."""
    base = RECIPES[recipe.name.partition(":")[0]]
    values, usual = recipe.to_json(), base.to_json()
    words = [f"--recipe={base.name}"]
    for name in (field.name for field in cli.recipe_fields()):
        value = values[name]
        if value == usual[name]:
            continue
        if isinstance(value, dict):
            value = json.dumps(value)
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        words.append(f"--{name}={value}")
    return words


# Moments of a run


class Moment(NamedTuple):
    """A moment of a run at which something is done to it.

    Attributes:
      kind: "start-up", before the first step is done; "training", after a step; "writing", while
        the first checkpoint after a step is written; "end", when all steps are done.
      share: of the start-up's or the end's seconds, or of the run's steps; 0 up to but not 1.
    """

    kind: str
    share: float


def draw_moments(count: int, *, seed: int) -> list[Moment]:
    """Draws moments over a whole run, those within its steps in their order.

    Args:
      count: how many.  Of four or more each kind has at least one.
      seed: of the draw.
    """
    draw = random.Random(seed)
    kinds = ["training", "writing", "start-up", "end"][:count]
    kinds += draw.choices(["training", "writing", "start-up"], [6, 3, 1], k=count - len(kinds))
    inside = [kind for kind in kinds if kind in ("training", "writing")]
    draw.shuffle(inside)
    # One in each of as many equal parts: the whole run has its turn, whatever is drawn.
    moments = [Moment(k, (i + draw.random()) / len(inside)) for i, k in enumerate(inside)]
    for _ in range(kinds.count("start-up")):
        moments.insert(draw.randint(0, len(moments)), Moment("start-up", draw.random()))
    return moments + [Moment("end", draw.random())] * kinds.count("end")


class Whole(NamedTuple):
    """What is known of a run that nothing was done to.

    Attributes:
      fingerprint: see the function.
      start_seconds: from the start of the process to the end of its first step.
      call_seconds: of a compiled call, with what comes after it.
      end_seconds: from the end of the last step to that of the process.
      checkpoint_bytes: size of a checkpoint.
    """

    fingerprint: dict[str, str]
    start_seconds: float
    call_seconds: float
    end_seconds: float
    checkpoint_bytes: int


def run_whole(course: Course, workdir: pathlib.Path) -> Whole:
    """Runs the course without a break.

    Raises:
      WorkerError: if it does not end well.
    """
    with Child(course.command(workdir)) as child:
        ended = child.finish()
        over = time.monotonic() - child.started
    if ended.status or not child.times:
        raise harness.WorkerError(
            f"the uninterrupted run of {course.recipe.name} ended with status {ended.status}: "
            f"{last_line(ended.stderr)!r}"
        )
    times = [seconds for seconds, _ in child.times]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Whole(
        fingerprint(workdir),
        start_seconds=times[0],
        call_seconds=statistics.median(gaps) if gaps else 0.0,
        end_seconds=over - times[-1],
        checkpoint_bytes=checkpoints(workdir)[-1].stat().st_size,
    )


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      status: as `subprocess` has it: of a signal that killed it, the negative number.
      stdout: all that it wrote there.
      stderr: likewise.
    """

    status: int
    stdout: str
    stderr: str


class Child:
    """A run in a process of its own; it is killed when the `with` block ends.

    Args:
      command: the words of its command line, see `Course.command`.

    Attributes:
      started: when it was started, as `time.monotonic` has it.
      times: seconds since then and steps done, of each word that it gave of its steps.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self.started = 0.0
        self.times: list[tuple[float, int]] = []
        self._written: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._readers: list[threading.Thread] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        """Starts it."""
        # Several may share a GPU: none may take all its memory at once.
        environ = {**os.environ, "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        self.started = time.monotonic()
        self._process = process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            text=True,
            errors="replace",
        )
        # Pipes, not files: a limit on files must not be a limit on what it can say.
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            reader = threading.Thread(target=self._read, args=(name, pipe), daemon=True)
            reader.start()
            self._readers.append(reader)
        return self

    def __exit__(self, *_: object) -> None:
        """Kills it if it has not ended by itself."""
        self._running.kill()
        self._close()

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise harness.WorkerError("the child has not been started: use it in a with block")
        return self._process

    def _read(self, name: str, pipe: IO[str]) -> None:
        for line in pipe:
            word, _, number = line.partition(" ")
            if name == "stdout" and word == "step" and number.strip().isdigit():
                self.times.append((time.monotonic() - self.started, int(number)))
            self._written[name].append(line)

    def _close(self) -> None:
        process = self._running
        process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._running.pid

    @property
    def step(self) -> int | None:
        """Steps done at its last word; None before the first."""
        return self.times[-1][1] if self.times else None

    @property
    def resumed_step(self) -> int | None:
        """The step that it went on from, 0 at the start; None before its first word."""
        # The first compiled call is of one step: how long more would take is not known yet.
        return self.times[0][1] - 1 if self.times else None

    @property
    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return "".join(self._written["stderr"])

    def wait_until(self, moment: Callable[[], bool]) -> bool:
        """Waits until something is so; returns False if the process ended before.

        Raises:
          WorkerError: if it takes too long.
        """
        deadline = time.monotonic() + MOST_SECONDS
        while not moment():
            if self._running.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise harness.WorkerError(f"the run hangs: {last_line(self.stderr)!r}")
            time.sleep(_POLL_SECONDS)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Waits until so many steps are done; returns and raises as `wait_until`."""
        return self.wait_until(lambda: (self.step or 0) >= step)

    def meet(self, moment: Moment, course: Course, whole: Whole, workdir: pathlib.Path) -> bool:
        """Waits for a moment of the run.

        Args:
          moment: which.
          course: what runs.
          whole: how long its parts take.
          workdir: the run's folder.

        Returns:
          Whether it has come; False if the process ended before.

        Raises:
          WorkerError: if it takes too long.
        """
        left = unfinished(workdir)
        step = int(moment.share * course.steps)
        if moment.kind == "start-up":
            return self._pause(moment.share * whole.start_seconds)
        if moment.kind == "end":
            return self.wait_for_step(course.steps) and self._pause(
                moment.share * whole.end_seconds
            )
        if not self.wait_for_step(max(step, 1)):
            return False
        if moment.kind == "writing":
            return self.wait_until(lambda: bool(unfinished(workdir) - left))
        # Somewhere within the next call: by its last digits the share is as good as drawn anew.
        return self._pause((moment.share * 1e4) % 1 * whole.call_seconds)

    def _pause(self, seconds: float) -> bool:
        over = time.monotonic() + seconds
        return self.wait_until(lambda: time.monotonic() >= over)

    def signal(self, number: int) -> bool:
        """Sends a signal; returns False if it has ended."""
        if self._running.poll() is not None:
            return False
        self._running.send_signal(number)
        return True

    def finish(self) -> Ended:
        """Waits for its end.

        Raises:
          WorkerError: if it takes too long.
        """
        try:
            self._running.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            raise harness.WorkerError(f"the run hangs: {last_line(self.stderr)!r}") from None
        self._close()
        written = {name: "".join(lines) for name, lines in self._written.items()}
        return Ended(self._running.returncode, **written)


def describe_status(status: int) -> str:
    """A process's end in a word or two: "status 2", "SIGKILL"."""
    return f"status {status}" if status >= 0 else signal.Signals(-status).name


def last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


# What a run leaves


def checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints under final names, oldest first."""
    folder = workdir / "checkpoints"
    return sorted((p for p in _files(folder) if _NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: pathlib.Path) -> int:
    """The step of a checkpoint, by its name."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else 0


def newest_step(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max(map(step_of, checkpoints(workdir)), default=0)


def unfinished(workdir: pathlib.Path) -> set[str]:
    """The files among the checkpoints that have no final name: those being written, or left so."""
    return {p.name for p in _files(workdir / "checkpoints") if p.name.startswith(".")}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    # Not by a pattern: it may be removed while it is read.
    try:
        return [folder / name for name in os.listdir(folder)]
    except OSError:
        return []


def is_whole(checkpoint: pathlib.Path) -> bool:
    """Whether all of a checkpoint can be read."""
    try:
        hash_state(checkpoint)
    except Exception:  # a damaged archive fails in many ways
        return False
    return True


def damaged(workdir: pathlib.Path) -> list[str]:
    """The names of the checkpoints under final names that cannot be read."""
    best = workdir / "checkpoints" / "best.npz"
    paths = [*checkpoints(workdir), *([best] if best.exists() else [])]
    return [path.name for path in paths if not is_whole(path)]


def hash_state(checkpoint: pathlib.Path) -> str:
    """SHA-256 of a checkpoint's arrays: weights, optimiser, averages.

    Raises:
      Exception: of many kinds, if it cannot be read.
    """
    digest = hashlib.sha256()
    # Opened here: NumPy leaves a file open that it cannot read.
    with checkpoint.open("rb") as file, np.load(file, allow_pickle=False) as members:
        # The header has the seconds that the run took.
        for name in sorted(set(members.files) - {"header"}):
            array = members[name]
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's log without their times.

    Raises:
      OSError, ValueError: if it cannot be read.
    """
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if not key.endswith(_TIMES)} for row in rows]


def fingerprint(workdir: pathlib.Path) -> dict[str, str]:
    """What a finished run came to, as a hash a part; what cannot be read has none and says why.

    Args:
      workdir: the run's folder.

    Returns:
      By `PARTS`: the model's weights; the arrays of the newest checkpoint and of the best, thus the
      optimiser's state too; the log's rows; the outputs for the test set and what the summary says
      of them.
    """

    def read_summary() -> dict[str, Any]:
        return dict(json.loads((workdir / "summary.json").read_text()))

    def read_test() -> bytes:
        names = ("steps", "epochs", "test_loss", "test_accuracy", "confusion_matrix")
        results = json.dumps([read_summary()[name] for name in names])
        return results.encode() + (workdir / "test_outputs.npy").read_bytes()

    def best() -> str:
        path = workdir / "checkpoints" / "best.npz"
        return hash_state(path) if path.exists() else "none"

    readers: Mapping[str, Callable[[], str]] = {
        "weights": lambda: str(read_summary()["weights_sha256"]),
        "state": lambda: hash_state(checkpoints(workdir)[-1]) + best(),
        "metrics": lambda: _hash(json.dumps(read_rows(workdir), sort_keys=True).encode()),
        "test": lambda: _hash(read_test()),
    }
    found = {}
    for part in PARTS:
        try:
            found[part] = readers[part]()
        except Exception as error:
            found[part] = f"unreadable: {type(error).__name__}"
    return found


def differing(found: Mapping[str, str], whole: Mapping[str, str]) -> list[str]:
    """The parts in which a run differs from the uninterrupted one."""
    return [part for part in PARTS if found[part] != whole[part] or " " in found[part]]


def describe_end(parts: Iterable[str]) -> str:
    """What `differing` found, for a table: "identical" if nothing."""
    parts = list(parts)
    return f"DIFFERS: {', '.join(parts)}" if parts else "identical"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
