"""One checksum of each tensor that finished tasks use. It covers what all of them use together, so that its cost does
not grow with their number.

A checksum is a sum over the elements that must not change. Each term mixes the index of an element with the bits of its
value. Integers of 64 bits that wrap around make the sum exact: it is the same on every device, in any order, and when
the parts of a sharded tensor are added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import collectives
from ..nn import per_task
from ..nn.shards import ShardedGate, local, shard_of
from ..nn.task_ids import TaskId, task_key
from .model_parts import ModelParts

_INDEX = -7046029254386353131
_FIRST = -4658895280553007687
_SECOND = -7723592293110705685
"""The odd multipliers of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as signed numbers."""

_SMALL = 1 << 15
"""Tensors of up to so many elements are summed together. On a CPU it is also the number of elements in a slice of a
large tensor: their terms fit into a cache. It is a multiple of 8, because masks are packed."""
_LARGE = 1 << 22
"""The first of these numbers on a GPU: few launches, and a moderate amount of memory for the terms."""
_LARGE_SLICE = 1 << 24
_ROWS = 16
"""So many tensors of one size are worth operations of their own."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Frozen(NamedTuple):
    """A tensor that must not change where its packed ``union`` has a bit; None means everywhere."""

    tensor: Tensor
    union: Tensor | None


class _Read(NamedTuple):
    """What one checksum reads: ``tensor``, where ``union`` has a bit. ``first`` is the index of its first element. A
    tensor that ``grows`` gets a row from each task that ends; of one with a ``shard`` other processes have the rest."""

    tensor: Tensor
    union: Tensor | None = None
    first: int = 0
    grows: bool = False
    shard: ShardedGate | None = None


def together(frozen: Iterable[Frozen]) -> list[Frozen]:
    """Each tensor once. Layers may share a tensor and have scores of their own: it is frozen where one of them says
    so."""
    found: dict[int, Frozen] = {}
    for one in frozen:
        other = found.setdefault(id(one.tensor), one)
        if other is not one:
            everywhere = other.union is None or one.union is None
            found[id(one.tensor)] = Frozen(one.tensor, None if everywhere else other.union | one.union)  # type: ignore[operator]
    return list(found.values())


