"""The table that one launch over many gated tensors reads, written on the device by launches alone.

Nothing is copied from the host, so that a captured graph may write the table too: addresses are arguments of
``write_kernel``. What stays in place from step to step is described once; the gradients have a table of their own,
written again where one moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._compile import CompileCase
from ._elementwise import ALIGNMENT, check_operands, check_packed, check_threshold
from ._select_table import DTYPES, state_size

FIELDS = 14
"""Rows of :attr:`UpdateTable.fields`: addresses of the weight, the scores, two states of either, the union, the masked
weight, the next threshold, the window and the two step counts; the first program; n."""

VECTORS = (0, 1, 2, 3, 4, 5, 7)  # the rows with addresses of n floats
FIRST_PROGRAM = 12
WINDOW = 8
"""Numbers in a window; see :mod:`.warm`."""

SETTINGS = 16
"""float32 numbers per tensor: eight for the weight, eight for the scores."""

SELECT_FIELDS = 6  # of ``_select_table.Table.tensors``
WRITE = 32
BLOCK = 256


@dataclass(frozen=True)
class Config:
    """Tile sizes.

    Attributes:
        block: elements that a program updates at a time, a power of two: 4 per thread, which makes 128 bits of float32.
        items: elements per program, a multiple of ``block``; at most 255 per thread.
        num_warps: of the kernels that update and gate.
        digit_block: scores or keys that a program of the search reads at a time.
        share: a list has room for one in so many keys of its tensor, at 12 bytes each.
    """

    block: int
    items: int
    num_warps: int
    digit_block: int
    share: int


CONFIGS = (Config(512, 8192, 4, 4096, 32), Config(512, 1024, 4, 1024, 4))
"""Every choice there is. The second is for few elements: more programs finish them sooner, and memory is no matter."""

FEW = 2**20
"""Elements, of all tensors of a launch together, below which the second is the better one: 1024 of its programs."""


FORMS = ((torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
"""The dtypes of weights and masked weights that are compiled for the tests."""


class Next(NamedTuple):
    """What an update prepares for the next forward pass; as ``wsn_fast.backends.updates.Next``."""

    masked: Tensor
    tau: Tensor
    rank: int
    window: Tensor


class Gated(NamedTuple):
    """A gated tensor of n elements: what stays in place from update to update.

    Attributes:
        weight: contiguous float32, bfloat16 or float16.
        scores: of the same shape and dtype.
        weight_states: none, or contiguous tensors like the weight: the running means of AdamW, the momentum of SGD.
        scores_states: the same for the scores.
        union: uint8 [ceil(n / 8)], or None.
        steps: 0-d, of the weight and of the scores, or None.
        next: or None.
    """

    weight: Tensor
    scores: Tensor
    weight_states: Sequence[Tensor] = ()
    scores_states: Sequence[Tensor] = ()
    union: Tensor | None = None
    steps: Sequence[Tensor] | None = None
    next: Next | None = None


class UpdateTable(NamedTuple):
    """The arguments of launches over T gated tensors, each operand of one dtype.

    Attributes:
        fields: int64 [FIELDS, T].
        tensors: int64 [T, SELECT_FIELDS], for the search: address of the scores, n, rank, start of list, two unused.
        programs: int64 [P, 2]: tensor and first element of every program.
        dtype: of weights, scores and states.
        masked: the dtype of the masked weights, None without ``next``.
        steps: the dtype of the step counts, or None.
        states: how many states a weight has, and its scores.
        has_union: whether there is a union.
        listed: keys that the lists have room for, together.
        aligned: whether every address of a vector is a multiple of 16 bytes.
        config: the tile sizes.
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


