"""The way back: one finished task of a subnet model as a plain module."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from . import ops, per_task
from .heads import TaskHeads
from .layers import FastSubnetTransposedLinear
from .subnet import SubnetLayer
from .tasks import TaskId, check_task


def to_dense(model: nn.Module, task: TaskId) -> nn.Module:
    """A plain copy of the model for one finished task, its mask baked into the weights.

    Subnet layers become ``nn.Linear`` and ``nn.ConvNd``, ``TaskHeads`` the task's ``nn.Linear``, per-task tensors
    that task's values. Nothing of this library is left in the copy, so that it can be pickled and used without it.
    Its outputs are bitwise equal to those of ``use_task(task)``; inference fast paths that convert switched off stay
    off for that. A layer that was Hugging Face's ``Conv1D`` becomes an ``nn.Linear`` whose weight is a transposed,
    hence not contiguous, tensor.

    Args:
        model: a ``WSN`` or the model inside it; unchanged, and its masks and scores are not copied.
        task: a finished task.

    Returns:
        The copy, in the mode (training or not) and on the device of ``model``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``task`` is neither an int nor a str.
        ValueError: the task is unknown (the message lists the known ones), or there is no subnet layer.
    """
    # Many models have a submodule called `model`; only a WSN can use tasks.
    inner = model.model if hasattr(model, "use_task") else model
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(inner).__name__}")
    task = check_task(task)
    layers = [module for module in inner.modules() if isinstance(module, SubnetLayer)]
    row = _row(layers, task)
    # deepcopy takes what is in the memo for copied: what the copy does not need, and the task's head.
    memo: dict[int, object] = {}
    for layer in layers:
        tensors = [t for g in layer.gated() for t in (g.score, g.masks, g.union, getattr(layer, f"{g.name}_view"))]
        memo.update({id(tensor): tensor for tensor in tensors if tensor is not None})
    for module in inner.modules():
        if isinstance(module, TaskHeads):
            memo[id(module)] = copy.deepcopy(module.head(task)).requires_grad_(True)
    dense: nn.Module = copy.deepcopy(inner, memo)
    baked: dict[tuple[int, int, bool], nn.Parameter] = {}
    for layer in layers:
        twin = memo[id(layer)]
        assert isinstance(twin, SubnetLayer)
        _bake(layer, twin, row, baked)
        _strip(twin)
    for module in dense.modules():
        _fix_per_task(module, row)
    return dense


def _row(layers: Sequence[SubnetLayer], task: TaskId) -> int:
    """The row of a finished task, which is the same in all layers."""
    if not layers:
        raise ValueError("model has no subnet layer, so there is nothing to bake: convert(model) comes first")
    tasks = layers[0].tasks
    for layer in layers:
        if layer.tasks != tasks:
            raise ValueError(f"subnet layers disagree about the finished tasks: {tasks} and {layer.tasks}")
    if task not in tasks:
        raise ValueError(f"task {task!r} is unknown; finished tasks: {tasks}")
    return tasks.index(task)


def _bake(layer: SubnetLayer, twin: SubnetLayer, row: int, baked: dict[tuple[int, int, bool], nn.Parameter]) -> None:
    """Give ``twin``, a copy of ``layer``, the masked weights of ``row``; ``baked`` keeps tied ones tied."""
    for name, param, score, masks, _ in layer.gated():
        flip = name == "weight" and isinstance(layer, FastSubnetTransposedLinear)
        key = (id(param), id(score), flip)
        if key not in baked:
            value = ops.gate_packed(param.detach(), masks[row], param.dtype)
            # A transposed view: with a contiguous copy, products would round differently from the layer's.
            baked[key] = nn.Parameter(value.t() if flip else value, requires_grad=param.requires_grad)
        twin._parameters[name] = baked[key]


def _strip(layer: nn.Module) -> None:
    """Make a subnet layer its dense parent again."""
    for name in SubnetLayer.GATED:
        del layer._parameters[f"{name}_score"], layer._buffers[f"{name}_masks"]
        for derived in (f"{name}_union", f"{name}_view"):
            del layer._buffers[derived]
            layer._non_persistent_buffers_set.discard(derived)
    ours = [*SubnetLayer.OWN]
    parent: type = next(c for c in type(layer).__mro__ if not issubclass(c, SubnetLayer))
    if isinstance(layer, FastSubnetTransposedLinear):
        parent, ours = nn.Linear, [*ours, "nx", "nf"]
    for attribute in ours:
        delattr(layer, attribute)
    layer.__class__ = parent


@torch.no_grad()
def _fix_per_task(module: nn.Module, row: int) -> None:
    for name in per_task.marked(module):
        getattr(module, name).copy_(per_task.value(module, name, row))
    per_task.unmark(module)
