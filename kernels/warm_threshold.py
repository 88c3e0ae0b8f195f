"""The exact threshold of the next forward pass, found from what the update of the scores noted: the warm start.

Scores move slowly, and so does tau. An update of :mod:`.optimizer_step` writes the masked weight by a guess: the last
tau, and on from there as tau moved of late. While it does so it notes where the new tau may be: it counts the keys
below a window around the guess and those equal to the window's ends, and it lists the keys strictly inside, with their
places. After the update, one launch of ``settle_kernel``

1. finds the key of the wanted rank. There are three cases. If the key is an end of the window, there is nothing to
   search. If it is inside the window and the list did not run over, the search is in the list. Otherwise the search is
   among all scores. The program that finds tau writes it, and the window for the next time;
2. corrects the masked weight: for the listed elements between the guess and tau, or for the whole tensor if some of
   these elements are not in the list. That is the case after a search through all scores, and if the guess or tau is
   the low end of the window, or NaN.

How the programs share this work is told in :mod:`._search`. Nothing is decided on the host, and the number of launches
does not depend on the tensors. The result is exact for every window; only the time depends on it. The window follows
tau: it reaches four times as far as tau was from the guess of late, as long as the list has room. A key that many
scores share becomes an end of the window, where it is counted and not listed, so that it cannot fill the list again and
again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _layout as layout
from ._bits import order_key
from ._elementwise import FP_FUSION, below, convert, is_magnitude, table_pointer
from ._search import domain, find, wait_for
from ._window import nan_key
from .threshold import membership, stretch
from .threshold_table import DTYPES, SEARCH_REGISTERS
from .update_table import UpdateTable, Workspace

WARPS = 4
"""How many warps a program of ``settle_kernel`` has."""


@triton.jit
def load_window(row_ptr, state_ptr, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The window as :func:`note` takes it: its ends, the smallest key that the guess keeps, the room of the list."""
    guess = tl.load(state_ptr + layout.STATE_GUESS).to(tl.uint32)
    guess = tl.where(guess == nan_key(DTYPE, MAGNITUDE), 0, guess)  # a threshold of NaN drops nothing
    low = tl.load(state_ptr + layout.STATE_LOW).to(tl.uint32)
    high = tl.load(state_ptr + layout.STATE_HIGH).to(tl.uint32)
    return low, high, guess, tl.load(row_ptr + layout.TENSOR_ROOM)


@triton.jit
def list_has_room(row_ptr, state_ptr, LANES: tl.constexpr):
    """[LANES] int1: whether a thread may list keys. Once the list has run over, nobody looks at it any more."""
    listed = tl.load(state_ptr + layout.STATE_LISTED, cache_modifier=".cg")  # the L1 cache may have an old number
    return listed + tl.zeros([LANES], tl.int64) <= tl.load(row_ptr + layout.TENSOR_ROOM)


