"""The readers of files, each as a child process that is given hostile inputs.

    spec = {"reader": "npz", "seed": 0, "scratch": "some/folder"}
    with Worker("npz", "benchmarks/fuzz_ways.py", spec) as worker:
        found = worker.ask("run", first=0, count=1000)

An input must end in a result or in a `CifarflowError` with one short line, in under a second of
computing, and without 1 GiB more of memory: but for `SLOW_READERS`, also not asked for and then
done without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import fuzz_inputs
import numpy as np
from fuzz_bytes import mutate
from fuzz_kept import KEPT
from worker import forget_peak, peak_rss_bytes, rss_bytes, serve

from cifarflow.data import cache, formats, pictures
from cifarflow.data.layouts import CIFAR10
from cifarflow.errors import CifarflowError
from cifarflow.training.checkpoints import Checkpoints
from cifarflow.training.history import History
from cifarflow.training.workdir import Workdir
from cifarflow.untrusted import parse_json

SECONDS_LIMIT = 1.0
MEMORY_LIMIT = 1 << 30
MESSAGE_LIMIT = 1000
# After this, by the clock on the wall, an input has not ended and never will.
HANG_SECONDS = 20
_MOST_BYTES = 8_000_000
# The readers are made to expect few images.
SMALL = dataclasses.replace(
    CIFAR10, train_examples=fuzz_inputs.TRAIN_EXAMPLES, test_examples=fuzz_inputs.TEST_EXAMPLES
)


def make_input(reader: str, *, seed: int, index: int) -> bytes:
    """Returns one input: the kept ones first, then changed ones, a new one for each index.

    Args:
      reader: a key of `READERS`.
      seed: another gives others.
      index: from 0.
    """
    kept = KEPT.get(reader, ())
    if index < len(kept):
        return kept[index]()
    rng = random.Random(f"{reader} {seed} {index}")
    changes = rng.choice((0, 1, 1, 2, 4))
    data = fuzz_inputs.BUILDERS[reader](rng, changes)
    if not changes or rng.random() < 0.4:
        data = mutate(rng, data)
    return data[:_MOST_BYTES]


# --- the readers: each is given an empty folder and what a file in it is to hold ------------------


def _read_archive(folder: pathlib.Path, data: bytes) -> object:
    path = folder / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    found = formats.locate(folder, SMALL)
    assert found is not None
    return formats.read(found, verify=False)


def _read_folder(folder: pathlib.Path, data: bytes) -> object:
    """The six files of a data set; the first two bytes say what is wrong with which."""
    act, which = data[:1], (data[1:2] or b"\0")[0] % 6
    for number, name in enumerate(SMALL.python):
        (folder / name).write_bytes(fuzz_inputs.official_pickle(shade=number))
    kind = fuzz_inputs.FOLDER_ACTS[(act or b"\0")[0] % len(fuzz_inputs.FOLDER_ACTS)]
    names = [*SMALL.python]
    path = folder / names[which]
    if kind == "replace":
        path.write_bytes(data[2:])
    elif kind == "swap":
        other = folder / names[which - 1]
        path.rename(folder / "kept")
        other.rename(path)
        (folder / "kept").rename(other)
    elif kind == "extra":
        (folder / "batches.meta").write_bytes(data[2:])
    else:
        path.unlink()
        if kind == "loop":
            path.symlink_to(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
    found = formats.locate(folder, SMALL)
    assert found is not None
    return formats.read(found, verify=False)


def _read_npz(folder: pathlib.Path, data: bytes) -> object:
    path = folder / "cifar10.npz"
    path.write_bytes(data)
    examples = (fuzz_inputs.TRAIN_EXAMPLES, fuzz_inputs.TEST_EXAMPLES)
    return formats.read_npz(path, train_examples=examples[0], test_examples=examples[1])


def _read_records(folder: pathlib.Path, data: bytes) -> object:
    path = folder / "records"
    path.write_bytes(data)
    return list(formats.read_records(path))


def _read_tfds(folder: pathlib.Path, data: bytes) -> object:
    shards = {"train": data, "test": fuzz_inputs.tfds_shard("test", fuzz_inputs.TEST_EXAMPLES)}
    for split, content in shards.items():
        (folder / f"cifar10-{split}.tfrecord-00000-of-00001").write_bytes(content)
    found = formats.locate(folder, SMALL)
    assert found is not None
    return formats.read(found, verify=False)


def _read_prepared(folder: pathlib.Path, data: bytes) -> object:
    from cifarflow.data.prepared import load_prepared

    for which, (name, value) in enumerate(fuzz_inputs.PREPARED):
        content = data[1:] if which == (data[:1] or b"\0")[0] % 2 else json.dumps(value).encode()
        (folder / name).write_bytes(content)
    for split in ("train", "test"):
        count = fuzz_inputs.TRAIN_EXAMPLES if split == "train" else fuzz_inputs.TEST_EXAMPLES
        shard = folder / f"cifar10-{split}.tfrecord-00000-of-00001"
        shard.write_bytes(fuzz_inputs.tfds_shard(split, count))
    return load_prepared("cifar10", folder, cache_dir=folder / "cache")


def _read_verified(folder: pathlib.Path, data: bytes) -> object:
    (folder / "verified.json").write_bytes(data)
    known = cache.is_verified(folder, [cache.Mark(1, 10, 20, 30, 40, "a")])
    new = cache.Mark(2, 10, 20, 30, 40, "c")
    cache.remember_verified(folder, [new])
    # What was in the file must not keep anything new from being written.
    assert cache.is_verified(folder, [new])
    return known


def _read_workdir(folder: pathlib.Path, data: bytes) -> object:
    (folder / "recipe.json").write_bytes(data)
    return Workdir(folder).open(fuzz_inputs.RECIPE, resume=True)


def _read_summary(folder: pathlib.Path, data: bytes) -> object:
    from cifarflow import cli
    from cifarflow.evaluation.metrics import check_matrix
    from cifarflow.training.loop import Run

    (folder / "summary.json").write_bytes(data)
    summary = Workdir(folder).read_summary(fuzz_inputs.SUMMARY)
    assert summary is not None
    # What is done with one that was taken: it is printed, and drawn but for the picture itself.
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        cli.print_summary(Run(None, None, summary, folder))  # type: ignore[arg-type]
    assert all(line.isprintable() for line in text.getvalue().splitlines())
    matrix = np.array(summary["confusion_matrix"])
    if matrix.size:
        check_matrix(matrix)
    np.random.default_rng(summary["seed"]).permutation(3)
    return f"{summary['parameters']:,}"


def _read_history(folder: pathlib.Path, data: bytes) -> object:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    history = History.load(path, tags={"dataset": "standin"})
    history.rewind(20)
    history.add(step=25, epoch=2.5, split="train", loss=1.0, accuracy=0.5)
    rows = History.load(path).rows
    assert rows == history.rows
    for name in ("loss", "accuracy", "learning_rate", "images_per_second"):
        assert np.isfinite(np.array(history.series("train", name), np.float64)).all()
    return rows


def _read_outputs(folder: pathlib.Path, data: bytes) -> object:
    (folder / "test_outputs.npy").write_bytes(data)
    outputs = Workdir(folder).read_test_outputs()
    assert outputs is not None
    return outputs.argmax(-1) if outputs.size else outputs


def _read_mistakes(folder: pathlib.Path, data: bytes) -> object:
    (folder / "mistakes.npz").write_bytes(data)
    found = Workdir(folder).read_mistakes()
    assert found is not None
    # What is done with those that were taken: each names a class.
    return [
        found["probabilities"][row, [found["labels"][row], found["predicted"][row]]]
        for row in range(len(found["images"]))
    ]


def _read_checkpoint(folder: pathlib.Path, data: bytes) -> object:
    checkpoints = Checkpoints(folder)
    checkpoints.path(fuzz_inputs.RUN_STEP).write_bytes(data)
    step = checkpoints.latest_whole()
    assert step is not None
    return checkpoints.restore(step, fuzz_inputs.make_variables())


def _read_recipe(folder: pathlib.Path, data: bytes) -> object:
    from cifarflow.recipes.recipe import Recipe

    (folder / "recipe.json").write_bytes(data)
    values = Workdir(folder).read_json("recipe.json")
    assert values is not None
    recipe = Recipe.from_json(values)
    # What was taken can be written down, and taken again.
    text = json.dumps(recipe.to_json(), allow_nan=False)
    assert Recipe.from_json(parse_json(text.encode())) == recipe
    return recipe


def _read_capsule(folder: pathlib.Path, data: bytes) -> object:
    from cifarflow.training.capsule import load_capsule

    for name, content in {**fuzz_inputs.capsule_files(), "capsule.json": data}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    capsule = load_capsule(folder)
    capsule.restore(fuzz_inputs.make_variables())
    return capsule.found.describe()


READERS: dict[str, Callable[[pathlib.Path, bytes], object]] = {
    "pickle": lambda _, data: formats.decode_python_batch(data, "batch", SMALL),
    "binary": lambda _, data: formats.decode_binary_batch(data, "batch", SMALL),
    "folder": _read_folder,
    "archive": _read_archive,
    "npz": _read_npz,
    "tfrecord": _read_records,
    "verified": _read_verified,
    "workdir": _read_workdir,
    "summary": _read_summary,
    "history": _read_history,
    "outputs": _read_outputs,
    "mistakes": _read_mistakes,
    "checkpoint": _read_checkpoint,
    "recipe": _read_recipe,
    "capsule": _read_capsule,
    "tfds": _read_tfds,
    "picture": lambda _, data: pictures.decode_picture(data, "picture", shape=(32, 32, 3)),
    "prepared": _read_prepared,
}
# These need TensorFlow, whose threads take address space without using it: they have no limit, and
# only the memory that they touch is seen.
SLOW_READERS = ("recipe", "capsule", "summary", "tfds", "prepared")


# --- trying inputs ----------------------------------------------------------------------------


class Fuzz:
    """Gives inputs to one reader and watches what comes of them.

    Args:
      reader: a key of `READERS`.
      scratch: a folder for its files.
      seed: of the inputs.
      alone: whether the process may be ended when an input hangs.  The file `note_of(scratch)`
        then holds its number.

    Attributes:
      facts: for `worker.serve`.
    """

    def __init__(
        self, reader: str, *, scratch: pathlib.Path, seed: int = 0, alone: bool = False
    ) -> None:
        self.facts: dict[str, Any] = {}
        self._reader, self._seed = reader, seed
        self._folder = scratch / "files"
        self._folder.mkdir(exist_ok=True)
        self._note = os.open(note_of(scratch), os.O_RDWR | os.O_CREAT) if alone else None

    def round(self, steps: int) -> float:
        """Reads a valid input, which must be taken.

        Raises:
          RuntimeError: if it is not.
        """
        started = time.perf_counter()
        with mock.patch.object(os, "fsync"):
            outcome, why, _ = self._try(fuzz_inputs.BUILDERS[self._reader](random.Random(0), 0))
        if outcome != "read":
            raise RuntimeError(f"the reader {self._reader} does not read a valid input: {why}")
        return time.perf_counter() - started

    def run(self, first: int, count: int) -> dict[str, Any]:
        """Tries some inputs.

        Args:
          first: the index of the first.
          count: how many.

        Returns:
          How many were "read" and "refused"; "broke", the index and reason of each that broke a
          rule; "seconds" in all, "slowest" as (seconds, index), and "grown", the most bytes that
          memory grew by.
        """
        found: dict[str, Any] = {"read": 0, "refused": 0, "broke": []}
        found.update(slowest=(0.0, first), grown=0)
        started = time.perf_counter()
        with mock.patch.object(os, "fsync"):
            for index in range(first, first + count):
                data = make_input(self._reader, seed=self._seed, index=index)
                outcome, why, grown, seconds = self._watch(data, index)
                if outcome == "broke":
                    found["broke"].append((index, why))
                else:
                    found[outcome] += 1
                found["slowest"] = max(found["slowest"], (seconds, index))
                found["grown"] = max(found["grown"], grown)
        return {**found, "seconds": time.perf_counter() - started}

    def replay(self, path: str) -> str | None:
        """Tries the input in a file; returns what rule it broke."""
        with mock.patch.object(os, "fsync"):
            outcome, why = self._watch(pathlib.Path(path).read_bytes(), -1)[:2]
        return why if outcome == "broke" else None

    def _watch(self, data: bytes, index: int) -> tuple[str, str, int, float]:
        """Tries one input: what `_try` returns, and the seconds of computing."""
        if self._note is not None:
            os.pwrite(self._note, b"%20d" % index, 0)
            signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        # Computing, not waiting: other programs must not make an input slow.
        clock = time.process_time()
        outcome, why, grown = self._try(data)
        seconds = time.process_time() - clock
        if self._note is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if seconds > SECONDS_LIMIT:
            outcome, why = "broke", f"it took {seconds:.1f} s"
        return outcome, why, grown, seconds

    def _try(self, data: bytes) -> tuple[str, str, int]:
        """Reads one input: "read", "refused" or "broke", why, and by how much memory grew."""
        # One folder for all: to make and remove one takes longer than to read most inputs.
        for entry in list(os.scandir(self._folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        base = rss_bytes()
        forget_peak()
        try:
            READERS[self._reader](self._folder, data)
            outcome, why = "read", ""
        except CifarflowError as error:
            outcome, why = "refused", str(error)
            fault = _fault_of(error)
            if fault:
                outcome, why = "broke", fault
        except Exception as error:
            # Anything else is a traceback for somebody.
            outcome, why = "broke", f"{type(error).__name__}: {error}"
        grown = peak_rss_bytes() - base
        if grown > MEMORY_LIMIT:
            outcome, why = "broke", f"memory grew by {grown / 1e6:.0f} MB"
        return outcome, why, grown


def _fault_of(error: CifarflowError) -> str:
    """What is wrong with an error of ours; nothing if it is as it should be."""
    message = str(error)
    if not message or len(message) > MESSAGE_LIMIT or not message.isprintable():
        return f"its message is not one short line but {message[:200]!r}"
    cause: BaseException | None = error
    while cause is not None:
        # Under a limit, what could not be had ends as an error too.
        if isinstance(cause, MemoryError):
            return f"it asked for more memory than there may be: {cause}"
        cause = cause.__cause__ or cause.__context__
    return ""


def note_of(scratch: pathlib.Path) -> pathlib.Path:
    """The file that holds the number of the input being tried, for who finds the process dead."""
    return scratch / "note"


def make_way(spec: dict[str, Any]) -> Fuzz:
    """Makes what the parent asks for, in a process of which only that is asked."""
    reader = spec["reader"]
    if reader in SLOW_READERS:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    else:
        # bfloat16, which otherwise TensorFlow brings.
        import ml_dtypes  # noqa: F401

        used = _address_space()
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    return Fuzz(reader, scratch=pathlib.Path(spec["scratch"]), seed=spec["seed"], alone=True)


def _address_space() -> int:
    """The bytes of address space this process has; 0 where the system does not tell."""
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        return pages * resource.getpagesize()
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    serve(make_way)
