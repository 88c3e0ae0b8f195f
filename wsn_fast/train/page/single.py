"""The section of the page about one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wsn_fast.page.markup import Html, escape, figure, fill, join, load, notes, table, unfold
from wsn_fast.page.numbers import NONE, fixed, rate
from wsn_fast.train import figures
from wsn_fast.train.page import training
from wsn_fast.train.page.numbers import Entry, span
from wsn_fast.train.records import Record
from wsn_fast.train.task_logs import TaskLog


def section(entry: Entry) -> Html:
    """The section of one run."""
    run = entry.run
    return fill(
        load(Path(__file__).with_name("run.html")),
        number=entry.number,
        swatch=entry.swatch,
        name=run.name,
        state=_state(run),
        notes=notes("Not all of this run could be read", run.notes),
        command=run.command,
        made=", ".join(f"{name} {version}" for name, version in run.versions.items()),
        tasks=_tasks(run),
        curves=training.curves(entry.run),
        figures=_figures(entry),
        paths=_paths(run),
    )


def _state(run: Record) -> str:
    if run.finished:
        return f"Finished: {len(run.results['reuse']) if run.results else 0} tasks."
    done = len(run.results["reuse"]) if run.results else 0
    text = f"Not finished: {done} of {run.settings['tasks']} tasks"
    current = next((task for task in run.tasks if task.best_epoch is None), None)
    if current is not None:
        text += f"; task {current.task} has {current.epochs} of at most {run.settings['epochs']} epochs"
    return text + (f"; its log last grew on {run.written:%Y-%m-%d at %H:%M:%S} UTC." if run.written else ".")


# --- task by task -----------------------------------------------------------------------------------------
def _tasks(run: Record) -> Html:
    """A table of all that is known about each task, with a row per task."""
    head = [
        "task", "accuracy", "forgetting", "at random", "before", "density", "reuse", "new", "owned so far",
        "epochs", "best", "seconds", "s/epoch", "samples/s",
    ]  # fmt: skip
    logs: dict[Any, TaskLog] = {log.task: log for log in run.tasks}
    rows = []
    finished = _finished(run.results) if run.results else {}
    for task in [*finished, *(task for task in logs if task not in finished)]:
        rows.append([task, *finished.get(task, [NONE] * 8), *_training(logs.get(task))])
    if not rows:
        return Html("<p>No task has begun.</p>\n")
    explained = (
        '<p class="fine">At random and before: accuracy at random initialisation and just before the task was trained. '
        "Reuse: share of the task's weights that earlier tasks own. New: share of all weights that it was first to "
        "own. Seconds: of the epochs, with validation.</p>\n"
    )
    shown = join([table("Task by task", head, rows), Html(explained)])
    return shown if len(rows) <= figures.MANY else unfold(f"Task by task: {len(rows)} rows", shown)


def _finished(results: Mapping[str, Any]) -> dict[Any, list[Html]]:
    columns = [
        results["accuracy_matrix"][-1], results["forgetting"], results["random_init"], results["before_training"],
        *([share[name] for share in results["reuse"]] for name in ("density", "reuse", "new")),
        figures.owned(results["reuse"]),
    ]  # fmt: skip
    tasks = [share["task"] for share in results["reuse"]]
    return {task: [fixed(column[i]) for column in columns] for i, task in enumerate(tasks)}


def _training(log: TaskLog | None) -> list[object]:
    if log is None:
        return [NONE] * 5
    best = NONE if log.best_epoch is None else log.best_epoch
    return [log.epochs, best, fixed(log.seconds), fixed(log.epoch_seconds, 3), rate(log.samples_per_second)]


# --- pictures ---------------------------------------------------------------------------------------------
def _figures(entry: Entry) -> Html:
    results, time = entry.run.results, training.time(entry)
    if results is None:
        return time
    parts = [_accuracy(entry.number, results), _capacity(entry.number, results)]
    if results.get("layers"):
        parts += _layers(entry.number, results)
    if len(results.get("overlap", [])) > 1:
        parts.append(_overlap(entry.number, results))
    return join([*parts, time])


def _ids(results: Mapping[str, Any]) -> list[Any]:
    return [share["task"] for share in results["reuse"]]


def _square(results: Mapping[str, Any]) -> tuple[float, float]:
    """The size of a picture with a cell for each pair of tasks. A cell has room for a number if there are few tasks."""
    tasks = len(results["reuse"])
    side = 1.6 + 0.42 * (max(tasks, 6) if tasks <= figures.MANY else 10)
    return side + 1.5, side


def _picture(
    draw: figures.Draw,
    results: Mapping[str, Any],
    name: str,
    size: tuple[float, float],
    alt: str,
    caption: str,
    numbers: Html,
) -> Html:
    wide = 12 < len(results["reuse"]) <= figures.MANY
    return figure(figures.svg(draw, results, name, size), alt, caption, numbers, wide=wide)


def _accuracy(number: int, results: Mapping[str, Any]) -> Html:
    matrix, ids = results["accuracy_matrix"], _ids(results)
    rows = [[task, *map(fixed, row)] for task, row in zip(ids, matrix, strict=True)]
    return _picture(
        figures.accuracy_matrix,
        results,
        f"accuracy{number}",
        _square(results),
        f"Heat map: test accuracy on each of {len(ids)} tasks after each; "
        f"{span(x for row in matrix for x in row if x is not None)}. ACC {results['acc']:.2f} %, "
        f"BWT {results['bwt']:+.2f}.",
        "Accuracy matrix: row i has the accuracies on the tasks so far, measured after task i was trained.",
        table("Test accuracy (%), after task (row) on task (column)", ["after task", *ids], rows, ()),
    )


def _capacity(number: int, results: Mapping[str, Any]) -> Html:
    shares, total = results["reuse"], figures.owned(results["reuse"])
    rows = [
        [share["task"], *(fixed(share[name]) for name in ("density", "reuse", "new")), fixed(total[i])]
        for i, share in enumerate(shares)
    ]
    return _picture(
        figures.capacity,
        results,
        f"capacity{number}",
        _square(results),
        f"Bar chart: what each of {len(shares)} tasks uses, reused and new, and a line: what all use so far, "
        f"{total[-1]:.1f} % of the gated weights in the end.",
        f"Capacity: {results['union_density']:.2f} % of the gated weights are owned; masks compress by "
        f"{results['compression']:.1f} %.",
        table("Capacity by task (%)", ["task", "density", "reuse", "new", "owned so far"], rows, ()),
    )


def _overlap(number: int, results: Mapping[str, Any]) -> Html:
    shared, ids = results["overlap"], _ids(results)
    rows = [[task, *map(fixed, row)] for task, row in zip(ids, shared, strict=True)]
    others = [x for i, row in enumerate(shared) for j, x in enumerate(row) if i != j]
    return _picture(
        figures.overlap,
        results,
        f"overlap{number}",
        _square(results),
        f"Heat map: the share of each task's weights that each other uses; {span(others)}.",
        "Overlap: the share of a task's weights (row) that another task (column) uses as well. Masks drawn at random "
        "would share the density.",
        table("Of the weights of task (row), task (column) uses (%)", ["task", *ids], rows, ()),
    )


def _layers(number: int, results: Mapping[str, Any]) -> list[Html]:
    layers = results["layers"]
    size = (_square(results)[0] + 1.2, 1.7 + 0.32 * min(max(len(layers), 3), 2 * figures.MANY))
    last = {layer["name"]: figures.owned(layer["tasks"])[-1] for layer in layers}
    least, most = min(last, key=last.__getitem__), max(last, key=last.__getitem__)

    def numbers(caption: str, values: Callable[[Sequence[Mapping[str, Any]]], Iterable[float]]) -> Html:
        head = ["gated tensor", "elements", *(f"task {task}" for task in _ids(results))]
        rows = [[layer["name"], rate(layer["elements"]), *map(fixed, values(layer["tasks"]))] for layer in layers]
        return table(caption, head, rows)

    so_far = numbers("Owned so far (%)", figures.owned)
    density = numbers("Density of each task (%)", lambda shares: [share["density"] for share in shares])
    reuse = numbers("Reuse (%)", lambda shares: [share["reuse"] for share in shares])
    return [
        _picture(
            figures.layer_owned,
            results,
            f"owned{number}",
            size,
            f"Heat map: the share of each of {len(layers)} gated tensors that tasks own, after each task; in the end "
            f"least of {least}, {last[least]:.1f} %, most of {most}, {last[most]:.1f} %.",
            "Capacity by layer: the share of each gated tensor that any task so far owns.",
            join([so_far, density]),
        ),
        _picture(
            figures.layer_reuse,
            results,
            f"reuse{number}",
            size,
            f"Heat map: the share of each task's weights that earlier tasks own, in each of {len(layers)} gated "
            f"tensors; {span(share['reuse'] for layer in layers for share in layer['tasks'])}.",
            "Reuse by layer: the share of a task's weights in each gated tensor that earlier tasks own.",
            reuse,
        ),
    ]


# --- paths ------------------------------------------------------------------------------------------------
def _paths(run: Record) -> Html:
    """Which backend ran each operation and why, for each group of successive tasks in which that did not change."""
    stretches: list[tuple[list[int], TaskLog]] = []
    for log in run.tasks:
        if not log.paths:
            continue
        if stretches and (stretches[-1][1].optimizer, stretches[-1][1].paths) == (log.optimizer, log.paths):
            stretches[-1][0].append(log.task)
        else:
            stretches.append(([log.task], log))
    return join(_stretch(tasks, log) for tasks, log in stretches)


def _stretch(tasks: Sequence[int], log: TaskLog) -> Html:
    which = f"task {tasks[0]}" if len(tasks) == 1 else f"tasks {tasks[0]} to {tasks[-1]}"
    rows = [[path[word] for word in ("operation", "backend", "reason")] + [_some(path["layers"])] for path in log.paths]
    head = ["operation", "backend", "reason", "layers"]
    return unfold(
        f"Paths of {which}, and why",
        join(
            [
                fill("<p>Optimizer: $optimizer.</p>\n", optimizer=log.optimizer),
                table(f"What ran each operation in {which}", head, rows, range(4)),
            ]
        ),
    )


def _some(layers: Sequence[str]) -> Html:
    return escape(", ".join(layers) if len(layers) <= 4 else f"{', '.join(layers[:3])} and {len(layers) - 3} more")
