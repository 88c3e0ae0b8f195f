"""The gate of a layer, and its gradients. Arguments are not checked, because layers call these functions at every
step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import run
from ..backends.mask import GateOrder, GradientOrder, Mask
from ..backends.updates import Plan
from .arguments import key_of
from .operator import operator
from .selection import threshold


@operator(fake=lambda a: (torch.empty_like(a.weight, dtype=a.dtype), a.scores.new_empty(())))
def gate(
    weight: Tensor, scores: Tensor, density: float, rule: str, dtype: torch.dtype, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the masked weight, ``m ? W : +0.0`` in ``dtype``, and the threshold tau of the current scores."""
    tau = threshold(scores, density, rule, backend)
    return run("gate", weight.device, weight.dtype, backend).gate(weight, scores, tau, key_of(rule), dtype), tau


@torch.no_grad()
def gate_at(
    weight: Tensor, scores: Tensor, tau: Tensor, rule: str, dtype: torch.dtype, backend: str | None = None
) -> Tensor:
    """The masked weight of :func:`gate` for a threshold that is known: that of a tensor of which these are a part."""
    masked: Tensor = run("gate", weight.device, weight.dtype, backend).gate(weight, scores, tau, key_of(rule), dtype)
    return masked


@torch.no_grad()
def gates(orders: Sequence[GateOrder], backend: str | None = None, plan: Plan | None = None) -> list[Tensor]:
    """Compute the gates of many tensors of one device and dtype in few launches. Writes each ``masked`` and returns the
    thresholds, 0-d. ``plan`` is what the backend keeps from call to call, and serves no other operation. With a plan,
    the next call for the same tensors may write the same thresholds again, and a caller that passes the same sequence
    of orders says that no tensor has moved since."""
    scores = orders[0].scores
    taus: list[Tensor] = run("gates", scores.device, scores.dtype, backend).gates(orders, plan)
    increment_version([*(order.masked for order in orders), *taus])  # a backward pass of before would read them
    return taus


@operator(fake=lambda a: torch.empty_like(a.weight, dtype=a.dtype))
def gate_packed(weight: Tensor, packed: Tensor, dtype: torch.dtype, backend: str | None = None) -> Tensor:
    """Return the masked weight, ``m ? W : +0.0`` in ``dtype``, for a packed mask."""
    return run("gate_packed", weight.device, weight.dtype, backend).gate_packed(weight, packed, dtype)


def _empty_gradients(a: Any) -> tuple[Tensor | None, Tensor | None]:
    return (
        torch.empty_like(a.grad, dtype=a.weight.dtype) if a.need_weight else None,
        torch.empty_like(a.grad, dtype=a.mask.scores.dtype) if a.need_scores else None,
    )


@operator(fake=_empty_gradients)
def gate_backward(
    grad: Tensor, weight: Tensor, mask: Mask, need_weight: bool, need_scores: bool, backend: str | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``(dW, dS)`` (Eq. 4 and 5, see :mod:`.autograd`), computed from the gradient of the masked weight. One
    that is not needed is None. ``mask`` has scores."""
    chosen = run("gate_backward", grad.device, weight.dtype, backend)
    return chosen.gate_backward(
        grad, weight, mask.scores, mask.tau, mask.union, mask.rule, need_weight, need_scores
    )  # fmt: skip


@torch.no_grad()
def gates_backward(orders: Sequence[GradientOrder], backend: str | None = None, plan: Plan | None = None) -> None:
    """Form the gradients of many tensors of one device in few launches. Writes ``weight_grad`` and ``score_grad`` of
    each, to the bit as :func:`gate_backward` computes them. ``plan`` is what the backend keeps from call to call, and
    serves no other operation."""
    if not orders:
        return
    weight = orders[0].weight
    run("gates_backward", weight.device, weight.dtype, backend).gates_backward(orders, plan)
    *_, weight_grads, score_grads = zip(*orders, strict=True)
    increment_version([result for result in (*weight_grads, *score_grads) if result is not None])