@triton.jit
def note(
    w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
    MAGNITUDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the masked weight of a tile by the guess, and list the keys that lie in the window. ``first`` is the place
    of the tile in its tensor; ``inside`` tells which elements belong to the tensor, and None means all of them;
    ``lists`` is that of :func:`list_has_room`.

    Each thread reserves places in the list for its own keys. So no thread waits for another, and one without such keys
    waits for nothing. A thread that sees the list run over only counts its keys from then on.

    Returns:
        counts: [LANES] int32, for each thread: keys below the window, at its low end, at its high end, and those in it
            that the state does not count yet, 8 bits each.
        lists: for the next tile.
    """
    low, high, guess, _ = window
    key = order_key(s, MAGNITUDE)
    masked = convert(tl.where(key < guess, tl.zeros_like(w), w), masked_ptr.dtype.element_ty)
    tl.store(masked_ptr, masked, mask=inside)
    EACH: tl.constexpr = key.numel // LANES
    thread = tl.arange(0, LANES)
    if len(key.shape) == 4:  # [groups, warps, 32, 4]: a thread has groups of four, 128 elements apart
        key = tl.permute(key, (1, 2, 0, 3))
        GROUP: tl.constexpr = 4
        first += thread // 32 * (EACH * 32) + thread % 32 * GROUP
    else:
        GROUP: tl.constexpr = EACH
        first += thread * GROUP
    key = key.reshape(LANES, EACH)
    if inside is not None:
        inside = inside.reshape(LANES, EACH)
    if LANES == 32:  # the threads of a single warp can go around what few tiles need
        below_low = key < low if inside is None else inside & (key < low)
        counts = tl.sum(below_low.to(tl.int32), 1)
        # Less the low end, and modulo 2^32, the keys of the window are the smallest.
        if tl.min(key - low) <= high - low:
            counts, lists = _list(
                key, inside, first, window, lists, state_ptr, keys_ptr, places_ptr, EACH=EACH, GROUP=GROUP
            )
    else:
        counts, lists = _list(
            key, inside, first, window, lists, state_ptr, keys_ptr, places_ptr, EACH=EACH, GROUP=GROUP
        )
    return counts, lists


@triton.jit
def _list(
    key, inside, first, window, lists, state_ptr, keys_ptr, places_ptr, EACH: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Count and list the keys of a tile, [threads, EACH], as :func:`note` does. ``first`` is the place of each thread's
    first key; a thread has groups of GROUP keys, 128 places apart."""
    low, high, _, room = window
    kind = tl.where(key < high, 1 << 24, tl.where(key == high, 1 << 16, 0))
    kind = tl.where(key < low, 1, tl.where(key == low, 1 << 8, kind))
    if inside is not None:
        kind = tl.where(inside, kind, 0)
    counts = tl.sum(kind, 1)
    found = counts >> 24
    asks = lists & (found > 0)
    listed_ptr = state_ptr + layout.STATE_LISTED + tl.zeros_like(found)
    slot = tl.atomic_add(listed_ptr, found.to(tl.int64), mask=asks, sem="relaxed")
    lists &= (asks == 0) | (slot + found <= room)
    for group in tl.static_range(EACH // GROUP):
        for column in tl.static_range(GROUP):
            this = tl.arange(0, EACH)[None, :] == group * GROUP + column
            listed = asks & (tl.sum(tl.where(this, kind, 0), 1) >> 24 > 0)
            mask = listed & (slot < room)
            tl.store(keys_ptr + slot, tl.sum(tl.where(this, key, 0), 1), mask=mask)
            tl.store(places_ptr + slot, first + (group * 128 + column), mask=mask)
            slot += listed.to(tl.int64)
    return tl.where(asks, counts & 0xFFFFFF, counts), lists


@triton.jit
def add_counts(state_ptr, counts):
    """Add to the state what :func:`note` counted in all tiles of a program, which are fewer than 2^16 keys, and at most
    255 of a thread."""
    below_and_high, low_and_listed = pairs(counts)
    add_pairs(state_ptr, below_and_high, low_and_listed)


@triton.jit
def pairs(counts):
    """The counts of :func:`note` as two numbers, in which each has 16 bits: for sums that 8 bits cannot hold."""
    return counts & 0xFF00FF, (counts >> 8) & 0xFF00FF


@triton.jit
def add_pairs(state_ptr, below_and_high, low_and_listed):
    """:func:`add_counts` for sums of :func:`pairs`."""
    pair = tl.sum(below_and_high.to(tl.uint32), 0).to(tl.int64)  # two sums in one number
    tl.atomic_add(state_ptr + layout.STATE_BELOW, pair & 0xFFFF, sem="relaxed")
    tl.atomic_add(state_ptr + layout.STATE_AT_HIGH, pair >> 16, sem="relaxed")
    pair = tl.sum(low_and_listed.to(tl.uint32), 0).to(tl.int64)
    tl.atomic_add(state_ptr + layout.STATE_AT_LOW, pair & 0xFFFF, sem="relaxed")
    tl.atomic_add(state_ptr + layout.STATE_LISTED, pair >> 16, mask=pair >> 16 > 0, sem="relaxed")


@triton.jit
def _workers(searched, row_ptr, state_ptr, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr, FIX: tl.constexpr):
    """How many programs have work for a tensor: to search, and then to correct the list, or the whole tensor. The
    latter is known before the search, as :func:`._window.settle` decides it."""
    in_list, hit, _, base, _, _, _, _, parts = searched
    low, guess = tl.load(state_ptr + layout.STATE_LOW), tl.load(state_ptr + layout.STATE_GUESS)
    listed, room = tl.load(state_ptr + layout.STATE_LISTED), tl.load(row_ptr + layout.TENSOR_ROOM)
    largest = nan_key(DTYPE, MAGNITUDE).to(tl.int64)
    key = tl.where(in_list, guess, base.to(tl.int64))  # a key in the list is neither the low end nor NaN
    told = hit & (listed <= room) & (tl.minimum(key, guess) > low) & (tl.maximum(key, guess) < largest)
    programs = tl.load(row_ptr + layout.TENSOR_PROGRAMS)
    corrected = tl.where(told, tl.cdiv(listed, FIX), programs)
    return tl.minimum(tl.maximum(tl.maximum(parts, corrected), 1), programs)


@triton.jit(
    do_not_specialize=[
        "fields_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "keys_ptr", "places_ptr", "tensors", "items_each",
        "alone",
    ]
)  # fmt: skip
def settle_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, UpdateTable.programs
    state_ptr,  # [tensors, STATE_SIZE] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    alone,  # so many keys are searched by one program
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,  # of the masked weight, if all of it is corrected
    DIGIT: tl.constexpr,  # keys that are counted at a time
    FIX: tl.constexpr,  # listed elements that are corrected at a time
    ALIGNED: tl.constexpr,
):
    """Find the threshold, and correct the masked weight where the guess was wrong."""
    tensor, member = membership(tensors_ptr, programs_ptr)
    row_ptr, state_ptr = tensors_ptr + layout.TENSOR_COLUMNS * tensor, layout.state_of(state_ptr, tensor)
    searched = domain(row_ptr, state_ptr, alone, DTYPE, MAGNITUDE, DIGIT)
    workers = _workers(searched, row_ptr, state_ptr, DTYPE, MAGNITUDE, FIX)
    if member < workers:
        find(row_ptr, state_ptr, keys_ptr, searched, workers, DTYPE, MAGNITUDE, DIGIT)
        if workers > 1:
            wait_for(state_ptr, layout.STAGE_FOUND)
        else:
            tl.debug_barrier()
        action = tl.load(state_ptr + layout.STATE_ACTION, cache_modifier=".cg")
        tau = tl.load(tl.load(row_ptr + layout.TENSOR_TAU).to(tl.pointer_type(DTYPE)), cache_modifier=".cg")
        w_ptr = table_pointer(fields_ptr, layout.FIELD_WEIGHT, tensor, tensors, DTYPE, ALIGNED)
        masked_ptr = table_pointer(fields_ptr, layout.FIELD_MASKED, tensor, tensors, MASKED, ALIGNED)
        if action == layout.ACTION_LIST:
            first = tl.load(row_ptr + layout.TENSOR_LIST)
            _fix_list(
                w_ptr, masked_ptr, state_ptr, keys_ptr + first, places_ptr + first, tau, member, workers, MAGNITUDE, FIX
            )
        if action == layout.ACTION_ALL:
            _, _, start, items, s_ptr = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
            start = start // BLOCK * BLOCK  # the same number, but now the compiler sees that BLOCK divides it
            _gate(w_ptr + start, s_ptr, masked_ptr + start, items, tau, MAGNITUDE, BLOCK)


@triton.jit
def _fix_list(
    w_ptr, masked_ptr, state_ptr, keys_ptr, places_ptr, tau, member, workers, MAGNITUDE: tl.constexpr, FIX: tl.constexpr
):  # fmt: skip
    """Write the masked weight of this program's share of the listed elements between the guess and ``tau``."""
    listed, guess = tl.load(state_ptr + layout.STATE_LISTED), tl.load(state_ptr + layout.STATE_GUESS).to(tl.uint32)
    least = order_key(tau, MAGNITUDE)
    for offset in range(member * FIX, listed, workers * FIX):
        lane = offset + tl.arange(0, FIX)
        inside = lane < listed
        key = tl.load(keys_ptr + lane, mask=inside, other=0)
        wrong = inside & ((key < least) != (key < guess))
        place = tl.load(places_ptr + lane, mask=wrong, other=0)
        w = convert(tl.load(w_ptr + place, mask=wrong), masked_ptr.dtype.element_ty)
        tl.store(masked_ptr + place, tl.where(key < least, tl.zeros_like(w), w), mask=wrong)


@triton.jit
def _gate(w_ptr, s_ptr, masked_ptr, items, tau, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """Write the masked weight of ``items`` elements."""
    whole = items // BLOCK * BLOCK
    for offset in range(0, whole, BLOCK):
        _gate_tile(w_ptr + offset, s_ptr + offset, masked_ptr + offset, tau, None, MAGNITUDE, BLOCK)
    if whole < items:
        inside = tl.arange(0, BLOCK) < items - whole
        _gate_tile(w_ptr + whole, s_ptr + whole, masked_ptr + whole, tau, inside, MAGNITUDE, BLOCK)


@triton.jit
def _gate_tile(w_ptr, s_ptr, masked_ptr, tau, inside, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    drop = below(tl.load(s_ptr + lane, mask=inside), tau, MAGNITUDE)
    w = convert(tl.load(w_ptr + lane, mask=inside), masked_ptr.dtype.element_ty)
    tl.store(masked_ptr + lane, tl.where(drop, tl.zeros_like(w), w), mask=inside)


def settle(table: UpdateTable, workspace: Workspace, *, rule: str) -> None:
    """Complete the update of ``table`` in one launch: write the thresholds, correct the masked weights and move the
    windows of all its tensors.

    Args:
        table: with ``next``.
        workspace: as the update left it.
        rule: "magnitude" or "value".
    """
    config = table.config
    settle_kernel[(len(table.programs),)](
        fields_ptr=table.fields,
        tensors_ptr=table.tensors,
        programs_ptr=table.programs,
        state_ptr=workspace.state,
        keys_ptr=workspace.keys,
        places_ptr=workspace.places,
        tensors=len(table.tensors),
        items_each=config.items,
        alone=config.alone,
        DTYPE=DTYPES[table.dtype],
        MASKED=DTYPES[table.masked],
        MAGNITUDE=is_magnitude(rule),
        BLOCK=config.block,
        DIGIT=config.digit_block,
        FIX=config.fix_block,
        ALIGNED=table.aligned,
        num_warps=WARPS,
        maxnreg=SEARCH_REGISTERS,
        **FP_FUSION,
    )
