"""What the elementwise kernels share: tile shapes, exact conversions of dtypes, and tables for launches over many
tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout

ALIGNMENT = 16
"""Bytes that an address has to be a multiple of for 128-bit loads. Triton checks its arguments for the same number."""

FP_FUSION = {"enable_fp_fusion": True}
"""Options of every launch: the compiler may fuse a multiplication and an addition into one instruction, which rounds
once. The kernels were compiled and tested this way. A launch has to say it, because Triton 3.9 warns otherwise."""


@dataclass(frozen=True)
class Config:
    """One way to cut a flattened tensor: ``block`` elements to a program of ``num_warps`` warps.

    4 elements for each thread suit 32-bit results, and 8 suit 16-bit ones: then a thread stores 128 bits at once, and
    the bits of a packed mask get to their thread without shared memory."""

    block: int
    num_warps: int


def grid(n: int, config: Config) -> tuple[int]:
    """The launch grid: one program for each block of ``n`` elements. It is empty for n = 0."""
    return (triton.cdiv(n, config.block),)


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}
"""Triton's dtype for each dtype that the elementwise kernels know."""


class TensorTable(NamedTuple):
    """The arguments of one launch over T tensors.

    Attributes:
        addresses: int64 [kinds + 1, T]: a row of addresses for each kind of operand, then the numbers of elements.
        blocks: int32 [programs, BLOCK_COLUMNS]: each program's tensor and its block within that tensor.
        dtypes: Triton's dtype of each kind of operand, None for one that is left out.
        config: the tile shape that ``blocks`` was cut for.
        aligned: whether every address, but those of packed masks and of 0-d tensors, is a multiple of 16 bytes.
    """

    addresses: Tensor
    blocks: Tensor
    dtypes: tuple[Any, ...]
    config: Config
    aligned: bool

    def to(self, device: torch.device | str) -> TensorTable:
        """Copy the table from the host to ``device``. A CUDA graph cannot capture this copy."""
        return self._replace(addresses=self.addresses.to(device), blocks=self.blocks.to(device))


def tensor_table(operands: Sequence[Sequence[Tensor] | None], config: Config) -> TensorTable:
    """Describe T tensors to a kernel of many tensors. The table is on the CPU; ``TensorTable.to`` brings it to the
    device.

    The table holds addresses, not references. The caller keeps the tensors alive and in place as long as it is used.

    Args:
        operands: for each kind of operand its T contiguous tensors of one dtype, or None, in the order of the rows
            that the kernel names. The first kind gives the numbers of elements, which are the last row.
        config: the tile shape.
    """
    given = [kind for kind in operands if kind is not None]
    assert all(t.is_contiguous() and t.dtype is kind[0].dtype for kind in given for t in kind)
    sizes = [t.numel() for t in given[0]]
    addresses = [[0] * len(sizes) if kind is None else [t.data_ptr() for t in kind] for kind in operands]
    counts = torch.tensor([triton.cdiv(n, config.block) for n in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    firsts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    blocks = torch.stack([tensors, torch.arange(len(tensors)) - firsts], dim=1).to(torch.int32)
    vectors = [t for kind in given if kind[0].dtype is not torch.uint8 for t in kind if t.ndim > 0]
    return TensorTable(
        addresses=torch.tensor([*addresses, sizes]),
        blocks=blocks,
        dtypes=tuple(None if kind is None else TRITON_DTYPES[kind[0].dtype] for kind in operands),
        config=config,
        aligned=all(t.data_ptr() % ALIGNMENT == 0 for t in vectors),
    )


@triton.jit
def widen(x):
    """16-bit floats as fp32, exactly; others as they are."""
    if x.dtype == tl.bfloat16:  # by its bits, as no instruction or interpreter can flush a denormal then
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """``x`` as DTYPE, rounded as ``Tensor.to`` rounds. What has that dtype is returned as it is, payloads of NaNs
    included."""
    if x.dtype != DTYPE:
        x = widen(x)
        if DTYPE.primitive_bitwidth == 16:
            x = x.to(tl.float32)  # PyTorch goes from fp64 to 16 bits in two roundings
        x = x.to(DTYPE)
    return x


@triton.jit
def below(scores, tau, MAGNITUDE: tl.constexpr):
    """``key < tau``, false for NaN: the elements that the gate drops."""
    key = widen(scores)
    if MAGNITUDE:
        key = tl.abs(key)
    return key < widen(tau)


@triton.jit
def block_of(block_ptr, BLOCK: tl.constexpr):
    """The tensor and the first element of this program, from ``TensorTable.blocks``."""
    block_ptr += tl.program_id(0).to(tl.int64) * layout.BLOCK_COLUMNS
    tensor = tl.load(block_ptr + layout.BLOCK_TENSOR)
    return tensor, tl.load(block_ptr + layout.BLOCK_INDEX).to(tl.int64) * BLOCK


@triton.jit
def table_pointer(
    table_ptr, ROW: tl.constexpr, tensor, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The address of tensor ``tensor`` in row ROW of a table [rows, tensors], as a pointer to DTYPE."""
    pointer = layout.field(table_ptr, ROW, tensor, tensors).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the compiler cannot know this of a loaded address, and would make every wide load narrow
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def check_operands(n: int, *tensors: Tensor | None) -> None:
    """Assert that every tensor is contiguous and of ``n`` elements."""
    assert all(t is None or (t.is_contiguous() and t.numel() == n) for t in tensors)


def check_threshold(tau: Tensor, scores: Tensor) -> None:
    """Assert that ``tau`` is one element of the dtype of ``scores``."""
    assert tau.numel() == 1 and tau.dtype is scores.dtype


def check_packed(n: int, packed: Tensor | None) -> None:
    """Assert that ``packed`` is the packed mask of ``n`` elements."""
    assert packed is None or (packed.dtype is torch.uint8 and packed.is_contiguous())
    assert packed is None or packed.shape == ((n + 7) // 8,)


def is_magnitude(rule: str) -> bool:
    """The constexpr MAGNITUDE of a rule."""
    assert rule in ("magnitude", "value")
    return rule == "magnitude"