@triton.jit(do_not_specialize=["count", *(f"v{i}" for i in range(WRITE))])
def write_kernel(
    out_ptr,  # [count] int64
    count,  # at most 32
    v0: tl.int64, v1: tl.int64, v2: tl.int64, v3: tl.int64, v4: tl.int64, v5: tl.int64, v6: tl.int64, v7: tl.int64,
    v8: tl.int64, v9: tl.int64, v10: tl.int64, v11: tl.int64, v12: tl.int64, v13: tl.int64, v14: tl.int64,
    v15: tl.int64, v16: tl.int64, v17: tl.int64, v18: tl.int64, v19: tl.int64, v20: tl.int64, v21: tl.int64,
    v22: tl.int64, v23: tl.int64, v24: tl.int64, v25: tl.int64, v26: tl.int64, v27: tl.int64, v28: tl.int64,
    v29: tl.int64, v30: tl.int64, v31: tl.int64,
):  # fmt: skip
    """Write the arguments side by side."""
    values = (
        v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15, v16,
        v17, v18, v19, v20, v21, v22, v23, v24, v25, v26, v27, v28, v29, v30, v31,
    )  # fmt: skip
    for i in tl.static_range(len(values)):
        tl.store(out_ptr + i, tl.cast(values[i], tl.int64), mask=i < count)


@triton.jit(do_not_specialize=["tensors", "items_each", "programs"])
def programs_kernel(
    first_ptr,  # [tensors] int64: the first program of each tensor
    programs_ptr,  # [programs, 2] int64, UpdateTable.programs
    tensors,
    items_each,  # elements per program
    programs,
    BLOCK: tl.constexpr,
):
    """Write what every program owns."""
    program = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = program < programs
    tensor = tl.zeros([BLOCK], tl.int64)
    for i in range(1, tensors):
        tensor += (tl.load(first_ptr + i) <= program).to(tl.int64)
    first = tl.load(first_ptr + tensor, mask=inside)
    tl.store(programs_ptr + 2 * program, tensor, mask=inside)
    tl.store(programs_ptr + 2 * program + 1, (program - first) * items_each, mask=inside)


def write(out: Tensor, values: Sequence[int], known: Sequence[int] | None = None) -> None:
    """Write ``values`` to ``out``, int64 and contiguous, by a launch for every 32 of them.

    Args:
        out: as many elements as there are values.
        values: what to write.
        known: what is there already, or need not be: where 32 values agree with it, nothing is launched.
    """
    assert out.numel() == len(values) and out.is_contiguous()
    for i in range(0, len(values), WRITE):
        part = values[i : i + WRITE]
        if known is not None and list(part) == list(known[i : i + WRITE]):
            continue
        arguments = {f"v{k}": value for k, value in enumerate([*part, *[0] * (WRITE - len(part))])}
        write_kernel[(1,)](out_ptr=out.view(-1)[i:], count=len(part), **arguments, num_warps=1)


def table_size(sizes: Sequence[int], config: Config) -> int:
    """Elements of the int64 buffer that :func:`make_table` needs for tensors of these sizes."""
    return (FIELDS + SELECT_FIELDS) * len(sizes) + 2 * sum(triton.cdiv(n, config.items) for n in sizes)


