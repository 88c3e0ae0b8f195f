"""The training of each task of a run, read from ``metrics.jsonl``."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from wsn_fast.nn import json_text
from wsn_fast.train.config import MOST_TASKS
from wsn_fast.train.safe_files import open_to_read

PARTS = ("data", "training", "evaluation", "checkpoints")
"""The parts of the time of a task."""
_LINE = 1 << 20  # the longest line of a log, in bytes
_NOTES = 10  # about damaged lines
_GIVE_UP = 10_000  # damaged lines
_EPOCHS = 200_000  # of all tasks, whose curves are kept


class Epoch(NamedTuple):
    """One epoch of a task: losses (mean over samples), and the validation accuracy in percent."""

    number: int
    loss: float
    val_loss: float
    val_acc: float


@dataclass(frozen=True)
class TaskLog:
    """The training of one task so far, from ``metrics.jsonl``.

    Attributes:
        task: its id.
        epochs: the number of finished epochs.
        best_epoch: the epoch with the smallest validation loss; None while the task is in training.
        seconds: the time of all finished epochs, with their validation.
        train_samples: the number of samples per epoch; None if the run did not log it or did not know it.
        optimizer: the package and the class of the optimizer; None if the run did not log it.
        paths: which backend ran each operation (see :func:`wsn_fast.train.report.begin_entry`).
        curve: the finished epochs, in order.
        time: seconds by part, of ``PARTS``; empty while the task is in training, and if the run did not log it.
    """

    task: int
    epochs: int
    best_epoch: int | None
    seconds: float
    train_samples: int | None
    optimizer: str | None
    paths: Sequence[Mapping[str, Any]]
    curve: Sequence[Epoch] = ()
    time: Mapping[str, float] = field(default_factory=dict)

    @property
    def epoch_seconds(self) -> float | None:
        """Seconds per epoch; None before the first epoch has ended."""
        return self.seconds / self.epochs if self.epochs else None

    @property
    def samples_per_second(self) -> float | None:
        """Training samples per second; None if it cannot be known."""
        if not self.train_samples or not self.seconds:
            return None
        return self.train_samples * self.epochs / self.seconds


def read(path: Path, notes: list[str]) -> list[TaskLog]:
    """Read the training of each task from a log, in order. Lines of other kinds are ignored.

    Args:
        path: ``metrics.jsonl``.
        notes: gets a line for what could not be read.
    """
    found = _Found()
    count = 0  # of damaged lines
    try:
        for number, line in _lines(path):
            try:
                found.take(json_text.parse(line))
            except (ValueError, TypeError, KeyError) as error:
                count += 1
                if count > _GIVE_UP:
                    notes.append(
                        f"{path}: more than {_GIVE_UP} lines are damaged, those after line {number} are not read"
                    )
                    break
                if count <= _NOTES:
                    notes.append(f"{path}, line {number} is damaged: {reprlib.repr(error)}")
    except OSError as error:
        notes.append(f"cannot read {path}: {error.strerror}")
    if _NOTES < count <= _GIVE_UP:
        notes.append(f"{path}: {count - _NOTES} more lines are damaged")
    if found.left_out:
        notes.append(f"{path}: it has more than {_EPOCHS} epochs, and the curves show no more of them")
    return found.logs()


@dataclass
class _Found:
    """What the lines of a log have said so far, by task. A line that repeats another takes its place."""

    begun: dict[int, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[int, dict[int, float]] = field(default_factory=dict)
    curves: dict[int, dict[int, Epoch]] = field(default_factory=dict)
    ended: dict[int, dict[str, Any]] = field(default_factory=dict)
    points: int = 0
    left_out: bool = False

    def take(self, entry: Mapping[str, Any]) -> None:
        """Take a line. Raises ``ValueError``, ``TypeError`` or ``KeyError`` if it is damaged."""
        kind, task = entry["kind"], _number(entry["task"], MOST_TASKS - 1)
        if kind == "begin":
            self.begun[task] = _checked_begin(entry)
        elif kind == "epoch":
            self._take_epoch(task, entry)
        elif kind == "task":
            self.ended[task] = {"best_epoch": _number(entry["best_epoch"]), "time": _checked_time(entry)}

    def _take_epoch(self, task: int, entry: Mapping[str, Any]) -> None:
        number, seconds = _number(entry["epoch"]), float(_number(entry["seconds"], real=True))
        point = _checked_epoch(number, entry)
        self.seconds.setdefault(task, {})[number] = seconds
        if point is None:
            return
        curve = self.curves.setdefault(task, {})
        self.points += number not in curve
        if self.points <= _EPOCHS or number in curve:
            curve[number] = point
        else:
            self.left_out = True

    def logs(self) -> list[TaskLog]:
        """The tasks, in order."""
        nothing: dict[str, Any] = {"train_samples": None, "optimizer": None, "paths": []}
        return [
            TaskLog(
                task=task,
                epochs=len(self.seconds.get(task, {})),
                seconds=sum(self.seconds.get(task, {}).values()),
                curve=[epoch for _, epoch in sorted(self.curves.get(task, {}).items())],
                **self.begun.get(task, nothing),
                **self.ended.get(task, {"best_epoch": None}),
            )
            for task in sorted({*self.begun, *self.seconds})
        ]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a log, with their numbers from 1. A line that is too long is cut, so that it is no JSON.

    The last line may be incomplete, because the run is writing it, and is left out.
    """
    with open_to_read(path) as file:
        number = 1
        while line := file.readline(_LINE):
            whole = rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_LINE)
            if not rest:
                return
            yield number, whole
            number += 1


def _number(value: Any, most: float = 10**18, *, real: bool = False) -> int:
    """A whole number, or any, from 0 to ``most``. Raises ``ValueError`` for anything else."""
    if type(value) not in ((int, float) if real else (int,)) or not 0 <= value <= most:
        raise ValueError(f"expected a number from 0 to {most}, got {reprlib.repr(value)}")
    number: int = value
    return number


def _checked_begin(entry: Mapping[str, Any]) -> dict[str, Any]:
    words = ("operation", "backend", "reason")
    paths = [
        {**{word: str(path[word]) for word in words}, "layers": [str(layer) for layer in path["layers"]]}
        for path in entry["paths"]
    ]
    samples = entry["train_samples"]
    return {
        "train_samples": None if samples is None else _number(samples),
        "optimizer": str(entry["optimizer"]),
        "paths": paths,
    }


def _checked_epoch(number: int, entry: Mapping[str, Any]) -> Epoch | None:
    """The losses and the accuracy of an epoch; None if the run did not log them."""
    if not {"loss", "val_loss", "val_acc"} <= entry.keys():
        return None
    loss, val_loss = (float(_number(entry[name], 1e38, real=True)) for name in ("loss", "val_loss"))
    return Epoch(number, loss, val_loss, float(_number(entry["val_acc"], 100, real=True)))


def _checked_time(entry: Mapping[str, Any]) -> dict[str, float]:
    """The seconds of each part of a task; empty if the run did not log them."""
    time = entry.get("time", {})
    return {part: float(_number(time[part], real=True)) for part in PARTS if part in time}
