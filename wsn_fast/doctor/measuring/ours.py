"""The library as competitors of a training step, with its own optimizer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import WSN, TaskHeads, convert, topc_mask
from ...backends.moments import encode, zeros
from ...optim.optimizers import SubnetAdamW
from ...optim.stored_means import mean_in
from .checks import check_same
from .competitors import LEARNING_RATE, Competitor
from .problem import HEAD
from .weights import DENSITY, FROZEN


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
