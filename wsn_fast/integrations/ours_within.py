"""What is ours in a training loop that is not: the WSN in its model, and the one-pass optimizer in its optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from wsn_fast import WSN
from wsn_fast.continual.optimizers_within import within
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer


def wsn_within(module: nn.Module, remedy: str) -> WSN:
    """The one WSN that ``module`` is or contains. Raises ``ValueError``, which ends with ``remedy``, unless there is
    exactly one."""
    found = [inner for inner in module.modules() if isinstance(inner, WSN)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} must contain one WSN, found {len(found)}: {remedy}")
    return found[0]


def one_pass_within(optimizer: Any) -> SubnetOptimizer | None:
    """The one-pass optimizer that ``optimizer`` is or wraps; None if it is another one. What its parameters have as
    gradients is not what it updates with, so it has to clip them itself."""
    return next((one for one in within(optimizer) if isinstance(one, SubnetOptimizer) and one.one_pass), None)
