"""How far a run is, as its checkpoints keep it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wsn_fast.train.clock import PARTS

_MOST = 10**18


@dataclass
class Progress:
    """The state of a run, apart from the tensors of its checkpoint. The two together are all that a run needs to go on.
    Accuracies are in percent.

    Attributes:
        task: the index of the current task; the number of tasks when all are finished.
        training: whether the current task has begun.
        epoch: the number of its finished epochs.
        lr: the learning rate of the next epoch.
        best_loss: the smallest validation loss so far; None before the first epoch.
        best_epoch: the epoch with the smallest validation loss, counted from 1.
        bad_epochs: the number of epochs since the loss last improved or the learning rate last changed.
        matrix: row i has the accuracies on the tasks 0..i after task i.
        random_init: per task, the accuracy at random initialisation.
        before: per task up to the current one, the accuracy just before it is trained.
        metrics_bytes: the length of ``metrics.jsonl``.
        time: seconds of each part since the last task ended (see :class:`wsn_fast.train.clock.Clock`). Older
            checkpoints have none.
    """

    task: int = 0
    training: bool = False
    epoch: int = 0
    lr: float = 0.0
    best_loss: float | None = None
    best_epoch: int = 0
    bad_epochs: int = 0
    matrix: list[list[float]] = field(default_factory=list)
    random_init: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    metrics_bytes: int = 0
    time: dict[str, float] = field(default_factory=dict)

    def begin_task(self, lr: float) -> None:
        """The current task begins, with this learning rate."""
        self.training, self.epoch, self.lr = True, 0, lr
        self.best_loss, self.best_epoch, self.bad_epochs = None, 0, 0

    @classmethod
    def from_json(cls, values: Any, tasks: int | None = None) -> Progress:
        """The progress that a checkpoint holds. ``tasks`` is the number of tasks of its run, if it is known.

        Raises:
            TypeError: ``values`` is no mapping, or its names are not those of the attributes.
            ValueError: a value is of another kind or out of range.
        """
        made = cls(**values)
        for name in ("task", "epoch", "best_epoch", "bad_epochs", "metrics_bytes"):
            value = getattr(made, name)
            if type(value) is not int or not 0 <= value <= _MOST:
                raise ValueError(f"{name}: expected an integer from 0 to 10**18, got {str(value)[:99]}")
        if type(made.training) is not bool:
            raise ValueError("training: expected true or false")
        made._check_numbers([made.lr, *([] if made.best_loss is None else [made.best_loss])], -math.inf, math.inf)
        for i, row in enumerate(made.matrix):
            if len(row) != i + 1:
                raise ValueError(f"matrix: row {i} has {len(row)} accuracies")
        for row in (*made.matrix, made.random_init, made.before):
            made._check_numbers(row, 0, 100)
        if not {*made.time} <= {*PARTS, "other"}:
            raise ValueError(f"time: expected seconds of {', '.join(PARTS)} and other, got {str([*made.time])[:99]}")
        made._check_numbers([*made.time.values()], 0, _MOST)
        every = len(made.random_init) if tasks is None else tasks
        expected = (min(made.task, every), every, min(made.task + 1, every))
        found = (len(made.matrix), len(made.random_init), len(made.before))
        if made.task > every or found[0] > expected[0] or found[1:] != expected[1:]:
            raise ValueError(f"the progress of task {made.task} of {every} has {found} accuracies, not {expected}")
        return made

    @staticmethod
    def _check_numbers(values: Sequence[Any], low: float, high: float) -> None:
        for value in values:
            if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
                raise ValueError(f"expected a number from {low} to {high}, got {str(value)[:99]}")
