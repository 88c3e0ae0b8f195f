"""Calls of the elementwise primitives, and the bytes that each has to move.

Bytes are those that must be read and written for an element; a store to memory that is not in a cache costs a read too,
which is not counted. An operation on many tensors gets the pieces of one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import moments
from ...backends.mask import GateOrder, GradientOrder, RestoreOrder
from ...backends.updates import (
    SGD,
    WINDOW,
    AdamW,
    AdamWState,
    Batch,
    CodedAdamWState,
    CodedSGDState,
    Gradient,
    Next,
    SGDState,
    State,
    Update,
)
from .timing import Call
from .weights import FROZEN, RULE, Weight, rank

ADAMW = AdamW(1e-5, 0.9, 0.999, 1e-8, 0.0, True)
MOMENTUM = SGD(1e-5, 0.9, 0.0, 0.0, False, False)
"""Small steps: thousands of timed ones stay near the start."""
CODE = 1 + 4 / 256
"""Bytes of a running mean in 8 bits, with its part of a scale."""
BIT = 1 / 8


class Operands(NamedTuple):
    """What a call is made of.

    Attributes:
        module: the backend.
        w: weight, scores, masks and gradient.
        dtype: of masked weights.
        pieces: into how many tensors the weight is cut for operations on many.
    """

    module: ModuleType
    w: Weight
    dtype: torch.dtype
    pieces: int

    def cut(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The pieces of tensors of the weight's size, and of packed masks of it."""
        size = -(-self.w.weight.numel() // (8 * self.pieces)) * 8  # whole bytes of packed masks
        cut = (x.view(-1).split(size // 8 if x.dtype is torch.uint8 else size) for x in tensors)
        yield from zip(*cut, strict=True)


class Operation(NamedTuple):
    """One primitive.

    Attributes:
        prepare: makes the call, which returns its results: a tensor or a tuple of them.
        bytes_each: bytes per element, from the item sizes of the weight and of the masked weight or its gradient, and
            the number of tasks.
        typed: whether it works on floats, whose dtype decides which backends have it.
    """

    prepare: Callable[[Operands], Call]
    bytes_each: Callable[[int, int, int], float]
    typed: bool = True


# --- one tensor
def _threshold(o: Operands) -> Call:
    return lambda: o.module.threshold(o.w.scores, rank(o.w.scores.numel()), RULE)


def _keep_mask(o: Operands) -> Call:
    return lambda: o.module.keep_mask(o.w.scores, o.w.tau, RULE)


def _gate(o: Operands) -> Call:
    return lambda: o.module.gate(o.w.weight, o.w.scores, o.w.tau, RULE, o.dtype)


def _gate_packed(o: Operands) -> Call:
    return lambda: o.module.gate_packed(o.w.weight, o.w.packed, o.dtype)


def _gate_backward(o: Operands) -> Call:
    w = o.w
    return lambda: o.module.gate_backward(w.grad, w.weight, w.scores, w.tau, w.packed_frozen, RULE, True, True)


def _pack(o: Operands) -> Call:
    return lambda: o.module.pack(o.w.mask)


def _unpack(o: Operands) -> Call:
    return lambda: o.module.unpack(o.w.packed, o.w.mask.numel())


def _union(o: Operands) -> Call:
    return lambda: o.module.union(o.w.task_masks)


def _popcount(o: Operands) -> Call:
    return lambda: o.module.popcount(o.w.packed)


def _restore_frozen(o: Operands) -> Call:
    def call() -> Tensor:
        o.module.restore_frozen(o.w.scores, o.w.weight, o.w.packed_frozen)
        return o.w.scores

    return call


# --- many tensors
def _gates(o: Operands) -> Call:
    masked, plan = torch.full_like(o.w.weight, torch.nan, dtype=o.dtype), dict[Any, Any]()
    orders = [GateOrder(a, s, rank(a.numel()), RULE, out) for a, s, out in o.cut(o.w.weight, o.w.scores, masked)]

    def call() -> Tensor:
        o.module.gates(orders, plan)
        return masked

    return call


def _gates_backward(o: Operands) -> Call:
    w, plan = o.w, dict[Any, Any]()
    results = tuple(torch.full_like(w.weight, torch.nan) for _ in range(2))
    pieces = o.cut(w.grad, w.weight, w.scores, w.packed_frozen, *results)
    orders = [GradientOrder(g, a, s, w.tau, union, RULE, dw, ds) for g, a, s, union, dw, ds in pieces]

    def call() -> tuple[Tensor, ...]:
        o.module.gates_backward(orders, plan)
        return results

    return call


def _restore_frozen_many(o: Operands) -> Call:
    plan: dict[Any, Any] = {}
    orders = [RestoreOrder(*piece) for piece in o.cut(o.w.scores, o.w.weight, o.w.packed_frozen)]

    def call() -> Tensor:
        o.module.restore_frozen_many(orders, plan)
        return o.w.scores

    return call


# --- updates
def _state(name: str, like: Tensor) -> State:
    """Running means of zeros, after one update."""
    coded, steps = "coded" in name, (torch.ones((), device=like.device), torch.ones((), device=like.device))

    def mean(signed: bool) -> Any:
        return moments.zeros(like, "8bit", signed) if coded else torch.zeros_like(like)

    if name.startswith("adamw"):
        means = mean(True), mean(False), mean(True), mean(False)
        return CodedAdamWState(*means, *steps) if coded else AdamWState(*means, *steps)
    return CodedSGDState(mean(True), mean(True), *steps) if coded else SGDState(mean(True), mean(True))


def updates(o: Operands, name: str) -> Batch:
    """The updates of the pieces of a weight, each with the gate of the next step."""
    w, made, gradients = o.w, list[Update](), list[Gradient]()
    masked = torch.zeros_like(w.weight, dtype=o.dtype)
    for weight, scores, grad, union, out in o.cut(w.weight, w.scores, w.grad, w.packed_frozen, masked):
        tau = w.tau.clone()
        following = Next(out, tau, rank(weight.numel()), torch.zeros(WINDOW, dtype=torch.int64, device=tau.device))
        made.append(Update(weight, scores, union, RULE, _state(name, weight), following))
        gradients.append(Gradient(grad, None, tau))
    return Batch(made, gradients, None, {})


def _step(name: str) -> Callable[[Operands], Call]:
    settings = ADAMW if name.startswith("adamw") else MOMENTUM

    def prepare(o: Operands) -> Call:
        batch, pair = updates(o, name), (settings, settings)
        run, pairs = getattr(o.module, name), [pair] * len(batch.updates)

        def call() -> Tensor:
            run(batch, pairs)
            return o.w.weight

        return call

    return prepare


def _gradient_squares(o: Operands) -> Call:
    batch = updates(o, "sgd_step")
    return lambda: o.module.gradient_squares(batch)


OPERATIONS = MappingProxyType(
    {
        "threshold": Operation(_threshold, lambda w, g, t: w),
        "keep_mask": Operation(_keep_mask, lambda w, g, t: w + 1),
        "gate": Operation(_gate, lambda w, g, t: 2 * w + g),
        "gate_packed": Operation(_gate_packed, lambda w, g, t: w + BIT + g),
        "gate_backward": Operation(_gate_backward, lambda w, g, t: g + 4 * w + BIT),
        "gates": Operation(_gates, lambda w, g, t: 2 * w + g),
        "gates_backward": Operation(_gates_backward, lambda w, g, t: g + 4 * w + BIT),
        "restore_frozen": Operation(_restore_frozen, lambda w, g, t: FROZEN * 2 * w + BIT),
        "restore_frozen_many": Operation(_restore_frozen_many, lambda w, g, t: FROZEN * 2 * w + BIT),
        "adamw_step": Operation(_step("adamw_step"), lambda w, g, t: 12 * w + 2 * g + BIT),
        "sgd_step": Operation(_step("sgd_step"), lambda w, g, t: 8 * w + 2 * g + BIT),
        "adamw_coded_step": Operation(_step("adamw_coded_step"), lambda w, g, t: 4 * w + 2 * g + 8 * CODE + BIT),
        "sgd_coded_step": Operation(_step("sgd_coded_step"), lambda w, g, t: 4 * w + 2 * g + 4 * CODE + BIT),
        "gradient_squares": Operation(_gradient_squares, lambda w, g, t: g + 2 * w + BIT),
        "pack": Operation(_pack, lambda w, g, t: 1 + BIT, typed=False),
        "unpack": Operation(_unpack, lambda w, g, t: 1 + BIT, typed=False),
        "union": Operation(_union, lambda w, g, t: (t + 1) * BIT, typed=False),
        "popcount": Operation(_popcount, lambda w, g, t: BIT, typed=False),
    }
)
"""The primitives by their names in the backends, but for the products."""
