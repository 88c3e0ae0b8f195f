"""Measurements are made until the time is up, and a failure costs one of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from .scrub import scrubbed

T = TypeVar("T")
Say = Callable[[str], object]
"""Takes a line of progress."""


def say_at_once(line: str) -> None:
    """Print a line, also into a pipe."""
    print(line, flush=True)


class Attempts:
    """Makes measurements until ``deadline``, of ``time.monotonic``.

    Attributes:
        not_measured: a line for everything that failed or that there was no time for.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.not_measured: list[str] = []

    def attempt(self, what: str, measure: Callable[[], T]) -> T | None:
        """The result of ``measure``; None, and a line in ``not_measured``, if it failed or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.not_measured.append(f"{what}: no time left")
            return None
        return self.finish(what, measure)

    def finish(self, what: str, measure: Callable[[], T]) -> T | None:
        """Do what :meth:`attempt` does, whatever the time is: for the rest of something that was begun."""
        try:
            torch.manual_seed(0)
            return measure()
        except Exception as error:  # one that does not compile or is wrong must not cost the rest
            self.not_measured.append(f"{what}: {scrubbed(f'{type(error).__name__}: {error}')[:220]}")
            return None
