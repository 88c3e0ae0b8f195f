"""Running means in 8 bits in a checkpoint. The blocks that share a scale begin with the rows of each process, so their
scales depend on the number of processes, and another number has to encode the means anew."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from ..backends import collectives, moments
from ..backends.moments import BLOCK, SIGNED, UNSIGNED, Stored
from ..nn.shards import ShardedGate, local
from ..optim import SubnetAdamW, SubnetSGD

MEANS: Mapping[str, bool] = {**SubnetAdamW.MEANS, **SubnetSGD.MEANS}
"""The names of the running means, and whether each has a sign."""


def scales_of_process(scales: Tensor, shard: ShardedGate) -> Tensor:
    """The scales of this process as a row of the scales of all: float32 [1, blocks of the largest shard]."""
    most = -(-max(shard.counts) // BLOCK)
    row = scales.new_zeros(1, most)
    row[0, : len(scales)] = scales
    return row


def processes_of(size: tuple[int, ...]) -> int:
    """By how many processes scales of this shape were saved: ``[blocks]`` is of a tensor that is whole."""
    return size[0] if len(size) == 2 else 1


def has_same_blocks(size: tuple[int, ...], shard: ShardedGate | None) -> bool:
    """Whether the blocks that were saved with scales of this shape are those that this process has."""
    return processes_of(size) == (1 if shard is None else collectives.size(shard.group))


def own_scales(scales: Tensor, param: Tensor) -> Tensor:
    """The scales of what this process has of a parameter, from its row or from the scales of the whole."""
    return scales.reshape(-1)[: moments.blocks_of(local(param))].clone()


def decoded_here(codes: Tensor, scales: Tensor, key: str, param: Tensor) -> Tensor:
    """What this process has of a mean that was saved with the blocks that it has."""
    return moments.decode(Stored(codes, own_scales(scales, param)), local(param).detach(), MEANS[key])


def decoded(codes: Tensor, scales: Tensor, key: str, param: Tensor, shard: ShardedGate | None) -> Tensor:
    """What this process has of a mean that was saved by another number of processes.

    Args:
        codes: ``uint8``, this process's rows.
        scales: float32, those of all processes that saved them.
        key: the name of the mean.
        param: its parameter.
        shard: that of the parameter, if it is cut.

    Returns:
        float32, in the shape of ``codes``.
    """
    world, code = processes_of(tuple(scales.shape)), SIGNED if MEANS[key] else UNSIGNED
    out, inner = (param.shape[0], prod(param.shape[1:])) if param.ndim else (1, 1)
    chunk = -(-out // world) * inner
    flat, first = codes.reshape(-1), 0 if shard is None else shard.first
    parts: list[Tensor] = []
    at = 0
    while at < len(flat):
        process, place = divmod(first + at, chunk)
        block, skip = divmod(place, BLOCK)
        here = flat[at : at + chunk - place]
        whole = torch.cat([here.new_zeros(skip), here])  # from the beginning of a block
        of_process = scales.reshape(world, -1)[process, block : block - (-len(whole) // BLOCK)]
        parts.append(moments.decode_8bit(whole, of_process, code)[skip:])
        at += len(here)
    return torch.cat([flat.new_zeros(0, dtype=torch.float32), *parts]).view(codes.shape)
