"""The page of a report. It contains everything that it shows, and needs neither network nor script."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...page.markup import Html, escape, fill, join, load, notes, style, table, unfold
from ...page.numbers import NONE, duration, fixed, rate

FOLDER = Path(__file__).parent
Report = Mapping[str, Any]
STEP_TERMS = (
    ("dense", "the plain layer with PyTorch's fused AdamW: no subnet at all"),
    ("best eager", "a subnet layer as a careful user would write it in PyTorch, with fused AdamW"),
    ("ours", "this library with SubnetAdamW; one pass: SubnetAdamW(one_pass=True); 8 bits: with moments='8bit'"),
    ("x dense, x eager", "the median over the rounds of a step's time over that of the other one. Smaller is faster"),
)
OPERATION_TERMS = (
    ("x floor", "the time over the floor: the bytes that must move, at the speed of a large copy. It is below 1 where "
     "the data stays in a cache"),
    ("x torch", "the median over the rounds of the time over that of the same operation in PyTorch"),
)  # fmt: skip


def render(report: Report) -> Html:
    """The page as text."""
    made = datetime.datetime.fromisoformat(report["made"])
    devices = [(f"device-{i}", one) for i, one in enumerate(report["devices"])]
    parts = [("summary", "Summary"), ("advice", "What would make it faster")]
    parts += [*((anchor, one["name"]) for anchor, one in devices), ("installation", "Installation")]
    version = next(line["found"] for line in report["installation"] if line["subject"] == "wsn_fast")
    return fill(
        load(FOLDER / "page.html"),
        title="wsn_fast on this machine",
        style=style(),
        iso=report["made"],
        date=f"{made:%Y-%m-%d at %H:%M} UTC",
        version=version,
        seconds=duration(report["seconds"]),
        contents=join(fill('<li><a href="#$id">$name</a></li>\n', id=name, name=text) for name, text in parts),
        summary=join(_summary(one) for _, one in devices),
        advice=_list(report["advice"] or ["Nothing that this command knows of."]),
        devices=join(_device(anchor, one) for anchor, one in devices),
        installation=_lines("What is installed", ("part", "found", "reason"), report["installation"]),
        missing=_missing(report["not_measured"]),
    )


def _list(lines: Iterable[object]) -> Html:
    return fill("<ul>\n$items</ul>\n", items=join(fill("<li>$line</li>\n", line=line) for line in lines))


def _missing(lines: Sequence[str]) -> Html:
    if not lines:
        return Html("")
    return fill('<section id="missing">\n<h2>Not measured</h2>\n$lines</section>\n', lines=_list(lines))


def _terms(terms: Iterable[tuple[str, str]]) -> Html:
    items = join(fill("<dt>$name</dt><dd>$means</dd>\n", name=name, means=means) for name, means in terms)
    return fill('<dl class="terms">\n$items</dl>\n', items=items)


def _lines(caption: str, head: tuple[str, str, str], lines: Sequence[Mapping[str, str]]) -> Html:
    return table(caption, head, ([line["subject"], line["found"], line["reason"]] for line in lines), range(3))


# --- in short
def _summary(device: Mapping[str, Any]) -> Html:
    sentences: list[object] = [_steps_in_short(device["steps"]), _verdicts_in_short(device["verdicts"])]
    digest = device["table"]["digest"]
    sentences.append(
        f"The tuning table {digest} is in use."
        if digest
        else Html("No tuning table is in use. <code>python -m wsn_fast.doctor --tune</code> measures one.")
    )
    return fill("<h3>$name</h3>\n$list", name=device["name"], list=_list(filter(None, sentences)))


def _steps_in_short(steps: Sequence[Mapping[str, Any]]) -> str:
    ours = [row for row in steps if row["step"] == "ours, one pass" and row["x_dense"] is not None]
    if not ours:
        return "The one-pass training step was not measured."
    last = ours[-1]
    beside = f" and {last['x_eager']:.2f} times as long as the best eager one" if last["x_eager"] is not None else ""
    return (
        f"A one-pass training step of a layer {last['shape']} takes {last['x_dense']:.2f} times as long as the dense "
        f"step{beside}."
    )


def _verdicts_in_short(verdicts: Sequence[Mapping[str, Any]]) -> str:
    compared = [one for one in verdicts if one["backend"] != "torch"]
    wrong = [f"{one['operation']} {one['dtype']}" for one in compared if one["problem"] is not None]
    if wrong:
        return f"{len(wrong)} of {len(compared)} compared operations are WRONG: {', '.join(wrong)}."
    return f"All {len(compared)} compared operations are right." if compared else "PyTorch runs every operation."


# --- a device
def _device(anchor: str, device: Mapping[str, Any]) -> Html:
    return fill(
        load(FOLDER / "device.html"),
        id=anchor,
        name=device["name"],
        facts=_terms((name.replace("_", " "), str(value)) for name, value in device["facts"].items() if value),
        steps=_steps(device["steps"]),
        operations=_operations(device["operations"], device["copy"]),
        choices=_choices(device["choices"]),
        verdicts=_verdicts(device["verdicts"]),
        table=_tuning(device["table"]),
    )


def _choices(lines: Sequence[Mapping[str, str]]) -> Html:
    """A row for each reason, with all operations that it holds for."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        by_reason.setdefault((line["found"], line["reason"]), []).append(line["subject"])
    rows = [[backend, reason, ", ".join(operations)] for (backend, reason), operations in by_reason.items()]
    return table("Backends for float32, and why", ("backend", "reason", "operations"), rows, range(3))


