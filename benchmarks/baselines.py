"""The competitors: one training step (zero_grad, forward, loss, backward, gradient masking, optimizer) in several
programs.

All start from the same :class:`Problem`. Weight decay is zero: the published programs let it move frozen weights, and
with it they would not compute the same.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wsn_fast import WSN, TaskHeads, capture_step, convert, reference, topc_mask
from wsn_fast.optim import SubnetAdamW

from .cases import UnavailableError, WrongResultError, check_same
from .data import DENSITY, FROZEN
from .problem import HEAD, Problem, Results
from .programs import ClarenaLayer, CompetentLayer, PaperLayer, ProgramLayer, with_layers

LEARNING_RATE = 1e-6
"""Small, so that hundreds of timed steps on one batch stay near the start."""
EPSILON = 1e-8

MASTER, BIT = 4, 1 / 8  # bytes of an fp32 value and of a mask bit
_CAPTURE_TRIES = 8  # steps after which what can be captured has been


def step_bytes(updated: int, itemsize: int, masked: bool) -> float:
    """The least traffic per weight of the elementwise part of a step, in bytes.

    Args:
        updated: how many fp32 values of a weight the optimizer moves, each with two moments: read and written once.
        itemsize: of the compute dtype, in which the gradient is read, and the weight of the next step is written unless
            it is the fp32 weight itself.
        masked: whether there are masks: this one and the union are read, the next one is written.
    """
    shadow = itemsize if masked or itemsize < MASTER else 0
    return itemsize + updated * 3 * 2 * MASTER + shadow + (3 * BIT if masked else 0)


class Competitor:
    """A training step. Subclasses say what becomes of the dense net, and what updates it.

    Attributes:
        name: in tables.
        rule: how it ranks scores; None for a dense net.
        waits: whether its step waits for the device or copies from the host, so that no CUDA graph can hold it.
        captures: whether it makes a CUDA graph of its step by itself.
        compiled: whether it goes through ``torch.compile``.
        linear_only: whether it has no convolutions.
        mask_tolerance: the share of mask bits that may differ from the specification.
        model: what computes the result.
        parameters: what the optimizer moves, by the names of :attr:`Problem.start`.
    """

    name: ClassVar[str]
    rule: ClassVar[str | None] = "magnitude"
    waits: ClassVar[bool] = False
    captures: ClassVar[bool] = False
    compiled: ClassVar[bool] = False
    linear_only: ClassVar[bool] = False
    mask_tolerance: ClassVar[float] = 0.0
    parameters: dict[str, nn.Parameter]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x = problem.x.clone().requires_grad_(not problem.is_net)
        self.y = torch.empty(0)
        self.build(copy.deepcopy(problem.net))
        self.optimizer = self.make_optimizer()

    # --- what makes a competitor
    def build(self, net: nn.Module) -> None:
        """Make :attr:`model` and :attr:`parameters` of a copy of the dense net."""
        self.model: Any = net
        self.parameters = dict(net.named_parameters())

    def mask(self, name: str, scores: Tensor) -> Tensor:
        """A layer's mask of these scores, boolean: for the check."""
        raise NotImplementedError

    def protect(self) -> None:
        """Mask the gradients, where backward has not done it."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Fused AdamW, its step count on the device where it can be captured."""
        capturable = self.problem.device.type == "cuda"
        parameters = self.parameters.values()
        return torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True, capturable=capturable)

    def settle(self) -> None:
        """Be ready for the first step that counts.

        Raises:
            UnavailableError: it does not exist on this machine, with the reason.
        """

    # --- the same for all
    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """The problem's, keeping the result for the check."""
        self.y = y.detach()
        return self.problem.loss(y, target)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        with self.problem.autocast():
            loss = self.loss(self.model(self.x), self.problem.target)
        loss.backward()
        self.protect()
        self.optimizer.step()

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """That of the first step, after it."""
        assert parameter.grad is not None
        return parameter.grad

    def results(self) -> Results:
        """Of the first step, after it."""
        found = {"y": self.y} | ({} if self.x.grad is None else {"dx": self.x.grad})
        return found | {name: self.gradient(parameter) for name, parameter in self.parameters.items()}

    def check(self) -> str:
        """After the first step: masks, result, gradients, and what the optimizer made of them.

        Raises:
            WrongResultError: with what is wrong.
        """
        problem, wrong = self.problem, 0
        masks = {name: torch.ones_like(union) for name, union in problem.unions.items()}
        for name in problem.gated if self.rule is not None else ():
            scores = problem.start[f"{name}.scores"]
            masks[name] = self.mask(name, scores)
            bits = int((masks[name] != reference.topc_mask(scores, DENSITY, rule=self.rule or "")).sum())
            if bits > self.mask_tolerance * scores.numel():
                raise WrongResultError(f"mask of {name}: {bits} of {scores.numel()} bits are not as specified")
            wrong += bits
        results = self.results()
        problem.check(results, masks, self.rule)
        self.check_update(results)
        self.check_later()
        if self.rule is None:
            return "dense fp64"
        return f"reference: masks {f'but {wrong} bits' if wrong else 'bitwise'}, result and gradients against fp64"

    def check_update(self, results: Results) -> None:
        """Adam's first step is ``lr * g / (|g| + eps)``: every parameter has moved by as much."""
        for name, parameter in self.parameters.items():
            start, g = self.problem.start[name].double(), results[name].double()
            expected = start - LEARNING_RATE * g / (g.abs() + EPSILON)
            excess = ((parameter.detach().double() - expected).abs() - 2**-23 * expected.abs()).max()
            if not excess <= LEARNING_RATE * 1e-3:
                raise WrongResultError(f"{name}: the optimizer is {float(excess):.3g} off its first step")

    def check_later(self) -> str:
        """After any number of steps: the weights of finished tasks as they were, to the bit, and all values finite.

        Raises:
            WrongResultError: with what is wrong.
        """
        if not all(bool(p.isfinite().all()) for p in self.parameters.values()):
            raise WrongResultError("a parameter is not finite")
        if self.rule is None:
            return "finite"
        for name, frozen in self.problem.unions.items():
            now, start = self.parameters[f"{name}.weight"].detach(), self.problem.start[f"{name}.weight"]
            check_same(now[frozen], start[frozen], f"frozen weights of {name}")
        return "frozen weights bitwise"


