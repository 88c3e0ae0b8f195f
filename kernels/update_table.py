"""The table from which one launch over many gated tensors reads where these tensors are.

Kernels write the table (see :mod:`.addresses`). Nothing is copied from the host, so that a captured graph can write the
table too. This table describes what stays in place from step to step, and is written once. The addresses of the
gradients are in a smaller table, which is written again when a gradient has moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _layout as layout
from ._elementwise import ALIGNMENT, FP_FUSION, check_operands, check_packed, check_threshold
from ._means import BLOCK as _SCALED
from ._means import CODES
from .addresses import address, write
from .code_values import write_values
from .threshold import sample_kernel
from .threshold_table import COMPLETE, DTYPES
from .threshold_table import CONFIGS as SEARCH_CONFIGS

PLAIN = ("float32", "float32")
"""The storages of states that are not coded."""

SCALED: int = _SCALED.value
"""How many elements share a scale."""

VECTORS = (
    layout.FIELD_WEIGHT,
    layout.FIELD_SCORES,
    layout.FIELD_WEIGHT_STATE_1,
    layout.FIELD_WEIGHT_STATE_2,
    layout.FIELD_SCORES_STATE_1,
    layout.FIELD_SCORES_STATE_2,
    layout.FIELD_MASKED,
)
"""The rows of ``UpdateTable.fields`` that hold addresses of n floats."""


@dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block: elements that a program updates at a time, a power of two: 4 per thread, which makes 128 bits of float32.
            What updates means in 8 bits takes fewer at a time (:func:`.coded_step.tile_of`).
        items: elements per program, a multiple of ``block``; at most 65535, and 255 per thread where states are not
            coded. In ``CONFIGS`` it is the most that :func:`spread` may choose.
        num_warps: of the kernels that update and gate.
        digit_block: scores or keys that a program of the search reads at a time.
        alone: up to so many keys are searched by one program.
        fix_block: listed elements of the masked weight that a program corrects at a time.
        share: the list of a tensor has room for 1/share of its keys; an entry takes 12 bytes.
        registers: the most per thread of the kernel that updates, for float32 and for 16 bits. Then 6 and 5 programs of
            128 threads fit on a multiprocessor. Left to itself, ptxas takes more on sm_100, and elsewhere so few that
            it spills some.
        resident: how many programs a multiprocessor has at a time: as many as its registers hold.
        has_values: whether there is a table of the values of 8-bit codes.
        unaligned: the least that ``registers`` is with addresses that are no multiples of 16 bytes, for coded states.
    """

    block: int
    items: int
    num_warps: int
    digit_block: int
    share: int
    registers: tuple[int, int] = (80, 96)
    alone: int = 8192
    fix_block: int = 1024
    resident: int = 6
    has_values: bool = False
    unaligned: int = 0


CONFIGS = (Config(512, 63 * 512, 4, 2048, 32), Config(512, 63 * 512, 4, 2048, 4))
"""Every choice there is for states that are not coded. The second one is for few elements: its longer lists take little
memory then."""


def _of_warps(registers: tuple[int, int], resident: int) -> tuple[Config, ...]:
    """Programs of a single warp."""
    own = replace(CONFIGS[0], items=127 * 512, num_warps=1, registers=registers, resident=resident, has_values=True)
    return tuple(replace(own, share=config.share, unaligned=255) for config in CONFIGS)


CODED_CONFIGS = {
    "bfloat16": tuple(replace(config, registers=(96, 96), resident=5, unaligned=168) for config in CONFIGS),
    "8bit": _of_warps((184, 208), 11),
    "8bit, float32": _of_warps((200, 208), 10),
}
"""The same for running means that are stored in fewer bytes: none of them in 8 bits, some, or some beside others in
float32, for which the root is exact. For 8 bits a program is a single warp, which updates a block with its scale at a
time: 8 elements a thread. This takes more registers."""


def configs(storages: tuple[str, str]) -> tuple[Config, ...]:
    """The tile sizes for states that are stored so (:attr:`Gated.storages`): for many elements, and for few."""
    if storages == PLAIN:
        return CONFIGS
    if "8bit" in storages:
        return CODED_CONFIGS["8bit, float32" if "float32" in storages else "8bit"]
    return CODED_CONFIGS["bfloat16"]


