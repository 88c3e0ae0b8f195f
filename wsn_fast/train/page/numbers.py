"""The format of numbers, names and runs on the page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from wsn_fast.train.figures import colour
from wsn_fast.train.page.markup import Html, escape, fill
from wsn_fast.train.records import Record

NONE = Html("&ndash;")


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


def fixed(value: float | None, digits: int = 2, *, sign: bool = False) -> Html:
    """A number with ``digits`` digits after the point; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # a zero has no minus
        text = text.replace("-", "+" if sign else "")
    return Html(text.replace("-", "&minus;"))


def rate(value: float | None) -> Html:
    """A whole number with separated thousands; a dash for None."""
    return NONE if value is None else escape(f"{value:,.0f}")


def duration(seconds: float) -> str:
    """Seconds in words; a dash for 0."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds else NONE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
