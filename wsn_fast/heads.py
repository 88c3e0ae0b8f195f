"""One classifier per task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .tasks import TaskId, check_task, task_from_key, task_key


class TaskHeads(nn.Module):
    """A linear head per task, of which one is active.

    Args:
        in_features: width of the features.
        out_features: width of a head that is added without a width of its own; None if every task names its own.
        tasks: heads to make at once: task ids, or a mapping from task id to the width of its head.
        bias, device, dtype: as for ``nn.Linear``, for every head.

    Shape:
        ``[*, in_features] -> [*, out_features of the active task]``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        tasks: Mapping[TaskId, int] | Iterable[TaskId] | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = bias
        self.heads = nn.ModuleDict()
        self._widths: dict[TaskId, int] = {}  # of all heads there ever were
        self.active = None
        self.row_tasks: list[tuple[TaskId, Tensor]] | None = None  # each task's rows, while several share a pass
        # Carries the device and dtype that later heads are made with; follows .to() as every buffer does.
        self.register_buffer("_birthplace", torch.empty(0, device=device, dtype=dtype), persistent=False)
        widths = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks or ())
        for task, width in widths.items():
            self.add(task, width)

    @property
    def tasks(self) -> list[TaskId]:
        """The tasks that have a head: ints first, each kind in its order. Not in the order in which they were added,
        which a resumed run need not repeat, and which would be that of an optimizer's state."""
        return [task_from_key(key) for key in self.heads]

    @property
    def active(self) -> TaskId | None:
        """The task whose head :meth:`forward` uses. Setting it to a task without a head is a ``ValueError``."""
        return self._active

    @active.setter
    def active(self, task: TaskId | None) -> None:
        head = None if task is None else self.head(task)
        self._active = task
        # Past nn.Module's registration: this is a second reference to a head, not a second head. Forward sees the head
        # and not its name, so that compiled code serves every task.
        self.__dict__["_active_head"] = head

    def add(self, task: TaskId, out_features: int | None = None) -> nn.Linear:
        """Make a head for ``task``.

        Raises:
            ValueError: the task has a head already, or no width is known for it.
        """
        task = check_task(task)
        if task_key(task) in self.heads:
            raise ValueError(f"task {task!r} already has a head")
        self._widths[task] = width = self.width(task, out_features)
        like = self._birthplace
        head = nn.Linear(self.in_features, width, self.use_bias, device=like.device, dtype=like.dtype)
        self.heads[task_key(task)] = head
        for one in sorted(self.tasks, key=lambda task: (isinstance(task, str), task)):
            self.heads[task_key(one)] = self.heads.pop(task_key(one))
        return head

    def width(self, task: TaskId, out_features: int | None = None) -> int:
        """The width that the head of ``task`` has, or would get.

        Raises:
            ValueError: ``out_features`` differs from that of the existing head, or no width is known.
        """
        known = self._widths.get(task, self.out_features if out_features is None else out_features)
        if known is None:
            raise ValueError(f"out_features must be given for task {task!r}: these heads have no common width")
        if out_features not in (None, known):
            raise ValueError(f"out_features={out_features} for task {task!r}, whose head has {known}")
        return known

    def head(self, task: TaskId) -> nn.Linear:
        """The head of ``task``. Raises ``ValueError`` that lists the known tasks when there is none."""
        key = task_key(check_task(task))
        if key not in self.heads:
            raise ValueError(f"task {task!r} has no head; tasks with one: {self.tasks}")
        head = self.heads[key]
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, x: Tensor) -> Tensor:
        if self.row_tasks is not None:
            return self._forward_rows(x, self.row_tasks)
        head: nn.Linear | None = self.__dict__["_active_head"]
        if head is None:
            raise RuntimeError("no task is active: call begin_task(task) or use_task(task) before the heads")
        return head(x)

    def _forward_rows(self, x: Tensor, tasks: list[tuple[TaskId, Tensor]]) -> Tensor:
        return stack_rows({task: self.head(task)(x[rows]) for task, rows in tasks}, tasks)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The heads become those of the checkpoint, if it has any, before torch descends into the children: one that is
        # missing here is made, one that came later (the checkpoint is an earlier one of this run, say) goes.
        start, end = f"{prefix}heads.", ".weight"
        incoming = {n[len(start) : -len(end)]: n for n in state_dict if n.startswith(start) and n.endswith(end)}
        for key in [key for key in self.heads if incoming and key not in incoming]:
            if self._active is not None and task_key(self._active) == key:
                self.active = None
            del self.heads[key]
        for key, name in incoming.items():
            # A name that is no task's is left for torch to report as unexpected.
            with contextlib.suppress(ValueError):
                if key not in self.heads:
                    task = task_from_key(key)
                    self._widths.pop(task, None)
                    self.add(task, state_dict[name].shape[0])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, tasks={self.tasks}, active={self.active!r}"


def stack_rows(outputs: Mapping[TaskId, Tensor], groups: Iterable[tuple[TaskId, Tensor]]) -> Tensor:
    """The outputs of the rows of each task as one batch, in the order of the rows; ``groups`` names each task's rows.

    Raises:
        ValueError: the outputs differ in shape.
    """
    shapes = {task: tuple(out.shape[1:]) for task, out in outputs.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"forward_tasks needs outputs of one shape, got {shapes} by task: run such tasks one by one")
    order = torch.cat([rows for _, rows in groups]).argsort()
    return torch.cat(list(outputs.values()))[order]
