"""The progress bar on a real pseudo-terminal, and the plain lines in a pipe."""

import io
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from cifarflow.errors import ConfigError
from cifarflow.reporting.progress import Progress

ESCAPE = "\x1b"
SHOW_CURSOR = "\x1b[?25h"
HIDE_CURSOR = "\x1b[?25l"


class Terminal:
    """A pseudo-terminal that keeps what was written to it."""

    def __init__(self):
        self.master, self.slave = os.openpty()
        self.stream = os.fdopen(self.slave, "w", encoding="utf-8")
        self._parts = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # EIO: the last writer has closed
                return
            if not part:
                return
            self._parts.append(part)

    def text(self):
        """Closes the terminal and returns all of its output."""
        self.stream.close()
        self._reader.join(timeout=5)
        os.close(self.master)
        return b"".join(self._parts).decode()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def without_escapes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def updates(progress, steps, **changed):
    for step in steps:
        numbers = {"loss": 1.25, "accuracy": 0.5, "images_per_second": 4100.0} | changed
        progress.update(step, **numbers)


# --- a terminal


def test_bar_shows_every_number(terminal):
    with Progress(100, steps_per_epoch=25, description="lab_cnn", stream=terminal.stream) as bar:
        updates(bar, [1])
        time.sleep(0.01)
        updates(bar, [51])
    last = without_escapes(terminal.text()).strip().splitlines()[-1]
    for expected in (
        "lab_cnn",
        "epoch 3/4",
        "step 51/100",
        "loss 1.250",
        "acc 0.500",
        "4,100 img/s",
        "ETA 0:00",
    ):
        assert expected in last
    assert "━" in last


def test_bar_stays_a_single_line_and_drops_numbers_on_a_narrow_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with Progress(100, steps_per_epoch=25, description="lab_cnn", stream=terminal.stream) as bar:
        updates(bar, [1, 60])
    text = without_escapes(terminal.text())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert all(len(line) <= 60 for line in lines)
    assert "ETA" in lines[-1]
    assert "loss 1.250" in lines[-1]
    assert "step 60" not in lines[-1]
    assert "epoch" not in lines[-1]


def test_line_is_printed_above_the_bar(terminal):
    with Progress(10, steps_per_epoch=5, stream=terminal.stream) as bar:
        updates(bar, [5])
        bar.line("saved [bold]checkpoint[/] 3")
    lines = [line.strip() for line in without_escapes(terminal.text()).splitlines()]
    place = lines.index("saved [bold]checkpoint[/] 3")
    assert any("epoch 1/2" in line for line in lines[place + 1 :])


def test_a_step_in_a_live_bar_costs_microseconds(terminal):
    with Progress(10**6, steps_per_epoch=1000, stream=terminal.stream) as bar:
        started = time.perf_counter()
        updates(bar, range(2000))
        seconds = time.perf_counter() - started
    terminal.text()
    assert seconds / 2000 < 200e-6  # 2 us on an idle core


def test_bar_is_drawn_a_few_times_a_second_not_every_step(terminal):
    with Progress(10**6, steps_per_epoch=1000, stream=terminal.stream) as bar:
        started = time.monotonic()
        while time.monotonic() - started < 1.0:
            updates(bar, range(1, 50))
            time.sleep(0.01)
    assert 2 <= terminal.text().count("epoch 1/") <= 10


def fail_at_step_3(stream):
    with Progress(10, steps_per_epoch=5, stream=stream) as bar:
        updates(bar, [3])
        raise RuntimeError("in the middle")


def test_exception_stops_the_bar_and_its_thread(terminal):
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="in the middle"):
        fail_at_step_3(terminal.stream)
    deadline = time.monotonic() + 2
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    text = terminal.text()
    assert "step 3/10" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


def test_cursor_is_visible_while_the_bar_runs(terminal):
    # A process that is killed cannot bring a hidden cursor back.
    with Progress(10, steps_per_epoch=5, stream=terminal.stream):
        time.sleep(0.4)
        so_far = b"".join(terminal._parts).decode()
    terminal.text()
    assert so_far.rindex(SHOW_CURSOR) > so_far.rindex(HIDE_CURSOR)


INTERRUPTED = """
import time
from cifarflow.reporting.progress import Progress
with Progress(1000, steps_per_epoch=100) as progress:
    for step in range(1000):
        progress.update(step, loss=1.0, accuracy=0.5, images_per_second=100.0)
        if step == 50:
            progress.line("ready")
        time.sleep(0.02)
"""


def test_ctrl_c_leaves_the_terminal_sane(terminal):
    before = termios.tcgetattr(terminal.slave)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stderr=terminal.slave,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    deadline = time.monotonic() + 20
    while b"ready" not in b"".join(terminal._parts) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert termios.tcgetattr(terminal.slave) == before
    text = terminal.text()
    assert "KeyboardInterrupt" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)
    # The traceback starts on a line of its own, below the last state of the bar.
    assert re.search(r"epoch 1/10.*\n(\x1b\[\?25h)?Traceback", text.replace("\r", ""))


