"""to_dense: turns one finished task of a subnet model into a plain module."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from .. import ops
from ..nn import model_owner, per_task, shown_rows
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.reads import forget_reader
from ..nn.task_ids import TaskId, check_task


def to_dense(model: nn.Module, task: TaskId) -> nn.Module:
    """Make a plain copy of the model for one finished task, with the masks of that task baked into the weights.

    Subnet layers become modules of their dense classes (``nn.Linear``, ``nn.LSTM`` and so on), ``TaskHeads`` becomes
    the head of the task, and per-task tensors get the values of the task. The copy contains nothing of this library,
    so it can be pickled and used without it. Its outputs are bitwise equal to those of ``use_task(task)``. For this,
    what is fixed in ``model`` needs no gradient in the copy either, because PyTorch chooses some of its kernels by
    that: call ``requires_grad_(True)`` to train it. A layer that was Hugging Face's ``Conv1D`` becomes an
    ``nn.Linear``, whose weight is a transposed view and not contiguous.

    Args:
        model: a ``WSN`` or the model inside it; unchanged, and its masks and scores are not copied.
        task: a finished task.

    Returns:
        The copy, in the mode (training or not) and on the device of ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``task`` is neither an int nor a str.
        ValueError: the task is unknown (the message lists the known ones), or there is no subnet layer.
    """
    # Many models have a submodule called `model`, but only a WSN has use_task.
    inner = model.model if hasattr(model, "use_task") else model
    restore = getattr(model, "_restore_frozen", None)
    if restore is not None:
        restore()  # a step may have been interrupted
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(inner).__name__}")
    task = check_task(task)
    layers = [module for module in inner.modules() if isinstance(module, SubnetLayer)]
    row = _row(layers, task)
    # deepcopy does not copy what is in its memo. That saves the copies of masks and scores, and puts the head of the
    # task in the place of all heads.
    memo: dict[int, object] = {}
    for layer in layers:
        tensors = [t for g in layer.gated() for t in (g.score, g.masks, g.union, getattr(layer, f"{g.name}_view"))]
        memo.update({id(tensor): tensor for tensor in tensors if tensor is not None})
    for module in inner.modules():
        if isinstance(module, TaskHeads):
            memo[id(module)] = module.dense(task)
    dense: nn.Module = copy.deepcopy(inner, memo)
    done: dict[tuple[int, int, bool], nn.Parameter] = {}
    for layer in layers:
        twin = memo[id(layer)]
        assert isinstance(twin, SubnetLayer)
        twin.become_dense(_baked(layer, row, done))
    for module in dense.modules():
        _fix_per_task(module, row)
        forget_reader(module)
    return dense


def _row(layers: Sequence[SubnetLayer], task: TaskId) -> int:
    """The row of a finished task, which is the same in all layers."""
    if any(layer.gate_state.shards is not None for layer in layers):
        raise RuntimeError("a sharded model has parts of its weights only: load the full state in one process")
    if not layers:
        raise ValueError("model has no subnet layer, so there is nothing to bake: convert(model) comes first")
    tasks = layers[0].tasks
    for layer in layers:
        if layer.tasks != tasks:
            raise ValueError(f"subnet layers disagree about the finished tasks: {tasks} and {layer.tasks}")
    if task not in tasks:
        raise ValueError(f"task {task!r} is unknown; finished tasks: {tasks}")
    return tasks.index(task)


def _baked(layer: SubnetLayer, row: int, done: dict[tuple[int, int, bool], nn.Parameter]) -> dict[str, nn.Parameter]:
    """The gated tensors of ``layer`` with the masks of ``row`` baked in, as its dense class stores them. ``done`` holds
    those of earlier layers, so that tied ones stay tied."""
    params = {}
    for name, param, score, masks, _ in layer.gated():
        transposed = name == "weight" and layer.TRANSPOSED
        key = (id(param), id(score), transposed)
        if key not in done:
            value = ops.gate_packed(param.detach(), masks[row], param.dtype)
            # A view and not a contiguous copy: products with a copy would round differently from the layer's.
            done[key] = nn.Parameter(value.t() if transposed else value, requires_grad=False)
        params[name] = done[key]
    return params


@torch.no_grad()
def _fix_per_task(module: nn.Module, row: int) -> None:
    shown_rows.unwatch(module)
    model_owner.forget(module)
    for name in per_task.marked(module):
        getattr(module, name).copy_(per_task.value(module, name, row))
    per_task.unmark(module)
