"""The tables that ``wsn-fast report`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from wsn_fast.train.paper_numbers import PAPER_COLUMNS, PAPER_DENSITIES, PAPER_RESULTS, Key, beside_paper
from wsn_fast.train.seeds import AVERAGED, Row, setting

_CAPTION = "In percent. CAP with the paper's constant mask compression of 78 %, CAP* with the measured one."
_OVER_SEEDS = "Mean +- sample standard deviation (n - 1) over the seeds of finished runs that differ in nothing else."
_NUMBERS = ("ACC", "BWT", "FWT", "CAP", "CAP*")
SAME = "nothing but perhaps seed and device"
_PAPER = ("paper: ACC", "paper: CAP", "differs in")


def of_runs(runs: Mapping[str, Mapping[str, Any]], columns: int | None = None) -> str:
    """A table of runs as text. A run with the paper's setting has the paper's numbers beside its own.

    Args:
        runs: the results of runs by name.
        columns: characters of a line. A table that is wider becomes a paragraph for each run. None means any number.
    """
    rows = []
    for name, results in runs.items():
        settings, done = results["config"], len(results["accuracy_matrix"])
        what = setting(settings) + ("" if done == settings["tasks"] else f", {done} done")
        numbers = [f"{results[key]:.2f}" for key in AVERAGED]
        rows.append((name, what, f"{settings['density']:g}", *numbers, *_beside(beside_paper(results))))
    return _fitted(("run", "setting", "c", *_NUMBERS, *_PAPER), rows, (0, 1, 10), _CAPTION, columns)


def of_seeds(rows: Sequence[Row], columns: int | None = None) -> str:
    """A table of means over seeds as text, with the paper's numbers beside them. ``columns`` as above."""
    cells = [
        (
            row.setting,
            row.count,
            f"{row.settings['density']:g}",
            *(row.numbers[name].text() for name in AVERAGED),
            *_beside(row.paper),
        )
        for row in rows
    ]
    return _fitted(("setting", "seeds", "c", *_NUMBERS, *_PAPER), cells, (0, 10), _OVER_SEEDS, columns)


def _beside(paper: tuple[float, float, str] | None) -> tuple[str, str, str]:
    return (f"{paper[0]:.2f}", f"{paper[1]:.2f}", paper[2]) if paper else ("-", "-", "")


# --- the paper's table ------------------------------------------------------------------------------------
def of_paper(rows: Sequence[Row], columns: int | None = None) -> str:
    """The paper's table (ACC / CAP), with ours below it where a row has the paper's setting, and in what it differs.

    Args:
        rows: the rows over seeds.
        columns: characters of a line. If the table is wider, every column of it becomes a table. None means any number.
    """
    known = [row for row in rows if row.paper is not None]
    marks = {id(row): number for number, row in enumerate(known, 1)}
    cells: dict[tuple[Key, float], list[str]] = {}
    for row in known:
        acc, cap = (row.numbers[name].text() for name in ("acc", "capacity_paper"))
        cells.setdefault((column_of(row), row.settings["density"]), []).append(f"{acc} / {cap} [{marks[id(row)]}]")
    text = _matrix(cells, list(PAPER_COLUMNS))
    if columns is not None and max(map(len, text.splitlines())) > columns:
        text = "\n\n".join(_matrix(cells, [key]) for key in PAPER_COLUMNS)
    notes = [
        f"[{marks[id(row)]}] {PAPER_COLUMNS[column_of(row)]}, c {row.settings['density']:g}, seeds: {row.count}; "
        f"differs in {(row.paper and row.paper[2]) or SAME}"
        for row in known
    ]
    notes = notes or ["No finished run has a setting of this table."]
    about = (
        "ACC / CAP in percent, CAP with the paper's constant mask compression of 78 %. "
        "Ours: mean +- sample standard deviation (n - 1) over seeds."
    )
    width = columns or max(map(len, text.splitlines()))
    return "\n".join([text, "", *_wrapped([about, *notes], width)])


def column_of(row: Row) -> Key:
    """The column of the paper's table that has the setting of a row."""
    return row.settings["stream"], row.settings["data"], row.settings["tasks"]


def _matrix(cells: Mapping[tuple[Key, float], Sequence[str]], keys: Sequence[Key]) -> str:
    lines = [("c", "", *(PAPER_COLUMNS[key] for key in keys))]
    for density in PAPER_DENSITIES:
        paper = [PAPER_RESULTS[key][density] for key in keys]
        lines.append((f"{density:g}", "paper", *(f"{acc:.2f} / {cap:.2f}" for acc, cap in paper)))
        ours = [cells.get((key, density), ()) for key in keys]
        lines += [
            ("", "ours", *(cell[i] if i < len(cell) else "" for cell in ours)) for i in range(max(map(len, ours)))
        ]
    return _aligned(lines, range(len(lines[0])))


# --- layout -----------------------------------------------------------------------------------------------
def _fitted(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int], caption: str, columns: int | None
) -> str:
    """A table with its caption below. If it is wider than ``columns``, a paragraph for each row."""
    text = _aligned([head, *rows], left)
    if columns is not None and max(map(len, text.splitlines())) > columns:
        return "\n\n".join([*(_paragraph(head, row, columns) for row in rows), "\n".join(wrap(caption, columns))])
    return f"{text}\n{caption}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Rows in columns. The texts of the columns ``left`` begin below each other, and those of the others end so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _paragraph(names: Sequence[str], values: Sequence[str], columns: int) -> str:
    """A row of a table as lines of ``columns`` characters: its first two cells, and the others with their names."""
    numbers = [f"{name} {value}" for name, value in zip(names[2:], values[2:], strict=True) if value not in ("", "-")]
    second = values[1] if names[1] == "setting" else f"{names[1]} {values[1]}"
    text = [values[0], second, ", ".join(numbers)]
    return "\n".join(
        line
        for i, part in enumerate(text)
        for line in wrap(part, columns, initial_indent="  " * (i > 0), subsequent_indent="    ")
    )


def _wrapped(lines: Sequence[str], columns: int) -> list[str]:
    return [part for line in lines for part in wrap(line, columns, subsequent_indent="    ")]