def _steps(rows: Sequence[Mapping[str, Any]]) -> Html:
    if not rows:
        return Html("<p>None was measured.</p>\n")
    memory = any(row["peak_bytes_per_weight"] is not None for row in rows)
    head = ["step", "median, ms", "x dense", "x eager", *["peak bytes per weight"] * memory, "p20 to p80, ms", "rounds"]
    tables = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of_shape = [row for row in rows if row["shape"] == shape]
        longest = max(row["time"]["median_us"] for row in of_shape)
        cells = [
            [
                row["step"], _bar(row["time"]["median_us"] / 1e3, row["time"]["median_us"] / longest),
                fixed(row["x_dense"]), fixed(row["x_eager"]), *[fixed(row["peak_bytes_per_weight"], 1)] * memory,
                _span(row["time"], 1e-3), row["time"]["repeats"],
            ]
            for row in of_shape
        ]  # fmt: skip
        tables.append(table(f"{shape.replace(' b', ', batch of ')}", head, cells))
    return join([*tables, _terms(STEP_TERMS)])


def _bar(value: float, share: float) -> Html:
    return fill(
        '<span class="bar" style="--share:$share%">$value</span>', share=f"{100 * share:.0f}", value=_digits(value)
    )


def _digits(value: float) -> Html:
    """Three significant digits, or more in front of the point."""
    return rate(value) if value >= 1000 else fixed(value, max(0, 2 - len(str(int(value))) + 1) if value >= 1 else 3)


def _span(time: Mapping[str, Any], factor: float = 1.0) -> Html:
    low, high = (_digits(time[name] * factor) for name in ("p20_us", "p80_us"))
    return fill("$low to $high", low=low, high=high)


def _operations(rows: Sequence[Mapping[str, Any]], copy: Mapping[str, Any] | None) -> Html:
    if not rows:
        return Html("<p>None was measured.</p>\n")
    head = [
        "operation",
        "median, us",
        "x floor",
        "x torch",
        "backend",
        "p20 to p80, us",
        "floor, us",
        "torch, us",
        "rounds",
    ]
    tables = []
    for size in sorted({row["elements"] for row in rows}):
        cells = [
            [
                row["operation"], _digits(row["time"]["median_us"]), _or_none(row["x_floor"]), _or_none(row["x_torch"]),
                row["backend"], _span(row["time"]), _or_none(row["floor_us"]),
                NONE if row["torch"] is None else _digits(row["torch"]["median_us"]), row["time"]["repeats"],
            ]
            for row in rows
            if row["elements"] == size
        ]  # fmt: skip
        tables.append(table(f"{size:,} elements", head, cells, (0, 4)))
    speed = Html("") if copy is None else fill("<p>A large copy moves $gb GB/s.</p>\n", gb=_digits(copy["gb_per_s"]))
    return join([speed, *tables, _terms(OPERATION_TERMS)])


def _or_none(value: float | None) -> Html:
    return NONE if value is None else _digits(value)


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> Html:
    wrong = [f"{one['operation']} {one['dtype']}: {one['problem']}" for one in verdicts if one["problem"] is not None]
    rows = [[one["operation"], one["dtype"], one["backend"], _says(one)] for one in verdicts]
    shown = table(
        "Each operation beside the torch backend", ["operation", "dtype", "backend", "verdict"], rows, range(4)
    )
    short = fill("<p>$text</p>\n", text=_verdicts_in_short(verdicts))
    return join([short, notes("Wrong", wrong), unfold(f"{len(rows)} verdicts", shown)])


def _says(verdict: Mapping[str, Any]) -> str:
    if verdict["problem"] is not None:
        return f"WRONG: {verdict['problem']}"
    if verdict["backend"] == "torch":
        return str(verdict["note"])
    return "right" + (f" ({verdict['note']})" if verdict["note"] else "")


def _tuning(found: Mapping[str, Any]) -> Html:
    says = _list(found["notes"] or ["There is none for this device."])
    backends: Mapping[str, Any] = found["entries"].get("backends", {})
    rows = [
        [operation, dtype, one["choose"], _times(one["times"])]
        for operation, by in backends.items()
        for dtype, one in by.items()
    ]
    if not rows:
        return says
    shown = table("The faster backend", ["operation", "dtype", "chosen", "measured"], rows, range(4))
    return join([says, unfold(f"{len(rows)} choices between backends", shown)])


def _times(times: Mapping[str, Mapping[str, float]]) -> Html:
    return escape(
        "; ".join(f"{size}: {', '.join(f'{who} {us:.4g} us' for who, us in by.items())}" for size, by in times.items())
    )
