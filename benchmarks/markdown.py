"""A report as Markdown, and the ratios that the project has set itself as targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .data import DISTRIBUTIONS
from .rows import Row
from .shapes import LAYER


class Key(NamedTuple):
    """A row by what it measures."""

    operation: str
    shape: str
    contender: str

    def __str__(self) -> str:
        return f"{self.contender} ({self.operation} {self.shape})"


class Target(NamedTuple):
    """The time of ``first`` over that of ``second``, or over so many microseconds, at most or at least ``bound``."""

    first: Key
    second: Key | float
    bound: float
    at_most: bool = True


def _step(rows: str, first: str, second: str, bound: float, at_most: bool) -> Target:
    return Target(Key("linear step", rows, first), Key("linear step", rows, second), bound, at_most)


def _threshold(first: str, second: str, bound: float) -> Target:
    return Target(Key("threshold", _LAYER, first), Key("threshold", _LAYER, second), bound, False)


_LAYER = str(LAYER)
OURS, ONE_PASS, COMPILED = "ours", "ours, one pass", "competent, compiled"
TARGETS = (
    _step("4096x4096 b32", OURS, "dense", 1.40, True),
    _step("4096x4096 b256", OURS, "dense", 1.35, True),
    _step("4096x4096 b4096", OURS, "dense", 1.10, True),
    _step("4096x4096 b16384", OURS, "dense", 1.05, True),
    *(_step("4096x4096 b32", baseline, OURS, 4, False) for baseline in ("competent", COMPILED)),
    *(_step("4096x4096 b4096", baseline, OURS, 2, False) for baseline in ("competent", COMPILED)),
    _step("4096x4096 b256", "paper", OURS, 150, False),
    _step("4096x4096 b256", "CLArena", OURS, 50, False),
    *(_step(f"{n}x{n} b64", "paper", OURS, 4, False) for n in (1024, 2048)),
    *(_step(f"{n}x{n} b64", "CLArena", OURS, 12, False) for n in (1024, 2048)),
    _threshold("kthvalue", "native backend", 10),
    _threshold("CLArena", "native backend", 40),
    *(Target(Key("threshold", _LAYER, ours), 45.0, 1) for ours in ("CUDA, cold", "triton backend")),
    Target(Key("threshold", _LAYER, "CUDA, warm"), 25.0, 1),
    *(
        Target(Key("threshold", f"{_LAYER}, {kind}", ours), Key("threshold", _LAYER, ours), 2)
        for ours in ("CUDA, cold", "triton backend", "native backend")
        for kind in DISTRIBUTIONS
        if kind != "normal"
    ),
)
"""What the project has set itself; those for a GPU are for an H200."""


_LEGEND = """Times in microseconds per call. `x floor` is the median over the floor, which is computed from the bytes
and operations that the row must do and the rates that the first section measured; `x best` is the median over the
smallest of the rows that do the same work. Every time stands beside the check of its own call."""


def markdown(title: str, facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report.

    Args:
        title: its heading.
        facts: provenance and rates, as a list.
        rows: in the order of the sections.
    """
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [_LEGEND, ""]
    lines += _targets(rows)
    for section in dict.fromkeys(row.section for row in rows):
        lines += _section(section, [row for row in rows if row.section == section])
    return "\n".join(lines) + "\n"


def _targets(rows: Sequence[Row]) -> list[str]:
    times = {Key(row.operation, row.shape, row.contender): row.median_us for row in rows if row.median_us}
    lines = []
    for target in TARGETS:
        ratio, in_one_pass = (_ratio(target, times, ours) for ours in (OURS, ONE_PASS))
        if ratio is not None:
            met = ratio <= target.bound if target.at_most else ratio >= target.bound
            over = f"{target.second:g} us" if isinstance(target.second, float) else str(target.second)
            bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
            other = _number(in_one_pass) if target.first.operation == "linear step" else ""
            verdict = "met" if met else "**missed**"
            lines.append(line((f"{target.first} / {over}", _number(ratio), bound, verdict, other)))
    columns = ("ratio", "measured", "target", "", f"with *{ONE_PASS}*")
    return ["## Targets", "", *head(columns), *lines, ""] if lines else []


def _ratio(target: Target, times: Mapping[Key, float], ours: str) -> float | None:
    """What was measured, with the row ``ours`` in the place of :data:`OURS`; None without both times."""

    def time_of(key: Key | float) -> float | None:
        if isinstance(key, float):
            return key
        return times.get(key._replace(contender=ours) if key.contender == OURS else key)

    first, second = time_of(target.first), time_of(target.second)
    return first / second if first and second else None


def _section(name: str, rows: Sequence[Row]) -> list[str]:
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.median_us is not None:
            best[row.group] = min(row.median_us, best.get(row.group, row.median_us))
    columns = ("operation", "contender", "shape", "dtype", "median", "p20", "p80", "floor", "x floor", "x best")
    lines = [f"## {name}", "", *head((*columns, "how", "check, or why there is no time"))]
    for row in rows:
        over_best = row.median_us / best[row.group] if row.median_us else None
        numbers = (row.median_us, row.p20_us, row.p80_us, row.floor_us, row.ratio, over_best)
        verdict = row.check if row.status == "ok" else f"**{row.status}**: {row.error}"
        notes = "".join(f"; {key} {value:.4g}" for key, value in row.notes.items() if key != "amount")
        cells = (row.operation, row.contender, row.shape, row.dtype, *map(_number, numbers), row.how, verdict + notes)
        lines.append(line(cells))
    return [*lines, ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def head(columns: Sequence[str]) -> list[str]:
    """The two lines with which a table begins."""
    return [line(columns), line(["---"] * len(columns))]


def line(cells: Iterable[str]) -> str:
    """A line of a table; what would break it is taken out of the cells."""
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
