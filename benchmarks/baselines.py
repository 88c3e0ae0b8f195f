"""The competitors: one layer's training step (forward, backward, gradient masking, optimizer) in several programs.

All start from the same :class:`Problem`, and their inputs require gradients. Weight decay is zero: the published
programs let it move frozen weights, and with it they would not compute the same. Written from the algorithms; nothing
is copied.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetConv2d, FastSubnetLinear, ops, reference, topc_mask
from wsn_fast.optim import SubnetAdamW

from . import published
from .cases import WrongResultError, check_same
from .data import DENSITY, FROZEN
from .problem import Gradients, Problem
from .shapes import ConvShape

LEARNING_RATE = 1e-6
"""Small, so that hundreds of timed steps on one batch stay near the start."""
EPSILON = 1e-8

MASTER, BIT = 4, 1 / 8  # bytes of an fp32 value and of a mask bit


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
    """A training step. Subclasses say how the masked weight is made and how gradients are masked.

    Attributes:
        name: in tables.
        rule: how it ranks scores; None for a dense layer.
        waits: whether its step waits for the device or copies from the host, so that no CUDA graph can hold it.
        compiled: whether it goes through ``torch.compile``.
        mask_tolerance: the share of mask bits that may differ from the specification.
    """

    name: ClassVar[str]
    rule: ClassVar[str | None] = "magnitude"
    waits: ClassVar[bool] = False
    compiled: ClassVar[bool] = False
    mask_tolerance: ClassVar[float] = 0.0

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.weight = nn.Parameter(problem.weight.clone())
        self.scores = nn.Parameter(problem.scores.clone())
        self.x = problem.x.clone().requires_grad_()
        self.y = torch.empty(0)
        self.build()
        self.optimizer = self.make_optimizer(self.parameters())

    # --- what makes a competitor
    def build(self) -> None:
        """Whatever it keeps between steps."""

    def mask(self, scores: Tensor) -> Tensor:
        """Its mask of these scores, boolean: for the check."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """The layer's result."""
        raise NotImplementedError

    def protect(self) -> None:
        """Mask the gradients, where backward has not done it."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [self.weight, self.scores]

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Fused AdamW, its step count on the device where it can be captured."""
        capturable = self.problem.device.type == "cuda"
        return torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True, capturable=capturable)

    # --- the same for all
    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.x.grad = None
        with self.problem.autocast():
            y = self.forward()
        y.backward(self.problem.dy)
        self.protect()
        self.optimizer.step()
        self.y = y.detach()

    def gradients(self) -> Gradients:
        """Of the first step, after it."""
        assert self.x.grad is not None and self.weight.grad is not None
        return Gradients(self.y, self.x.grad, self.weight.grad, self.scores.grad)

    def check(self) -> str:
        """After the first step: mask, result, gradients, and what the optimizer made of them.

        Raises:
            WrongResultError: with what is wrong.
        """
        problem = self.problem
        mask, union = torch.ones_like(problem.union), None
        verdict = "dense fp64"
        if self.rule is not None:
            mask, union = self.mask(problem.scores), problem.union
            wrong = int((mask != reference.topc_mask(problem.scores, DENSITY, rule=self.rule)).sum())
            if wrong > self.mask_tolerance * mask.numel():
                raise WrongResultError(f"mask: {wrong} of {mask.numel()} bits are not as specified")
            verdict = f"reference: mask {f'but {wrong} bits' if wrong else 'bitwise'}, y dx dW dS against fp64"
        gradients = self.gradients()
        problem.check(gradients, mask, self.rule or "value", union)
        self.check_update(gradients)
        self.check_later()
        return verdict

    def check_update(self, gradients: Gradients) -> None:
        """Adam's first step is ``lr * g / (|g| + eps)``: every parameter has moved by as much."""
        for name, start, now, gradient in (
            ("weight", self.problem.weight, self.weight, gradients.dw),
            ("scores", self.problem.scores, self.scores, gradients.ds),
        ):
            if gradient is not None:
                g = gradient.double()
                expected = start.double() - LEARNING_RATE * g / (g.abs() + EPSILON)
                excess = ((now.detach().double() - expected).abs() - 2**-23 * expected.abs()).max()
                if not excess <= LEARNING_RATE * 1e-3:
                    raise WrongResultError(f"{name}: the optimizer is {float(excess):.3g} off its first step")

    def check_later(self) -> str:
        """After any number of steps: the weights of finished tasks as they were, to the bit, and all values finite.

        Raises:
            WrongResultError: with what is wrong.
        """
        if not all(bool(p.isfinite().all()) for p in self.parameters()):
            raise WrongResultError("a parameter is not finite")
        if self.rule is not None:
            frozen = self.problem.union
            check_same(self.weight.detach()[frozen], self.problem.weight[frozen], "frozen weights")
        return "finite" if self.rule is None else "frozen weights bitwise"


class Dense(Competitor):
    """``nn.Linear`` or ``nn.Conv2d`` with fused AdamW: no subnet at all, what everything else is measured against."""

    name, rule = "dense", None

    def forward(self) -> Tensor:
        return self.problem.apply(self.x, self.weight)

    def parameters(self) -> list[nn.Parameter]:
        return [self.weight]


class Paper(Competitor):
    """The paper's program: ``kthvalue`` and ``.item()``, constants on the CPU, int64 masks, masked fill, plain Adam."""

    name, waits = "paper", True

    def build(self) -> None:
        self.zeros, self.ones = torch.zeros(self.weight.shape), torch.ones(self.weight.shape)
        self.used = self.problem.union.long()

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores.abs() < published.paper_threshold(scores, DENSITY))

    def forward(self) -> Tensor:
        tau = published.paper_threshold(self.scores, DENSITY)
        return self.problem.apply(self.x, self.weight * published.paper_gate(self.scores, tau, self.zeros, self.ones))

    def protect(self) -> None:
        assert self.weight.grad is not None
        published.paper_protect(self.weight.grad, self.used)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, LEARNING_RATE)


