"""Removes a finished task from a model (exact unlearning): its mask, its head and its copies go, what it alone used is
drawn anew, and every other task stays what it is, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ops
from ..nn import per_task, rows
from ..nn.gate import Gated
from ..nn.gated import SubnetLayer
from ..nn.scores import draw
from ..nn.shards import local, shard_of
from .model_parts import ModelParts

T = TypeVar("T")


@torch.no_grad()
def remove(parts: ModelParts, row: int, redraw_free: bool, then: Callable[[], T]) -> T:
    """Remove the task of ``row`` from the parts of a model. No finished task may be in use.

    Calls ``then`` afterwards and returns its result. After an error, in ``then`` too, everything is as before. For
    this, copies of what is drawn anew are kept meanwhile.

    Args:
        parts: the parts.
        row: the row of the task among the finished ones.
        redraw_free: draw all weights that no other task uses, and all scores, instead of those that the task alone
            used.
        then: what belongs to the removal.
    """
    task = next(iter(parts.layers.values())).tasks[row]
    used = {name: gate.masks[row] for name, gate in parts.gated()}
    with ExitStack() as undo:
        undo.callback(torch.clear_autocast_cache)
        _undo_rows(parts, undo)
        for layer in parts.layers.values():
            for gate in layer.gated():
                rows.remove(layer, f"{gate.name}_masks", row)
            layer.tasks = [*layer.tasks[:row], *layer.tasks[row + 1 :]]
            layer.rebuild_union()
        unions = parts.unions()
        layer_of = {id(gate.score): layer for layer in parts.layers.values() for gate in layer.gated()}
        for name, gate in parts.gated():
            own = None if redraw_free else used[name]
            _redraw(layer_of[id(gate.score)], gate, unions[id(gate.param)], own, undo)
        for module in parts.copied:
            for name in per_task.marked(module):
                last = row == len(getattr(module, f"{name}_tasks")) - 1
                rows.remove(module, f"{name}_tasks", row)
                if last and row:  # the next task starts with the values of the task before it
                    live = getattr(module, name)
                    undo.callback(live.copy_, live.clone())
                    live.copy_(per_task.value(module, name, row - 1))
        for heads in parts.heads.values():
            undo.callback(heads.put_back, heads.remove(task))
        result = then()
        undo.pop_all()
    torch.clear_autocast_cache()
    return result


def _undo_rows(parts: ModelParts, undo: ExitStack) -> None:
    """When ``undo`` is left, the rows of all tasks are there again, and the unions of the masks."""
    before = [(module, dict(module._buffers)) for module in (*parts.layers.values(), *parts.copied)]
    tasks = [(layer, layer.tasks) for layer in parts.layers.values()]

    def put_back() -> None:
        for module, buffers in before:
            module._buffers.update(buffers)
        for layer, known in tasks:
            layer.tasks = known
            layer.rebuild_union()

    undo.callback(put_back)


def _redraw(layer: SubnetLayer, gate: Gated, union: Tensor | None, used: Tensor | None, undo: ExitStack) -> None:
    """Draw new values for the weights that no remaining task uses, and new scores.

    Args:
        layer: the layer.
        gate: one of its tensors.
        union: the packed mask of the elements that the remaining tasks use, or None.
        used: the packed mask of the removed task: only weights and scores inside it are drawn. None draws all free
            weights and all scores.
        undo: puts the values of now back.
    """
    param, score, shard = local(gate.param), local(gate.score), shard_of(gate.param)
    shape = param.shape
    free = torch.ones(shape, dtype=torch.bool, device=param.device)
    if union is not None:
        free = ~ops.unpack_mask(union, shape)
    scores = torch.ones_like(free)
    if used is not None:
        free &= ops.unpack_mask(used, shape)
        scores = free
    if not gate.param.requires_grad:
        free = torch.zeros_like(free)  # no task has trained it
    bound = 1 / math.sqrt(layer.fan_in(gate.name))  # as torch initialises weights and biases
    for tensor, where in ((param, free), (score, scores)):
        undo.callback(tensor.__setitem__, where, tensor[where])

    def draw_score(tensor: Tensor) -> None:
        draw(tensor, layer._score_init, layer.fan_in(gate.name))

    for tensor, where, fill in (
        (param, free, lambda new: new.uniform_(-bound, bound)),
        (score, scores, draw_score),
    ):
        if shard is not None:
            fresh = shard.draw(tensor, fill)
        else:
            fresh = torch.empty_like(tensor)
            fill(fresh)
        tensor.copy_(torch.where(where, fresh, tensor))
    increment_version([gate.param, gate.score])
