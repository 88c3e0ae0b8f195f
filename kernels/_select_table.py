"""What the select knows of its tensors: tile sizes, digits of a key, and the table that its launches read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import CompileCase

LIST_SHARE = 8  # a list has room for 1/8 of its tensor's keys
SIGMAS = 4.5
DESCRIBE_BLOCK = 256
STATE = 8  # int64 before a tensor's counts: low, high, keys below, at low, at high and listed, two unused

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Widths of the digits, the widest first, for "magnitude" and for "value", whose keys have one bit more.
# tl.histogram costs 1/32 of a population count per element and bin.
DIGITS = {
    torch.float32: ((7, 6, 6, 6, 6), (7, 7, 6, 6, 6)),
    torch.bfloat16: ((5, 5, 5), (6, 5, 5)),
    torch.float16: ((5, 5, 5), (6, 5, 5)),
}


@dataclass(frozen=True)
class Config:
    """Tile sizes, all powers of two.

    Attributes:
        window_block: scores that a program of ``window_kernel`` reads at a time: 1 to 64 per thread.
        digit_block: scores or keys that a program of ``digit_kernel`` reads at a time.
        items: scores per program, a multiple of both blocks.
        sample: scores in a sample, at most 16384.
        num_warps: of these two kernels.
    """

    window_block: int = 2048
    digit_block: int = 4096
    items: int = 32768
    sample: int = 4096
    num_warps: int = 4


CONFIGS = (
    Config(),
    Config(items=16384),
    Config(items=131072),
    Config(window_block=4096, digit_block=8192, items=65536, num_warps=8),
)


class Table(NamedTuple):
    """What :func:`select` knows of its tensors; see :func:`make_table`.

    Attributes:
        tensors: [T, 6] int64: address, numel, rank, start of list, ranks of the window's ends in the sample.
        programs: [P, 2] int64: tensor and first element of every program.
        dtype: of the scores.
        listed: keys that the lists have room for, together.
        config: the tile sizes that ``programs`` and the ranks were made for.
    """

    tensors: Tensor
    programs: Tensor
    dtype: torch.dtype
    listed: int
    config: Config


@triton.jit(do_not_specialize=["n", "rank", "low_rank", "high_rank", "items_each", "programs"])
def describe_kernel(
    x_ptr,  # [n] the scores
    tensors_ptr,  # [1, 6] int64, Table.tensors
    programs_ptr,  # [programs, 2] int64, Table.programs
    n,
    rank,
    low_rank,
    high_rank,
    items_each,  # scores per program
    programs,
    BLOCK: tl.constexpr,
):
    """Write the table of one tensor."""
    program = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = program < programs
    tl.store(programs_ptr + 2 * program, tl.zeros([BLOCK], tl.int64), mask=inside)
    tl.store(programs_ptr + 2 * program + 1, program * items_each, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tensors_ptr, x_ptr.to(tl.int64))
        tl.store(tensors_ptr + 1, tl.cast(n, tl.int64))
        tl.store(tensors_ptr + 2, tl.cast(rank, tl.int64))
        tl.store(tensors_ptr + 3, tl.zeros((), tl.int64))
        tl.store(tensors_ptr + 4, tl.cast(low_rank, tl.int64))
        tl.store(tensors_ptr + 5, tl.cast(high_rank, tl.int64))


def make_table(tensors: Sequence[Tensor], ranks: Sequence[int], config: Config = CONFIGS[0]) -> Table:
    """Describe tensors and ranks for :func:`select`, once for as long as the tensors stay in place.

    The table holds addresses, not references: the tensors must be alive and unmoved at every use; their
    values may change. Copies two small tensors to the device, and so belongs outside a graph capture.

    Args:
        tensors: T >= 1 contiguous, non-empty tensors of one dtype (float32, bfloat16 or float16) on one
            device, of any shapes and sizes.
        ranks: for each the index of the threshold among its ascending keys, 0 <= rank < numel.
        config: the tile sizes.

    Returns:
        The table.

    Raises:
        TypeError: for another dtype, or several.
        ValueError: for no tensors or another number of ranks, several devices, a tensor that is empty or not
            contiguous, or a rank out of range.
    """
    if not tensors or len(tensors) != len(ranks):
        count = f"{len(tensors)} and {len(ranks)}"
        raise ValueError(f"tensors and ranks: expected as many of both, and at least one, got {count}")
    rows, programs, listed = [], [], 0
    for i, (tensor, rank) in enumerate(zip(tensors, ranks, strict=True)):
        _check(i, tensor, rank, tensors[0])
        n = tensor.numel()
        rows.append((tensor.data_ptr(), n, rank, listed, *_window_ranks(n, rank, config.sample)))
        programs += [(i, start) for start in range(0, n, config.items)]
        listed += _room(n)
    device = tensors[0].device
    return Table(
        tensors=torch.tensor(rows, dtype=torch.int64).to(device),
        programs=torch.tensor(programs, dtype=torch.int64).to(device),
        dtype=tensors[0].dtype,
        listed=listed,
        config=config,
    )


def programs_of(n: int, config: Config = CONFIGS[0]) -> int:
    """The number of programs that a tensor of ``n`` scores takes."""
    return triton.cdiv(n, config.items)


def describe(tensor: Tensor, rank: int, *, tensors: Tensor, programs: Tensor, config: Config = CONFIGS[0]) -> Table:
    """:func:`make_table` for one tensor, written on the device by one launch: no copy from the host, so that a step may
    do it, and a captured graph hold it.

    Args:
        tensor: as for :func:`make_table`.
        rank: as there.
        tensors: int64 [1, 6], any contents; becomes ``Table.tensors``.
        programs: int64 [programs_of(numel), 2], any contents; becomes ``Table.programs``.
        config: the tile sizes.
    """
    n = tensor.numel()
    _check(0, tensor, rank, tensor)
    assert tensors.shape == (1, 6) and programs.shape == (programs_of(n, config), 2)
    low_rank, high_rank = _window_ranks(n, rank, config.sample)
    describe_kernel[(triton.cdiv(len(programs), DESCRIBE_BLOCK),)](
        x_ptr=tensor,
        tensors_ptr=tensors,
        programs_ptr=programs,
        n=n,
        rank=rank,
        low_rank=low_rank,
        high_rank=high_rank,
        items_each=config.items,
        programs=len(programs),
        BLOCK=DESCRIBE_BLOCK,
        num_warps=1,
    )
    return Table(tensors, programs, tensor.dtype, _room(n), config)


def _room(n: int) -> int:
    """Keys that the list of a tensor has room for, rounded up so that lists begin at multiples of 16 bytes."""
    return -(-(n // LIST_SHARE) // 4) * 4


def workspace_size(table: Table) -> int:
    """Elements of :func:`select`'s int64 workspace: half a byte per score, and 5 KB per tensor."""
    return len(table.tensors) * state_size(table.dtype) + -(-table.listed // 2)


def _check(i: int, tensor: Tensor, rank: int, first: Tensor) -> None:
    if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
        expected = first.dtype if first.dtype in DTYPES else list(DTYPES)
        raise TypeError(f"tensors[{i}]: expected {expected}, got {tensor.dtype}")
    if tensor.device != first.device or not tensor.is_contiguous():
        got = f"shape {tuple(tensor.shape)}, strides {tensor.stride()} on {tensor.device}"
        raise ValueError(f"tensors[{i}]: expected a contiguous tensor on {first.device}, got {got}")
    if not 0 <= rank < tensor.numel():
        raise ValueError(f"ranks[{i}]: expected 0 <= rank < numel, got {rank} for {tensor.numel()} elements")


def _window_ranks(n: int, rank: int, sample: int) -> tuple[int, int]:
    """Ranks of the window's ends in the sample. Outside of it: the smallest or the largest key there is."""
    if n <= sample:
        return rank, rank
    expected = (rank + 0.5) / n * sample
    margin = SIGMAS * math.sqrt(expected * (1 - expected / sample)) + 1
    return math.floor(expected - margin), math.ceil(expected + margin)


def state_size(dtype: torch.dtype) -> int:
    """int64 elements of a tensor's state, under either rule."""
    return STATE + max(len(digits) << digits[0] for digits in DIGITS[dtype])


def compile_cases() -> list[CompileCase]:
    """The one kernel here."""
    signature = {"x_ptr": "*fp32", "tensors_ptr": "*i64", "programs_ptr": "*i64"}
    sizes = dict.fromkeys(("n", "rank", "low_rank", "high_rank", "items_each", "programs"), "i32")
    constexprs = {"BLOCK": DESCRIBE_BLOCK}
    return [CompileCase("describe", describe_kernel, {**signature, **sizes}, constexprs, num_warps=1)]