class Clarena(Competitor):
    """CLArena's program, its gate mended: quantile by a sort, constants made on the CPU, float masks, plain Adam."""

    name, rule, waits = "CLArena", "value", True
    mask_tolerance = 2**-20  # an interpolated fp32 quantile of many scores is off by a few of them

    def build(self) -> None:
        self.used = self.problem.union.float()

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores < published.clarena_threshold(scores, DENSITY))

    def forward(self) -> Tensor:
        tau = published.clarena_threshold(self.scores, DENSITY)
        return self.problem.apply(self.x, self.weight * published.clarena_gate(self.scores, tau))

    def protect(self) -> None:
        assert self.weight.grad is not None
        published.clarena_protect(self.weight.grad, self.used)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, LEARNING_RATE)


class _CompetentGate(torch.autograd.Function):
    """Eq. 3 to 5 in as few passes as PyTorch's own operations allow; nothing but tau is kept for backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, tau: Tensor, free: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight, scores, tau, free)
        return weight.to(dtype).masked_fill(scores.abs() < tau, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scores, tau, free = ctx.saved_tensors
        grad, keep = grads[0].to(weight.dtype), (scores.abs() >= tau) & free
        return grad * keep, grad * weight * scores.sign(), None, None, None


class Competent(Competitor):
    """What a careful user would write in PyTorch: no host wait, nothing on the CPU, the union in backward, fused AdamW.

    The threshold is a sort on a GPU, where ``kthvalue`` runs in one block, and ``kthvalue`` on a CPU.
    """

    name = "competent"

    def build(self) -> None:
        self.rank = ops.threshold_rank(self.weight.numel(), DENSITY, "magnitude")
        self.free = ~self.problem.union

    def threshold(self, scores: Tensor) -> Tensor:
        """The exact threshold, left on the device."""
        keys = scores.detach().abs().flatten()
        return keys.sort().values[self.rank] if keys.is_cuda else keys.kthvalue(self.rank + 1).values

    def masked_weight(self) -> Tensor:
        """``W*m`` in the compute dtype."""
        tau, dtype = self.threshold(self.scores), self.problem.dtype
        masked: Tensor = _CompetentGate.apply(self.weight, self.scores, tau, self.free, dtype)
        return masked

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores.abs() < self.threshold(scores))

    def forward(self) -> Tensor:
        return self.problem.apply(self.x, self.masked_weight())


class Compiled(Competent):
    """The same through ``torch.compile``, layer and gate together."""

    name, compiled = "competent, compiled", True

    def build(self) -> None:
        super().build()
        self.run = torch.compile(super().forward, dynamic=False, fullgraph=True)

    def forward(self) -> Tensor:
        y: Tensor = self.run()
        return y


class Ours(Competitor):
    """This library as a user has it: the layer in a :class:`WSN`, fused AdamW, and the guard around its step."""

    name, guarded = "ours, guarded", True

    def build(self) -> None:
        layer = _layer(self.problem)
        self.layer = layer
        self.weight, self.scores = layer.get_parameter("weight"), layer.get_parameter("weight_score")
        self.wsn = WSN(nn.Sequential(layer))
        self.wsn.begin_task("first", density=FROZEN)
        layer.load_state_dict({"weight": self.problem.weight, "weight_score": self.problem.old_scores}, strict=False)
        self.wsn.end_task()
        self.wsn.begin_task("second")
        with torch.no_grad():
            self.scores.copy_(self.problem.scores)

    def mask(self, scores: Tensor) -> Tensor:
        return topc_mask(scores, DENSITY)

    def forward(self) -> Tensor:
        y: Tensor = self.wsn(self.x)
        return y

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(parameters)
        return self.wsn.guard(optimizer) if self.guarded else optimizer


class OursUnguarded(Ours):
    """Without the guard: as safe as the other competitors, since neither weight decay nor old momentum is at work."""

    name, guarded = "ours", False


class OursOnePass(Ours):
    """With the library's own optimizer: gradient masking, both updates and the protection in one pass."""

    name = "ours, one pass"

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = SubnetAdamW(self.wsn, LEARNING_RATE)
        for group in optimizer.param_groups:
            group["capturable"] = self.problem.device.type == "cuda"  # its step count is on the device anyway
        return optimizer

    def gradients(self) -> Gradients:
        """As the optimizer has formed them from G, which is all that backward gives it: its first running mean of a
        gradient g is ``(1 - beta1) * g``."""
        assert self.x.grad is not None
        share = 1 - self.optimizer.param_groups[0]["betas"][0]
        dw, ds = (self.optimizer.state[p]["exp_avg"].double() / share for p in (self.weight, self.scores))
        return Gradients(self.y, self.x.grad, dw, ds)


def _layer(problem: Problem) -> FastSubnetLinear | FastSubnetConv2d:
    s = problem.shape
    if isinstance(s, ConvShape):
        sizes = (s.channels, s.outputs, s.kernel, s.stride, s.padding, 1, s.groups)
        return FastSubnetConv2d(*sizes, bias=False, device=problem.device, density=DENSITY)
    return FastSubnetLinear(s.inputs, s.outputs, bias=False, device=problem.device, density=DENSITY)


COMPETITORS: tuple[type[Competitor], ...] = (
    Dense, OursUnguarded, Ours, OursOnePass, Competent, Paper, Clarena, Compiled,
)  # fmt: skip
"""In the order of rows."""
