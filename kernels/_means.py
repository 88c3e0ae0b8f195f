"""Running means in fewer bytes, in registers: ``wsn_fast/backends/moments.py`` specifies every bit. A tile with 8 bits
is one block, which has one scale.

A code is piecewise linear in the bits of a float. Steps are larger in lower parts. So a magnitude is the smallest of
those that the lines of the parts would give, and a position is the largest: no element has to look for its part.
"""

from __future__ import annotations

import triton
import triton.language as tl

STORAGES = ("float32", "bfloat16", "8bit")
"""Names of the forms, by the number that kernels have for them."""
FLOAT32 = tl.constexpr(0)  # the dtype of the parameter
BFLOAT16 = tl.constexpr(1)
EIGHT_BITS = tl.constexpr(2)

CODES = tl.constexpr(256)
BLOCK = tl.constexpr(256)
ALONG = tl.constexpr(0xC13FA9A9)
ONWARD = tl.constexpr(0x91E10DA5)

# The parts of a code from the lowest up: how far a step shifts, and how many steps there are.
SIGNED_PARTS = ((22, 17), (21, 20), (20, 40), (19, 48))
UNSIGNED_PARTS = ((22, 20), (21, 40), (20, 64), (19, 128))
UPPER = 128 << 23  # the end of the highest part, as the bits of a float, for a scale of 1
FRACTION = tl.constexpr(22)  # bits after the point of a position; the lowest part has as many below a step


