"""If there are too few tiles for the GPU, the sum of a product is split into parts, one program for each. This file has
the workspace of the parts, and adds them in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION

REDUCE_BLOCK = 1024


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
    """Add the partial products in the order of the splits, and the bias."""
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
    """How many fp32 elements of workspace a product [rows, outputs] needs. It needs none if the sum is not split."""
    return rows * outputs * splits if splits > 1 else 0


def partial_products(workspace: Tensor | None, rows: int, outputs: int, splits: int) -> Tensor:
    """The part of the workspace that is used, [splits, rows, outputs] fp32."""
    needed = workspace_numel(rows, outputs, splits)
    assert workspace is not None and workspace.dtype is torch.float32 and workspace.numel() >= needed
    return workspace[:needed].view(splits, rows, outputs)


def reduce_partials(
    partials: Tensor, y: Tensor, bias: Tensor | None, packed_bias: Tensor | None, tasks: Tensor | None
) -> None:
    """Write to ``y`` the sum of the partial products, plus the bias, which ``packed_bias`` masks by each row's task."""
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
        **FP_FUSION,
    )
