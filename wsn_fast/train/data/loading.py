"""Shows how far the reading of data is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")


class Shows(Protocol):
    """Shows how many items of a loop are done."""

    def __call__(self, items: Iterable[_Item], total: int, what: str) -> Iterable[_Item]:
        """The items, and show meanwhile how many of ``total`` are done. ``what`` says in a few words what is done."""


def shows_nothing(items: Iterable[_Item], total: int, what: str) -> Iterable[_Item]:
    """Shows nothing."""
    return items
