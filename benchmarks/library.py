"""The library's parts as contenders: its backends, and the Triton launchers themselves.

``wsn_fast.kernels`` is imported where it is needed, so that the rest runs on machines without Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wsn_fast.backends import NAMES, choose

from .checks import UnavailableError
from .timing import Call

BACKENDS = NAMES


def backend(name: str, operation: str, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The backend module ``name``; ``UnavailableError`` with the reason if it does not run ``operation`` there."""
    choice = choose(operation, device, dtype, name)
    if choice.name != name:
        raise UnavailableError(choice.reason.removeprefix(f"backend={name!r}, but "))
    return choice.backend


def kernels(name: str, device: torch.device) -> ModuleType:
    """The module ``wsn_fast.kernels.<name>``; ``UnavailableError`` where Triton kernels cannot run on ``device``."""
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError("Triton kernels need a GPU (or TRITON_INTERPRET=1, for their results alone)")
    return importlib.import_module(f"wsn_fast.kernels.{name}")


def threshold(scores: Sequence[Tensor], ranks: Sequence[int], rule: str, config: Any = None) -> tuple[Call, Tensor]:
    """One launch of the Triton selection over all of ``scores``: the call, and the thresholds [T] that it writes."""
    tables, launchers = (kernels(name, scores[0].device) for name in ("threshold_table", "threshold"))
    tensors = [s.detach() for s in scores]
    table = tables.make_table(tensors, list(ranks), config or tables.CONFIGS[0])
    tau = tensors[0].new_empty(len(tensors))
    workspace = torch.empty(tables.workspace_size(table), dtype=torch.int64, device=tau.device)
    return lambda: launchers.select(table=table, tau=tau, workspace=workspace, rule=rule), tau