def test_no_color_takes_the_colours_away(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(10, steps_per_epoch=5, stream=terminal.stream) as bar:
        updates(bar, [5])
    text = terminal.text()
    assert "epoch 1/2" in text
    assert not re.search(r"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])(;[0-9;]*)?m", text)


def test_colours_are_there_without_no_color(terminal):
    with Progress(10, steps_per_epoch=5, stream=terminal.stream) as bar:
        updates(bar, [5])
    assert re.search(r"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])(;[0-9;]*)?m", terminal.text())


def test_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(10, steps_per_epoch=5, stream=terminal.stream) as bar:
        updates(bar, [5])
    text = terminal.text()
    assert ESCAPE not in text
    assert "epoch 1/2  step 5/10" in text


# --- no terminal


def test_pipe_gets_plain_lines_on_stderr_only():
    script = INTERRUPTED.replace("range(1000)", "range(1, 61)").replace("0.02", "0.001")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        # Variables that make rich take a pipe for a terminal.
        "FORCE_COLOR": "1",
        "TTY_COMPATIBLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == ""
    assert ESCAPE not in done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == ("epoch 1/10  step 1/1,000  loss 1.000  acc 0.500  100 img/s  ETA -:--")
    assert lines[1] == "ready"
    assert lines[2].startswith("epoch 1/10  step 60/1,000")
    assert len(lines) == 3


def test_plain_lines_keep_their_distance():
    stream = io.StringIO()
    with Progress(
        100, steps_per_epoch=10, stream=stream, description="mlp", interval_seconds=0.2
    ) as progress:
        started = time.monotonic()
        for step in range(1, 101):
            updates(progress, [step])
            time.sleep(0.005)
        seconds = time.monotonic() - started
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("mlp  epoch 1/10  step 1/100")
    assert lines[-1].startswith("mlp  epoch 10/10  step 100/100")
    assert 3 <= len(lines) <= 2 + seconds / 0.2


def test_every_update_is_a_line_with_an_interval_of_zero():
    stream = io.StringIO()
    with Progress(100, steps_per_epoch=10, stream=stream, interval_seconds=0) as progress:
        updates(progress, [1, 2, 3])
    assert len(stream.getvalue().splitlines()) == 3  # step 3 is not printed again at the end


def test_time_left_counts_from_the_first_update(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cifarflow.reporting.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(
        8000, steps_per_epoch=1000, first_step=500, stream=stream, interval_seconds=0
    ) as progress:
        for seconds, step in [(60, 510), (70, 610), (80, 7990)]:  # 60 s of compilation first
            now[0] = seconds
            updates(progress, [step])
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("ETA -:--")
    assert lines[1].endswith("ETA 12:19")  # 7,390 steps at 10 steps a second
    assert lines[2].endswith("ETA 0:00")


def test_hours_left():
    stream = io.StringIO()
    with Progress(10**9, steps_per_epoch=10**6, stream=stream, interval_seconds=0) as progress:
        updates(progress, [1])
        time.sleep(0.01)
        updates(progress, [2])
    assert re.search(r"ETA \d+:\d\d:\d\d$", stream.getvalue().splitlines()[-1])


def test_epoch_is_the_one_the_last_step_belongs_to():
    stream = io.StringIO()
    with Progress(25, steps_per_epoch=10, stream=stream, interval_seconds=0) as progress:
        updates(progress, [10, 11, 25])
    epochs = re.findall(r"epoch (\S+)", stream.getvalue())
    assert epochs == ["1/3", "2/3", "3/3"]


def test_numbers_that_are_not_finite_are_shown():
    stream = io.StringIO()
    with Progress(10, steps_per_epoch=10, stream=stream) as progress:
        updates(progress, [1], loss=float("nan"), images_per_second=float("inf"))
    assert "loss nan" in stream.getvalue()
    assert "inf img/s" in stream.getvalue()


def test_not_verbose_is_silent(terminal):
    with Progress(10, steps_per_epoch=5, stream=terminal.stream, verbose=False) as progress:
        updates(progress, [1, 10])
        progress.line("unheard")
    assert terminal.text() == ""


def test_without_updates_nothing_is_printed():
    stream = io.StringIO()
    with Progress(10, steps_per_epoch=5, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_stderr_is_the_default(capsys):
    with Progress(10, steps_per_epoch=5) as progress:
        progress.line("hello")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, not 0"),
        ({"steps_per_epoch": 2.5}, "steps_per_epoch must be a whole number >= 1, not 2.5"),
        ({"first_step": -1}, "first_step must be a whole number >= 0, not -1"),
        ({"first_step": 11}, "first_step must be at most total_steps = 10, not 11"),
        ({"interval_seconds": float("nan")}, "interval_seconds must be a finite number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Progress(**({"total_steps": 10, "steps_per_epoch": 5} | arguments))
