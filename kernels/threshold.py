"""The exact threshold of the top fraction c of several tensors at once, on order-preserving integer keys (WSN, Eq. 3).

tau is the key of a given rank among the ascending ``|S|`` or ``S``, NaN last. A radix select by counting
would read the scores once per digit. Here they are read once, and the digits are counted on the few keys near
tau:

1. ``sample_kernel`` looks at up to ``sample`` scores of each tensor and takes from them a window of keys that
   almost surely holds tau. A tensor no larger than the sample is done.
2. ``window_kernel`` reads every score: it counts the keys below the window and those equal to its ends, and
   lists the keys strictly inside it, a few per cent.
3. ``search_kernel`` finds tau in the list, digit by digit: see :mod:`._search`.

Nothing is decided on the host, and the number of launches does not depend on the tensors. The sample decides only the
time: where its window misses tau or holds too much, the digits are counted over all scores. The window reaches
``SIGMAS`` standard deviations of the sampled rank to each side. How such a rank varies does not depend on the
distribution of the scores, so the window misses tau with a probability below 3 in 100,000. A key that many scores share
becomes an end of the window, where it is counted and not listed, so that it cannot fill the list. Therefore inputs with
many equal keys take no longer than random ones. A program counts in registers and adds to memory once; one atomic more
per tile reserves its place in the list. The order of the list depends on timing, the result does not.

What changes from launch to launch is an argument at run time, so that each kernel is compiled once for a dtype and a
rule.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._bits import order_key
from ._elementwise import FP_FUSION
from ._search import domain, find
from ._window import clear_state
from .threshold_table import (
    CONFIGS,
    DTYPES,
    SEARCH_REGISTERS,
    Config,
    Table,
    describe,
    make_table,
    programs_of,
    spread,
    workspace_size,
    write_programs,
    write_row,
)

__all__ = [
    "CONFIGS", "Config", "Table", "describe", "make_table", "programs_of", "select", "spread",
    "workspace_size",
]  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "tensors_ptr", "programs_ptr", "state_ptr", "tau", "scores", "n", "rank", "low_rank", "high_rank", "room",
        "programs", "items_each", "magnitude", "writes_programs", "samples",
    ]
)  # fmt: skip
def sample_kernel(
    tensors_ptr,  # [T, TENSOR_COLUMNS] int64, Table.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, Table.programs
    state_ptr,  # [T, STATE_SIZE] int64
    tau: tl.int64,  # the address of the thresholds, [T] DTYPE
    scores: tl.int64,  # the address of the scores of the only tensor, if its row is to be written; see Row
    n: tl.int64,  # how many it has; 0 if the table has its rows already
    rank: tl.int64,
    low_rank: tl.int64,
    high_rank: tl.int64,
    room: tl.int64,
    programs: tl.int64,
    items_each,  # scores per program
    magnitude,  # 1 for the rule "magnitude", else 0
    writes_programs,  # 1 if Table.programs is to be written, else 0
    samples,  # 1 if there is a search, else 0
    DTYPE: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Write what a table lacks of a tensor, clear the state of its search, and write the window's ends, by bisection of
    the sample's keys. One program serves one tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row_ptr = tensors_ptr + layout.TENSOR_COLUMNS * tensor
    if n > 0:
        write_row(row_ptr, scores, n, rank, low_rank, high_rank, room, programs)
        tl.debug_barrier()  # every thread reads below what one thread has written
    if writes_programs > 0:
        write_programs(row_ptr, programs_ptr, tensor, items_each)
    if samples > 0:
        tl.store(row_ptr + layout.TENSOR_TAU, tau + tensor * (DTYPE.primitive_bitwidth // 8))
        _sample(row_ptr, layout.state_of(state_ptr, tensor), magnitude, DTYPE, SAMPLE)


@triton.jit
def _sample(row_ptr, state_ptr, magnitude, DTYPE: tl.constexpr, SAMPLE: tl.constexpr):
    x_ptr = tl.load(row_ptr + layout.TENSOR_SCORES).to(tl.pointer_type(DTYPE))
    n = tl.load(row_ptr + layout.TENSOR_NUMEL)
    low_rank = tl.load(row_ptr + layout.TENSOR_LOW_RANK)
    high_rank = tl.load(row_ptr + layout.TENSOR_HIGH_RANK)

    # One position in each of SAMPLE equal parts, at a pseudo-random place in the part.
    i = tl.arange(0, SAMPLE)
    place = (i.to(tl.uint32) * 0x9E3779B9).to(tl.int64)
    spread = i.to(tl.int64) * n // SAMPLE + (place * (n // SAMPLE) >> 32)
    x = tl.load(x_ptr + tl.where(n > SAMPLE, spread, i), mask=i < n, other=0.0)
    key = tl.where(magnitude > 0, order_key(x, True), order_key(x, False))
    key = tl.where(i < n, key, 0xFFFFFFFF)  # larger than every key, so it is never counted as below
    # Bisection: each end is known up to a cell of 2**bit keys, from low or high on, with so many keys of the sample
    # below the cell and so many below its end. It ends when few keys are left in both cells, whose outer ends are those
    # of the window. Many equal keys are never few, so that such a key becomes an end itself.
    low, high = tl.zeros((), tl.uint32), tl.zeros((), tl.uint32)
    low_below, high_below = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    low_until = tl.minimum(n, SAMPLE).to(tl.int32)
    high_until = low_until
    few = tl.where(n > SAMPLE, SAMPLE // 256, -1)  # a sample of all scores finds the threshold itself
    bit = DTYPE.primitive_bitwidth - magnitude
    while (bit > 0) & (tl.maximum(low_until - low_below, high_until - high_below) > few):
        bit -= 1
        step = tl.full((), 1, tl.uint32) << bit.to(tl.uint32)
        # Two counts in one sum; low is never above high.
        below = tl.sum(tl.where(key < low + step, 0x10001, tl.where(key < high + step, 0x10000, 0)), 0)
        of_low, of_high = below & 0xFFFF, below >> 16
        up = of_low <= low_rank
        low = tl.where(up, low + step, low)
        low_below, low_until = tl.where(up, of_low, low_below), tl.where(up, low_until, of_low)
        up = of_high <= high_rank
        high = tl.where(up, high + step, high)
        high_below, high_until = tl.where(up, of_high, high_below), tl.where(up, high_until, of_high)
    last = (tl.full((), 1, tl.int64) << bit) - 1
    clear_state(state_ptr, low.to(tl.int64), high.to(tl.int64) + last, 0)


@triton.jit
def membership(tensors_ptr, programs_ptr):
    """The tensor that this program works on, and its number among the programs of this tensor."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + layout.PROGRAM_COLUMNS * program + layout.PROGRAM_TENSOR)
    return tensor, program - tl.load(tensors_ptr + layout.TENSOR_COLUMNS * tensor + layout.TENSOR_FIRST_PROGRAM)


