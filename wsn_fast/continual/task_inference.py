"""Which finished task inputs belong to, where nobody says: the task whose outputs are the surest (SupSup, Wortsman et
al., NeurIPS 2020, calls the entropy of the outputs the confidence of a task)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.task_ids import TaskId


class InferredTask(NamedTuple):
    """What :meth:`wsn_fast.WSN.infer_task` found.

    Attributes:
        task: the task of all rows together: the one with the least mean entropy.
        rows: the task of each row by itself.
        entropy: float32 ``[B, T]``, in nats: of the outputs of each row as each task, the tasks in the order asked for.
    """

    task: TaskId
    rows: list[TaskId]
    entropy: Tensor


def infer(x: Tensor, tasks: Sequence[TaskId], forward: Callable[[Tensor, list[TaskId]], Tensor]) -> InferredTask:
    """Compute every row of ``x`` as every task, and find the surest one.

    Args:
        x: ``[B, ...]``.
        tasks: finished tasks, at least one.
        forward: :meth:`wsn_fast.WSN.forward_tasks`.

    Raises:
        ValueError: there is no task or no row, or the outputs are no logits ``[B, C]`` of two classes or more.
    """
    if not tasks:
        raise ValueError("infer_task needs finished tasks, and there is none: end a task first")
    logits = forward(x.repeat(len(tasks), *[1] * (x.ndim - 1)), [task for task in tasks for _ in range(len(x))])
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            "infer_task needs logits [B, C] of at least two classes, got outputs of the shape "
            f"{[len(x), *logits.shape[1:]]} and {logits.dtype}"
        )
    log_p = torch.log_softmax(logits.float(), 1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0)  # p log p is 0 where p is
    entropy = -terms.sum(1).view(len(tasks), len(x)).t()
    order = entropy.nan_to_num(torch.inf)  # a task that computes NaN is not sure
    best = order.mean(0).argmin(), order.argmin(1)
    return InferredTask(tasks[int(best[0])], [tasks[i] for i in best[1].tolist()], entropy)
