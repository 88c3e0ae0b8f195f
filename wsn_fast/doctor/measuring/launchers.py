"""The launchers of the Triton kernels, imported where they are needed: the rest runs on machines without Triton."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .checks import UnavailableError
from .timing import Call


def kernels(name: str, device: torch.device) -> ModuleType:
    """The module ``wsn_fast.kernels.<name>``; ``UnavailableError`` where Triton kernels cannot run on ``device``."""
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("triton is not installed")
    from ...backends import triton as backend

    if device.type == "cpu" and not backend.INTERPRETED:
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
