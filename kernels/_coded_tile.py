"""One tile of an update whose running means are stored in fewer bytes.

A whole tile has the shape [EACH, WARPS, 32, 4]: a thread has EACH groups of four elements, 128 elements apart. With two
of them, which 8 bits need, each warp has a whole block of elements with one scale. At the end of a tensor a tile is a
single block, [256], in all warps together, which need fewer registers then: with a bounds check for every element they
would not have enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._elementwise import convert, widen
from ._means import (
    ALONG,
    BFLOAT16,
    BLOCK,
    EIGHT_BITS,
    FLOAT32,
    ONWARD,
    decode,
    encode_8bit,
    encode_bfloat16,
    exponents,
)
from ._update_rules import adamw, gradients, rough_adamw, running_means, sgd
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
def _scale_of(WARPS: tl.constexpr):
    """Which scale of a whole tile each thread needs, [WARPS, 32]. The compiler must not see that the numbers of warps
    are consecutive, or it gives one warp the scales of all."""
    return (tl.arange(0, WARPS)[:, None] * BLOCK + tl.arange(0, 32)[None, :]) // BLOCK


@triton.jit
def _load_mean(mean, at, lane, inside, WARPS: tl.constexpr, STORAGE: tl.constexpr, TAIL: tl.constexpr):
    """The stored values of a tile, and the scales of its warps; without scales anything. Every lane of a warp loads its
    scale, so that it is where it is needed."""
    values_ptr, scales_ptr = mean
    values = tl.load(values_ptr + at + lane, mask=inside)
    scales_ptr += at // BLOCK
    if STORAGE != EIGHT_BITS:
        return values, values
    elif TAIL:
        return values, tl.load(scales_ptr)
    else:
        return values, tl.load(scales_ptr + _scale_of(WARPS))


@triton.jit
def _store_mean(
    mean, x, at, lane, inside, r, WARPS: tl.constexpr, STORAGE: tl.constexpr, SIGNED: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    values_ptr, scales_ptr = mean
    if STORAGE == EIGHT_BITS:
        exponent = exponents(x, inside, SIGNED)
        tl.store(values_ptr + at + lane, encode_8bit(x, exponent, r, SIGNED), mask=inside)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        scales_ptr += at // BLOCK
        if TAIL:
            tl.store(scales_ptr, scale)
        else:  # one lane of each warp stores its scale
            scale = tl.broadcast_to(scale.reshape(WARPS, 1), [WARPS, 32])
            one = tl.broadcast_to(tl.arange(0, 32)[None, :] == 0, [WARPS, 32])
            tl.store(scales_ptr + _scale_of(WARPS), scale, mask=one)
    elif STORAGE == BFLOAT16:
        tl.store(values_ptr + at + lane, encode_bfloat16(x, r, SIGNED), mask=inside)
    else:
        tl.store(values_ptr + at + lane, convert(x, values_ptr.dtype.element_ty), mask=inside)


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
    means, p, at, lane, inside, WARPS: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """What is stored of the means of the parameter ``p``, each with its scales; anything for those it lacks."""
    if STATES == 0:
        return p, p, p, p
    elif STATES == 1:
        values, scale = _load_mean(means[0], at, lane, inside, WARPS, STORAGE, TAIL)
        return values, scale, p, p
    else:
        values, scale = _load_mean(means[0], at, lane, inside, WARPS, STORAGE, TAIL)
        squares, square_scale = _load_mean(means[1], at, lane, inside, WARPS, STORAGE, TAIL)
        return values, scale, squares, square_scale


@triton.jit
def _broadcast(scale, STORAGE: tl.constexpr, TAIL: tl.constexpr):
    """What broadcasts to a tile."""
    if STORAGE == EIGHT_BITS and not TAIL:
        scale = scale[None, :, :, None]
    return scale


@triton.jit
def _parameter(
    p, g, means, stored, settings, frozen, at, lane, inside, r,
    WARPS: tl.constexpr, ADAM: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Store the running means of a weight or of its scores after an update, and return it, in its own dtype."""
    wide = widen(p)
    if ADAM:
        mean = decode(stored[0], _broadcast(stored[1], STORAGE, TAIL), STORAGE, True)
        square = decode(stored[2], _broadcast(stored[3], STORAGE, TAIL), STORAGE, False)
        mean, square = running_means(wide, g, mean, square, settings)
        _store_mean(means[0], mean, at, lane, inside, r, WARPS, STORAGE, True, TAIL)
        _store_mean(means[1], square, at, lane, inside, r, WARPS, STORAGE, False, TAIL)
        if STORAGE == FLOAT32:
            new = adamw(wide, mean, square, settings, frozen)
        else:
            new = rough_adamw(wide, mean, square, settings)
    elif STATES > 0:
        mean = decode(stored[0], _broadcast(stored[1], STORAGE, TAIL), STORAGE, True)
        new, mean = sgd(wide, g, mean, settings, HAS_MOMENTUM=True)
        _store_mean(means[0], mean, at, lane, inside, r, WARPS, STORAGE, True, TAIL)
    else:
        new, _ = sgd(wide, g, wide, settings, HAS_MOMENTUM=False)
    return convert(new, p.dtype)


