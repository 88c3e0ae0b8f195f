"""The library as competitors of a training step: its optimizers, the guard, CUDA graphs and ``torch.compile``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from wsn_fast import WSN, TaskHeads, capture_step, convert, topc_mask
from wsn_fast.backends.moments import encode, zeros
from wsn_fast.optim.optimizers import SubnetAdamW
from wsn_fast.optim.stored_means import mean_in

from .checks import UnavailableError, WrongResultError, check_same
from .competitors import LEARNING_RATE, Clarena, Competitor, Dense, Eager, EagerCompiled, Paper
from .data import DENSITY, FROZEN
from .problem import HEAD, Problem

_CAPTURE_TRIES = 8  # steps after which everything that can be captured has been captured


class Ours(Competitor):
    """This library as the driver uses it: a converted net in a :class:`WSN` whose masked weights are made ahead, and
    :class:`SubnetAdamW`."""

    name = "ours"
    one_pass: ClassVar[bool] = False
    moments: ClassVar[str] = "float32"

    def build(self, net: nn.Module) -> None:
        problem = self.problem
        self.wsn = WSN(convert(net, DENSITY, heads=HEAD if problem.is_net else None), gates_ahead=True)
        self.layers = dict(zip(problem.gated, self.wsn.subnet_layers().values(), strict=True))
        self.wsn.begin_task("first", density=FROZEN)
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight_score.copy_(problem.old_scores[name])
        self.wsn.end_task()
        self.wsn.begin_task("second")
        self.model, self.parameters = self.wsn, {}
        for name, layer in self.layers.items():
            self.parameters[f"{name}.weight"] = layer.get_parameter("weight")
            self.parameters[f"{name}.scores"] = layer.get_parameter("weight_score")
        if problem.is_net:
            heads = self.wsn.model.get_submodule(HEAD)
            assert isinstance(heads, TaskHeads)
            self.parameters[f"{HEAD}.weight"] = heads.head("second").get_parameter("weight")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(problem.start[name])

    def mask(self, name: str, scores: Tensor) -> Tensor:
        return topc_mask(scores, DENSITY, rule=self.layers[name].rule, backend=self.layers[name].backend)

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = SubnetAdamW(self.wsn, LEARNING_RATE, one_pass=self.one_pass, moments=self.moments)
        for group in optimizer.param_groups:
            group["capturable"] = self.problem.device.type == "cuda"  # its step count is on the device anyway
        return optimizer

    def finish(self) -> None:
        super().finish()
        self.wsn.end_task()
        self.wsn.use_task("second")  # for all batches, so that the masked weights are kept

    @torch.no_grad()
    def infer(self) -> Tensor:
        with self.problem.autocast():
            y: Tensor = self.model(self.problem.x)
        return y

    def mean_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient as the optimizer had it: its first running mean of g is ``(1 - beta1) * g``."""
        mean: Tensor = self.optimizer.state[parameter]["exp_avg"]
        return mean.double() / (1 - self.optimizer.param_groups[0]["betas"][0])


class OursGuarded(Ours):
    """The same net with torch's fused AdamW inside :meth:`WSN.guard`; any optimizer can be used in this way."""

    name = "ours, guarded"

    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.wsn.guard(Competitor.make_optimizer(self))


class OursOnePass(Ours):
    """Gradient masking, both updates and the gate of the next step in one pass; backward gives no dW and dS."""

    name, one_pass = "ours, one pass", True

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self.mean_gradient(parameter)


class OursOnePassCoded(OursOnePass):
    """The one-pass step with its running means in 8 bits."""

    name, moments = "ours, one pass, 8 bits", "8bit"

    def check(self) -> str:
        """After the first step: that of a twin with means in float32, which is checked in full, is the same to the bit,
        and the codes are those of its means."""
        twin = OursOnePass(self.problem)
        twin.step()
        checked = twin.check()
        check_same(self.y, twin.y, "result")
        for name, parameter in self.parameters.items():
            theirs = twin.parameters[name]
            check_same(parameter.detach(), theirs.detach(), name)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                found = mean_in(self.optimizer.state[parameter], key)
                assert found is not None
                if found.storage == "float32":  # of a head, which is not gated
                    continue
                mean = twin.optimizer.state[theirs][key]
                expected = zeros(mean, found.storage, signed)
                encode(mean, expected, signed, torch.ones((), device=mean.device))
                check_same(found.values, expected.values, f"{key} of {name}")
        self.check_later()
        return f"as in float32, which has: {checked}"


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
