"""The benchmark scripts for the tests: their modules can be imported, their quick runs shared.

To be imported before the scripts' modules.
"""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# As for `python benchmarks/step_time.py`, whose folder is where its imports come from.
sys.path.insert(0, str(BENCHMARKS))

# How lines begin, or what is in them, that TensorFlow's libraries write by themselves.
NOISE = re.compile(
    r"^.*(?:absl::InitializeLog|oneDNN|cudart|cpu_feature_guard).*$"
    r"|^[IWEF]\d{4} .*$|^\d{4}-\d\d-\d\d [\d:.]+: [IWEF] .*$",
    re.MULTILINE,
)

COMMANDS = {
    "step": "step_time.py --quick --data=standin --compare=all --peer_precisions=float32 "
    "--json=step.json --plot=step.png",
    "input": "input_pipeline.py --quick --data=standin --ways=cifarflow_drawn,copy "
    "--augment=flip --json=input.json --plot=input.png",
    "memory": "memory.py --quick --data=standin --model=lab_mlp --precision=mixed_bfloat16 "
    "--rounds=1 --json=memory.json --plot=memory.png",
    "team": "distribution.py --quick --data=standin --device=cpu --steps=3 --batch_size=32 "
    "--json=team.json --plot=team.png",
    # Only once the images are there can this be known to be too many.
    "refused": "memory.py --data=standin --growth_examples=9000 --json=refused.json",
}


@contextlib.contextmanager
def quick_runs(folder, commands=COMMANDS):
    """Starts all the commands, each in a folder of its own that has its name.

    They run side by side, and beside the tests, since they mostly load libraries: what they
    measure is worth nothing.

    Yields a function of a command's name: it waits for its end, and returns the folder and the
    `CompletedProcess`.  With `interrupt_at` it sends Ctrl-C once there is a file of that name.
    """
    from cifarflow.data.standin import load_standin

    cache = folder / "cache"
    load_standin(cache_dir=cache)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "default",
        "CIFARFLOW_CACHE": str(cache),
        "KERAS_HOME": str(cache / "keras"),
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    for name in ("CIFARFLOW_DATA", "TF_CPP_MIN_LOG_LEVEL"):
        env.pop(name, None)
    started = {}

    @functools.cache
    def finish(name, *, interrupt_at=None):
        process = started[name]
        if interrupt_at is not None:
            deadline = time.monotonic() + 240
            while not (folder / name / interrupt_at).exists() and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=240)
        done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        return folder / name, done

    try:
        for name, command in commands.items():
            (folder / name).mkdir()
            script, *flags = command.split()
            started[name] = subprocess.Popen(
                [sys.executable, str(BENCHMARKS / script), *flags],
                cwd=folder / name,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        yield finish
    finally:
        for process in started.values():
            process.kill()
            for pipe in (process.stdout, process.stderr):
                pipe.close()
            process.wait()


def read(folder, done):
    """The record that a quick run left in its folder, beside a good picture and nothing else."""
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert NOISE.findall(done.stderr) == []
    name = folder.name
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.png"]
    picture = (folder / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    record = json.loads((folder / f"{name}.json").read_text())
    environment = record["environment"]
    assert environment["device"].startswith("cpu: ")
    assert environment["cores"] >= 1
    assert {"python", "tensorflow", "keras", "numpy"} <= set(environment["versions"])
    assert environment["commit"]
    assert environment["date"].startswith("20")
    assert record["data"]["name"] == "standin"
    # What the figures stand with is also printed.
    assert done.stdout.startswith(environment["device"])
    assert f"\n{environment['date']}; standin images; median of " in done.stdout
    return record
