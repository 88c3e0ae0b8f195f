"""The squares of the norms of dW and dS, for gradient clipping, without writing either.

Each program of ``squares_kernel`` sums its own elements, and ``total_kernel`` adds the parts in a fixed order: the
result does not depend on timing.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import unpack_bits
from ._compile import CompileCase
from ._elementwise import is_magnitude, table_pointer
from ._select_table import DTYPES
from ._update_tile import SCALES, gradients, load_scale, load_threshold
from .threshold import stretch
from .update_table import CONFIGS, FORMS, UpdateTable

TOTAL_BLOCK = 256


@triton.jit
def _squares_tile(
    operands, at, left, tau, scale,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    g_ptr, ds_ptr, w_ptr, s_ptr, union_ptr = operands
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = w if GIVEN else tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    frozen = lane < 0
    if HAS_UNION:
        byte = tl.arange(0, BLOCK // 8)
        frozen = unpack_bits(tl.load(union_ptr + at // 8 + byte, mask=byte * 8 < left if TAIL else None))
    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE, HAS_UNION, GIVEN)
    if TAIL:
        dw = tl.where(inside, dw, 0.0)
        ds = tl.where(inside, ds, 0.0)
    return dw * dw, ds * ds


@triton.jit
def squares_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [4, tensors] int64: addresses of G or dW, dS, tau, scale
    tensors_ptr,  # [tensors, 6] int64, UpdateTable.tensors
    programs_ptr,  # [P, 2] int64, UpdateTable.programs
    parts_ptr,  # [P, 2] fp64
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
    """The sums over one program's elements."""
    tensor, _, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    start = start // BLOCK * BLOCK  # as it is, and now the compiler sees it
    operands = (
        table_pointer(gradients_ptr, 0, tensor, tensors, GRAD, ALIGNED),
        table_pointer(gradients_ptr, 1, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 0, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 1, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 6, tensor, tensors, tl.uint8, False),
    )
    tau = load_threshold(gradients_ptr, tensor, tensors, DTYPE, GIVEN)
    scale = load_scale(gradients_ptr, tensor, tensors, SCALE)
    weights = tl.zeros([BLOCK], tl.float32)
    scores = tl.zeros([BLOCK], tl.float32)
    whole = items // BLOCK * BLOCK
    for offset in range(0, whole, BLOCK):
        dw, ds = _squares_tile(
            operands, start + offset, BLOCK, tau, scale, BLOCK, MAGNITUDE, HAS_UNION, GIVEN, False
        )  # fmt: skip
        weights += dw
        scores += ds
    if whole < items:
        dw, ds = _squares_tile(
            operands, start + whole, items - whole, tau, scale, BLOCK, MAGNITUDE, HAS_UNION, GIVEN, True
        )  # fmt: skip
        weights += dw
        scores += ds
    parts_ptr += 2 * tl.program_id(0).to(tl.int64)
    tl.store(parts_ptr, tl.sum(weights.to(tl.float64), 0))
    tl.store(parts_ptr + 1, tl.sum(scores.to(tl.float64), 0))


@triton.jit
def total_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    parts_ptr,  # [P, 2] fp64
    sums_ptr,  # [tensors, 2] float
    tensors,
    items_each,  # elements per program
    BLOCK: tl.constexpr,
):
    """The sums of one tensor per program."""
    tensor = tl.program_id(0).to(tl.int64)
    first = tl.load(fields_ptr + 12 * tensors + tensor)
    count = tl.cdiv(tl.load(fields_ptr + 13 * tensors + tensor), items_each)
    weights = tl.zeros([BLOCK], tl.float64)
    scores = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, count, BLOCK):
        part = offset + tl.arange(0, BLOCK)
        weights += tl.load(parts_ptr + 2 * (first + part), mask=part < count, other=0.0)
        scores += tl.load(parts_ptr + 2 * (first + part) + 1, mask=part < count, other=0.0)
    sums_ptr += 2 * tensor
    tl.store(sums_ptr, tl.sum(weights, 0).to(sums_ptr.dtype.element_ty))
    tl.store(sums_ptr + 1, tl.sum(scores, 0).to(sums_ptr.dtype.element_ty))


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
        gradients: int64 [4, T], as :func:`.optimizer.update` takes it.
        sums: [T, 2] float32 or float64, contiguous: the result.
        parts: float64 [P, 2], any contents.
        grad: the dtype of G, or of dW.
        scale: the dtype of the scales, or None without.
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
    )
    total_kernel[(len(table.tensors),)](
        fields_ptr=table.fields,
        parts_ptr=parts,
        sums_ptr=sums,
        tensors=len(table.tensors),
        items_each=config.items,
        BLOCK=TOTAL_BLOCK,
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    """The dtypes of mixed, full and half precision."""
    tables = dict.fromkeys(("fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr"), "*i64")
    tables |= {"parts_ptr": "*fp64", "tensors": "i32", "items_each": "i32"}
    total = {name: tables[name] for name in ("fields_ptr", "parts_ptr", "tensors", "items_each")}
    cases = [CompileCase("total", total_kernel, total | {"sums_ptr": "*fp32"}, {"BLOCK": TOTAL_BLOCK})]
    for (dtype, grad), rule in itertools.product(FORMS, (0, 1)):
        form = {"GRAD": DTYPES[grad], "DTYPE": DTYPES[dtype], "SCALE": None, "BLOCK": CONFIGS[0].block}
        form |= {"MAGNITUDE": rule == 0, "HAS_UNION": True, "GIVEN": False, "ALIGNED": True}
        name = f"squares {DTYPES[grad]} {DTYPES[dtype]} {('|S|', 'S')[rule]}"
        cases.append(CompileCase(name, squares_kernel, tables, form, num_warps=CONFIGS[0].num_warps))
    return cases
