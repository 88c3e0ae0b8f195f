"""Data of the benchmarks: random, never zeros, made on the device and alike for every contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wsn_fast import ops, reference
from wsn_fast.backends import torch as portable

DENSITY, FROZEN = 0.5, 0.3
"""Of every mask, and the share of weights that finished tasks own. Half is the dearest density for a selection, and the
upper end of the paper's."""


def _nan(n: int, device: torch.device) -> Tensor:
    return torch.where(torch.rand(n, device=device) < 0.3, torch.nan, torch.randn(n, device=device))


def _two(n: int, device: torch.device) -> Tensor:
    return torch.where(torch.rand(n, device=device) < 0.5, 0.25, -0.5)


DISTRIBUTIONS: dict[str, Callable[[int, torch.device], Tensor]] = {
    "normal": lambda n, device: torch.randn(n, device=device),
    "all equal": lambda n, device: torch.full((n,), -0.37, device=device),
    "two values": _two,
    "30 % NaN": _nan,
    "denormal": lambda n, device: torch.randint(-9, 10, (n,), device=device).float() * 2.0**-149,
}


def scores(n: int, device: torch.device, kind: str = "normal") -> Tensor:
    """[n] float32 scores that require gradients, as a layer's do."""
    return DISTRIBUTIONS[kind](n, device).requires_grad_()


def rank(n: int, rule: str = "magnitude") -> int:
    """The index of the threshold of ``DENSITY`` among n keys."""
    return ops.threshold_rank(n, DENSITY, rule)


class Gate(NamedTuple):
    """The operands of the elementwise operations, [n] each: ``frozen`` is the union of earlier masks, ``task_rows``
    [tasks, ceil(n / 8)] packed masks, every other tensor what its name says."""

    weight: Tensor
    scores: Tensor
    tau: Tensor
    mask: Tensor
    frozen: Tensor
    packed: Tensor
    packed_frozen: Tensor
    grad: Tensor
    task_rows: Tensor

    @classmethod
    def random(cls, n: int, device: torch.device, dtype: torch.dtype, tasks: int) -> Gate:
        """fp32 weights and scores, a gradient in the compute dtype."""
        weight, score = torch.randn(n, device=device), torch.randn(n, device=device)
        frozen = torch.rand(n, device=device) < FROZEN
        tau = reference.topc_threshold(score, DENSITY)
        mask = ~(score.abs() < tau)
        grad = torch.randn(n, device=device).to(dtype)
        packed, packed_frozen = portable.pack(mask), portable.pack(frozen)
        rows = torch.stack([packed.roll(i) for i in range(tasks)])  # whole bytes move: padding may come to be set
        rows[:, -1] &= packed[-1]
        return cls(weight, score, tau, mask, frozen, packed, packed_frozen, grad, rows)
