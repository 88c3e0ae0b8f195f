"""One tile of an update whose running means are stored in fewer bytes.

A whole tile has the shape [EACH, WARPS, 32, 4]: a thread has EACH groups of four elements, 128 elements apart. With two
of them, which 8 bits need, each warp has a whole block of elements with one scale. At the end of a tensor a tile is a
single block, [256], in all warps together, which need fewer registers then: with a bounds check for every element they
would not have enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _layout as layout
from ._elementwise import convert, widen
from ._means import (
    ALONG,
    BFLOAT16,
    BLOCK,
    EIGHT_BITS,
    FLOAT32,
    INFINITY,
    ONWARD,
    decode,
    encode_8bit,
    encode_bfloat16,
    largest,
)
from ._update_rules import adamw, gradients, load_settings, rough_adamw, running_means, sgd
from .warm_threshold import note


@triton.jit
def offsets(EACH: tl.constexpr, WARPS: tl.constexpr):
    """The places of the elements of a whole tile, [EACH, WARPS, 32, 4]."""
    return (
        tl.arange(0, EACH)[:, None, None, None] * 128
        + tl.arange(0, WARPS)[None, :, None, None] * (EACH * 128)
        + tl.arange(0, 32)[None, None, :, None] * 4
        + tl.arange(0, 4)[None, None, None, :]
    )


@triton.jit
def _load_union(union_ptr, at, left, EACH: tl.constexpr, WARPS: tl.constexpr, TAIL: tl.constexpr):
    """For four elements of a thread the byte that has their bits."""
    if TAIL:
        four = tl.arange(0, BLOCK // 4)
        return tl.load(union_ptr + at // 8 + four // 2, mask=four * 4 < left)
    else:
        return tl.load(union_ptr + at // 8 + _fours(EACH, WARPS) // 2)


@triton.jit
def _fours(EACH: tl.constexpr, WARPS: tl.constexpr):
    """The places of a whole tile's groups of four elements, divided by 4: [EACH, WARPS, 32]."""
    return (
        tl.arange(0, EACH)[:, None, None] * 32
        + tl.arange(0, WARPS)[None, :, None] * (EACH * 32)
        + tl.arange(0, 32)[None, None, :]
    )


