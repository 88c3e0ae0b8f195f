"""One-pass AdamW and SGD for gated tensors: from G, the gradient of the masked weight, to updated weights and scores.

``dW`` and ``dS`` are formed in registers, and frozen weights are not stored to. Where there is a ``next``, the same
pass begins what :mod:`.warm` completes: the masked weight and the threshold of the next forward pass. The coefficients
come from :mod:`.prepare`. Any number of tensors takes one launch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._bits import unpack_bits
from ._compile import CompileCase
from ._elementwise import convert, is_magnitude, table_pointer, widen
from ._select_table import DIGITS, DTYPES, STATE
from ._update_tile import SCALES, adamw, gradients, load_scale, load_settings, load_threshold, sgd
from .threshold import stretch
from .update_table import CONFIGS, FORMS, SETTINGS, UpdateTable, Workspace
from .warm import add_counts, load_window, note


# --- the pass
@triton.jit
def _update_tile(
    operands, at, left, tau, settings, window, state_ptr, keys_ptr, places_ptr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr, NEXT: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Update one block, from element ``at``; ``left`` elements remain in the tensor. Returns what :func:`note` does."""
    for_weight, for_scores, scale = settings
    g_ptr, ds_ptr, w_ptr, s_ptr, w1_ptr, w2_ptr, s1_ptr, s2_ptr, union_ptr, masked_ptr = operands
    lane = tl.arange(0, BLOCK)
    inside = lane < left if TAIL else None
    # Loads come before the first store, as the compiler cannot know that none of these overlap. All but the last state
    # where sm_80 (AdamW) or sm_100 (SGD in float32 with a next gate) would have too few registers for it as well.
    LATE: tl.constexpr = NEXT and not ADAM and w_ptr.dtype.element_ty == tl.float32
    g = tl.load(g_ptr + at + lane, mask=inside)
    w = tl.load(w_ptr + at + lane, mask=inside)
    s = tl.load(s_ptr + at + lane, mask=inside)
    ds = tl.load(ds_ptr + at + lane, mask=inside) if GIVEN else s
    w1 = tl.load(w1_ptr + at + lane, mask=inside) if WEIGHT_STATES > 0 else w
    w2 = tl.load(w2_ptr + at + lane, mask=inside) if ADAM else w
    s1 = tl.load(s1_ptr + at + lane, mask=inside) if SCORE_STATES > 0 and not LATE else s
    frozen = lane < 0
    if HAS_UNION:
        byte = tl.arange(0, BLOCK // 8)
        frozen = unpack_bits(tl.load(union_ptr + at // 8 + byte, mask=byte * 8 < left if TAIL else None))

    dw, ds = gradients(g, ds, w, s, tau, frozen, scale, MAGNITUDE, HAS_UNION, GIVEN)
    if ADAM:
        w_new, w1_new, w2_new = adamw(widen(w), dw, widen(w1), widen(w2), for_weight)
        tl.store(w2_ptr + at + lane, convert(w2_new, w.dtype), mask=inside)
        s2 = tl.load(s2_ptr + at + lane, mask=inside)
        s_new, s1_new, s2_new = adamw(widen(s), ds, widen(s1), widen(s2), for_scores)
        tl.store(s2_ptr + at + lane, convert(s2_new, w.dtype), mask=inside)
    else:
        w_new, w1_new = sgd(widen(w), dw, widen(w1), for_weight, WEIGHT_STATES > 0)
        if LATE:
            if WEIGHT_STATES > 0:
                tl.store(w1_ptr + at + lane, convert(w1_new, w.dtype), mask=inside)
            if SCORE_STATES > 0:
                s1 = tl.load(s1_ptr + at + lane, mask=inside)
        s_new, s1_new = sgd(widen(s), ds, widen(s1), for_scores, SCORE_STATES > 0)
    if WEIGHT_STATES > 0 and not LATE:
        tl.store(w1_ptr + at + lane, convert(w1_new, w.dtype), mask=inside)
    if SCORE_STATES > 0:
        tl.store(s1_ptr + at + lane, convert(s1_new, w.dtype), mask=inside)
    s_new = convert(s_new, s.dtype)
    tl.store(s_ptr + at + lane, s_new, mask=inside)
    w_new = convert(w_new, w.dtype)
    if HAS_UNION:
        w_new = tl.where(frozen, w, w_new)
        # A store per element, and neighbours in neighbouring lanes: as in ``mask.restore_frozen_kernel``.
        apart = tl.max_contiguous(tl.arange(0, BLOCK), 1)
        tl.store(w_ptr + at + apart, w_new, mask=(frozen == 0) & inside if TAIL else frozen == 0)
    else:
        tl.store(w_ptr + at + lane, w_new, mask=inside)
    if NEXT:
        return note(
            w_new, s_new, at + lane, inside, window, masked_ptr + at + lane, state_ptr, keys_ptr, places_ptr,
            MAGNITUDE, LANES,
        )  # fmt: skip
    else:
        return tl.zeros([LANES], tl.int32)


@triton.jit
def _update(
    fields_ptr, gradients_ptr, tensors_ptr, programs_ptr, settings_ptr, state_ptr, keys_ptr, places_ptr,
    tensors, items_each,
    GRAD: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr, SCALE: tl.constexpr,
    DIGITS: tl.constexpr, STATE: tl.constexpr, SETTINGS: tl.constexpr, LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
    ADAM: tl.constexpr, WEIGHT_STATES: tl.constexpr, SCORE_STATES: tl.constexpr, NEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    tensor, row_ptr, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    start = start // BLOCK * BLOCK  # as it is, and now the compiler sees it
    operands = (
        table_pointer(gradients_ptr, 0, tensor, tensors, GRAD, ALIGNED),
        table_pointer(gradients_ptr, 1, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 0, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 1, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 2, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 3, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 4, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 5, tensor, tensors, DTYPE, ALIGNED),
        table_pointer(fields_ptr, 6, tensor, tensors, tl.uint8, False),
        table_pointer(fields_ptr, 7, tensor, tensors, MASKED, ALIGNED),
    )
    settings_ptr += tensor * SETTINGS
    scale = load_scale(gradients_ptr, tensor, tensors, SCALE)
    settings = (load_settings(settings_ptr), load_settings(settings_ptr + 8), scale)
    tau = load_threshold(gradients_ptr, tensor, tensors, DTYPE, GIVEN)
    window = (0, 0, 0, 0)
    if NEXT:
        state_ptr += tensor * (STATE + (len(DIGITS) << DIGITS[0]))
        window = load_window(state_ptr, tl.load(row_ptr + 1), DTYPE, MAGNITUDE, LIST_SHARE)
        first = tl.load(row_ptr + 3)
        keys_ptr += first
        places_ptr += first

    counts = tl.zeros([LANES], tl.int32)
    whole = items // BLOCK * BLOCK
    # Full blocks carry no masks: under one, an odd n would cost every block of the tensor its vector loads.
    for offset in range(0, whole, BLOCK):
        counts += _update_tile(
            operands, start + offset, BLOCK, tau, settings, window, state_ptr, keys_ptr, places_ptr, BLOCK, LANES,
            MAGNITUDE, HAS_UNION, GIVEN, ADAM, WEIGHT_STATES, SCORE_STATES, NEXT, False,
        )  # fmt: skip
    if whole < items:
        counts += _update_tile(
            operands, start + whole, items - whole, tau, settings, window, state_ptr, keys_ptr, places_ptr, BLOCK,
            LANES, MAGNITUDE, HAS_UNION, GIVEN, ADAM, WEIGHT_STATES, SCORE_STATES, NEXT, True,
        )  # fmt: skip
    if NEXT:
        add_counts(state_ptr, counts)


@triton.jit
def adamw_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [4, tensors] int64: addresses of G or dW, dS, tau, scale
    tensors_ptr,  # [tensors, 6] int64, UpdateTable.tensors
    programs_ptr,  # [P, 2] int64, UpdateTable.programs
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,  # a dtype, or None for no scale
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    SETTINGS: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether dW and dS are given, and not G
    NEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """AdamW, or Adam, on weights and scores."""
    _update(
        fields_ptr, gradients_ptr, tensors_ptr, programs_ptr, settings_ptr, state_ptr, keys_ptr, places_ptr, tensors,
        items_each, GRAD, DTYPE, MASKED, SCALE, DIGITS, STATE, SETTINGS, LIST_SHARE, BLOCK, LANES, MAGNITUDE,
        HAS_UNION, GIVEN, True, 2, 2, NEXT, ALIGNED,
    )  # fmt: skip


@triton.jit
def sgd_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [4, tensors] int64: addresses of G or dW, dS, tau, scale
    tensors_ptr,  # [tensors, 6] int64, UpdateTable.tensors
    programs_ptr,  # [P, 2] int64, UpdateTable.programs
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    state_ptr,  # [tensors, STATE + len(DIGITS) * 2**DIGITS[0]] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,  # a dtype, or None for no scale
    DIGITS: tl.constexpr,
    STATE: tl.constexpr,
    SETTINGS: tl.constexpr,
    LIST_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether dW and dS are given, and not G
    WEIGHT_MOMENTUM: tl.constexpr,
    SCORE_MOMENTUM: tl.constexpr,
    NEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """SGD on weights and scores."""
    _update(
        fields_ptr, gradients_ptr, tensors_ptr, programs_ptr, settings_ptr, state_ptr, keys_ptr, places_ptr, tensors,
        items_each, GRAD, DTYPE, MASKED, SCALE, DIGITS, STATE, SETTINGS, LIST_SHARE, BLOCK, LANES, MAGNITUDE,
        HAS_UNION, GIVEN, False, WEIGHT_MOMENTUM, SCORE_MOMENTUM, NEXT, ALIGNED,
    )  # fmt: skip


# --- launches
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
    """Update the weights and scores of every tensor of ``table`` in place, in one launch: by AdamW where the table has
    steps, else by SGD. With a ``next``, :func:`.warm.settle` has to follow.

    Args:
        table: of :func:`.update_table.make_table`.
        workspace: as :func:`.prepare.prepare` left it.
        gradients: int64 [4, T], addresses of every tensor: of G or dW, of dS or 0, of the threshold of the last
            forward pass (not read where dS is given), of the scale or 0.
        grad: the dtype of G, or of dW.
        scale: the dtype of the scales, or None without.
        given: whether the gradients are dW and dS, and not G.
        aligned: whether the addresses in ``gradients`` are multiples of 16 bytes.
        rule: "magnitude" or "value".
    """
    config = table.config
    arguments: dict[str, Any] = {}
    kernel = adamw_kernel
    if table.steps is None:
        kernel = sgd_kernel
        arguments = {"WEIGHT_MOMENTUM": table.states[0], "SCORE_MOMENTUM": table.states[1]}
    kernel[(len(table.programs),)](
        **arguments,
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
        DIGITS=DIGITS[table.dtype][rule == "value"],
        STATE=STATE,
        SETTINGS=SETTINGS,
        LIST_SHARE=config.share,
        BLOCK=config.block,
        LANES=32 * config.num_warps,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.has_union,
        GIVEN=given,
        NEXT=table.masked is not None,
        ALIGNED=aligned and table.aligned,
        num_warps=config.num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """The dtypes of mixed, full and half precision, with and without a union and a ``next``."""
    pointers = ("fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "places_ptr")
    tables = dict.fromkeys(pointers, "*i64") | {"settings_ptr": "*fp32", "keys_ptr": "*u32"}
    tables |= {"tensors": "i32", "items_each": "i32"}
    forms = list(itertools.product(FORMS, (0, 1), (True,), (True,), CONFIGS))
    forms += list(itertools.product(FORMS, (0,), (False, True), (False, True), CONFIGS[:1]))
    cases = []
    for (dtype, masked), rule, union, ready, config in forms:
        form = {"GRAD": DTYPES[masked], "DTYPE": DTYPES[dtype], "MASKED": DTYPES[masked], "SCALE": None}
        form |= {"DIGITS": DIGITS[dtype][rule], "STATE": STATE, "SETTINGS": SETTINGS, "LIST_SHARE": config.share}
        form |= {"BLOCK": config.block, "LANES": 32 * config.num_warps, "MAGNITUDE": rule == 0, "HAS_UNION": union}
        form |= {"GIVEN": False, "NEXT": ready, "ALIGNED": True}
        name = f"{DTYPES[masked]} {DTYPES[dtype]} {('|S|', 'S')[rule]}" + " next" * ready + " union" * union
        name += f" {config.block}x{config.num_warps} 1/{config.share}"
        cases.append(CompileCase(f"adamw {name}", adamw_kernel, tables, form, num_warps=config.num_warps))
        momenta = {"WEIGHT_MOMENTUM": 1, "SCORE_MOMENTUM": 1}
        cases.append(CompileCase(f"sgd {name}", sgd_kernel, tables, form | momenta, num_warps=config.num_warps))
    return list({case.name: case for case in cases}.values())
