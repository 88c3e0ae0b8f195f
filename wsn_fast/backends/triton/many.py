"""The gates, or the gradients, of many tensors in few launches; see :mod:`wsn_fast.backends.triton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import gate as gate_kernels
from ...kernels import gate_gradients, update_table, warm_gate, warm_threshold
from ...kernels import threshold as select
from ...kernels._elementwise import TensorTable
from ...kernels.threshold_table import DTYPES
from ...kernels.update_table import UpdateTable
from ..mask import GateOrder, GradientOrder
from ..updates import WINDOW, Plan
from .device import gpu_of, on_device_of, table_of
from .plans import Addresses, Entry, addresses_of, are_aligned, is_capturing, keep

DTYPE, IS_CONTIGUOUS = attrgetter("dtype"), methodcaller("is_contiguous")
TABLES = 8
"""How many sets of tensors a plan keeps the tables of, not counting those that a captured graph reads."""


# --- gates
@dataclass
class _Cold:
    """The tables of gates that share launches, and where the thresholds go, [T] and each by itself: a select, which
    knows nothing of the thresholds of before, and a gate."""

    selection: select.Table
    gate: TensorTable
    taus: Tensor
    tau_of_each: Sequence[Tensor]
    captured: bool = False

    def launch(self, rule: str) -> None:
        """Make the gates."""
        size = select.workspace_size(self.selection)
        workspace = torch.empty(size, dtype=torch.int64, device=self.taus.device)
        select.select(table=self.selection, tau=self.taus, workspace=workspace, rule=rule)
        gate_kernels.gate_multi(self.gate, rule=rule)


@dataclass
class _Warm:
    """The same for gates that are made again and again: in one pass by a guess, which is corrected then. The windows
    say where the thresholds are expected, [T, WINDOW]."""

    table: UpdateTable
    windows: Tensor
    taus: Tensor
    tau_of_each: Sequence[Tensor]
    captured: bool = False

    def launch(self, rule: str) -> None:
        """Make the gates."""
        size = update_table.workspace_size(self.table)
        buffer = torch.empty(size, dtype=torch.int64, device=self.taus.device)
        workspace = update_table.workspace(self.table, buffer)
        warm_gate.gate_by_guess(self.table, workspace, rule=rule)
        warm_threshold.settle(self.table, workspace, rule=rule)


_Made = _Cold | _Warm


def gates(orders: Sequence[GateOrder], plan: Plan | None = None) -> list[Tensor]:
    """Do what :func:`wsn_fast.backends.torch.gates` does, with 4 launches for any number of tensors of one kind, and
    with 3 if there is a plan and each weight has the dtype of its scores.

    Args:
        orders: the gates to make, with contiguous tensors.
        plan: what the caller keeps for the next call, or None. It also keeps where the thresholds were, so that the
            next call for the same tensors finds them faster; the results do not depend on it. The tables of tensors
            that are new to it may be copied from the host, which a CUDA graph cannot capture. The thresholds that are
            returned are written again by the next call for the same tensors.
    """
    known: _KnownGates | None = None if plan is None else plan.get(_KnownGates)
    taus: list[Tensor] = [orders[0].scores] * len(orders)
    with on_device_of(orders[0].scores), torch.no_grad():
        if known is None or known.orders is not orders:
            known = _KnownGates(orders, _calls(orders, plan))
            if plan is not None:
                plan[_KnownGates] = known
        for rule, members, made in known.calls:
            made.captured |= is_capturing(made.taus.device)
            made.launch(rule)
            for i, tau in zip(members, made.tau_of_each, strict=True):
                taus[i] = tau
    return taus


@dataclass
class _KnownGates:
    """The launches of the last call, for a call with the same sequence of orders: its caller says that no tensor has
    moved since."""

    orders: Sequence[GateOrder]
    calls: list[tuple[str, list[int], _Made]]
    captured: bool = True  # there is one in a plan, and it is never dropped


def _calls(orders: Sequence[GateOrder], plan: Plan | None) -> list[tuple[str, list[int], _Made]]:
    """The launches for these orders: the rule, the places of those that share them, and their tables."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, (weight, scores, _, rule, masked) in enumerate(orders):
        kinds.setdefault((rule, scores.dtype, weight.dtype, masked.dtype), []).append(i)
    return [(kind[0], members, _made([orders[i] for i in members], plan)) for kind, members in kinds.items()]


