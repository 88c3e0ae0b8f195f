"""The update of :mod:`.optimizer_step` for running means that are stored in fewer bytes.

It does the same, and decodes and encodes the means in registers (:mod:`._means`). The means of the weight and those of
the scores each have a form of their own, and one of the two may be float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._coded_tile import load_tile, update_block, update_tile
from ._elementwise import FP_FUSION, is_magnitude, table_pointer
from ._means import BFLOAT16, EIGHT_BITS, STORAGES
from ._means import BLOCK as SCALED
from ._update_rules import SCALES, inverse_correction, load_scale, load_threshold
from .threshold import stretch
from .threshold_table import DTYPES
from .update_table import Config, UpdateTable, Workspace
from .warm_threshold import add_pairs, list_has_room, load_window, pairs


@triton.jit
def _mean(
    fields_ptr, VALUES: tl.constexpr, SCALE_ROW: tl.constexpr, tensor, tensors, start, DTYPE: tl.constexpr,
    STORAGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Pointers to the values and to the scales of a running mean, from element ``start`` on."""
    if STORAGE == EIGHT_BITS:
        KEPT: tl.constexpr = tl.uint8
    elif STORAGE == BFLOAT16:
        KEPT: tl.constexpr = tl.bfloat16
    else:
        KEPT: tl.constexpr = DTYPE
    values_ptr = table_pointer(fields_ptr, VALUES, tensor, tensors, KEPT, ALIGNED) + start
    scales_ptr = table_pointer(fields_ptr, SCALE_ROW, tensor, tensors, tl.float32, ALIGNED=False) + start // SCALED
    return values_ptr, scales_ptr


@triton.jit
def _update_number(fields_ptr, ROW: tl.constexpr, tensor, tensors, STEP: tl.constexpr):
    """The low 32 bits of the number of this update, for the dither."""
    step = tl.load(table_pointer(fields_ptr, ROW, tensor, tensors, STEP, ALIGNED=False))
    return step.to(tl.int64).to(tl.uint32)


