"""The masked matrix product of a batch in which every row uses the mask of its own task. See :mod:`.masked_matmul` for
what both products have in common.

A product for each task would read the weight once per task, and each small product would be mostly padding.
Here the tasks of a tile share one reading of the weight, and each task costs one more bit per weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION
from ._matmul_tile import ALL_REGISTERS, MatmulConfig, dot, fitted, load_mask, load_unit
from .split_sum import load_task_bias, partial_products, reduce_partials

TASKS_CONFIGS = (
    MatmulConfig(16, 64, 64, 4, 4, slots=1),
    MatmulConfig(16, 64, 64, 8, 4, slots=2),
    MatmulConfig(16, 64, 64, 8, 4, slots=4),
    MatmulConfig(16, 32, 64, 8, 4, slots=8),
    MatmulConfig(32, 64, 64, 8, 3, slots=4),
)
TASKS_TF32_CONFIGS = (
    MatmulConfig(16, 64, 64, 4, 4, slots=1),
    MatmulConfig(16, 64, 64, 8, 3, slots=2),
    MatmulConfig(16, 32, 32, 4, 4, slots=4),
)
TASKS_IEEE_CONFIGS = (MatmulConfig(16, 32, 32, 4, 3, slots=1),)


@triton.jit(do_not_specialize=["M"])
def matmul_tasks_kernel(
    x_ptr,  # [M, K] compute dtype
    w_ptr,  # [N, K] fp32, bf16 or fp16
    masks_ptr,  # [T, ceil(N * K / 8)] uint8
    bias_ptr,  # [N] any float, or None
    bias_masks_ptr,  # [T, ceil(N / 8)] uint8, or None
    tasks_ptr,  # [M] int32
    order_ptr,  # [M] int32, or None
    y_ptr,  # [M, N] any float, or [splits, M, N] fp32
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    stride_ys,
    stride_mask,
    stride_masks,
    stride_bias_masks,
    passes,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A tile takes ``BLOCK_M`` rows in the given order. The distinct tasks among them are its slots. A program serves
    ``SLOTS`` of these with one reading of the weight: it stacks their masked tiles to one operand. Each row then takes
    the product that belongs to its task, and drops the others."""
    K = stride_mask * 8 if ALIGNED else K // UNIT * UNIT
    stride_xm = stride_xm // UNIT * UNIT
    STACKED: tl.constexpr = SLOTS * BLOCK_O
    # Programs that read the same part of the weight are neighbours, so that all but the first find it in the L2 cache.
    tiles_m = tl.cdiv(M, BLOCK_M)
    first_slot = (tl.program_id(0) % passes) * SLOTS
    place = (tl.program_id(0) // passes % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_o = (tl.program_id(0) // passes // tiles_m) * BLOCK_O
    inside_m = place < M
    m = place if order_ptr is None else tl.load(order_ptr + place, mask=inside_m, other=0)
    task = tl.load(tasks_ptr + m, mask=inside_m, other=0)
    lane = tl.arange(0, BLOCK_M)
    first = tl.min(tl.where(task[:, None] == task[None, :], lane[None, :], BLOCK_M), 1)  # lane with the same task
    slot = tl.sum(((first == lane)[None, :] & (lane[None, :] < first[:, None])).to(tl.int32), 1)
    if first_slot > tl.max(tl.where(inside_m, slot, 0), 0):
        return
    is_mine = (first_slot + tl.arange(0, SLOTS))[:, None] == slot[None, :]
    slot_task = tl.max(tl.where(is_mine, task[None, :], 0), 1).to(tl.int64)
    stacked_task = tl.broadcast_to(slot_task[:, None], [SLOTS, BLOCK_O]).reshape(STACKED)
    mask_rows = masks_ptr + (stacked_task * stride_masks)[:, None]

    o = first_o + tl.arange(0, BLOCK_O)
    stacked_o = tl.broadcast_to(o[None, :], [SLOTS, BLOCK_O]).reshape(STACKED)
    w_rows = w_ptr + o.to(tl.int64)[:, None] * K
    x_rows = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    split = tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_R)
    per_split = tl.cdiv(steps, tl.num_programs(1))
    acc = tl.zeros([STACKED, BLOCK_M], tl.float32)
    for step in range(split * per_split, tl.minimum((split + 1) * per_split, steps)):
        first_r = step * BLOCK_R
        r = first_r + tl.arange(0, BLOCK_R)[None, :]
        x = tl.load(x_rows + r, mask=inside_m[:, None] & (r < K), other=0.0)
        w = tl.load(w_rows + r, mask=(o < N)[:, None] & (r < K), other=0.0).to(x.dtype)
        w = tl.broadcast_to(w[None, :, :], [SLOTS, BLOCK_O, BLOCK_R]).reshape(STACKED, BLOCK_R)
        keep = load_mask(mask_rows, stacked_o, first_r, N, K, stride_mask, ALIGNED, BLOCK_R)
        acc = dot(tl.where(keep, w, 0.0), tl.trans(x), acc, PRECISION)

    out = tl.sum(tl.where(is_mine[:, None, :], acc.reshape(SLOTS, BLOCK_O, BLOCK_M), 0.0), 0)
    in_pass = tl.max(is_mine.to(tl.int32), 0) > 0
    inside = (o < N)[:, None] & (inside_m & in_pass)[None, :]
    if bias_ptr is not None:
        out += load_task_bias(bias_ptr, bias_masks_ptr, task[None, :], o[:, None], inside, N, stride_bias_masks)
    at = split.to(tl.int64) * stride_ys + m.to(tl.int64)[None, :] * stride_ym + o[:, None]
    tl.store(y_ptr + at, out.to(y_ptr.dtype.element_ty), mask=inside)


