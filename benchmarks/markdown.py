"""A report as Markdown, and the ratios that the project has set itself as targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .data import DISTRIBUTIONS
from .memory import NOTE
from .rows import Row
from .shapes import LAYER, MLP


class Key(NamedTuple):
    """A row by what it measures."""

    operation: str
    shape: str
    contender: str

    def __str__(self) -> str:
        return f"{self.contender} ({self.operation} {self.shape})"


class Target(NamedTuple):
    """The value of ``first`` over that of ``second``, or over a number, at most or at least ``bound``. Values are
    microseconds; those of memory, bytes per weight.

    "ours" stands for the library: its one-pass step is what the targets are for, and its other rows are shown too.
    """

    first: Key
    second: Key | float
    bound: float
    at_most: bool = True

    def verdict(self, ratio: float) -> str:
        """Met, or by how much it was missed."""
        missing = ratio / self.bound if self.at_most else self.bound / ratio
        return "met" if missing <= 1 else f"**missed** by {missing - 1:.0%}"

    def __str__(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"


def _step(shape: str, first: str, second: str, bound: float, at_most: bool) -> Target:
    return Target(Key("linear step", shape, first), Key("linear step", shape, second), bound, at_most)


def _threshold(first: str, second: str, bound: float) -> Target:
    return Target(Key("threshold", _LAYER, first), Key("threshold", _LAYER, second), bound, False)


_LAYER = str(LAYER)
OURS, ONE_PASS, CAPTURED = "ours", "ours, one pass", "ours, captured"
LIBRARY = (OURS, "ours, guarded", ONE_PASS, CAPTURED, "ours, one pass, captured", "ours, compiled")
_COMPILED, _MEMORY = "competent, compiled", "memory of a "
TARGETS = (
    _step("4096x4096 b32", OURS, "dense", 1.40, True),
    _step("4096x4096 b256", OURS, "dense", 1.35, True),
    _step("4096x4096 b4096", OURS, "dense", 1.10, True),
    _step("4096x4096 b16384", OURS, "dense", 1.05, True),
    *(_step("4096x4096 b32", baseline, OURS, 4, False) for baseline in ("competent", _COMPILED)),
    *(_step("4096x4096 b4096", baseline, OURS, 2, False) for baseline in ("competent", _COMPILED)),
    *(_step(f"4096x4096 b{rows}", "paper", OURS, 150, False) for rows in (32, 256, 4096)),
    *(_step(f"4096x4096 b{rows}", "CLArena", OURS, 50, False) for rows in (32, 256, 4096)),
    Target(Key(f"{_MEMORY}linear step", "4096x4096 b32", OURS), 30.0, 1),
    Target(Key("net step", str(MLP), "paper"), Key("net step", str(MLP), CAPTURED), 10, False),
    _step("2048x2048 b64", OURS, "dense", 1.8, True),
    *(_step(f"{n}x{n} b64", "paper", OURS, bound, False) for n, bound in ((1024, 4), (2048, 5))),
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
Values = Mapping[Key, float]


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
    values = {Key(row.operation, row.shape, row.contender): row.median_us for row in rows if row.median_us}
    values |= {
        Key(_MEMORY + row.operation, row.shape, row.contender): row.notes[NOTE] for row in rows if NOTE in row.notes
    }
    lines += _targets(values)
    for section in dict.fromkeys(row.section for row in rows):
        lines += _section(section, [row for row in rows if row.section == section], values)
    return "\n".join(lines) + "\n"


def _targets(values: Values) -> list[str]:
    lines = []
    for target in TARGETS:
        ratio, standard = (_ratio(target, values, ours) for ours in (ONE_PASS, OURS))
        if ratio is not None:
            first, second = (_shown(key, target) for key in (target.first, target.second))
            other = _number(standard) if OURS in _contenders(target) else ""
            lines.append(line((f"{first} / {second}", _number(ratio), str(target), target.verdict(ratio), other)))
    return ["## Targets", "", *head(("ratio", "measured", "target", "", f"with *{OURS}*")), *lines, ""] if lines else []


def _contenders(target: Target) -> list[str]:
    return [key.contender for key in (target.first, target.second) if isinstance(key, Key)]


def _shown(key: Key | float, target: Target) -> str:
    if isinstance(key, Key):
        return str(_of(key, ONE_PASS))
    return f"{key:g} {'B' if target.first.operation.startswith(_MEMORY) else 'us'}"


def _of(key: Key, ours: str) -> Key:
    """The key with the row ``ours`` in the place of :data:`OURS`."""
    return key._replace(contender=ours) if key.contender == OURS else key


def _ratio(target: Target, values: Values, ours: str) -> float | None:
    """What was measured, with the row ``ours`` in the place of :data:`OURS`; None without both values."""
    first, second = (
        values.get(_of(key, ours)) if isinstance(key, Key) else key for key in (target.first, target.second)
    )
    return first / second if first and second else None


def _beside(row: Row, values: Values) -> str:
    """The targets of a row, with what it reaches."""
    texts = []
    for target in TARGETS:
        keys = [key for key in (target.first, target.second) if isinstance(key, Key)]
        subject = next((key for key in keys if key.contender in LIBRARY), target.first)
        if row.operation != subject.operation.removeprefix(_MEMORY) or row.shape != subject.shape:
            continue
        wanted = LIBRARY if subject.contender == OURS else (subject.contender,)
        ratio = _ratio(target, values, row.contender) if row.contender in wanted else None
        if ratio is not None:
            memory = "memory over " if target.first.operation.startswith(_MEMORY) else ""
            other = next((key for key in (target.first, target.second) if key is not subject), None)
            name = other.contender if isinstance(other, Key) else _shown(other or 0.0, target)
            texts.append(f"{memory}{name}: {ratio:.2f}, {target}, {target.verdict(ratio)}")
    return "; ".join(texts)


def _section(name: str, rows: Sequence[Row], values: Values) -> list[str]:
    best: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.median_us is not None:
            best[row.group] = min(row.median_us, best.get(row.group, row.median_us))
    columns = ("operation", "contender", "shape", "dtype", "median", "p20", "p80", "floor", "x floor", "x best")
    lines = [f"## {name}", "", *head((*columns, "how", "check, or why there is no time", "targets"))]
    for row in rows:
        over_best = row.median_us / best[row.group] if row.median_us else None
        numbers = (row.median_us, row.p20_us, row.p80_us, row.floor_us, row.ratio, over_best)
        verdict = row.check if row.status == "ok" else f"**{row.status}**: {row.error}"
        notes = "".join(f"; {key} {value:.4g}" for key, value in row.notes.items() if key != "amount")
        cells = (row.operation, row.contender, row.shape, row.dtype, *map(_number, numbers), row.how, verdict + notes)
        lines.append(line((*cells, _beside(row, values))))
    profiles = [text for row in rows if row.kernels for text in ("", *_profile(row))]
    return [*lines, *profiles, ""]


def _profile(row: Row) -> list[str]:
    """The kernels of a row's call; one over 5 % of the time that nobody can explain stands out."""
    lines = [f"**{row.contender}, {row.shape}**, by torch's profiler, for one call:", ""]
    lines += head(("kernel", "calls", "us", "share", "what it does", "least MB", "GB/s"))
    for kernel in row.kernels:
        what = kernel.role or ("**not known**" if kernel.share > 0.05 else "")
        moved = (None, None) if kernel.bytes is None else (kernel.bytes / 1e6, kernel.bytes / kernel.us / 1e3)
        cells = (kernel.name, f"{kernel.calls:g}", _number(kernel.us), f"{kernel.share:.1%}", what)
        lines.append(line((*cells, *map(_number, moved))))
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def head(columns: Sequence[str]) -> list[str]:
    """The two lines with which a table begins."""
    return [line(columns), line(["---"] * len(columns))]


def line(cells: Iterable[str]) -> str:
    """A line of a table; what would break it is taken out of the cells."""
    return "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in cells) + " |"
