"""The two published programs' ways, written from their algorithms: what they do in every step, and where.

Their constants, host waits and copies are kept, since they are what users of these programs pay for; their bugs that
stop a run are mended (CLArena's gate has no ``return`` in its backward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def paper_threshold(scores: Tensor, density: float) -> float:
    """The paper's percentile: a 1-based rank by its formula, ``kthvalue``, and the host waits for the value."""
    keys = scores.detach().abs().view(-1)
    q = (1 - density) * 100
    k = 1 + round(0.01 * float(q) * (keys.numel() - 1))
    return keys.kthvalue(k).values.item()


def clarena_threshold(scores: Tensor, density: float) -> Tensor:
    """CLArena's percentile: the interpolated quantile of the raw scores, by a sort; at most 2^24 of them."""
    return torch.quantile(scores.detach().view(-1), 1 - density)


class HardGate(torch.autograd.Function):
    """Ones where kept and zeros elsewhere, from two tensors that live on the CPU; the gradient passes straight
    through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, drop: Tensor, zeros: Tensor, ones: Tensor) -> Tensor:
        return torch.where(drop, zeros.to(scores.device), ones.to(scores.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


def paper_gate(scores: Tensor, tau: float | Tensor, zeros: Tensor, ones: Tensor) -> Tensor:
    """The float mask of ``|S|``, from constants that are made once and moved to the device in every forward."""
    keys = scores.abs()
    mask: Tensor = HardGate.apply(keys, keys < tau, zeros, ones)
    return mask


def clarena_gate(scores: Tensor, tau: Tensor) -> Tensor:
    """The float mask of ``S``, from constants that are made on the CPU in every forward."""
    mask: Tensor = HardGate.apply(scores, scores < tau, torch.zeros(scores.shape), torch.ones(scores.shape))
    return mask


def paper_protect(grad: Tensor, used: Tensor) -> None:
    """Zero the gradient of weights that earlier tasks own; ``used`` is int64, as the program keeps masks."""
    grad[used == 1] = 0


def clarena_protect(grad: Tensor, used: Tensor) -> None:
    """Scale the gradient by one minus the union; ``used`` is float32, as the program keeps masks."""
    grad *= 1 - used