def masked_matmul_tasks(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    packed: Tensor,
    tasks: Tensor,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    packed_bias: Tensor | None = None,
    config: MatmulConfig,
    splits: int = 1,
    workspace: Tensor | None = None,
    precision: str = "ieee",
) -> None:
    """Write ``y[i] = x[i] @ (W*m[t]).T + b*m_b[t]`` with ``t = tasks[i]``: each row uses the masks of its own task.

    The order of the rows matters for the time alone: if they are sorted by task, a tile has the fewest tasks. The
    kernel finds the tasks of a tile on the device, so that there is no table to prepare and nothing to read on the
    host.

    Args:
        x: [M, K], M >= 1, in the compute dtype (bf16, fp16, fp32); last stride 1.
        w: [N, K], fp32, bf16 or fp16, contiguous.
        y: the result, [M, N], any floating dtype; last stride 1.
        packed: the packed masks, [T, ceil(N * K / 8)] uint8, contiguous.
        tasks: [M] int32, the row of ``packed`` that each row of x uses, in [0, T).
        order: [M] int32, a permutation of the rows (as ``argsort`` of ``tasks`` gives it); None: as they are.
        bias: [N], not masked, contiguous.
        packed_bias: [T, ceil(N / 8)] uint8, contiguous; None: the bias is not masked.
        config: of ``TASKS_CONFIGS``; for fp32 of ``TASKS_TF32_CONFIGS`` or ``TASKS_IEEE_CONFIGS``.
        splits: as for :func:`.masked_matmul.masked_matmul`.
        workspace: as for :func:`.masked_matmul.masked_matmul`.
        precision: as for :func:`.masked_matmul.masked_matmul`.
    """
    rows, (n, k) = x.shape[0], w.shape
    assert x.stride(1) == 1 and y.stride(1) == 1 and w.is_contiguous() and packed.is_contiguous()
    target = y if splits == 1 else partial_products(workspace, rows, n, splits)
    unit = load_unit((x, w), k, x.stride(0))
    config = fitted(config, unit)
    passes = triton.cdiv(min(config.block_m, rows, packed.shape[0]), config.slots)  # enough for any tile
    programs = passes * triton.cdiv(rows, config.block_m) * triton.cdiv(n, config.block_o)
    matmul_tasks_kernel[(programs, splits)](
        x_ptr=x,
        w_ptr=w,
        masks_ptr=packed,
        bias_ptr=bias if splits == 1 else None,
        bias_masks_ptr=packed_bias,
        tasks_ptr=tasks,
        order_ptr=order,
        y_ptr=target,
        M=rows,
        N=n,
        K=k,
        stride_xm=x.stride(0),
        stride_ym=target.stride(-2),
        stride_ys=rows * n,
        stride_mask=k // 8,
        stride_masks=packed.stride(0),
        stride_bias_masks=0 if packed_bias is None else packed_bias.stride(0),
        passes=passes,
        ALIGNED=k % 8 == 0,
        UNIT=unit,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        SLOTS=config.slots,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=None if precision == "ieee" else ALL_REGISTERS,
        **FP_FUSION,
    )
    if splits > 1:
        reduce_partials(target, y, bias, packed_bias, tasks)