@triton.jit
def stretch(tensors_ptr, programs_ptr, items_each, DTYPE: tl.constexpr):
    """The part of a tensor that this program works on: (tensor, pointer to its row of Table.tensors, first element,
    number of elements, pointer to the first score)."""
    program = tl.program_id(0).to(tl.int64)
    programs_ptr += layout.PROGRAM_COLUMNS * program
    tensor = tl.load(programs_ptr + layout.PROGRAM_TENSOR)
    start = tl.load(programs_ptr + layout.PROGRAM_START)
    row_ptr = tensors_ptr + layout.TENSOR_COLUMNS * tensor
    items = tl.minimum(tl.load(row_ptr + layout.TENSOR_NUMEL) - start, items_each).to(tl.int32)
    x_ptr = tl.load(row_ptr + layout.TENSOR_SCORES).to(tl.pointer_type(DTYPE))
    return tensor, row_ptr, start, items, x_ptr + start


@triton.jit(
    do_not_specialize=["tensors_ptr", "programs_ptr", "state_ptr", "lists_ptr", "items_each"],
)
def window_kernel(
    tensors_ptr,  # [T, TENSOR_COLUMNS] int64, Table.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, Table.programs
    state_ptr,  # [T, STATE_SIZE] int64
    lists_ptr,  # [Table.listed] uint32
    items_each,  # scores per program
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads: each has a row of a tile to itself, and sums along it alone
):
    """Count the keys below the window and at its ends, and list those inside."""
    tensor, row_ptr, _, items, x_ptr = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    state_ptr = layout.state_of(state_ptr, tensor)
    low = tl.load(state_ptr + layout.STATE_LOW).to(tl.uint32)
    high = tl.load(state_ptr + layout.STATE_HIGH).to(tl.uint32)
    room = tl.load(row_ptr + layout.TENSOR_ROOM)
    lists_ptr += tl.load(row_ptr + layout.TENSOR_LIST)

    below = tl.zeros([LANES], tl.int32)
    at_low = tl.zeros([LANES], tl.int32)
    at_high = tl.zeros([LANES], tl.int32)
    tile = tl.arange(0, LANES)[:, None] + tl.arange(0, BLOCK // LANES)[None, :] * LANES
    for offset in range(0, items, BLOCK):
        if offset + BLOCK <= items:  # only the last tile of a tensor needs a bounds check
            x = tl.load(x_ptr + offset + tile)
        else:  # NaN has the largest key: it is counted after every real key, where no rank reaches
            x = tl.load(x_ptr + offset + tile, mask=offset + tile < items, other=float("nan"))
        key = order_key(x, MAGNITUDE)
        # Four 8-bit counters in one number take half the instructions. Equal ends count as the low one.
        kind = tl.where(key < high, 1 << 16, tl.where(key == high, 1 << 24, 0))
        kind = tl.where(key < low, 1, tl.where(key == low, 1 << 8, kind))
        kinds = tl.sum(kind, 1)
        below += kinds & 0xFF
        at_low += (kinds >> 8) & 0xFF
        in_lane = (kinds >> 16) & 0xFF
        at_high += (kinds >> 24) & 0xFF
        found = tl.sum(in_lane, 0)
        if found > 0:
            begin = tl.atomic_add(state_ptr + layout.STATE_LISTED, found.to(tl.int64), sem="relaxed")
            if begin + found <= room:
                before = tl.cumsum(in_lane, 0) - in_lane - 1
                slot = before[:, None] + ((tl.cumsum(kind, 1) >> 16) & 0xFF)
                tl.store(lists_ptr + begin + slot, key, mask=kind == (1 << 16))
    tl.atomic_add(state_ptr + layout.STATE_BELOW, tl.sum(below, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + layout.STATE_AT_LOW, tl.sum(at_low, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + layout.STATE_AT_HIGH, tl.sum(at_high, 0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["tensors_ptr", "programs_ptr", "state_ptr", "lists_ptr", "alone"])
def search_kernel(
    tensors_ptr,  # [T, TENSOR_COLUMNS] int64, Table.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, Table.programs
    state_ptr,  # [T, STATE_SIZE] int64
    lists_ptr,  # [Table.listed] uint32
    alone,  # so many keys are searched by one program
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the threshold in the list, or among all scores, and write it."""
    tensor, member = membership(tensors_ptr, programs_ptr)
    row_ptr, state_ptr = tensors_ptr + layout.TENSOR_COLUMNS * tensor, layout.state_of(state_ptr, tensor)
    searched = domain(row_ptr, state_ptr, alone, DTYPE, MAGNITUDE, BLOCK)
    workers = searched[8]
    if member < workers:
        find(row_ptr, state_ptr, lists_ptr, searched, workers, DTYPE, MAGNITUDE, BLOCK)


def select(*, table: Table, tau: Tensor, workspace: Tensor, rule: str) -> None:
    """Write the threshold of every tensor: 3 launches and no host sync.

    Args:
        table: of :func:`make_table` or :func:`describe`, on the current device.
        tau: [T], contiguous, of the scores' dtype: the thresholds are written here, zero as +0.0.
        workspace: [>= workspace_size(table)] int64, any contents, for one call at a time.
        rule: "magnitude" or "value".
    """
    tensors, programs, dtype, _, config, row = table
    states = len(tensors) * layout.STATE_SIZE.value
    form: dict[str, Any] = {"tensors_ptr": tensors, "programs_ptr": programs, "state_ptr": workspace}
    form |= {"items_each": config.items, "DTYPE": DTYPES[dtype]}
    sample_kernel[(len(tensors),)](
        **form,
        **row._asdict(),
        tau=tau.data_ptr(),
        magnitude=int(rule == "magnitude"),
        writes_programs=int(row.n > 0),
        samples=1,
        SAMPLE=config.sample,
        num_warps=4,
        **FP_FUSION,
    )
    form |= {"lists_ptr": workspace[states:].view(torch.uint32), "MAGNITUDE": rule == "magnitude"}
    form |= {"num_warps": config.num_warps}
    every_program = (len(programs),)
    window_kernel[every_program](**form, BLOCK=config.window_block, LANES=32 * config.num_warps, **FP_FUSION)
    del form["items_each"]
    search_kernel[every_program](
        **form, alone=config.alone, BLOCK=config.digit_block, maxnreg=SEARCH_REGISTERS, **FP_FUSION
    )
