"""Batches whose rows belong to different tasks.

Where it is possible, one pass over the model serves the whole batch: each layer reads its weight once and applies to
every row the masks of that row's task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

# Torch has no public way to ask whether there are global hooks.
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .. import ops
from ..backends import collectives
from ..nn.heads import TaskHeads, stack_rows
from ..nn.reads import Reader
from ..nn.registry import LAYERS
from ..nn.sharding import Sharding
from ..nn.task_ids import TaskId, check_task, task_from_key, task_key
from .model_parts import ModelParts

ROW_WISE = (
    nn.Sequential, nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Softplus, TaskHeads,
    *(layer for layer in LAYERS if layer.SERVES_MIXED_BATCHES),
)  # fmt: skip
"""Modules that compute every row of a batch by itself, so that one batch may hold rows of several tasks."""


Groups = list[tuple[TaskId, Tensor]]
"""Each task with the indices of its rows, int64."""


def checked_ids(x: Tensor, task_ids: Sequence[TaskId] | Tensor) -> list[TaskId]:
    """The task of each row of ``x``. Raises ``ValueError`` unless there is one for each, and a row."""
    ids = [check_task(t) for t in (task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids)]
    if len(ids) != x.shape[0] or not ids:
        raise ValueError(
            f"task_ids must name a task for each of the {x.shape[0]} rows of x (at least one), got {len(ids)}"
        )
    return ids


def forward(
    parts: ModelParts,
    x: Tensor,
    ids: Sequence[TaskId],
    one_pass: bool | None,
    use_task: Callable[[TaskId], AbstractContextManager[object]],
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run the model on a batch whose row i belongs to the task ``ids[i]``.

    Args:
        parts: the parts of the model.
        x: ``[B, ...]``.
        ids: B task ids.
        one_pass: True runs the whole batch at once, False the rows of each task as a batch of their own; None takes
            one pass where that is possible and was measured to be faster.
        use_task: makes the model compute as a task, until its context is left.
        run: runs the model as the task in use.

    Returns:
        ``[B, ...]``, in the order of the rows.

    Raises:
        TypeError: ``one_pass`` is neither a bool nor None.
        ValueError: ``one_pass`` is True and not possible, a task is unknown, or the outputs of the tasks differ in
            shape.
    """
    one_pass = None if one_pass is None else ops.check_bool("one_pass", one_pass)
    groups = _group(ids, x.device)
    if parts.sharding is not None:
        return _forward_sharded(parts.sharding, x, groups, one_pass, use_task, run)
    if one_pass or (one_pass is None and _is_faster_at_once(parts, len(ids), len(groups))):
        obstacle = _obstacle(parts, [task for task, _ in groups])
        if one_pass and obstacle:
            raise ValueError(f"one_pass is not possible: {obstacle}")
        if not obstacle:
            with _shown(parts, ids, groups):
                return parts.scope(parts.model, x)
    outputs: dict[TaskId, Tensor] = {}
    with use_task(groups[0][0]):  # when it is left, what was in use before is back
        for task, where in groups:
            if outputs:
                use_task(task)
            outputs[task] = run(x.index_select(0, where))
    return stack_rows(outputs, groups)


def _forward_sharded(
    sharding: Sharding,
    x: Tensor,
    groups: Groups,
    one_pass: bool | None,
    use_task: Callable[[TaskId], AbstractContextManager[object]],
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """Run the rows of each task that any process has rows of. A process without any runs one row of another task, whose
    output it drops: the gated tensors are gathered from all processes."""
    if any(text != str(one_pass) for text in collectives.texts_of(sharding.group, str(one_pass))) or one_pass:
        raise ValueError(
            "one_pass is not possible: a sharded WSN gathers tensors that are masked for one task at a time"
        )
    every = [task_from_key(key) for key in sharding.agree(task_key(task) for task, _ in groups)]
    rows, outputs = dict(groups), {}
    with use_task(every[0]):  # when it is left, what was in use before is back
        for task in every:
            use_task(task)
            out = run(x.index_select(0, rows[task]) if task in rows else x[:1])
            if task in rows:
                outputs[task] = out
    return stack_rows({task: outputs[task] for task in rows}, groups)


def _is_faster_at_once(parts: ModelParts, rows: int, tasks: int) -> bool:
    """Whether one pass was measured to be faster. It was measured against masked weights that are made for each task
    anew, and not against those that are kept."""
    layers = parts.layers.values()
    if all(
        not isinstance(layer.gate_state.keep_masked, bool) and layer.gate_state.keep_masked >= tasks for layer in layers
    ):
        return False
    return all(rows <= layer.mixed_batch_rows() for layer in layers)


def _group(ids: Sequence[TaskId], device: torch.device) -> Groups:
    """The rows of each task of a batch, tasks in the order of their first rows."""
    indices: dict[TaskId, list[int]] = {}
    for index, task in enumerate(ids):
        indices.setdefault(task, []).append(index)
    rows = torch.tensor([index for where in indices.values() for index in where]).to(device)
    return [*zip(indices, rows.split([*map(len, indices.values())]), strict=True)]


def _obstacle(parts: ModelParts, tasks: Sequence[TaskId]) -> str:
    """The reason why rows of the ``tasks`` cannot share a pass over the model; empty if they can.

    A module of another class than those of :data:`ROW_WISE` is accepted if its class has the attribute
    ``row_wise = True``, which states that its forward computes every row by itself and keeps the order of the rows.
    """
    finished = parts.tasks_of_layers()
    for task in tasks:
        if task not in finished:
            return f"task {task!r} is not finished; finished tasks: {finished}"
    for name, module in parts.model.named_modules():
        known = type(module) in ROW_WISE or getattr(type(module), "row_wise", False)
        if any(name.startswith(f"{heads}.heads".lstrip(".")) for heads in parts.heads):
            continue  # a head gets the rows of its task alone
        if not known:
            kind = type(module).__name__
            return (
                f"{name or 'the model'} is a {kind}, which is not known to compute every row by itself. If it does, "
                f"set {kind}.row_wise = True"
            )
        serves = getattr(type(module), "SERVES_MIXED_BATCHES", not isinstance(module, Reader))
        if not serves:
            return f"{name or 'the model'} reads tensors that are masked for one task at a time"
        if isinstance(module, nn.Flatten) and module.start_dim < 1:
            return f"{name} flattens the rows themselves"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has forward hooks, or a forward of its own"
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "there are global forward hooks"
    per_task = [item.name for item in parts.owned if item.kind == "per_task"]
    return f"{per_task[0]} has other values in each task (per_task)" if per_task else ""


@contextmanager
def _shown(parts: ModelParts, ids: Sequence[TaskId], groups: Groups) -> Iterator[None]:
    """Make every layer and all heads compute each row as the task it belongs to, until the context is left."""
    finished = parts.tasks_of_layers()
    row_of = {task: finished.index(task) for task, _ in groups}
    rows = torch.tensor([row_of[task] for task in ids], dtype=torch.int32).to(groups[0][1].device)
    try:
        for layer in parts.layers.values():
            layer.row_tasks = rows
        for heads in parts.heads.values():
            heads.row_tasks = groups
        yield
    finally:
        for layer in parts.layers.values():
            layer.row_tasks = None
        for heads in parts.heads.values():
            heads.row_tasks = None
