"""What a checkpoint has of a WSN and of its optimizer: a name for each tensor, and what this process holds of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import collectives
from ..continual.frozen_values import checksum
from ..continual.wsn import WSN
from ..nn.gated import SubnetLayer
from ..nn.shards import ShardedGate, local, shard_of

MODEL, STATE = "wsn.", "optimizer."


class Entry(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        rows: what this process holds of it, contiguous: all of it, or the rows of a shard.
        gate: that of the shard, which is cut in the same way; None for a tensor that is whole.
        by_process: whether each process has one row, whatever the rows of the shard are.
    """

    rows: Tensor
    gate: ShardedGate | None = None
    by_process: bool = False

    def for_dcp(self) -> Tensor:
        """The tensor as ``torch.distributed.checkpoint`` takes it."""
        if self.gate is None:
            return self.rows
        return self.gate.placed(self.rows, collectives.size(self.gate.group) if self.by_process else None)

    def checksum(self) -> Tensor:
        """The checksum of the rows, int64, 0-d. Those of all processes add up to that of the whole tensor."""
        if self.gate is None:
            return checksum(self.rows)
        start = self.gate.group.rank() if self.by_process else self.gate.rows.start
        return checksum(self.rows, first=start * math.prod(self.rows.shape[1:]))


def checksums(entries: Mapping[str, Entry], wsn: WSN) -> dict[str, str]:
    """The checksums of whole tensors, by name: the dtype, and 16 hexadecimal digits. All processes call this, with the
    same names."""
    sharding = wsn.gates.sharding
    device = torch.device("cpu") if sharding is None else sharding.device
    sums = [one.checksum().to(device) for one in entries.values()]
    own = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)
    if sharding is not None and sums:
        whole = own.clone()
        collectives.sum_over(sharding.group, whole)
        cut = torch.tensor([one.gate is not None for one in entries.values()], device=device)
        own = torch.where(cut, whole, own)
    numbers = own.tolist()
    kinds = [str(one.rows.dtype).removeprefix("torch.") for one in entries.values()]
    named = zip(entries, kinds, numbers, strict=True)
    return {name: f"{kind} {number % 2**64:016x}" for name, kind, number in named}


# --- of the model
class Place(NamedTuple):
    """A gated tensor, its scores (``_score``) or its masks (``_masks``), as a state has them: ``what`` is the end of
    its name. ``shape`` is that of the rows that this process holds of the gated tensor, ``whole`` that of all."""

    gate: ShardedGate | None
    what: str
    shape: tuple[int, ...]
    whole: tuple[int, ...]

    def rows_of(self, value: Tensor) -> Tensor:
        """What a checkpoint has of a tensor of a state: for masks see :func:`masks_by_row`."""
        return masks_by_row(value, self.shape) if self.what == "_masks" else plain(value)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows_of`."""
        if self.what == "_masks":
            return flat_masks(rows, self.shape)
        return rows if self.gate is None else self.gate.placed(rows)

    def expected(self, tasks: int) -> tuple[int, ...]:
        """The shape of the whole tensor in a checkpoint."""
        if self.what != "_masks":
            return self.whole
        out, inner = _rows_and_inner(self.whole)
        return out, tasks, ops.packed_size(inner)


def gated_places(wsn: WSN) -> dict[str, Place]:
    """What a state has of gated tensors, by name."""
    found = {}
    for path, layer in wsn.named_modules():
        for gate in layer.gated() if isinstance(layer, SubnetLayer) else ():
            shard = shard_of(gate.param)
            for what in ("", "_score", "_masks"):
                place = Place(shard, what, tuple(local(gate.param).shape), tuple(gate.param.shape))
                found[f"{path}.{gate.name}{what}"] = place
    return found


def of_model(wsn: WSN) -> dict[str, Entry]:
    """The entries of a WSN.

    Raises:
        TypeError: some module saves something that is no tensor; the message names it.
    """
    places = gated_places(wsn)
    entries = {}
    for name, value in exported(wsn).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} of the WSN must be a tensor to be in a checkpoint, got {type(value).__name__}")
        place = places.get(name)
        if place is None:
            entries[f"{MODEL}{name}"] = Entry(plain(value))
        elif place.what != "_masks" or len(value):
            entries[f"{MODEL}{name}"] = Entry(place.rows_of(value), place.gate)
    return entries


def exported(wsn: WSN) -> dict[str, Any]:
    """The state of a WSN. If it is sharded, it has what this process holds."""
    with parts_are_known(wsn):
        return dict(wsn.state_dict())


@contextmanager
def parts_are_known(wsn: WSN) -> Iterator[None]:
    """In this block a state of a sharded WSN may be made or loaded that has the parts of this process."""
    sharding = wsn.gates.sharding
    wsn.__dict__["_is_exported"] = True
    if sharding is not None:
        sharding.is_exported = True
    try:
        yield
    finally:
        del wsn.__dict__["_is_exported"]
        if sharding is not None:
            sharding.is_exported = False


def plain(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, contiguous and of no class of its own."""
    return local(tensor).detach().as_subclass(Tensor).contiguous()


# --- masks
def masks_by_row(masks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Packed masks in which each row of the masked tensor begins with a byte, so that rows can be cut and joined.

    Args:
        masks: ``uint8`` [T, ceil(n / 8)].
        shape: of the masked tensor; its first length is the number of its rows.

    Returns:
        ``uint8`` [rows, T, ceil(n / rows / 8)].
    """
    out, inner = _rows_and_inner(shape)
    size = ops.packed_size(inner)
    rows = masks.new_empty(out, len(masks), size)
    for task, packed in enumerate(masks) if rows.numel() else ():
        if inner % 8 == 0:
            rows[:, task] = packed.view(out, size)
        else:
            bits = ops.unpack_mask(packed, (out, inner))
            rows[:, task] = ops.pack_mask(torch.nn.functional.pad(bits, (0, 8 * size - inner))).view(out, size)
    return rows


def flat_masks(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`masks_by_row`."""
    out, inner = _rows_and_inner(shape)
    masks = rows.new_empty(rows.shape[1], ops.packed_size(out * inner))
    for task in range(len(masks)) if rows.numel() else ():
        packed = rows[:, task].reshape(-1)
        if inner % 8:
            packed = ops.pack_mask(ops.unpack_mask(packed, (out, 8 * rows.shape[2]))[:, :inner])
        masks[task] = packed
    return masks


def _rows_and_inner(shape: Iterable[int]) -> tuple[int, int]:
    out, *inner = tuple(shape) or (1,)
    return out, math.prod(inner)