FEW = 2**20
"""If all tensors of a launch together have fewer elements than this, the second of ``CONFIGS`` is used."""


def spread(config: Config, elements: int, processors: int) -> Config:
    """``config`` with as many items per program as suit a launch over that many elements on a GPU with that many
    multiprocessors.

    All programs run at the same time, or in as few rounds as it takes. On an H200, 16.8 million elements took as long
    in seven rounds as in one; 1 million took 23 microseconds in two rounds and 18.5 in one.
    """
    blocks = elements / config.block / (config.resident * processors)
    rounds = math.ceil(blocks * config.block / config.items)
    return replace(config, items=config.block * max(math.ceil(blocks / max(rounds, 1)), 1))


class Next(NamedTuple):
    """What an update prepares for the next forward pass; as ``wsn_fast.backends.updates.Next``."""

    masked: Tensor
    tau: Tensor
    rank: int
    window: Tensor


class Gated(NamedTuple):
    """What the kernels need of a gated tensor of n elements and what stays in place from update to update.

    Attributes:
        weight: contiguous float32, bfloat16 or float16.
        scores: of the same shape and dtype.
        weight_states: none, or contiguous tensors like the weight: the running means of AdamW, the momentum of SGD.
        scores_states: the same for the scores.
        union: uint8 [ceil(n / 8)], or None.
        steps: 0-d, of the weight and of the scores, or None. Coded states need them.
        next: or None.
        weight_scales: float32 [ceil(n / 256)] for each of the weight's states that is uint8 codes (:mod:`._means`).
        scores_scales: the same for the scores.
    """

    weight: Tensor
    scores: Tensor
    weight_states: Sequence[Tensor] = ()
    scores_states: Sequence[Tensor] = ()
    union: Tensor | None = None
    steps: Sequence[Tensor] | None = None
    next: Next | None = None
    weight_scales: Sequence[Tensor] = ()
    scores_scales: Sequence[Tensor] = ()

    @property
    def storages(self) -> tuple[str, str]:
        """How the states of the weight are stored, and those of the scores: two of :data:`._means.STORAGES`."""
        return _storage(self.weight_states, self.weight), _storage(self.scores_states, self.scores)


def _storage(states: Sequence[Tensor], like: Tensor) -> str:
    if not states or states[0].dtype is like.dtype:
        return "float32"
    return "8bit" if states[0].dtype is torch.uint8 else "bfloat16"


class UpdateTable(NamedTuple):
    """The arguments of launches over T gated tensors, each operand of one dtype.

    Attributes:
        fields: int64 [FIELDS, T]: addresses and numbers, in the rows that ``_layout.FIELD_...`` names.
        tensors: int64 [T, TENSOR_COLUMNS], for the search of the threshold.
        programs: int64 [P, PROGRAM_COLUMNS]: tensor and first element of every program.
        dtype: of weights and scores, and of states that are not coded.
        masked: the dtype of the masked weights, None without ``next``.
        steps: the dtype of the step counts, or None.
        states: how many states a weight has, and its scores.
        has_union: whether there is a union.
        listed: keys that the lists have room for, together.
        aligned: whether every address of a vector is a multiple of 16 bytes.
        config: the tile sizes.
        storages: those of :attr:`Gated.storages`.
        values: float32 [2 * CODES] of :mod:`.code_values` for codes of 8 bits, else [0].
    """

    fields: Tensor
    tensors: Tensor
    programs: Tensor
    dtype: torch.dtype
    masked: torch.dtype | None
    steps: torch.dtype | None
    states: tuple[int, int]
    has_union: bool
    listed: int
    aligned: bool
    config: Config
    storages: tuple[str, str]
    values: Tensor

    @property
    def is_adam(self) -> bool:
        """Whether the update is that of AdamW, and not of SGD."""
        return self.states == (2, 2)

    @property
    def is_coded(self) -> bool:
        """Whether some states are stored in fewer bytes."""
        return self.storages != PLAIN


def table_size(sizes: Sequence[int], config: Config) -> int:
    """Elements of the int64 buffer that :func:`make_table` needs for tensors of these sizes."""
    programs = sum(triton.cdiv(n, config.items) for n in sizes)
    per_tensor = layout.FIELDS + layout.TENSOR_COLUMNS.value
    return per_tensor * len(sizes) + layout.PROGRAM_COLUMNS.value * programs + _values_size(config)


