"""The gate, which applies the mask: ``m ? W : +0.0`` for every weight. The mask is formed from scores and threshold, or
read from its packed form.

The kernels work on flattened contiguous tensors, and on packed masks as :mod:`._bits` defines them. Their launchers get
the results from the caller and assert shapes, dtypes and contiguity.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._bits import pack_bits, unpack_bits
from ._elementwise import (
    FP_FUSION,
    Config,
    TensorTable,
    below,
    block_of,
    check_operands,
    check_packed,
    check_threshold,
    convert,
    grid,
    is_magnitude,
    table_pointer,
    tensor_table,
)

CONFIGS = (Config(1024, 4), Config(1024, 8), Config(512, 4), Config(2048, 8))
"""Every tile shape that may be chosen for the kernels here; the first is the default."""

# Rows of the addresses in the table of ``gate_multi_kernel``, in the order in which ``gate_table`` writes them.
ROW_WEIGHT = tl.constexpr(0)
ROW_SCORES = tl.constexpr(1)
ROW_TAU = tl.constexpr(2)
ROW_OUT = tl.constexpr(3)
ROW_PACKED = tl.constexpr(4)
ROW_NUMEL = tl.constexpr(5)


@triton.jit
def _gate_tile(
    w_ptr, s_ptr, tau, out_ptr, packed_ptr, left,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, PACK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block, its pointers already at the first element; ``left`` elements remain in the tensor."""
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    drop = below(tl.load(s_ptr + lane, mask=inside), tau, MAGNITUDE)
    w = convert(tl.load(w_ptr + lane, mask=inside), out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, tl.where(drop, tl.zeros_like(w), w), mask=inside)
    if PACK:
        byte = tl.arange(0, BLOCK // 8)
        keep = (drop == 0) & inside if TAIL else drop == 0
        tl.store(packed_ptr + byte, pack_bits(keep), mask=byte * 8 < left if TAIL else None)


@triton.jit
def _gate_block(
    w_ptr, s_ptr, tau, out_ptr, packed_ptr, start, n,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    w_ptr += start
    s_ptr += start
    out_ptr += start
    if PACK:
        packed_ptr += start // 8
    # Full blocks load without a bounds check. With one, no block could use wide loads when n is odd.
    if n - start >= BLOCK:
        _gate_tile(
            w_ptr, s_ptr, tau, out_ptr, packed_ptr, BLOCK, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, PACK=PACK, TAIL=False
        )  # fmt: skip
    else:
        _gate_tile(
            w_ptr, s_ptr, tau, out_ptr, packed_ptr, n - start, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, PACK=PACK, TAIL=True
        )  # fmt: skip


@triton.jit(do_not_specialize=["tau_ptr", "n"])
def gate_kernel(
    w_ptr,  # [n] float
    s_ptr,  # [n] float
    tau_ptr,  # [] as s_ptr
    out_ptr,  # [n] float
    packed_ptr,  # [ceil(n / 8)] uint8, or None
    n: tl.int64,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PACK: tl.constexpr,
):
    """``out = key(S) < tau ? +0.0 : W``, and the mask beside it if PACK."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _gate_block(w_ptr, s_ptr, tl.load(tau_ptr), out_ptr, packed_ptr, start, n, BLOCK, MAGNITUDE, PACK)


@triton.jit(do_not_specialize=["table_ptr", "block_ptr", "tensors"])
def gate_multi_kernel(
    table_ptr,  # [6, tensors] int64: the rows ROW_...
    block_ptr,  # [programs, BLOCK_COLUMNS] int32
    tensors,
    W_DTYPE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PACK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """:func:`gate_kernel` for many tensors in one launch."""
    tensor, start = block_of(block_ptr, BLOCK)
    w_ptr = table_pointer(table_ptr, ROW_WEIGHT, tensor, tensors, W_DTYPE, ALIGNED)
    s_ptr = table_pointer(table_ptr, ROW_SCORES, tensor, tensors, S_DTYPE, ALIGNED)
    tau_ptr = table_pointer(table_ptr, ROW_TAU, tensor, tensors, S_DTYPE, ALIGNED=False)
    out_ptr = table_pointer(table_ptr, ROW_OUT, tensor, tensors, OUT_DTYPE, ALIGNED)
    packed_ptr = table_pointer(table_ptr, ROW_PACKED, tensor, tensors, tl.uint8, ALIGNED=False)
    n = layout.field(table_ptr, ROW_NUMEL, tensor, tensors)
    _gate_block(w_ptr, s_ptr, tl.load(tau_ptr), out_ptr, packed_ptr, start, n, BLOCK, MAGNITUDE, PACK)


@triton.jit
def _gate_packed_tile(w_ptr, packed_ptr, out_ptr, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """One block, its pointers already at the first element; ``left`` elements remain in the tensor."""
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    inside = lane < left if TAIL else None
    keep = unpack_bits(tl.load(packed_ptr + byte, mask=byte * 8 < left if TAIL else None))
    w = convert(tl.load(w_ptr + lane, mask=inside), out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, tl.where(keep, w, tl.zeros_like(w)), mask=inside)


@triton.jit(do_not_specialize=["packed_ptr", "n"])
def gate_packed_kernel(
    w_ptr,  # [n] float
    packed_ptr,  # [ceil(n / 8)] uint8
    out_ptr,  # [n] float
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """``out = bit ? W : +0.0``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if n - start >= BLOCK:
        _gate_packed_tile(w_ptr + start, packed_ptr + start // 8, out_ptr + start, BLOCK, BLOCK=BLOCK, TAIL=False)
    else:
        _gate_packed_tile(
            w_ptr + start, packed_ptr + start // 8, out_ptr + start, n - start, BLOCK=BLOCK, TAIL=True
        )  # fmt: skip


def gate(
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    out: Tensor,
    packed: Tensor | None,
    *,
    rule: str,
    config: Config = CONFIGS[0],
) -> None:
    """Write ``out = m ? W : +0.0``, and the packed mask if there is a place for it, in one pass.

    Args:
        weight: contiguous float32, float64, bfloat16 or float16, n elements.
        scores: contiguous, of one of these dtypes, n elements.
        tau: 0-d, of the dtype of ``scores``, read on the device.
        out: contiguous, n elements; its dtype is the compute dtype.
        packed: uint8 [ceil(n / 8)] for the mask, or None.
        rule: "magnitude" or "value".
        config: the tile shape, one of ``CONFIGS``.
    """
    n = weight.numel()
    check_operands(n, weight, scores, out)
    check_threshold(tau, scores)
    check_packed(n, packed)
    gate_kernel[grid(n, config)](
        w_ptr=weight,
        s_ptr=scores,
        tau_ptr=tau,
        out_ptr=out,
        packed_ptr=packed,
        n=n,
        BLOCK=config.block,
        MAGNITUDE=is_magnitude(rule),
        PACK=packed is not None,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def gate_table(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    taus: Sequence[Tensor],
    outs: Sequence[Tensor],
    packed: Sequence[Tensor] | None,
    config: Config = CONFIGS[0],
) -> TensorTable:
    """The table for :func:`gate_multi` over T tensors, each operand of one dtype and as :func:`gate` takes it."""
    masks = [None] * len(weights) if packed is None else packed
    for weight, score, tau, out, mask in zip(weights, scores, taus, outs, masks, strict=True):
        check_operands(weight.numel(), weight, score, out)
        check_threshold(tau, score)
        check_packed(weight.numel(), mask)
    return tensor_table([weights, scores, taus, outs, packed], config)


def gate_multi(table: TensorTable, *, rule: str) -> None:
    """:func:`gate` for every tensor of ``table`` (:func:`gate_table`, on the tensors' device) in one launch."""
    gate_multi_kernel[(len(table.blocks),)](
        table_ptr=table.addresses,
        block_ptr=table.blocks,
        tensors=table.addresses.shape[1],
        W_DTYPE=table.dtypes[ROW_WEIGHT],
        S_DTYPE=table.dtypes[ROW_SCORES],
        OUT_DTYPE=table.dtypes[ROW_OUT],
        BLOCK=table.config.block,
        MAGNITUDE=is_magnitude(rule),
        PACK=table.dtypes[ROW_PACKED] is not None,
        ALIGNED=table.aligned,
        num_warps=table.config.num_warps,
        **FP_FUSION,
    )


def gate_packed(weight: Tensor, packed: Tensor, out: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """Write ``out = m ? W : +0.0`` with the mask read from ``packed``. The operands are as for :func:`gate`."""
    n = weight.numel()
    check_operands(n, weight, out)
    check_packed(n, packed)
    gate_packed_kernel[grid(n, config)](
        w_ptr=weight, packed_ptr=packed, out_ptr=out, n=n, BLOCK=config.block, num_warps=config.num_warps, **FP_FUSION
    )
