"""The fused gradient masking: from the gradient of the masked weight to those of the weight and its scores."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._bits import unpack_bits
from ._compile import CompileCase
from ._elementwise import (
    ALIGNMENT,
    Config,
    TensorTable,
    below,
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


@triton.jit
def _gate_backward_tile(
    g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, left,
    W_DTYPE: tl.constexpr, S_DTYPE: tl.constexpr, BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_SCORES: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block, its pointers already at the first element; ``left`` elements remain in the tensor.

    The order of operations and of roundings is that of the torch backend, so that the results are too.
    """
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    g = convert(tl.load(g_ptr + lane, mask=inside), W_DTYPE)
    if NEED_WEIGHT or MAGNITUDE:
        s = tl.load(s_ptr + lane, mask=inside)
    if NEED_WEIGHT:
        drop = below(s, tau, MAGNITUDE)
        if HAS_UNION:
            byte = tl.arange(0, BLOCK // 8)
            drop |= unpack_bits(tl.load(union_ptr + byte, mask=byte * 8 < left if TAIL else None))
        tl.store(dw_ptr + lane, tl.where(drop, tl.zeros_like(g), g), mask=inside)
    if NEED_SCORES:
        w = tl.load(w_ptr + lane, mask=inside)
        ds = convert(widen(g) * widen(w), W_DTYPE)
        if MAGNITUDE:  # the sign of NaN is 0, as PyTorch's
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
    # Full blocks carry no masks: under one, an odd n would cost every block of the tensor its vector loads.
    if n - start >= BLOCK:
        _gate_backward_tile(
            g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, BLOCK,
            W_DTYPE, S_DTYPE, BLOCK, MAGNITUDE, HAS_UNION, NEED_WEIGHT, NEED_SCORES, False,
        )  # fmt: skip
    else:
        _gate_backward_tile(
            g_ptr, w_ptr, s_ptr, tau, union_ptr, dw_ptr, ds_ptr, n - start,
            W_DTYPE, S_DTYPE, BLOCK, MAGNITUDE, HAS_UNION, NEED_WEIGHT, NEED_SCORES, True,
        )  # fmt: skip


@triton.jit
def gate_backward_kernel(
    g_ptr,  # [n] float
    w_ptr,  # [n] float
    s_ptr,  # [n] float
    tau_ptr,  # [] as s_ptr
    union_ptr,  # [ceil(n / 8)] uint8, or None
    dw_ptr,  # [n] as w_ptr, or None
    ds_ptr,  # [n] as s_ptr, or None
    n,
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
        w_ptr.dtype.element_ty, s_ptr.dtype.element_ty, BLOCK, MAGNITUDE, HAS_UNION, NEED_WEIGHT, NEED_SCORES,
    )  # fmt: skip


@triton.jit
def gate_backward_multi_kernel(
    table_ptr,  # [8, tensors] int64: G, W, S, tau, union, dW, dS; n
    block_ptr,  # [programs, 2] int32: tensor, block of it
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
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(block_ptr + pid * 2)
    start = tl.load(block_ptr + pid * 2 + 1).to(tl.int64) * BLOCK
    g_ptr = table_pointer(table_ptr, 0, tensor, tensors, G_DTYPE, ALIGNED)
    w_ptr = table_pointer(table_ptr, 1, tensor, tensors, W_DTYPE, ALIGNED)
    s_ptr = table_pointer(table_ptr, 2, tensor, tensors, S_DTYPE, ALIGNED)
    tau_ptr = table_pointer(table_ptr, 3, tensor, tensors, S_DTYPE, False)
    union_ptr = table_pointer(table_ptr, 4, tensor, tensors, tl.uint8, False)
    dw_ptr = table_pointer(table_ptr, 5, tensor, tensors, W_DTYPE, ALIGNED)
    ds_ptr = table_pointer(table_ptr, 6, tensor, tensors, S_DTYPE, ALIGNED)
    n = tl.load(table_ptr + 7 * tensors + tensor)
    _gate_backward_block(
        g_ptr, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, start, n,
        W_DTYPE, S_DTYPE, BLOCK, MAGNITUDE, HAS_UNION, NEED_WEIGHT, NEED_SCORES,
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
    """``dW`` and ``dS`` in one pass; the mask is formed again from the scores and tau.

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
    )


def gate_backward_table(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    taus: Sequence[Tensor],
    unions: Sequence[Tensor] | None,
    dws: Sequence[Tensor] | None,
    dss: Sequence[Tensor] | None,
    config: Config = CONFIGS[0],
) -> TensorTable:
    """The table for :func:`gate_backward_multi`: T tensors, each operand of one dtype and else as there."""
    columns = [grads, weights, scores, taus, unions, dws, dss]
    rows = [[None] * len(weights) if column is None else column for column in columns]
    for operands in zip(*rows, strict=True):
        _check(*operands)
    return tensor_table(columns, config)


def gate_backward_multi(table: TensorTable, *, rule: str) -> None:
    """:func:`gate_backward` for every tensor of ``table`` (:func:`gate_backward_table`) in one launch."""
    gate_backward_multi_kernel[(len(table.blocks),)](
        table_ptr=table.addresses,
        block_ptr=table.blocks,
        tensors=table.addresses.shape[1],
        G_DTYPE=table.dtypes[0],
        W_DTYPE=table.dtypes[1],
        S_DTYPE=table.dtypes[2],
        BLOCK=table.config.block,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.dtypes[4] is not None,
        NEED_WEIGHT=table.dtypes[5] is not None,
        NEED_SCORES=table.dtypes[6] is not None,
        ALIGNED=table.aligned,
        num_warps=table.config.num_warps,
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


def compile_cases() -> list[CompileCase]:
    """Every tile shape with the dtypes of mixed, full and half precision, and the launch over many tensors."""
    dtypes = [("bf16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")]
    flags = {"MAGNITUDE": True, "HAS_UNION": True, "NEED_WEIGHT": True, "NEED_SCORES": True}
    pointers = ("g_ptr", "w_ptr", "s_ptr", "tau_ptr", "union_ptr", "dw_ptr", "ds_ptr")
    cases = []
    for config in CONFIGS:
        for g, w in dtypes:
            types = (g, w, w, w, "u8", w, w)
            cases.append(
                CompileCase(
                    name=f"gate_backward {g} {w} {config.block}x{config.num_warps}",
                    fn=gate_backward_kernel,
                    signature={p: f"*{t}" for p, t in zip(pointers, types, strict=True)} | {"n": "i64"},
                    constexprs=flags | {"BLOCK": config.block},
                    attrs=dict.fromkeys(pointers, ALIGNMENT),
                    num_warps=config.num_warps,
                )
            )
        cases.append(
            CompileCase(
                name=f"gate_backward_multi bf16 fp32 {config.block}x{config.num_warps}",
                fn=gate_backward_multi_kernel,
                signature={"table_ptr": "*i64", "block_ptr": "*i32", "tensors": "i32"},
                constexprs=flags
                | {"BLOCK": config.block, "ALIGNED": True}
                | {"G_DTYPE": tl.bfloat16, "W_DTYPE": tl.float32, "S_DTYPE": tl.float32},
                attrs={"table_ptr": ALIGNMENT, "block_ptr": ALIGNMENT},
                num_warps=config.num_warps,
            )
        )
    return cases
