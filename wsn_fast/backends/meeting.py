"""How the processes that torchrun has started meet."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import launch
from . import collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store  # type: ignore[attr-defined]


class Meeting(NamedTuple):
    """The processes, as one of them sees them.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        group: their process group, which is the default one.
        store: texts and counts that they share beside the group. Under torchrun it outlives each of them.
    """

    rank: int
    size: int
    group: ProcessGroup
    store: Store


def meet(timeout: timedelta | None = None) -> Meeting:
    """Make the process group of all processes of this run. On a machine with GPUs, tensors there are sent by NCCL and
    all others by gloo.

    Args:
        timeout: how long a process waits for the others in one call; None for PyTorch's default.

    Raises:
        ValueError: one of torchrun's environment variables is missing or no number.
        RuntimeError: this build of PyTorch has no gloo, or the processes do not find each other.
    """
    rank, size = launch.rank(), launch.world_size()
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        raise RuntimeError("several processes need gloo, which this build of PyTorch does not have")
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    own = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    collectives.end_calmly()
    return Meeting(rank, size, dist.group.WORLD, store)
