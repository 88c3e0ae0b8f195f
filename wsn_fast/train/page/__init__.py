"""An HTML page that compares runs. It contains everything that it shows, and needs neither network nor script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from wsn_fast import __version__
from wsn_fast.page.markup import Html, fill, join, load, notes, style
from wsn_fast.train.page import compare
from wsn_fast.train.page.numbers import Entry
from wsn_fast.train.page.single import section
from wsn_fast.train.records import Record
from wsn_fast.train.safe_files import write_atomic


def write(path: Path, runs: Sequence[Record], problems: Sequence[str] = ()) -> None:
    """Write the page.

    Args:
        path: the file, replaced if it is there.
        runs: at least one.
        problems: the reasons why other runs are missing.

    Raises:
        OSError: the page cannot be written.
    """
    write_atomic(path, render(runs, problems, datetime.now(timezone.utc)).encode())


def render(runs: Sequence[Record], problems: Sequence[str], made: datetime) -> Html:
    """The page as text. The arguments are those of :func:`write`, and the time to show as the time of the page."""
    entries = [Entry(number, run) for number, run in enumerate(runs, 1)]
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}"
    parts = [("summary", "Summary"), ("side-by-side", "Side by side"), ("settings", "Settings")]
    parts += [("paths", "Paths chosen"), *((f"run-{entry.number}", entry.label) for entry in entries)]
    return fill(
        load(Path(__file__).with_name("page.html")),
        title=title,
        style=style(),
        iso=made.isoformat(timespec="seconds"),
        date=f"{made:%Y-%m-%d at %H:%M} UTC",
        version=__version__,
        contents=join(fill('<li><a href="#$id">$name</a></li>\n', id=name, name=text) for name, text in parts),
        problems=notes("These could not be read", problems),
        summary=_of_those_it_can(compare.summary, entries),
        charts=_of_those_it_can(compare.charts, entries),
        settings=_of_those_it_can(compare.settings, entries),
        paths=_of_those_it_can(compare.paths, entries),
        runs=join(_of_those_it_can(lambda one: section(one[0]), [entry]) for entry in entries),
    )


def _of_those_it_can(show: Callable[[Sequence[Entry]], Html], entries: Sequence[Entry]) -> Html:
    """A part of the page. A run that it cannot show is named, and does not keep the others off the page."""
    try:
        return show(entries)
    except Exception as error:
        if len(entries) == 1:
            return notes(f"Run {entries[0].number} cannot be shown here", [repr(error)])
    shown, failed = [], []
    for entry in entries:
        try:
            show([entry])
            shown.append(entry)
        except Exception as error:
            failed.append(f"{entry.label}: {error!r}")
    return join([notes("These runs cannot be shown here", failed), show(shown) if shown else Html("")])
