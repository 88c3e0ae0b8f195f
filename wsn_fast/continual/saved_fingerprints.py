"""Whether the finished tasks of a state are what they were when they ended, before the state is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn.task_ids import TaskId, task_key
from . import fingerprints, register_state

if TYPE_CHECKING:
    from .wsn import WSN


@torch.no_grad()
def drifts(wsn: WSN, state: Mapping[str, Any]) -> list[fingerprints.Drift]:
    """What the finished tasks of ``state`` would compute with that is not what they ended with.

    Args:
        wsn: the model, of which nothing is changed. If it is sharded, all processes call this.
        state: one that the model can load; of gated tensors, it has what this process holds.
    """
    register = register_state.parse(state["_extra_state"])
    found: list[fingerprints.Drift] = []
    for row, record in enumerate(register.records):
        now = dict(_saved(wsn, state, record["task"], row))
        then = record.get("fingerprint", {})
        found += fingerprints.compare(record["task"], {name: then[name] for name in now if name in then}, now)
    return found


def _saved(wsn: WSN, state: Mapping[str, Any], task: TaskId, row: int) -> Iterator[tuple[str, str]]:
    """The digests of what the state has of a task, by name. What is never saved is left out."""
    parts = wsn._parts
    paths = {module: f"{name}.".lstrip(".") for name, module in wsn.named_modules()}
    places: dict[int, str] = {}
    for layer in parts.layers.values():
        for gate in layer.gated():
            places.setdefault(id(gate.param), f"{paths[layer]}{gate.name}")
    for name, gate in parts.gated():
        place = places[id(gate.param)]
        saved = gate._replace(param=state[place], masks=state[f"{place}_masks"])
        yield from fingerprints.gated_digests(name, saved, row).items()
    for prefix, heads in parts.heads.items():
        for name, tensor in heads.saved(state, paths[heads]).get(task_key(task), {}).items():
            if isinstance(tensor, Tensor) and not name.endswith("_extra_state"):
                yield f"{prefix}.{name}".lstrip("."), fingerprints.digest(tensor)
    for item in parts.owned:
        name = f"{paths[item.module]}{item.attribute}"
        if item.kind == "per_task" and f"{name}_tasks" in state:
            yield item.name, fingerprints.digest(state[f"{name}_tasks"][row])
        elif item.kind == "frozen" and name in state:
            yield item.name, fingerprints.digest(state[name])
