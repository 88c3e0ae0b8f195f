"""A layer or a net in the middle of a continual-learning run, measured by the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast.doctor.measuring import problem
from wsn_fast.doctor.measuring.shapes import ConvShape, LinearShape
from wsn_fast.reference import specification
from wsn_fast.train import nets

from .shapes import NetShape

StepShape = LinearShape | ConvShape | NetShape


class Problem(problem.Problem):
    """The second task of a single layer, whose results are compared with those of the reference."""

    oracle = specification


class NetProblem(Problem):
    """The second task of a net, without dropout. The target are labels."""

    is_net = True

    def build_net(self) -> nn.Module:
        net = nets.build(self.shape.net, self.shape.inputs, self.shape.classes)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net

    def make_target(self, y: Tensor) -> Tensor:
        self.x = self.x.float()  # fp32 as in data sets, of values that bf16 has
        return torch.randint(self.shape.classes, (self.shape.rows,), device=self.device)

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(y, target)


def problem_of(shape: StepShape, device: torch.device) -> Problem:
    """The problem of a layer or a net."""
    return NetProblem(shape, device) if isinstance(shape, NetShape) else Problem(shape, device)
