"""Elementwise kernels on masks: the gate, and the arithmetic of packed masks.

All work on flattened contiguous tensors, and on packed masks as :mod:`._bits` defines them. Launchers take their
results from the caller; shapes, dtypes and contiguity are their callers' promises, asserted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import pack_bits, unpack_bits
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
)

CONFIGS = (Config(1024, 4), Config(1024, 8), Config(512, 4), Config(2048, 8))
"""Every tile shape that may be chosen for kernels on floats; the first is the default."""

BYTE_CONFIGS = (Config(2048, 4), Config(4096, 8))
"""The same for kernels on nothing but bytes: 16 of them a thread."""


# --- the gate
@triton.jit
def _gate_tile(
    w_ptr, s_ptr, tau, out_ptr, packed_ptr, left,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, PACK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block, its pointers already at the first element; ``left`` elements remain in the tensor."""
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    drop = below(tl.load(s_ptr + lane, mask=inside), tau, MAGNITUDE)
    w = convert(tl.load(w_ptr + lane, mask=inside), out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, tl.where(drop, tl.zeros_like(w), w), mask=inside)
    if PACK:
        byte = tl.arange(0, BLOCK // 8)
        keep = (drop == 0) & inside if TAIL else drop == 0
        tl.store(packed_ptr + byte, pack_bits(keep), mask=byte * 8 < left if TAIL else None)


@triton.jit
def _gate_block(
    w_ptr, s_ptr, tau, out_ptr, packed_ptr, start, n,
    BLOCK: tl.constexpr, MAGNITUDE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    w_ptr += start
    s_ptr += start
    out_ptr += start
    if PACK:
        packed_ptr += start // 8
    # Full blocks carry no masks: under one, an odd n would cost every block of the tensor its vector loads.
    if n - start >= BLOCK:
        _gate_tile(w_ptr, s_ptr, tau, out_ptr, packed_ptr, BLOCK, BLOCK, MAGNITUDE, PACK, False)
    else:
        _gate_tile(w_ptr, s_ptr, tau, out_ptr, packed_ptr, n - start, BLOCK, MAGNITUDE, PACK, True)


@triton.jit
def gate_kernel(
    w_ptr,  # [n] float
    s_ptr,  # [n] float
    tau_ptr,  # [] as s_ptr
    out_ptr,  # [n] float
    packed_ptr,  # [ceil(n / 8)] uint8, or None
    n,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PACK: tl.constexpr,
):
    """``out = key(S) < tau ? +0.0 : W``, and the mask beside it if PACK."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _gate_block(w_ptr, s_ptr, tl.load(tau_ptr), out_ptr, packed_ptr, start, n, BLOCK, MAGNITUDE, PACK)


@triton.jit
def gate_multi_kernel(
    table_ptr,  # [6, tensors] int64: W, S, tau, out, packed; n
    block_ptr,  # [programs, 2] int32: tensor, block of it
    tensors,
    W_DTYPE: tl.constexpr,
    S_DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    PACK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """:func:`gate_kernel` for many tensors in one launch."""
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(block_ptr + pid * 2)
    start = tl.load(block_ptr + pid * 2 + 1).to(tl.int64) * BLOCK
    w_ptr = table_pointer(table_ptr, 0, tensor, tensors, W_DTYPE, ALIGNED)
    s_ptr = table_pointer(table_ptr, 1, tensor, tensors, S_DTYPE, ALIGNED)
    tau_ptr = table_pointer(table_ptr, 2, tensor, tensors, S_DTYPE, False)
    out_ptr = table_pointer(table_ptr, 3, tensor, tensors, OUT_DTYPE, ALIGNED)
    packed_ptr = table_pointer(table_ptr, 4, tensor, tensors, tl.uint8, False)
    n = tl.load(table_ptr + 5 * tensors + tensor)
    _gate_block(w_ptr, s_ptr, tl.load(tau_ptr), out_ptr, packed_ptr, start, n, BLOCK, MAGNITUDE, PACK)


@triton.jit
def _gate_packed_tile(w_ptr, packed_ptr, out_ptr, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    inside = lane < left if TAIL else None
    keep = unpack_bits(tl.load(packed_ptr + byte, mask=byte * 8 < left if TAIL else None))
    w = convert(tl.load(w_ptr + lane, mask=inside), out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, tl.where(keep, w, tl.zeros_like(w)), mask=inside)


@triton.jit
def gate_packed_kernel(
    w_ptr,  # [n] float
    packed_ptr,  # [ceil(n / 8)] uint8
    out_ptr,  # [n] float
    n,
    BLOCK: tl.constexpr,
):
    """``out = bit ? W : +0.0``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if n - start >= BLOCK:
        _gate_packed_tile(w_ptr + start, packed_ptr + start // 8, out_ptr + start, BLOCK, BLOCK, False)
    else:
        _gate_packed_tile(w_ptr + start, packed_ptr + start // 8, out_ptr + start, n - start, BLOCK, True)


def gate(
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    out: Tensor,
    packed: Tensor | None,
    *,
    rule: str,
    config: Config = CONFIGS[0],
) -> None:
    """``out = m ? W : +0.0`` and optionally the packed mask, in one pass.

    Args:
        weight: contiguous float32, float64, bfloat16 or float16, n elements.
        scores: contiguous, of one of these dtypes, n elements.
        tau: 0-d, of the dtype of ``scores``, read on the device.
        out: contiguous, n elements; its dtype is the compute dtype.
        packed: uint8 [ceil(n / 8)] for the mask, or None.
        rule: "magnitude" or "value".
        config: the tile shape, one of ``CONFIGS``.
    """
    n = weight.numel()
    check_operands(n, weight, scores, out)
    check_threshold(tau, scores)
    check_packed(n, packed)
    gate_kernel[grid(n, config)](
        w_ptr=weight,
        s_ptr=scores,
        tau_ptr=tau,
        out_ptr=out,
        packed_ptr=packed,
        n=n,
        BLOCK=config.block,
        MAGNITUDE=is_magnitude(rule),
        PACK=packed is not None,
        num_warps=config.num_warps,
    )


def gate_table(
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    taus: Sequence[Tensor],
    outs: Sequence[Tensor],
    packed: Sequence[Tensor] | None,
    config: Config = CONFIGS[0],
) -> TensorTable:
    """The table for :func:`gate_multi` over T tensors, each operand of one dtype and as :func:`gate` takes it."""
    masks = [None] * len(weights) if packed is None else packed
    for weight, score, tau, out, mask in zip(weights, scores, taus, outs, masks, strict=True):
        check_operands(weight.numel(), weight, score, out)
        check_threshold(tau, score)
        check_packed(weight.numel(), mask)
    return tensor_table([weights, scores, taus, outs, packed], config)


def gate_multi(table: TensorTable, *, rule: str) -> None:
    """:func:`gate` for every tensor of ``table`` (:func:`gate_table`, on the tensors' device) in one launch."""
    gate_multi_kernel[(len(table.blocks),)](
        table_ptr=table.addresses,
        block_ptr=table.blocks,
        tensors=table.addresses.shape[1],
        W_DTYPE=table.dtypes[0],
        S_DTYPE=table.dtypes[1],
        OUT_DTYPE=table.dtypes[3],
        BLOCK=table.config.block,
        MAGNITUDE=is_magnitude(rule),
        PACK=table.dtypes[4] is not None,
        ALIGNED=table.aligned,
        num_warps=table.config.num_warps,
    )


def gate_packed(weight: Tensor, packed: Tensor, out: Tensor, *, config: Config = CONFIGS[0]) -> None:
    """``out = m ? W : +0.0`` with the mask read from ``packed``; the operands are as for :func:`gate`."""
    n = weight.numel()
    check_operands(n, weight, out)
    check_packed(n, packed)
    gate_packed_kernel[grid(n, config)](
        w_ptr=weight, packed_ptr=packed, out_ptr=out, n=n, BLOCK=config.block, num_warps=config.num_warps
    )


# --- packed masks
@triton.jit
def pack_kernel(
    mask_ptr,  # [n] uint8, zero or not
    packed_ptr,  # [ceil(n / 8)] uint8
    n,
    BLOCK: tl.constexpr,
):
    """Bytes to bits."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    keep = tl.load(mask_ptr + start + lane, mask=lane < n - start, other=0) != 0
    tl.store(packed_ptr + start // 8 + byte, pack_bits(keep), mask=byte * 8 < n - start)


@triton.jit
def unpack_kernel(
    packed_ptr,  # [ceil(n / 8)] uint8
    mask_ptr,  # [n] uint8: 0 or 1
    n,
    BLOCK: tl.constexpr,
):
    """Bits to bytes."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    byte = tl.arange(0, BLOCK // 8)
    bits = tl.load(packed_ptr + start // 8 + byte, mask=byte * 8 < n - start, other=0)
    tl.store(mask_ptr + start + lane, unpack_bits(bits).to(tl.uint8), mask=lane < n - start)


@triton.jit
def union_kernel(
    packed_ptr,  # [rows, bytes] uint8
    out_ptr,  # [bytes] uint8
    rows,
    bytes,
    stride_row,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """OR of the rows, and of what is in ``out`` already if ACCUMULATE."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < bytes
    acc = tl.load(out_ptr + offset, mask=inside, other=0) if ACCUMULATE else tl.zeros([BLOCK], tl.uint8)
    for row in range(rows):
        acc |= tl.load(packed_ptr + tl.cast(row, tl.int64) * stride_row + offset, mask=inside, other=0)
    tl.store(out_ptr + offset, acc, mask=inside)


@triton.jit
def popcount_kernel(
    packed_ptr,  # [bytes] uint8
    count_ptr,  # [] int64, zero before
    bytes,
    BLOCK: tl.constexpr,
):
    """Add the number of set bits. Sums of integers do not depend on the order of the programs."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(packed_ptr + offset, mask=offset < bytes, other=0).to(tl.int32)
    x -= (x >> 1) & 0x55  # pairs, nibbles, bytes
    x = (x & 0x33) + ((x >> 2) & 0x33)
    x = (x + (x >> 4)) & 0x0F
    tl.atomic_add(count_ptr, tl.sum(x, 0).to(tl.int64), sem="relaxed")


@triton.jit
def restore_frozen_kernel(
    param_ptr,  # [n] any
    saved_ptr,  # [n] as param_ptr
    union_ptr,  # [ceil(n / 8)] uint8
    n,
    BLOCK: tl.constexpr,
):
    """``param = saved`` where the bit is set; nothing else is read or written.

    A store per element, and neighbours in neighbouring lanes: a vector store cannot be predicated by its parts. Sectors
    without a frozen element cost no traffic, and one that is stored in parts is merged by the L2 cache.
    """
    lane = tl.max_contiguous(tl.arange(0, BLOCK), 1)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = lane < n - start
    bits = tl.load(union_ptr + start // 8 + lane // 8, mask=inside, other=0)
    frozen = ((bits >> (lane % 8).to(tl.uint8)) & 1) != 0
    tl.store(param_ptr + start + lane, tl.load(saved_ptr + start + lane, mask=frozen), mask=frozen)


def pack(mask: Tensor, packed: Tensor, *, config: Config = BYTE_CONFIGS[0]) -> None:
    """Pack ``mask`` (contiguous bool, n elements) into ``packed`` (uint8 [ceil(n / 8)]), padding bits zero."""
    assert mask.dtype is torch.bool and mask.is_contiguous()
    check_packed(mask.numel(), packed)
    pack_kernel[grid(mask.numel(), config)](
        mask_ptr=mask.view(torch.uint8),
        packed_ptr=packed,
        n=mask.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def unpack(packed: Tensor, mask: Tensor, *, config: Config = BYTE_CONFIGS[0]) -> None:
    """Unpack ``packed`` (uint8 [ceil(n / 8)]) into ``mask`` (contiguous bool, n elements)."""
    assert mask.dtype is torch.bool and mask.is_contiguous()
    check_packed(mask.numel(), packed)
    unpack_kernel[grid(mask.numel(), config)](
        packed_ptr=packed,
        mask_ptr=mask.view(torch.uint8),
        n=mask.numel(),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )


def union(packed: Tensor, out: Tensor, *, config: Config = BYTE_CONFIGS[0]) -> None:
    """``out`` (uint8 [bytes]) = OR over the rows of ``packed`` (uint8 [T, bytes], T >= 1, each row contiguous)."""
    _union(packed, out, False, config)


def union_(dst: Tensor, src: Tensor, *, config: Config = BYTE_CONFIGS[0]) -> None:
    """``dst |= src`` in place, both uint8 [bytes] and contiguous; they are one tensor or do not overlap."""
    _union(src[None], dst, True, config)


def _union(packed: Tensor, out: Tensor, accumulate: bool, config: Config) -> None:
    check_packed(out.numel() * 8, out)
    assert packed.dtype is torch.uint8 and packed.shape[1:] == out.shape and packed[0].is_contiguous()
    union_kernel[grid(out.numel(), config)](
        packed_ptr=packed,
        out_ptr=out,
        rows=packed.shape[0],
        bytes=out.numel(),
        stride_row=packed.stride(0),
        BLOCK=config.block,
        ACCUMULATE=accumulate,
        num_warps=config.num_warps,
    )


def popcount(packed: Tensor, count: Tensor, *, config: Config = BYTE_CONFIGS[0]) -> None:
    """``count`` (0-d int64) = the number of set bits of ``packed`` (contiguous uint8); the same on every run."""
    assert packed.dtype is torch.uint8 and packed.is_contiguous() and count.dtype is torch.int64
    count.zero_()
    popcount_kernel[grid(packed.numel(), config)](
        packed_ptr=packed, count_ptr=count, bytes=packed.numel(), BLOCK=config.block, num_warps=config.num_warps
    )


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
    )


def compile_cases() -> list[CompileCase]:
    """Every kernel with every tile shape; the gate with the dtypes of mixed, full and half precision."""
    flags = {"MAGNITUDE": True, "PACK": True}
    dtypes = {"W_DTYPE": tl.float32, "S_DTYPE": tl.float32, "OUT_DTYPE": tl.bfloat16, "ALIGNED": True}
    cases = []
    for config in CONFIGS:
        for w, out in [("fp32", "bf16"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp64", "fp64")]:
            cases += [
                _case(gate_kernel, config, flags, w_ptr=w, s_ptr=w, tau_ptr=w, out_ptr=out, packed_ptr="u8"),
                _case(gate_packed_kernel, config, {}, w_ptr=w, packed_ptr="u8", out_ptr=out),
            ]
        cases += [
            _case(gate_multi_kernel, config, flags | dtypes, table_ptr="i64", block_ptr="i32"),
            _case(restore_frozen_kernel, config, {}, param_ptr="fp32", saved_ptr="fp32", union_ptr="u8"),
        ]
    for config in BYTE_CONFIGS:
        cases += [
            _case(pack_kernel, config, {}, mask_ptr="u8", packed_ptr="u8"),
            _case(unpack_kernel, config, {}, packed_ptr="u8", mask_ptr="u8"),
            _case(union_kernel, config, {"ACCUMULATE": False}, packed_ptr="u8", out_ptr="u8"),
            _case(popcount_kernel, config, {}, packed_ptr="u8", count_ptr="i64"),
        ]
    return cases


def _case(fn: Any, config: Config, constexprs: dict[str, Any], **pointers: str) -> CompileCase:
    constexprs = constexprs | {"BLOCK": config.block}
    sizes = [name for name in fn.arg_names if name not in constexprs and name not in pointers]
    dtypes = " ".join(pointers.values())
    # The floats' kernels must be fast for any n; those of bytes for what Triton sees to be a multiple of 16.
    aligned = [*pointers, *sizes] if config in BYTE_CONFIGS else list(pointers)
    return CompileCase(
        name=f"{fn.__name__.removesuffix('_kernel')} {dtypes} {config.block}x{config.num_warps}",
        fn=fn,
        signature={name: f"*{dtype}" for name, dtype in pointers.items()} | dict.fromkeys(sizes, "i64"),
        constexprs=constexprs,
        attrs=dict.fromkeys(aligned, ALIGNMENT),
        num_warps=config.num_warps,
    )
