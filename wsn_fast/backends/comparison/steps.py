"""Steps of optimizers, and sums of squares of gradients.

Steps may round differently from the torch backend's. But frozen weights keep every bit, and the threshold and the
masked weight that a step prepares are those of the weights and scores that it left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import moments
from .. import torch as portable
from ..updates import (
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
    Update,
)
from .masks import Where
from .tensors import Guarded, Source, close, inside, same, unsigned_zero

STEP = AdamW(0.01, 0.9, 0.999, 1e-8, 0.01, True)
MOMENTUM = SGD(0.01, 0.9, 0.0, 0.01, False, False)
TURNS = 2


class _Case(NamedTuple):
    """An update, its gradient, and what guards the tensors that it writes."""

    what: str
    update: Update
    gradient: Gradient
    rooms: Sequence[Guarded]

    def copy(self) -> _Case:
        """The same in other memory."""
        update = _copied(self.update)
        rooms = [Guarded.like(t) for t in (update.weight, update.scores, update.next.masked)]
        following = update.next._replace(masked=rooms[2].inner)
        update = update._replace(weight=rooms[0].inner, scores=rooms[1].inner, next=following)
        return _Case(self.what, update, _copied(self.gradient), rooms)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return type(value)(*map(_copied, value)) if hasattr(value, "_fields") else tuple(map(_copied, value))
    return value


def _state(name: str, source: Source, like: Tensor) -> Any:
    coded = "coded" in name
    steps = [torch.full((), 3.0, dtype=torch.float32, device=like.device) for _ in range(2)]

    def mean(signed: bool) -> Any:
        values = source.normal(like.numel()).to(like.device) * 0.1
        values = values if signed else values.square()
        if not coded:
            return values.to(like.dtype)
        stored = moments.zeros(like, "8bit", signed)
        moments.encode(values, stored, signed)
        return stored

    if name.startswith("adamw"):
        means = mean(True), mean(False), mean(True), mean(False)
        return CodedAdamWState(*means, *steps) if coded else AdamWState(*means, *steps)
    return CodedSGDState(mean(True), mean(True), *steps) if coded else SGDState(mean(True), mean(True))


def _cases(name: str, where: Where) -> Iterator[_Case]:
    source, device = Source(), where.device
    for i, n in enumerate(where.sizes):
        scores, weight = (source.normal(n).to(device, where.dtype) for _ in range(2))
        compute = where.compute(i)
        grad = inside(source.normal(n).to(device, compute))
        rule, rank = where.rule(i), n // 2
        tau, union = portable.threshold(scores, rank, rule), where.union(source, n)
        window = torch.zeros(WINDOW, dtype=torch.int64, device=device)
        following = Next(torch.empty_like(weight, dtype=compute), tau.clone(), rank, window)
        update = Update(weight, scores, union, rule, _state(name, source, weight), following)
        yield _Case(f"{n} elements, {rule}", update, Gradient(grad, None, tau), ())


def step(name: str, module: Any, where: Where) -> Iterator[str]:
    """Compare a step, and a second one with what the first one left in its plan and window."""
    settings = STEP if name.startswith("adamw") else MOMENTUM
    # Kernels may take a rough root where the means are coded.
    rtol = (64 if "coded" in name else 8) * torch.finfo(where.dtype).eps
    for case in _cases(name, where):
        mine, other = case.copy(), case.copy()
        plan: dict[Any, Any] = {}
        calls = [
            (module, Batch([mine.update], [mine.gradient], None, plan)),
            (portable, Batch([other.update], [other.gradient], None, {})),
        ]
        for turn in range(TURNS):
            for tensor, value in _pairs(mine, other) if turn else ():
                tensor.copy_(value)  # so that differences in rounding do not add up
            for called, batch in calls:
                getattr(called, name)(batch, [(settings, settings)])
            yield from _compare(case.update.weight, mine, other.update, rtol, f"{case.what}, step {turn + 1}")


def _pairs(mine: _Case, other: _Case) -> Iterator[tuple[Tensor, Tensor]]:
    yield mine.update.weight, other.update.weight
    yield from zip(_tensors(mine.update.state), _tensors(other.update.state), strict=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _compare(before: Tensor, mine: _Case, expected: Update, rtol: float, what: str) -> Iterator[str]:
    new = mine.update
    assert new.union is not None and new.next is not None
    frozen = portable.unpack(new.union, new.weight.numel())
    yield from same(new.weight[frozen], before[frozen], f"the frozen weights of {what}")
    yield from close(new.weight, expected.weight, f"the weights of {what}", rtol)
    yield from close(new.scores, expected.scores, f"the scores of {what}", rtol)
    tau = portable.threshold(new.scores, new.next.rank, new.rule)
    masked = portable.gate(new.weight, new.scores, tau, new.rule, new.next.masked.dtype)
    yield from same(unsigned_zero(new.next.tau), unsigned_zero(tau), f"the next threshold of {what}")
    yield from same(new.next.masked, masked, f"the next masked weight of {what}")
    if not all(room.is_intact() for room in mine.rooms):
        yield f"the update of {what}: written beyond the ends of a tensor"


def squares(module: Any, where: Where) -> Iterator[str]:
    """Compare the sums of squares of gradients."""
    for case in _cases("adamw_step", where):
        plan: dict[Any, Any] = {}
        expected = portable.gradient_squares(Batch([case.update], [case.gradient], None, {}))
        for turn in range(TURNS):
            found = module.gradient_squares(Batch([case.update], [case.gradient], None, plan))
            yield from close(found, expected, f"the squares of {case.what}, call {turn}", 1e-5)
