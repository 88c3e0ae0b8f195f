"""Which finished task inputs belong to, where nobody says: the task whose outputs are the surest (SupSup, Wortsman et
al., NeurIPS 2020, section 3.3, calls the entropy of the outputs the confidence of a task)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.task_ids import TaskId

Objective = Callable[[Tensor], Tensor]
"""What is to be small: a function of the logits."""
METHODS = ("entropy", "one-shot", "binary")


class InferredTask(NamedTuple):
    """What :meth:`wsn_fast.WSN.infer_task` found.

    Attributes:
        task: the task of all rows together: by "entropy" the one with the least mean entropy.
        rows: the task of each row by itself. The other methods look at all rows together, and each row is of ``task``.
        entropy: by "entropy", float32 ``[B, T]``, in nats: of the outputs of each row as each task, the tasks in the
            order asked for.
        gradient: by the other methods, float32 ``[T]``: the derivative of the mean entropy with respect to the
            coefficient of each task, where all tasks have the same one.
    """

    task: TaskId
    rows: list[TaskId]
    entropy: Tensor | None = None
    gradient: Tensor | None = None


def check_method(method: object, one_pass: object) -> str:
    """Return ``method``. Raises ``ValueError`` if it is unknown, or has no use for ``one_pass``."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method != "entropy" and one_pass is not None:
        raise ValueError(f'one_pass must be None with method={method!r}: it is for method="entropy", got {one_pass!r}')
    return str(method)


def check_tasks(tasks: Sequence[TaskId], finished: Sequence[TaskId]) -> None:
    """Raise ``ValueError`` unless there is a task, and all have ended."""
    if not tasks:
        raise ValueError("infer_task needs finished tasks, and there is none: end a task first")
    for task in tasks:
        if task not in finished:
            raise ValueError(f"task {task!r} is not finished; finished tasks: {list(finished)}")


def by_entropy(x: Tensor, tasks: Sequence[TaskId], forward: Callable[[Tensor, list[TaskId]], Tensor]) -> InferredTask:
    """Compute every row of ``x`` as every task, and find the surest one.

    Args:
        x: ``[B, ...]``.
        tasks: finished tasks, at least one.
        forward: :meth:`wsn_fast.WSN.forward_tasks`.

    Raises:
        ValueError: there is no row, or the outputs are no logits ``[B, C]`` of two classes or more.
    """
    logits = forward(x.repeat(len(tasks), *[1] * (x.ndim - 1)), [task for task in tasks for _ in range(len(x))])
    entropy = _entropy(logits, len(x)).view(len(tasks), len(x)).t()
    order = entropy.nan_to_num(torch.inf)  # a task that computes NaN is not sure
    best = order.mean(0).argmin(), order.argmin(1)
    return InferredTask(tasks[int(best[0])], [tasks[i] for i in best[1].tolist()], entropy)


def by_gradient(
    x: Tensor, tasks: Sequence[TaskId], halves: bool, gradient_of: Callable[[Objective, list[TaskId]], Tensor]
) -> InferredTask:
    """Find the task whose coefficient lowers the entropy of the mixture of all tasks most.

    Args:
        x: ``[B, ...]``.
        tasks: finished tasks, at least one.
        halves: keep the better half of the tasks and begin again with these, until one is left; otherwise take the best
            one at once.
        gradient_of: the gradient of an objective of the outputs of ``x`` with respect to the coefficients of tasks, at
            equal ones: float32 ``[T]``.

    Raises:
        ValueError: there is no row, or the outputs are no logits ``[B, C]`` of two classes or more.
    """
    if not len(x):
        raise ValueError("infer_task needs at least one row, got none")
    left, first = list(tasks), None
    while first is None or (halves and len(left) > 1):
        gradient = gradient_of(lambda logits: _entropy(logits, len(x)).mean(), left)
        first = gradient if first is None else first
        keep = (len(left) + 1) // 2 if halves else 1
        best = gradient.nan_to_num(torch.inf).argsort(stable=True)[:keep]
        left = [left[i] for i in sorted(best.tolist())]
    return InferredTask(left[0], left[:1] * len(x), gradient=first)


def _entropy(logits: Tensor, rows: int) -> Tensor:
    """The entropy of each row in nats, float32. Differentiable."""
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise ValueError(
            "infer_task needs logits [B, C] of at least two classes, got outputs of the shape "
            f"{[rows, *logits.shape[1:]]} and {logits.dtype}"
        )
    log_p = torch.log_softmax(logits.float(), 1)
    terms = (log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0)  # p log p is 0 where p is
    return -terms.sum(1)
