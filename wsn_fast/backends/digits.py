"""Scores as integers that order as their keys do, and how often each digit of these integers occurs.

A code has as many bits as the score. Read as an unsigned number it orders as the key does: ``|S|`` or ``S``, -0.0 equal
to +0.0, and every NaN last. It is held in an int64, which wraps around for float64.

Nothing here waits for a device. So counting takes no ``bincount`` and no selection by a mask on a GPU: both do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTHS = {2: (8, 8), 4: (11, 11, 10), 8: (11, 11, 11, 11, 10, 10)}
"""The bits of each digit of a code, from the highest on, by the bytes of a score."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**20
"""So many scores have their codes in memory at once."""


def encode(scores: Tensor, rule: str) -> Tensor:
    """The codes of ``scores``, int64 of the same shape."""
    size, half = scores.element_size(), _half(scores.element_size())
    bits = scores.view(_INTEGERS[size]).to(torch.int64)
    codes = bits & abs(half) - 1  # without the sign
    if rule == "value":
        codes = torch.where(bits < 0, half - codes, half + codes)
    return codes.masked_fill_(scores.isnan(), _largest(size))


def decode(codes: Tensor, dtype: torch.dtype, rule: str) -> Tensor:
    """The keys of ``codes``, in ``dtype``: +0.0 for both zeros, and one NaN for all of them."""
    size = dtype.itemsize
    bits = codes
    if rule == "value":
        half = _half(size)
        is_positive = (codes >> (8 * size - 1) & 1).bool()
        bits = torch.where(is_positive, codes - half, -codes)
    is_nan = codes == _largest(size)
    return bits.masked_fill(is_nan, 0).to(_INTEGERS[size]).view(dtype).masked_fill(is_nan, math.nan)


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
    for part in scores.detach().reshape(-1).split(_PART):
        codes = encode(part, rule)
        digits = codes >> shift & (1 << width) - 1
        matches = torch.ones_like(digits, dtype=torch.int32)
        if known:
            matches = (codes >> (shift + width) & (1 << known) - 1 == prefix).to(torch.int32)
        counts.scatter_add_(0, digits, matches)


def _half(size: int) -> int:
    """The code of zero, if the codes of negative numbers are below it."""
    return -(1 << 63) if size == 8 else 1 << (8 * size - 1)


def _largest(size: int) -> int:
    """The code of NaN: all bits are set."""
    return -1 if size == 8 else (1 << 8 * size) - 1
