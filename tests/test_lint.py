"""The code is linted, formatted and typed: the tools and versions of the `test` extra."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_finds_nothing(command, tmp_path):
    if command[0] == "mypy":
        command += ("--cache-dir", str(tmp_path))
    elif command[0] == "ruff":
        command += ("--no-cache",)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