@triton.jit
def _frozen(byte, EACH: tl.constexpr, WARPS: tl.constexpr, TAIL: tl.constexpr):
    """Which elements are frozen."""
    if TAIL:
        bits = (byte.to(tl.int32) >> (tl.arange(0, BLOCK // 4) % 2 * 4))[:, None] >> tl.arange(0, 4)[None, :]
        return ((bits & 1) != 0).reshape(BLOCK)
    else:
        bits = (byte.to(tl.int32) >> (_fours(EACH, WARPS) % 2 * 4))[:, :, :, None]
        return ((bits >> tl.arange(0, 4)[None, None, None, :]) & 1) != 0


@triton.jit
def _load_mean(mean, at, lane, inside, STORAGE: tl.constexpr):
    """The stored values of a tile, and their scale; without scales anything."""
    values_ptr, scales_ptr = mean
    values = tl.load(values_ptr + at + lane, mask=inside)
    return values, tl.load(scales_ptr + at // BLOCK) if STORAGE == EIGHT_BITS else values


@triton.jit
def _store_mean(
    mean, x, most, at, lane, inside, r, STORAGE: tl.constexpr, SIGNED: tl.constexpr, SPECIAL: tl.constexpr
):  # fmt: skip
    values_ptr, scales_ptr = mean
    if STORAGE == EIGHT_BITS:
        codes, scale = encode_8bit(x, most, inside, r, SIGNED, SPECIAL)
        tl.store(values_ptr + at + lane, codes, mask=inside)
        tl.store(scales_ptr + at // BLOCK, scale)
    elif STORAGE == BFLOAT16:
        tl.store(values_ptr + at + lane, encode_bfloat16(x, r, SIGNED), mask=inside)
    else:
        tl.store(values_ptr + at + lane, convert(x, values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_means(means, mean, square, at, lane, inside, r, ADAM: tl.constexpr, STORAGE: tl.constexpr):
    """Store the running means of a parameter; without ADAM there is no ``square``."""
    if STORAGE == EIGHT_BITS:
        most = largest(mean, inside)
        more = largest(square, inside) if ADAM else most
        if tl.maximum(most, more) >= INFINITY:
            _store_mean(means[0], mean, most, at, lane, inside, r, STORAGE, True, SPECIAL=True)
            if ADAM:
                _store_mean(means[1], square, more, at, lane, inside, r, STORAGE, False, SPECIAL=True)
        else:
            _store_mean(means[0], mean, most, at, lane, inside, r, STORAGE, True, SPECIAL=False)
            if ADAM:
                _store_mean(means[1], square, more, at, lane, inside, r, STORAGE, False, SPECIAL=False)
    else:
        _store_mean(means[0], mean, 0, at, lane, inside, r, STORAGE, True, SPECIAL=True)
        if ADAM:
            _store_mean(means[1], square, 0, at, lane, inside, r, STORAGE, False, SPECIAL=True)


@triton.jit
def _store_weight(w_ptr, w, w_new, frozen, inside, HAS_UNION: tl.constexpr):
    """Store the weights; frozen ones keep their bits, and of a whole tile none of a thread's four is stored if all of
    them are frozen. Returns the weights after the update."""
    if HAS_UNION:
        w_new = tl.where(frozen, w, w_new)
        if inside is None:
            loose = tl.max((frozen == 0).to(tl.int32), 3)[:, :, :, None] > 0
            tl.store(w_ptr, w_new, mask=tl.broadcast_to(loose, w.shape))
        else:
            tl.store(w_ptr, w_new, mask=inside & (frozen == 0))
    else:
        tl.store(w_ptr, w_new, mask=inside)
    return w_new


@triton.jit
def _load_means(
    means, p, at, lane, inside, STATES: tl.constexpr, STORAGE: tl.constexpr
):  # fmt: skip
    """What is stored of the means of the parameter ``p``, each with its scales; anything for those it lacks."""
    if STATES == 0:
        return p, p, p, p
    elif STATES == 1:
        values, scale = _load_mean(means[0], at, lane, inside, STORAGE)
        return values, scale, p, p
    else:
        values, scale = _load_mean(means[0], at, lane, inside, STORAGE)
        squares, square_scale = _load_mean(means[1], at, lane, inside, STORAGE)
        return values, scale, squares, square_scale


@triton.jit
def _parameter(
    p, g, means, stored, table_ptr, settings, frozen, at, lane, inside, r,
    ADAM: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr,
):  # fmt: skip
    """Store the running means of a weight or of its scores after an update, and return it, in its own dtype."""
    wide = widen(p)
    if ADAM:
        mean = decode(stored[0], stored[1], table_ptr, inside, STORAGE, True)
        square = decode(stored[2], stored[3], table_ptr, inside, STORAGE, False)
        mean, square = running_means(wide, g, mean, square, settings)
        _store_means(means, mean, square, at, lane, inside, r, ADAM, STORAGE)
        if STORAGE == FLOAT32:
            new = adamw(wide, mean, square, settings, frozen)
        else:
            new = rough_adamw(wide, mean, square, settings)
    elif STATES > 0:
        mean = decode(stored[0], stored[1], table_ptr, inside, STORAGE, True)
        new, mean = sgd(wide, g, mean, settings, HAS_MOMENTUM=True)
        _store_means(means, mean, mean, at, lane, inside, r, ADAM, STORAGE)
    else:
        new, _ = sgd(wide, g, wide, settings, HAS_MOMENTUM=False)
    return convert(new, p.dtype)


@triton.jit
def _note(
    w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """:func:`.warm_threshold.note` for the tile, or for each group of a thread's elements."""
    masked_ptr += tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    return note(
        w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
        MAGNITUDE=MAGNITUDE, LANES=32 * WARPS,
    )  # fmt: skip


@triton.jit
def load_tile(
    operands, means, at, left, EACH: tl.constexpr, WARPS: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr, WEIGHT_STORAGE: tl.constexpr,
    SCORE_STORAGE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """What :func:`update_tile` needs from memory, of the tile at ``at``; ``left`` elements remain in the tensor."""
    g_ptr, ds_ptr, w_ptr, s_ptr, union_ptr, _ = operands
    lane = tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    inside = lane < left if TAIL else None
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    w_stored = _load_means(means[0], w, at, lane, inside, WEIGHT_STATES, WEIGHT_STORAGE)
    s_stored = _load_means(means[1], s, at, lane, inside, SCORE_STATES, SCORE_STORAGE)
    union = _load_union(union_ptr, at, left, EACH, WARPS, TAIL) if HAS_UNION else s
    return g, w, s, ds, w_stored, s_stored, union


@triton.jit
def update_tile(
    loaded, operands, means, table_ptr, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, NEXT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update the tile at ``at`` of the part that begins at ``start``, which was ``loaded``. Returns what
    :func:`.warm_threshold.note` returns."""
    settings_ptr, scale = settings
    _, _, w_ptr, s_ptr, _, masked_ptr = operands
    g, w, s, ds, w_stored, s_stored, union = loaded
    lane = tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    inside = lane < left if TAIL else None
    frozen = _frozen(union, EACH, WARPS, TAIL) if HAS_UNION else lane < 0
    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN)
    along = (start + at).to(tl.uint32) * ALONG + lane.to(tl.uint32) * ALONG
    # Each tile loads the coefficients, from the L1 cache, where it needs them: registers are few.
    for_weight = load_settings(settings_ptr + layout.SETTINGS_WEIGHT, ADAM)
    w_new = _parameter(
        w, dw, means[0], w_stored, table_ptr, for_weight, frozen, at, lane, inside, along + updates[0] * ONWARD,
        ADAM=ADAM, STATES=WEIGHT_STATES, STORAGE=WEIGHT_STORAGE,
    )  # fmt: skip
    w_new = _store_weight(w_ptr + at + lane, w, w_new, frozen, inside, HAS_UNION)
    for_scores = load_settings(settings_ptr + layout.SETTINGS_SCORES, ADAM)
    s_new = _parameter(
        s, ds, means[1], s_stored, table_ptr, for_scores, lane < 0, at, lane, inside, along + updates[1] * ONWARD,
        ADAM=ADAM, STATES=SCORE_STATES, STORAGE=SCORE_STORAGE,
    )  # fmt: skip
    tl.store(s_ptr + at + lane, s_new, mask=inside)
    if NEXT:
        return _note(
            w_new, s_new, start + at, inside, window, lists, masked_ptr + at, state_ptr, keys_ptr, places_ptr,
            EACH=EACH, WARPS=WARPS, MAGNITUDE=MAGNITUDE, TAIL=TAIL,
        )  # fmt: skip
    else:
        return tl.zeros([32 * WARPS], tl.int32), lists


@triton.jit
def update_block(
    operands, means, table_ptr, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """Load and update the block at ``at``, of which ``left`` elements belong to the tensor, if they are fewer."""
    loaded = load_tile(
        operands, means, at, left, EACH=EACH, WARPS=WARPS, HAS_UNION=HAS_UNION, GIVEN=GIVEN,
        WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
        SCORE_STORAGE=SCORE_STORAGE, TAIL=True,
    )  # fmt: skip
    return update_tile(
        loaded, operands, means, table_ptr, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr,
        places_ptr, EACH=EACH, WARPS=WARPS, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM,
        WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
        SCORE_STORAGE=SCORE_STORAGE, NEXT=NEXT, TAIL=True,
    )  # fmt: skip
