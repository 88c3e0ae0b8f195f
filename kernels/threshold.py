"""The exact top-c% threshold of several tensors at once, on order-preserving integer keys (WSN, Eq. 3).

tau is the key of a given rank among the ascending ``|S|`` or ``S``, NaN last. A radix select by counting
would read the scores once per digit. Here they are read once, and the digits are counted on the few keys near
tau:

1. ``sample_kernel`` looks at up to ``sample`` scores of each tensor and takes from them a window of keys that
   almost surely holds tau. A tensor no larger than the sample is done.
2. ``window_kernel`` reads every score: it counts the keys below the window and those equal to its ends, and
   lists the keys strictly inside it, a few per cent.
3. ``digit_kernel``, one launch per digit, most significant first, counts the digits of the listed keys that
   agree with tau so far. The next launch reads from the counts where tau lies.
4. ``result_kernel`` writes tau.

Nothing is decided on the host, and the number of launches does not depend on the tensors. The sample decides
only the time: where its window misses tau or holds too much, the digits are counted over all scores. The ends
lie ``SIGMAS`` deviations from tau, which leaves that a chance below 3 in 100,000 for any distribution: a
value frequent enough to overfill the list is an end of the window, and is counted and not listed. So inputs
with many equal keys take no longer than random ones. A program counts in registers and adds to memory once;
one atomic more per tile reserves its place in the list. The order of the list depends on timing, the result
does not.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import from_order_key, order_key
from ._compile import CompileCase
from ._select_table import (
    CONFIGS,
    DIGITS,
    DTYPES,
    LIST_SHARE,
    STATE,
    Config,
    Table,
    describe,
    make_table,
    programs_of,
    state_size,
    workspace_size,
)

__all__ = ["CONFIGS", "Config", "Table", "describe", "make_table", "programs_of", "select", "workspace_size"]


@triton.jit
def sample_kernel(
    tensors_ptr,  # [T, 6] int64, Table.tensors
    state_ptr,  # [T, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Clear the state of a tensor and write the window's ends, by bisection of the sample's keys."""
    BINS: tl.constexpr = 1 << DIGITS[0]
    BITS: tl.constexpr = DTYPE.primitive_bitwidth - MAGNITUDE
    tensor = tl.program_id(0).to(tl.int64)
    tensors_ptr += 6 * tensor
    state_ptr += tensor * (STATE + len(DIGITS) * BINS)
    x_ptr = tl.load(tensors_ptr).to(tl.pointer_type(DTYPE))
    n = tl.load(tensors_ptr + 1)
    low_rank = tl.load(tensors_ptr + 4)
    high_rank = tl.load(tensors_ptr + 5)

    # One position in each of SAMPLE equal parts, at a place in it that no regular pattern can follow.
    i = tl.arange(0, SAMPLE)
    place = (i.to(tl.uint32) * 0x9E3779B9).to(tl.int64)
    spread = i.to(tl.int64) * n // SAMPLE + (place * (n // SAMPLE) >> 32)
    key = order_key(tl.load(x_ptr + tl.where(n > SAMPLE, spread, i), mask=i < n, other=0.0), MAGNITUDE)
    key = tl.where(i < n, key, 0xFFFFFFFF)  # below nothing
    low = tl.zeros((), tl.uint32)
    high = tl.zeros((), tl.uint32)
    for bit in range(BITS):
        step = tl.full((), 1, tl.uint32) << (BITS - 1 - bit)
        # Two counts in one sum; low is never above high.
        below = tl.sum(tl.where(key < low + step, 0x10001, tl.where(key < high + step, 0x10000, 0)), 0)
        low = tl.where((below & 0xFFFF) <= low_rank, low + step, low)
        high = tl.where((below >> 16) <= high_rank, high + step, high)

    bins = tl.arange(0, BINS)
    for i in tl.static_range(len(DIGITS)):
        tl.store(state_ptr + STATE + i * BINS + bins, tl.zeros([BINS], tl.int64))
    field = tl.arange(0, STATE)
    ends = tl.where(field == 0, low.to(tl.int64), high.to(tl.int64))
    tl.store(state_ptr + field, tl.where(field < 2, ends, 0))


