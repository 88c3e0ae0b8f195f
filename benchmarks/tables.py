"""The one writer of tables: the compact table at the end of ``pytest benchmarks``, and the whole report as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .memory import NOTE
from .rows import Row

SUMMARY = ("linear step", "net step", "conv step", "inference", "threshold")
"""The operations of the compact table."""
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "ours, one pass": ("ours, one pass",),
    "ours, one pass, 8 bits": ("ours, one pass, 8 bits",),
    "ours": ("ours",),
    "ours, guarded": ("ours, guarded",),
    "dense": ("dense",),
    "best eager": ("best eager", "sort", "topk", "kthvalue"),
    "paper": ("paper",),
    "CLArena": ("CLArena",),
}
"""The columns of the compact table, and the contenders that each stands for: the fastest of these is shown."""
_LEGEND = """Times in microseconds per call. GB/s and TFLOP/s are what the call must move and compute at least, over its
median: compare them with the first section. `x best` is the median over the smallest of the rows that do the same work.
Every call was checked in the same run."""


# --- the compact table
def summary(facts: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """The compact table of ratios, with the machine and the commit above it; no lines without a time to show.

    A cell is the median in milliseconds and its ratio to the library's first column. A row without a time was not
    right, or does not exist on this machine; what was wrong is listed below the table.
    """
    shown = sorted((row for row in rows if row.operation in SUMMARY), key=lambda row: SUMMARY.index(row.operation))
    wrong = [f"no time for {r.contender}, {r.operation} {r.shape}: {r.status}, {r.error}" for r in shown if r.is_fault]
    timed = [row for row in shown if row.median_us]
    if not timed:
        return wrong
    times = _compact("median in ms, and ratio to ours", timed, lambda row: (row.median_us or 0) / 1e3)
    lines = [where(facts), "", *times]
    if any(NOTE in row.notes for row in timed):
        lines += ["", *_compact(NOTE, timed, lambda row: row.notes.get(NOTE))]
    return [*lines, *wrong]


def where(facts: Mapping[str, Any]) -> str:
    """One line that says where results come from."""
    commit = f"{str(facts['commit'])[:7]}{' with changes' if facts['dirty'] else ''}"
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    return f"{facts['device']}, {threads}, torch {facts['torch']}, commit {commit}, {str(facts['date'])[:10]}"


def _compact(title: str, rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[str]:
    """What was measured by columns."""
    values: dict[tuple[str, str], float] = {}
    labels = list(dict.fromkeys(f"{row.operation} {row.shape}" for row in rows))
    for row in rows:
        column = next((name for name, contenders in COLUMNS.items() if row.contender in contenders), None)
        number, key = value(row), (f"{row.operation} {row.shape}", column or "")
        if column and number is not None:
            values[key] = min(number, values.get(key, number))
    columns = [name for name in COLUMNS if any(name == column for _, column in values)]
    cells = []
    for label in labels:
        ours = next((values[label, name] for name in columns if (label, name) in values), None)
        if ours:
            numbers = (values.get((label, name)) for name in columns)
            texts = ["" if n is None else f"{three_digits(n)} {three_digits(n / ours)}x" for n in numbers]
            cells.append((label, *texts))
    return table((title, *columns), cells)


# --- the report
def markdown(title: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report: its heading, where it comes from, and the rows in the order of the sections."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), "", _LEGEND, ""]
    if "commit" in facts:
        lines += ["## In short", "", *summary(facts, rows), ""]
    for section in dict.fromkeys(row.section for row in rows):
        lines += _section(section, [row for row in rows if row.section == section])
    return "\n".join(lines) + "\n"


def _section(name: str, rows: Sequence[Row]) -> list[str]:
    def same_work(row: Row) -> tuple[str, str, str]:
        return row.operation, row.shape, row.dtype

    timed = sorted((row for row in rows if row.median_us), key=lambda row: -(row.median_us or 0))
    best = {same_work(row): row.median_us for row in timed}  # the last one, which is the fastest, stays
    columns = ("operation", "contender", "shape", "dtype", "median", "p20", "p80", "x best", "GB/s", "TFLOP/s")
    cells = []
    for row in rows:
        over_best = row.median_us / best[same_work(row)] if row.median_us else None
        rates = [
            amount / row.median_us / scale if row.median_us and amount else None
            for amount, scale in ((row.bytes, 1e3), (row.flops, 1e6))
        ]
        numbers = (row.median_us, row.p20_us, row.p80_us, over_best, *rates)
        verdict = row.check if row.status == "ok" else f"**{row.status}**: {row.error}"
        notes = "".join(f"; {key} {value:.4g}" for key, value in row.notes.items())
        names = (row.operation, row.contender, row.shape, row.dtype)
        cells.append((*names, *map(_number, numbers), row.how, verdict + notes))
    lines = [f"## {name}", "", *table((*columns, "how", "check, or why there is no time"), cells, align=False)]
    return [*lines, ""]


# --- cells and lines
def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, align: bool = True) -> list[str]:
    """The lines of a Markdown table; ``align`` pads the cells, for a reader of the text itself."""
    lines = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) if align else 0 for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * max(3, width + 2) for width in widths) + "|"
    return [texts[0], rule, *texts[1:]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def three_digits(value: float) -> str:
    """Three significant digits, and more only in front of the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"
