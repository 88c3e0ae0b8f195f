"""Finds where the host waits for a GPU, or would wait for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def no_sync() -> Iterator[None]:
    """Any host synchronisation inside the block is an error."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class RefusesHostWaits(TorchDispatchMode):
    """On a CPU: operations for which the host would wait on a GPU, because a value or a size depends on the data, are
    errors in the block."""

    WAITING = (
        "_local_scalar_dense",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique",
        "_unique2",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])
        if name in self.WAITING or by_mask:
            raise AssertionError(f"the host would wait in {func}")
        return func(*args, **(kwargs or {}))