def make_table(gated: Sequence[Gated], buffer: Tensor, config: Config = CONFIGS[0]) -> UpdateTable:
    """Describe tensors to the kernels. The table holds addresses, not references.

    Args:
        gated: T >= 1 tensors with n >= 1 elements each, alike in their dtypes and in what they have and lack.
        buffer: int64 [table_size(...)] on their device, any contents; becomes the table.
        config: the tile sizes.
    """
    count, head = len(gated), gated[0]
    rows, select = [], []
    programs = listed = 0
    for one in gated:
        _check(one, head)
        n, rank = one.weight.numel(), one.next.rank if one.next else 0
        rows.append([*map(address, _operands(one)), programs, n])
        select += [address(one.scores), n, rank, listed, 0, 0]
        programs += triton.cdiv(n, config.items)
        listed += n // config.share if one.next else 0
    fields, tensors, owners = buffer.split([FIELDS * count, SELECT_FIELDS * count, 2 * programs])
    write(fields, [row[i] for i in range(FIELDS) for row in rows])
    write(tensors, select)
    programs_kernel[(triton.cdiv(programs, BLOCK),)](
        first_ptr=fields[FIRST_PROGRAM * count :],
        programs_ptr=owners,
        tensors=count,
        items_each=config.items,
        programs=programs,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return UpdateTable(
        fields.view(FIELDS, count),
        tensors.view(count, SELECT_FIELDS),
        owners.view(programs, 2),
        dtype=head.weight.dtype,
        masked=head.next.masked.dtype if head.next else None,
        steps=head.steps[0].dtype if head.steps else None,
        states=(len(head.weight_states), len(head.scores_states)),
        has_union=head.union is not None,
        listed=listed,
        aligned=all(row[i] % ALIGNMENT == 0 for row in rows for i in VECTORS),
        config=config,
    )


class Workspace(NamedTuple):
    """What the launches of one update share; any contents before, for one update at a time.

    Attributes:
        settings: float32 [T, SETTINGS].
        state: int64 [T * state_size(dtype)], or [0] without ``next``.
        keys: uint32 [UpdateTable.listed].
        places: int64 [UpdateTable.listed].
    """

    settings: Tensor
    state: Tensor
    keys: Tensor
    places: Tensor


def workspace_size(table: UpdateTable) -> int:
    """Elements of the int64 buffer for :func:`workspace`."""
    state = state_size(table.dtype) if table.masked else 0
    return (state + SETTINGS // 2) * len(table.tensors) + table.listed + -(-table.listed // 2)


def workspace(table: UpdateTable, buffer: Tensor) -> Workspace:
    """The parts of ``buffer``, int64 [workspace_size(table)]."""
    count = len(table.tensors)
    state = count * state_size(table.dtype) if table.masked else 0
    parts = buffer.split([count * SETTINGS // 2, state, table.listed, -(-table.listed // 2)])
    return Workspace(parts[0].view(torch.float32), parts[1], parts[3].view(torch.uint32), parts[2])


def address(tensor: Tensor | None) -> int:
    """What a table holds for a tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def key(one: Gated) -> tuple[int, ...]:
    """What a table would hold for a tensor: equal for tensors that can share it."""
    return (*map(address, _operands(one)), one.weight.numel(), one.next.rank if one.next else 0)


def _operands(one: Gated) -> list[Tensor | None]:
    """The tensors of ``UpdateTable.fields``, in its order."""
    states = [[*given, None, None][:2] for given in (one.weight_states, one.scores_states)]
    places = [one.next.masked, one.next.tau, one.next.window] if one.next else [None] * 3
    return [one.weight, one.scores, *states[0], *states[1], one.union, *places, *(one.steps or (None, None))]


def _check(one: Gated, head: Gated) -> None:
    n, dtype = one.weight.numel(), head.weight.dtype
    vectors = [one.weight, one.scores, *one.weight_states, *one.scores_states]
    check_operands(n, *vectors)
    check_packed(n, one.union)
    assert n > 0 and dtype in DTYPES and all(vector.dtype is dtype for vector in vectors)
    assert all((a is None) == (b is None) for a, b in zip(_operands(one), _operands(head), strict=True))
    assert one.steps is None or head.steps is None or all(step.dtype is head.steps[0].dtype for step in one.steps)
    if one.next and head.next:
        check_operands(n, one.next.masked)
        check_threshold(one.next.tau, one.scores)
        assert one.next.masked.dtype is head.next.masked.dtype and one.next.masked.dtype in DTYPES
        assert one.next.window.dtype is torch.int64 and one.next.window.shape == (WINDOW,)
        assert 0 <= one.next.rank < n


def compile_cases() -> list[CompileCase]:
    """The two kernels that write a table."""
    values = {f"v{i}": "i64" for i in range(WRITE)}
    sizes = dict.fromkeys(("tensors", "items_each", "programs"), "i32")
    return [
        CompileCase("write", write_kernel, {"out_ptr": "*i64", "count": "i32", **values}, {}, num_warps=1),
        CompileCase(
            "programs", programs_kernel, {"first_ptr": "*i64", "programs_ptr": "*i64", **sizes}, {"BLOCK": BLOCK}
        ),
    ]
