"""Masked matrix products for small batches: the mask is applied while the weight is loaded, so that ``W*m`` is never
written to memory. Forward ``y = x @ (W*m).T + b`` and input gradient ``dx = dy @ (W*m)``.

``W*m`` is a select: nothing outside the mask reaches the result, NaN and infinity included. Sums are fp32, in an order
that shapes and configuration alone decide, without atomics: the same call gives the same bits.

The weight tile is operand A of every product. With few rows it is the only operand tall enough for a warp group's
tensor-core instruction, and A may come from the registers in which the mask was applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ._bits import unpack_bits
from ._compile import CompileCase
from ._elementwise import ALIGNMENT

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
REDUCE_BLOCK = 1024


@dataclass(frozen=True)
class MatmulConfig:
    """Tile of one program: ``block_m`` rows of the batch, ``block_o`` outputs, ``block_r`` terms of the sum per step.

    Where rows use the masks of several tasks, ``slots`` is the number of tasks that one reading of the weight serves.
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


CONFIGS = (  # bf16 and fp16
    MatmulConfig(16, 64, 64, 4, 4),
    MatmulConfig(16, 128, 64, 8, 3),
    MatmulConfig(32, 128, 64, 8, 3),
    MatmulConfig(64, 64, 64, 8, 3),
)
TF32_CONFIGS = (
    MatmulConfig(16, 64, 64, 4, 4),
    MatmulConfig(16, 128, 64, 8, 2),
    MatmulConfig(32, 64, 64, 8, 3),
    MatmulConfig(64, 64, 64, 8, 3),
)
# Full precision has no tensor-core instruction. From 64 outputs on, Triton 3.6 multiplies as tf32 on sm_100 all the
# same where narrower types took part in an operand: the bytes of a mask, a bf16 weight.
IEEE_CONFIGS = (MatmulConfig(16, 32, 32, 4, 3), MatmulConfig(32, 32, 32, 8, 3))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. ``PRECISION`` matters for fp32 alone."""
    if INTERPRETED:  # the interpreter multiplies the raw bits of bf16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_mask(mask_ptr, rows, col, N, K, stride_mask, ALIGNED: tl.constexpr, COLS: tl.constexpr):
    """Tile [rows, col : col + COLS] of a packed mask [N, K] as booleans; ``col`` and ``COLS`` are multiples of 8.

    Whole bytes are loaded, and expanded in registers. ``ALIGNED``: every row begins a byte and has ``stride_mask`` of
    them. Otherwise each byte of the tile is put together from the two that it straddles.
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
        # Past the last byte there is nothing to load, nor to take from it.
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


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,  # [M, R] compute dtype; R = K, backward N
    w_ptr,  # [N, K] fp32, bf16 or fp16
    mask_ptr,  # [ceil(N * K / 8)] uint8, or None: scores and tau
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
    # The same numbers, with factors that the compiler can see: wider loads.
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


@triton.jit
def load_task_bias(bias_ptr, bias_masks_ptr, task, o, inside, N, stride_bias_masks):
    """``m_b ? b : +0.0`` as fp32, in the shape that ``task``, ``o`` and ``inside`` broadcast to."""
    bias = tl.load(bias_ptr + o, mask=o < N, other=0.0).to(tl.float32)
    if bias_masks_ptr is not None:
        byte_ptr = bias_masks_ptr + task.to(tl.int64) * stride_bias_masks + o // 8
        byte = tl.load(byte_ptr, mask=inside, other=0).to(tl.int32)
        bias = tl.where(((byte >> (o % 8)) & 1) != 0, bias, 0.0)
    return bias


@triton.jit
def reduce_kernel(
    partial_ptr,  # [splits, M, O] fp32
    bias_ptr,  # [O] any float, or None
    bias_masks_ptr,  # [T, ceil(O / 8)] uint8, or None
    tasks_ptr,  # [M] int32, or None
    y_ptr,  # [M, O] any float
    O,  # noqa: E741
    splits,
    stride_pm,
    stride_ps,
    stride_ym,
    stride_bias_masks,
    BLOCK: tl.constexpr,
):
    """Sum of the partial products, in the order of the splits, plus the bias."""
    m = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < O
    total = tl.zeros([BLOCK], tl.float32)
    partial_row = partial_ptr + m * stride_pm + o
    for _ in range(splits):
        total += tl.load(partial_row, mask=inside, other=0.0)
        partial_row += stride_ps
    if bias_ptr is not None:
        task = 0
        if tasks_ptr is not None:
            task = tl.load(tasks_ptr + m)
        total += load_task_bias(bias_ptr, bias_masks_ptr, task, o, inside, O, stride_bias_masks)
    tl.store(y_ptr + m * stride_ym + o, total.to(y_ptr.dtype.element_ty), mask=inside)


