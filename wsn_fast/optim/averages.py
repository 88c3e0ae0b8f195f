"""Averages of weights (EMA, SWA) that leave what finished tasks use as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_avg_fn

from .. import ops
from ..continual.wsn import WSN
from ..nn.shards import local
from ..nn.task_ids import TaskId

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]
MultiAvgFn = Callable[[Tensors, Tensors, Tensor | int], None]
_Key = tuple[int, torch.Size, torch.dtype]


def averaging(wsn: WSN, avg_fn: AvgFn | None = None, multi_avg_fn: MultiAvgFn | None = None) -> MultiAvgFn:
    """Make a ``multi_avg_fn`` that averages what training may move in ``wsn``, and copies everything else.

    It is meant for ``torch.optim.swa_utils.AveragedModel(wsn, multi_avg_fn=averaging(wsn, ...))`` and for all that
    takes such a function. It averages gated tensors outside of what finished tasks use, scores, the head of the task in
    progress, and tensors that are declared ``per_task`` or ``shared``. It copies all other elements, masks included: an
    average of equal numbers may differ from them in the last bit. A sharded WSN cannot be copied, as ``AveragedModel``
    does: call the function with the tensors of ``wsn.trainable_state()``. Each process averages its own rows.

    Args:
        wsn: the model that is trained.
        avg_fn: how to average one tensor, as ``AveragedModel`` takes it. Without any function, all averaged states have
            the same weight (SWA).
        multi_avg_fn: how to average lists of tensors, instead of ``avg_fn``.

    Returns:
        A function of the averaged tensors, the tensors of ``wsn`` itself (not copies of them), and the number of states
        averaged so far. Tensors of other modules may be among them; those with a floating-point dtype are averaged.
        The function raises ``RuntimeError`` if no task is in progress, if a finished task is in use, or if these are
        averages of an earlier task; and ``ValueError`` if shapes differ, or if no tensor belongs to ``wsn``. It has
        changed nothing then.

    Raises:
        TypeError: ``wsn`` is not a WSN.
        ValueError: both functions are given.
    """
    if not isinstance(wsn, WSN):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
    if avg_fn is not None and multi_avg_fn is not None:
        raise ValueError("only one of avg_fn and multi_avg_fn may be given")
    return Averaging(wsn, multi_avg_fn or _one_by_one(avg_fn or get_swa_avg_fn()))


def _one_by_one(avg_fn: AvgFn) -> MultiAvgFn:
    def average(averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        for mean, now in zip(averaged, current, strict=True):
            mean.copy_(avg_fn(mean, now, num_averaged))

    return average


def _key(tensor: Tensor) -> _Key:
    """The same for a parameter and for what ``detach`` or ``state_dict`` make of it, which share its memory."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


class Averaging:
    """The function that :func:`averaging` returns."""

    def __init__(self, wsn: WSN, average: MultiAvgFn) -> None:
        self._wsn, self._average = wsn, average
        self._task: TaskId | None = None

    @torch.no_grad()
    def __call__(self, averaged: Tensors, current: Tensors, num_averaged: Tensor | int) -> None:
        """See :func:`averaging`."""
        averaged, current = [*map(local, averaged)], [*map(local, current)]
        moving = {_key(local(tensor)): union for tensor, union in self._wsn.moving()}
        self._check_task(int(num_averaged))
        tensors = chain(self._wsn.parameters(), self._wsn.buffers())
        own = dict.fromkeys((_key(local(tensor)) for tensor in tensors), False)
        own |= dict.fromkeys(moving, True)
        self._check(averaged, current, own)
        moved = []
        for mean, now in zip(averaged, current, strict=True):
            if now.is_floating_point() and own.get(_key(now), True):
                moved.append((mean, now))
            else:
                mean.copy_(now)
        if moved:
            self._average([mean for mean, _ in moved], [now for _, now in moved], num_averaged)
        for mean, now in moved:
            union = moving.get(_key(now))
            if union is not None:
                ops.restore_frozen_(mean, now, union)

    def _check_task(self, num_averaged: int) -> None:
        task = self._wsn.current_task
        if num_averaged == 1 or self._task is None:
            self._task = task
        if task != self._task:
            raise RuntimeError(
                f"these are averages of task {self._task!r}, and task {task!r} is in progress: begin new averages in "
                "every task"
            )

    def _check(self, averaged: Tensors, current: Tensors, own: Mapping[_Key, bool]) -> None:
        if len(averaged) != len(current):
            raise ValueError(f"averaged and current must have the same length, got {len(averaged)} and {len(current)}")
        for i, (mean, now) in enumerate(zip(averaged, current, strict=True)):
            if mean.shape != now.shape:
                raise ValueError(f"averaged[{i}] has shape {tuple(mean.shape)}, and current[{i}] {tuple(now.shape)}")
        if current and not any(_key(now) in own for now in current):
            raise ValueError(
                "current holds no tensor of wsn: pass the tensors of the model itself, and keep the averages on its "
                "device, because what finished tasks use cannot be recognised in a copy"
            )