@triton.jit
def stretch(tensors_ptr, programs_ptr, items_each, DTYPE: tl.constexpr):
    """What this program owns: (tensor, row of Table.tensors, first element, number of elements, address)."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(programs_ptr + 2 * program)
    start = tl.load(programs_ptr + 2 * program + 1)
    row_ptr = tensors_ptr + 6 * tensor
    items = tl.minimum(tl.load(row_ptr + 1) - start, items_each).to(tl.int32)
    x_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    return tensor, row_ptr, start, items, x_ptr + start


@triton.jit
def _load_keys(x_ptr, offsets, end, items, MAGNITUDE: tl.constexpr):
    """The keys of a tile that ends at ``end``. Beyond ``items`` they are the largest there is: counted after
    every real key, where no rank reaches."""
    if end <= items:  # apart: all tiles but a tensor's last do without the mask
        x = tl.load(x_ptr + offsets)
    else:
        x = tl.load(x_ptr + offsets, mask=offsets < items, other=float("nan"))
    return order_key(x, MAGNITUDE)


@triton.jit
def window_kernel(
    tensors_ptr,  # [T, 6] int64, Table.tensors
    programs_ptr,  # [P, 2] int64, Table.programs
    state_ptr,  # [T, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    lists_ptr,  # [Table.listed] uint32
    items_each,  # scores per program
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads: each has a row of a tile to itself, and sums along it alone
):
    """Count the keys below the window and at its ends, and list those inside."""
    tensor, row_ptr, _, items, x_ptr = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
    low = tl.load(state_ptr).to(tl.uint32)
    high = tl.load(state_ptr + 1).to(tl.uint32)
    room = tl.load(row_ptr + 1) // LIST_SHARE
    lists_ptr += tl.load(row_ptr + 3)

    below = tl.zeros([LANES], tl.int32)
    at_low = tl.zeros([LANES], tl.int32)
    at_high = tl.zeros([LANES], tl.int32)
    tile = tl.arange(0, LANES)[:, None] + tl.arange(0, BLOCK // LANES)[None, :] * LANES
    for offset in range(0, items, BLOCK):
        key = _load_keys(x_ptr, offset + tile, offset + BLOCK, items, MAGNITUDE)
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
            begin = tl.atomic_add(state_ptr + 5, found.to(tl.int64), sem="relaxed")
            if begin + found <= room:
                before = tl.cumsum(in_lane, 0) - in_lane - 1
                slot = before[:, None] + ((tl.cumsum(kind, 1) >> 16) & 0xFF)
                tl.store(lists_ptr + begin + slot, key, mask=kind == (1 << 16))
    tl.atomic_add(state_ptr + 2, tl.sum(below, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + 3, tl.sum(at_low, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + 4, tl.sum(at_high, 0).to(tl.int64), sem="relaxed")


@triton.jit
def locate(row_ptr, state_ptr, LIST_SHARE: tl.constexpr):
    """Where tau is: (at the window's low end, at its high end, in the list, its rank there or overall)."""
    rank = tl.load(row_ptr + 2)
    at_low = tl.load(state_ptr + 3)
    listed = tl.load(state_ptr + 5)
    beyond_below = rank - tl.load(state_ptr + 2)
    beyond_low = beyond_below - at_low
    beyond_list = beyond_low - listed
    is_low = (beyond_below >= 0) & (beyond_low < 0)
    is_high = (beyond_list >= 0) & (beyond_list < tl.load(state_ptr + 4))
    in_list = (beyond_low >= 0) & (beyond_list < 0) & (listed <= tl.load(row_ptr + 1) // LIST_SHARE)
    return is_low, is_high, in_list, tl.where(in_list, beyond_low, rank)


@triton.jit
def narrow(counts_ptr, rank, DIGITS: tl.constexpr, PASSES: tl.constexpr):
    """The first PASSES digits of the key of this rank, from the counts of as many passes, and the number of keys that
    have them."""
    BINS: tl.constexpr = 1 << DIGITS[0]
    bins = tl.arange(0, BINS)
    prefix = tl.zeros((), tl.uint32)
    equal = tl.zeros((), tl.int64)
    for i in tl.static_range(PASSES):
        counts = tl.load(counts_ptr + i * BINS + bins)
        digit = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < digit, counts, 0), 0)
        equal = tl.sum(tl.where(bins == digit, counts, 0), 0)
        prefix = (prefix << DIGITS[i]) | digit.to(tl.uint32)
    return prefix, equal


