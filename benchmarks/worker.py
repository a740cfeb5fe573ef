"""A way of doing the work as a process of its own, and the lines it and its parent exchange.

    with Worker("ours", "benchmarks/ways.py", {"way": "cifarflow", "model": "lab_cnn"}) as worker:
        print(worker.facts["seconds_to_first_step"], worker.round(100))

and in the child

    if __name__ == "__main__":
        serve(make_way)

This module is light: what the child imports counts in its time to the first step.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from cifarflow.errors import CifarflowError, ConfigError


class WorkerError(CifarflowError, RuntimeError):
    """A worker died or answered nonsense."""


class Worker:
    """A child process that does the work in one way; it is killed when the `with` block ends.

    The child runs `serve`.  What it prints is held back and shown only if it dies.

    Args:
      name: the way, for messages.
      script: the Python file to run, which calls `serve`.
      spec: what to do, as JSON has it.

    Attributes:
      facts: what the child said of itself when ready, `seconds_to_first_step` among it: the time
        from the start of the process to the end of its first step.
    """

    def __init__(self, name: str, script: str | os.PathLike[str], spec: Mapping[str, Any]) -> None:
        self.name, self._script, self._spec = name, script, dict(spec)
        self.facts: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        """Starts the child and waits until it is ready.

        Raises:
          WorkerError: if it dies.
          ConfigError: if it refuses the spec.
        """
        self._stderr = tempfile.TemporaryFile()
        environ = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        # Several workers share a GPU: none may take all its memory at once.
        environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
        self._process = subprocess.Popen(
            [sys.executable, os.fspath(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environ,
            text=True,
        )
        try:
            self.facts = self._exchange({**self._spec, "started": time.time()})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the child if it has not ended by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # of what nobody is left to read
                    pipe.close()
        self._stderr.close()

    def ask(self, call: str, **arguments: Any) -> Any:
        """Calls a method of the child's way and returns what it returns, as JSON has it.

        Raises:
          WorkerError: if the child dies.
          ConfigError: if it refuses the arguments.
        """
        return self._exchange({"call": call, "arguments": arguments})

    def round(self, steps: int) -> float:
        """Runs so many steps and returns their seconds; errors as `ask`."""
        return float(self.ask("round", steps=steps))

    def _exchange(self, message: Mapping[str, Any]) -> Any:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerError(f"the worker {self.name} is not running")
        line = ""
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise WorkerError(self._epitaph(process))
        answer = json.loads(line)
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer["result"]

    def _epitaph(self, process: subprocess.Popen[str]) -> str:
        """Shows what a dead child wrote, and says in a line how it died."""
        code = process.wait()
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace").rstrip()
        print(text, file=sys.stderr)
        last = text.rpartition("\n")[2].strip() or "it wrote nothing"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the worker {self.name} {how}: {last!r:.300}"


def serve(make_way: Callable[[dict[str, Any]], Any]) -> None:
    """The child's side of `Worker`: makes the way that the first line asks for, then obeys.

    Every line on stdin is a JSON object and is answered by one on stdout.  The child ends when
    stdin does, so it does not outlive its parent.

    Args:
      make_way: a function of the spec.  It returns an object with `facts`, `round(steps)` ->
        seconds, and whatever else the parent will call.  Imports belong inside it: they are part
        of the time to the first step.
    """
    # Libraries print to stdout as they like; the answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(work: Callable[[], Any]) -> None:
        try:
            message = {"result": work()}
        except CifarflowError as error:
            message = {"error": str(error)}
        except Exception:
            # Not by the interpreter at its end: threads may keep it from getting there.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    way: Any = None

    def prepare() -> dict[str, Any]:
        nonlocal way
        way = make_way(spec)
        way.round(way.facts.get("multiple", 1))
        return {**way.facts, "seconds_to_first_step": time.time() - spec["started"]}

    spec = json.loads(sys.stdin.readline())
    answer(prepare)
    for line in sys.stdin:
        request = json.loads(line)
        answer(lambda: getattr(way, request["call"])(**request["arguments"]))  # noqa: B023
    # Libraries' threads make an orderly end slow and sometimes noisy.
    os._exit(0)


def peak_rss_bytes() -> int:
    """The most memory this process has had resident so far."""
    # Not `getrusage` first: its peak includes that of the parent this process was forked from.
    return _status_bytes("VmHWM:") or _getrusage_bytes()


def rss_bytes() -> int:
    """The memory this process has resident now; its peak where the system does not tell."""
    return _status_bytes("VmRSS:") or _getrusage_bytes()


def forget_peak() -> None:
    """Lets `peak_rss_bytes` start again from what is resident now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    """A size that Linux tells of this process; 0 on other systems."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition(field)[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def _getrusage_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_cores() -> int:
    """The processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)
