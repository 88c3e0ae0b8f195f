"""Device functions on bits, without loads or stores: packed masks, and integer keys that order as scores do.

A packed mask holds element ``i`` of the row-major flattened tensor in bit ``i % 8``, least significant first,
of byte ``i // 8``. Keys are made by integer arithmetic alone. So denormal (tiny) numbers keep
different keys where a processor treats them as zero, and every dtype does the same in the interpreter as on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_bits(keep):
    """Pack the last axis, a multiple of 8: ``keep`` [..., N] int1 -> [..., N // 8] uint8."""
    bits = keep.reshape(keep.numel // 8, 8).to(tl.int32) << tl.arange(0, 8)[None, :]
    return tl.sum(bits, axis=1).to(tl.uint8).reshape(keep.shape[:-1] + [keep.shape[-1] // 8])


@triton.jit
def unpack_bits(packed):
    """Unpack the last axis: ``packed`` [..., N] uint8 -> [..., N * 8] int1."""
    bits = (packed.reshape(packed.numel, 1).to(tl.int32) >> tl.arange(0, 8)[None, :]) & 1
    return (bits != 0).reshape(packed.shape[:-1] + [packed.shape[-1] * 8])


@triton.jit
def order_key(x, MAGNITUDE: tl.constexpr):
    """Scores (float32, bfloat16 or float16) to uint32 keys in the order of ``x``, or of ``|x|`` for
    MAGNITUDE.

    Every NaN has the same key, the largest; -0.0 has the key of +0.0. A key has as many significant bits as
    the dtype, and with MAGNITUDE one bit less.
    """
    BITS: tl.constexpr = x.dtype.primitive_bitwidth
    INF: tl.constexpr = (1 << (BITS - 1)) - (1 << x.dtype.fp_mantissa_width)  # the bits of +inf
    if BITS == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    size = tl.minimum(bits & ((1 << (BITS - 1)) - 1), INF + 1)
    if MAGNITUDE:
        key = size.to(tl.uint32, bitcast=True)
    else:
        signed = tl.where((bits < 0) & (size <= INF), -size, size)
        key = signed.to(tl.uint32, bitcast=True) + (1 << (BITS - 1))
    return key


@triton.jit
def from_order_key(key, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The score of a key, with +0.0 for zero and a quiet NaN: the inverse of :func:`order_key`."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    INF: tl.constexpr = SIGN - (1 << DTYPE.fp_mantissa_width)
    if MAGNITUDE:
        size = key
        sign = tl.zeros_like(key)
    else:
        negative = key < SIGN
        size = tl.where(negative, SIGN - key, key - SIGN)
        sign = tl.where(negative, SIGN, 0).to(tl.uint32)
    bits = tl.where(size > INF, INF | (INF >> 1), size).to(tl.uint32) | sign
    if BITS == 32:
        x = bits.to(DTYPE, bitcast=True)
    else:
        x = bits.to(tl.uint16).to(DTYPE, bitcast=True)
    return x
