"""What the masked products share: their tiles, the product of two tiles, and loading a tile of the masked weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ._bits import unpack_bits
from ._elementwise import ALIGNMENT

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@dataclass(frozen=True)
class MatmulConfig:
    """The tile of one program.

    Attributes:
        block_m: rows of the batch.
        block_o: outputs.
        block_r: terms of the sum in one step.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        slots: for batches of several tasks: how many tasks one load of the weight serves.
    """

    block_m: int
    block_o: int
    block_r: int
    num_warps: int
    num_stages: int
    slots: int = 1

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_o}x{self.block_r}"
        slots = f" slots={self.slots}" if self.slots > 1 else ""
        return f"{tile} warps={self.num_warps} stages={self.num_stages}{slots}"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. ``PRECISION`` matters for fp32 alone."""
    if INTERPRETED:  # the interpreter would multiply the raw bits of bf16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_mask(mask_ptr, rows, col, N, K, stride_mask, ALIGNED: tl.constexpr, COLS: tl.constexpr):
    """Tile [rows, col : col + COLS] of a packed mask [N, K] as booleans; ``col`` and ``COLS`` are multiples of 8.

    Whole bytes are loaded and expanded in registers. ``ALIGNED`` says that every row begins at a byte and has
    ``stride_mask`` bytes. Otherwise each byte of the tile is put together from the two bytes that hold its parts.
    ``mask_ptr`` may be a column of pointers, one per row.
    """
    rows = rows.to(tl.int64)[:, None]
    step = tl.arange(0, COLS // 8)[None, :]
    if ALIGNED:
        byte = col // 8 + step
        packed = tl.load(mask_ptr + rows * stride_mask + byte, mask=(rows < N) & (byte < stride_mask), other=0)
    else:
        first = rows * K + col  # the element at the tile's left edge
        inside = (rows < N) & (col + 8 * step < K)
        low_ptr = mask_ptr + (first >> 3) + step
        low = tl.load(low_ptr, mask=inside, other=0).to(tl.int32)
        # The last byte has no next byte. The tile needs no bits beyond it.
        more = ((first >> 3) + step + 1) * 8 < tl.full([], 1, tl.int64) * N * K
        high = tl.load(low_ptr + 1, mask=inside & more, other=0).to(tl.int32)
        packed = ((low | (high << 8)) >> (first & 7).to(tl.int32)).to(tl.uint8)
    return unpack_bits(packed)


@triton.jit
def load_masked(
    w_ptr,
    mask_ptr,
    s_ptr,
    tau,
    rows,
    col,
    N,
    K,
    stride_mask,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    COLS: tl.constexpr,
):
    """Tile [rows, col : col + COLS] of ``m ? W : +0.0`` in W's dtype, zero beyond [N, K]."""
    cols = col + tl.arange(0, COLS)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + cols[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    if mask_ptr is not None:
        return tl.where(load_mask(mask_ptr, rows, col, N, K, stride_mask, ALIGNED, COLS), w, 0.0)
    else:
        key = tl.load(s_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if RULE == "magnitude":
            key = tl.abs(key)
        return tl.where(key < tau, 0.0, w)


def common_unit(*strides: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides every stride."""
    return math.gcd(8, *strides)


def load_unit(tensors: Iterable[Tensor | None], *strides: int) -> int:
    """How many elements one load may take, at most 8: only one if some tensor begins where no wide load may begin."""
    return 1 if any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors) else common_unit(*strides)


def fitted(config: MatmulConfig, unit: int) -> MatmulConfig:
    """The tile, with shorter steps where a load takes one or two elements. Such loads do not go through a pipeline.
    Each needs registers of its own, and longer steps would need more registers than there are."""
    return config if unit >= 4 else replace(config, block_r=min(config.block_r, 32), num_stages=1)


ALL_REGISTERS = 255
"""How many registers a thread may use, for launches that say it. In other kernels ptxas at times spills a few registers
to run more programs at once, even if a thread uses only 64."""
