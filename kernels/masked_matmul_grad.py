"""The gradients of the weight and of its scores from one matrix product. ``G = dy.T @ x`` stays in registers, in fp32,
and the gradients are formed from it before anything is stored.

The other way is a product that writes G, followed by :mod:`.gate_gradients`. This kernel does not write and read G, and
does not round it to the compute dtype: it multiplies W by the fp32 sum, so that both gradients are rounded once. All
else is the same: the mask is a select, NaN scores are kept, and the sign of a NaN is 0. Sums are fp32. Their order
depends on shapes and configuration alone, and no atomics are used, so that the same call always gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from ._bits import unpack_bits
from ._elementwise import (
    ALIGNMENT,
    FP_FUSION,
    Config,
    below,
    check_operands,
    check_packed,
    check_threshold,
    convert,
    grid,
    is_magnitude,
    widen,
)
from ._matmul_tile import ALL_REGISTERS, common_unit, dot, load_mask
from .split_sum import partial_products


@dataclass(frozen=True)
class GradMatmulConfig:
    """The tile of one program.

    Attributes:
        block_n: rows of the weight.
        block_k: columns of the weight.
        block_m: rows of the batch in one step.
        num_warps: warps per program.
        num_stages: stages of the software pipeline.
        columns: how many columns of the tile are finished and stored at a time. A small number saves registers for W
            and S.
    """

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int
    columns: int

    def __str__(self) -> str:
        tile = f"{self.block_n}x{self.block_k}x{self.block_m}"
        return f"{tile} warps={self.num_warps} stages={self.num_stages} columns={self.columns}"


# Storing the gradients moves 16 bytes and more per weight. With all tiles but the first, two programs fit on
# a multiprocessor of sm_90: one of them can multiply while the other one stores.
CONFIGS = (  # bf16 and fp16
    GradMatmulConfig(128, 256, 64, 8, 4, 16),
    GradMatmulConfig(128, 128, 64, 8, 3, 16),
    GradMatmulConfig(128, 64, 64, 4, 3, 16),
    GradMatmulConfig(64, 128, 64, 4, 3, 16),
    GradMatmulConfig(64, 64, 32, 4, 4, 16),
)
TF32_CONFIGS = (
    GradMatmulConfig(128, 128, 32, 8, 3, 16),
    GradMatmulConfig(64, 128, 32, 4, 3, 16),
    GradMatmulConfig(64, 64, 32, 4, 3, 16),
)
IEEE_CONFIGS = (
    GradMatmulConfig(128, 128, 16, 8, 3, 16),
    GradMatmulConfig(64, 64, 16, 8, 3, 32),
    GradMatmulConfig(32, 32, 32, 4, 3, 32),
)
GROUP = 8
"""How many rows of tiles are computed together, column by column, while their parts of dy and x are in the cache."""
REDUCE_CONFIG = Config(1024, 8)


@triton.jit
def store_gradients(g, at, inside, frozen, w_ptr, s_ptr, tau_ptr, dw_ptr, ds_ptr, MAGNITUDE: tl.constexpr):
    """Store the gradients for G (fp32) at the elements ``at``: ``dW = m and not frozen ? G : +0.0`` and ``dS = G * W``,
    times ``sign(S)`` if MAGNITUDE."""
    if dw_ptr is not None or MAGNITUDE:
        s = tl.load(s_ptr + at, mask=inside, other=0.0)
    if dw_ptr is not None:
        drop = below(s, tl.load(tau_ptr), MAGNITUDE)
        if frozen is not None:
            drop |= frozen
        tl.store(dw_ptr + at, convert(tl.where(drop, 0.0, g), dw_ptr.dtype.element_ty), mask=inside)
    if ds_ptr is not None:
        ds = g * widen(tl.load(w_ptr + at, mask=inside, other=0.0))
        if MAGNITUDE:  # the sign of NaN is 0, as PyTorch's
            ds = ds * ((widen(s) > 0).to(tl.float32) - (widen(s) < 0).to(tl.float32))
        tl.store(ds_ptr + at, convert(ds, ds_ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_tile(
    g, rows, col, N, K, stride_mask, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, partial_ptr,
    MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the gradients for G's tile [rows, col : col + width], or G itself, ``COLUMNS`` columns at a time."""
    WIDTH: tl.constexpr = g.shape[1]
    if WIDTH > COLUMNS:
        left, right = tl.split(tl.trans(tl.reshape(g, [g.shape[0], 2, WIDTH // 2]), 0, 2, 1))
        store_tile(
            left, rows, col, N, K, stride_mask, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, partial_ptr,
            MAGNITUDE=MAGNITUDE, ALIGNED=ALIGNED, COLUMNS=COLUMNS,
        )  # fmt: skip
        store_tile(
            right, rows, col + WIDTH // 2, N, K, stride_mask, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr,
            partial_ptr, MAGNITUDE=MAGNITUDE, ALIGNED=ALIGNED, COLUMNS=COLUMNS,
        )  # fmt: skip
    else:
        cols = col + tl.arange(0, WIDTH)
        at = rows.to(tl.int64)[:, None] * K + cols[None, :]
        inside = (rows < N)[:, None] & (cols < K)[None, :]
        if partial_ptr is not None:
            tl.store(partial_ptr + at, g, mask=inside)
        else:
            frozen = None
            if union_ptr is not None and dw_ptr is not None:
                frozen = load_mask(union_ptr, rows, col, N, K, stride_mask, ALIGNED, WIDTH)
            store_gradients(g, at, inside, frozen, w_ptr, s_ptr, tau_ptr, dw_ptr, ds_ptr, MAGNITUDE)


@triton.jit(do_not_specialize=["M", "N", "K", "stride_dm", "stride_xm", "stride_mask"])
def matmul_grad_kernel(
    dy_ptr,  # [M, N] compute dtype
    x_ptr,  # [M, K] compute dtype
    w_ptr,  # [N, K] fp32, bf16 or fp16
    s_ptr,  # [N, K] fp32, bf16 or fp16
    tau_ptr,  # [1] as s_ptr
    union_ptr,  # [ceil(N * K / 8)] uint8, or None
    dw_ptr,  # [N, K] as w_ptr, or None
    ds_ptr,  # [N, K] as s_ptr, or None
    partial_ptr,  # [splits, N, K] fp32, or None: then the sum is not split
    M,
    N,
    K,
    stride_dm,
    stride_xm,
    stride_mask,
    MAGNITUDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_DY: tl.constexpr,
    UNIT_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of G over one part of the batch, and then its gradients, or its partial sums as they are."""
    # The same numbers, written so that the compiler sees their factors and makes wider loads.
    K = stride_mask * 8 if ALIGNED else K // UNIT_X * UNIT_X
    N = N // UNIT_DY * UNIT_DY
    stride_dm = stride_dm // UNIT_DY * UNIT_DY
    stride_xm = stride_xm // UNIT_X * UNIT_X
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0)
    tile_n, tile_k = tl.swizzle2d(tile // tiles_k, tile % tiles_k, tiles_n, tiles_k, GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    steps = tl.cdiv(M, BLOCK_M)
    per_split = tl.cdiv(steps, tl.num_programs(1))
    first = split * per_split
    m = tl.arange(0, BLOCK_M)
    row = first.to(tl.int64) * BLOCK_M + m
    # dy is loaded transposed: if it were transposed afterwards, it would go through registers to the tensor cores.
    dy_tile = dy_ptr + row[None, :] * stride_dm + n[:, None]
    x_tile = x_ptr + row[:, None] * stride_xm + k[None, :]
    block = tl.full([], BLOCK_M, tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for step in range(first, tl.minimum(first + per_split, steps)):
        left = M - step * BLOCK_M
        dy = tl.load(dy_tile, mask=(n < N)[:, None] & (m < left)[None, :], other=0.0)
        x = tl.load(x_tile, mask=(m < left)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot(dy, x, acc, PRECISION)
        dy_tile += block * stride_dm
        x_tile += block * stride_xm
    if partial_ptr is not None:
        partial_ptr += split.to(tl.int64) * N * K
    store_tile(
        acc, n, tile_k * BLOCK_K, N, K, stride_mask, w_ptr, s_ptr, tau_ptr, union_ptr, dw_ptr, ds_ptr, partial_ptr,
        MAGNITUDE=MAGNITUDE, ALIGNED=ALIGNED, COLUMNS=COLUMNS,
    )  # fmt: skip


@triton.jit
def reduce_grad_kernel(
    partial_ptr,  # [splits, n] fp32
    w_ptr,  # [n] fp32, bf16 or fp16
    s_ptr,  # [n] fp32, bf16 or fp16
    tau_ptr,  # [1] as s_ptr
    union_ptr,  # [ceil(n / 8)] uint8, or None
    dw_ptr,  # [n] as w_ptr, or None
    ds_ptr,  # [n] as s_ptr, or None
    n,
    splits,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the partial sums of G in the order of the splits, and store the gradients."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    g = tl.zeros([BLOCK], tl.float32)
    partial = partial_ptr + at
    for _ in range(splits):
        g += tl.load(partial, mask=at < n, other=0.0)
        partial += n
    frozen = None
    if union_ptr is not None and dw_ptr is not None:
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        frozen = unpack_bits(tl.load(union_ptr + byte, mask=byte * 8 < n, other=0))
    store_gradients(g, at, at < n, frozen, w_ptr, s_ptr, tau_ptr, dw_ptr, ds_ptr, MAGNITUDE)


def masked_matmul_grad(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    dw: Tensor | None,
    ds: Tensor | None,
    *,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    config: GradMatmulConfig,
    splits: int = 1,
    workspace: Tensor | None = None,
    precision: str = "ieee",
) -> None:
    """With ``G = dy.T @ x`` write ``dW = m and not M ? G : +0.0`` (Eq. 4) and ``dS = G * W``, times ``sign(S)`` for
    "magnitude" (Eq. 5). The mask m is formed again from the scores and tau.

    This is :func:`.gate_gradients.gate_backward` of ``dy.T @ x``, but G stays fp32, where the other way rounds it to
    the compute dtype and to the dtype of W.

    Args:
        dy: [M, N] in the compute dtype (bf16, fp16, fp32); last stride 1, any distance between rows, also 0 for one row
            that is broadcast. A gradient that is broadcast along N, as that of a plain sum, has to be made contiguous.
        x: [M, K] in the compute dtype; last stride 1, any distance between rows. Without rows G is zero.
        w: [N, K], fp32, bf16 or fp16, contiguous, N * K >= 1.
        dw: the result for the weight, [N, K], contiguous and in its dtype, or None if nobody needs it.
        ds: the result for the scores, [N, K], contiguous and in their dtype, or None; not both None.
        scores: [N, K], fp32, bf16 or fp16, contiguous.
        tau: one element in the scores' dtype, read on the device.
        union: packed mask M of the weights that finished tasks own, [ceil(N * K / 8)] uint8, or None for none.
        rule: ``"magnitude"`` or ``"value"``.
        config: of ``CONFIGS``; for fp32 of ``TF32_CONFIGS`` or ``IEEE_CONFIGS``.
        splits: into how many parts the batch is split, for more programs than tiles.
        workspace: fp32, 1-d, ``split_sum.workspace_numel(N, K, splits)`` elements or more.
        precision: how fp32 is multiplied, ``"ieee"`` or ``"tf32"``.
    """
    n, k = w.shape
    _check(dy, x, w, dw, ds, scores, tau, union)
    partials = None if splits == 1 else partial_products(workspace, n, k, splits)
    unit_dy, unit_x = _unit(dy), _unit(x)
    config = fitted(config, min(unit_dy, unit_x))
    operands = {"w_ptr": w, "s_ptr": scores, "tau_ptr": tau, "union_ptr": union, "dw_ptr": dw, "ds_ptr": ds}
    matmul_grad_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(k, config.block_k), splits)](
        dy_ptr=dy,
        x_ptr=x,
        **(operands if partials is None else dict.fromkeys(operands)),
        partial_ptr=partials,
        M=dy.shape[0],
        N=n,
        K=k,
        stride_dm=dy.stride(0),
        stride_xm=x.stride(0),
        stride_mask=k // 8,
        MAGNITUDE=is_magnitude(rule),
        ALIGNED=k % 8 == 0,
        UNIT_DY=unit_dy,
        UNIT_X=unit_x,
        PRECISION=precision,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_M=config.block_m,
        COLUMNS=config.columns,
        GROUP=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=ALL_REGISTERS,
        **FP_FUSION,
    )
    if partials is not None:
        reduce_grad_kernel[grid(n * k, REDUCE_CONFIG)](
            partial_ptr=partials,
            **operands,
            n=n * k,
            splits=splits,
            MAGNITUDE=is_magnitude(rule),
            BLOCK=REDUCE_CONFIG.block,
            num_warps=REDUCE_CONFIG.num_warps,
            **FP_FUSION,
        )


def _unit(rows: Tensor) -> int:
    """How many neighbours one load may take: a power of two up to 8 that divides every row's length and beginning."""
    return 1 if rows.data_ptr() % ALIGNMENT else common_unit(rows.shape[1], rows.stride(0))


def fitted(config: GradMatmulConfig, unit: int) -> GradMatmulConfig:
    """The tile, with fewer stages and columns where a load takes few elements. Each such load needs an address of its
    own, and the addresses for several stages or for many columns would take more registers than there are.
    """
    return config if unit >= 4 else replace(config, num_stages=1, columns=config.columns // 2)


def _check(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    dw: Tensor | None,
    ds: Tensor | None,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
) -> None:
    assert dy.shape[0] == x.shape[0] and w.shape == (dy.shape[1], x.shape[1]) and dy.dtype is x.dtype
    assert all(t.stride(1) == 1 or t.shape[1] == 1 for t in (dy, x))
    check_operands(w.numel(), w, scores, dw, ds)
    check_threshold(tau, scores)
    check_packed(w.numel(), union)
    assert dw is not None or ds is not None
    assert dw is None or dw.dtype is w.dtype
    assert ds is None or ds.dtype is scores.dtype
