"""The gradients of the weight and of its scores, formed in one pass from the gradient of the masked weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._bits import unpack_bits
from ._elementwise import (
    FP_FUSION,
    TRITON_DTYPES,
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
    widen,
)

CONFIGS = (Config(1024, 8), Config(512, 4), Config(1024, 4), Config(2048, 8))
"""Every tile shape that may be chosen for the kernels here; the first is the default."""

# Rows of the table of ``gate_backward_multi_kernel``, in the order in which ``gate_backward_table`` writes them: what
# stays in place from step to step.
ROW_WEIGHT = tl.constexpr(0)
ROW_SCORES = tl.constexpr(1)
ROW_UNION = tl.constexpr(2)
ROW_NUMEL = tl.constexpr(3)

# Rows of the addresses beside the table, int64 [MOVING, tensors]: what may be elsewhere at every step.
MOVING_GRAD = tl.constexpr(0)
MOVING_DW = tl.constexpr(1)
MOVING_DS = tl.constexpr(2)
MOVING_TAU = tl.constexpr(3)
MOVING = 4


@triton.jit
def _gate_backward_tile(
    g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, left,
    W_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_SCORES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block, its pointers already at the first element; ``left`` elements remain in the tensor.

    The order of operations and of roundings is that of the torch backend, so that the results are the same.
    """
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    # Loads come before the first store, because the compiler cannot know that no two operands overlap.
    g = tl.load(g_ptr + lane, mask=inside)
    if NEED_WEIGHT or MAGNITUDE:
        s = tl.load(s_ptr + lane, mask=inside)
    if NEED_WEIGHT and HAS_UNION:
        byte = tl.arange(0, BLOCK // 8)
        frozen = unpack_bits(tl.load(union_ptr + byte, mask=byte * 8 < left if TAIL else None))
    if NEED_SCORES:
        w = tl.load(w_ptr + lane, mask=inside)
    g = convert(g, W_DTYPE)
    if NEED_WEIGHT:
        drop = below(s, tau, MAGNITUDE)
        if HAS_UNION:
            drop |= frozen
        tl.store(dw_ptr + lane, tl.where(drop, tl.zeros_like(g), g), mask=inside)
    if NEED_SCORES:
        ds = convert(widen(g) * widen(w), W_DTYPE)
        if MAGNITUDE:  # sign(NaN) is 0, as in PyTorch
            ds = widen(ds)
            ds = ds * ((widen(s) > 0).to(ds.dtype) - (widen(s) < 0).to(ds.dtype))
        tl.store(ds_ptr + lane, convert(ds, S_DTYPE), mask=inside)


@triton.jit
def _gate_backward_block(
    g_ptr, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, start, n,
    W_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_SCORES: tl.constexpr,
):  # fmt: skip
    g_ptr += start
    w_ptr += start
    s_ptr += start
    if HAS_UNION:
        union_ptr += start // 8
    if NEED_WEIGHT:
        dw_ptr += start
    if NEED_SCORES:
        ds_ptr += start
    tau = tl.load(tau_ptr)
    # Full blocks load without a bounds check. With one, no block could use wide loads when n is odd.
    if n - start >= BLOCK:
        _gate_backward_tile(
            g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, BLOCK,
            W_DTYPE=W_DTYPE, S_DTYPE=S_DTYPE, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION,
            NEED_WEIGHT=NEED_WEIGHT, NEED_SCORES=NEED_SCORES, TAIL=False,
        )  # fmt: skip
    else:
        _gate_backward_tile(
            g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, n - start,
            W_DTYPE=W_DTYPE, S_DTYPE=S_DTYPE, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION,
            NEED_WEIGHT=NEED_WEIGHT, NEED_SCORES=NEED_SCORES, TAIL=True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tau_ptr", "union_ptr", "n"])
def gate_backward_kernel(
    g_ptr,  # [n] float
    w_ptr,  # [n] float
    s_ptr,  # [n] float
    tau_ptr,  # [] as s_ptr
    union_ptr,  # [ceil(n / 8)] uint8, or None
    dw_ptr,  # [n] as w_ptr, or None
    ds_ptr,  # [n] as s_ptr, or None
    n: tl.int64,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
):
    """``dW = m and not M ? G : +0.0`` (Eq. 4), ``dS = G * W`` times ``sign(S)`` if MAGNITUDE (Eq. 5)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _gate_backward_block(
        g_ptr, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, start, n,
        W_DTYPE=w_ptr.dtype.element_ty, S_DTYPE=s_ptr.dtype.element_ty, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE,
        HAS_UNION=HAS_UNION, NEED_WEIGHT=NEED_WEIGHT, NEED_SCORES=NEED_SCORES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_ptr", "moving_ptr", "block_ptr", "tensors"])
def gate_backward_multi_kernel(
    table_ptr,  # [4, tensors] int64: the rows ROW_...
    moving_ptr,  # [4, tensors] int64: the rows MOVING_...
    block_ptr,  # [programs, BLOCK_COLUMNS] int32
    tensors,
    G_DTYPE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_SCORES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """:func:`gate_backward_kernel` for many tensors in one launch."""
    tensor, start = block_of(block_ptr, BLOCK)
    g_ptr = table_pointer(moving_ptr, MOVING_GRAD, tensor, tensors, G_DTYPE, ALIGNED)
    w_ptr = table_pointer(table_ptr, ROW_WEIGHT, tensor, tensors, W_DTYPE, ALIGNED)
    s_ptr = table_pointer(table_ptr, ROW_SCORES, tensor, tensors, S_DTYPE, ALIGNED)
    tau_ptr = table_pointer(moving_ptr, MOVING_TAU, tensor, tensors, S_DTYPE, ALIGNED=False)
    union_ptr = table_pointer(table_ptr, ROW_UNION, tensor, tensors, tl.uint8, ALIGNED=False)
    dw_ptr = table_pointer(moving_ptr, MOVING_DW, tensor, tensors, W_DTYPE, ALIGNED)
    ds_ptr = table_pointer(moving_ptr, MOVING_DS, tensor, tensors, S_DTYPE, ALIGNED)
    n = layout.field(table_ptr, ROW_NUMEL, tensor, tensors)
    _gate_backward_block(
        g_ptr, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, start, n,
        W_DTYPE=W_DTYPE, S_DTYPE=S_DTYPE, BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION,
        NEED_WEIGHT=NEED_WEIGHT, NEED_SCORES=NEED_SCORES,
    )  # fmt: skip


def gate_backward(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    dw: Tensor | None,
    ds: Tensor | None,
    *,
    rule: str,
    config: Config = CONFIGS[0],
) -> None:
    """Write ``dW`` and ``dS`` in one pass. The mask is formed again from the scores and tau.

    Args:
        grad: G, the gradient of the masked weight, contiguous float32, float64, bfloat16 or float16, n elements.
        weight: contiguous, of one of these dtypes, n elements.
        scores: contiguous, of one of these dtypes, n elements.
        tau: 0-d, of the dtype of ``scores``, read on the device.
        union: packed mask of the weights that finished tasks own, uint8 [ceil(n / 8)], or None for none.
        dw: the result for the weight, contiguous and of its dtype, or None if nobody needs it.
        ds: the result for the scores, contiguous and of their dtype, or None; not both None.
        rule: "magnitude" or "value".
        config: the tile shape, one of ``CONFIGS``.
    """
    n = weight.numel()
    _check(grad, weight, scores, tau, union, dw, ds)
    gate_backward_kernel[grid(n, config)](
        g_ptr=grad,
        w_ptr=weight,
        s_ptr=scores,
        tau_ptr=tau,
        union_ptr=union,
        dw_ptr=dw,
        ds_ptr=ds,
        n=n,
        BLOCK=config.block,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=union is not None,
        NEED_WEIGHT=dw is not None,
        NEED_SCORES=ds is not None,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def gate_backward_table(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    unions: Sequence[Tensor] | None,
    config: Config = CONFIGS[0],
) -> TensorTable:
    """The table for :func:`gate_backward_multi` over T tensors. The operands of one kind have one dtype; otherwise they
    are as for :func:`gate_backward`."""
    for weight, score, union in zip(weights, scores, unions or [None] * len(weights), strict=True):
        check_operands(weight.numel(), weight, score)
        check_packed(weight.numel(), union)
    return tensor_table([weights, scores, unions], config)


def gate_backward_multi(
    table: TensorTable, moving: Tensor, *, grad: torch.dtype, needed: tuple[bool, bool], aligned: bool, rule: str
) -> None:
    """:func:`gate_backward` for every tensor of ``table`` in one launch.

    Args:
        table: of :func:`gate_backward_table`, on the device of the tensors.
        moving: int64 [MOVING, T] there, addresses, in the rows that ``MOVING_...`` names: of G, dW, dS and tau. That of
            a gradient that is not needed is not read.
        grad: the dtype of G.
        needed: whether dW is needed, and whether dS is; for all tensors, and not both False.
        aligned: whether the addresses of G, dW and dS are multiples of 16 bytes.
        rule: "magnitude" or "value".
    """
    assert moving.shape == (MOVING, table.addresses.shape[1]) and moving.is_contiguous() and any(needed)
    gate_backward_multi_kernel[(len(table.blocks),)](
        table_ptr=table.addresses,
        moving_ptr=moving,
        block_ptr=table.blocks,
        tensors=table.addresses.shape[1],
        G_DTYPE=TRITON_DTYPES[grad],
        W_DTYPE=table.dtypes[ROW_WEIGHT],
        S_DTYPE=table.dtypes[ROW_SCORES],
        BLOCK=table.config.block,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.dtypes[ROW_UNION] is not None,
        NEED_WEIGHT=needed[0],
        NEED_SCORES=needed[1],
        ALIGNED=aligned and table.aligned,
        num_warps=table.config.num_warps,
        **FP_FUSION,
    )


def _check(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    dw: Tensor | None,
    ds: Tensor | None,
) -> None:
    check_operands(weight.numel(), grad, weight, scores, dw, ds)
    check_threshold(tau, scores)
    check_packed(weight.numel(), union)
    assert dw is not None or ds is not None
    assert dw is None or dw.dtype is weight.dtype
    assert ds is None or ds.dtype is scores.dtype
