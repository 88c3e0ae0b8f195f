"""The heads of a model: one classifier for each task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .refusals import StaysInTheLibrary, device_kind
from .task_ids import TaskId, check_task, task_from_key, task_key


class TaskHeads(StaysInTheLibrary, nn.Module):
    """A linear head per task, of which one is active.

    Args:
        in_features: width of the features.
        out_features: width of a head that is added without a width of its own; None if every task names its own.
        tasks: the tasks that get a head at once: task ids, or a mapping from task id to the width of its head.
        bias, device, dtype: as for ``nn.Linear``, for every head.

    Shape:
        ``[*, in_features] -> [*, out_features of the active task]``.
    """

    _active: TaskId | None

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
        self.use_bias = ops.check_bool("bias", bias)
        self.heads = nn.ModuleDict()
        self._widths: dict[TaskId, int] = {}  # the widths of all heads, removed ones included
        self.active = None
        self.row_tasks: list[tuple[TaskId, Tensor]] | None = None  # each task's rows, while several share a pass
        # Later heads are made with the device and dtype of this buffer, which follows .to() like every buffer.
        self.register_buffer("_device_and_dtype", torch.empty(0, device=device, dtype=dtype), persistent=False)
        widths = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks or ())
        for task, width in widths.items():
            self._add(task, width)
        self._sort()

    @property
    def tasks(self) -> list[TaskId]:
        """The tasks that have a head, sorted, ints before strings.

        They are not in the order in which they were added, because a resumed run may add them in another order, and
        the state of an optimizer depends on the order of the parameters.
        """
        return [task_from_key(key) for key in self.heads]

    @property
    def active(self) -> TaskId | None:
        """The task whose head :meth:`forward` uses. Setting it to a task without a head is a ``ValueError``."""
        return self._active

    @active.setter
    def active(self, task: TaskId | None) -> None:
        head = None if task is None else self.head(task)
        # This is a second reference to a head and not a second head, so nn.Module must not register it. Forward reads
        # the head and not its name, so that the same compiled code serves every task.
        self.__dict__.update(_active=task, _active_head=head)

    def add(self, task: TaskId, out_features: int | None = None) -> nn.Linear:
        """Make a head for ``task``.

        Raises:
            ValueError: the task has a head already, or no width is known for it.
        """
        head = self._add(task, out_features)
        self._sort()
        return head

    @torch.inference_mode(False)  # heads are trained
    def _add(self, task: TaskId, out_features: int | None) -> nn.Linear:
        task = check_task(task)
        if task_key(task) in self.heads:
            raise ValueError(f"task {task!r} already has a head")
        width, like = self.width(task, out_features), self._device_and_dtype
        head = nn.Linear(self.in_features, width, self.use_bias, device=like.device, dtype=like.dtype)
        self._widths[task] = width
        self.heads[task_key(task)] = head
        return head

    def _sort(self) -> None:
        for one in sorted(self.tasks, key=lambda task: (isinstance(task, str), task)):
            self.heads[task_key(one)] = self.heads.pop(task_key(one))

    def remove(self, task: TaskId) -> tuple[TaskId, int | None, nn.Module | None]:
        """Remove the head of ``task``, if there is one. The result is what :meth:`put_back` takes."""
        if self._active == task:
            self.active = None
        key = task_key(task)
        return task, self._widths.pop(task, None), self.heads.pop(key) if key in self.heads else None

    def put_back(self, removed: tuple[TaskId, int | None, nn.Module | None]) -> None:
        """Undo :meth:`remove`, whose result this takes."""
        task, width, head = removed
        if width is not None:
            self._widths[task] = width
        if head is not None:
            self.heads[task_key(task)] = head
            self._sort()

    def width(self, task: TaskId, out_features: int | None = None) -> int:
        """The width that the head of ``task`` has, or would get.

        Raises:
            ValueError: ``out_features`` differs from that of the existing head, or is not a positive int, or no width
                is known.
        """
        known: object = self._widths.get(task, self.out_features if out_features is None else out_features)
        if known is None:
            raise ValueError(f"out_features must be given for task {task!r}: these heads have no common width")
        if isinstance(known, bool) or not isinstance(known, Integral) or known < 1:
            raise ValueError(f"out_features must be a positive int, got {known!r}")
        if out_features not in (None, known):
            raise ValueError(
                f"out_features must be {known}, the width of the head of task {task!r}, got {out_features!r}"
            )
        return int(known)

    def head(self, task: TaskId) -> nn.Linear:
        """The head of ``task``. Raises ``ValueError`` that lists the known tasks when there is none."""
        key, heads = task_key(check_task(task)), self.heads
        if key not in heads:
            raise ValueError(f"task {task!r} has no head; tasks that have one: {self.tasks}")
        head = heads[key]
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, x: Tensor) -> Tensor:
        device_kind(x)  # a symbol of torch.fx has none
        if self.row_tasks is not None:
            return self._forward_rows(x, self.row_tasks)
        head: nn.Linear | None = self.__dict__["_active_head"]
        if head is None:
            raise RuntimeError("no task is active: call begin_task(task) or use_task(task) before the model")
        return head(x)

    def _forward_rows(self, x: Tensor, tasks: list[tuple[TaskId, Tensor]]) -> Tensor:
        return stack_rows({task: self.head(task)(x[rows]) for task, rows in tasks}, tasks)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # If the checkpoint has heads, make the missing ones and delete the others before torch loads the children.
        # The model has heads that the checkpoint lacks if the checkpoint is older than the model, for example.
        start, end = f"{prefix}heads.", ".weight"
        incoming = {n[len(start) : -len(end)]: n for n in state_dict if n.startswith(start) and n.endswith(end)}
        for key in [key for key in self.heads if incoming and key not in incoming]:
            if self._active is not None and task_key(self._active) == key:
                self.active = None
            del self.heads[key]
        for key, name in incoming.items():
            # Torch reports a name that belongs to no task as unexpected.
            with contextlib.suppress(ValueError):
                if key not in self.heads:
                    task = task_from_key(key)
                    self._widths.pop(task, None)
                    self._add(task, state_dict[name].shape[0])
        self._sort()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, tasks={self.tasks}, active={self.active!r}"


def stack_rows(outputs: Mapping[TaskId, Tensor], groups: Iterable[tuple[TaskId, Tensor]]) -> Tensor:
    """Join the outputs of several tasks into one batch, in the order of the rows of that batch.

    Args:
        outputs: the outputs of each task, ``[rows of the task, ...]``.
        groups: each task with the indices of its rows, int64, in the order of ``outputs``.

    Raises:
        ValueError: the outputs differ in shape.
    """
    shapes = {task: tuple(out.shape[1:]) for task, out in outputs.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"forward_tasks needs outputs of one shape, got {shapes} by task: run such tasks one by one")
    joined = torch.cat(list(outputs.values()))
    return torch.empty_like(joined).index_copy_(0, torch.cat([rows for _, rows in groups]), joined)
