"""What the elementwise kernels share: tile shapes, exact conversions, and tables for launches over many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16
"""Bytes: what a 128-bit load needs, and what Triton's own check of an argument looks for."""


@dataclass(frozen=True)
class Config:
    """One way to cut a flattened tensor: ``block`` elements to a program of ``num_warps`` warps.

    4 elements a thread suit 32-bit results, 8 suit 16-bit ones: then a thread stores 128 bits at once, and its bits of
    a packed mask reach it without a detour through shared memory.
    """

    block: int
    num_warps: int


def grid(n: int, config: Config) -> tuple[int]:
    """One program per block of ``n`` elements; no program for none."""
    return (triton.cdiv(n, config.block),)


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


class TensorTable(NamedTuple):
    """The arguments of one launch over T tensors.

    Attributes:
        addresses: int64 [kinds + 1, T]: a row of addresses for each kind of operand, then the numbers of elements.
        blocks: int32 [programs, 2]: each program's tensor and its block within that tensor.
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
        """The same table on ``device``. A copy from the host: outside CUDA graph capture."""
        return self._replace(addresses=self.addresses.to(device), blocks=self.blocks.to(device))


def tensor_table(operands: Sequence[Sequence[Tensor] | None], config: Config) -> TensorTable:
    """Describe T tensors to a kernel of many tensors, on the CPU; bring it to their device with ``TensorTable.to``.

    The table holds addresses, not references: the caller keeps the tensors alive and in place while it is in use, as
    for a captured graph.

    Args:
        operands: for each kind of operand, in the order that the kernel names, its T contiguous tensors of one dtype,
            or None. The first kind gives the numbers of elements.
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
        dtypes=tuple(None if kind is None else _TRITON_DTYPES[kind[0].dtype] for kind in operands),
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
    """``x`` as DTYPE, rounded as ``Tensor.to`` rounds; untouched, NaN payloads too, if it is of that dtype already."""
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
def table_pointer(table_ptr, column, tensor, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in row ``column`` of a ``TensorTable``'s addresses."""
    pointer = tl.load(table_ptr + column * tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the compiler cannot see it in a loaded address, and without it would split every vector
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
