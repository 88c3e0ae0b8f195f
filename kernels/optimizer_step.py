"""One-pass AdamW and SGD for gated tensors: from G, the gradient of the masked weight, to updated weights and scores.

``update_kernel`` forms ``dW`` and ``dS`` in registers, and frozen weights keep their bits. For tensors with a ``next``
it also writes the masked weight of the next forward pass with a guess of the new threshold; :mod:`.warm_threshold` then
computes the threshold and corrects the masked weight. The coefficients come from :mod:`.step_coefficients`. One launch
updates any number of tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._elementwise import FP_FUSION, convert, is_magnitude, table_pointer, widen
from ._update_rules import (
    SCALES,
    adamw,
    gradients,
    load_frozen,
    load_scale,
    load_settings,
    load_threshold,
    running_means,
    sgd,
)
from .threshold import stretch
from .threshold_table import DTYPES
from .update_table import UpdateTable, Workspace
from .warm_threshold import add_counts, list_has_room, load_window, note


@triton.jit
def _store_weight(
    w_ptr, w, w_new, frozen, inside, BLOCK: tl.constexpr, HAS_UNION: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Store the weights, but none of a thread's four if all of them are frozen; a frozen one among others keeps its
    bits. Returns the weights after the update."""
    if HAS_UNION:
        w_new = tl.where(frozen, w, w_new)
        lane = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
        loose = tl.max((frozen == 0).to(tl.int32).reshape(BLOCK // 4, 4), 1)[:, None] > 0
        mask = loose & inside.reshape(BLOCK // 4, 4) if TAIL else tl.broadcast_to(loose, [BLOCK // 4, 4])
        tl.store(w_ptr + lane, w_new.reshape(BLOCK // 4, 4), mask=mask)
    else:
        tl.store(w_ptr + tl.arange(0, BLOCK), w_new, mask=inside)
    return w_new


@triton.jit
def _update_tile(
    operands, start, at, left, tau, settings, window, lists, state_ptr, keys_ptr, places_ptr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr, NEXT: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Update the block at ``at`` of the part that begins at ``start``; ``left`` elements remain in the tensor. Returns
    what :func:`note` returns."""
    settings_ptr, scale = settings
    g_ptr, ds_ptr, w_ptr, s_ptr, w1_ptr, w2_ptr, s1_ptr, s2_ptr, union_ptr, masked_ptr = operands
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    # Loads come before the first store, because the compiler cannot know that no two operands overlap.
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    w1 = tl.load(w1_ptr + at + lane, mask=inside) if WEIGHT_STATES > 0 else w
    w2 = tl.load(w2_ptr + at + lane, mask=inside) if ADAM else w
    s1 = tl.load(s1_ptr + at + lane, mask=inside) if SCORE_STATES > 0 else s
    s2 = tl.load(s2_ptr + at + lane, mask=inside) if ADAM else s
    frozen = lane < 0
    if HAS_UNION:
        frozen = load_frozen(union_ptr, at, left, BLOCK, TAIL)

    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN)
    # Each tile loads the coefficients, from the L1 cache, where it needs them. To keep them would take 16 registers.
    for_weight = load_settings(settings_ptr + layout.SETTINGS_WEIGHT, ADAM)
    if ADAM:
        w1, w2 = running_means(widen(w), dw, widen(w1), widen(w2), for_weight)
        tl.store(w1_ptr + at + lane, convert(w1, w.dtype), mask=inside)
        tl.store(w2_ptr + at + lane, convert(w2, w.dtype), mask=inside)
        w_new = adamw(widen(w), w1, w2, for_weight, frozen)
    else:
        w_new, w1 = sgd(widen(w), dw, widen(w1), for_weight, HAS_MOMENTUM=WEIGHT_STATES > 0)
        if WEIGHT_STATES > 0:
            tl.store(w1_ptr + at + lane, convert(w1, w.dtype), mask=inside)
    w_new = _store_weight(w_ptr + at, w, convert(w_new, w.dtype), frozen, inside, BLOCK, HAS_UNION, TAIL)
    for_scores = load_settings(settings_ptr + layout.SETTINGS_SCORES, ADAM)
    if ADAM:
        s1, s2 = running_means(widen(s), ds, widen(s1), widen(s2), for_scores)
        tl.store(s1_ptr + at + lane, convert(s1, s.dtype), mask=inside)
        tl.store(s2_ptr + at + lane, convert(s2, s.dtype), mask=inside)
        s_new = adamw(widen(s), s1, s2, for_scores, lane < 0)
    else:
        s_new, s1 = sgd(widen(s), ds, widen(s1), for_scores, HAS_MOMENTUM=SCORE_STATES > 0)
        if SCORE_STATES > 0:
            tl.store(s1_ptr + at + lane, convert(s1, s.dtype), mask=inside)
    s_new = convert(s_new, s.dtype)
    tl.store(s_ptr + at + lane, s_new, mask=inside)
    if NEXT:
        return note(
            w_new, s_new, start + at, inside, window, lists, masked_ptr + at + lane, state_ptr, keys_ptr, places_ptr,
            MAGNITUDE=MAGNITUDE, LANES=LANES,
        )  # fmt: skip
    else:
        return tl.zeros([LANES], tl.int32), lists


def _kernel_name(specialization: Any) -> str:
    """The name in profiles, which tells the two optimizers apart."""
    return "adamw_kernel" if specialization.constants["ADAM"] else "sgd_kernel"


@triton.jit(
    repr=_kernel_name,
    do_not_specialize=[
        "fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "settings_ptr", "state_ptr", "keys_ptr",
        "places_ptr", "tensors", "items_each",
    ],
)  # fmt: skip
def update_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [GRADIENTS, tensors] int64
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, UpdateTable.programs
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE_SIZE] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,  # a dtype, or None for no scale
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether dW and dS are given, and not G
    ADAM: tl.constexpr,  # AdamW or Adam; else SGD
    WEIGHT_STATES: tl.constexpr,  # how many states the weight has: 2 for AdamW, 0 or 1 for SGD
    SCORE_STATES: tl.constexpr,
    NEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update weights and scores by AdamW or SGD."""
    tensor, row_ptr, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    start = start // BLOCK * BLOCK  # the same number, but now the compiler sees that BLOCK divides it
    operands = (
        table_pointer(gradients_ptr, layout.GRADIENT_WEIGHT, tensor, tensors, GRAD, ALIGNED) + start,
        table_pointer(gradients_ptr, layout.GRADIENT_SCORES, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_WEIGHT, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_SCORES, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_WEIGHT_STATE_1, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_WEIGHT_STATE_2, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_SCORES_STATE_1, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_SCORES_STATE_2, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_UNION, tensor, tensors, tl.uint8, ALIGNED=False) + start // 8,
        table_pointer(fields_ptr, layout.FIELD_MASKED, tensor, tensors, MASKED, ALIGNED) + start,
    )
    settings = (settings_ptr + tensor * layout.SETTINGS, load_scale(gradients_ptr, tensor, tensors, SCALE))
    tau = load_threshold(gradients_ptr, tensor, tensors, DTYPE, GIVEN)
    window = (0, 0, 0, 0)
    counts = tl.zeros([LANES], tl.int32)
    lists = counts > 0
    if NEXT:
        state_ptr = layout.state_of(state_ptr, tensor)
        window = load_window(row_ptr, state_ptr, DTYPE, MAGNITUDE)
        first = tl.load(row_ptr + layout.TENSOR_LIST)
        keys_ptr += first
        places_ptr += first
        lists = list_has_room(row_ptr, state_ptr, LANES)

    whole = items // BLOCK * BLOCK
    # Full blocks load without a bounds check. With one, no block could use wide loads when n is odd.
    for offset in range(0, whole, BLOCK):
        noted, lists = _update_tile(
            operands, start, offset, BLOCK, tau, settings, window, lists, state_ptr, keys_ptr, places_ptr,
            BLOCK=BLOCK, LANES=LANES, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM,
            WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, NEXT=NEXT, TAIL=False,
        )  # fmt: skip
        counts += noted
    if whole < items:
        noted, lists = _update_tile(
            operands, start, whole, items - whole, tau, settings, window, lists, state_ptr, keys_ptr, places_ptr,
            BLOCK=BLOCK, LANES=LANES, MAGNITUDE=MAGNITUDE, HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM,
            WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, NEXT=NEXT, TAIL=True,
        )  # fmt: skip
        counts += noted
    if NEXT:
        add_counts(state_ptr, counts)


def update(
    table: UpdateTable,
    workspace: Workspace,
    gradients: Tensor,
    *,
    grad: torch.dtype,
    scale: torch.dtype | None,
    given: bool,
    aligned: bool,
    rule: str,
) -> None:
    """Update the weights and scores of every tensor of ``table`` in place, in one launch. A table with two states of
    each is updated by AdamW, any other by SGD. With a ``next``, the caller has to call
    :func:`.warm_threshold.settle` after it.

    Args:
        table: of :func:`.update_table.make_table`.
        workspace: as :func:`.step_coefficients.prepare` left it.
        gradients: int64 [GRADIENTS, T], addresses, in the rows that ``_layout.GRADIENT_...`` names.
        grad: the dtype of G, or of dW.
        scale: the dtype of the scales, or None if there is no scale.
        given: whether the gradients are dW and dS, and not G.
        aligned: whether the addresses in ``gradients`` are multiples of 16 bytes.
        rule: "magnitude" or "value".
    """
    config = table.config
    update_kernel[(len(table.programs),)](
        fields_ptr=table.fields,
        gradients_ptr=gradients,
        tensors_ptr=table.tensors,
        programs_ptr=table.programs,
        settings_ptr=workspace.settings,
        state_ptr=workspace.state,
        keys_ptr=workspace.keys,
        places_ptr=workspace.places,
        tensors=len(table.tensors),
        items_each=config.items,
        GRAD=DTYPES[grad],
        DTYPE=DTYPES[table.dtype],
        MASKED=DTYPES[table.masked or table.dtype],
        SCALE=SCALES[scale],
        BLOCK=config.block,
        LANES=32 * config.num_warps,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.has_union,
        GIVEN=given,
        ADAM=table.is_adam,
        WEIGHT_STATES=table.states[0],
        SCORE_STATES=table.states[1],
        NEXT=table.masked is not None,
        ALIGNED=aligned and table.aligned,
        num_warps=config.num_warps,
        maxnreg=config.registers[table.dtype is not torch.float32],
        **FP_FUSION,
    )
