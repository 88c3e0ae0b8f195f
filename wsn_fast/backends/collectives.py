"""Thin calls of ``torch.distributed``. Each does nothing where a process is alone: without a group, or in a group of
one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.futures import Future


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


def texts_of(group: ProcessGroup | None, text: str) -> list[str]:
    """The texts of all processes, in the order of their ranks."""
    texts = [text] * size(group)
    if size(group) > 1:
        torch.distributed.all_gather_object(texts, text, group=group)
    return texts