class Dense(Competitor):
    """The plain net with fused AdamW: no subnet at all, what everything else is measured against."""

    name, rule = "dense", None


class _Program(Competitor):
    """A net of layers as a program has them."""

    layer: ClassVar[type[ProgramLayer]]

    def build(self, net: nn.Module) -> None:
        self.layers = with_layers(net, self.problem, self.layer)
        super().build(net)

    def mask(self, name: str, scores: Tensor) -> Tensor:
        return self.layers[name].mask(scores)

    def protect(self) -> None:
        for layer in self.layers.values():
            layer.protect()


def _compiled(module: nn.Module) -> Any:
    torch.compiler.reset()  # there is a limit to how often the same Python is compiled for other modules
    return torch.compile(module, dynamic=False, fullgraph=True)


class Competent(_Program):
    """What a careful user would write in PyTorch, with fused AdamW."""

    name, layer = "competent", CompetentLayer


class CompetentCompiled(Competent):
    """The same through ``torch.compile``, net and gates together."""

    name, compiled = "competent, compiled", True

    def build(self, net: nn.Module) -> None:
        super().build(net)
        self.model = _compiled(net)


class Paper(_Program):
    """The paper's program, with plain Adam."""

    name, waits = "paper", True
    layer: ClassVar[type[ProgramLayer]] = PaperLayer

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters.values(), LEARNING_RATE)


class Clarena(Paper):
    """CLArena's program."""

    name, layer, linear_only = "CLArena", ClarenaLayer, True
    rule, mask_tolerance = ClarenaLayer.rule, ClarenaLayer.mask_tolerance


class Ours(Competitor):
    """This library as a user has it: a converted net in a :class:`WSN`, and :class:`SubnetAdamW`."""

    name = "ours"
    one_pass: ClassVar[bool] = False

    def build(self, net: nn.Module) -> None:
        problem = self.problem
        self.wsn = WSN(convert(net, DENSITY, heads=HEAD if problem.is_net else None))
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
        optimizer = SubnetAdamW(self.wsn, LEARNING_RATE, one_pass=self.one_pass)
        for group in optimizer.param_groups:
            group["capturable"] = self.problem.device.type == "cuda"  # its step count is on the device anyway
        return optimizer

    def mean_gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient as the optimizer had it: its first running mean of g is ``(1 - beta1) * g``."""
        mean: Tensor = self.optimizer.state[parameter]["exp_avg"]
        return mean.double() / (1 - self.optimizer.param_groups[0]["betas"][0])


class OursGuarded(Ours):
    """The same net with torch's fused AdamW inside :meth:`WSN.guard`, as any optimizer can be used."""

    name = "ours, guarded"

    def make_optimizer(self) -> torch.optim.Optimizer:
        return self.wsn.guard(Competitor.make_optimizer(self))


class OursOnePass(Ours):
    """Gradient masking, both updates and the gate of the next step in one pass; backward gives no dW and dS."""

    name, one_pass = "ours, one pass", True

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        return self.mean_gradient(parameter)


class OursCompiled(Ours):
    """The converted net through ``torch.compile``; the optimizer stays as it is."""

    name, compiled = "ours, compiled", True

    def build(self, net: nn.Module) -> None:
        super().build(net)
        self.model = _compiled(self.wsn)


class OursCaptured(Ours):
    """The whole step as one CUDA graph by :func:`wsn_fast.capture_step`; as it is on a CPU."""

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
        """Step until replays have begun, and make what there is then the start: weights put back to the real one would
        be changed ones, after which no step is a replay."""
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
    Dense, Ours, OursGuarded, OursOnePass, OursCaptured, OursOnePassCaptured, Competent, Paper, Clarena, OursCompiled,
    CompetentCompiled,
)  # fmt: skip
"""In the order of rows."""
