"""The WSN in a model of somebody else's training loop."""

from __future__ import annotations

from torch import nn

from wsn_fast import WSN


def wsn_within(module: nn.Module, remedy: str) -> WSN:
    """The one WSN that ``module`` is or contains. Raises ``ValueError``, which ends with ``remedy``, unless there is
    exactly one."""
    found = [inner for inner in module.modules() if isinstance(inner, WSN)]
    if len(found) != 1:
        raise ValueError(f"{type(module).__name__} must contain one WSN, found {len(found)}: {remedy}")
    return found[0]