def _values_size(config: Config) -> int:
    """Elements of that buffer for the values of codes."""
    return CODES.value if config.has_values else 0


def make_table(gated: Sequence[Gated], buffer: Tensor, config: Config) -> UpdateTable:
    """Describe tensors to the kernels. The table holds addresses, not references.

    Args:
        gated: T >= 1 tensors with n >= 1 elements each, alike in their dtypes and in what they have and lack.
        buffer: int64 [table_size(...)] on their device, any contents; becomes the table.
        config: the tile sizes.
    """
    count, head = len(gated), gated[0]
    rows, search = [], []
    programs = listed = 0
    for one in gated:
        _check(one, head)
        rows.append(_field_row(one, programs))
        row = _search_row(one, programs, listed, config)
        search += row
        programs += row[layout.TENSOR_PROGRAMS]
        listed += row[layout.TENSOR_ROOM]
    columns, pair = layout.TENSOR_COLUMNS.value, layout.PROGRAM_COLUMNS.value
    parts = [layout.FIELDS * count, columns * count, pair * programs, _values_size(config)]
    fields, tensors, owners, values = buffer.split(parts)
    write(fields, [value for row in zip(*rows, strict=True) for value in row])
    write(tensors, search)
    fields = fields.view(layout.FIELDS, count)
    # There is no search now. But this kernel, which can also write which programs work on a tensor, serves the search
    # for a first threshold, and so it is compiled already.
    sample_kernel[(count,)](
        tensors_ptr=tensors,
        programs_ptr=owners,
        state_ptr=tensors,
        **COMPLETE._asdict(),
        tau=0,
        items_each=config.items,
        magnitude=0,
        writes_programs=1,
        samples=0,
        DTYPE=DTYPES[head.weight.dtype],
        SAMPLE=SEARCH_CONFIGS[0].sample,
        num_warps=4,
        **FP_FUSION,
    )
    if config.has_values:
        write_values(values.view(torch.float32))
    return UpdateTable(
        fields,
        tensors.view(count, columns),
        owners.view(programs, pair),
        dtype=head.weight.dtype,
        masked=head.next.masked.dtype if head.next else None,
        steps=head.steps[0].dtype if head.steps else None,
        states=(len(head.weight_states), len(head.scores_states)),
        has_union=head.union is not None,
        listed=listed,
        aligned=all(row[i] % ALIGNMENT == 0 for row in rows for i in VECTORS),
        config=config,
        storages=head.storages,
        values=values.view(torch.float32),
    )


class Workspace(NamedTuple):
    """Memory that the launches of one update share. It may hold anything before, and serves one update at a time.

    Attributes:
        settings: float32 [T, SETTINGS], flattened.
        state: int64 [T * STATE_SIZE], or [0] without ``next``.
        keys: uint32 [UpdateTable.listed].
        places: int64 [UpdateTable.listed].
    """

    settings: Tensor
    state: Tensor
    keys: Tensor
    places: Tensor


