"""Weights with their masks: random, never zeros, made on the device and alike for every contender."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...backends import choose
from ...backends import torch as portable
from ...backends.mask import Mask
from . import oracle

RULE = "magnitude"
DENSITY, FROZEN = 0.5, 0.3
"""Of every mask, and the share of weights that finished tasks own. Half is the dearest density for a selection, and the
upper end of the paper's."""
MAX_SETS = 160


def rank(n: int) -> int:
    """The index of the threshold of ``DENSITY`` among n keys."""
    return ops.threshold_rank(n, DENSITY, RULE)


def input_sets(bytes_each: float, device: torch.device, most: int = MAX_SETS) -> int:
    """How many sets of inputs of this size keep a GPU's L2 cache from holding the next one, at most ``most``; 1 on a
    CPU."""
    if device.type != "cuda":
        return 1
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, math.ceil(3 * l2 / max(bytes_each, 1.0))))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as autocast has it; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Weight(NamedTuple):
    """A weight with its scores, their threshold and the mask; ``frozen`` is the union of earlier masks. Masks are
    boolean and packed; ``task_masks`` has a packed row per task. ``grad`` is the gradient of the masked weight."""

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
    def random(
        cls,
        size: tuple[int, ...],
        device: torch.device,
        tasks: int = 1,
        dtype: torch.dtype = torch.float32,
        grad_dtype: torch.dtype | None = None,
    ) -> Weight:
        """Scaled as layers are, so that results of products are of order one.

        Args:
            size: of the weight.
            device: of all tensors.
            tasks: rows of ``task_masks``.
            dtype: of weight and scores.
            grad_dtype: of the gradient; None means the compute dtype of the device.
        """
        weight = (torch.randn(size, device=device) / torch.Size(size[1:]).numel() ** 0.5).to(dtype)
        scores, frozen = torch.randn(size, device=device).to(dtype), torch.rand(size, device=device) < FROZEN
        tau = portable.threshold(scores, rank(scores.numel()), RULE)
        mask = portable.keep_mask(scores, tau, RULE)
        packed = portable.pack(mask)
        task_masks = torch.stack([packed.roll(t) for t in range(tasks)])
        task_masks[:, -1] &= packed[-1]  # whole bytes have moved: no bit beyond the end may be set
        grad = torch.randn(size, device=device).to(grad_dtype or compute_dtype(device))
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

    def as_defined(self, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        """``m ? W : +0.0`` in ``dtype``."""
        return oracle.select(self.mask if mask is None else mask, self.weight.to(dtype))
