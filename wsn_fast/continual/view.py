"""What a WSN computes with at the moment: a finished task, or the current scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..nn.task_ids import TaskId, check_task


@dataclass(frozen=True)
class View:
    """What the model computes with: the masks of the finished task ``task``, or the mask of the current scores if
    ``task`` is None; and the head of the task ``head``."""

    task: TaskId | None
    head: TaskId | None

    def of(self, task: TaskId | None, finished: Sequence[TaskId], current: TaskId | None) -> View:
        """The view that ``WSN.use_task(task)`` asks for while this one is shown.

        Args:
            task: a finished task; the task in progress or None for the current scores.
            finished: the finished tasks.
            current: the task in progress, or None.

        Raises:
            ValueError: ``task`` was never begun; the message lists the known ones.
        """
        if task is None:
            return View(None, self.head if current is None else current)
        task = check_task(task)
        if task == current:
            return View(None, task)
        if task not in finished:
            raise ValueError(f"task {task!r} is unknown; finished tasks: {list(finished)}, in progress: {current!r}")
        return View(task, task)
