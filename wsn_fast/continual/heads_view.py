"""The heads of a model by task, to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..nn.task_ids import TaskId, check_task
from .model_parts import ModelParts


class HeadsView(Mapping[TaskId, nn.Module | dict[str, nn.Module]]):
    """The heads that exist now, by task; :attr:`wsn_fast.WSN.heads`. It follows the model, and changes nothing of it.

    ``task in wsn.heads`` says whether the task has a head. ``wsn.heads[task]`` is this head. If the model has several
    ``TaskHeads``, it is a dict of the heads of the task by the names of the ``TaskHeads`` in the model, and a task
    that only some of them have a head of is in the view, too. The tasks are sorted, ints before strings. A head may
    exist before its task begins.
    """

    def __init__(self, parts: ModelParts) -> None:
        self._parts = parts

    def __getitem__(self, task: TaskId) -> nn.Module | dict[str, nn.Module]:
        """The head of ``task``. Raises ``KeyError``, which lists the tasks that have one, if there is none."""
        task = check_task(task)
        all_heads = self._parts.heads
        found = {name: heads.head(task) for name, heads in all_heads.items() if task in heads.tasks}
        if not found:
            raise KeyError(f"task {task!r} has no head; tasks that have one: {list(self)}")
        return found if len(all_heads) > 1 else next(iter(found.values()))

    def __contains__(self, task: object) -> bool:
        try:
            known = check_task(task)
        except (TypeError, ValueError):
            return False
        return any(known in heads.tasks for heads in self._parts.heads.values())

    def __iter__(self) -> Iterator[TaskId]:
        tasks = {task for heads in self._parts.heads.values() for task in heads.tasks}
        return iter(sorted(tasks, key=lambda task: (isinstance(task, str), task)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"heads of {list(self)}"
