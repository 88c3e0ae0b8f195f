"""Data of the benchmarks: random, never zeros, made on the device and alike for every contender."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wsn_fast import ops
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import Mask
from wsn_fast.reference import specification

from .cases import compute_dtype

RULE = "magnitude"
DENSITY, FROZEN = 0.5, 0.3
"""Of every mask, and the share of weights that finished tasks own. Half is the dearest density for a selection, and the
upper end of the paper's."""


def _nan(n: int, device: torch.device) -> Tensor:
    return torch.randn(n, device=device).masked_fill(torch.rand(n, device=device) < 0.3, torch.nan)


DISTRIBUTIONS: dict[str, Callable[[int, torch.device], Tensor]] = {
    "normal": lambda n, device: torch.randn(n, device=device),
    "all equal": lambda n, device: torch.full((n,), -0.37, device=device),
    "two values": lambda n, device: torch.rand(n, device=device).lt(0.5).float() * 0.75 - 0.5,
    "30 % NaN": _nan,
    "denormal": lambda n, device: torch.randint(-9, 10, (n,), device=device).float() * 2.0**-149,
}


def scores(n: int, device: torch.device, kind: str = "normal") -> Tensor:
    """[n] float32 scores."""
    return DISTRIBUTIONS[kind](n, device)


def rank(n: int) -> int:
    """The index of the threshold of ``DENSITY`` among n keys."""
    return ops.threshold_rank(n, DENSITY, RULE)


class Weight(NamedTuple):
    """An fp32 weight with its scores, their threshold and the mask; ``frozen`` is the union of earlier masks. Masks are
    boolean and packed; ``task_masks`` has a packed row per task. ``grad``, of the masked weight, has the compute dtype.
    """

    weight: Tensor
    scores: Tensor
    tau: Tensor
    mask: Tensor
    packed: Tensor
    frozen: Tensor
    packed_frozen: Tensor
    task_masks: Tensor
    grad: Tensor

    @classmethod
    def random(cls, size: tuple[int, ...], device: torch.device, tasks: int = 1) -> Weight:
        """Scaled as layers are, so that results of products are of order one."""
        weight = torch.randn(size, device=device) / torch.Size(size[1:]).numel() ** 0.5
        scores, frozen = torch.randn(size, device=device), torch.rand(size, device=device) < FROZEN
        tau = specification.topc_threshold(scores, DENSITY)
        mask = ~(scores.abs() < tau)
        packed = portable.pack(mask)
        task_masks = torch.stack([packed.roll(t) for t in range(tasks)])
        task_masks[:, -1] &= packed[-1]  # whole bytes have moved: no bit beyond the end may be set
        grad = torch.randn(size, device=device).to(compute_dtype(device))
        return cls(weight, scores, tau, mask, packed, frozen, portable.pack(frozen), task_masks, grad)

    def source(self, name: str) -> Mask:
        """Where a product takes the mask from: "packed" or "scores"."""
        return Mask.of_packed(self.packed) if name == "packed" else Mask(self.scores, self.tau, RULE)

    def in_memory(self, source: str, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
        """The masked weight written to memory, by the backend that the library would choose."""
        w = self.weight
        if source == "packed":
            mask = self.packed if packed is None else packed
            return choose("gate_packed", w.device, w.dtype).backend.gate_packed(w, mask, dtype)
        return choose("gate", w.device, w.dtype).backend.gate(w, self.scores, self.tau, RULE, dtype)

    def as_specified(self, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        """The masked weight in ``dtype``, by the specification."""
        return specification.select(self.mask if mask is None else mask, self.weight.to(dtype))
