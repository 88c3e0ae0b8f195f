"""Updates of gated tensors with random operands, for the tests of the optimizer primitives on any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import (
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

Settings = AdamW | SGD
Pair = tuple[Any, Any]
"""The settings for a weight, and those for its scores."""

ADAMW = AdamW(0.01, 0.9, 0.999, 1e-8, 0.1, True)
PLAIN = SGD(0.05, 0.0, 0.0, 0.0, False, False)
MOMENTUM = PLAIN._replace(momentum=0.9)


class Problem(NamedTuple):
    """A gated tensor to update, and its gradients."""

    update: Update
    gradient: Gradient

    def with_state(self, state: State | None) -> Problem:
        return self._replace(update=self.update._replace(state=state))

    def with_gradient(self, **changes: Any) -> Problem:
        return self._replace(gradient=self.gradient._replace(**changes))


def make_problem(
    n: int, dtype: torch.dtype = torch.float32, grad: torch.dtype = torch.float32, rule: str = "magnitude",
    union: bool = True, given: bool = False,
) -> Problem:  # fmt: skip
    """Without a state and a next gate; ``given`` says whether the gradients are dW and dS."""
    weight, scores = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    packed = portable.pack(torch.rand(n) < 0.3) if union else None
    if given:
        gradient = Gradient(torch.randn(n).to(dtype), torch.randn(n).to(dtype), None)
    else:
        tau = portable.threshold(scores, n // 2, rule) if n else torch.zeros((), dtype=dtype)
        gradient = Gradient(torch.randn(n).to(grad), None, tau)
    return Problem(Update(weight, scores, packed, rule), gradient)


def make_state(update: Update, settings: Settings, scores: Settings | None = None, steps: Any = (3.0, 3.0)) -> State:
    """The state of a tensor that was updated before, with the settings of its scores where they differ, and with the
    numbers of the updates of the weight and of the scores."""

    def random(like: Tensor) -> Tensor:
        return torch.randn_like(like) * 0.1

    w, s = update.weight, update.scores
    if isinstance(settings, AdamW):
        counts = [step if isinstance(step, Tensor) else torch.tensor(step) for step in steps]
        return AdamWState(random(w), random(w).square(), random(s), random(s).square(), *counts)
    each = ((w, settings), (s, settings if scores is None else scores))
    buffers = [random(tensor) if one.momentum else None for tensor, one in each]
    if settings.first:  # whatever is there has to go
        buffers = [buffer if buffer is None else torch.full_like(buffer, float("nan")) for buffer in buffers]
    return SGDState(*buffers)


def moved(value: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """A copy of a problem, a state or settings on another device, and of its vectors of floats in another dtype."""
    if isinstance(value, Tensor):
        floating = value.is_floating_point() and value.ndim > 0
        return value.to(device, dtype if floating else None, copy=True)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(part, device, dtype) for part in value))
    return value


def exact(problem: Problem) -> Problem:
    """A copy in float64 on the CPU."""
    wide = moved(problem, "cpu", torch.float64)
    tau = problem.gradient.tau
    return wide.with_gradient(tau=None if tau is None else tau.cpu().double())


def pairs_of(count: int, weights: Any, scores: Any = None) -> list[Pair]:
    """The settings of every tensor, from those of all tensors together or of each."""
    scores = weights if scores is None else scores
    each = [[one] * count if isinstance(one, AdamW | SGD) else one for one in (weights, scores)]
    return list(zip(*each, strict=True))


def moved_pairs(pairs: Sequence[Pair], device: torch.device | str) -> list[Pair]:
    """Copies on another device. What was one object stays one: tensors with the same settings are updated together."""
    copies = {id(one): moved(one, device) for pair in pairs for one in pair}
    return [(copies[id(weights)], copies[id(scores)]) for weights, scores in pairs]


def batch_of(problems: Sequence[Problem], scale: Tensor | None = None, plan: Plan | None = None) -> Batch:
    return Batch([one.update for one in problems], [one.gradient for one in problems], scale, plan)


def run_step(backend: Any, batch: Batch, settings: Any, scores: Any = None) -> None:
    """One step of the optimizer that the settings are for."""
    pairs = pairs_of(len(batch.updates), settings, scores)
    kind = "adamw" if isinstance(pairs[0][0], AdamW) else "sgd"
    coded = "coded_" if isinstance(batch.updates[0].state, CodedAdamWState | CodedSGDState) else ""
    getattr(backend, f"{kind}_{coded}step")(batch, pairs)


def operands_of(update: Update) -> list[Tensor]:
    """What a step changes of a tensor: weight, scores, and its states in the shape of the weight."""
    states = update.state[:4] if isinstance(update.state, AdamWState) else update.state or ()
    return [update.weight, update.scores, *(state for state in states if isinstance(state, Tensor))]
