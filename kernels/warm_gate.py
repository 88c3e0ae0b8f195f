"""The gate of a tensor whose scores somebody else has updated, with a guess of the threshold: the first half of a gate
that reads the scores once.

``gate_by_guess_kernel`` writes the masked weight as :mod:`.optimizer_step` does with its ``next``, and notes where the
threshold may be. :func:`.warm_threshold.settle` then finds the threshold and corrects the masked weight. A select and a
gate of their own would read the scores twice. A tensor without a window yet is searched among all its scores.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import _layout as layout
from ._elementwise import FP_FUSION, is_magnitude, table_pointer
from ._window import open_window
from .threshold import stretch
from .threshold_table import DTYPES
from .update_table import Config, UpdateTable, Workspace
from .warm_threshold import add_counts, list_has_room, load_window, note

CONFIG = Config(512, 63 * 512, 4, 2048, 32, resident=12)
"""The tile sizes. A thread waits for 32 bytes. With 12 programs, 48 KB are on their way to a multiprocessor, which is
enough for the bandwidth."""


@triton.jit(do_not_specialize=["tensors_ptr", "state_ptr"])
def open_windows_kernel(
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    state_ptr,  # [tensors, STATE_SIZE] int64
    DTYPE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Clear the state of the search of one tensor for each program, and write the ends of its window and the guess."""
    tensor = tl.program_id(0).to(tl.int64)
    window = tl.load(tensors_ptr + layout.TENSOR_COLUMNS * tensor + layout.TENSOR_WINDOW)
    open_window(window.to(tl.pointer_type(tl.int64)), layout.state_of(state_ptr, tensor), DTYPE, MAGNITUDE)


@triton.jit
def _gate_tile(
    w_ptr, s_ptr, masked_ptr, at, inside, window, lists, state_ptr, keys_ptr, places_ptr,
    MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    w, s = tl.load(w_ptr + lane, mask=inside), tl.load(s_ptr + lane, mask=inside)
    return note(
        w, s, at, inside, window, lists, masked_ptr + lane, state_ptr, keys_ptr, places_ptr,
        MAGNITUDE=MAGNITUDE, LANES=LANES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "fields_ptr", "tensors_ptr", "programs_ptr", "state_ptr", "keys_ptr", "places_ptr", "tensors", "items_each",
    ]
)  # fmt: skip
def gate_by_guess_kernel(
    fields_ptr,  # [FIELDS, tensors] int64, UpdateTable.fields
    tensors_ptr,  # [tensors, TENSOR_COLUMNS] int64, UpdateTable.tensors
    programs_ptr,  # [P, PROGRAM_COLUMNS] int64, UpdateTable.programs
    state_ptr,  # [tensors, STATE_SIZE] int64
    keys_ptr,  # [UpdateTable.listed] uint32
    places_ptr,  # [UpdateTable.listed] int64
    tensors,
    items_each,  # elements per program
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,  # the program's threads
    ALIGNED: tl.constexpr,
):
    """Write the masked weight by the guess, and note what :func:`.warm_threshold.settle` needs."""
    tensor, row_ptr, start, items, _ = stretch(tensors_ptr, programs_ptr, items_each, DTYPE)
    start = start // BLOCK * BLOCK  # the same number, but now the compiler sees that BLOCK divides it
    w_ptr = table_pointer(fields_ptr, layout.FIELD_WEIGHT, tensor, tensors, DTYPE, ALIGNED) + start
    s_ptr = table_pointer(fields_ptr, layout.FIELD_SCORES, tensor, tensors, DTYPE, ALIGNED) + start
    masked_ptr = table_pointer(fields_ptr, layout.FIELD_MASKED, tensor, tensors, MASKED, ALIGNED) + start
    state_ptr = layout.state_of(state_ptr, tensor)
    window = load_window(row_ptr, state_ptr, DTYPE, MAGNITUDE)
    first = tl.load(row_ptr + layout.TENSOR_LIST)
    keys_ptr += first
    places_ptr += first
    lists = list_has_room(row_ptr, state_ptr, LANES)
    counts = tl.zeros([LANES], tl.int32)
    whole = items // BLOCK * BLOCK
    for offset in range(0, whole, BLOCK):
        noted, lists = _gate_tile(
            w_ptr + offset, s_ptr + offset, masked_ptr + offset, start + offset, None, window, lists, state_ptr,
            keys_ptr, places_ptr, MAGNITUDE=MAGNITUDE, BLOCK=BLOCK, LANES=LANES,
        )  # fmt: skip
        counts += noted
    if whole < items:
        noted, lists = _gate_tile(
            w_ptr + whole, s_ptr + whole, masked_ptr + whole, start + whole, tl.arange(0, BLOCK) < items - whole,
            window, lists, state_ptr, keys_ptr, places_ptr, MAGNITUDE=MAGNITUDE, BLOCK=BLOCK, LANES=LANES,
        )  # fmt: skip
        counts += noted
    add_counts(state_ptr, counts)


def gate_by_guess(table: UpdateTable, workspace: Workspace, *, rule: str) -> None:
    """Write the masked weights of all tensors of ``table`` by the guesses that their windows have, in two launches.
    The caller has to call :func:`.warm_threshold.settle` after it.

    Args:
        table: with ``next``.
        workspace: of :func:`.update_table.workspace`, any contents.
        rule: "magnitude" or "value".
    """
    config = table.config
    form: dict[str, Any] = {"tensors_ptr": table.tensors, "state_ptr": workspace.state}
    form |= {"DTYPE": DTYPES[table.dtype], "MAGNITUDE": is_magnitude(rule)}
    open_windows_kernel[(len(table.tensors),)](**form, num_warps=1, **FP_FUSION)
    gate_by_guess_kernel[(len(table.programs),)](
        **form,
        fields_ptr=table.fields,
        programs_ptr=table.programs,
        keys_ptr=workspace.keys,
        places_ptr=workspace.places,
        tensors=len(table.tensors),
        items_each=config.items,
        MASKED=DTYPES[table.masked],
        BLOCK=config.block,
        LANES=32 * config.num_warps,
        ALIGNED=table.aligned,
        num_warps=config.num_warps,
        **FP_FUSION,
    )
