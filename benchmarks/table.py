"""Compact tables of what ``pytest benchmarks --benchmark-json FILE`` has stored: ``python -m benchmarks.table FILE``.

Markdown on standard output, a table for each operation: contenders by shapes, each cell the median in milliseconds and
its ratio to that of the library's own row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .markdown import head, line
from .memory import NOTE

OURS = ("ours", "native backend", "triton", "torch backend")
"""How the name of the library's own row begins: the first of these that there is, and the first such row."""


class Time(NamedTuple):
    """A stored result: a contender for an operation at a shape, its median and its interquartile range in seconds, and
    the peak memory in bytes per weight where it was measured."""

    operation: str
    shape: str
    dtype: str
    contender: str
    median: float
    spread: float
    memory: float | None = None


def times_of(stored: Mapping[str, Any]) -> list[Time]:
    """The results in a file of pytest-benchmark's, in the order of the run."""
    found = []
    for entry in stored["benchmarks"]:
        case, stats = entry["extra_info"], entry["stats"]
        names = (case["operation"], case["shape"], case["dtype"], case["contender"])
        found.append(Time(*names, stats["median"], stats["iqr"], case.get("notes", {}).get(NOTE)))
    return found


def table(facts: Mapping[str, Any], times: Sequence[Time]) -> str:
    """All operations, and then where the numbers come from.

    Args:
        facts: see :func:`benchmarks.provenance.provenance`.
        times: at least one.
    """
    lines: list[str] = []
    for operation, dtype in dict.fromkeys((time.operation, time.dtype) for time in times):
        of_operation = [time for time in times if (time.operation, time.dtype) == (operation, dtype)]
        lines += [*_rows(f"{operation}, {dtype}, ms", of_operation, lambda time: 1e3 * time.median), ""]
        if any(time.memory for time in of_operation):
            lines += [*_rows(f"{operation}, {dtype}, {NOTE}", of_operation, lambda time: time.memory), ""]
    lines += ["Medians; in brackets the ratio to the library's own row. Each result was checked in the same run."]
    commit = facts["commit"][:7] + (" with changes" if facts["dirty"] else "")
    lines += [f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {commit}, {facts['date'][:10]}."]
    widest = max(times, key=lambda time: time.spread / time.median)
    row = f"{widest.contender}, {widest.operation} {widest.shape}"
    lines += [f"The widest interquartile range is {widest.spread / widest.median:.0%} of its median ({row})."]
    return "\n".join(lines) + "\n"


def _rows(title: str, times: Sequence[Time], value: Callable[[Time], float | None]) -> Iterator[str]:
    """Contenders by those shapes that have values."""
    values = {(time.shape, time.contender): value(time) for time in times if value(time) is not None}
    shapes = list(dict.fromkeys(shape for shape, _ in values))
    ours = {shape: _ours({name: v for (s, name), v in values.items() if s == shape}) for shape in shapes}
    yield from head((title, *shapes))
    for contender in dict.fromkeys(contender for _, contender in values):
        yield line((contender, *(_cell(values.get((shape, contender)), ours[shape]) for shape in shapes)))


def _ours(values: Mapping[str, float | None]) -> float | None:
    """The value of the library's row."""
    return next((value for name in OURS for own, value in values.items() if own.startswith(name)), None)


def _cell(value: float | None, ours: float | None) -> str:
    if value is None:
        return ""
    return _three_digits(value) + (f" ({_three_digits(value / ours)}x)" if ours else "")


def _three_digits(value: float) -> str:
    """Three significant digits, and more only in front of the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("file", type=Path, help="what pytest-benchmark has written")
    stored = json.loads(parser.parse_args(arguments).file.read_text("utf-8"))
    print(table(stored["machine_info"], times_of(stored)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
