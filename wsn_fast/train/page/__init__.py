"""One HTML page that compares runs. It holds everything it shows: no network, and no script."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from wsn_fast import __version__
from wsn_fast.train.checkpoint import write_atomic
from wsn_fast.train.page import compare
from wsn_fast.train.page.markup import Html, fill, join, load
from wsn_fast.train.page.numbers import Entry
from wsn_fast.train.page.single import notes, section
from wsn_fast.train.records import Record


def write(path: Path, runs: Sequence[Record], problems: Sequence[str] = ()) -> None:
    """Write the page.

    Args:
        path: the file, replaced if it is there.
        runs: at least one.
        problems: why other runs are not there.

    Raises:
        OSError: it cannot be written.
    """
    write_atomic(path, render(runs, problems, datetime.now(timezone.utc)).encode())


def render(runs: Sequence[Record], problems: Sequence[str], made: datetime) -> Html:
    """The page as text; arguments as for :func:`write`, and the time that it is said to be made."""
    entries = [Entry(number, run) for number, run in enumerate(runs, 1)]
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}"
    parts = [("summary", "Summary"), ("side-by-side", "Side by side"), ("settings", "Settings")]
    parts += [("paths", "Paths chosen"), *((f"run-{entry.number}", entry.label) for entry in entries)]
    return fill(
        load("page.html"),
        title=title,
        style=Html(load("style.css")),
        iso=made.isoformat(timespec="seconds"),
        date=f"{made:%Y-%m-%d at %H:%M} UTC",
        version=__version__,
        contents=join(fill('<li><a href="#$id">$name</a></li>\n', id=name, name=text) for name, text in parts),
        problems=notes("These could not be read", problems),
        summary=compare.summary(entries),
        charts=compare.charts(entries),
        settings=compare.settings(entries),
        paths=compare.paths(entries),
        runs=join(map(section, entries)),
    )
