"""What the Triton backend has to know about a device: how to launch on it, its tuning table, and its size."""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from . import tuning

INTERPRETED: bool = knobs.runtime.interpret
_INTERPRETER = "Triton's interpreter"


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which the device of ``tensor`` is the current one. Triton launches on the current device, whatever
    the device of the arguments is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@functools.cache
def table_of(device: torch.device) -> tuning.Table:
    """The tiles and crossovers that were measured on this GPU model."""
    return tuning.table(_INTERPRETER if device.type == "cpu" else torch.cuda.get_device_name(device))


@functools.cache
def gpu_of(device: torch.device) -> tuning.Gpu:
    """How many multiprocessors there are, and how much shared memory a block may use."""
    if device.type == "cpu":
        return tuning.Gpu(processors=1, shared=sys.maxsize)
    found = torch.cuda.get_device_properties(device)
    return tuning.Gpu(found.multi_processor_count, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]