def _lines(parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """For each part its shift, what the magnitude is at position 0 of its line for a scale of 1, and what the position
    is, with FRACTION bits after the point, where p = 1 is."""
    height = sum(steps << shift for shift, steps in parts)
    below, first, lines = 0, 1, []
    for shift, steps in parts:
        lines.append((shift, UPPER - height + below - (first << shift), (first << 22) - (below << 22 - shift)))
        below, first = below + (steps << shift), first + steps
    return tuple(lines)


def _height(parts: tuple[tuple[int, int], ...]) -> int:
    """From p = 1 to the end of the highest part, in the bits of a float."""
    return sum(steps << shift for shift, steps in parts)


SIGNED_LINES = tl.constexpr(_lines(SIGNED_PARTS))
UNSIGNED_LINES = tl.constexpr(_lines(UNSIGNED_PARTS))
SIGNED_HEIGHT = tl.constexpr(_height(SIGNED_PARTS))
UNSIGNED_HEIGHT = tl.constexpr(_height(UNSIGNED_PARTS))
SIGNED_TOP = tl.constexpr(1 + sum(steps for _, steps in SIGNED_PARTS))
UNSIGNED_TOP = tl.constexpr(1 + sum(steps for _, steps in UNSIGNED_PARTS))
SIGNED_LEAST = tl.constexpr(22)  # biased exponents of the smallest scales
UNSIGNED_LEAST = tl.constexpr(37)
INFINITY = tl.constexpr(0x7F800000)
LARGE = tl.constexpr(0x7F000000)  # 2**127, where the exponent is more than that of the largest scale
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def dither(first, update):
    """The dither at element ``first`` (int64) in update ``update`` (uint32): uint32. Further elements add to it."""
    return first.to(tl.uint32) * ALONG + update * ONWARD


@triton.jit
def decode(values, scale, table_ptr, inside, STORAGE: tl.constexpr, SIGNED: tl.constexpr):
    """The float32 values of stored ones. Only 8 bits need ``scale``, which broadcasts to the tile, and ``table_ptr``,
    the values of all codes (:mod:`.code_values`): a load from the L1 cache takes fewer instructions than arithmetic."""
    if STORAGE == EIGHT_BITS:
        LEAST: tl.constexpr = SIGNED_LEAST if SIGNED else UNSIGNED_LEAST
        exponent = scale.to(tl.int32, bitcast=True) & INFINITY
        scale = tl.minimum(tl.maximum(exponent, LEAST << 23), 253 << 23).to(tl.float32, bitcast=True)
        if not SIGNED:
            table_ptr += CODES
        # The scale is a power of two, and no product is denormal.
        return tl.load(table_ptr + values, mask=inside) * scale
    elif STORAGE == BFLOAT16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def value_of(code, SIGNED: tl.constexpr):
    """The float32 values of codes (int32) for a scale of 1."""
    LINES: tl.constexpr = SIGNED_LINES if SIGNED else UNSIGNED_LINES
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    p = code & 0x7F if SIGNED else code
    a = (p << LINES[0][0]) + LINES[0][1]
    for k in tl.static_range(1, 4):
        a = tl.minimum(a, (p << LINES[k][0]) + LINES[k][1])
    a = tl.where(p == 0, 0, a)
    special = tl.where(p == TOP + 1, INFINITY, INFINITY | INFINITY >> 1)
    if SIGNED:
        a = tl.where(code == 128, INFINITY | INFINITY >> 1, tl.where(p > TOP, special, a) | (code & 0x80) << 24)
    else:
        a = tl.where(p > TOP, special, a)
    return a.to(tl.float32, bitcast=True)


@triton.jit
def encode_bfloat16(x, r, SIGNED: tl.constexpr):
    """bfloat16 of float32 with the dither ``r``."""
    bits = x.to(tl.int32, bitcast=True)
    a = bits & MAGNITUDE_BITS
    # Shifted as a number without sign: the sum of a NaN and the dither may not fit in 31 bits.
    rounded = ((a.to(tl.uint32, bitcast=True) + (r >> 16)) >> 16).to(tl.int32, bitcast=True)
    rounded = tl.minimum(rounded, 0x7F7F)
    if SIGNED:
        rounded = tl.where(a >= 0x00800000, rounded, 0)
    else:
        rounded = tl.where(a >= 0x01000000, rounded, tl.where(a > 0, 0x0100, 0))
    rounded = tl.where(a >= INFINITY, tl.where(a > INFINITY, 0x7FC0, 0x7F80), rounded)
    if SIGNED:
        rounded |= (bits >> 16) & 0x8000
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _most(a):
    """The largest number of a tile."""
    if len(a.shape) == 4:
        a = tl.max(tl.max(tl.max(a, 3), 0), 0)  # within a thread first
    return tl.max(a, 0)


@triton.jit
def largest(x, inside):
    """The bits of the largest magnitude of a tile, those of infinity or of a NaN if it has any. Elements that are not
    ``inside`` do not count; None means that all are."""
    a = x.to(tl.int32, bitcast=True) & MAGNITUDE_BITS
    return _most(a if inside is None else tl.where(inside, a, 0))


@triton.jit
def encode_8bit(x, most, inside, r, SIGNED: tl.constexpr, SPECIAL: tl.constexpr):
    """The codes of a block of float32 with the dither ``r``, int32, and its scale. ``most`` is that of :func:`largest`.
    Without SPECIAL it is below LARGE."""
    LINES: tl.constexpr = SIGNED_LINES if SIGNED else UNSIGNED_LINES
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    LEAST: tl.constexpr = SIGNED_LEAST if SIGNED else UNSIGNED_LEAST
    HEIGHT: tl.constexpr = SIGNED_HEIGHT if SIGNED else UNSIGNED_HEIGHT
    bits = x.to(tl.int32, bitcast=True)
    a = bits & MAGNITUDE_BITS
    if SPECIAL:
        finite = tl.where(a < INFINITY, a, 0)
        most = _most(finite if inside is None else tl.where(inside, finite, 0))
    exponent = tl.maximum(most >> 23, LEAST)
    if SPECIAL:
        exponent = tl.minimum(exponent, 253)

    # From p = 1 up. Further down, the lines would tell nothing, and overflow.
    up = a - ((exponent + 1 << 23) - HEIGHT)
    at = tl.maximum(up, 0)
    if SPECIAL:
        at = tl.minimum(at, HEIGHT)  # which is the top
    position = at + LINES[0][2]
    for k in tl.static_range(1, 4):
        position = tl.maximum(position, (at << (FRACTION - LINES[k][0])) + LINES[k][2])
    p = (position + (r >> (32 - FRACTION)).to(tl.int32, bitcast=True)) >> FRACTION
    if not SIGNED:
        p = tl.minimum(p, a)  # only zero is 0
    if SPECIAL:
        p = tl.where(a >= INFINITY, tl.where(a > INFINITY, TOP + 2, TOP + 1), p)
    if SIGNED:
        p = tl.where(up >= 0, p | ((bits >> 24) & 0x80), 0)
    return p, (exponent << 23).to(tl.float32, bitcast=True)
