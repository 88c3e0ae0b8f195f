"""Masks and gradients by the torch backend, which is plain PyTorch: what the doctor measures results with.

The functions are those of ``wsn_fast.reference.specification``, which the library does not import.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ...backends import torch as portable


def topc_mask(scores: Tensor, density: float, *, rule: str = "magnitude") -> Tensor:
    """The mask of the highest keys: boolean, in the shape of ``scores``."""
    scores = scores.detach()
    tau = portable.threshold(scores, ops.threshold_rank(scores.numel(), density, rule), rule)
    return portable.keep_mask(scores, tau, rule)


def select(mask: Tensor, tensor: Tensor) -> Tensor:
    """``mask ? tensor : +0.0``."""
    return torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device))


def gate_backward(
    grad: Tensor, weight: Tensor, scores: Tensor, mask: Tensor, union: Tensor | None = None, rule: str = "magnitude"
) -> tuple[Tensor, Tensor]:
    """From the gradient of the masked weight to those of weight and scores. Mask and union are boolean."""
    tau = torch.zeros((), dtype=scores.dtype, device=scores.device)  # the gradient of the scores is that of all weights
    _, score_grad = portable.gate_backward(grad, weight, scores, tau, None, rule, False, True)
    assert score_grad is not None
    return select(mask if union is None else mask & ~union, grad), score_grad
