"""Where the time of a task goes: making data, training steps, evaluation, checkpoints, and all the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PARTS = ("data", "training", "evaluation", "checkpoints")
"""What is measured. ``other`` is what they leave of the elapsed time."""


class Clock:
    """Adds up the seconds of each part since the last :meth:`take`. A part that runs inside another one belongs to the
    outer one.

    On a GPU the parts have to end by reading a number from the device, as an epoch and an evaluation do: else the work
    of one would be counted in the next.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._before = 0.0
        self._running = False

    @contextmanager
    def measures(self, part: str) -> Iterator[None]:
        """Count the block as this part."""
        if self._running:
            yield
            return
        began, self._running = time.perf_counter(), True
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - began
            self._running = False

    def so_far(self) -> dict[str, float]:
        """The seconds of each part and of ``other``. Their sum is the elapsed time."""
        elapsed = self._before + time.perf_counter() - self._began
        return {**self._spent, "other": max(0.0, elapsed - sum(self._spent.values()))}

    def take(self) -> dict[str, float]:
        """:meth:`so_far`, and begin anew."""
        spent = self.so_far()
        self._began, self._before, self._spent = time.perf_counter(), 0.0, dict.fromkeys(PARTS, 0.0)
        return spent

    def add(self, earlier: Mapping[str, float]) -> None:
        """Add what :meth:`so_far` returned in an earlier process of the run; what is missing is 0."""
        for part in PARTS:
            self._spent[part] += earlier.get(part, 0.0)
        self._before += sum(earlier.get(part, 0.0) for part in (*PARTS, "other"))


def in_words(spent: Mapping[str, float]) -> str:
    """The elapsed time and the share of each part, the largest first: ``9.8 s: training 83 %, evaluation 4 %, ...``."""
    whole = sum(spent.values())
    shares = sorted(spent.items(), key=lambda item: -item[1])
    return f"{whole:.1f} s: " + ", ".join(f"{part} {100 * seconds / (whole or 1):.0f} %" for part, seconds in shares)
