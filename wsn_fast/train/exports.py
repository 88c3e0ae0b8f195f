"""The numbers of runs as CSV for other programs, and as a LaTeX table for a paper.

Names of folders and texts of runs are of unknown origin. In CSV no cell is a formula, and in LaTeX no character of
them is a command.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from wsn_fast.train.config import PLACES, TrainConfig
from wsn_fast.train.paper_numbers import PAPER_COLUMNS, beside_paper
from wsn_fast.train.records import Record
from wsn_fast.train.seeds import Row, Spread
from wsn_fast.train.tables import SAME, column_of

_SINGLE = ("acc", "bwt", "fwt", "capacity_paper", "capacity", "union_density", "compression")
_SETTINGS = tuple(field.name for field in fields(TrainConfig) if field.name not in PLACES)
_VERSIONS = ("wsn_fast", "torch", "python", "device")


# --- CSV --------------------------------------------------------------------------------------------------
def csv_of_runs(runs: Sequence[Record]) -> bytes:
    """A line for each run, in UTF-8: its numbers with all digits, the paper's, its settings and versions.

    A number that is not known is an empty cell. A text that a spreadsheet would take for a formula begins with ``'``.
    """
    file = io.StringIO()
    lines = [_line(run) for run in runs]
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in line.items()} for line in lines)
    return file.getvalue().encode()


def _line(run: Record) -> dict[str, object]:
    results: Mapping[str, Any] = run.results or {}
    paper = beside_paper(results) if results else None
    known = [log.time for log in run.tasks if log.time]
    return {
        "run": run.name,
        "finished": run.finished,
        "tasks_done": len(results.get("accuracy_matrix", ())),
        **{name: results.get(name) for name in _SINGLE},
        "forgetting": max(results["forgetting"]) if results else None,
        "paper_acc": paper and paper[0],
        "paper_capacity": paper and paper[1],
        "differs_in": paper and paper[2],
        "seconds_of_epochs": sum(log.seconds for log in run.tasks) if run.tasks else None,
        "seconds_of_tasks": sum(sum(time.values()) for time in known) if known else None,
        **{name: run.settings[name] for name in _SETTINGS},
        **{f"version_{name}" if name != "device" else "device_used": run.versions.get(name) for name in _VERSIONS},
        "data_fingerprint": results.get("data_fingerprint"),
    }


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return repr(value)  # all digits of a float
    text = _printable(str(value))
    first = unicodedata.normalize("NFKC", text.lstrip()[:1])  # some spreadsheets take the wide forms, too
    return f"'{text}" if first in ("=", "+", "-", "@") else text


def _printable(text: str) -> str:
    """The text, with the code of each character that is not printable in its place."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# --- LaTeX ------------------------------------------------------------------------------------------------
_LATEX: Mapping[str, str] = MappingProxyType(
    {
        **{c: f"\\{c}" for c in "{}$&#_%"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"{\char34}",  # babel makes it a command in some languages
    }
)
_HEAD = r"""% Needs \usepackage{booktabs}.
\begin{table}
\centering
\footnotesize
\setlength{\tabcolsep}{4pt}
\caption{Mean $\pm$ sample standard deviation ($n - 1$) over $n$ seeds, in percent. CAP with the constant compression of
masks of Kang et al. (78\,\%).}
\begin{tabular}{lrrrrrrrr}
\toprule
& & & \multicolumn{4}{c}{ours} & \multicolumn{2}{c}{Kang et al.\ (2022)} \\
\cmidrule(lr){4-7}\cmidrule(lr){8-9}
setting & $c$ & $n$ & ACC & BWT & FWT & CAP & ACC & CAP \\
\midrule
"""
_TAIL = r"""\bottomrule
\end{tabular}
"""
_LATEX_NUMBERS = ("acc", "bwt", "fwt", "capacity_paper")


def latex_of_seeds(rows: Sequence[Row]) -> bytes:
    """A ``table`` with a line for each row, beside the paper's numbers, and notes on what a row does otherwise. The
    file is ASCII, so that every LaTeX reads it.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("--latex: expected a finished run, got none")
    lines: list[str] = []
    notes: dict[str, int] = {}  # what rows do otherwise, with its number
    for row in rows:
        paper = ("--", "--")
        if row.paper is not None:
            number = notes.setdefault(_theirs(row.paper[2]), len(notes) + 1)
            paper = (f"{row.paper[0]:.2f}\\textsuperscript{{{number}}}", f"{row.paper[1]:.2f}")
        numbers = [_math(row.numbers[name]) for name in _LATEX_NUMBERS]
        cells = [_name(row), f"{row.settings['density']:g}", row.count, *numbers, *paper]
        lines.append(" & ".join(cells) + " \\\\\n")
    items = ";\n".join(f"\\textsuperscript{{{number}}}~{latex(text)}" for text, number in notes.items())
    shown = f"\\par\\smallskip\nHow our runs differ from theirs: {items}.\n" if notes else ""
    return "".join([_HEAD, *lines, _TAIL, shown, "\\end{table}\n"]).encode("ascii")


def _theirs(differences: str) -> str:
    """What a row does otherwise, in the words of somebody who writes a paper of their own."""
    return differences.replace("(paper: ", "(theirs: ") or SAME


def _name(row: Row) -> str:
    """The paper's name of a setting, or ours; and what tells it from the other rows of the table."""
    own = row.setting
    if row.paper is not None:
        _, comma, others = own.partition(", ")
        own = PAPER_COLUMNS[column_of(row)] + comma + others
    return latex(own)


def _math(spread: Spread) -> str:
    text = f"{spread.mean:.2f}"
    return f"${text}$" if spread.deviation is None else f"${text} \\pm {spread.deviation:.2f}$"


def latex(text: str) -> str:
    """Text for LaTeX. A character that is not in ASCII or not printable is shown by its code."""
    plain = "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in text)
    return "".join(_LATEX.get(c, c) for c in plain).replace("--", "-{}-")  # else two become a dash
