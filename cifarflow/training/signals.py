"""Ctrl-C and SIGTERM noted, to be answered when a step is done.

    with noted_signals() as came:
        while not came():
            ...

So a step is never cut in two, and the state that is saved is whole.
"""

from __future__ import annotations

import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted between two steps.

    Attributes:
      step: steps done.
      checkpoint: the file to go on from, of an older step where that one's could not be written;
        None if the run has no checkpoints.
      signal: number of the signal that interrupted it, SIGINT or SIGTERM.
    """

    def __init__(
        self,
        step: int,
        checkpoint: pathlib.Path | None,
        signal_number: int = signal.SIGINT,
        *,
        trouble: str = "",
        is_chief: bool = True,
    ) -> None:
        kept = f"all is saved in {checkpoint}" if checkpoint else "nothing was saved"
        if trouble:
            older = f"what is saved is {checkpoint}" if checkpoint else "nothing was saved"
            kept = f"{trouble}; {older}"
        if not is_chief:
            kept = "what is saved is with the chief"
        super().__init__(f"interrupted after step {step}: {kept}")
        self.step = step
        self.checkpoint = checkpoint
        self.signal = signal_number


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """Notes the first SIGINT or SIGTERM instead of stopping; a second one stops at once.

    Yields a function that returns the number of the signal that has come, 0 if none has.  Python
    can set handlers in its main thread only; in another thread signals keep their meaning.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    came: list[int] = []
    kept: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for each, handler in kept.items():
            signal.signal(each, handler)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        kept[number] = signal.signal(number, note)
    try:
        yield lambda: came[0] if came else 0
    finally:
        restore()
