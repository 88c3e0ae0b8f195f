"""The figures of one run and of several runs, as PNG files or as SVG inside a page.

They use matplotlib without pyplot, which would look for a display. It is imported late, so that a command without
figures starts fast.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from wsn_fast.train.task_logs import PARTS, TaskLog

Draw = Callable[[Any, Any], None]
"""Draws on matplotlib's Axes (first) what it is given (second)."""

MANY = 20  # with more tasks, nobody can read the numbers in a figure
COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_ON_BRIGHT = "#010101"  # almost black: the page replaces black by the colour of its text
_SETTINGS: Any = MappingProxyType(  # Any, because only some versions of the type stubs list the keys
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "wsn-fast",  # the same ids each time
        "text.parse_math": False,  # a name may have dollars
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
)


class Line(NamedTuple):
    """One line of a chart, in the colour of run ``number``. ``values`` has a value per task, or None. ``level`` is
    drawn as a horizontal line."""

    number: int
    label: str
    values: Sequence[float | None]
    level: float | None = None


class Chart(NamedTuple):
    """A chart over the tasks, with a line per run if its values follow each other (``over_time``), else with dots."""

    title: str
    unit: str
    lines: Sequence[Line]
    from_zero: bool = False
    over_time: bool = False


# --- rendering --------------------------------------------------------------------------------------------
def png(draw: Draw, results: Mapping[str, Any]) -> bytes:
    """A picture for a file."""
    return _render(draw, results, (_width(len(results["reuse"])), 4.5), "png")


def svg(draw: Draw, content: Any, prefix: str, size: tuple[float, float]) -> str:
    """A picture for a page: an ``<svg>`` element in the colour of the text around it. Screen readers ignore it.

    Args:
        draw: what to draw.
        content: what ``draw`` gets.
        prefix: makes the ids different from those of other pictures on the page.
        size: width and height in inches.
    """
    text = _render(draw, content, size, "svg").decode()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub(r"\b(id=\"|href=\"#|url\(#)", lambda found: f"{found[0]}{prefix}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _render(draw: Draw, content: Any, size: tuple[float, float], kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with rc_context(dict(_SETTINGS)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser of the reader may have the glyph
        figure = Figure(figsize=size, layout="constrained")  # savefig chooses the canvas for the format
        axes = figure.add_subplot()
        draw(axes, content)
        if kind == "svg":
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format=kind, transparent=True, metadata=nothing)
        else:
            figure.savefig(file, format=kind)
    return file.getvalue()


def _width(tasks: int) -> float:
    return max(5.0, 1.5 + 0.55 * min(tasks, MANY))


# --- one run ----------------------------------------------------------------------------------------------
def accuracy_matrix(axes: Any, results: Mapping[str, Any]) -> None:
    """Test accuracy on each task after each task."""
    tasks = _tasks(results)
    _heat_map(axes, results["accuracy_matrix"], tasks, tasks, "test accuracy (%)")
    axes.set(
        xlabel="task",
        ylabel="after training task",
        title=f"ACC {results['acc']:.2f} %, BWT {results['bwt']:.2f}",
    )


def capacity(axes: Any, results: Mapping[str, Any]) -> None:
    """The weights that each task uses, new and reused, and the weights that all tasks so far use."""
    tasks = _tasks(results)
    new = [task["new"] for task in results["reuse"]]
    reused = [task["density"] - task["new"] for task in results["reuse"]]
    axes.bar(tasks, reused, label="reused from earlier tasks", color=COLOURS[0])
    axes.bar(tasks, new, bottom=reused, label="new", color=COLOURS[1])
    axes.plot(tasks, owned(results["reuse"]), "k.-", label="owned by any task so far")
    axes.set(
        xlabel="task", ylabel="share of the gated weights (%)",
        title=f"CAP {results['capacity_paper']:.1f} % (paper's), {results['capacity']:.1f} % (measured)",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    if len(tasks) > MANY:
        axes.set_xticks(range(0, len(tasks), _step(len(tasks))))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, fontsize=8)


def overlap(axes: Any, results: Mapping[str, Any]) -> None:
    """The share of each task's mask that each other task also uses."""
    tasks = _tasks(results)
    _heat_map(axes, results["overlap"], tasks, tasks, "shared weights (%)")
    axes.set(xlabel="are used by task as well", ylabel="weights of task", title="Overlap of the masks")


def layer_reuse(axes: Any, results: Mapping[str, Any]) -> None:
    """Per gated tensor and task, the share of the task's weights that earlier tasks own."""
    _layers(axes, results, lambda tasks: [task["reuse"] for task in tasks], "reused (%)")
    axes.set_title("Reuse")


