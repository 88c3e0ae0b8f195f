"""What training changes in a model, to be copied and put back: the state of the best epoch, for example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .. import ops
from ..nn import per_task
from ..nn.shards import local
from ..nn.task_ids import TaskId
from .frozen_values import Frozen
from .model_parts import ModelParts


def trainable(parts: ModelParts) -> Iterator[tuple[str, Tensor]]:
    """All tensors that training changes, by name: parameters, scores and live buffers. While a finished task is in use,
    the live values are yielded and not those of that task."""
    stored: set[int] = set()
    for _, gate in parts.gated():
        stored |= {id(gate.masks), id(gate.union)}
    for layer in parts.layers.values():
        stored |= {id(getattr(layer, f"{name}_view")) for name in layer.GATED}
    live: dict[int, Tensor] = {}
    for module in parts.model.modules():
        for name in per_task.marked(module):
            kept = getattr(module, f"{name}_live")
            stored |= {id(getattr(module, f"{name}_tasks")), id(kept)}
            if kept is not None:
                live[id(getattr(module, name))] = kept
    for name, tensor in (*parts.model.named_parameters(), *parts.model.named_buffers()):
        if id(tensor) not in stored:
            yield name, live.get(id(tensor), tensor)


def moving(parts: ModelParts, task: TaskId) -> Iterator[Frozen]:
    """What the training of ``task`` may change: each tensor with the packed mask of where it is frozen, or None."""
    unions = parts.unions()
    for _, gate in parts.gated():
        yield Frozen(gate.param, unions[id(gate.param)])
        yield Frozen(gate.score, None)
    untrained = parts.untrained()
    for heads in parts.heads.values():
        for tensor in (*heads.head(task).parameters(), *heads.head(task).buffers()):
            if id(tensor) not in untrained:
                yield Frozen(tensor, None)
    first = not parts.tasks_of_layers()
    for item in parts.owned:
        if item.kind != "frozen" or (first and isinstance(item.tensor, nn.Parameter)):
            yield Frozen(item.tensor, None)


@torch.no_grad()
def load(parts: ModelParts, state: Mapping[str, Tensor], fixed: Iterable[Tensor]) -> None:
    """Copy ``state`` into the tensors of :func:`trainable`.

    Args:
        parts: the parts of the model.
        state: a copy of :func:`trainable` from an earlier time.
        fixed: the parameters that must not change at all.

    Raises:
        ValueError: names or shapes are not those of this model, or the state would change what finished tasks use.
            If this is raised, nothing has been changed.
    """
    own = dict(trainable(parts))
    if own.keys() != state.keys():
        raise ValueError(f"state is of another model: names {sorted(own.keys() ^ state.keys())} are in only one")
    wrong = [name for name, tensor in own.items() if tensor.shape != state[name].shape]
    if wrong:
        raise ValueError(f"state is of another model: {wrong} have other shapes")
    changed = parts.agree(moved(parts, own, state, fixed))
    if changed:
        raise ValueError(
            "state is from before a task ended, or an average of weights (see wsn_fast.optim.averaging): it would "
            f"change what finished tasks use of these tensors: {changed}"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    torch.clear_autocast_cache()  # it keeps casts of the values that were there


def moved(
    parts: ModelParts, own: Mapping[str, Tensor], state: Mapping[str, Tensor], fixed: Iterable[Tensor]
) -> list[str]:
    """The names whose values in ``state`` and ``own`` differ where finished tasks use them."""
    # None for a fixed parameter, which must keep all values, and for a gated tensor before the first task has ended.
    unions = parts.unions() | dict.fromkeys(map(id, (*fixed, *parts.fixed_buffers(parts.tasks_of_layers()))))
    found = []
    for name, tensor in own.items():
        if id(tensor) not in unions:
            continue
        union, then = unions[id(tensor)], state[name].to(tensor.device)
        if union is not None:
            tensor, then = (ops.gate_packed(local(t).detach(), union, t.dtype) for t in (tensor, then))
        elif any(tensor is gate.param for _, gate in parts.gated()):
            continue  # no task has ended
        if not torch.equal(tensor, then):
            found.append(name)
    return found
