"""When the next checkpoint inside a task is due."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = 30
"""So many times as long as a checkpoint takes passes before the next one."""
LONGEST = 600.0
"""Seconds after which there is one in any case."""


class Pace:
    """The pace of checkpoints.

    Args:
        seconds: the least time between two of them; ``auto`` goes by what the last one took.
    """

    def __init__(self, seconds: float | str) -> None:
        self._seconds = seconds
        self._last, self._took = -math.inf, 0.0

    @contextmanager
    def saves(self) -> Iterator[None]:
        """The block writes a checkpoint."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._took = self._last - began

    def resumes(self) -> None:
        """There is a checkpoint of this moment already."""
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether the next checkpoint is due."""
        wait = min(self._took * RARELY, LONGEST) if isinstance(self._seconds, str) else self._seconds
        return time.monotonic() - self._last >= wait
