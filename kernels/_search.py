"""How the programs of one launch find the key of a given rank together: device functions.

The keys are those of a list, or those of all scores of a tensor (:func:`domain`). They are cut into digits, the most
significant one first, and a digit is found from counts of the keys that agree with the threshold so far. A few
thousand keys are counted by one program alone, in registers. More keys are cut into parts for a team of programs.

**Nobody waits for a program that has not begun.** A GPU may run the programs of a launch in any order and any number of
them at a time, so a program must not wait for a given other one. The parts of a digit therefore belong to nobody: a
program takes the next one that nobody has taken. It waits only when all parts of the digit are taken, and then those
who took them are running and wait for nothing. The one that completes the last part finds the digit and lets the others
go on. If programs run one after another, the first one does everything, and the others find it done.

**Order in memory.** All threads of a program add to the counts. A barrier puts these additions before the atomic of one
thread on ``STATE_COUNTED``, whose release makes them visible to the GPU. These atomics form a chain, so the acquire of
the last one synchronises with every one before it, and another barrier puts the reads of its program after it. In the
same way, what the last one writes comes before its release of ``STATE_STAGE``, with which the acquire in
:func:`wait_for` synchronises. What other programs write is read past the L1 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _layout as layout
from ._bits import from_order_key, order_key
from ._window import nan_key, settle


@triton.jit
def domain(row_ptr, state_ptr, alone, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """Which keys have to be searched for the threshold of a tensor. If it is an end of the window, there is nothing to
    search. If it is inside the window and the list did not run over, it is in the list, else among all scores. Up to
    ``alone`` keys are searched by one program.

    Returns:
        in_list: whether the keys are those of the list.
        hit: whether the threshold is an end of the window, or in the list.
        items: how many keys there are, 0 if the threshold is known.
        base: uint32, what all keys are above; the threshold itself if it is known.
        digits: how many digits the keys have above ``base``.
        rank: of the threshold among these keys.
        equal: how many scores have the threshold's key if it is known.
        each: how many keys a part has at most; a part has fewer than 2**31.
        parts: how many parts there are; 1 if one program is to search alone. So many programs can work.
    """
    low, high = tl.load(state_ptr + layout.STATE_LOW), tl.load(state_ptr + layout.STATE_HIGH)
    at_low, at_high = tl.load(state_ptr + layout.STATE_AT_LOW), tl.load(state_ptr + layout.STATE_AT_HIGH)
    listed, numel = tl.load(state_ptr + layout.STATE_LISTED), tl.load(row_ptr + layout.TENSOR_NUMEL)
    rank = tl.load(row_ptr + layout.TENSOR_RANK)
    beyond_below = rank - tl.load(state_ptr + layout.STATE_BELOW)
    beyond_low = beyond_below - at_low
    beyond_list = beyond_low - listed
    is_low = (beyond_below >= 0) & (beyond_low < 0)
    is_high = (beyond_list >= 0) & (beyond_list < at_high)
    fits = listed <= tl.load(row_ptr + layout.TENSOR_ROOM)
    in_list = (beyond_low >= 0) & (beyond_list < 0) & fits
    known = is_low | is_high

    items = tl.where(known, 0, tl.where(in_list, listed, numel))
    base = tl.where(is_high, high, tl.where(is_low | in_list, low, 0)).to(tl.uint32)
    span = tl.where(in_list, high - low, nan_key(DTYPE, MAGNITUDE).to(tl.int64))
    digits = 1 + (span >> 8 > 0).to(tl.int32) + (span >> 16 > 0).to(tl.int32) + (span >> 24 > 0).to(tl.int32)
    digits = tl.where(known, 0, digits)
    programs = tl.load(row_ptr + layout.TENSOR_PROGRAMS)
    each = tl.maximum(tl.cdiv(tl.cdiv(items, programs), BLOCK), 1) * BLOCK
    parts = tl.where(items <= alone, 1, tl.cdiv(items, each))
    each = tl.where(items <= alone, items, each)
    rank = tl.where(in_list, beyond_low, rank)
    return in_list, known | in_list, items, base, digits, rank, tl.where(is_low, at_low, at_high), each, parts


@triton.jit
def _count(
    x_ptr, keys_ptr, in_list, items, base, prefix, shift, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """[DIGIT_BINS] int32: how often each digit is at ``shift`` in those of ``items`` keys that have the digits of
    ``prefix`` before it, all above ``base``."""
    counts = tl.zeros([layout.DIGIT_BINS], tl.int32)
    for offset in range(0, items, BLOCK):
        place = offset + tl.arange(0, BLOCK)
        inside = place < items
        if in_list:
            key = tl.load(keys_ptr + place, mask=inside)
        else:
            key = order_key(tl.load(x_ptr + place, mask=inside), MAGNITUDE)
        digit = ((key - base) ^ prefix) >> shift
        counts += tl.histogram(digit.to(tl.int32), layout.DIGIT_BINS, mask=inside & (digit < layout.DIGIT_BINS))
    return counts


@triton.jit
def _take_digit(counts, rank, passed, prefix, shift):
    """The digit of the key of ``rank``, of whose domain ``passed`` keys lie below ``prefix``.

    Returns:
        prefix: with the digit.
        passed: how many keys lie below it.
        equal: how many agree with it.
    """
    bins, counts = tl.arange(0, layout.DIGIT_BINS), counts.to(tl.int64)
    digit = tl.sum((tl.cumsum(counts, 0) <= rank - passed).to(tl.int32), 0)
    passed += tl.sum(tl.where(bins < digit, counts, 0), 0)
    equal = tl.sum(tl.where(bins == digit, counts, 0), 0)
    return prefix | (digit.to(tl.uint32) << shift), passed, equal


@triton.jit
def wait_for(state_ptr, stage):
    """Wait until the search has come to ``stage``. What was written before is visible afterwards."""
    stage_ptr = state_ptr + layout.STATE_STAGE
    while tl.load(stage_ptr, volatile=True) < stage:
        pass  # reading does not keep others from adding, as an atomic would
    while tl.atomic_add(stage_ptr, tl.zeros((), tl.int64), sem="acquire") < stage:
        pass
    tl.debug_barrier()


@triton.jit
def _go_on(state_ptr, stage):
    """Let those go on who wait for ``stage``."""
    tl.debug_barrier()
    tl.atomic_xchg(state_ptr + layout.STATE_STAGE, tl.zeros((), tl.int64) + stage, sem="release")


@triton.jit
def _complete(state_ptr, digit, counts, taken, parts):
    """Add the counts of the parts that this program took. Returns whether these were the last ones of the digit."""
    counts_ptr = state_ptr + layout.STATE_COUNTS + tl.arange(0, layout.DIGIT_BINS)
    tl.atomic_add(counts_ptr, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    tl.debug_barrier()
    before = tl.atomic_add(state_ptr + layout.STATE_COUNTED + digit, taken, sem="acq_rel")
    tl.debug_barrier()
    return before + taken == parts


@triton.jit
def _take_part(state_ptr, digit):
    """A part of a digit that nobody else takes; none is left if it is not below the number of parts."""
    return tl.atomic_add(state_ptr + layout.STATE_TAKEN + digit, tl.full((), 1, tl.int64), sem="relaxed")


@triton.jit
def _find(
    x_ptr, keys_ptr, state_ptr, searched, begins, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The key of the threshold, how many scores have it, and whether this program is the one that found it. If there is
    only one part, that is the one that ``begins``, and it uses no memory."""
    in_list, _, items, base, digits, rank, equal, each, parts = searched
    together = parts > 1
    prefix, passed = tl.zeros((), tl.uint32), tl.zeros((), tl.int64)
    bins = tl.arange(0, layout.DIGIT_BINS)
    finds = begins
    for digit in range(digits):
        shift = (8 * (digits - 1 - digit)).to(tl.uint32)
        part = tl.where(begins, 0, parts)
        if together:
            # If these are of a later digit already, no part is left to take.
            prefix = tl.load(state_ptr + layout.STATE_PREFIX, cache_modifier=".cg").to(tl.uint32)
            passed = tl.load(state_ptr + layout.STATE_PASSED, cache_modifier=".cg")
            part = _take_part(state_ptr, digit)
        counts, taken = tl.zeros([layout.DIGIT_BINS], tl.int32), tl.zeros((), tl.int64)
        while part < parts:
            begin = part * each
            left = tl.minimum(items - begin, each).to(tl.int32)
            counts += _count(x_ptr + begin, keys_ptr + begin, in_list, left, base, prefix, shift, MAGNITUDE, BLOCK)
            taken += 1
            part += 1
            if together:
                part = _take_part(state_ptr, digit)
        sums = counts.to(tl.int64)
        finds = taken > 0
        if together & finds:
            finds = _complete(state_ptr, digit, counts, taken, parts)
        if together & finds:
            sums = tl.load(state_ptr + layout.STATE_COUNTS + bins, cache_modifier=".cg")
        if finds:
            prefix, passed, equal = _take_digit(sums, rank, passed, prefix, shift)
        if together & (digit < digits - 1):
            if finds:
                tl.debug_barrier()  # every thread has read
                tl.store(state_ptr + layout.STATE_COUNTS + bins, tl.zeros([layout.DIGIT_BINS], tl.int64))
                tl.store(state_ptr + layout.STATE_PREFIX, prefix.to(tl.int64))
                tl.store(state_ptr + layout.STATE_PASSED, passed)
                _go_on(state_ptr, digit + 1)
            wait_for(state_ptr, digit + 1)
    return base + prefix, equal, finds


