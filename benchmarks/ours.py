"""The library as competitors of a training step: the guard, CUDA graphs and ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsn_fast import capture_step
from wsn_fast.doctor.measuring.checks import UnavailableError, WrongResultError
from wsn_fast.doctor.measuring.competitors import Competitor, Dense, Eager
from wsn_fast.doctor.measuring.ours import Ours, OursOnePass, OursOnePassCoded
from wsn_fast.doctor.measuring.problem import Problem

from .competitors import Clarena, EagerCompiled, Paper

_CAPTURE_TRIES = 8  # steps after which everything that can be captured has been captured


class OursGuarded(Ours):
    """The same net with torch's fused AdamW inside :meth:`WSN.guard`; any optimizer can be used in this way."""

    name = "ours, guarded"

    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.wsn.guard(Competitor.make_optimizer(self))


class OursCompiled(Ours):
    """The converted net through ``torch.compile``; the optimizer stays as it is."""

    name, compiled = "ours, compiled", True

    def build(self, net: nn.Module) -> None:
        super().build(net)
        self.wsn.compile()


class OursCaptured(Ours):
    """The whole step in one CUDA graph, by :func:`wsn_fast.capture_step`; on a CPU it is unavailable."""

    name, captures = "ours, captured", True
    settled = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.run = capture_step(self.wsn, self.optimizer, self._compute)

    def _compute(self, x: Tensor, target: Tensor) -> Tensor:
        self.x = x.detach().requires_grad_(not self.problem.is_net)  # in a graph, its own copy of the batch
        with self.problem.autocast():
            return self.loss(self.model(self.x), target)

    def step(self) -> None:
        self.run(self.problem.x, self.problem.target)

    def settle(self) -> None:
        """Step until replays have begun, and take the state reached then as the start. Putting the first weights back
        would change them from outside, and after that no step is a replay."""
        for _ in range(_CAPTURE_TRIES):
            if not self.run.captured:
                self.step()
        if not self.run.captured:
            raise UnavailableError(self.run.reason)
        self.check_later()
        self.settled = True
        self.problem.start = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self.mean_gradient(parameter)  # what a graph leaves in .grad is its own

    def check_later(self) -> str:
        if self.settled and not self.run.captured:
            raise WrongResultError(f"the last step was no replay: {self.run.reason}")
        return super().check_later()


class OursOnePassCaptured(OursCaptured):
    """The one-pass step as one CUDA graph."""

    name, one_pass = "ours, one pass, captured", True


COMPETITORS: tuple[type[Competitor], ...] = (
    Dense, Ours, OursGuarded, OursOnePass, OursOnePassCoded, OursCaptured, OursOnePassCaptured, Eager, Paper, Clarena,
    OursCompiled, EagerCompiled,
)  # fmt: skip
"""All competitors, in the order of rows."""
