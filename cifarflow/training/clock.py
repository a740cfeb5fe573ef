"""Times the compiled calls of a training run, and nothing between them.

    clock = Clock()
    with clock.measure(steps):
        clock.add_images(float(run_steps(iterator, steps).examples))
    clock.images_per_second()

Validation, checkpoints and hooks fall between the calls and are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds and images of the calls measured, the first one apart.

    The first call still optimises the graph and compiles: its time says nothing of a step.

    Attributes:
      seconds: in all calls but the first.
      compile_seconds: in compiling, and in the first call.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self._images = 0.0
        self._is_first = True
        self._seconds_a_step: float | None = None
        self._lap = (0.0, 0.0)

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Times the block, which compiles."""
        start = time.perf_counter()
        yield
        self.compile_seconds += time.perf_counter() - start

    @contextmanager
    def measure(self, steps: int) -> Iterator[None]:
        """Times the block, which is one call of so many steps."""
        start, images = time.perf_counter(), self._images
        yield
        elapsed = time.perf_counter() - start
        if self._is_first:
            self._is_first = False
            self.compile_seconds += elapsed
            self._images = images
            return
        self.seconds += elapsed
        self._seconds_a_step = elapsed / steps

    def add_images(self, count: float) -> None:
        """Counts the images of the call being measured."""
        self._images += count

    def steps_in(self, seconds: float) -> int:
        """How many steps take about so long; 1 while that is not known."""
        if self._seconds_a_step is None:
            return 1
        return max(1, round(seconds / self._seconds_a_step))

    def images_per_second(self) -> float:
        """Over all calls but the first; 0 while there are none."""
        return self._images / self.seconds if self.seconds else 0.0

    def lap(self) -> float | None:
        """Images a second since the last lap; None if nothing was measured."""
        images, seconds = self._lap
        self._lap = (self._images, self.seconds)
        elapsed = self.seconds - seconds
        return (self._images - images) / elapsed if elapsed else None

    def get_state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.seconds, self._images, self.compile_seconds]

    def set_state(self, state: list[float]) -> None:
        """Takes back what `get_state` gave; the call after it compiles anew."""
        self.seconds, self._images, self.compile_seconds = state
        self._lap = (self._images, self.seconds)
