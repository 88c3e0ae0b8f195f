"""The table from which the kernels of :mod:`.threshold` read where their tensors are, their tile sizes, and the digits
into which they cut a key. The kernels themselves write what a table lacks: see :class:`Row`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout

LIST_SHARE = 8  # a list has room for 1/8 of its tensor's keys
SIGMAS = 4.5
SEARCH_REGISTERS = 128
"""The most that a thread of a search may use. Without a limit, ptxas takes fewer and spills some."""

MOST_BLOCKS = 256  # that one program takes; more scores take more programs
OWNERS_BLOCK = tl.constexpr(512)  # how many rows of ``Table.programs`` are written at a time

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Config:
    """Tile sizes, all powers of two.

    Attributes:
        window_block: scores that a program of ``window_kernel`` reads at a time: 1 to 64 per thread.
        digit_block: scores or keys that a program of ``search_kernel`` reads at a time.
        items: scores per program, a multiple of both blocks; see :func:`spread`.
        sample: scores in a sample, at most 16384.
        num_warps: of these two kernels.
        alone: up to so many keys are searched by one program; any number.
    """

    window_block: int = 2048
    digit_block: int = 2048
    items: int = 32768
    sample: int = 4096
    num_warps: int = 4
    alone: int = 8192


CONFIGS = (
    Config(),
    Config(items=16384),
    Config(items=131072),
    Config(window_block=4096, items=65536, num_warps=8),
)


RESIDENT = 4
"""How many programs of the search a multiprocessor runs at a time."""


def spread(config: Config, scores: int, processors: int) -> Config:
    """``config`` with as many items per program as let all programs run at the same time, and occupy the GPU.

    Args:
        config: the tile sizes.
        scores: how many there are in all tensors of a launch together.
        processors: the multiprocessors of the GPU.
    """
    least = max(config.window_block, config.digit_block)
    blocks = triton.cdiv(triton.cdiv(scores, RESIDENT * processors), least)
    return replace(config, items=least * triton.next_power_of_2(min(max(blocks, 1), MOST_BLOCKS)))


class Row(NamedTuple):
    """What ``sample_kernel`` writes to ``Table.tensors`` for a table of one tensor.

    Attributes:
        scores: the address.
        n: how many there are; 0 if there is nothing to write.
        rank: of the threshold.
        low_rank: of the low end of the window in the sample.
        high_rank: of its high end.
        room: keys that the list has room for.
        programs: how many programs work on the tensor.
    """

    scores: int = 0
    n: int = 0
    rank: int = 0
    low_rank: int = 0
    high_rank: int = 0
    room: int = 0
    programs: int = 0


COMPLETE = Row()
"""That of a table which lacks nothing."""


class Table(NamedTuple):
    """What :func:`.threshold.select` has to know of its tensors; see :func:`make_table`.

    Attributes:
        tensors: [T, TENSOR_COLUMNS] int64: what ``_layout.TENSOR_...`` names.
        programs: [P, PROGRAM_COLUMNS] int64: tensor and first element of every program.
        dtype: of the scores.
        listed: keys that the lists have room for, together.
        config: the tile sizes that ``programs`` and the ranks were made for.
        row: what ``select`` writes to ``tensors``, and then also ``programs``, before it reads them.
    """

    tensors: Tensor
    programs: Tensor
    dtype: torch.dtype
    listed: int
    config: Config
    row: Row = COMPLETE


@triton.jit
def write_row(row_ptr, scores, n, rank, low_rank, high_rank, room, programs):
    """Write the row of the only tensor of a table. One thread does it."""
    tl.store(row_ptr + layout.TENSOR_SCORES, tl.cast(scores, tl.int64))
    tl.store(row_ptr + layout.TENSOR_NUMEL, tl.cast(n, tl.int64))
    tl.store(row_ptr + layout.TENSOR_RANK, tl.cast(rank, tl.int64))
    tl.store(row_ptr + layout.TENSOR_LIST, tl.zeros((), tl.int64))
    tl.store(row_ptr + layout.TENSOR_ROOM, tl.cast(room, tl.int64))
    tl.store(row_ptr + layout.TENSOR_LOW_RANK, tl.cast(low_rank, tl.int64))
    tl.store(row_ptr + layout.TENSOR_HIGH_RANK, tl.cast(high_rank, tl.int64))
    tl.store(row_ptr + layout.TENSOR_FIRST_PROGRAM, tl.zeros((), tl.int64))
    tl.store(row_ptr + layout.TENSOR_PROGRAMS, tl.cast(programs, tl.int64))
    tl.store(row_ptr + layout.TENSOR_WINDOW, tl.zeros((), tl.int64))


@triton.jit
def write_programs(row_ptr, programs_ptr, tensor, items_each):
    """Write which programs work on a tensor, and from which element on."""
    first = tl.load(row_ptr + layout.TENSOR_FIRST_PROGRAM)
    programs = tl.load(row_ptr + layout.TENSOR_PROGRAMS)
    for begin in range(0, programs, OWNERS_BLOCK):
        part = begin + tl.arange(0, OWNERS_BLOCK)
        inside = part < programs
        program_ptr = programs_ptr + layout.PROGRAM_COLUMNS * (first + part)
        tl.store(program_ptr + layout.PROGRAM_TENSOR, tl.full([OWNERS_BLOCK], 0, tl.int64) + tensor, mask=inside)
        tl.store(program_ptr + layout.PROGRAM_START, part.to(tl.int64) * items_each, mask=inside)


def make_table(tensors: Sequence[Tensor], ranks: Sequence[int], config: Config = CONFIGS[0]) -> Table:
    """Describe tensors and ranks for :func:`.threshold.select`. The table is valid as long as the tensors stay in
    place.

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
        raise ValueError(f"tensors and ranks: expected the same number of both, and at least one, got {count}")
    rows: list[list[int]] = []
    programs: list[tuple[int, int]] = []
    listed = 0
    for i, (tensor, rank) in enumerate(zip(tensors, ranks, strict=True)):
        _check(i, tensor, rank, tensors[0])
        one = _row(tensor, rank, config)
        row = [0] * layout.TENSOR_COLUMNS.value
        row[layout.TENSOR_SCORES] = one.scores
        row[layout.TENSOR_NUMEL] = one.n
        row[layout.TENSOR_RANK] = rank
        row[layout.TENSOR_LIST] = listed
        row[layout.TENSOR_ROOM] = one.room
        row[layout.TENSOR_LOW_RANK], row[layout.TENSOR_HIGH_RANK] = one.low_rank, one.high_rank
        row[layout.TENSOR_FIRST_PROGRAM], row[layout.TENSOR_PROGRAMS] = len(programs), one.programs
        rows.append(row)
        programs += [(i, start) for start in range(0, one.n, config.items)]
        listed += _list_size(one.n)
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
    """As :func:`make_table` for one tensor, but the first launch of ``select`` writes the table on the device. Nothing
    is copied from the host, so that this may be part of a training step and of a captured graph.

    Args:
        tensor: as for :func:`make_table`.
        rank: as there.
        tensors: int64 [1, TENSOR_COLUMNS], any contents; becomes ``Table.tensors``.
        programs: int64 [programs_of(numel), PROGRAM_COLUMNS], any contents; becomes ``Table.programs``.
        config: the tile sizes.
    """
    _check(0, tensor, rank, tensor)
    row = _row(tensor, rank, config)
    assert tensors.shape == (1, layout.TENSOR_COLUMNS.value)
    assert programs.shape == (row.programs, layout.PROGRAM_COLUMNS.value)
    return Table(tensors, programs, tensor.dtype, _list_size(row.n), config, row)


def _row(tensor: Tensor, rank: int, config: Config) -> Row:
    n = tensor.numel()
    ranks = _window_ranks(n, rank, config.sample)
    return Row(tensor.data_ptr(), n, rank, *ranks, n // LIST_SHARE, programs_of(n, config))


def _list_size(n: int) -> int:
    """Elements of the list of a tensor, rounded up so that lists begin at multiples of 16 bytes."""
    return -(-(n // LIST_SHARE) // 4) * 4


def workspace_size(table: Table) -> int:
    """Elements of the int64 workspace of :func:`.threshold.select`: half a byte per score, and 2 KB per tensor."""
    return len(table.tensors) * layout.STATE_SIZE.value + -(-table.listed // 2)


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
    """Ranks of the window's ends in the sample. A rank below the sample makes the
    window begin at the smallest key of all; a rank above it makes it end at the largest."""
    if n <= sample:
        return rank, rank
    expected = (rank + 0.5) / n * sample
    margin = SIGMAS * math.sqrt(expected * (1 - expected / sample)) + 1
    return math.floor(expected - margin), math.ceil(expected + margin)
