"""``python -m benchmarks.picture RESULTS.json OUT.svg`` draws the README's picture from measured data.

On the left is the time of a training step; on the right, the accuracy of task 1 while later tasks are trained.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import forgetting
from .rows import Row, load
from .tables import three_digits, where

STEP = "linear step 1024x1024 b64"
BARS = {"dense": "dense PyTorch", "ours, one pass": "wsn-fast, one pass", "ours": "wsn-fast, standard",
        "ours, guarded": "wsn-fast, any optimizer", "best eager": "best eager PyTorch", "paper": "the paper's program",
        "CLArena": "CLArena"}  # fmt: skip
CURVES = {"ours": "wsn-fast", "paper": "the paper's program", "clarena": "CLArena"}
_OURS, _PAPER, _CLARENA = "#0072B2", "#D55E00", "#CC79A7"  # of Okabe and Ito: safe for the colour-blind
_COLOURS = {"paper": _PAPER, "CLArena": _CLARENA, "clarena": _CLARENA, "dense": "#8c959f", "best eager": "#8c959f"}
_INK = "#57606a"  # replaced in the SVG by a colour that follows the reader's light or dark theme
_STYLE = """<style>:root { --ink: #1f2328 } @media (prefers-color-scheme: dark) { :root { --ink: #e6edf3 } }</style>"""


def draw(facts: Mapping[str, Any], rows: Sequence[Row], forgotten: Mapping[str, Any], step: str = STEP) -> Figure:
    """The picture of results and of what :func:`benchmarks.forgetting.measure` returns; ``step`` names operation and
    shape of the rows on the left. Raises ``ValueError`` if there is no time for such a step."""
    times = {row.contender: row for row in rows if f"{row.operation} {row.shape}" == step and row.median_us}
    if not times:
        raise ValueError(f"step: no row {step!r} with a time in these results")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _bars(left, {name: times[name] for name in BARS if name in times})
    left.set_title(f"Time of one training step, ms ({step.removeprefix('linear step ')})")
    _curves(right, forgotten)
    figure.supxlabel(where(facts), fontsize=8, color=_INK)
    for axes in (left, right):
        axes.title.set(fontsize=10, color=_INK)
        axes.tick_params(colors=_INK, length=0)
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure


def _bars(axes: Axes, times: Mapping[str, Row]) -> None:
    """Medians, with the range between the 20 % and 80 % quantiles as a thin line."""
    for place, (name, row) in enumerate(times.items()):
        low, median, high = (float(us or 0) / 1e3 for us in (row.p20_us, row.median_us, row.p80_us))
        axes.barh(place, median, color=_COLOURS.get(name, _OURS), height=0.7)
        axes.plot([low, high], [place, place], color=_INK, linewidth=1)
        axes.annotate(f"  {three_digits(median)}", (max(median, high), place), va="center", color=_INK)
    axes.set_yticks(range(len(times)), [BARS[name] for name in times])
    axes.set_xticks([])
    axes.margins(x=0.12)
    axes.invert_yaxis()


def _curves(axes: Axes, forgotten: Mapping[str, Any]) -> None:
    """The mean over the seeds, with all seeds between the edges of a band; labels stand at the ends of the lines."""
    settings = forgotten["settings"]
    epochs, taken = settings["epochs"], list[float]()
    for name, runs in forgotten["curves"].items():
        points = list(zip(*runs, strict=True))
        x, colour = [1 + i / epochs for i in range(len(points))], _COLOURS.get(name, _OURS)
        mean = [statistics.fmean(p) for p in points]
        axes.plot(x, mean, color=colour, linewidth=2)
        axes.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=colour, alpha=0.2, linewidth=0)
        place = mean[-1]
        while any(abs(place - other) < 7 for other in taken):
            place += 1  # labels must not cover each other
        taken.append(place)
        axes.annotate(f"  {CURVES[name]}: {mean[-1]:.1f}", (x[-1], place), va="center", color=colour)
    axes.set_xticks(range(1, settings["tasks"] + 1), [f"{t}" for t in range(1, settings["tasks"] + 1)])
    axes.set_xlim(0.9, settings["tasks"] + 2)
    axes.set_ylim(0, 100)
    axes.grid(axis="y", color=_INK, alpha=0.2)
    seeds, decay = len(settings["seeds"]), f"{settings['optimizer']}, weight decay {settings['weight_decay']:g}"
    axes.set_title(f"Accuracy of task 1, %, as later tasks are trained\n({settings['data']}; {decay}; {seeds} seeds)")
    axes.set_xlabel("task", color=_INK)


def write(figure: Figure, path: Path) -> None:
    """Write the figure; an SVG's text follows the reader's light or dark theme."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wsn-fast", "font.family": "sans-serif"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    if path.suffix == ".svg":
        text = path.read_text("utf-8").replace(_INK, f"var(--ink, {_INK})")
        path.write_text(text.replace("<defs>", f"{_STYLE}\n <defs>", 1), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("results", type=Path, help="what `pytest benchmarks --results FILE` has written")
    parser.add_argument("out", type=Path, help="an .svg or .png file")
    parser.add_argument("--forgetting", type=Path, help="output of benchmarks.forgetting; measured now without it")
    parser.add_argument("--step", default=STEP, help="operation and shape of the bars")
    options = parser.parse_args(arguments)
    facts, rows = load(options.results)
    text = options.forgetting.read_text("utf-8") if options.forgetting else None
    forgotten = json.loads(text) if text else forgetting.measure()
    write(draw(facts, rows, forgotten, options.step), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
