"""Where the time of a task goes: making data, training steps, evaluation, checkpoints, and all the rest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

PARTS = ("data", "training", "evaluation", "checkpoints")
"""What is measured. ``other`` is what they leave of the elapsed time."""

_Item = TypeVar("_Item")

_END = object()


class Clock:
    """Adds up the seconds of each part since the last :meth:`take`. While a part runs inside another one, the time
    belongs to the inner one.

    On a GPU the parts have to end by reading a number from the device, as an epoch and an evaluation do: else the work
    of one would be counted in the next. The wait for a batch is a part of its own even if the GPU works meanwhile.
    """

    def __init__(self) -> None:
        self._began = self._since = time.perf_counter()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._before = 0.0
        self._running: list[str] = []

    @contextmanager
    def measures(self, part: str) -> Iterator[None]:
        """Count the block as this part."""
        self._count()
        self._running.append(part)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def measures_each(self, part: str, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items; count as this part what it takes to get them."""
        iterator = iter(items)
        while True:
            with self.measures(part):
                item: Any = next(iterator, _END)
            if item is _END:
                return
            yield item

    def _count(self) -> None:
        """Count the time since the last call for the part that runs."""
        now = time.perf_counter()
        if self._running:
            self._spent[self._running[-1]] += now - self._since
        self._since = now

    def so_far(self) -> dict[str, float]:
        """The seconds of each part and of ``other``. Their sum is the elapsed time."""
        elapsed = self._before + time.perf_counter() - self._began
        return {**self._spent, "other": max(0.0, elapsed - sum(self._spent.values()))}

    def take(self) -> dict[str, float]:
        """:meth:`so_far`, and begin anew."""
        self._count()
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