def checksum(tensor: Tensor, union: Tensor | None = None, first: int = 0) -> Tensor:
    """The checksum of the elements of ``tensor`` that are in ``union``.

    Args:
        tensor: any dtype and shape, n elements.
        union: ``uint8`` [ceil(n / 8)], a packed mask; None means all elements.
        first: the index of the first element, if ``tensor`` is a part of a larger one that was cut in row-major order.
            The checksums of the parts add up to that of the whole.

    Returns:
        int64, 0-d, on the device of ``tensor``.
    """
    words = _words(tensor)
    size = min(_SMALL if words.device.type == "cpu" else _LARGE_SLICE, max(words.numel(), 1))
    indices = torch.arange(size, dtype=torch.int64, device=words.device)
    memory = torch.empty_like(indices), torch.empty_like(indices)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, words.numel(), size):
        part = words[start : start + size]
        n = part.numel()
        terms, spare = (m[:n] for m in memory)
        torch.add(indices[:n], first + start, out=terms)
        _mix(terms, part, spare)
        if union is not None:
            terms.mul_(ops.unpack_mask(union[start // 8 : (start + n + 7) // 8], part.shape))
        total += terms.sum()
    return total


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The checksums of all elements of many tensors on one device, int64 [len(tensors)].

    Tensors of one size, as heads are, are the rows of a matrix, and the others are joined. So the number of operations
    depends on how much there is to read, and hardly on the number of tensors.
    """
    sizes: dict[tuple[int, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        sizes.setdefault((tensor.numel(), tensor.dtype), []).append(i)
    order: list[int] = []
    sums: list[Tensor] = []
    alone: list[int] = []
    for (n, _), same in sizes.items():
        if len(same) < _ROWS or n == 0:
            alone += same
            continue
        count = max(_limit(tensors[0].device) // n, 1)
        for start in range(0, len(same), count):
            sums.append(_row_checksums([tensors[i] for i in same[start : start + count]]))
        order += same
    for start, end in _batches([tensors[i].numel() for i in alone], _limit(tensors[0].device)):
        sums.append(_joined_checksums([tensors[i] for i in alone[start:end]]))
    order += alone
    at = torch.tensor(order, dtype=torch.int64).argsort()
    return torch.cat(sums)[at.to(tensors[0].device)]


def _batches(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut a list of tensors with these ``sizes`` into parts of up to ``limit`` elements, or of one tensor."""
    start = total = 0
    for i, n in enumerate(sizes):
        if total + n > limit and i > start:
            yield start, i
            start, total = i, 0
        total += n
    if sizes:
        yield start, len(sizes)


def _row_checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The checksums of tensors of one size and kind."""
    words = torch.stack([_words(tensor) for tensor in tensors])
    terms = torch.arange(words.shape[1], device=words.device).repeat(len(words), 1)
    _mix(terms, words, torch.empty_like(terms))
    return terms.sum(1)


def _joined_checksums(tensors: Sequence[Tensor]) -> Tensor:
    """The checksums of tensors of any sizes and kinds."""
    words = [_words(tensor) for tensor in tensors]
    joined = torch.cat([*words, words[0].new_empty(0, dtype=torch.int64)])  # so that the sum has 64 bits
    ends = torch.tensor([0, *(w.numel() for w in words)]).cumsum(0).to(joined.device)
    starts = ends[:-1].repeat_interleave(ends.diff(), output_size=joined.numel())
    terms = torch.arange(joined.numel(), device=joined.device).sub_(starts)
    _mix(terms, joined, torch.empty_like(terms))
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)])[ends].diff()


def _limit(device: torch.device) -> int:
    """Up to how many elements are summed together."""
    return _SMALL if device.type == "cpu" else _LARGE


def _words(tensor: Tensor) -> Tensor:
    """The bits of ``tensor`` as a 1-d tensor of integers."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def _mix(indices: Tensor, words: Tensor, spare: Tensor) -> None:
    """In place: each index becomes the term of its word. ``spare`` is memory of the same size."""
    indices.mul_(_INDEX).add_(words)
    for shift, factor in ((32, _FIRST), (29, _SECOND)):
        torch.bitwise_right_shift(indices, shift, out=spare)
        indices.bitwise_xor_(spare).mul_(factor)
    torch.bitwise_right_shift(indices, 32, out=spare)
    indices.bitwise_xor_(spare)


def frozen_values(parts: ModelParts) -> dict[str, str]:
    """The checksums of all that the finished tasks use, by tensor name: of gated tensors the elements that some task
    uses, and the whole of finished heads, of the values of ``per_task`` tensors, and of ``frozen`` tensors.

    A checksum is written as the dtype, a space and 16 hexadecimal digits. The host waits for each device once.
    """
    return _written(dict(_frozen(parts, parts.tasks_of_layers())))


def after_task(parts: ModelParts, before: Mapping[str, str]) -> dict[str, str]:
    """What :func:`frozen_values` returns, just after the model has got the values of one more finished task.

    Args:
        parts: the model.
        before: what :func:`frozen_values` returned without this task. It has to be right: the heads of the tasks before
            and their rows are not read again.
    """
    tasks = parts.tasks_of_layers()
    frozen = dict(_frozen(parts, tasks[-1:]))
    last = {name: _last_row(one.tensor) for name, one in frozen.items() if one.grows and name in before}
    now = _written({**frozen, **last})
    for name in last:
        now[name] = _sum(before[name], now[name])
    return {**before, **now}


def _sum(one: str, other: str) -> str:
    """The checksum of two parts of one tensor. Raises ``ValueError`` if ``one`` is none."""
    (dtype, first), (_, second) = one.split(), other.split()
    return f"{dtype} {(int(first, 16) + int(second, 16)) % 2**64:016x}"


def _last_row(rows: Tensor) -> _Read:
    return _Read(rows[-1], first=rows[:-1].numel())


def _written(named: Mapping[str, _Read]) -> dict[str, str]:
    """The checksums as they are saved."""
    by_device: dict[torch.device, list[str]] = {}
    for name, frozen in named.items():
        by_device.setdefault(frozen.tensor.device, []).append(name)
    kinds: dict[torch.dtype, str] = {}
    written: dict[str, str] = {}
    for device, names in by_device.items():
        together = {name for name in names if _is_small(named[name], _limit(device))}
        names.sort(key=together.__contains__, reverse=True)
        sums = [checksums([named[name].tensor for name in names[: len(together)]])] if together else []
        alone = names[len(together) :]
        own = [checksum(*named[name][:3]).reshape(1) for name in alone]
        _add_other_shards([named[name].shard for name in alone], own)
        sums += own
        for name, total in zip(names, torch.cat(sums).tolist(), strict=True):
            dtype = named[name].tensor.dtype
            kind = kinds.setdefault(dtype, str(dtype).removeprefix("torch."))
            written[name] = f"{kind} {total % 2**64:016x}"
    return {name: written[name] for name in named}


def _add_other_shards(shards: Sequence[ShardedGate | None], sums: Sequence[Tensor]) -> None:
    """In place: the checksums of shards become those of the whole tensors."""
    mine = [(shard, total) for shard, total in zip(shards, sums, strict=True) if shard is not None]
    if mine:
        joined = torch.cat([total for _, total in mine])
        collectives.sum_over(mine[0][0].group, joined)
        for (_, total), whole in zip(mine, joined, strict=True):
            total.copy_(whole)


def _is_small(read: _Read, limit: int) -> bool:
    return read.shard is None and read.union is None and not read.first and read.tensor.numel() <= limit


def _frozen(parts: ModelParts, tasks: Sequence[TaskId]) -> Iterator[tuple[str, _Read]]:
    """Everything that must not change, by name, with the heads of ``tasks`` only."""
    if not tasks:
        return
    for name, gate in parts.gated():
        shard = shard_of(gate.param)
        yield name, _Read(local(gate.param), gate.union, 0 if shard is None else shard.first, shard=shard)
    keys = {task_key(task) for task in tasks}
    for prefix, heads in parts.heads.items():
        path = f"{prefix}.heads.".lstrip(".")
        for key, head in heads.heads.items():
            if key in keys:
                for name, tensor in _tensors(head):
                    yield f"{path}{key}.{name}", _Read(tensor)
    for item in parts.owned:
        if item.kind == "per_task" and item.attribute in per_task.marked(item.module):
            rows = getattr(item.module, f"{item.attribute}_tasks")
            yield f"{item.name}_tasks", _Read(rows, grows=True)
        elif item.kind == "frozen":
            yield item.name, _Read(item.tensor)


def _tensors(head: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if head._modules:
        yield from (*head.named_parameters(), *head.named_buffers())
        return
    for own in (head._parameters, head._buffers):  # faster, and there may be a thousand heads
        for name, tensor in own.items():
            if tensor is not None:
                yield name, tensor


def changed(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two results of :func:`frozen_values` differ."""
    return [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
