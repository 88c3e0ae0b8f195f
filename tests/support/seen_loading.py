"""What the reading of data shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_Item = TypeVar("_Item")


class Seen:
    """Notes what is shown: for each loop how many items were done, and how many there should be."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}

    def __call__(self, items: Iterable[_Item], total: int, what: str) -> Iterable[_Item]:
        for done, item in enumerate(items, 1):
            yield item
            self.counts[what] = (done, total)