@triton.jit
def find(
    row_ptr, state_ptr, lists_ptr, searched, workers, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the threshold of a tensor, and what follows from it if the tensor keeps a window. All ``workers`` programs
    have to call this; one that wants to read what is written calls ``wait_for(state_ptr, STAGE_FOUND)`` first.

    Args:
        row_ptr: int64 [TENSOR_COLUMNS].
        state_ptr: int64 [STATE_SIZE], cleared before this launch, and with the counts of the window.
        lists_ptr: the lists of all tensors.
        searched: of :func:`domain`.
        workers: how many programs work for this tensor.
        DTYPE: of the scores.
        MAGNITUDE: the rule.
        BLOCK: how many keys are read at a time.
    """
    _, hit, _, _, _, _, _, _, parts = searched
    x_ptr = tl.load(row_ptr + layout.TENSOR_SCORES).to(tl.pointer_type(DTYPE))
    keys_ptr = lists_ptr + tl.load(row_ptr + layout.TENSOR_LIST)
    begins = workers == 1
    if (workers > 1) & (parts == 1):
        begins = _take_part(state_ptr, 0) == 0
    key, equal, finds = _find(x_ptr, keys_ptr, state_ptr, searched, begins, MAGNITUDE, BLOCK)
    if finds:
        tau_ptr = tl.load(row_ptr + layout.TENSOR_TAU).to(tl.pointer_type(DTYPE))
        tl.store(tau_ptr, from_order_key(key, DTYPE, MAGNITUDE))
        window = tl.load(row_ptr + layout.TENSOR_WINDOW)
        if window != 0:
            room = tl.load(row_ptr + layout.TENSOR_ROOM)
            settle(window.to(tl.pointer_type(tl.int64)), state_ptr, room, key, equal, hit, DTYPE, MAGNITUDE)
        if workers > 1:
            _go_on(state_ptr, layout.STAGE_FOUND)
