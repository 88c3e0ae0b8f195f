"""Running means in fewer bytes, in registers: ``wsn_fast/backends/moments.py`` specifies every bit. Nothing is loaded
or stored here.

A code is piecewise linear in the bits of a float. Steps are larger in lower parts. So a magnitude is the smallest of
those that the lines of the parts would give, and a position is the largest: no element has to look for its part.

A tile is a block of elements with one scale, [256], or has the shape [EACH, WARPS, 32, 4]. Every [:, w] of such a tile
is a block, in the registers of one warp, so that no warp waits for another to know a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

STORAGES = ("float32", "bfloat16", "8bit")
"""Names of the forms, by the number that kernels have for them."""
FLOAT32 = tl.constexpr(0)  # the dtype of the parameter
BFLOAT16 = tl.constexpr(1)
EIGHT_BITS = tl.constexpr(2)

BLOCK = tl.constexpr(256)
ALONG = tl.constexpr(0xC13FA9A9)
ONWARD = tl.constexpr(0x91E10DA5)

# The parts of a code from the lowest up: how far a step shifts, and how many steps there are.
SIGNED_PARTS = ((22, 17), (21, 20), (20, 40), (19, 48))
UNSIGNED_PARTS = ((22, 20), (21, 40), (20, 64), (19, 128))
UPPER = 128 << 23  # the end of the highest part, as the bits of a float, for a scale of 1
FRACTION = tl.constexpr(22)  # bits after the point of a position


def _lines(parts: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    """For each part its shift, what the magnitude is at position 0 of its line for a scale of 1, and what the position
    is, with FRACTION bits after the point, at the end of the highest part less 2**23."""
    below, first, lines = sum(steps << shift for shift, steps in parts), 1, []
    for shift, steps in parts:
        to_one = 22 - shift
        lines.append((shift, UPPER - below - (first << shift), (first << 22) - ((1 << 23) - below << to_one)))
        below, first = below - (steps << shift), first + steps
    return tuple(lines)


def _lowest(parts: tuple[tuple[int, int], ...]) -> int:
    """Where p = 1 is, beside the end of the highest part less 2**23."""
    return (1 << 23) - sum(steps << shift for shift, steps in parts)


SIGNED_LINES = tl.constexpr(_lines(SIGNED_PARTS))
UNSIGNED_LINES = tl.constexpr(_lines(UNSIGNED_PARTS))
SIGNED_LOWEST = tl.constexpr(_lowest(SIGNED_PARTS))
UNSIGNED_LOWEST = tl.constexpr(_lowest(UNSIGNED_PARTS))
SIGNED_TOP = tl.constexpr(1 + sum(steps for _, steps in SIGNED_PARTS))
UNSIGNED_TOP = tl.constexpr(1 + sum(steps for _, steps in UNSIGNED_PARTS))
SIGNED_LEAST = tl.constexpr(22)  # biased exponents of the smallest scales
UNSIGNED_LEAST = tl.constexpr(37)
INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def dither(first, update):
    """The dither at element ``first`` (int64) in update ``update`` (uint32): uint32. Further elements add to it."""
    return first.to(tl.uint32) * ALONG + update * ONWARD


@triton.jit
def decode(values, scale, STORAGE: tl.constexpr, SIGNED: tl.constexpr):
    """The float32 values of stored ones. ``scale`` broadcasts to the tile, and only 8 bits need it."""
    if STORAGE == EIGHT_BITS:
        return _decode_8bit(values.to(tl.int32), scale, SIGNED)
    elif STORAGE == BFLOAT16:
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def _decode_8bit(code, scale, SIGNED: tl.constexpr):
    LINES: tl.constexpr = SIGNED_LINES if SIGNED else UNSIGNED_LINES
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    p = code & 0x7F if SIGNED else code
    a = (p << LINES[0][0]) + LINES[0][1]
    for k in tl.static_range(1, 4):
        a = tl.minimum(a, (p << LINES[k][0]) + LINES[k][1])
    if SIGNED:
        a = tl.where(p == TOP + 1, INFINITY, a)
        top_bits = code << 24
        # Of the codes without a position, 0 becomes 0, and 128 becomes the NaN whose bits are all ones.
        a = tl.where(p == 0, top_bits >> 31, a | (top_bits & -0x80000000))
    else:
        special = (p << 22) + (INFINITY - (TOP + 1 << 22))  # infinity after the top, and then a NaN
        a = tl.where(p > TOP, special, tl.where(p == 0, 0, a))
    LEAST: tl.constexpr = SIGNED_LEAST if SIGNED else UNSIGNED_LEAST
    exponent = scale.to(tl.int32, bitcast=True) & INFINITY
    scale = tl.minimum(tl.maximum(exponent, LEAST << 23), 253 << 23).to(tl.float32, bitcast=True)
    return a.to(tl.float32, bitcast=True) * scale


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
def exponents(x, inside, SIGNED: tl.constexpr):
    """The biased exponents of the scales of a tile: int32 [1, WARPS, 1, 1], or 0-d for a single block. Elements that
    are not ``inside`` have no part in them; None means that all are."""
    LEAST: tl.constexpr = SIGNED_LEAST if SIGNED else UNSIGNED_LEAST
    # Adding one to the exponent makes a negative integer of an infinity and of NaN.
    above = (x.to(tl.int32, bitcast=True) & MAGNITUDE_BITS) + 0x00800000
    if inside is not None:
        above = tl.where(inside, above, 0)
    if len(x.shape) == 1:
        most = tl.max(above, 0)
    else:
        most = tl.max(tl.max(tl.max(above, 0), 2), 1)[None, :, None, None]  # within a thread first
    return tl.minimum(tl.maximum((most >> 23) - 1, LEAST), 253)


@triton.jit
def encode_8bit(x, exponent, r, SIGNED: tl.constexpr):
    """Codes, uint8, of float32 with these exponents of scales and the dither ``r``."""
    LINES: tl.constexpr = SIGNED_LINES if SIGNED else UNSIGNED_LINES
    TOP: tl.constexpr = SIGNED_TOP if SIGNED else UNSIGNED_TOP
    LOWEST: tl.constexpr = SIGNED_LOWEST if SIGNED else UNSIGNED_LOWEST
    bits = x.to(tl.int32, bitcast=True)
    a = bits & MAGNITUDE_BITS
    # Beyond both ends no line could tell the position, and shifts would overflow.
    at = tl.minimum(tl.maximum(a - (exponent << 23), LOWEST - 1 if SIGNED else LOWEST), 1 << 23)
    position = (at << (FRACTION - LINES[0][0])) + LINES[0][2]
    for k in tl.static_range(1, 4):
        position = tl.maximum(position, (at << (FRACTION - LINES[k][0])) + LINES[k][2])
    p = (position + (r >> (32 - FRACTION)).to(tl.int32, bitcast=True)) >> FRACTION
    if not SIGNED:
        p = tl.minimum(p, a)  # only zero is 0
    # The code after the top is infinity, the next one NaN. Any finite magnitude gives at most the top here.
    p = tl.maximum(p, tl.minimum(a - (INFINITY - 1 - TOP), TOP + 2))
    if SIGNED:
        p = tl.where(at >= LOWEST, p | ((bits >> 24) & 0x80), 0)
    return p.to(tl.uint8)
