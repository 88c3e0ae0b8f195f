"""The optimizer primitives of the Triton backend; see :mod:`wsn_fast.backends.triton`.

Tensors of one kind share their launches, however many they are. What the kernels know of them is a table on the device,
which a ``plan`` keeps from step to step: a dict that belongs to the optimizer, empty at first, and only looked into
here. Without one the table is written at every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import optimizer, prepare, squares, update_table, warm
from ..kernels._elementwise import ALIGNMENT
from ..kernels.update_table import CONFIGS, FEW, Gated, UpdateTable, address
from .updates import SGD, AdamW, AdamWState, Plan, SGDState, Update

TABLES = 16
"""How many tables a plan keeps, beside those that a captured graph reads."""


class _Kind(NamedTuple):
    """What tensors that share a launch have in common."""

    rule: str
    grad: torch.dtype
    given: bool
    scale: torch.dtype | None
    weight: torch.dtype
    union: bool
    masked: torch.dtype | None
    states: tuple[int, int]
    steps: torch.dtype | None


class _Item(NamedTuple):
    """A tensor with all that its update needs, contiguous."""

    gated: Gated
    new: tuple[Tensor | None, ...]
    """G or dW, dS, tau and the scale: what may be somewhere else at every step."""
    settings: tuple[dict[str, Any], dict[str, Any]]
    kind: _Kind


@dataclass
class _Table:
    """An entry of a plan: a table, and the addresses of what is new at every step with what was written there last."""

    table: UpdateTable
    addresses: Tensor
    written: list[int]
    captured: bool = False


def adamw_step(
    updates: Sequence[Update],
    states: Sequence[AdamWState],
    for_weights: Sequence[AdamW],
    for_scores: Sequence[AdamW],
    plan: Plan | None = None,
) -> None:
    """:func:`wsn_fast.backends.torch.adamw_step` in one pass over each tensor; float32, bfloat16 and float16.

    Args:
        updates: as there, on one device.
        states: as there.
        for_weights: as there.
        for_scores: as there.
        plan: what the caller keeps for the next call, or None.
    """
    settings = [tuple(map(_adamw, pair)) for pair in zip(for_weights, for_scores, strict=True)]
    steps = [(weight.step, scores.step) for weight, scores in zip(for_weights, for_scores, strict=True)]
    _step(updates, [(state[:2], state[2:]) for state in states], settings, steps, plan)


def sgd_step(
    updates: Sequence[Update],
    states: Sequence[SGDState],
    for_weights: Sequence[SGD],
    for_scores: Sequence[SGD],
    plan: Plan | None = None,
) -> None:
    """As :func:`adamw_step`, for SGD."""
    settings = [tuple(map(_sgd, pair)) for pair in zip(for_weights, for_scores, strict=True)]
    buffers = []
    for state, pair in zip(states, zip(for_weights, for_scores, strict=True), strict=True):
        for name, buffer, s in zip(SGDState._fields, state, pair, strict=True):
            if buffer is None and s.momentum != 0:
                raise ValueError(f"{name} must be a tensor for a momentum of {s.momentum}, got None")
        buffers.append(tuple([b] if s.momentum != 0 else [] for b, s in zip(state, pair, strict=True)))
    _step(updates, buffers, settings, [None] * len(updates), plan)


def gradient_squares(updates: Sequence[Update], plan: Plan | None = None) -> Tensor:
    """:func:`wsn_fast.backends.torch.gradient_squares` in two launches for tensors of one kind; no gradient is written.

    Args:
        updates: as there, on one device; of ``next`` nothing is touched.
        plan: as for :func:`adamw_step`, the same one.
    """
    dtype = torch.float64 if updates[0].weight.is_cpu else torch.float32
    sums = [torch.zeros(2, dtype=dtype, device=update.weight.device) for update in updates if not update.weight.numel()]
    places = [i for i, update in enumerate(updates) if not update.weight.numel()]
    with torch.cuda.device_of(updates[0].weight), torch.no_grad():
        items = [_item(u._replace(next=None), ((), ()), ({}, {}), None, []) for u in updates if u.weight.numel()]
        wanted = [i for i, update in enumerate(updates) if update.weight.numel()]
        for kind, indices in _alike(items):
            table, addresses, aligned = _describe([items[i] for i in indices], plan)
            found = torch.empty(len(indices), 2, dtype=dtype, device=addresses.device)
            parts = torch.empty(table.programs.shape, dtype=torch.float64, device=addresses.device)
            squares.squares(
                table,
                addresses,
                found,
                parts=parts,
                grad=kind.grad,
                scale=kind.scale,
                given=kind.given,
                aligned=aligned,
                rule=kind.rule,
            )
            sums += found
            places += [wanted[i] for i in indices]
    return torch.cat([sums[places.index(i)] for i in range(len(updates))])


def _adamw(s: AdamW) -> dict[str, Any]:
    decay, decoupled = (0.0, s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
    return {"lr": s.lr, "beta1": s.beta1, "beta2": s.beta2, "eps": s.eps, "decay": decay, "decoupled": decoupled}


def _sgd(s: SGD) -> dict[str, Any]:
    rest = {"decay": s.weight_decay, "nesterov": float(s.nesterov), "first": float(s.first)}
    return {"lr": s.lr, "momentum": s.momentum, "rest": 1 - s.dampening, **rest}


def _step(
    updates: Sequence[Update],
    states: Sequence[tuple[Sequence[Any], ...]],
    settings: Sequence[tuple[dict[str, Any], ...]],
    steps: Sequence[tuple[Tensor, Tensor] | None],
    plan: Plan | None,
) -> None:
    copies: list[tuple[Tensor, Tensor]] = []
    operands = zip(updates, states, settings, steps, strict=True)
    with torch.cuda.device_of(updates[0].weight), torch.no_grad():
        items = [_item(*one, copies) for one in operands if one[0].weight.numel()]
        for kind, indices in _alike(items):
            _update([items[i] for i in indices], kind, plan)
        for tensor, dense in copies:
            tensor.copy_(dense)


def _item(
    update: Update,
    states: tuple[Sequence[Tensor], ...],
    settings: tuple[dict[str, Any], ...],
    steps: tuple[Tensor, Tensor] | None,
    copies: list[tuple[Tensor, Tensor]],
) -> _Item:
    """An update on contiguous tensors; ``copies`` gets those that are to be copied back."""

    def dense(tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            copies.append((tensor, tensor.contiguous()))
            return copies[-1][1]
        return tensor

    grad, score_grad, weight, scores, tau, union, rule, scale, following = update
    given = score_grad is not None
    weight_states, scores_states = (tuple(map(dense, of_one)) for of_one in states)
    gated = Gated(
        dense(weight),
        dense(scores),
        weight_states,
        scores_states,
        union,
        steps,
        following and update_table.Next(*following),
    )
    new = (
        grad.contiguous(),
        score_grad if score_grad is None else score_grad.contiguous(),
        None if given else tau,
        scale,
    )
    kind = _Kind(
        rule,
        grad.dtype,
        given,
        None if scale is None else scale.dtype,
        weight.dtype,
        union is not None,
        None if following is None else following.masked.dtype,
        (len(weight_states), len(scores_states)),
        None if steps is None else steps[0].dtype,
    )
    return _Item(gated, new, settings, kind)  # type: ignore[arg-type]


def _alike(items: Sequence[_Item]) -> Iterable[tuple[_Kind, list[int]]]:
    """The indices of the items of each kind."""
    kinds: dict[_Kind, list[int]] = {}
    for i, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(i)
    return kinds.items()


def _update(items: Sequence[_Item], kind: _Kind, plan: Plan | None) -> None:
    """Update tensors of one kind."""
    table, addresses, aligned = _describe(items, plan)
    size = update_table.workspace_size(table)
    workspace = update_table.workspace(table, torch.empty(size, dtype=torch.int64, device=addresses.device))
    for run, (for_weights, for_scores) in _runs(items):
        prepare.prepare(table, workspace, run, for_weights, for_scores, rule=kind.rule)
    optimizer.update(
        table,
        workspace,
        addresses,
        grad=kind.grad,
        scale=kind.scale,
        given=kind.given,
        aligned=aligned,
        rule=kind.rule,
    )
    if kind.masked is not None:
        warm.settle(table, workspace, rule=kind.rule)


def _runs(items: Sequence[_Item]) -> Iterator[tuple[range, tuple[dict[str, Any], dict[str, Any]]]]:
    """The stretches of items that have the same settings."""

    def key(item: _Item) -> list[Any]:
        return [id(value) if isinstance(value, Tensor) else value for one in item.settings for value in one.values()]

    start = 0
    for _, group in groupby(items, key):
        run = list(group)
        yield range(start, start + len(run)), run[0].settings
        start += len(run)


def _describe(items: Sequence[_Item], plan: Plan | None) -> tuple[UpdateTable, Tensor, bool]:
    """The table of the items, the addresses of what is new, and whether these of vectors are multiples of 16 bytes.

    A captured graph runs what is launched here again, and nothing else: so it writes its own addresses, beside a table
    that was there before and stays, or one that it writes as well.
    """
    device = items[0].gated.weight.device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    values = [address(tensor) for column in zip(*(item.new for item in items), strict=True) for tensor in column]
    key = (items[0].kind, *(update_table.key(item.gated) for item in items))
    entry: _Table | None = None if plan is None else plan.get(key)
    if entry is None:
        entry = _table(items, device)
        if plan is not None and not capturing:
            _keep(plan, key, entry)
    if capturing:
        entry.captured = True
        entry = _Table(entry.table, torch.empty_like(entry.addresses), [0] * len(values))
    update_table.write(entry.addresses.view(-1), values, entry.written)
    entry.written = values
    aligned = all(value % ALIGNMENT == 0 for value in values[: 2 * len(items)])
    return entry.table, entry.addresses, aligned


def _table(items: Sequence[_Item], device: torch.device) -> _Table:
    sizes = [item.gated.weight.numel() for item in items]
    config = CONFIGS[1] if sum(sizes) < FEW else CONFIGS[0]
    buffer = torch.empty(update_table.table_size(sizes, config), dtype=torch.int64, device=device)
    table = update_table.make_table([item.gated for item in items], buffer, config)
    # No address is 0 but that of what is not read.
    return _Table(table, torch.empty(4, len(items), dtype=torch.int64, device=device), [0] * (4 * len(items)))


def _keep(plan: Plan, key: Any, entry: _Table) -> None:
    loose = [old for old, kept in plan.items() if not kept.captured]
    if len(loose) >= TABLES:
        del plan[loose[0]]
    plan[key] = entry
