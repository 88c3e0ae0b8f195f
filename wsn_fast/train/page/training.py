"""The training of a run on the page: the curves of its tasks, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wsn_fast.page.markup import Html, figure, fill, join, table, unfold
from wsn_fast.page.numbers import duration, fixed
from wsn_fast.train import figures
from wsn_fast.train.page.numbers import Entry
from wsn_fast.train.records import Record
from wsn_fast.train.task_logs import PARTS, Epoch, TaskLog

_POINTS = 200  # of a curve: more cannot be seen
_LEFT, _RIGHT = 28.0, 156.0  # of the plots in a panel, which has 160 x 116 units
_LOSS, _ACCURACY = (6.0, 56.0), (66.0, 110.0)  # their tops and bottoms
_NAMES = ("training loss", "validation loss", "validation accuracy (%)")
_FEW = 6  # tasks, whose panels have room to be larger


def curves(run: Record) -> Html:
    """The curves of all tasks that have begun; nothing if the run did not log them."""
    logs = [log for log in run.tasks if log.curve]
    if not logs:
        return Html("")
    shown = _curves(logs)
    return shown if len(logs) <= figures.MANY else unfold(f"Learning curves of {len(logs)} tasks", shown)


def _curves(logs: Sequence[TaskLog]) -> Html:
    """A small panel for each task, all with the same scales, so that they can be compared."""
    points = [epoch for log in logs for epoch in log.curve]
    last = max(epoch.number for epoch in points)
    loss = max(max(epoch.loss, epoch.val_loss) for epoch in points) or 1.0
    low = 10.0 * math.floor(min(min(epoch.val_acc for epoch in points), 90.0) / 10)
    panels = [
        fill("<div><p>task $task</p>$svg</div>\n", task=log.task, svg=_panel(log, last, loss, low)) for log in logs
    ]
    legend = [
        fill('<span><span class="swatch" style="background:$colour"></span>$name</span> ', colour=shade, name=name)
        for shade, name in zip(figures.COLOURS, _NAMES, strict=False)
    ]
    best = [_best(log) for log in logs]
    shown = [epoch.val_acc for epoch in best]
    return figure(
        fill(
            '<p class="legend">$legend</p>\n<div class="panels$few">\n$all</div>',
            legend=join(legend),
            all=join(panels),
            few=" few" if len(logs) <= _FEW else "",
        ),
        f"Line charts of {len(logs)} tasks: losses and validation accuracy by epoch. Validation accuracy at the best "
        f"epoch: from {min(shown):.1f} to {max(shown):.1f} %.",
        f"Learning curves: epochs 1 to {last} of each task, all on the same scales. The dot is the epoch with the "
        "smallest validation loss, whose values are kept.",
        table(
            "Losses and validation accuracy at the best epoch so far",
            ["task", "epochs", "best", *_NAMES],
            [
                [log.task, log.epochs, at.number, fixed(at.loss, 4), fixed(at.val_loss, 4), fixed(at.val_acc)]
                for log, at in zip(logs, best, strict=True)
            ],
        ),
        wide=True,
    )


def _best(log: TaskLog) -> Epoch:
    """The epoch whose values are kept. The first of several with the same loss is."""
    return min(log.curve, key=lambda epoch: epoch.val_loss)


def _panel(log: TaskLog, last: int, loss: float, low: float) -> Html:
    """The curves of a task as SVG: losses from 0 to ``loss`` above, and below the accuracy from ``low`` to 100."""
    step = -(-len(log.curve) // _POINTS)
    shown = [*log.curve[:-1:step], log.curve[-1]]
    best = _best(log)

    def x(epoch: Epoch) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (epoch.number - 1) / max(last - 1, 1)

    def y(value: float, least: float, most: float, plot: tuple[float, float]) -> float:
        return plot[1] - (plot[1] - plot[0]) * (value - least) / (most - least)

    parts = [_axis(_LOSS, f"{loss:.3g}", "0"), _axis(_ACCURACY, "100", f"{low:g}")]
    scales = ((0.0, loss, _LOSS), (0.0, loss, _LOSS), (low, 100.0, _ACCURACY))
    for name, scale, shade in zip(("loss", "val_loss", "val_acc"), scales, figures.COLOURS, strict=False):
        line = "L".join(f"{x(epoch):.1f} {y(getattr(epoch, name), *scale):.1f}" for epoch in shown)
        # A path of one point is drawn only if it goes somewhere.
        parts.append(fill('<path stroke="$shade" d="M${line}h0"/>', shade=shade, line=line))
        if name != "loss":
            at = f"{x(best):.1f}", f"{y(getattr(best, name), *scale):.1f}"
            parts.append(fill('<circle cx="$x" cy="$y" r="2.5" style="fill:$shade"/>', x=at[0], y=at[1], shade=shade))
    svg = '<svg aria-hidden="true" focusable="false" viewBox="0 0 160 116">$parts</svg>'
    return fill(svg, parts=join(parts))


def _axis(plot: tuple[float, float], most: str, least: str) -> Html:
    return fill(
        '<path class="axis" d="M$left ${top}V${bottom}H$right"/>'
        '<text x="$end" y="$high" text-anchor="end">$most</text>'
        '<text x="$end" y="$bottom" text-anchor="end">$least</text>',
        left=_LEFT, right=_RIGHT, top=plot[0], bottom=plot[1], end=_LEFT - 3, high=plot[0] + 6, most=most, least=least,
    )  # fmt: skip


# --- time -------------------------------------------------------------------------------------------------
def time(entry: Entry) -> Html:
    """What the time of the finished tasks was spent on; nothing if the run did not log it."""
    logs = [log for log in entry.run.tasks if log.time]
    if not logs:
        return Html("")
    total = {part: sum(log.time.get(part, 0.0) for log in logs) for part in PARTS}
    every = sum(total.values())
    shares = ", ".join(
        f"{part} {duration(seconds) if seconds else '0 s'} ({100 * seconds / every if every else 0:.0f} %)"
        for part, seconds in total.items()
    )
    rows = [
        [log.task, *(fixed(log.time.get(part), 3) for part in PARTS), fixed(sum(log.time.values()), 3)] for log in logs
    ]
    return figure(
        figures.svg(figures.time, logs, f"time{entry.number}", (6.4, 3.6)),
        f"Bar chart: seconds of {len(logs)} tasks by part. Together: {shares}.",
        f"Where the time of {len(logs)} tasks went: {shares}.",
        table("Seconds of each task", ["task", *PARTS, "together"], rows),
    )