def _made(orders: Sequence[GateOrder], plan: Plan | None) -> _Made:
    """The tables of these tensors, from the plan if it has them."""
    if plan is None:
        return _cold(orders)
    # Sizes and dtypes too: other tensors may come to lie where these were.
    key = tuple(
        (
            *(tensor.data_ptr() for tensor in (o.weight, o.scores, o.masked)),
            *(tensor.dtype for tensor in (o.weight, o.scores, o.masked)),
            *(o.weight.numel(), o.rank),
        )
        for o in orders
    )
    made: _Made | None = plan.get(key)
    if made is None:
        head = orders[0]
        dtypes = {head.weight.dtype, head.scores.dtype, head.masked.dtype}
        made = _warm(orders) if dtypes <= {*DTYPES} and head.weight.dtype is head.scores.dtype else _cold(orders)
        keep(plan, key, made, TABLES)
    return made


def _thresholds(orders: Sequence[GateOrder]) -> Tensor:
    return torch.empty(len(orders), dtype=orders[0].scores.dtype, device=orders[0].scores.device)


def _cold(orders: Sequence[GateOrder]) -> _Cold:
    taus = _thresholds(orders)
    tau_of_each, device = taus.unbind(), taus.device
    scores, config = [o.scores.detach() for o in orders], table_of(device)
    gate = gate_kernels.gate_table(
        [o.weight.detach() for o in orders], scores, tau_of_each, [o.masked for o in orders], None, config.gate
    )
    search = config.search(sum(score.numel() for score in scores), gpu_of(device))
    selection = select.make_table(scores, [o.rank for o in orders], search)
    return _Cold(selection, gate.to(device), taus, tau_of_each)


def _warm(orders: Sequence[GateOrder]) -> _Warm:
    taus = _thresholds(orders)
    tau_of_each, device = taus.unbind(), taus.device
    windows = torch.zeros(len(orders), WINDOW, dtype=torch.int64, device=device)
    gated = [
        update_table.Gated(o.weight.detach(), o.scores.detach(), next=update_table.Next(o.masked, tau, o.rank, window))
        for o, tau, window in zip(orders, tau_of_each, windows, strict=True)
    ]
    sizes = [o.weight.numel() for o in orders]
    config = update_table.spread(warm_gate.CONFIG, sum(sizes), gpu_of(device).processors)
    buffer = torch.empty(update_table.table_size(sizes, config), dtype=torch.int64, device=device)
    return _Warm(update_table.make_table(gated, buffer, config), windows, taus, tau_of_each)


# --- gradients
class _Kind(NamedTuple):
    """What has to be equal for gradients that are formed by the same launch.

    Attributes:
        rule: "magnitude" or "value".
        grad: the dtype of G.
        weight: the dtype of the weight.
        scores: the dtype of the scores.
        union: whether there is a union.
        needed: whether dW is needed, and whether dS is.
        stays: whether weight, scores and union are contiguous, so that their addresses stay the same.
    """

    rule: str
    grad: torch.dtype
    weight: torch.dtype
    scores: torch.dtype
    union: bool
    needed: tuple[bool, bool]
    stays: bool


def gates_backward(orders: Sequence[GradientOrder], plan: Plan | None = None) -> None:
    """Do what :func:`wsn_fast.backends.torch.gates_backward` does, with one launch for all tensors of one kind, and
    another launch, or a copy, for the addresses that have changed.

    Args:
        orders: the gradients to form. A G or a result that is not contiguous takes a copy. A weight, scores or union
            that is not contiguous takes a copy and a launch.
        plan: what the caller keeps for the next call, or None. Without a plan, each tensor takes a launch. So it does
            in a capture if the plan has no table of these weights, scores and unions.
    """
    if not orders:
        return
    known: _Known | None = None if plan is None else plan.get(_Known)
    copies: list[tuple[Tensor, Tensor]] = []
    with on_device_of(orders[0].weight), torch.no_grad():
        columns = _Columns(*zip(*orders, strict=True))
        if known is not None and known.serves(columns):
            _launch(known.kind, known.entry, columns)
            return
        kinds: dict[_Kind, list[GradientOrder]] = {}
        for order in orders:
            if order.weight.numel() and (order.weight_grad is not None or order.score_grad is not None):
                kinds.setdefault(_kind_of(order), []).append(order)
        for kind, members in kinds.items():
            _form(kind, [_dense(order, copies) for order in members], plan)
        for result, written in copies:
            result.copy_(written)


class _Columns(NamedTuple):
    """Orders, field by field: see :class:`GradientOrder`."""

    grad: Sequence[Tensor]
    weight: Sequence[Tensor]
    scores: Sequence[Tensor]
    tau: Sequence[Tensor]
    union: Sequence[Tensor | None]
    rule: Sequence[str]
    weight_grad: Sequence[Tensor | None]
    score_grad: Sequence[Tensor | None]