@triton.jit
def _note(
    w, s, first, inside, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """:func:`.warm_threshold.note` for the tile, or for each group of a thread's elements."""
    LANES: tl.constexpr = 32 * WARPS
    if TAIL:
        return note(
            w, s, first, inside, window, lists, masked_ptr + tl.arange(0, BLOCK), state_ptr, keys_ptr, places_ptr,
            MAGNITUDE=MAGNITUDE, LANES=LANES,
        )  # fmt: skip
    elif EACH == 1:
        return note(
            w, s, first, inside, window, lists, masked_ptr + offsets(EACH, WARPS), state_ptr, keys_ptr, places_ptr,
            MAGNITUDE=MAGNITUDE, LANES=LANES,
        )  # fmt: skip
    else:
        w, w_far = tl.split(tl.permute(w, (1, 2, 3, 0)))
        s, s_far = tl.split(tl.permute(s, (1, 2, 3, 0)))
        # A thread's four are not number 4 * thread of the tile: each warp before has 128 elements more.
        thread = tl.arange(0, LANES)
        first = first + thread // 32 * (BLOCK - 128)
        warp = tl.arange(0, WARPS)[:, None, None] * BLOCK
        masked_ptr += warp + tl.arange(0, 32)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
        counts, lists = note(
            w, s, first, None, window, lists, masked_ptr, state_ptr, keys_ptr, places_ptr,
            MAGNITUDE=MAGNITUDE, LANES=LANES,
        )  # fmt: skip
        more, lists = note(
            w_far, s_far, first + 128, None, window, lists, masked_ptr + 128, state_ptr, keys_ptr, places_ptr,
            MAGNITUDE=MAGNITUDE, LANES=LANES,
        )  # fmt: skip
        return counts + more, lists


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
    w_stored = _load_means(means[0], w, at, lane, inside, WARPS, WEIGHT_STATES, WEIGHT_STORAGE, TAIL)
    s_stored = _load_means(means[1], s, at, lane, inside, WARPS, SCORE_STATES, SCORE_STORAGE, TAIL)
    union = _load_union(union_ptr, at, left, EACH, WARPS, TAIL) if HAS_UNION else s
    return g, w, s, ds, w_stored, s_stored, union


@triton.jit
def update_tile(
    loaded, operands, means, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr, places_ptr,
    EACH: tl.constexpr, WARPS: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, NEXT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update the tile at ``at`` of the part that begins at ``start``, which was ``loaded``. Returns what
    :func:`.warm_threshold.note` returns."""
    for_weight, for_scores, scale = settings
    _, _, w_ptr, s_ptr, _, masked_ptr = operands
    g, w, s, ds, w_stored, s_stored, union = loaded
    lane = tl.arange(0, BLOCK) if TAIL else offsets(EACH, WARPS)
    inside = lane < left if TAIL else None
    frozen = _frozen(union, EACH, WARPS, TAIL) if HAS_UNION else lane < 0
    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN)
    along = (start + at).to(tl.uint32) * ALONG + lane.to(tl.uint32) * ALONG
    w_new = _parameter(
        w, dw, means[0], w_stored, for_weight, frozen, at, lane, inside, along + updates[0] * ONWARD,
        WARPS=WARPS, ADAM=ADAM, STATES=WEIGHT_STATES, STORAGE=WEIGHT_STORAGE, TAIL=TAIL,
    )  # fmt: skip
    w_new = _store_weight(w_ptr + at + lane, w, w_new, frozen, inside, HAS_UNION)
    s_new = _parameter(
        s, ds, means[1], s_stored, for_scores, lane < 0, at, lane, inside, along + updates[1] * ONWARD,
        WARPS=WARPS, ADAM=ADAM, STATES=SCORE_STATES, STORAGE=SCORE_STORAGE, TAIL=TAIL,
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
    operands, means, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr, places_ptr,
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
        loaded, operands, means, start, at, left, tau, settings, updates, window, lists, state_ptr, keys_ptr,
        places_ptr, EACH=EACH, WARPS=WARPS, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM,
        WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
        SCORE_STORAGE=SCORE_STORAGE, NEXT=NEXT, TAIL=True,
    )  # fmt: skip