def layer_owned(axes: Any, results: Mapping[str, Any]) -> None:
    """Per gated tensor and task, the share that this task and the earlier ones own."""
    _layers(axes, results, owned, "owned (%)")
    axes.set_title("Owned by any task so far")


def owned(tasks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Per task, the share of the weights that it and the earlier tasks own, in percent. It is the sum of their
    ``new``."""
    return list(itertools.accumulate(task["new"] for task in tasks))


def colour(number: int) -> str:
    """The colour of a run, by its number from 1."""
    return COLOURS[(number - 1) % len(COLOURS)]


def time(axes: Any, logs: Sequence[TaskLog]) -> None:
    """Per task, the seconds of each part of it."""
    tasks = [str(log.task) for log in logs]
    below = [0.0] * len(logs)
    for part, shade in zip(PARTS, COLOURS, strict=False):
        seconds = [log.time.get(part, 0.0) for log in logs]
        axes.bar(tasks, seconds, bottom=below, label=part, color=shade)
        below = [a + b for a, b in zip(below, seconds, strict=True)]
    axes.set(xlabel="task", ylabel="seconds", title="Where the time went")
    if len(tasks) > MANY:
        axes.set_xticks(range(0, len(tasks), _step(len(tasks))))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(PARTS), fontsize=8)


# --- several runs -----------------------------------------------------------------------------------------
def lines(axes: Any, chart: Chart) -> None:
    """Draw the values of each run, by the position of the task in its run. Dots of several runs stand side by side."""
    handles = []
    longest = max(len(line.values) for line in chart.lines)
    for place, line in enumerate(chart.lines):
        values = [float("nan") if value is None else value for value in line.values]
        around = (line.number - 1) // len(COLOURS) % len(_DASHES)  # how often the colours have been used
        shift = 0.0 if chart.over_time else 0.7 * ((place + 0.5) / len(chart.lines) - 0.5)
        few = len(values) <= MANY
        style: dict[str, Any] = {"linestyle": "none", "marker": _MARKERS[around], "markersize": 4 if few else 2}
        if chart.over_time:
            style = {"linestyle": _DASHES[around], "marker": "." if few else None}
        positions = [position + shift for position in range(len(values))]
        handles += axes.plot(positions, values, color=colour(line.number), **style)
        if line.level is not None:
            axes.axhline(line.level, color=colour(line.number), linestyle=":", linewidth=0.9)
    axes.set(xlabel="task, in order of training", ylabel=chart.unit, title=chart.title)
    axes.set_xticks(range(0, longest, 1 if longest <= MANY else _step(longest)))
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(
        handles, [line.label for line in chart.lines],
        loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8,
    )  # fmt: skip


def _step(count: int) -> int:
    """The distance of the ticks of an axis with ``count`` places, so that it has 40 at most, where 10 is too small."""
    return max(10, -(-count // (2 * MANY)))


def _short(name: str) -> str:
    return name if len(name) <= 28 else "…" + name[-27:]


def _tasks(results: Mapping[str, Any]) -> list[str]:
    return [_short(str(task["task"])) for task in results["reuse"]]


# --- parts ------------------------------------------------------------------------------------------------
def _layers(
    axes: Any, results: Mapping[str, Any], values: Callable[[Sequence[Mapping[str, Any]]], list[float]], unit: str
) -> None:
    rows = [values(layer["tasks"]) for layer in results["layers"]]
    names = [layer["name"] for layer in results["layers"]]
    short = [_short(name) for name in names]
    _heat_map(axes, rows, _tasks(results), short, unit)
    axes.set_xlabel("task")


def _heat_map(
    axes: Any, rows: Sequence[Sequence[float | None]], columns: Sequence[str], names: Sequence[str], unit: str
) -> None:
    """Draw percentages as colours, and as numbers if they are few. The colours go from 0 to 100 in every figure, so
    that figures of several runs can be compared."""
    matrix = [[float("nan") if x is None else x for x in row] for row in rows]
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="none")
    axes.figure.colorbar(image, ax=axes, label=unit)
    axes.spines[:].set_visible(False)
    for labels, axis in ((columns, axes.xaxis), (names, axes.yaxis)):
        step = 1 if len(labels) <= 2 * MANY else _step(len(labels))
        axis.set_ticks(range(0, len(labels), step), labels[::step])
    if len(columns) > MANY or len(names) > MANY:
        return
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value == value:
                ink = _ON_BRIGHT if value > 60 else "white"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=8)
