"""Whether two tensors are equal to the bit."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on one device have the same shape, dtype and bits. NaN equals the same NaN, and -0.0 differs
    from +0.0. On a GPU this waits for the device."""
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