def workspace_size(table: UpdateTable) -> int:
    """Elements of the int64 buffer for :func:`workspace`."""
    state = layout.STATE_SIZE.value if table.masked else 0
    return (state + layout.SETTINGS.value // 2) * len(table.tensors) + table.listed + -(-table.listed // 2)


def workspace(table: UpdateTable, buffer: Tensor) -> Workspace:
    """The parts of ``buffer``, int64 [workspace_size(table)]."""
    count = len(table.tensors)
    state = count * layout.STATE_SIZE.value if table.masked else 0
    parts = buffer.split([count * layout.SETTINGS.value // 2, state, table.listed, -(-table.listed // 2)])
    return Workspace(parts[0].view(torch.float32), parts[1], parts[3].view(torch.uint32), parts[2])


def key(one: Gated) -> tuple[int, ...]:
    """What a table would hold for a tensor. Tensors with equal keys can share a table."""
    following = (one.next.rank, address(one.next.tau), address(one.next.window)) if one.next else ()
    return (*_field_row(one, 0), *following)


def _field_row(one: Gated, first_program: int) -> list[int]:
    """The column of ``UpdateTable.fields`` for a tensor."""
    row = [0] * layout.FIELDS
    for index, tensor in _operands(one):
        row[index] = address(tensor)
    row[layout.FIELD_FIRST_PROGRAM] = first_program
    row[layout.FIELD_NUMEL] = one.weight.numel()
    return row


def _search_row(one: Gated, first_program: int, listed: int, config: Config) -> list[int]:
    """The row of ``UpdateTable.tensors`` for a tensor."""
    row, n = [0] * layout.TENSOR_COLUMNS.value, one.weight.numel()
    row[layout.TENSOR_SCORES] = address(one.scores)
    row[layout.TENSOR_NUMEL] = n
    row[layout.TENSOR_FIRST_PROGRAM], row[layout.TENSOR_PROGRAMS] = first_program, triton.cdiv(n, config.items)
    if one.next:
        row[layout.TENSOR_RANK] = one.next.rank
        row[layout.TENSOR_LIST], row[layout.TENSOR_ROOM] = listed, n // config.share
        row[layout.TENSOR_TAU], row[layout.TENSOR_WINDOW] = address(one.next.tau), address(one.next.window)
    return row


def _operands(one: Gated) -> list[tuple[tl.constexpr, Tensor | None]]:
    """Each tensor with its row in ``UpdateTable.fields``."""
    weight_states, scores_states = ([*given, None, None][:2] for given in (one.weight_states, one.scores_states))
    weight_scales, scores_scales = ([*given, None, None][:2] for given in (one.weight_scales, one.scores_scales))
    weight_step, scores_step = one.steps or (None, None)
    return [
        (layout.FIELD_WEIGHT, one.weight),
        (layout.FIELD_SCORES, one.scores),
        (layout.FIELD_WEIGHT_STATE_1, weight_states[0]),
        (layout.FIELD_WEIGHT_STATE_2, weight_states[1]),
        (layout.FIELD_SCORES_STATE_1, scores_states[0]),
        (layout.FIELD_SCORES_STATE_2, scores_states[1]),
        (layout.FIELD_UNION, one.union),
        (layout.FIELD_MASKED, one.next and one.next.masked),
        (layout.FIELD_WEIGHT_STEP, weight_step),
        (layout.FIELD_SCORES_STEP, scores_step),
        (layout.FIELD_WEIGHT_SCALES_1, weight_scales[0]),
        (layout.FIELD_WEIGHT_SCALES_2, weight_scales[1]),
        (layout.FIELD_SCORES_SCALES_1, scores_scales[0]),
        (layout.FIELD_SCORES_SCALES_2, scores_scales[1]),
    ]


def _check(one: Gated, head: Gated) -> None:
    n, dtype = one.weight.numel(), head.weight.dtype
    check_operands(n, one.weight, one.scores, *one.weight_states, *one.scores_states)
    check_packed(n, one.union)
    assert n > 0 and dtype in DTYPES and one.weight.dtype is dtype and one.scores.dtype is dtype
    assert one.storages == head.storages and (one.storages == PLAIN or one.steps is not None)
    sides = (one.weight_states, one.weight_scales), (one.scores_states, one.scores_scales)
    for storage, (states, scales) in zip(one.storages, sides, strict=True):
        kept = {"float32": dtype, "bfloat16": torch.bfloat16, "8bit": torch.uint8}[storage]
        assert all(state.dtype is kept for state in states)
        assert len(scales) == (len(states) if storage == "8bit" else 0)
        check_operands(triton.cdiv(n, SCALED), *scales)
        assert all(scale.dtype is torch.float32 for scale in scales)
    pairs = zip(_operands(one), _operands(head), strict=True)
    assert all((mine is None) == (other is None) for (_, mine), (_, other) in pairs)
    assert one.steps is None or head.steps is None or all(step.dtype is head.steps[0].dtype for step in one.steps)
    if one.next and head.next:
        check_operands(n, one.next.masked)
        check_threshold(one.next.tau, one.scores)
        assert one.next.masked.dtype is head.next.masked.dtype and one.next.masked.dtype in DTYPES
        assert one.next.window.dtype is torch.int64 and one.next.window.shape == (layout.WINDOW_SIZE,)
        assert 0 <= one.next.rank < n
