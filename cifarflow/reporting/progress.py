"""How far a training run is: a live bar on a terminal, plain lines anywhere else.

    with Progress(total_steps, steps_per_epoch=1250, description="lab_cnn") as progress:
        for step in ...:
            progress.update(step, loss=0.81, accuracy=0.71, images_per_second=4100.0)
        progress.line("saved checkpoint 3")  # appears above the bar

Both forms go to stderr, so that stdout stays free for results.  The bar is drawn by rich's own
thread four times a second; `update` only notes the numbers, so it may be called every step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from cifarflow.errors import ConfigError, check_float, check_int

_REFRESHES_PER_SECOND = 4
# Characters that the bar keeps of a line; the numbers get the rest of it.
_SHORTEST_BAR = 5
# What goes first where a terminal is too narrow for everything.
_LEAST_NEEDED = ("step", "epoch", "images/s", "accuracy", "loss")


class _Numbers(NamedTuple):
    """What an `update` said, and when."""

    seconds: float
    step: int
    loss: float
    accuracy: float
    images_per_second: float


class Progress:
    """Shows step, epoch, loss, accuracy, speed and the time left while it is entered.

    On a terminal this is one live line; elsewhere (a pipe, a file, a notebook, `TERM=dumb`) a
    plain line at the first update, then at most one every `interval_seconds`, and one at the end.
    Leaving the `with` block, by whatever exception, stops the bar and gives the terminal back.

    Args:
      total_steps: step at which the run ends, >= 1.
      steps_per_epoch: steps in an epoch, >= 1.
      first_step: step at which this run starts, 0..total_steps: above 0 when it is resumed.
      description: what is being trained, in a word or two.
      stream: text stream to write to; None is stderr.
      verbose: False shows nothing at all.
      interval_seconds: least time between two plain lines.

    Raises:
      ConfigError: if a number is out of its range.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        steps_per_epoch: int,
        first_step: int = 0,
        description: str = "",
        stream: TextIO | None = None,
        verbose: bool = True,
        interval_seconds: float = 10.0,
    ) -> None:
        self._total_steps = check_int("total_steps", total_steps)
        self._steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch)
        self._first_step = check_int("first_step", first_step, minimum=0)
        if self._first_step > self._total_steps:
            raise ConfigError(
                f"first_step must be at most total_steps = {total_steps}, not {first_step}"
            )
        self._interval_seconds = check_float("interval_seconds", interval_seconds)
        self._description = description
        self._stream = sys.stderr if stream is None else stream
        self._verbose = verbose
        self._bar: RichProgress | None = None
        self._latest: _Numbers | None = None
        self._first: _Numbers | None = None
        self._last_line_at = -float("inf")
        self._last_line_step: int | None = None

    def __enter__(self) -> Progress:
        """Draws the empty bar, if there is a terminal to draw it on."""
        if self._verbose and _is_live_terminal(self._stream):
            self._bar = self._start_bar()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the last state on the screen and the terminal as it was."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()
        elif self._latest is not None and self._latest.step != self._last_line_step:
            self._print_plain_line(self._latest)

    def update(self, step: int, *, loss: float, accuracy: float, images_per_second: float) -> None:
        """Notes how far the run is; on a terminal this takes microseconds.

        Args:
          step: steps done since the start of the training, first_step..total_steps.
          loss: training loss of late.
          accuracy: training accuracy of late, 0..1.
          images_per_second: training speed of late.
        """
        if not self._verbose:
            return
        self._latest = _Numbers(time.monotonic(), step, loss, accuracy, images_per_second)
        if self._first is None:
            self._first = self._latest
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
        elif self._latest.seconds - self._last_line_at >= self._interval_seconds:
            self._print_plain_line(self._latest)

    def line(self, text: str) -> None:
        """Prints a line of text above the bar."""
        if not self._verbose:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def _start_bar(self) -> RichProgress:
        # `_is_live_terminal` has decided; without these rich asks its own environment variables.
        console = Console(file=self._stream, force_terminal=True, force_interactive=True)
        bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _FieldsColumn(self._fields, console),
            console=console,
            expand=True,
            refresh_per_second=_REFRESHES_PER_SECOND,
            # A `print` during the run must not cut the bar in two; but a stdout that goes to a
            # file has to keep going there.
            redirect_stdout=_same_file(self._stream, sys.stdout),
            redirect_stderr=_same_file(self._stream, sys.stderr),
        )
        bar.add_task(self._description, total=self._total_steps, completed=self._first_step)
        bar.start()
        # rich hides the cursor; a process that is killed could not bring it back.
        console.show_cursor(True)
        return bar

    def _print_plain_line(self, latest: _Numbers) -> None:
        self._last_line_at = latest.seconds
        self._last_line_step = latest.step
        fields = [self._description, *self._fields().values()]
        print("  ".join(filter(None, fields)), file=self._stream, flush=True)

    def _fields(self) -> dict[str, str]:
        """The numbers as short texts, in reading order."""
        step = self._first_step if self._latest is None else self._latest.step
        epoch, epochs = (
            max(1, -(-steps // self._steps_per_epoch)) for steps in (step, self._total_steps)
        )
        fields = {
            "epoch": f"epoch {epoch}/{epochs}",
            "step": f"step {step:,}/{self._total_steps:,}",
        }
        if self._latest is not None:
            fields["loss"] = f"loss {_short(self._latest.loss)}"
            fields["accuracy"] = f"acc {self._latest.accuracy:.3f}"
            # Not known yet at the first update, which comes after the call that compiles.
            if self._latest.images_per_second:
                fields["images/s"] = f"{self._latest.images_per_second:,.0f} img/s"
            fields["ETA"] = f"ETA {self._time_left()}"
        return fields

    def _time_left(self) -> str:
        # Speed is taken from the first update on: the time before it is mostly compilation,
        # which says nothing about the rest.  Pauses between steps (validation) do count.
        if self._first is None or self._latest is None or self._first.step == self._latest.step:
            return "-:--"
        seconds_a_step = (self._latest.seconds - self._first.seconds) / (
            self._latest.step - self._first.step
        )
        since_update = time.monotonic() - self._latest.seconds
        left = seconds_a_step * (self._total_steps - self._latest.step) - since_update
        minutes, seconds = divmod(round(max(0.0, left)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _FieldsColumn(ProgressColumn):
    """The numbers right of the bar: as many as the terminal has room for."""

    def __init__(self, fields_fn: Callable[[], dict[str, str]], console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._fields_fn = fields_fn
        self._console = console

    def render(self, task: Task) -> Text:
        fields = self._fields_fn()
        room = self._console.width - len(task.description) - _SHORTEST_BAR - 2
        for name in _LEAST_NEEDED:
            if len("  ".join(fields.values())) <= room:
                break
            fields.pop(name, None)
        return Text("  ".join(fields.values()))


def _short(loss: float) -> str:
    """Three decimals, as long as that is short."""
    return f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.2e}"


def _is_live_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def _same_file(stream: TextIO, other: TextIO) -> bool:
    try:
        return os.path.sameopenfile(stream.fileno(), other.fileno())
    except (AttributeError, OSError, ValueError):  # None, or a stream without a descriptor
        return False