class _Known:
    """The tensors of the last call, all of one kind: what a call with the same tensors need not find out again. The
    plan holds them, so that no other tensor can take the place of one."""

    captured = True  # there is one in a plan, and it is never dropped

    def __init__(self, kind: _Kind, entry: Entry[TensorTable], columns: _Columns) -> None:
        self.kind, self.entry = kind, entry
        self._inputs = [*columns.weight, *columns.scores, *columns.union]
        self._staying = [tensor for tensor in self._inputs if tensor is not None]
        self._addresses = [*map(Tensor.data_ptr, self._staying)]

    def serves(self, columns: _Columns) -> bool:
        """Whether the orders are for the same tensors, which are where they were."""
        results = columns.weight_grad, columns.score_grad
        if len(columns.grad) * 3 != len(self._inputs):
            return False
        for needed, column in zip(self.kind.needed, results, strict=True):
            if not all(map(is_not if needed else is_, column, repeat(None))):
                return False
        moving = [*columns.grad, *chain.from_iterable(compress(results, self.kind.needed))]
        return (
            all(map(is_, (*columns.weight, *columns.scores, *columns.union), self._inputs))
            and self._addresses == [*map(Tensor.data_ptr, self._staying)]
            and {*map(DTYPE, columns.grad)} == {self.kind.grad}
            and {*columns.rule} == {self.kind.rule}
            and all(map(IS_CONTIGUOUS, (*columns.weight, *columns.scores, *moving)))
        )


def _kind_of(order: GradientOrder) -> _Kind:
    grad, weight, scores, _, union, rule, dw, ds = order
    stays = weight.is_contiguous() and scores.is_contiguous() and (union is None or union.is_contiguous())
    needed = dw is not None, ds is not None
    return _Kind(rule, grad.dtype, weight.dtype, scores.dtype, union is not None, needed, stays)


def _dense(order: GradientOrder, copies: list[tuple[Tensor, Tensor]]) -> GradientOrder:
    """The order on contiguous tensors. Where a result is not contiguous, ``copies`` gets it and the tensor that is
    written in its place."""
    grad, weight, scores, tau, union, rule, dw, ds = order
    if all(tensor is None or tensor.is_contiguous() for tensor in (grad, weight, scores, union, dw, ds)):
        return order

    def result(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.is_contiguous():
            return tensor
        copies.append((tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)))
        return copies[-1][1]

    inputs = grad.contiguous(), weight.contiguous(), scores.contiguous(), tau
    return GradientOrder(*inputs, None if union is None else union.contiguous(), rule, result(dw), result(ds))


def _form(kind: _Kind, orders: Sequence[GradientOrder], plan: Plan | None) -> None:
    """Form the gradients of contiguous tensors of one kind."""
    entry = None if plan is None or not kind.stays else _entry(kind, orders, plan)
    if entry is None:
        config = table_of(orders[0].weight.device).gate_backward
        for grad, weight, scores, tau, union, rule, dw, ds in orders:
            gate_gradients.gate_backward(grad, weight, scores, tau, union, dw, ds, rule=rule, config=config)
        return
    columns = _Columns(*zip(*orders, strict=True))
    _launch(kind, entry, columns)
    if plan is not None:
        plan[_Known] = _Known(kind, entry, columns)


def _launch(kind: _Kind, entry: Entry[TensorTable], columns: _Columns) -> None:
    grads, taus = [*map(Tensor.data_ptr, columns.grad)], [*map(Tensor.data_ptr, columns.tau)]
    dws, dss = addresses_of(columns.weight_grad), addresses_of(columns.score_grad)
    gate_gradients.gate_backward_multi(
        entry.table,
        entry.addresses_at([grads, dws, dss, taus]),
        grad=kind.grad,
        needed=kind.needed,
        aligned=are_aligned(grads) and are_aligned(dws) and are_aligned(dss),
        rule=kind.rule,
    )


def _entry(kind: _Kind, orders: Sequence[GradientOrder], plan: Plan) -> Entry[TensorTable] | None:
    """What the plan has for these tensors. It is made anew if the plan has nothing, but not in a capture, which cannot
    copy a table from the host."""
    weights, scores, unions = zip(*((o.weight, o.scores, o.union) for o in orders), strict=True)
    sizes = [weight.numel() for weight in weights]  # other tensors may come to lie where these were
    key = (kind, *(tuple(addresses_of(column)) for column in (weights, scores, unions)), *sizes)
    entry: Entry[TensorTable] | None = plan.get(key)
    device = weights[0].device
    if entry is None and not is_capturing(device):
        config = table_of(device).gate_backward
        table = gate_gradients.gate_backward_table(weights, scores, unions if kind.union else None, config)
        entry = Entry(table.to(device), Addresses(gate_gradients.MOVING, len(orders), device))
        keep(plan, key, entry, TABLES)
    return entry
