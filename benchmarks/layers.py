"""Gated layers of the two published programs."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from wsn_fast.doctor.measuring.layers import GatedLayer
from wsn_fast.doctor.measuring.weights import DENSITY
from wsn_fast.reference.trainer import ClarenaGate, PaperGate


class PaperLayer(GatedLayer):
    """The paper's, with the gate of :mod:`wsn_fast.reference.trainer`."""

    gate_class: ClassVar[type[PaperGate]] = PaperGate

    def keep(self, union: Tensor) -> None:
        self.gate = self.gate_class(self.weight.detach())
        self.gate.use(union)

    def mask(self, scores: Tensor) -> Tensor:
        return self.gate.mask(scores, self.gate.threshold(scores, DENSITY)).bool()

    def masked_weight(self) -> Tensor:
        return self.weight * self.gate.mask(self.scores, self.gate.threshold(self.scores, DENSITY))

    def protect(self) -> None:
        assert self.weight.grad is not None
        self.gate.protect(self.weight.grad)


class ClarenaLayer(PaperLayer):
    """CLArena's."""

    rule, gate_class = "value", ClarenaGate
    mask_tolerance = 2**-20  # an interpolated fp32 quantile of many scores is off by a few of them
