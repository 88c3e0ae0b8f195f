"""How running means are stored in fewer bytes: as bfloat16, or in 8 bits with a scale for each block.

This is the specification, and every backend computes these bits. ``a`` are the bits of the magnitude of a float32
``x`` (its lower 31 bits) as an integer, ``>>`` shifts such integers, and all values are floats of IEEE 754.

**Dither.** A step changes a second moment by a thousandth. Rounded to the nearest code, it would never change. So a
step rounds up in as many of its updates as the remainder says: it adds a number below one unit, and rounds down. For
element ``i`` (from 0, in row-major order) in update ``t`` (from 1) this number is the high bits of ``r = (i *
0xC13FA9A9 + t * 0x91E10DA5) mod 2**32``, the R2 sequence of Roberts. Nothing is random: the same updates give the same
codes. Whatever is no step (a conversion) has ``r = 2**31``: it rounds to nearest, and ties away from zero. A value that
has a code of its own is kept exactly by any dither.

**bfloat16.** ``(a + (r >> 16)) >> 16`` and the sign of x. What would round to infinity becomes the largest finite
number. Infinities stay, a NaN becomes 0x7FC0, and magnitudes below 2**-126 are 0; but a second moment that is not 0 is
at least 2**-125. (The next update multiplies it, and arithmetic with denormal numbers is slow.)

**8 bits.** Each block of :data:`BLOCK` elements in row-major order (the last one may be shorter) has a scale ``2**e``,
which is stored as a float32. ``e + 127`` is ``a >> 23`` of the largest finite magnitude in the block, at least
:attr:`Code.least` and at most 253. Codes below the special ones are positions ``p`` on a scale of floats that have few
bits, and fewer the smaller they are:

* ``p = 0`` is zero, and nothing else is;
* from the top ``2**(e + 1)``, at ``p = Code.top``, down, each part ``(bits, steps)`` of :attr:`Code.parts` has so many
  steps of ``2**(23 - bits)`` in ``a``: there are ``2**bits`` of them in an octave. The last one ends at ``p = 1``;
* to encode, ``p = first + (a + (r >> 9 + bits) - start >> 23 - bits)`` with the start of the part that ``a`` is in and
  the position ``first`` of this start. Above the top it is ``Code.top`` (a position is also the largest of those that
  the parts would give, and the ``a`` of a position the smallest, because steps are larger in lower parts);
* below ``p = 1`` a first moment becomes 0, and a second moment that is not 0 becomes ``p = 1``.

A first moment (``SIGNED``) has ``p`` in the lower 7 bits and its sign in bit 7, except that a zero has no sign. Code
127 and 255 are the infinities, 128 is NaN. A second moment (``UNSIGNED``) has no sign; 254 is infinity and 255 is NaN.
They have no part in the scale, so they do not change the other elements of their block.

So a second moment that is not 0 is never stored as 0, and an update ``m / (sqrt(v) + eps)`` cannot explode because of
how its operands are stored: m grows by less than a half, and v shrinks by less than a third.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import STORAGES as STORAGES

BLOCK = 256
"""How many elements share a scale."""

ALONG, ONWARD = 0xC13FA9A9, 0x91E10DA5
NEAREST = 1 << 31
_INFINITY = 0x7F800000
_NORMAL, _SECOND = 0x00800000, 0x01000000  # 2**-126 and 2**-125


class Part(NamedTuple):
    """A part of the scale of a code.

    Attributes:
        bits: how many bits follow the first one.
        steps: how many steps it has.
    """

    bits: int
    steps: int


class Code(NamedTuple):
    """A code of 8 bits.

    Attributes:
        signed: whether it has negative numbers.
        parts: its scale, from the top down.
        infinity, nan: the codes of these.
        least: the least biased exponent of a scale. With it ``p = 1`` is still a normal number.
    """

    signed: bool
    parts: tuple[Part, ...]
    infinity: int
    nan: int
    least: int

    @property
    def top(self) -> int:
        """The position of the largest finite number."""
        return 1 + sum(part.steps for part in self.parts)

    def starts(self, scales: Tensor, n: int) -> Iterator[tuple[Tensor, int, int]]:
        """Each part from the lowest up: where it starts for each of n elements (bits of floats, int32), the position
        there, and the bits of ``a`` below a step."""
        exponent = (scales.view(torch.int32) >> 23 & 0xFF).clamp(self.least, 253)
        top = (exponent + 1 << 23).repeat_interleave(BLOCK)[:n]
        below, first = sum(steps << 23 - bits for bits, steps in self.parts), 1
        for bits, steps in reversed(self.parts):
            yield top - below, first, 23 - bits
            below, first = below - (steps << 23 - bits), first + steps


SIGNED = Code(True, (Part(4, 48), Part(3, 40), Part(2, 20), Part(1, 17)), 127, 128, 22)
UNSIGNED = Code(False, (Part(4, 128), Part(3, 64), Part(2, 40), Part(1, 20)), 254, 255, 37)


class Stored(NamedTuple):
    """A running mean as it is stored.

    Attributes:
        values: of the shape of the parameter: codes (uint8, contiguous), bfloat16, or the dtype of the parameter.
        scales: float32 [ceil(n / BLOCK)] beside codes, else None.
    """

    values: Tensor
    scales: Tensor | None

    @property
    def storage(self) -> str:
        """One of :data:`STORAGES`."""
        if self.scales is not None:
            return "8bit"
        return "bfloat16" if self.values.dtype is torch.bfloat16 else "float32"


def zeros(like: Tensor, storage: str, signed: bool) -> Stored:
    """Zeros for a running mean of the parameter ``like``."""
    if storage == "float32":
        return Stored(torch.zeros_like(like), None)
    if storage == "bfloat16":
        return Stored(torch.zeros_like(like, dtype=torch.bfloat16), None)
    codes = torch.zeros(like.shape, dtype=torch.uint8, device=like.device)
    scale = 2.0 ** ((SIGNED if signed else UNSIGNED).least - 127)
    return Stored(codes, torch.full((blocks_of(like),), scale, dtype=torch.float32, device=like.device))


def blocks_of(tensor: Tensor) -> int:
    """How many scales a tensor has."""
    return -(-tensor.numel() // BLOCK)


def decode(stored: Stored, like: Tensor, signed: bool) -> Tensor:
    """A copy of the values in the strides of ``like``: in float64 if that is its dtype, else in float32."""
    result = torch.empty_like(like, dtype=torch.float64 if like.dtype is torch.float64 else torch.float32)
    if stored.scales is None:
        return result.copy_(stored.values)
    values = decode_8bit(stored.values.reshape(-1), stored.scales, SIGNED if signed else UNSIGNED)
    return result.copy_(values.view(like.shape))


def encode(values: Tensor, stored: Stored, signed: bool, update: Tensor | None = None) -> None:
    """Write ``values`` to ``stored``, with the dither of the given number (0-d) of an update; without it, rounded to
    nearest. Float64 is rounded to float32 first, where no number becomes infinite or 0."""
    if stored.storage == "float32":
        stored.values.copy_(values)
        return
    flat = _as_float32(values).reshape(-1)
    r = _dither(flat, update)
    if stored.scales is None:
        bits = _bfloat16(flat, signed, r)
        stored.values.copy_(bits.to(torch.int16).view(torch.bfloat16).view(values.shape))
    else:
        codes, scales = encode_8bit(flat, SIGNED if signed else UNSIGNED, r)
        stored.values.copy_(codes.view(values.shape))
        stored.scales.copy_(scales)


def _as_float32(values: Tensor) -> Tensor:
    """Rounded to float32, but no number becomes infinite or 0."""
    if values.dtype is torch.float32:
        return values
    largest = torch.finfo(torch.float32).max
    narrow = values.float()
    narrow = narrow.where(values.isfinite().logical_not(), narrow.clamp(-largest, largest))
    return narrow.where((values == 0) | (narrow != 0), 2.0**-149)


def _dither(flat: Tensor, update: Tensor | None) -> Tensor:
    if update is None:
        return torch.full((), NEAREST, dtype=torch.int64, device=flat.device)
    index = torch.arange(flat.numel(), dtype=torch.int64, device=flat.device)
    return index * ALONG + update.long() * ONWARD & 0xFFFFFFFF


def _bfloat16(flat: Tensor, signed: bool, r: Tensor) -> Tensor:
    """The bits of bfloat16, int32."""
    bits = flat.view(torch.int32)
    a = bits & 0x7FFFFFFF
    rounded = (a + (r >> 16).int() >> 16).clamp(max=0x7F7F)
    least, below = (_NORMAL, 0) if signed else (_SECOND, _SECOND >> 16)
    rounded = rounded.where(a >= least, below * (a > 0).int())
    rounded = rounded.where(a < _INFINITY, torch.where(a == _INFINITY, 0x7F80, 0x7FC0))
    return torch.where(bits < 0, rounded - 0x8000, rounded) if signed else rounded


def encode_8bit(flat: Tensor, code: Code, r: Tensor) -> tuple[Tensor, Tensor]:
    """The codes and the scales of a float32 vector, with the dither ``r``, int64."""
    bits, n = flat.view(torch.int32), flat.numel()
    a = bits & 0x7FFFFFFF
    padded = a.new_zeros(blocks_of(flat) * BLOCK)
    padded[:n] = a.where(a < _INFINITY, 0)
    most = padded.view(-1, BLOCK).amax(1)
    scales = ((most >> 23).clamp(code.least, 253) << 23).view(torch.float32)
    p = torch.zeros_like(a) if code.signed else (a > 0).int()
    for start, first, shift in code.starts(scales, n):
        p = torch.where(a >= start, first + (a - start + (r >> 32 - shift).int() >> shift), p)
    p = p.clamp(max=code.top)
    p = p.where(a != _INFINITY, code.infinity)
    if code.signed:
        p = torch.where((bits < 0) & (p > 0), p | 0x80, p)
    return p.where(a <= _INFINITY, code.nan).to(torch.uint8), scales


def decode_8bit(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """The float32 values of a vector of codes."""
    whole = codes.int()
    p = whole & 0x7F if code.signed else whole
    a = torch.zeros_like(p)
    for start, first, shift in code.starts(scales, codes.numel()):
        a = torch.where(p >= first, start + (p - first << shift), a)
    a = a.where(p != code.infinity, _INFINITY)
    values = a.view(torch.float32)
    if code.signed:
        values = torch.where(whole > 0x80, -values, values)
    return values.where(whole != code.nan, torch.nan)
