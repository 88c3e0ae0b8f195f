"""Runs on the page, and their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wsn_fast.page.markup import Html, fill
from wsn_fast.train.figures import colour
from wsn_fast.train.records import Record


class Entry(NamedTuple):
    """A run on the page, with its number there."""

    number: int
    run: Record

    @property
    def label(self) -> str:
        """A short name for pictures."""
        name = Path(self.run.name).resolve().name
        short = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
        # A font has no glyph for a character that is not printable.
        return f"{self.number} " + "".join(c if c.isprintable() else "?" for c in short)

    @property
    def swatch(self) -> Html:
        """The colour of the run in pictures."""
        return fill('<span class="swatch" style="background:$colour"></span>', colour=colour(self.number))

    @property
    def link(self) -> Html:
        """The whole name, as a link to the section of the run."""
        return fill('<a href="#run-$number">$name</a>', number=self.number, name=self.run.name)


def total_seconds(run: Record) -> float:
    """The time of all epochs."""
    return sum(task.seconds for task in run.tasks)


def samples_per_second(run: Record) -> float | None:
    """Training samples per second over all epochs; None if the samples of a task are not known."""
    if not total_seconds(run) or any(task.train_samples is None for task in run.tasks):
        return None
    return sum((task.train_samples or 0) * task.epochs for task in run.tasks) / total_seconds(run)


def span(values: Iterable[float]) -> str:
    """The smallest and the largest value, in words."""
    known = list(values)
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    return f"all {low} %" if low == high else f"from {low} to {high} %"