@triton.jit
def _arguments(
    fields_ptr, gradients_ptr, settings_ptr, tensor, tensors, start, GRAD: tl.constexpr, DTYPE: tl.constexpr,
    MASKED: tl.constexpr, SCALE: tl.constexpr, STEP: tl.constexpr, GIVEN: tl.constexpr, ADAM: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr, SCORE_STORAGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What the tiles of a tensor from element ``start`` on need: the pointers to its operands and to its means, the
    threshold, the coefficients, and the numbers of the updates."""
    operands = (
        table_pointer(gradients_ptr, layout.GRADIENT_WEIGHT, tensor, tensors, GRAD, ALIGNED) + start,
        table_pointer(gradients_ptr, layout.GRADIENT_SCORES, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_WEIGHT, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_SCORES, tensor, tensors, DTYPE, ALIGNED) + start,
        table_pointer(fields_ptr, layout.FIELD_UNION, tensor, tensors, tl.uint8, ALIGNED=False) + start // 8,
        table_pointer(fields_ptr, layout.FIELD_MASKED, tensor, tensors, MASKED, ALIGNED) + start,
    )
    means = (
        (
            _mean(fields_ptr, layout.FIELD_WEIGHT_STATE_1, layout.FIELD_WEIGHT_SCALES_1, tensor, tensors, start, DTYPE,
                  WEIGHT_STORAGE, ALIGNED),
            _mean(fields_ptr, layout.FIELD_WEIGHT_STATE_2, layout.FIELD_WEIGHT_SCALES_2, tensor, tensors, start, DTYPE,
                  WEIGHT_STORAGE, ALIGNED),
        ),
        (
            _mean(fields_ptr, layout.FIELD_SCORES_STATE_1, layout.FIELD_SCORES_SCALES_1, tensor, tensors, start, DTYPE,
                  SCORE_STORAGE, ALIGNED),
            _mean(fields_ptr, layout.FIELD_SCORES_STATE_2, layout.FIELD_SCORES_SCALES_2, tensor, tensors, start, DTYPE,
                  SCORE_STORAGE, ALIGNED),
        ),
    )  # fmt: skip
    updates = (
        _update_number(fields_ptr, layout.FIELD_WEIGHT_STEP, tensor, tensors, STEP),
        _update_number(fields_ptr, layout.FIELD_SCORES_STEP, tensor, tensors, STEP),
    )
    settings_ptr += tensor * layout.SETTINGS
    settings = (
        settings_ptr,
        inverse_correction(settings_ptr + layout.SETTINGS_WEIGHT, ADAM),
        inverse_correction(settings_ptr + layout.SETTINGS_SCORES, ADAM),
        load_scale(gradients_ptr, tensor, tensors, SCALE),
    )
    tau = load_threshold(gradients_ptr, tensor, tensors, DTYPE, GIVEN)
    return operands, means, tau, settings, updates


@triton.jit
def _search(
    row_ptr, state_ptr, keys_ptr, places_ptr, DTYPE: tl.constexpr, LANES: tl.constexpr, MAGNITUDE: tl.constexpr,
    NEXT: tl.constexpr,
):  # fmt: skip
    """The window of a tensor's search, which threads may list keys, and where the state and the list are."""
    window = (0, 0, 0, 0)
    lists = tl.zeros([LANES], tl.int32) > 0
    if NEXT:
        window = load_window(row_ptr, state_ptr, DTYPE, MAGNITUDE)
        first = tl.load(row_ptr + layout.TENSOR_LIST)
        keys_ptr += first
        places_ptr += first
        lists = list_has_room(row_ptr, state_ptr, LANES)
    return window, lists, state_ptr, keys_ptr, places_ptr


@triton.jit
def _add(counts, others, noted):
    """The counts of all tiles so far. A program has more of them than eight bits can count."""
    first, second = pairs(noted)
    return counts + first, others + second


def _kernel_name(specialization: Any) -> str:
    """The name in profiles, which tells the two optimizers apart."""
    return "adamw_coded_kernel" if specialization.constants["ADAM"] else "sgd_coded_kernel"


@triton.jit(
    repr=_kernel_name,
    do_not_specialize=[
        "fields_ptr", "gradients_ptr", "tensors_ptr", "programs_ptr", "settings_ptr", "table_ptr", "state_ptr",
        "keys_ptr", "places_ptr", "tensors", "items_each",
    ],
)  # fmt: skip
def coded_update_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    gradients_ptr,  # [GRADIENTS, tensors] int64
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, UpdateTable.programs
    settings_ptr,  # [tensors, SETTINGS] fp32, Workspace.settings
    table_ptr,  # [2, 256] fp32, UpdateTable.values
    state_ptr,  # [tensors, STATE_SIZE] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    GRAD: tl.constexpr,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,  # a dtype, or None for no scale of the gradients
    STEP: tl.constexpr,  # the dtype of the step counts
    BLOCK: tl.constexpr,  # elements of a tile: a multiple of 128 for each warp; with 8 bits 256 for the only one
    LANES: tl.constexpr,  # the program's threads
    MAGNITUDE: tl.constexpr,
    HAS_UNION: tl.constexpr,
    GIVEN: tl.constexpr,  # whether dW and dS are given, and not G
    ADAM: tl.constexpr,  # AdamW or Adam; else SGD
    WEIGHT_STATES: tl.constexpr,  # how many states the weight has: 2 for AdamW, 0 or 1 for SGD
    SCORE_STATES: tl.constexpr,
    WEIGHT_STORAGE: tl.constexpr,  # how the states of the weight are stored: a number of ``_means``
    SCORE_STORAGE: tl.constexpr,
    NEXT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update weights and scores by AdamW or SGD, and their coded running means."""
    tl.static_assert(LANES == 32 or (WEIGHT_STORAGE != EIGHT_BITS and SCORE_STORAGE != EIGHT_BITS))
    tensor, row_ptr, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    zero = (start % BLOCK).to(tl.int32)  # which the compiler does not know
    start = start // BLOCK * BLOCK  # the same number, but now the compiler sees that BLOCK divides it
    window, lists, state_ptr, keys_ptr, places_ptr = _search(
        row_ptr, layout.state_of(state_ptr, tensor), keys_ptr, places_ptr, DTYPE, LANES, MAGNITUDE, NEXT
    )
    counts, others = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)

    # A turn of the loop updates a tile and then loads the next one. Loads at its beginning would be moved down to where
    # each is needed, and then the turn would wait for memory once for each of them. Where all tiles are loaded, the
    # last one is loaded again. ``zero`` hides from the compiler that the offsets grow in equal steps: it would keep
    # every address in registers of its own.
    tiles = items // BLOCK
    if tiles > 0:
        operands, means, tau, settings, updates = _arguments(
            fields_ptr, gradients_ptr, settings_ptr, tensor, tensors, start, GRAD=GRAD, DTYPE=DTYPE, MASKED=MASKED,
            SCALE=SCALE, STEP=STEP, GIVEN=GIVEN, ADAM=ADAM, WEIGHT_STORAGE=WEIGHT_STORAGE, SCORE_STORAGE=SCORE_STORAGE,
            ALIGNED=ALIGNED,
        )  # fmt: skip
        loaded = load_tile(
            operands, means, zero * BLOCK, BLOCK, EACH=BLOCK // (4 * LANES), WARPS=LANES // 32, HAS_UNION=HAS_UNION,
            GIVEN=GIVEN, WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES, WEIGHT_STORAGE=WEIGHT_STORAGE,
            SCORE_STORAGE=SCORE_STORAGE, TAIL=False, ALIGNED=ALIGNED,
        )  # fmt: skip
        for tile in tl.range(0, tiles, disable_licm=True):
            noted, lists = update_tile(
                loaded, operands, means, table_ptr, start, (tile ^ zero) * BLOCK, BLOCK, tau, settings, updates, window,
                lists, state_ptr, keys_ptr, places_ptr, EACH=BLOCK // (4 * LANES), WARPS=LANES // 32,
                MAGNITUDE=MAGNITUDE,
                HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM, WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES,
                WEIGHT_STORAGE=WEIGHT_STORAGE, SCORE_STORAGE=SCORE_STORAGE, NEXT=NEXT, TAIL=False, ALIGNED=ALIGNED,
            )  # fmt: skip
            counts, others = _add(counts, others, noted)
            following = tl.minimum(tile + 1, tiles - 1) ^ zero
            loaded = load_tile(
                operands, means, following * BLOCK, BLOCK, EACH=BLOCK // (4 * LANES), WARPS=LANES // 32,
                HAS_UNION=HAS_UNION, GIVEN=GIVEN, WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES,
                WEIGHT_STORAGE=WEIGHT_STORAGE, SCORE_STORAGE=SCORE_STORAGE, TAIL=False, ALIGNED=ALIGNED,
            )  # fmt: skip
    if tiles * BLOCK < items:
        # Read again: what is not needed later takes no registers in the loop above.
        operands, means, tau, settings, updates = _arguments(
            fields_ptr, gradients_ptr, settings_ptr, tensor, tensors, start, GRAD=GRAD, DTYPE=DTYPE, MASKED=MASKED,
            SCALE=SCALE, STEP=STEP, GIVEN=GIVEN, ADAM=ADAM, WEIGHT_STORAGE=WEIGHT_STORAGE, SCORE_STORAGE=SCORE_STORAGE,
            ALIGNED=ALIGNED,
        )  # fmt: skip
        for offset in range(tiles * BLOCK, items, SCALED):
            noted, lists = update_block(
                operands, means, table_ptr, start, offset, items - offset, tau, settings, updates, window, lists,
                state_ptr, keys_ptr, places_ptr, EACH=BLOCK // (4 * LANES), WARPS=LANES // 32, MAGNITUDE=MAGNITUDE,
                HAS_UNION=HAS_UNION, GIVEN=GIVEN, ADAM=ADAM, WEIGHT_STATES=WEIGHT_STATES, SCORE_STATES=SCORE_STATES,
                WEIGHT_STORAGE=WEIGHT_STORAGE, SCORE_STORAGE=SCORE_STORAGE, NEXT=NEXT, ALIGNED=ALIGNED,
            )  # fmt: skip
            counts, others = _add(counts, others, noted)
    if NEXT:
        add_pairs(state_ptr, counts, others)


def tile_of(config: Config, storages: tuple[str, str]) -> int:
    """How many elements a program updates at a time: with 8 bits a block with its scale."""
    return SCALED.value if "8bit" in storages else config.block


def coded_update(
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
    """Do what :func:`.optimizer_step.update` does, with the same arguments, for a table that ``is_coded``."""
    config = table.config
    weight_storage, score_storage = map(STORAGES.index, table.storages)
    aligned = aligned and table.aligned
    registers = config.registers[table.dtype is not torch.float32]
    coded_update_kernel[(len(table.programs),)](
        fields_ptr=table.fields,
        gradients_ptr=gradients,
        tensors_ptr=table.tensors,
        programs_ptr=table.programs,
        settings_ptr=workspace.settings,
        table_ptr=table.values,
        state_ptr=workspace.state,
        keys_ptr=workspace.keys,
        places_ptr=workspace.places,
        tensors=len(table.tensors),
        items_each=config.items,
        GRAD=DTYPES[grad],
        DTYPE=DTYPES[table.dtype],
        MASKED=DTYPES[table.masked or table.dtype],
        SCALE=SCALES[scale],
        STEP=SCALES[table.steps],
        BLOCK=tile_of(config, table.storages),
        LANES=32 * config.num_warps,
        MAGNITUDE=is_magnitude(rule),
        HAS_UNION=table.has_union,
        GIVEN=given,
        ADAM=table.is_adam,
        WEIGHT_STATES=table.states[0],
        SCORE_STATES=table.states[1],
        WEIGHT_STORAGE=weight_storage,
        SCORE_STORAGE=score_storage,
        NEXT=table.masked is not None,
        ALIGNED=aligned,
        num_warps=config.num_warps,
        maxnreg=registers if aligned else max(registers, config.unaligned),
        **FP_FUSION,
    )
