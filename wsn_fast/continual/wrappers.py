"""Finds wrappers of several processes or devices inside of a model, and parameters that they have cut into shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_WAY_OUT = "Train on one process, or wrap the whole WSN: DistributedDataParallel(wsn)"


def check_model(model: nn.Module) -> None:
    """Raise ``RuntimeError`` if a part of ``model`` is wrapped, or if its parameters are sharded."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for name, module in model.named_modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)) or (fsdp and isinstance(module, fsdp)):
            kind = type(module).__name__
            reason = "its copies do not know the tasks" if kind == "DataParallel" else "it does not know later heads"
            raise RuntimeError(f"{name or 'the model'} is wrapped in {kind} inside of the WSN: {reason}. {_WAY_OUT}")
    check_whole(model.named_parameters())


def check_whole(params: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ``RuntimeError`` if a parameter is a DTensor, as those of FSDP2 and of tensor parallelism are."""
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    for name, param in params if kind is not None else ():
        if isinstance(param, kind):
            raise RuntimeError(
                f"{name} is a DTensor: FSDP2 (fully_shard) and tensor parallelism are not supported, because each "
                f"process would choose a mask of its own shard. {_WAY_OUT}"
            )
