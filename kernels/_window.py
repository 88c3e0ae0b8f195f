"""The window that stays with a tensor from step to step, where the next threshold is expected: device functions that
open a search with it, and move it after the search.

``_layout.WINDOW_...`` names the eight numbers of a window. What it is for is told in :mod:`.warm_threshold`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _layout as layout


@triton.jit
def nan_key(DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The largest key that :func:`._bits.order_key` gives."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INF: tl.constexpr = (1 << (BITS - 1)) - (1 << DTYPE.fp_mantissa_width)
    return tl.full((), INF + 1 if MAGNITUDE else INF + 1 + (1 << (BITS - 1)), tl.uint32)


@triton.jit
def clear_state(state_ptr, low, high, guess):
    """Clear the state of a tensor, but for the ends of the window and the guess."""
    field = tl.arange(0, layout.STATE_COUNTS)
    is_low, is_high, is_guess = field == layout.STATE_LOW, field == layout.STATE_HIGH, field == layout.STATE_GUESS
    value = tl.where(is_low, low, tl.where(is_high, high, tl.where(is_guess, guess, 0)))
    tl.store(state_ptr + field, value.to(tl.int64))
    bins = tl.arange(0, layout.DIGIT_BINS)
    tl.store(state_ptr + layout.STATE_COUNTS + bins, tl.zeros([layout.DIGIT_BINS], tl.int64))


@triton.jit
def open_window(window_ptr, state_ptr, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Clear the state of a tensor and write the ends of its window and the guess. If the stored window is invalid,
    all three are set to 0xFFFFFFFF, which is above every key."""
    low = tl.load(window_ptr + layout.WINDOW_LOW)
    high = tl.load(window_ptr + layout.WINDOW_HIGH)
    guess = tl.load(window_ptr + layout.WINDOW_GUESS)
    known = tl.load(window_ptr + layout.WINDOW_KNOWN) == 1
    known = known & (low >= 0) & (low <= guess) & (guess <= high) & (high <= nan_key(DTYPE, MAGNITUDE))
    low = tl.where(known, low, 0xFFFFFFFF)
    high = tl.where(known, high, 0xFFFFFFFF)
    guess = tl.where(known, guess, 0xFFFFFFFF)
    clear_state(state_ptr, low, high, guess)


@triton.jit
def settle(window_ptr, state_ptr, room, found, equal, hit, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """Write what ``settle_kernel`` has to do, and the next window.

    Args:
        window_ptr: int64 [WINDOW_SIZE].
        state_ptr: int64 [STATE_SIZE], the state of the search that is over.
        room: how many keys the list of the tensor has room for.
        found: uint32, the key of the threshold.
        equal: how many scores have it.
        hit: whether the search needed no more than the window and the list.
        DTYPE: of the scores.
        MAGNITUDE: the rule.
    """
    key = found.to(tl.int64)
    low, guess = tl.load(state_ptr + layout.STATE_LOW), tl.load(state_ptr + layout.STATE_GUESS)
    listed = tl.load(state_ptr + layout.STATE_LISTED)
    largest = nan_key(DTYPE, MAGNITUDE).to(tl.int64)
    # The list holds all elements between guess and tau if neither lies at the low end or is NaN, which keeps
    # everything.
    told = hit & (listed <= room) & (tl.minimum(key, guess) > low) & (tl.maximum(key, guess) < largest)
    action = tl.where(key == guess, layout.ACTION_NONE, tl.where(told, layout.ACTION_LIST, layout.ACTION_ALL))
    tl.store(state_ptr + layout.STATE_ACTION, action.to(tl.int64))
    # At first a window reaches 2^17 keys of float32 to either side of tau, 2 of bfloat16, 16 of float16: about 1 % of
    # it.
    FIRST_REACH: tl.constexpr = 1 << (DTYPE.fp_mantissa_width - 6)
    _move_window(window_ptr, state_ptr, key, equal, hit, room, largest, FIRST_REACH)


@triton.jit
def _drift(window_ptr, key, guess):
    """How far the threshold moves in a step: the mean of what was expected and of what it did, towards zero."""
    before = tl.minimum(tl.maximum(tl.load(window_ptr + layout.WINDOW_DRIFT), -(1 << 32)), 1 << 32)
    # The threshold was at guess - before, so that it moved by key - guess + before.
    both = 2 * before + key - guess
    return tl.where(both < 0, -(-both >> 1), both >> 1)


@triton.jit
def _move_window(window_ptr, state_ptr, key, equal, hit, room, LARGEST, FIRST_REACH: tl.constexpr):
    """Write the next window, around the threshold ``key``, which ``equal`` scores have."""
    low, high = tl.load(state_ptr + layout.STATE_LOW), tl.load(state_ptr + layout.STATE_HIGH)
    listed, guess = tl.load(state_ptr + layout.STATE_LISTED), tl.load(state_ptr + layout.STATE_GUESS)
    warm = guess <= LARGEST
    missed_by = tl.where(warm, tl.abs(key - guess), FIRST_REACH // 4).to(tl.float32)
    before = tl.where(warm, tl.load(window_ptr + layout.WINDOW_MISSED_BY), 0).to(tl.float32)
    missed_by = tl.maximum(missed_by, 0.75 * tl.minimum(tl.maximum(before, 0.0), 4.3e9))
    # The reach with which the list would be a quarter full, if keys are as dense as in the last window.
    others = tl.maximum(listed - tl.where((low < key) & (key < high), equal, 0), 0)
    most = room.to(tl.float32) / 8 * (high - low).to(tl.float32) / (others + 1).to(tl.float32)
    most = tl.maximum(tl.where(warm, most, FIRST_REACH), 1.0)
    reach = tl.minimum(tl.maximum(4 * missed_by, most / 16), tl.minimum(most, 4.3e9))
    reach = tl.maximum(reach, 1.0).to(tl.int64)
    is_common = equal > room // 4  # then the key is to be the end of the window itself
    drift = tl.where(warm & (is_common == 0), _drift(window_ptr, key, guess), 0)
    expected = tl.minimum(tl.maximum(key + drift, 0), tl.maximum(key, LARGEST - 1))
    tl.store(window_ptr + layout.WINDOW_KNOWN, tl.full((), 1, tl.int64))
    tl.store(window_ptr + layout.WINDOW_LOW, tl.maximum(expected - reach, 0))
    tl.store(window_ptr + layout.WINDOW_HIGH, tl.minimum(tl.where(is_common, key, expected + reach), LARGEST))
    tl.store(window_ptr + layout.WINDOW_GUESS, expected)
    tl.store(window_ptr + layout.WINDOW_MISSED_BY, missed_by.to(tl.int64))
    tl.store(window_ptr + layout.WINDOW_DRIFT, drift)
    count_ptr = window_ptr + tl.where(hit, layout.WINDOW_HITS, layout.WINDOW_MISSES)
    tl.store(count_ptr, tl.load(count_ptr) + 1)
