"""Access to the Triton launchers themselves, for what no backend's primitive does: many tensors at once, other tiles.

``wsn_fast.kernels`` is imported where it is needed, so that the rest runs on machines without triton.
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

from .cases import UnavailableError
from .timing import Call


def missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device`` in this process; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels need a GPU (or TRITON_INTERPRET=1, for their results alone)"
    return None


def kernels(name: str, device: torch.device) -> ModuleType:
    """``wsn_fast.kernels.<name>``.

    Raises:
        UnavailableError: it cannot run here.
    """
    reason = missing(device)
    if reason:
        raise UnavailableError(reason)
    return importlib.import_module(f"wsn_fast.kernels.{name}")


def threshold(scores: Sequence[Tensor], ranks: Sequence[int], rule: str, config: Any = None) -> tuple[Call, Tensor]:
    """The selection over all of ``scores`` at once, and the thresholds [T] that it writes."""
    module = kernels("threshold", scores[0].device)
    tensors = [s.detach() for s in scores]
    table = module.make_table(tensors, list(ranks), config or module.CONFIGS[0])
    tau = tensors[0].new_empty(len(tensors))
    workspace = torch.empty(module.workspace_size(table), dtype=torch.int64, device=tau.device)
    return lambda: module.select(table=table, tau=tau, workspace=workspace, rule=rule), tau
