"""The optimizer primitives of the Triton backend; see :mod:`wsn_fast.backends.triton`.

Tensors that are alike (:class:`_Kind`) are updated by the same launches. The kernels read the addresses of these
tensors from a table on the device. The optimizer owns a ``plan``, a dict that is empty at first, in which the functions
here keep these tables from step to step. Without a plan they write the tables at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import _layout as layout
from ...kernels import coded_step, grad_norm, optimizer_step, step_coefficients, update_table, warm_threshold
from ...kernels.update_table import CONFIGS, FEW, PLAIN, Gated, UpdateTable, configs, spread
from ..moments import Stored
from ..updates import (
    SGD,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Plan,
    SGDState,
    State,
    Update,
)
from .device import gpu_of
from .plans import Addresses, Entry, addresses_of, are_aligned, is_capturing, keep

DTYPE = attrgetter("dtype")
TABLES = 16
"""How many tables a plan keeps, not counting those that a captured graph reads."""


class _Kind(NamedTuple):
    """What has to be equal for tensors that are updated by the same launches.

    Attributes:
        rule: "magnitude" or "value".
        grad: the dtype of G, or of dW where the gradients are given.
        given: whether dW and dS are given, and not G.
        scale: the dtype of the scale, None without one.
        weight: the dtype of the weight.
        union: whether there is a union.
        masked: the dtype of the next masked weight, None without ``next``.
        states: how many states the weight has, and its scores.
        steps: the dtype of the step counts, None for SGD with states in float32.
        storages: how the states of the weight are stored, and those of the scores.
    """

    rule: str
    grad: torch.dtype
    given: bool
    scale: torch.dtype | None
    weight: torch.dtype
    union: bool
    masked: torch.dtype | None
    states: tuple[int, int]
    steps: torch.dtype | None
    storages: tuple[str, str]


@dataclass
class _Call:
    """The tensors of one kind, which share launches.

    Attributes:
        kind: what is equal for them.
        indices: their places in the batch.
        gated: what stays at its address from step to step.
        entry: their table; None before it is known.
    """

    kind: _Kind
    indices: list[int]
    gated: list[Gated]
    entry: Entry[UpdateTable] | None = None


@dataclass
class _Known:
    """The calls of the last batch, for a batch of the same updates with gradients of the same dtypes."""

    updates: Sequence[Update]
    dtypes: Sequence[Any]
    calls: list[_Call]
    captured: bool = True  # there is one in a plan, and it is never dropped


def adamw_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """Do what :func:`wsn_fast.backends.torch.adamw_step` does, in one pass over each tensor. All tensors are float32,
    bfloat16 or float16."""
    _step(batch, settings, _adamw)


def adamw_coded_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]]) -> None:
    """Do what :func:`wsn_fast.backends.torch.adamw_coded_step` does, in one pass over each tensor. Where means are
    coded, the root and the quotient of an update are off by some units in the last place."""
    _step(batch, settings, _adamw)


def sgd_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """Do what :func:`adamw_step` does, for SGD.

    Raises:
        ValueError: a momentum is not 0 and has no buffer.
    """
    for update, pair in zip(batch.updates, settings, strict=True):
        assert isinstance(update.state, SGDState | CodedSGDState)
        for name, buffer, s in zip(SGDState._fields, update.state[:2], pair, strict=True):
            if buffer is None and s.momentum != 0:
                raise ValueError(f"{name} must be a tensor for a momentum of {s.momentum}, got None")
    _step(batch, settings, _sgd)


def sgd_coded_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]]) -> None:
    """Do what :func:`wsn_fast.backends.torch.sgd_coded_step` does, in one pass over each tensor.

    Raises:
        ValueError: a momentum is not 0 and has no buffer.
    """
    sgd_step(batch, settings)


def gradient_squares(batch: Batch) -> Tensor:
    """Do what :func:`wsn_fast.backends.torch.gradient_squares` does, with two launches for each kind of tensors. No
    gradient is written. The ``state`` and the ``next`` of the updates are ignored."""
    updates = [update._replace(next=None, state=None) for update in batch.updates]
    device = updates[0].weight.device
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    squares = [torch.zeros(2, dtype=dtype, device=device)] * len(updates)
    with torch.cuda.device_of(updates[0].weight), torch.no_grad():
        for call in _calls(batch._replace(updates=updates), []):
            gradients = _contiguous(call, batch)
            table, addresses, aligned = _describe(call, gradients, batch.scale, batch.plan)
            found = torch.empty(len(gradients), layout.SUM_COLUMNS.value, dtype=dtype, device=device)
            parts = torch.empty(table.programs.shape, dtype=torch.float64, device=device)
            grad_norm.squares(
                table,
                addresses,
                found,
                parts=parts,
                grad=call.kind.grad,
                scale=call.kind.scale,
                given=call.kind.given,
                aligned=aligned,
                rule=call.kind.rule,
            )
            for i, sums in zip(call.indices, found, strict=True):
                squares[i] = sums
    return torch.cat(squares)


def _adamw(s: AdamW) -> dict[str, Any]:
    decay, decoupled = (0.0, s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
    return {"lr": s.lr, "beta1": s.beta1, "beta2": s.beta2, "eps": s.eps, "decay": decay, "decoupled": decoupled}


def _sgd(s: SGD) -> dict[str, Any]:
    rest = {"decay": s.weight_decay, "nesterov": float(s.nesterov), "first": float(s.first)}
    return {"lr": s.lr, "momentum": s.momentum, "rest": 1 - s.dampening, **rest}


def _step(batch: Batch, settings: Sequence[tuple[Any, Any]], numbers: Callable[[Any], dict[str, Any]]) -> None:
    copies: list[tuple[Tensor, Tensor]] = []
    with torch.cuda.device_of(batch.updates[0].weight), torch.no_grad():
        for call in _known_calls(batch, copies):
            _update(call, batch, [settings[i] for i in call.indices], numbers)
        for tensor, dense in copies:
            tensor.copy_(dense)


def _known_calls(batch: Batch, copies: list[tuple[Tensor, Tensor]]) -> list[_Call]:
    """The calls of a batch: those of the last one if it is the same."""
    grads, score_grads, _ = zip(*batch.gradients, strict=True)
    scale = None if batch.scale is None else batch.scale.dtype
    dtypes = [scale, *map(DTYPE, grads), *map(is_, score_grads, repeat(None))]
    known: _Known | None = None if batch.plan is None else batch.plan.get(_Known)
    if known is not None and known.updates is batch.updates and known.dtypes == dtypes:
        return known.calls
    calls = _calls(batch, copies)
    if batch.plan is not None and not copies:
        batch.plan[_Known] = _Known(batch.updates, dtypes, calls)
    return calls


def _calls(batch: Batch, copies: list[tuple[Tensor, Tensor]]) -> list[_Call]:
    """The updates of a batch by kind; those of empty tensors are left out."""
    calls: dict[_Kind, _Call] = {}
    for i, (update, gradient) in enumerate(zip(batch.updates, batch.gradients, strict=True)):
        if update.weight.numel():
            gated, kind = _member(update, gradient, batch.scale, copies)
            call = calls.setdefault(kind, _Call(kind, [], []))
            call.indices.append(i)
            call.gated.append(gated)
    return list(calls.values())


def _member(
    update: Update, gradient: Gradient, scale: Tensor | None, copies: list[tuple[Tensor, Tensor]]
) -> tuple[Gated, _Kind]:
    """The operands of an update as contiguous tensors, and its kind. Where one had to be copied, ``copies`` gets the
    tensor and its copy, which the caller has to copy back."""

    def dense(tensor: Tensor) -> Tensor:
        if not tensor.is_contiguous():
            copies.append((tensor, tensor.contiguous()))
            return copies[-1][1]
        return tensor

    weight_states, scores_states, steps = _states(update.state)
    gated = Gated(
        weight=dense(update.weight),
        scores=dense(update.scores),
        weight_states=tuple(dense(state.values) for state in weight_states),
        scores_states=tuple(dense(state.values) for state in scores_states),
        union=update.union,
        steps=steps,
        next=update.next and update_table.Next(*update.next),
        weight_scales=_scales(weight_states),
        scores_scales=_scales(scores_states),
    )
    kind = _Kind(
        rule=update.rule,
        grad=gradient.grad.dtype,
        given=gradient.score_grad is not None,
        scale=None if scale is None else scale.dtype,
        weight=update.weight.dtype,
        union=update.union is not None,
        masked=None if update.next is None else update.next.masked.dtype,
        states=(len(weight_states), len(scores_states)),
        steps=None if steps is None else steps[0].dtype,
        storages=gated.storages,
    )
    return gated, kind


_States = Sequence[Stored]


def _states(state: State | None) -> tuple[_States, _States, tuple[Tensor, Tensor] | None]:
    """The states of a weight, those of its scores, and their step counts, which only AdamW and coded states need."""
    if state is None:
        return (), (), None
    each = 2 if isinstance(state, AdamWState | CodedAdamWState) else 1
    for_weight, for_scores = (
        tuple(mean if isinstance(mean, Stored) else Stored(mean, None) for mean in means if mean is not None)
        for means in (state[:each], state[each : 2 * each])
    )
    return for_weight, for_scores, None if isinstance(state, SGDState) else (state[-2], state[-1])


def _scales(states: _States) -> tuple[Tensor, ...]:
    return tuple(state.scales for state in states if state.scales is not None)


def _update(
    call: _Call, batch: Batch, settings: Sequence[tuple[Any, Any]], numbers: Callable[[Any], dict[str, Any]]
) -> None:
    """Update the tensors of one kind."""
    kind = call.kind
    gradients = _contiguous(call, batch)
    table, addresses, aligned = _describe(call, gradients, batch.scale, batch.plan)
    size = update_table.workspace_size(table)
    workspace = update_table.workspace(table, torch.empty(size, dtype=torch.int64, device=addresses.device))
    for run, pair in _runs(settings):
        step_coefficients.prepare(table, workspace, run, *map(numbers, pair), rule=kind.rule)
    (coded_step.coded_update if table.is_coded else optimizer_step.update)(
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
        warm_threshold.settle(_for_settling(table), workspace, rule=kind.rule)


def _for_settling(table: UpdateTable) -> UpdateTable:
    """The table with the tile in which masked weights are corrected for every table, so that no further kernel is
    needed."""
    return table._replace(config=replace(table.config, block=CONFIGS[0].block))


def _runs(settings: Sequence[tuple[Any, Any]]) -> Iterator[tuple[range, tuple[Any, Any]]]:
    """The ranges of consecutive tensors with the same pair of settings, and this pair."""
    start = 0
    for _, group in groupby(settings, id):
        run = list(group)
        yield range(start, start + len(run)), run[0]
        start += len(run)


def _describe(
    call: _Call, gradients: Sequence[Gradient], scale: Tensor | None, plan: Plan | None
) -> tuple[UpdateTable, Tensor, bool]:
    """The table of a call, the addresses of its gradients, and whether the addresses of G (or dW) and dS are multiples
    of 16 bytes. In a capture, a table that is not in the plan is written by the graph, and not kept."""
    entry = call.entry
    if entry is None:
        device = call.gated[0].weight.device
        key = (call.kind, *map(update_table.key, call.gated))
        entry = None if plan is None else plan.get(key)
        if entry is None:
            entry = _new_entry(call.gated, device)
            if plan is not None and not is_capturing(device):
                keep(plan, key, entry, TABLES)
        if not is_capturing(device):
            call.entry = entry
    grads, score_grads, taus = zip(*gradients, strict=True)
    none = [0] * len(grads)
    rows = [
        [*map(Tensor.data_ptr, grads)],
        none if call.kind.given else addresses_of(taus),
        [*map(Tensor.data_ptr, score_grads)] if call.kind.given else none,
        none if scale is None else [scale.data_ptr()] * len(grads),
    ]  # in the order of kernels/_layout.py, GRADIENT_...
    aligned = are_aligned(rows[layout.GRADIENT_WEIGHT]) and are_aligned(rows[layout.GRADIENT_SCORES])
    return entry.table, entry.addresses_at(rows), aligned


def _contiguous(call: _Call, batch: Batch) -> list[Gradient]:
    """The gradients of a call, as the kernels need them. The caller keeps them until the launches are made."""
    gradients = [batch.gradients[i] for i in call.indices]
    grads, score_grads, _ = zip(*gradients, strict=True)
    if all(map(Tensor.is_contiguous, (*grads, *(score_grads if call.kind.given else ())))):
        return gradients
    for i, (grad, score_grad, tau) in enumerate(gradients):
        gradients[i] = Gradient(grad.contiguous(), None if score_grad is None else score_grad.contiguous(), tau)
    return gradients


def _new_entry(gated: Sequence[Gated], device: torch.device) -> Entry[UpdateTable]:
    """The table of the tensors, and memory for the addresses of their gradients."""
    sizes = [one.weight.numel() for one in gated]
    total = sum(sizes)
    storages = gated[0].storages
    many, few = CONFIGS if storages == PLAIN else configs(storages)
    config = spread(few if total < FEW else many, total, gpu_of(device).processors)
    buffer = torch.empty(update_table.table_size(sizes, config), dtype=torch.int64, device=device)
    return Entry(update_table.make_table(gated, buffer, config), Addresses(layout.GRADIENTS, len(gated), device))
