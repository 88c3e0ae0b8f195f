"""The gates that are made after the step of an optimizer that does not make them itself, for all layers together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.mask import GateOrder
from ..backends.updates import CallKey, Plan
from .gate import Gated
from .gate_columns import GateColumns
from .gated import SubnetLayer

SETTINGS = attrgetter("rule", "_density", "task_density", "_backend", "gate_state.has_owner", "gate_state.gates_ahead")


class Ahead:
    """The gates that the layers of one optimizer want to have made.

    Args:
        layers: the layers whose weights the optimizer updates.
        owned: the ids of all parameters that it updates.
    """

    def __init__(self, layers: Sequence[SubnetLayer], owned: AbstractSet[int]) -> None:
        self._layers, self._owned = layers, owned
        self._settings, self._dtypes = self._look()
        wanted: dict[CallKey, list[tuple[SubnetLayer, Gated]]] = {}
        for layer in layers:
            for gate in _wanted(layer):
                wanted.setdefault(CallKey(gate.score.device, gate.score.dtype, layer.backend), []).append((layer, gate))
        self._calls = {key: (_columns(pairs), [_order(*pair) for pair in pairs]) for key, pairs in wanted.items()}
        tensors = [tensor for columns, _ in self._calls.values() for tensor in (*columns.params, *columns.scores)]
        self._tensors, self._addresses = tensors, [*map(Tensor.data_ptr, tensors)]

    def holds(self, owned: AbstractSet[int]) -> bool:
        """Whether the same gates are wanted, of the same tensors in the same places."""
        return (
            self._owned == owned
            and (self._settings, self._dtypes) == self._look()
            and all(columns.are_in_place() for columns, _ in self._calls.values())
            and self._addresses == [*map(Tensor.data_ptr, self._tensors)]
        )

    def make(self, plan: Plan) -> None:
        """Make those gates that are not up to date. ``plan`` is what the backends keep from call to call."""
        for key, (columns, orders) in self._calls.items():
            ready = columns.are_ready()
            if all(ready):
                continue
            if any(ready):
                stale = [not one for one in ready]
                columns, orders = columns.those(stale), [*compress(orders, stale)]
            # The same list of orders says that nothing has moved: see ops.gates.
            taus = ops.gates(orders, key.backend, plan.setdefault(key, {}))
            columns.made_ready([order.masked for order in orders], taus)

    def _look(self) -> tuple[list[Any], list[dict[str, torch.dtype]]]:
        """What decides which gates are wanted, beside the tensors."""
        settings = [*map(SETTINGS, self._layers)]
        return settings, [dict(layer.gate_state.compute_dtypes) for layer in self._layers]


def _wanted(layer: SubnetLayer) -> list[Gated]:
    state = layer.gate_state
    if not state.gates_ahead or layer.one_pass or ops.constant_threshold(layer.rule) is not None:
        return []  # backends rank the scores of the gates that they make together
    named = [gate for gate in layer.gated() if gate.name in state.compute_dtypes]
    return [gate for gate in named if gate.param.is_contiguous() and gate.score.is_contiguous()]


def _columns(gates: Iterable[tuple[SubnetLayer, Gated]]) -> GateColumns:
    return GateColumns((layer, gate.name, gate.param, gate.score) for layer, gate in gates)


def _order(layer: SubnetLayer, gate: Gated) -> GateOrder:
    param, dtype = gate.param.detach(), layer.gate_state.compute_dtypes[gate.name]
    ready = layer.gate_state.ready.get(gate.name)
    masked = None if ready is None else ready.masked
    if masked is None or (masked.shape, masked.dtype, masked.device) != (param.shape, dtype, param.device):
        masked = torch.empty(param.shape, dtype=dtype, device=param.device)
    rank = ops.threshold_rank(param.numel(), layer.density_of(gate.name), layer.rule)
    return GateOrder(param, gate.score.detach(), rank, layer.rule, masked)
