"""Putting the frozen weights back: the saved value of every element whose bit is set in a packed mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._elementwise import (
    FP_FUSION,
    Config,
    TensorTable,
    block_of,
    check_operands,
    check_packed,
    grid,
    table_pointer,
    tensor_table,
)
from .gate import CONFIGS

# Rows of the table of ``restore_frozen_multi_kernel``, as ``restore_frozen_table`` writes them.
ROW_PARAM = tl.constexpr(0)
ROW_SAVED = tl.constexpr(1)  # not an address, but bytes from the first element that was saved
ROW_NUMEL = tl.constexpr(2)
ROW_UNION = tl.constexpr(3)  # 0 where every element is restored


@triton.jit
def _lanes(BLOCK: tl.constexpr):
    """The elements of a block. Each thread stores one of them, and neighbouring threads store neighbours, because a
    wide store cannot skip a part."""
    return tl.max_contiguous(tl.arange(0, BLOCK), 1)


@triton.jit
def _frozen(union_ptr, start, inside, BLOCK: tl.constexpr):
    """Which elements of a block have their bit set."""
    lane = _lanes(BLOCK)
    bits = tl.load(union_ptr + start // 8 + lane // 8, mask=inside, other=0)
    return ((bits >> (lane % 8).to(tl.uint8)) & 1) != 0


@triton.jit
def _restore(param_ptr, saved_ptr, frozen, BLOCK: tl.constexpr):
    """Write the elements of a block that are ``frozen``. Nothing else is read or written, so that a sector of memory
    without a frozen element is not touched. We expect the L2 cache to merge neighbouring stores."""
    lane = _lanes(BLOCK)
    tl.store(param_ptr + lane, tl.load(saved_ptr + lane, mask=frozen), mask=frozen)


@triton.jit(do_not_specialize=["param_ptr", "saved_ptr", "union_ptr", "n"])
def restore_frozen_kernel(
    param_ptr,  # [n] any
    saved_ptr,  # [n] as param_ptr
    union_ptr,  # [ceil(n / 8)] uint8
    n: tl.int64,
    BLOCK: tl.constexpr,
):
    """``param = saved`` where the bit is set."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    frozen = _frozen(union_ptr, start, _lanes(BLOCK) < n - start, BLOCK)
    _restore(param_ptr + start, saved_ptr + start, frozen, BLOCK)


@triton.jit(do_not_specialize=["table_ptr", "block_ptr", "saved_ptr", "tensors"])
def restore_frozen_multi_kernel(
    table_ptr,  # [4, tensors] int64: the rows ROW_...
    block_ptr,  # [programs, BLOCK_COLUMNS] int32
    saved_ptr,  # the first element that was saved
    tensors,
    BLOCK: tl.constexpr,
):
    """:func:`restore_frozen_kernel` for many tensors in one launch."""
    DTYPE: tl.constexpr = saved_ptr.dtype.element_ty
    tensor, start = block_of(block_ptr, BLOCK)
    param_ptr = table_pointer(table_ptr, ROW_PARAM, tensor, tensors, DTYPE, ALIGNED=False)
    saved = saved_ptr.to(tl.int64) + layout.field(table_ptr, ROW_SAVED, tensor, tensors)
    union = layout.field(table_ptr, ROW_UNION, tensor, tensors)
    frozen = _lanes(BLOCK) < layout.field(table_ptr, ROW_NUMEL, tensor, tensors) - start
    if union != 0:
        frozen = _frozen(union.to(tl.pointer_type(tl.uint8)), start, frozen, BLOCK)
    _restore(param_ptr + start, saved.to(tl.pointer_type(DTYPE)) + start, frozen, BLOCK)


def restore_frozen(param: Tensor, saved: Tensor, union: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """In place, bit for bit: ``param = union ? saved : param``.

    Args:
        param: contiguous, any dtype that Triton loads, n elements.
        saved: contiguous, of the dtype of ``param``, n elements.
        union: packed, uint8 [ceil(n / 8)].
        config: the tile shape, one of ``CONFIGS``.
    """
    check_operands(param.numel(), param, saved)
    check_packed(param.numel(), union)
    assert param.dtype is saved.dtype
    restore_frozen_kernel[grid(param.numel(), config)](
        param_ptr=param,
        saved_ptr=saved,
        union_ptr=union,
        n=param.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
        **FP_FUSION,
    )


def restore_frozen_table(
    params: Sequence[Tensor], saved: Sequence[Tensor], unions: Sequence[Tensor | None], config: Config = CONFIGS[0]
) -> TensorTable:
    """The table for :func:`restore_frozen_multi` over T tensors of one dtype. The operands are as for
    :func:`restore_frozen`; without a union every element is restored.

    The table holds how far the saved values are from the first of them. So it serves the next step too, where all of
    them are somewhere else.
    """
    for param, values, union in zip(params, saved, unions, strict=True):
        check_operands(param.numel(), param, values)
        check_packed(param.numel(), union)
        assert param.dtype is values.dtype
    table = tensor_table([params, saved], config)
    table.addresses[ROW_SAVED.value] -= saved[0].data_ptr()
    masks = [0 if union is None else union.data_ptr() for union in unions]
    return table._replace(addresses=torch.cat([table.addresses, torch.tensor([masks])]))


def restore_frozen_multi(table: TensorTable, saved: Tensor) -> None:
    """:func:`restore_frozen` for every tensor of ``table`` (:func:`restore_frozen_table`, on the tensors' device) in
    one launch. ``saved`` has the values of the first tensor. Those of the others are as far from it as they were."""
    restore_frozen_multi_kernel[(len(table.blocks),)](
        table_ptr=table.addresses,
        block_ptr=table.blocks,
        saved_ptr=saved,
        tensors=table.addresses.shape[1],
        BLOCK=table.config.block,
        num_warps=table.config.num_warps,
        **FP_FUSION,
    )
