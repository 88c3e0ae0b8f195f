"""The exact threshold of the next forward pass, out of the pass that updates the scores: the warm start.

Scores move slowly, and tau with them. An update of :mod:`.optimizer` writes the masked weight by a guess, the last tau,
and notes on the way where the new one may be: it counts the keys below a window around the guess and those equal to its
ends, and lists the keys strictly inside with their places. After it

1. ``threshold.digit_kernel`` finds the key of the wanted rank in the list, or, where that is not in the window or the
   list ran over, among all scores; not at all where it is an end of the window;
2. ``settle_kernel`` writes tau, and the window for the next time;
3. ``fix_kernel`` puts right the listed elements between the guess and tau; or the whole tensor, where the list does not
   tell: after a search through all scores, where the low end of the window is one of the two, or NaN.

Nothing is decided on the host, and the number of launches does not depend on the tensors. The result is exact whatever
the window says; it is the time that depends on it. The window follows tau: four times as far as tau moved of late, as
long as the list has room. A key that many scores share becomes an end of the window, where it is counted and not
listed, so that it cannot fill the list again and again.

A window is int64 [8]: 1 if there is one, its ends and the last tau as keys, how far tau moved, unused, and how many
updates found tau in the window and how many did not.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from ._bits import from_order_key, order_key
from ._compile import CompileCase
from ._elementwise import below, convert, table_pointer
from ._select_table import DIGITS, DTYPES, STATE
from .threshold import digit_kernel, locate, narrow, stretch
from .update_table import CONFIGS, FORMS, UpdateTable, Workspace

FIRST_REACH = {torch.float32: 1 << 17, torch.bfloat16: 2, torch.float16: 16}
"""Keys on either side of tau in the first window: 1/64 of an octave."""


@triton.jit
def nan_key(DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr):
    """The largest key that :func:`._bits.order_key` gives."""
    BITS: tl.constexpr = DTYPE.primitive_bitwidth
    INF: tl.constexpr = (1 << (BITS - 1)) - (1 << DTYPE.fp_mantissa_width)
    return tl.full((), INF + 1 if MAGNITUDE else INF + 1 + (1 << (BITS - 1)), tl.uint32)


@triton.jit
def open_window(
    window_ptr, state_ptr, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr, DIGITS: tl.constexpr, STATE: tl.constexpr
):
    """Clear the state of a tensor and write the ends of its window and the guess; no key reaches those of a window
    that makes no sense."""
    BINS: tl.constexpr = 1 << DIGITS[0]
    low, high, guess = tl.load(window_ptr + 1), tl.load(window_ptr + 2), tl.load(window_ptr + 3)
    known = (
        (tl.load(window_ptr) == 1) & (low >= 0) & (low <= guess) & (guess <= high) & (high <= nan_key(DTYPE, MAGNITUDE))
    )
    field = tl.arange(0, STATE)
    value = tl.where(field == 0, low, tl.where(field == 1, high, guess))
    value = tl.where(known, value, 0xFFFFFFFF)
    tl.store(state_ptr + field, tl.where((field < 2) | (field == 6), value, 0))
    for i in tl.static_range(len(DIGITS)):
        tl.store(state_ptr + STATE + i * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int64))


@triton.jit
def load_window(state_ptr, n, DTYPE: tl.constexpr, MAGNITUDE: tl.constexpr, LIST_SHARE: tl.constexpr):
    """What :func:`note` asks for: the ends, the least key that the guess keeps, and the room of the list."""
    guess = tl.load(state_ptr + 6).to(tl.uint32)
    guess = tl.where(guess == nan_key(DTYPE, MAGNITUDE), 0, guess)  # nothing is below NaN
    return tl.load(state_ptr).to(tl.uint32), tl.load(state_ptr + 1).to(tl.uint32), guess, n // LIST_SHARE


@triton.jit
def note(
    w, s, place, inside, window, masked_ptr, state_ptr, keys_ptr, places_ptr,
    MAGNITUDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the masked weight of a tile by the guess, and list what lies in the window; ``inside`` are the elements
    that the tensor has, or None for all.

    Returns:
        [LANES] int32, for each thread: keys below the window, at its low end and at its high end, 8 bits each.
    """
    low, high, guess, room = window
    key = order_key(s, MAGNITUDE)
    masked = convert(w, masked_ptr.dtype.element_ty)
    tl.store(masked_ptr, tl.where(key < guess, tl.zeros_like(masked), masked), mask=inside)
    between = (key > low) & (key < high)
    kind = tl.where(key < low, 1, tl.where(key == low, 1 << 8, tl.where(key == high, 1 << 16, 0)))
    if inside is not None:
        between &= inside
        kind = tl.where(inside, kind, 0)
    found = tl.sum(between.to(tl.int32), 0)
    if found > 0:
        begin = tl.atomic_add(state_ptr + 5, found.to(tl.int64), sem="relaxed")
        if begin + found <= room:
            slot = begin + tl.cumsum(between.to(tl.int32), 0) - 1
            tl.store(keys_ptr + slot, key, mask=between)
            tl.store(places_ptr + slot, place, mask=between)
    return tl.sum(kind.reshape(LANES, kind.numel // LANES), 1)


@triton.jit
def add_counts(state_ptr, counts):
    """Add to the state what :func:`note` counted, summed over a program's tiles."""
    tl.atomic_add(state_ptr + 2, tl.sum(counts & 0xFF, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + 3, tl.sum((counts >> 8) & 0xFF, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(state_ptr + 4, tl.sum((counts >> 16) & 0xFF, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _next_window(window_ptr, state_ptr, key, equal, hit, room, LARGEST, FIRST_REACH: tl.constexpr):
    """Write the window around ``key``, which ``equal`` scores have, from what was seen of this one."""
    low, high = tl.load(state_ptr), tl.load(state_ptr + 1)
    listed, guess = tl.load(state_ptr + 5), tl.load(state_ptr + 6)
    warm = guess <= LARGEST
    moved = tl.where(warm, tl.abs(key - guess), FIRST_REACH // 4).to(tl.float32)
    before = tl.where(warm, tl.load(window_ptr + 4), 0).to(tl.float32)
    moved = tl.maximum(moved, 0.75 * tl.minimum(tl.maximum(before, 0.0), 4.3e9))
    # As many keys to either side as make a list of a quarter of the room, if they are as dense as they were.
    others = tl.maximum(listed - tl.where((low < key) & (key < high), equal, 0), 0)
    most = room.to(tl.float32) / 8 * (high - low).to(tl.float32) / (others + 1).to(tl.float32)
    most = tl.maximum(tl.where(warm, most, FIRST_REACH), 1.0)
    reach = tl.minimum(tl.maximum(4 * moved, most / 16), tl.minimum(most, 4.3e9))
    reach = tl.maximum(reach, 1.0).to(tl.int64)
    above = tl.where(equal > room // 4, 0, reach)  # a common key is to be the end itself
    tl.store(window_ptr, tl.full((), 1, tl.int64))
    tl.store(window_ptr + 1, tl.maximum(key - reach, 0))
    tl.store(window_ptr + 2, tl.minimum(key + above, LARGEST))
    tl.store(window_ptr + 3, key)
    tl.store(window_ptr + 4, moved.to(tl.int64))
    count_ptr = window_ptr + tl.where(hit, 6, 7)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def settle_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, 6] int64, UpdateTable.tensors
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    tensors,
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    FIRST_REACH: tl.constexpr,
):
    """Write the threshold of one tensor per program, its next window, and what is left to do: nothing (0), the list (1)
    or the whole tensor (2)."""
    tensor = tl.program_id(0).to(tl.int64)
    row_ptr = tensors_ptr + 6 * tensor
    state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
    is_low, is_high, in_list, rank = locate(row_ptr, state_ptr, LIST_SHARE)
    if is_low | is_high:
        found = tl.load(state_ptr + tl.where(is_low, 0, 1)).to(tl.uint32)
        equal = tl.load(state_ptr + tl.where(is_low, 3, 4))
    else:
        found, equal = narrow(state_ptr + STATE, rank, DIGITS, len(DIGITS))
    tau_ptr = table_pointer(fields_ptr, 8, tensor, tensors, DTYPE, False)
    window_ptr = table_pointer(fields_ptr, 9, tensor, tensors, tl.int64, False)
    tl.store(tau_ptr, from_order_key(found, DTYPE, MAGNITUDE))

    key = found.to(tl.int64)
    low, guess = tl.load(state_ptr), tl.load(state_ptr + 6)
    room = tl.load(row_ptr + 1) // LIST_SHARE
    largest = nan_key(DTYPE, MAGNITUDE).to(tl.int64)
    hit = is_low | is_high | in_list
    # All between guess and tau is in the list: neither lies at the low end, nor is NaN, which keeps everything.
    told = hit & (tl.load(state_ptr + 5) <= room) & (tl.minimum(key, guess) > low) & (tl.maximum(key, guess) < largest)
    tl.store(state_ptr + 7, tl.where(key == guess, 0, tl.where(told, 1, 2)).to(tl.int64))
    _next_window(window_ptr, state_ptr, key, equal, hit, room, largest, FIRST_REACH)


@triton.jit
def fix_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, 6] int64, UpdateTable.tensors
    programs_ptr,  # [P, 2] int64, UpdateTable.programs
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Put the masked weight right where the guess was wrong."""
    tensor, row_ptr, start, items, s_ptr = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
    action = tl.load(state_ptr + 7)
    if action > 0:
        w_ptr = table_pointer(fields_ptr, 0, tensor, tensors, DTYPE, ALIGNED)
        masked_ptr = table_pointer(fields_ptr, 7, tensor, tensors, MASKED, ALIGNED)
        tau = tl.load(table_pointer(fields_ptr, 8, tensor, tensors, DTYPE, False))
        lane = tl.arange(0, BLOCK)
        if action == 1:
            first = tl.load(row_ptr + 3) + start // LIST_SHARE
            left = tl.minimum(tl.load(state_ptr + 5) - start // LIST_SHARE, items_each // LIST_SHARE).to(tl.int32)
            least, guess = order_key(tau, MAGNITUDE), tl.load(state_ptr + 6).to(tl.uint32)
            for offset in range(0, left, BLOCK):
                inside = offset + lane < left
                key = tl.load(keys_ptr + first + offset + lane, mask=inside, other=0)
                wrong = inside & ((key < least) != (key < guess))
                place = tl.load(places_ptr + first + offset + lane, mask=wrong, other=0)
                w = convert(tl.load(w_ptr + place, mask=wrong), MASKED)
                tl.store(masked_ptr + place, tl.where(key < least, tl.zeros_like(w), w), mask=wrong)
        else:
            start = start // BLOCK * BLOCK  # as it is, and now the compiler sees it
            whole = items // BLOCK * BLOCK
            for offset in range(0, whole, BLOCK):
                _gate_tile(
                    w_ptr + start + offset, s_ptr + offset, masked_ptr + start + offset, tau, None, MAGNITUDE, BLOCK
                )
            if whole < items:
                at = start + whole
                inside = lane < items - whole
                _gate_tile(w_ptr + at, s_ptr + whole, masked_ptr + at, tau, inside, MAGNITUDE, BLOCK)


@triton.jit
def _gate_tile(w_ptr, s_ptr, masked_ptr, tau, inside, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    drop = below(tl.load(s_ptr + lane, mask=inside), tau, MAGNITUDE)
    w = convert(tl.load(w_ptr + lane, mask=inside), masked_ptr.dtype.element_ty)
    tl.store(masked_ptr + lane, tl.where(drop, tl.zeros_like(w), w), mask=inside)


def settle(table: UpdateTable, workspace: Workspace, *, rule: str) -> None:
    """After the update of ``table``: the thresholds, the masked weights and the windows of all its tensors, in 7
    launches for float32 scores and 5 for 16-bit ones.

    Args:
        table: with ``next``.
        workspace: as the update left it.
        rule: "magnitude" or "value".
    """
    config, digits = table.config, DIGITS[table.dtype][rule == "value"]
    every_tensor, every_program = (len(table.tensors),), (len(table.programs),)
    form: dict[str, Any] = {"tensors_ptr": table.tensors, "state_ptr": workspace.state, "DTYPE": DTYPES[table.dtype]}
    form |= {"MAGNITUDE": rule == "magnitude", "DIGITS": digits, "STATE": STATE, "LIST_SHARE": config.share}
    tiles: dict[str, Any] = {"programs_ptr": table.programs, "items_each": config.items}
    for i in range(len(digits)):
        digit_kernel[every_program](
            **form,
            **tiles,
            lists_ptr=workspace.keys,
            BLOCK=config.digit_block,
            PASS=i,
            SHIFT=sum(digits[i + 1 :]),
            num_warps=config.num_warps,
        )
    fields: dict[str, Any] = {"fields_ptr": table.fields, "tensors": len(table.tensors)}
    settle_kernel[every_tensor](**form, **fields, FIRST_REACH=FIRST_REACH[table.dtype], num_warps=1)
    fix_kernel[every_program](
        **form,
        **tiles,
        **fields,
        keys_ptr=workspace.keys,
        places_ptr=workspace.places,
        MASKED=DTYPES[table.masked],
        BLOCK=config.block,
        ALIGNED=table.aligned,
        num_warps=config.num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """The kernels here in the forms that :func:`settle` can launch."""
    shared = {"fields_ptr": "*i64", "tensors_ptr": "*i64", "state_ptr": "*i64", "tensors": "i32"}
    tiles = {"programs_ptr": "*i64", "keys_ptr": "*u32", "places_ptr": "*i64", "items_each": "i32"}
    cases = []
    for (dtype, masked), rule, config in itertools.product(FORMS, (0, 1), CONFIGS):
        form = {"DTYPE": DTYPES[dtype], "MAGNITUDE": rule == 0, "DIGITS": DIGITS[dtype][rule], "STATE": STATE}
        form["LIST_SHARE"] = config.share
        name = f"{DTYPES[dtype]} {('|S|', 'S')[rule]}"
        settled = {**form, "FIRST_REACH": FIRST_REACH[dtype]}
        cases.append(CompileCase(f"settle {name} {config.share}", settle_kernel, shared, settled, num_warps=1))
        fixed = {**form, "MASKED": DTYPES[masked], "BLOCK": config.block, "ALIGNED": True}
        label = f"fix {name} {DTYPES[masked]} {config.block} {config.share}"
        cases.append(CompileCase(label, fix_kernel, {**shared, **tiles}, fixed, num_warps=config.num_warps))
    return list({case.name: case for case in cases}.values())
