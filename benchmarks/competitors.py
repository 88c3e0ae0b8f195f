"""The published programs and the compiler as competitors of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wsn_fast.doctor.measuring.competitors import LEARNING_RATE, Eager

from .layers import ClarenaLayer, PaperLayer


def compiled(module: nn.Module) -> Any:
    """The module through ``torch.compile``."""
    torch.compiler.reset()  # there is a limit to how often the same Python is compiled for other modules
    return torch.compile(module, dynamic=False, fullgraph=True)


class EagerCompiled(Eager):
    """The same through ``torch.compile``, net and gates together."""

    name, compiled = "best eager, compiled", True

    def build(self, net: nn.Module) -> None:
        super().build(net)
        self.model = compiled(net)


class Paper(Eager):
    """The paper's program, with plain Adam."""

    name, layer, waits = "paper", PaperLayer, True

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters.values(), LEARNING_RATE)


class Clarena(Paper):
    """CLArena's program."""

    name, layer, linear_only = "CLArena", ClarenaLayer, True
    rule, mask_tolerance = ClarenaLayer.rule, ClarenaLayer.mask_tolerance
