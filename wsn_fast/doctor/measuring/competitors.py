"""The competitors of a training step: zero_grad, forward, loss, backward, gradient masking and optimizer.

All start from the same :class:`Problem`. Weight decay is zero: the published programs let it move frozen weights, and
would compute something else with it. The library's own competitors are in :mod:`.ours`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .checks import WrongResultError, check_same
from .layers import EagerLayer, GatedLayer, with_layers
from .problem import Problem, Results
from .weights import DENSITY

LEARNING_RATE = 1e-6
"""Small, so that hundreds of timed steps on one batch stay near the start."""
EPSILON = 1e-8


class Competitor:
    """A training step. Subclasses say what becomes of the dense net, and what updates it.

    Attributes:
        model: what computes the result.
        parameters: what the optimizer moves, by the names of :attr:`Problem.start`.
    """

    name: ClassVar[str]
    rule: ClassVar[str | None] = "magnitude"  # how it ranks scores; None for a dense net
    waits: ClassVar[bool] = False  # for the device or for copies from the host: no CUDA graph can hold it
    captures: ClassVar[bool] = False  # makes a CUDA graph of its step by itself
    compiled: ClassVar[bool] = False  # goes through torch.compile
    linear_only: ClassVar[bool] = False  # has no convolutions
    mask_tolerance: ClassVar[float] = 0.0  # the share of mask bits that may differ from the specification
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
        """Be ready for the first step that counts; raises ``UnavailableError`` where it does not exist."""

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

    def masks(self) -> tuple[dict[str, Tensor], int]:
        """The masks of the first scores by layer, all ones for a dense net; and how many bits are not as specified."""
        problem, wrong = self.problem, 0
        masks = {name: torch.ones_like(union) for name, union in problem.unions.items()}
        for name in problem.gated if self.rule is not None else ():
            scores = problem.start[f"{name}.scores"]
            masks[name] = self.mask(name, scores)
            bits = int((masks[name] != problem.oracle.topc_mask(scores, DENSITY, rule=self.rule or "")).sum())
            if bits > self.mask_tolerance * scores.numel():
                raise WrongResultError(f"mask of {name}: {bits} of {scores.numel()} bits are not as specified")
            wrong += bits
        return masks, wrong

    # --- inference
    def finish(self) -> None:
        """End the task: from now on :meth:`infer` answers."""
        self.model.eval()

    @torch.no_grad()
    def infer(self) -> Tensor:
        """The result of the finished task for the batch."""
        with self.problem.autocast():
            y: Tensor = self.model(self.problem.x)
        return y

    # --- the checks
    def check(self) -> str:
        """After the first step: masks, result, gradients and updates are right, or ``WrongResultError`` is raised."""
        masks, wrong = self.masks()
        results = self.results()
        self.problem.check(results, masks, self.rule)
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
        """After any number of steps: the weights of finished tasks are the same to the bit, and all values finite."""
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


class Eager(Competitor):
    """What a careful user would write in PyTorch, with fused AdamW."""

    name = "best eager"
    layer: ClassVar[type[GatedLayer]] = EagerLayer

    def build(self, net: nn.Module) -> None:
        self.layers = with_layers(net, self.problem, self.layer)
        super().build(net)

    def mask(self, name: str, scores: Tensor) -> Tensor:
        return self.layers[name].mask(scores)

    def protect(self) -> None:
        for layer in self.layers.values():
            layer.protect()

    def finish(self) -> None:
        super().finish()
        for layer in self.layers.values():
            layer.finish()
