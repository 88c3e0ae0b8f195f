"""Computes the squared norms of dW and dS for gradient clipping. Neither dW nor dS is stored.

Each program of ``squares_kernel`` sums the squares of its own elements. ``total_kernel`` adds these parts in a fixed
order, so that the result does not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._elementwise import FP_FUSION, is_magnitude, table_pointer
from ._update_rules import SCALES, gradients, load_frozen, load_scale, load_threshold
from .threshold import stretch
from .threshold_table import DTYPES
from .update_table import UpdateTable

TOTAL_BLOCK = 256


@triton.jit
def _squares_tile(
    operands, at, left, tau, scale,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The squares of dW and dS in one block, from element ``at``; ``left`` elements remain in the tensor."""
    g_ptr, ds_ptr, w_ptr, s_ptr, union_ptr = operands
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = w if GIVEN else tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    frozen = lane < 0
    if HAS_UNION:
        frozen = load_frozen(union_ptr, at, left, BLOCK, TAIL)
    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN)
    if TAIL:
        dw = tl.where(inside, dw, 0.0)
        ds = tl.where(inside, ds, 0.0)
    return dw * dw, ds * ds


@triton.jit(
    do_not_specialize=[
        "fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "parts_ptr", "tensors", "items_each"
    ]
)  # fmt: skip
def squares_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [GRADIENTS, tensors] int64
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, UpdateTable.programs
    parts_ptr,  # [P, SUM_COLUMNS] fp64
    tensors,
    items_each,  # elements per program
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    SCALE: tl.constexpr,  # a dtype, or None for no scale
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether dW and dS are given, and not G
    ALIGNED: tl.constexpr,
):
    """Sum the squares of one program's elements."""
    tensor, _, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    start = start // BLOCK * BLOCK  # the same number, but now the compiler sees that BLOCK divides it
    operands = (
        table_pointer(gradients_ptr, layout.GRADIENT_WEIGHT, tensor, tensors, GRAD, ALIGNED),
        table_pointer(gradients_ptr, layout.GRADIENT_SCORES, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, layout.FIELD_WEIGHT, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, layout.FIELD_SCORES, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, layout.FIELD_UNION, tensor, tensors, tl.uint8, ALIGNED=False),
    )
    tau = load_threshold(gradients_ptr, tensor, tensors, DTYPE, GIVEN)
    scale = load_scale(gradients_ptr, tensor, tensors, SCALE)
    weights = tl.zeros([BLOCK], tl.float32)
    scores = tl.zeros([BLOCK], tl.float32)
    whole = items // BLOCK * BLOCK
    for offset in range(0, whole, BLOCK):
        dw, ds = _squares_tile(
            operands, start + offset, BLOCK, tau, scale,
            BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, TAIL=False,
        )  # fmt: skip
        weights += dw
        scores += ds
    if whole < items:
        dw, ds = _squares_tile(
            operands, start + whole, items - whole, tau, scale,
            BLOCK=BLOCK, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, TAIL=True,
        )  # fmt: skip
        weights += dw
        scores += ds
    parts_ptr += layout.SUM_COLUMNS * tl.program_id(0).to(tl.int64)
    tl.store(parts_ptr + layout.SUM_WEIGHT, tl.sum(weights.to(tl.float64), 0))
    tl.store(parts_ptr + layout.SUM_SCORES, tl.sum(scores.to(tl.float64), 0))


@triton.jit(do_not_specialize=["fields_ptr", "parts_ptr", "sums_ptr", "tensors", "items_each"])
def total_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    parts_ptr,  # [P, SUM_COLUMNS] fp64
    sums_ptr,  # [tensors, SUM_COLUMNS] float
    tensors,
    items_each,  # elements per program
    BLOCK: tl.constexpr,
):
    """Add the parts of one tensor per program."""
    tensor = tl.program_id(0).to(tl.int64)
    first = layout.field(fields_ptr, layout.FIELD_FIRST_PROGRAM, tensor, tensors)
    count = tl.cdiv(layout.field(fields_ptr, layout.FIELD_NUMEL, tensor, tensors), items_each)
    weights = tl.zeros([BLOCK], tl.float64)
    scores = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, count, BLOCK):
        part = offset + tl.arange(0, BLOCK)
        part_ptr = parts_ptr + layout.SUM_COLUMNS * (first + part)
        weights += tl.load(part_ptr + layout.SUM_WEIGHT, mask=part < count, other=0.0)
        scores += tl.load(part_ptr + layout.SUM_SCORES, mask=part < count, other=0.0)
    sums_ptr += layout.SUM_COLUMNS * tensor
    tl.store(sums_ptr + layout.SUM_WEIGHT, tl.sum(weights, 0).to(sums_ptr.dtype.element_ty))
    tl.store(sums_ptr + layout.SUM_SCORES, tl.sum(scores, 0).to(sums_ptr.dtype.element_ty))


def squares(
    table: UpdateTable,
    gradients: Tensor,
    sums: Tensor,
    *,
    parts: Tensor,
    grad: torch.dtype,
    scale: torch.dtype | None,
    given: bool,
    aligned: bool,
    rule: str,
) -> None:
    """The sums of the squares of dW and dS of every tensor of ``table``, in two launches.

    Args:
        table: of :func:`.update_table.make_table`.
        gradients: int64 [GRADIENTS, T], as :func:`.optimizer_step.update` takes it.
        sums: [T, 2] float32 or float64, contiguous: the result.
        parts: float64 [P, 2], any contents.
        grad: the dtype of G, or of dW.
        scale: the dtype of the scales, or None if there is no scale.
        given: whether the gradients are dW and dS, and not G.
        aligned: whether the addresses of G and dS in ``gradients`` are multiples of 16 bytes.
        rule: "magnitude" or "value".
    """
    config = table.config
    assert sums.shape == (len(table.tensors), 2) and sums.is_contiguous() and parts.shape == table.programs.shape
    squares_kernel[(len(table.programs),)](
        fields_ptr=table.fields,
        gradients_ptr=gradients,
        tensors_ptr=table.tensors,
        programs_ptr=table.programs,
        parts_ptr=parts,
        tensors=len(table.tensors),
        items_each=config.items,
        GRAD=DTYPES[grad],
        DTYPE=DTYPES[table.dtype],
        SCALE=SCALES[scale],
        BLOCK=config.block,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.has_union,
        GIVEN=given,
        ALIGNED=aligned and table.aligned,
        num_warps=config.num_warps,
        **FP_FUSION,
    )
    total_kernel[(len(table.tensors),)](
        fields_ptr=table.fields,
        parts_ptr=parts,
        sums_ptr=sums,
        tensors=len(table.tensors),
        items_each=config.items,
        BLOCK=TOTAL_BLOCK,
        num_warps=4,
        **FP_FUSION,
    )
