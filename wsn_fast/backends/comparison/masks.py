"""Operations that select, mask and pack: their results have the bits of the torch backend's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import torch as portable
from ..mask import GateOrder, GradientOrder, RestoreOrder
from .tensors import SCORES, Guarded, Source, inside, same, unsigned_zero

SHARES = (0.0, 0.5, 0.97)


class Where(NamedTuple):
    """What an operation is compared on.

    Attributes:
        device: of all tensors.
        dtype: of the weights and scores.
        scores: names of :data:`wsn_fast.backends.comparison.tensors.SCORES`.
        sizes: numbers of elements.
        rules: rules of selection, in turn.
        narrow: the compute dtype of some float32 weights, as under autocast.
    """

    device: torch.device
    dtype: torch.dtype
    scores: Sequence[str]
    sizes: Sequence[int]
    rules: Sequence[str] = ("magnitude", "value")
    narrow: torch.dtype = torch.bfloat16

    def rule(self, i: int) -> str:
        """The rule of the i-th tensor."""
        return self.rules[i % len(self.rules)]

    def compute(self, i: int) -> torch.dtype:
        """The compute dtype of the i-th tensor."""
        return self.narrow if self.dtype is torch.float32 and i % 2 else self.dtype

    def union(self, source: Source, n: int) -> Tensor:
        """A packed mask [ceil(n / 8)] of frozen elements."""
        return inside(portable.pack(source.chance(n, 0.3)).to(self.device))


class _Gate(NamedTuple):
    """One gated tensor to compare on."""

    what: str
    weight: Tensor
    scores: Tensor
    rule: str
    rank: int
    compute: torch.dtype


def _gates_of(where: Where, source: Source) -> Iterator[_Gate]:
    for i, name in enumerate(where.scores):
        for k, n in enumerate(where.sizes):
            weight, scores = source.normal(n), SCORES[name](source, n)
            weight[:: max(1, n // 3)] = -0.0
            yield _Gate(
                f"{name}, {n} elements, {where.rule(i + k)}",
                inside(weight.to(where.device, where.dtype)),
                inside(scores.to(where.device, where.dtype)),
                where.rule(i + k),
                round(SHARES[(i + k) % len(SHARES)] * (n - 1)),
                where.compute(i + k),
            )


def threshold(module: Any, where: Where) -> Iterator[str]:
    """Compare thresholds, in which the sign of a zero does not count."""
    for gate in _gates_of(where, Source()):
        expected = portable.threshold(gate.scores, gate.rank, gate.rule)
        found = module.threshold(gate.scores, gate.rank, gate.rule)
        yield from same(unsigned_zero(found), unsigned_zero(expected), f"the threshold of {gate.what}")


def one_gate(name: str, module: Any, where: Where) -> Iterator[str]:
    """Compare ``keep_mask``, ``gate`` or ``gate_packed``."""
    for what, weight, scores, rule, rank, compute in _gates_of(where, Source()):
        tau = portable.threshold(scores, rank, rule)
        arguments: dict[str, tuple[Any, ...]] = {
            "keep_mask": (scores, tau, rule),
            "gate": (weight, scores, tau, rule, compute),
            "gate_packed": (weight, portable.pack(portable.keep_mask(scores, tau, rule)), compute),
        }
        found, expected = (getattr(m, name)(*arguments[name]) for m in (module, portable))
        yield from same(found, expected, f"{name} of {what}")


def gates(module: Any, where: Where) -> Iterator[str]:
    """Compare the masked weights of many tensors in one call, and twice more with what the first call left in its plan,
    after the scores have moved."""
    cases = [*_gates_of(where, Source())]
    rooms = [Guarded.empty(torch.empty_like(gate.weight, dtype=gate.compute)) for gate in cases]
    calls = [
        # The tensors of one call have one compute dtype.
        [(gate, room) for gate, room in zip(cases, rooms, strict=True) if gate.compute is compute]
        for compute in dict.fromkeys(gate.compute for gate in cases)
    ]
    for call in calls:
        plan: dict[Any, Any] = {}
        orders = [GateOrder(gate.weight, gate.scores, gate.rank, gate.rule, room.inner) for gate, room in call]
        for turn in range(3):
            taus = module.gates(orders, plan)
            for (gate, room), tau in zip(call, taus, strict=True):
                expected = portable.threshold(gate.scores, gate.rank, gate.rule)
                yield from same(unsigned_zero(tau), unsigned_zero(expected), f"tau of {gate.what}, call {turn}")
                masked = portable.gate(gate.weight, gate.scores, expected, gate.rule, gate.compute)
                what = f"the masked weight of {gate.what}, call {turn}"
                yield from same(room.inner, masked, what)
                yield from _intact([room], what)
                gate.scores.mul_(1.01 if turn else -1.5)


def gradients(name: str, module: Any, where: Where) -> Iterator[str]:
    """Compare ``gate_backward`` or ``gates_backward``."""
    source, turns = Source(), 1 if name == "gate_backward" else 2
    for what, weight, scores, rule, rank, compute in _gates_of(where, source):
        n = weight.numel()
        grad = inside(source.normal(n).to(where.device, compute))
        union, tau = where.union(source, n), portable.threshold(scores, rank, rule)
        expected = portable.gate_backward(grad, weight, scores, tau, union, rule, True, True)
        plan: dict[Any, Any] = {}
        rooms = [Guarded.empty(weight) for _ in range(2)]
        orders = [GradientOrder(grad, weight, scores, tau, union, rule, *(room.inner for room in rooms))]
        for turn in range(turns):
            if name == "gate_backward":
                found = module.gate_backward(grad, weight, scores, tau, union, rule, True, True)
            else:
                found = [room.inner.fill_(torch.nan) for room in rooms]
                module.gates_backward(orders, plan)
            for of, one, other in zip(("dW", "dS"), found, expected, strict=True):
                assert one is not None and other is not None
                yield from same(one, other, f"{of} of {what}, call {turn}")
            yield from _intact(rooms, f"the gradients of {what}")


def restored(name: str, module: Any, where: Where) -> Iterator[str]:
    """Compare ``restore_frozen`` or ``restore_frozen_many``."""
    source = Source()
    for n in where.sizes:
        saved, now = (inside(source.normal(n).to(where.device, where.dtype)) for _ in range(2))
        union = where.union(source, n)
        room, expected, plan = Guarded.like(now), now.clone(), dict[Any, Any]()
        portable.restore_frozen(expected, saved, union)
        orders = [RestoreOrder(room.inner, saved, union)]
        for _ in range(1 if name == "restore_frozen" else 2):
            room.inner.copy_(now)
            if name == "restore_frozen":
                module.restore_frozen(room.inner, saved, union)
            else:
                module.restore_frozen_many(orders, plan)
            yield from same(room.inner, expected, f"{n} restored elements")
            yield from _intact([room], f"{n} restored elements")


def bits(name: str, module: Any, where: Where) -> Iterator[str]:
    """Compare an operation on packed masks."""
    source = Source()
    for n in where.sizes:
        mask = source.chance(n, 0.4).to(where.device)
        packed = inside(portable.pack(mask))
        rows = torch.stack([portable.pack(source.chance(n, 0.3)) for _ in range(3)]).to(where.device)
        arguments: dict[str, tuple[Any, ...]] = {
            "pack": (mask,), "unpack": (packed, n), "union": (rows,), "popcount": (packed,),
        }  # fmt: skip
        found, expected = (getattr(m, name)(*arguments[name]) for m in (module, portable))
        yield from same(found, expected.to(found.dtype), f"{name} of {n} bits")


def _intact(rooms: Sequence[Guarded], what: str) -> Iterator[str]:
    if not all(room.is_intact() for room in rooms):
        yield f"{what}: written beyond the ends of a tensor"