def workspace_numel(rows: int, outputs: int, splits: int) -> int:
    """The fp32 elements of workspace that a product [rows, outputs] needs: none while the sum is not split."""
    return rows * outputs * splits if splits > 1 else 0


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
    """``y = x @ (W*m).T + bias``, or ``y = x @ (W*m)`` when ``backward``, with m packed or formed from the scores.

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
        workspace: fp32, 1-d, ``workspace_numel(M, outputs, splits)`` elements or more.
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
    )
    if splits > 1:
        reduce_partials(target, y, bias, None, None)


def common_unit(*strides: int) -> int:
    """The largest of 1, 2, 4 and 8 that divides every stride."""
    return math.gcd(8, *strides)


def load_unit(tensors: Iterable[Tensor | None], *strides: int) -> int:
    """How many elements one load may take, at most 8: one if a tensor does not begin where a wide load may."""
    return 1 if any(t is not None and t.data_ptr() % ALIGNMENT for t in tensors) else common_unit(*strides)


def fitted(config: MatmulConfig, unit: int) -> MatmulConfig:
    """The tile with shorter steps where a load takes one or two elements. Such loads do not go through a pipeline, and
    each has registers of its own: the longer steps leave none over, or spill."""
    return config if unit >= 4 else replace(config, block_r=min(config.block_r, 32), num_stages=1)


def partial_products(workspace: Tensor | None, rows: int, outputs: int, splits: int) -> Tensor:
    """The part of the workspace that is used, [splits, rows, outputs] fp32."""
    needed = workspace_numel(rows, outputs, splits)
    assert workspace is not None and workspace.dtype is torch.float32 and workspace.numel() >= needed
    return workspace[:needed].view(splits, rows, outputs)


def reduce_partials(
    partials: Tensor, y: Tensor, bias: Tensor | None, packed_bias: Tensor | None, tasks: Tensor | None
) -> None:
    """``y`` = the sum of the partial products, plus the bias: as it is, or through the masks of each row's task."""
    splits, rows, outputs = partials.shape
    reduce_kernel[(rows, triton.cdiv(outputs, REDUCE_BLOCK))](
        partial_ptr=partials,
        bias_ptr=bias,
        bias_masks_ptr=packed_bias,
        tasks_ptr=tasks,
        y_ptr=y,
        O=outputs,
        splits=splits,
        stride_pm=partials.stride(1),
        stride_ps=partials.stride(0),
        stride_ym=y.stride(0),
        stride_bias_masks=0 if packed_bias is None else packed_bias.stride(0),
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    """Every tile with each source of the mask, forward and backward, and loads of 8, 4 and 1 elements: what takes the
    most shared memory, the most registers, and the ways between."""
    cases = []
    for compute, precision, configs in (
        ("bf16", "tf32", CONFIGS),
        ("fp32", "tf32", TF32_CONFIGS),
        ("fp32", "ieee", IEEE_CONFIGS),
    ):
        for config in configs:
            cases += [
                _case(config, compute, precision, w="fp32"),
                _case(config, compute, precision, w="fp32", unit=4),
                _case(config, compute, precision, w=compute, unit=1),
                _case(config, compute, precision, w="fp32", from_scores=True),
                _case(config, compute, precision, w=compute, backward=True),
            ]
    types = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "bias_masks_ptr": "*u8", "tasks_ptr": "*i32"}
    sizes = ("O", "splits", "stride_pm", "stride_ps", "stride_ym", "stride_bias_masks")
    signature = types | {"y_ptr": "*bf16"} | dict.fromkeys(sizes, "i32")
    cases.append(CompileCase("reduce", reduce_kernel, signature, {"BLOCK": REDUCE_BLOCK}))
    return cases


def _case(
    config: MatmulConfig,
    compute: str,
    precision: str,
    *,
    w: str,
    from_scores: bool = False,
    backward: bool = False,
    unit: int = 8,
) -> CompileCase:
    aligned, tile = unit == 8, fitted(config, unit)
    types = {"x_ptr": f"*{compute}", "w_ptr": f"*{w}", "bias_ptr": f"*{compute}", "y_ptr": f"*{compute}"}
    types |= {"s_ptr": f"*{w}", "tau_ptr": f"*{w}"} if from_scores else {"mask_ptr": "*u8"}
    sizes = ["N", "K", "stride_xm", "stride_ym", "stride_ys", "stride_mask"]
    constexprs = {
        **dict.fromkeys(["mask_ptr"] if from_scores else ["s_ptr", "tau_ptr"]),
        "BACKWARD": backward,
        "RULE": "magnitude",
        "ALIGNED": aligned,
        "UNIT": unit,
        "PRECISION": precision,
        "BLOCK_M": tile.block_m,
        "BLOCK_O": tile.block_o,
        "BLOCK_R": tile.block_r,
    }
    kind = ("scores" if from_scores else "packed") + ("-dx" if backward else "")
    return CompileCase(
        name=f"{kind} {compute}/{w} {precision} unit={unit} {config}",
        fn=matmul_kernel,
        signature=types | dict.fromkeys([*sizes, "M"], "i32"),
        constexprs=constexprs,
        attrs=dict.fromkeys([*types, *sizes] if aligned else types, 16),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        needs_tensor_core=precision != "ieee" or compute != "fp32",
    )
