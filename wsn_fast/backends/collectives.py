"""Thin calls of ``torch.distributed``. Each does nothing where a process is alone: without a group, or in a group of
one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_group(group: object) -> None:
    """Check an argument ``group``.

    Raises:
        TypeError: it is neither None nor a process group.
        ValueError: this process is not in it.
    """
    if group is None:
        return
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group must be None: torch.distributed.init_process_group was not called")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must contain this process, rank {dist.get_rank()} of {dist.get_world_size()}")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def size(group: ProcessGroup | None) -> int:
    """How many processes are in ``group``; 1 without one."""
    return 1 if group is None else group.size()


def sum_over(group: ProcessGroup | None, tensor: Tensor) -> None:
    """In place, ``tensor`` becomes the sum of those of all processes."""
    if size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)
