"""Rows of several tasks in one pass over the model: each layer reads its weight once and gives every row the masks of
its own task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from . import products
from .heads import TaskHeads
from .layers import FastSubnetLinear
from .parts import ModelParts
from .tasks import TaskId

ROW_WISE = (
    nn.Sequential, nn.Identity, nn.Flatten, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU,
    nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Softplus,
)  # fmt: skip
"""Modules that treat every row of a batch for itself, so that rows of several tasks may meet in them."""


Groups = list[tuple[TaskId, Tensor]]
"""Each task with the indices of its rows, int64."""


def group(ids: Sequence[TaskId], device: torch.device) -> Groups:
    """The rows of each task of a batch, tasks in the order of their first rows."""
    indices: dict[TaskId, list[int]] = {}
    for index, task in enumerate(ids):
        indices.setdefault(task, []).append(index)
    return [(task, torch.tensor(where).to(device)) for task, where in indices.items()]


def obstacle(parts: ModelParts, ids: Sequence[TaskId]) -> str:
    """Why rows of the tasks ``ids`` cannot share a pass over the model; empty if they can.

    A container that is not an ``nn.Sequential`` counts if its class says ``row_wise = True``: that its forward treats
    every row for itself and keeps their order.
    """
    finished = parts.tasks_of_layers()
    for task in ids:
        if task not in finished:
            return f"task {task!r} is not finished; finished tasks: {finished}"
    for name, module in parts.model.named_modules():
        known = type(module) in (*ROW_WISE, FastSubnetLinear, TaskHeads) or getattr(type(module), "row_wise", False)
        inside_heads = any(name.startswith(f"{heads}.heads") for heads in parts.heads)
        if not known and not inside_heads:
            return f"{name or 'the model'} is a {type(module).__name__}, not known to treat every row for itself"
        if isinstance(module, nn.Flatten) and module.start_dim < 1:
            return f"{name} flattens the rows themselves"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has forward hooks, or a forward of its own"
    if _global_forward_hooks or _global_forward_pre_hooks:
        return "there are global forward hooks"
    per_task = [item.name for item in parts.owned if item.kind == "per_task"]
    return f"{per_task[0]} has values of its own for each task" if per_task else ""


def pays(parts: ModelParts, rows: int) -> bool:
    """Whether one pass over ``rows`` rows has been measured to be faster than a pass per task, in every layer."""
    for layer in parts.layers.values():
        weight, (n, k) = layer.weight, layer.weight.shape
        fusion = products.linear_fusion(
            "masked_linear_tasks", weight.device, weight.dtype, "packed", n, k, layer.backend
        )
        if rows > fusion.rows:
            return False
    return True


@contextmanager
def shown(parts: ModelParts, ids: Sequence[TaskId], groups: Groups) -> Iterator[None]:
    """Every layer and every set of heads gives each row the task it belongs to."""
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
