"""Masked matrix products for small batches: forward ``y = x @ (W*m).T + b`` and input gradient ``dx = dy @ (W*m)``.

The mask is applied while the weight is loaded, so that ``W*m`` is never written to memory. ``W*m`` is a select: nothing
outside the mask reaches the result, not even NaN or infinity. Sums are fp32. Their order depends on shapes and
configuration alone, and no atomics are used, so that the same call always gives the same bits.

The weight tile is operand A of every product, for two reasons. On Hopper, four warps multiply with one instruction,
which needs an A of at least 64 rows: a small batch has fewer, the weight has enough. And this instruction can read A
from registers, where the mask was applied.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION
from ._matmul_tile import ALL_REGISTERS, MatmulConfig, dot, fitted, load_masked, load_unit
from .split_sum import partial_products, reduce_partials

# The second tiles are for GPUs whose blocks have 99 KiB of shared memory: the masks of fp32 scores leave no room there
# for the first ones.
CONFIGS = (  # bf16 and fp16
    MatmulConfig(16, 64, 64, 4, 4),
    MatmulConfig(16, 64, 64, 4, 3),
    MatmulConfig(16, 128, 64, 8, 3),
    MatmulConfig(32, 128, 64, 8, 3),
    MatmulConfig(64, 64, 64, 8, 3),
)
TF32_CONFIGS = (
    MatmulConfig(16, 64, 64, 4, 4),
    MatmulConfig(16, 64, 64, 4, 3),
    MatmulConfig(16, 128, 64, 8, 2),
    MatmulConfig(32, 64, 64, 8, 3),
    MatmulConfig(64, 64, 64, 8, 3),
)
# Full fp32 precision has no tensor-core instruction. These tiles have 32 outputs because of a fault of Triton 3.6 on
# sm_100: with 64 outputs or more, it multiplies as tf32 if an operand was formed from narrower types, which are the
# bytes of a mask or a bf16 weight.
IEEE_CONFIGS = (MatmulConfig(16, 32, 32, 4, 3), MatmulConfig(32, 32, 32, 8, 3))


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,  # [M, R] compute dtype; R = K, backward N
    w_ptr,  # [N, K] fp32, bf16 or fp16
    mask_ptr,  # [ceil(N * K / 8)] uint8, or None if the mask is formed from scores and tau
    s_ptr,  # [N, K] fp32, bf16 or fp16, or None
    tau_ptr,  # [1] dtype of the scores, or None
    bias_ptr,  # [O] any float, or None; O = N, backward K
    y_ptr,  # [M, O] any float, or [splits, M, O] fp32
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    stride_ys,
    stride_mask,
    BACKWARD: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of outputs by rows (transposed, so that the weight comes first), over one part of the sum."""
    # K and stride_xm keep their values. The compiler sees from this that UNIT divides them, and makes wider loads.
    K = stride_mask * 8 if ALIGNED else K // UNIT * UNIT
    stride_xm = stride_xm // UNIT * UNIT
    O, R = (K, N) if BACKWARD else (N, K)  # noqa: E741
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_o = (tl.program_id(0) // tiles_m) * BLOCK_O
    o = first_o + tl.arange(0, BLOCK_O)
    split = tl.program_id(1)
    steps = tl.cdiv(R, BLOCK_R)
    per_split = tl.cdiv(steps, tl.num_programs(1))
    tau = 0.0
    if tau_ptr is not None:
        tau = tl.load(tau_ptr).to(tl.float32)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        first_r = step * BLOCK_R
        r = first_r + tl.arange(0, BLOCK_R)
        x = tl.load(x_rows + r[None, :], mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)
        if BACKWARD:
            w = load_masked(w_ptr, mask_ptr, s_ptr, tau, r, first_o, N, K, stride_mask, RULE, ALIGNED, BLOCK_O)
            w = tl.trans(w.to(x.dtype))
        else:
            w = load_masked(w_ptr, mask_ptr, s_ptr, tau, o, first_r, N, K, stride_mask, RULE, ALIGNED, BLOCK_R)
            w = w.to(x.dtype)
        acc = dot(w, tl.trans(x), acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at = split.to(tl.int64) * stride_ys + m.to(tl.int64)[None, :] * stride_ym + o[:, None]
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(o < O)[:, None] & (m < M)[None, :])


def masked_matmul(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    packed: Tensor | None = None,
    scores: Tensor | None = None,
    tau: Tensor | None = None,
    rule: str = "magnitude",
    bias: Tensor | None = None,
    backward: bool = False,
    config: MatmulConfig,
    splits: int = 1,
    workspace: Tensor | None = None,
    precision: str = "ieee",
) -> None:
    """Write ``y = x @ (W*m).T + bias``, or ``y = x @ (W*m)`` if ``backward``. The mask m is packed, or formed from
    scores.

    Args:
        x: [M, K] (backward: [M, N]), M >= 1, in the compute dtype (bf16, fp16, fp32); last stride 1.
        w: [N, K], fp32, bf16 or fp16, contiguous; cast to the compute dtype in registers.
        y: the result, [M, N] (backward: [M, K]), any floating dtype; last stride 1.
        packed: the packed mask, [ceil(N * K / 8)] uint8; or else ``scores`` and ``tau``.
        scores: [N, K], fp32, bf16 or fp16, contiguous.
        tau: one element in the scores' dtype.
        rule: ``"magnitude"`` or ``"value"``.
        bias: [N] (backward: [K]), already masked, contiguous.
        backward: whether the sum runs over the rows of W.
        config: of ``CONFIGS``; for fp32 of ``TF32_CONFIGS`` or ``IEEE_CONFIGS``.
        splits: into how many parts the sum is split, for more programs than tiles.
        workspace: fp32, 1-d, ``split_sum.workspace_numel(M, outputs, splits)`` elements or more.
        precision: how fp32 is multiplied, ``"ieee"`` or ``"tf32"``.
    """
    rows, (n, k) = x.shape[0], w.shape
    outputs = k if backward else n
    assert x.stride(1) == 1 and y.stride(1) == 1 and w.is_contiguous()
    assert (packed is None) != (scores is None) and (scores is None or scores.is_contiguous())
    target = y if splits == 1 else partial_products(workspace, rows, outputs, splits)
    unit = load_unit((x, w, scores), k, x.stride(0))
    config = fitted(config, unit)
    matmul_kernel[(triton.cdiv(rows, config.block_m) * triton.cdiv(outputs, config.block_o), splits)](
        x_ptr=x,
        w_ptr=w,
        mask_ptr=packed,
        s_ptr=scores,
        tau_ptr=tau,
        bias_ptr=bias if splits == 1 else None,
        y_ptr=target,
        M=rows,
        N=n,
        K=k,
        stride_xm=x.stride(0),
        stride_ym=target.stride(-2),
        stride_ys=rows * outputs,
        stride_mask=k // 8,
        BACKWARD=backward,
        RULE=rule,
        ALIGNED=k % 8 == 0,
        UNIT=unit,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=None if precision == "ieee" else ALL_REGISTERS,
        **FP_FUSION,
    )
    if splits > 1:
        reduce_partials(target, y, bias, None, None)
