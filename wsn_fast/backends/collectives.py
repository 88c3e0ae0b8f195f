"""Thin calls of ``torch.distributed``. Each does nothing where a process is alone: without a group, or in a group of
one."""

from __future__ import annotations

import atexit
import functools
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.futures import Future


_LAST_SECONDS = 0.2


@functools.cache
def end_calmly() -> None:
    """Let this process wait a moment when it ends. Whoever keeps a process group calls this.

    The threads of gloo let go of a tensor after its collective has returned, and need Python for that. If Python is
    already ending and the group is still there, they abort the process: "terminate called without an active exception"
    (torch 2.13; 4 of 20 programs with FSDP2 on two cores, and none of 40 with this).
    """
    atexit.register(time.sleep, _LAST_SECONDS)


def check_group(group: object) -> None:
    """Check an argument ``group``.

    Raises:
        TypeError: it is neither None nor a process group.
        ValueError: this process is not in it.
    """
    if group is None:
        return
    dist = torch.distributed
    if not is_initialized():
        raise ValueError("group must be None: torch.distributed.init_process_group was not called")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must contain this process, rank {dist.get_rank()} of {dist.get_world_size()}")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def is_initialized() -> bool:
    """Whether ``torch.distributed`` has process groups."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def size(group: ProcessGroup | None) -> int:
    """How many processes are in ``group``; 1 without one."""
    return 1 if group is None else group.size()


def sum_over(group: ProcessGroup | None, tensor: Tensor) -> None:
    """In place, ``tensor`` becomes the sum of those of all processes."""
    if size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)


def start_sum_over(group: ProcessGroup, tensor: Tensor) -> Future[list[Tensor]]:
    """:func:`sum_over`, in the background. The future has ``tensor`` in a list."""
    return torch.distributed.all_reduce(tensor, group=group, async_op=True).get_future()


def largest_over(group: ProcessGroup | None, tensor: Tensor) -> None:
    """In place, each element of ``tensor`` becomes the largest one of all processes."""
    if size(group) > 1:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=group)


def send_from_first(group: ProcessGroup | None, tensor: Tensor) -> None:
    """In place, ``tensor``, of any strides, becomes that of the first process."""
    if size(group) > 1:
        joined = tensor.contiguous()
        torch.distributed.broadcast(joined, group=group, group_src=0)
        if joined is not tensor:
            tensor.copy_(joined)


def joined(group: ProcessGroup | None, part: Tensor) -> Tensor:
    """The 1-d tensors of all processes, of any lengths, one after the other in the order of their ranks."""
    if size(group) == 1:
        return part
    every = [torch.zeros(1, dtype=torch.int64, device=part.device) for _ in range(size(group))]
    torch.distributed.all_gather(every, every[0].new_tensor([part.numel()]), group=group)
    counts: list[int] = torch.cat(every).tolist()
    longest = max(counts) * part.element_size()
    mine = torch.zeros(longest, dtype=torch.uint8, device=part.device)  # not every backend has all dtypes
    own = part.contiguous().view(torch.uint8)
    mine[: own.numel()] = own
    parts = [torch.empty_like(mine) for _ in counts]
    if longest:
        torch.distributed.all_gather(parts, mine, group=group)
    return torch.cat([one[: n * part.element_size()] for one, n in zip(parts, counts, strict=True)]).view(part.dtype)


def texts_of(group: ProcessGroup | None, text: str) -> list[str]:
    """The texts of all processes, in the order of their ranks."""
    texts = [text] * size(group)
    if size(group) > 1:
        torch.distributed.all_gather_object(texts, text, group=group)
    return texts
