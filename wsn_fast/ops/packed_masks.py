"""Masks at one bit per element, least significant bit first. These functions are not used inside a training step, so
``torch.compile`` needs no operators for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backends import run


def packed_size(n: int) -> int:
    """Bytes of a packed mask of ``n`` elements."""
    return (n + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """A boolean mask at 1 bit per element.

    Args:
        mask: ``torch.bool``, any shape, n elements.

    Returns:
        ``uint8`` [ceil(n / 8)]: element i of the row-major flattened mask is bit i % 8, least significant first, of
        byte i // 8. Padding bits are zero.

    Raises:
        TypeError: ``mask`` is not a boolean tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        raise TypeError(f"mask must be a torch.bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    return run("pack", mask.device).pack(mask.reshape(-1))


def unpack_mask(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The boolean mask of ``shape`` that :func:`pack_mask` packed.

    Raises:
        TypeError: ``packed`` is not ``uint8``.
        ValueError: ``packed`` does not have the bytes that ``shape`` needs.
    """
    n = math.prod(shape)
    _check_packed(packed)
    if packed.shape != (packed_size(n),):
        raise ValueError(
            f"packed must have shape ({packed_size(n)},) for a mask of shape {tuple(shape)}, got {tuple(packed.shape)}"
        )
    return run("unpack", packed.device).unpack(packed.contiguous(), n).view(shape)


def union_packed(packed: Tensor) -> Tensor:
    """The OR of the rows of ``packed`` [T, bytes], T >= 1: [bytes].

    Raises:
        TypeError: ``packed`` is not ``uint8``.
        ValueError: ``packed`` is not two-dimensional or has no rows.
    """
    _check_packed(packed)
    if packed.ndim != 2 or packed.shape[0] == 0:
        raise ValueError(f"packed must have shape [T, bytes] with T >= 1, got {tuple(packed.shape)}")
    return run("union", packed.device).union(packed)


def count_packed(packed: Tensor) -> Tensor:
    """The number of set bits of a packed mask: 0-d int64 on its device. Raises ``TypeError`` if it is not ``uint8``."""
    _check_packed(packed)
    return run("popcount", packed.device).popcount(packed.contiguous())


def _check_packed(packed: object) -> None:
    if not isinstance(packed, Tensor) or packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be a torch.uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
