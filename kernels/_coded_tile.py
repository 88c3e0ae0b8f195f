"""One tile of an update whose running means are stored in fewer bytes.

A whole tile has the shape [EACH, WARPS, 32, 4]: a thread has EACH groups of four elements, 128 elements apart. With 8
bits a tile is a block with one scale, two groups for each thread of a single warp. So no warp waits for another to know
a scale, and a warp can go around what only few blocks need. At the end of a tensor a tile is a single block, [256], in
all warps together, which need fewer registers then: with a bounds check for every element they would not have enough.
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
    LARGE,
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
def _words(EACH: tl.constexpr, WARPS: tl.constexpr):
    """The same places. The compiler must not see that those of a warp are consecutive, or it gives each thread four of
    them that belong to other threads' elements."""
    return (
        tl.arange(0, EACH)[:, None, None] * 128
        + tl.arange(0, WARPS)[None, :, None] * (EACH * 128)
        + tl.arange(0, 32)[None, None, :] * 4
    ) // 4


@triton.jit
def _frozen(byte, EACH: tl.constexpr, WARPS: tl.constexpr, TAIL: tl.constexpr):
    """The four bits of each group of four elements that tell which are frozen, and for each element whether it is."""
    if TAIL:
        bits = (byte.to(tl.int32) >> (tl.arange(0, BLOCK // 4) % 2 * 4)) & 15
        return bits, ((bits[:, None] & (1 << tl.arange(0, 4))[None, :]) != 0).reshape(BLOCK)
    else:
        bits = (byte.to(tl.int32) >> (_fours(EACH, WARPS) % 2 * 4)) & 15
        return bits, (bits[:, :, :, None] & (1 << tl.arange(0, 4))[None, None, None, :]) != 0


@triton.jit
def _load_mean(
    mean, at, lane, inside, EACH: tl.constexpr, WARPS: tl.constexpr, STORAGE: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """The stored values of a tile, and their scale; without scales anything. With WORDS there are four codes in each
    uint32, which take a quarter of the registers."""
    values_ptr, scales_ptr = mean
    if STORAGE == EIGHT_BITS:
        scale = tl.load(scales_ptr + at // BLOCK)
        if WORDS:
            return tl.load((values_ptr + at).to(tl.pointer_type(tl.uint32)) + _words(EACH, WARPS)), scale
        else:
            return tl.load(values_ptr + at + lane, mask=inside), scale
    else:
        values = tl.load(values_ptr + at + lane, mask=inside)
        return values, values


@triton.jit
def _unpacked(codes, STORAGE: tl.constexpr, WORDS: tl.constexpr):
    if STORAGE == EIGHT_BITS and WORDS:
        codes = (codes[:, :, :, None] >> (tl.arange(0, 4) * 8)[None, None, None, :]) & 0xFF
    return codes


@triton.jit
def _store_mean(
    mean, x, most, at, lane, inside, r, STORAGE: tl.constexpr, SIGNED: tl.constexpr, SPECIAL: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    values_ptr, scales_ptr = mean
    if STORAGE == EIGHT_BITS:
        codes, scale = encode_8bit(x, most, inside, r, SIGNED, SPECIAL)
        if WORDS:
            words = tl.sum(codes << (tl.arange(0, 4) * 8)[None, None, None, :], 3).to(tl.uint32, bitcast=True)
            EACH: tl.constexpr = codes.shape[0]
            WARPS: tl.constexpr = codes.shape[1]
            tl.store((values_ptr + at).to(tl.pointer_type(tl.uint32)) + _words(EACH, WARPS), words)
        else:
            tl.store(values_ptr + at + lane, codes.to(tl.uint8), mask=inside)
        tl.store(scales_ptr + at // BLOCK, scale)
    elif STORAGE == BFLOAT16:
        tl.store(values_ptr + at + lane, encode_bfloat16(x, r, SIGNED), mask=inside)
    else:
        tl.store(values_ptr + at + lane, convert(x, values_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_means(
    means, mean, square, at, lane, inside, r, ADAM: tl.constexpr, STORAGE: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Store the running means of a parameter; without ADAM there is no ``square``. Codes for numbers of 2^127 and more,
    infinities and NaN take more instructions, so that only blocks with such numbers look for them."""
    if STORAGE == EIGHT_BITS:
        most = largest(mean, inside)
        more = largest(square, inside) if ADAM else most
        if tl.maximum(most, more) >= LARGE:
            _store_mean(means[0], mean, most, at, lane, inside, r, STORAGE, True, SPECIAL=True, WORDS=WORDS)
            if ADAM:
                _store_mean(means[1], square, more, at, lane, inside, r, STORAGE, False, SPECIAL=True, WORDS=WORDS)
        else:
            _store_mean(means[0], mean, most, at, lane, inside, r, STORAGE, True, SPECIAL=False, WORDS=WORDS)
            if ADAM:
                _store_mean(means[1], square, more, at, lane, inside, r, STORAGE, False, SPECIAL=False, WORDS=WORDS)
    else:
        _store_mean(means[0], mean, 0, at, lane, inside, r, STORAGE, True, SPECIAL=True, WORDS=WORDS)
        if ADAM:
            _store_mean(means[1], square, 0, at, lane, inside, r, STORAGE, False, SPECIAL=True, WORDS=WORDS)


@triton.jit
def _store_weight(w_ptr, w, w_new, bits, frozen, inside, HAS_UNION: tl.constexpr):
    """Store the weights; frozen ones keep their bits, and of a whole tile none of a thread's four is stored if all of
    them are frozen. Returns the weights after the update."""
    if HAS_UNION:
        w_new = tl.where(frozen, w, w_new)
        if inside is None:
            tl.store(w_ptr, w_new, mask=tl.broadcast_to((bits != 15)[:, :, :, None], w.shape))
        else:
            tl.store(w_ptr, w_new, mask=inside & (frozen == 0))
    else:
        tl.store(w_ptr, w_new, mask=inside)
    return w_new


@triton.jit
def _load_means(
    means, p, at, lane, inside, EACH: tl.constexpr, WARPS: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """What is stored of the means of the parameter ``p``, each with its scales; anything for those it lacks."""
    if STATES == 0:
        return p, p, p, p
    elif STATES == 1:
        values, scale = _load_mean(means[0], at, lane, inside, EACH, WARPS, STORAGE, WORDS)
        return values, scale, p, p
    else:
        values, scale = _load_mean(means[0], at, lane, inside, EACH, WARPS, STORAGE, WORDS)
        squares, square_scale = _load_mean(means[1], at, lane, inside, EACH, WARPS, STORAGE, WORDS)
        return values, scale, squares, square_scale


@triton.jit
def _parameter(
    p, g, means, stored, table_ptr, settings, inverse, frozen, at, lane, inside, r,
    ADAM: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Store the running means of a weight or of its scores after an update, and return it, in its own dtype."""
    wide = widen(p)
    if ADAM:
        mean = decode(_unpacked(stored[0], STORAGE, WORDS), stored[1], table_ptr, inside, STORAGE, True)
        square = decode(_unpacked(stored[2], STORAGE, WORDS), stored[3], table_ptr, inside, STORAGE, False)
        mean, square = running_means(wide, g, mean, square, settings)
        _store_means(means, mean, square, at, lane, inside, r, ADAM, STORAGE, WORDS)
        if STORAGE == FLOAT32:
            new = adamw(wide, mean, square, settings, frozen)
        else:
            new = rough_adamw(wide, mean, square, settings, inverse)
    elif STATES > 0:
        mean = decode(_unpacked(stored[0], STORAGE, WORDS), stored[1], table_ptr, inside, STORAGE, True)
        new, mean = sgd(wide, g, mean, settings, HAS_MOMENTUM=True)
        _store_means(means, mean, mean, at, lane, inside, r, ADAM, STORAGE, WORDS)
    else:
        new, _ = sgd(wide, g, wide, settings, HAS_MOMENTUM=False)
    return convert(new, p.dtype)


@triton.jit
def _note(
    w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """:func:`.warm_threshold.note` for the tile."""
    masked_ptr += tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    return note(
        w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
        MAGNITUDE=MAGNITUDE, LANES=32 * WARPS,
    )  # fmt: skip


@triton.jit
def load_tile(
    operands, means, at, left, EACH: tl.constexpr, WARPS: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr, WEIGHT_STORAGE: tl.constexpr,
    SCORE_STORAGE: tl.constexpr, TAIL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What :func:`update_tile` needs from memory, of the tile at ``at``; ``left`` elements remain in the tensor."""
    g_ptr, ds_ptr, w_ptr, s_ptr, union_ptr, _ = operands
    lane = tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    inside = lane < left if TAIL else None
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    WORDS: tl.constexpr = ALIGNED and not TAIL
    w_stored = _load_means(means[0], w, at, lane, inside, EACH, WARPS, WEIGHT_STATES, WEIGHT_STORAGE, WORDS)
    s_stored = _load_means(means[1], s, at, lane, inside, EACH, WARPS, SCORE_STATES, SCORE_STORAGE, WORDS)
    union = _load_union(union_ptr, at, left, EACH, WARPS, TAIL) if HAS_UNION else s
    return g, w, s, ds, w_stored, s_stored, union


@triton.jit
def update_tile(
    loaded, operands, means, table_ptr, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr,
    places_ptr, EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, NEXT: tl.constexpr, TAIL: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update the tile at ``at`` of the part that begins at ``start``, which was ``loaded``. Returns what
    :func:`.warm_threshold.note` returns."""
    settings_ptr, w_inverse, s_inverse, scale = settings
    _, _, w_ptr, s_ptr, _, masked_ptr = operands
    g, w, s, ds, w_stored, s_stored, union = loaded
    lane = tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    inside = lane < left if TAIL else None
    if HAS_UNION:
        bits, frozen = _frozen(union, EACH, WARPS, TAIL)
    else:
        bits, frozen = 0, lane < 0
    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN)
    along = (start + at).to(tl.uint32) * ALONG + lane.to(tl.uint32) * ALONG
    w_dither, s_dither = along + updates[0] * ONWARD, along + updates[1] * ONWARD
    # Each tile loads the coefficients, from the L1 cache, where it needs them: registers are few.
    for_weight = load_settings(settings_ptr + layout.SETTINGS_WEIGHT, ADAM)
    w_new = _parameter(
        w, dw, means[0], w_stored, table_ptr, for_weight, w_inverse, frozen, at, lane, inside, w_dither,
        ADAM=ADAM, STATES=WEIGHT_STATES, STORAGE=WEIGHT_STORAGE, WORDS=ALIGNED and not TAIL,
    )  # fmt: skip
    w_new = _store_weight(w_ptr + at + lane, w, w_new, bits, frozen, inside, HAS_UNION)
    for_scores = load_settings(settings_ptr + layout.SETTINGS_SCORES, ADAM)
    s_new = _parameter(
        s, ds, means[1], s_stored, table_ptr, for_scores, s_inverse, lane < 0, at, lane, inside, s_dither,
        ADAM=ADAM, STATES=SCORE_STATES, STORAGE=SCORE_STORAGE, WORDS=ALIGNED and not TAIL,
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
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, NEXT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Load and update the block at ``at``, of which ``left`` elements belong to the tensor, if they are fewer."""
    loaded = load_tile(
        operands, means, at, left, EACH=EACH, WARPS=WARPS, HAS_UNION=HAS_UNION, GIVEN=GIVEN,
        WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
        SCORE_STORAGE=SCORE_STORAGE, TAIL=True, ALIGNED=ALIGNED,
    )  # fmt: skip
    return update_tile(
        loaded, operands, means, table_ptr, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr,
        places_ptr, EACH=EACH, WARPS=WARPS, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM,
        WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
        SCORE_STORAGE=SCORE_STORAGE, NEXT=NEXT, TAIL=True, ALIGNED=ALIGNED,
    )  # fmt: skip