@triton.jit
def digit_kernel(
    tensors_ptr,  # [T, 6] int64, Table.tensors
    programs_ptr,  # [P, 2] int64, Table.programs
    state_ptr,  # [T, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    lists_ptr,  # [Table.listed] uint32
    items_each,  # scores per program
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    PASS: tl.constexpr,
    SHIFT: tl.constexpr,  # how many bits of a key lie below this pass's digit
):
    """Count digit PASS of the keys that agree with the threshold in every digit before it."""
    BINS: tl.constexpr = 1 << DIGITS[PASS]
    tensor, row_ptr, start, items, x_ptr = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
    is_low, is_high, in_list, rank = locate(row_ptr, state_ptr, LIST_SHARE)
    if in_list:
        lists_ptr += tl.load(row_ptr + 3) + start // LIST_SHARE
        left = tl.load(state_ptr + 5) - start // LIST_SHARE
        items = tl.minimum(left, items_each // LIST_SHARE).to(tl.int32)
    if is_low | is_high:
        items = 0
    if items > 0:
        prefix, _equal = narrow(state_ptr + STATE, rank, DIGITS, PASS)
        counts = tl.zeros([BINS], tl.int32)
        for offset in range(0, items, BLOCK):
            offsets = offset + tl.arange(0, BLOCK)
            if in_list:
                key = tl.load(lists_ptr + offsets, mask=offsets < items, other=0xFFFFFFFF)
            else:
                key = _load_keys(x_ptr, offsets, offset + BLOCK, items, MAGNITUDE)
            digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
            if PASS == 0:
                counts += tl.histogram(digit, BINS)
            else:
                counts += tl.histogram(digit, BINS, mask=(key >> (SHIFT + DIGITS[PASS])) == prefix)
        counts_ptr = state_ptr + STATE + (PASS << DIGITS[0]) + tl.arange(0, BINS)
        tl.atomic_add(counts_ptr, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def result_kernel(
    tensors_ptr,  # [T, 6] int64, Table.tensors
    state_ptr,  # [T, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    tau_ptr,  # [T] DTYPE
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    LIST_SHARE: tl.constexpr,
):
    """Write the threshold of one tensor per program."""
    tensor = tl.program_id(0).to(tl.int64)
    state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
    is_low, is_high, _in_list, rank = locate(tensors_ptr + 6 * tensor, state_ptr, LIST_SHARE)
    if is_low | is_high:
        key = tl.load(state_ptr + tl.where(is_low, 0, 1)).to(tl.uint32)
    else:
        key, _equal = narrow(state_ptr + STATE, rank, DIGITS, len(DIGITS))
    tl.store(tau_ptr + tensor, from_order_key(key, DTYPE, MAGNITUDE))


def select(*, table: Table, tau: Tensor, workspace: Tensor, rule: str) -> None:
    """Write the threshold of every tensor: 8 launches for float32, 6 for 16-bit scores, and no host sync.

    Args:
        table: of :func:`make_table`, on the current device.
        tau: [T], contiguous, of the scores' dtype: the thresholds are written here, zero as +0.0.
        workspace: [>= workspace_size(table)] int64, any contents, for one call at a time.
        rule: "magnitude" or "value".
    """
    tensors, programs, dtype, _, config = table
    digits = DIGITS[dtype][rule == "value"]
    states = len(tensors) * state_size(dtype)
    form: dict[str, Any] = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == "magnitude", "DIGITS": digits}
    form |= {"STATE": STATE, "tensors_ptr": tensors, "state_ptr": workspace}
    tiles: dict[str, Any] = {"programs_ptr": programs, "lists_ptr": workspace[states:].view(torch.uint32)}
    tiles |= {"LIST_SHARE": LIST_SHARE, "items_each": config.items, "num_warps": config.num_warps}
    every_tensor, every_program = (len(tensors),), (len(programs),)
    sample_kernel[every_tensor](**form, SAMPLE=config.sample, num_warps=4)
    window_kernel[every_program](**form, **tiles, BLOCK=config.window_block, LANES=32 * config.num_warps)
    for i in range(len(digits)):
        shift = sum(digits[i + 1 :])
        digit_kernel[every_program](**form, **tiles, BLOCK=config.digit_block, PASS=i, SHIFT=shift)
    result_kernel[every_tensor](**form, tau_ptr=tau, LIST_SHARE=LIST_SHARE, num_warps=1)


def compile_cases() -> list[CompileCase]:
    """Every kernel in every form that :func:`select` can launch with ``CONFIGS``."""
    tensors = {"tensors_ptr": "*i64", "state_ptr": "*i64"}
    tiles = {**tensors, "programs_ptr": "*i64", "lists_ptr": "*u32", "items_each": "i32"}
    cases = []
    for dtype, rule, config in itertools.product(DTYPES, (0, 1), CONFIGS):
        digits, warps, name = DIGITS[dtype][rule], config.num_warps, f"{DTYPES[dtype]} {('|S|', 'S')[rule]}"
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0, "DIGITS": digits, "STATE": STATE}
        sample = {**form, "SAMPLE": config.sample}
        cases.append(CompileCase(f"sample {name}", sample_kernel, tensors, sample, num_warps=4))
        form["LIST_SHARE"] = LIST_SHARE
        result = {**tensors, "tau_ptr": f"*{DTYPES[dtype]}"}
        cases.append(CompileCase(f"result {name}", result_kernel, result, form, num_warps=1))
        window = {**form, "BLOCK": config.window_block, "LANES": 32 * warps}
        label = f"window {name} {config.window_block}"
        cases.append(CompileCase(label, window_kernel, tiles, window, num_warps=warps))
        for i in range(len(digits)):
            digit = {**form, "BLOCK": config.digit_block, "PASS": i, "SHIFT": sum(digits[i + 1 :])}
            label = f"digit {i} {name} {config.digit_block}"
            cases.append(CompileCase(label, digit_kernel, tiles, digit, num_warps=warps))
    return list({case.name: case for case in cases}.values())
