"""Scores as integers that order as their keys do, and how often each digit of these integers occurs.

A code has as many bits as the score. Read as an unsigned number it orders as the key does: ``|S|`` or ``S``, -0.0 equal
to +0.0, and every NaN last. It is held in an int64, which wraps around for float64.

Nothing here waits for a device. So counting takes no ``bincount`` and no selection by a mask: on a GPU both do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTHS = {2: (8, 8), 4: (11, 11, 10), 8: (11, 11, 11, 11, 10, 10)}
"""The bits of each digit of a code, from the highest on, by the bytes of a score."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**22
_CPU_PART = 2**15
"""So many scores have their codes in memory at once. On a CPU these fit into a cache."""


def encode(scores: Tensor, rule: str) -> Tensor:
    """The codes of ``scores``, int64 of the same shape."""
    half = _half(scores.element_size())
    bits = scores.view(_INTEGERS[scores.element_size()]).to(torch.int64)
    magnitude = bits & abs(half) - 1  # without the sign; that of a NaN is above that of infinity
    if rule == "magnitude":
        return magnitude
    codes = torch.where(bits < 0, half - magnitude, half + magnitude)
    return codes.masked_fill_(scores.isnan(), half + (abs(half) - 1))


def decode(codes: Tensor, dtype: torch.dtype, rule: str) -> Tensor:
    """The keys of ``codes``, in ``dtype``: +0.0 for both zeros, and one NaN for all of them."""
    half = _half(dtype.itemsize)
    if rule == "magnitude":
        bits = codes & abs(half) - 1
    else:
        is_positive = (codes >> (8 * dtype.itemsize - 1) & 1).bool()
        bits = torch.where(is_positive, codes - half, -codes)
    keys = bits.to(_INTEGERS[dtype.itemsize]).view(dtype)
    return keys.masked_fill(keys.isnan(), math.nan)


def count(scores: Tensor, rule: str, prefix: Tensor, known: int, width: int, counts: Tensor) -> None:
    """Count one digit of the codes that begin with ``prefix``, and add to ``counts``.

    Args:
        scores: floating, any shape, also without elements.
        rule: what the keys are.
        prefix: int64, 0-d: the first ``known`` bits of the codes that are counted.
        known: how many bits that are.
        width: the bits of the digit that follows them.
        counts: int32 [2 ** width].
    """
    shift = 8 * scores.element_size() - known - width
    for part in scores.detach().reshape(-1).split(_CPU_PART if scores.is_cpu else _PART):
        codes = encode(part, rule)
        matches = torch.ones_like(codes, dtype=torch.int32)
        if known:
            matches = (codes >> (shift + width) & (1 << known) - 1 == prefix).to(torch.int32)
        counts.scatter_add_(0, codes >> shift & (1 << width) - 1, matches)


def _half(size: int) -> int:
    """The code of zero, if the codes of negative numbers are below it."""
    return -(1 << 63) if size == 8 else 1 << (8 * size - 1)
