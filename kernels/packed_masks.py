"""The arithmetic of packed masks: pack, unpack, OR of several, number of set bits.

The kernels work on packed masks as :mod:`._bits` defines them. Their launchers get the results from the caller and
assert shapes, dtypes and contiguity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import pack_bits, unpack_bits
from ._elementwise import FP_FUSION, Config, check_packed, grid

CONFIGS = (Config(2048, 4), Config(4096, 8))
"""Every tile shape that may be chosen for the kernels here; the first is the default. Each gives a thread 16 bytes."""


@triton.jit
def _pack_tile(mask_ptr, packed_ptr, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """One block, its pointers already at the first element; ``left`` elements remain in the mask."""
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    keep = tl.load(mask_ptr + lane, mask=lane < left if TAIL else None, other=0 if TAIL else None) != 0
    tl.store(packed_ptr + byte, pack_bits(keep), mask=byte * 8 < left if TAIL else None)


@triton.jit(do_not_specialize=["n"])
def pack_kernel(
    mask_ptr,  # [n] uint8, zero or not
    packed_ptr,  # [ceil(n / 8)] uint8
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """Write a bit for every byte."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Full blocks load without a bounds check. With one, no block could use wide loads when n is odd.
    if n - start >= BLOCK:
        _pack_tile(mask_ptr + start, packed_ptr + start // 8, BLOCK, BLOCK=BLOCK, TAIL=False)
    else:
        _pack_tile(mask_ptr + start, packed_ptr + start // 8, n - start, BLOCK=BLOCK, TAIL=True)


@triton.jit
def _unpack_tile(packed_ptr, mask_ptr, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """One block, its pointers already at the first element; ``left`` elements remain in the mask."""
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    bits = tl.load(packed_ptr + byte, mask=byte * 8 < left if TAIL else None)
    tl.store(mask_ptr + lane, unpack_bits(bits).to(tl.uint8), mask=lane < left if TAIL else None)


@triton.jit(do_not_specialize=["packed_ptr", "n"])
def unpack_kernel(
    packed_ptr,  # [ceil(n / 8)] uint8
    mask_ptr,  # [n] uint8: 0 or 1
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """Write a byte for every bit."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if n - start >= BLOCK:
        _unpack_tile(packed_ptr + start // 8, mask_ptr + start, BLOCK, BLOCK=BLOCK, TAIL=False)
    else:
        _unpack_tile(packed_ptr + start // 8, mask_ptr + start, n - start, BLOCK=BLOCK, TAIL=True)


@triton.jit
def _union_tile(packed_ptr, out_ptr, rows, left, stride_row, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """One block, its pointers already at the first byte; ``left`` bytes remain in a row."""
    offset = tl.arange(0, BLOCK)
    inside = offset < left if TAIL else None
    acc = tl.zeros([BLOCK], tl.uint8)
    for row in range(rows):
        acc |= tl.load(packed_ptr + tl.cast(row, tl.int64) * stride_row + offset, mask=inside)
    tl.store(out_ptr + offset, acc, mask=inside)


@triton.jit(do_not_specialize=["rows", "bytes", "stride_row"])
def union_kernel(
    packed_ptr,  # [rows, bytes] uint8
    out_ptr,  # [bytes] uint8
    rows,
    bytes: tl.int64,
    stride_row: tl.int64,
    BLOCK: tl.constexpr,
):
    """Write the OR of the rows."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = bytes - start
    if (left >= BLOCK) & (stride_row % 16 == 0):
        stride = stride_row // 16 * 16  # the same number, but now the compiler sees that wide loads are possible
        _union_tile(packed_ptr + start, out_ptr + start, rows, left, stride, BLOCK=BLOCK, TAIL=False)
    else:
        _union_tile(packed_ptr + start, out_ptr + start, rows, left, stride_row, BLOCK=BLOCK, TAIL=True)


@triton.jit
def _popcount_tile(packed_ptr, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """The number of set bits in one block, its pointer already at the first byte; ``left`` bytes remain."""
    offset = tl.arange(0, BLOCK)
    if TAIL:
        x = tl.load(packed_ptr + offset, mask=offset < left, other=0).to(tl.int32)
    else:
        x = tl.load(packed_ptr + offset).to(tl.int32)
    x -= (x >> 1) & 0x55  # pairs, nibbles, bytes
    x = (x & 0x33) + ((x >> 2) & 0x33)
    x = (x + (x >> 4)) & 0x0F
    return tl.sum(x, 0).to(tl.int64)


@triton.jit(do_not_specialize=["count_ptr", "bytes"])
def popcount_kernel(
    packed_ptr,  # [bytes] uint8
    count_ptr,  # [] int64, zero before
    bytes: tl.int64,
    BLOCK: tl.constexpr,
):
    """Add the number of set bits to the count. A sum of integers does not depend on the order of the programs."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if bytes - start >= BLOCK:
        count = _popcount_tile(packed_ptr + start, BLOCK, BLOCK=BLOCK, TAIL=False)
    else:
        count = _popcount_tile(packed_ptr + start, bytes - start, BLOCK=BLOCK, TAIL=True)
    tl.atomic_add(count_ptr, count, sem="relaxed")


def pack(mask: Tensor, packed: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """Pack ``mask`` (contiguous bool, n elements) into ``packed`` (uint8 [ceil(n / 8)]), padding bits zero."""
    assert mask.dtype is torch.bool and mask.is_contiguous()
    check_packed(mask.numel(), packed)
    pack_kernel[grid(mask.numel(), config)](
        mask_ptr=mask.view(torch.uint8),
        packed_ptr=packed,
        n=mask.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def unpack(packed: Tensor, mask: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """Unpack ``packed`` (uint8 [ceil(n / 8)]) into ``mask`` (contiguous bool, n elements)."""
    assert mask.dtype is torch.bool and mask.is_contiguous()
    check_packed(mask.numel(), packed)
    unpack_kernel[grid(mask.numel(), config)](
        packed_ptr=packed,
        mask_ptr=mask.view(torch.uint8),
        n=mask.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def union(packed: Tensor, out: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """``out`` (uint8 [bytes]) = OR over the rows of ``packed`` (uint8 [T, bytes], T >= 1, each row contiguous)."""
    check_packed(out.numel() * 8, out)
    assert packed.dtype is torch.uint8 and packed.shape[1:] == out.shape and packed[0].is_contiguous()
    union_kernel[grid(out.numel(), config)](
        packed_ptr=packed,
        out_ptr=out,
        rows=packed.shape[0],
        bytes=out.numel(),
        stride_row=packed.stride(0),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def popcount(packed: Tensor, count: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """``count`` (0-d int64) = the number of set bits of ``packed`` (contiguous uint8); the same on every run."""
    assert packed.dtype is torch.uint8 and packed.is_contiguous() and count.dtype is torch.int64
    count.zero_()
    popcount_kernel[grid(packed.numel(), config)](
        packed_ptr=packed,
        count_ptr=count,
        bytes=packed.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **FP_FUSION,
    )
