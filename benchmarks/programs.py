"""Gated layers as others write them: the two published programs', and the best that we can write in eager PyTorch.

Written from the algorithms; nothing is copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import ops

from . import published
from .data import DENSITY
from .problem import Problem


class ProgramLayer(nn.Module):
    """A linear or convolutional layer whose weight goes through a program's gate.

    Args:
        dense: the layer, which gives its weight.
        scores: their first values.
        union: boolean, the weights that finished tasks own.
        dtype: the compute dtype.

    Attributes:
        rule: how it ranks scores.
        mask_tolerance: the share of mask bits that may differ from the specification.
    """

    rule: ClassVar[str] = "magnitude"
    mask_tolerance: ClassVar[float] = 0.0

    def __init__(self, dense: nn.Module, scores: Tensor, union: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(dense, nn.Linear | nn.Conv2d)
        self.weight, self.scores = dense.weight, nn.Parameter(scores.clone())
        self.dtype = dtype
        self.product: Any = F.linear
        if isinstance(dense, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.product = partial(F.conv2d, **{name: getattr(dense, name) for name in names})
        self.keep(union)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        y: Tensor = self.product(x, self.masked_weight())
        return y

    def keep(self, union: Tensor) -> None:
        """Make whatever it keeps between steps."""
        raise NotImplementedError

    def mask(self, scores: Tensor) -> Tensor:
        """Its mask of these scores, boolean: for the check."""
        raise NotImplementedError

    def masked_weight(self) -> Tensor:
        """``W*m``, through which both get gradients."""
        raise NotImplementedError

    def protect(self) -> None:
        """Mask the gradient of the weight, where backward has not done it."""

    def gradient(self) -> Tensor:
        """That of the weight, after backward."""
        assert self.weight.grad is not None
        return self.weight.grad


class PaperLayer(ProgramLayer):
    """The paper's: ``kthvalue`` and ``.item()``, constants on the CPU, int64 masks, masked fill."""

    def keep(self, union: Tensor) -> None:
        self.zeros, self.ones = torch.zeros(self.weight.shape), torch.ones(self.weight.shape)
        self.used = union.long()

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores.abs() < published.paper_threshold(scores, DENSITY))

    def masked_weight(self) -> Tensor:
        tau = published.paper_threshold(self.scores, DENSITY)
        return self.weight * published.paper_gate(self.scores, tau, self.zeros, self.ones)

    def protect(self) -> None:
        published.paper_protect(self.gradient(), self.used)


class ClarenaLayer(ProgramLayer):
    """CLArena's, its gate mended: quantile by a sort, constants made on the CPU, float masks."""

    rule = "value"
    mask_tolerance = 2**-20  # an interpolated fp32 quantile of many scores is off by a few of them

    def keep(self, union: Tensor) -> None:
        self.used = union.float()

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores < published.clarena_threshold(scores, DENSITY))

    def masked_weight(self) -> Tensor:
        return self.weight * published.clarena_gate(self.scores, published.clarena_threshold(self.scores, DENSITY))

    def protect(self) -> None:
        published.clarena_protect(self.gradient(), self.used)


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


class CompetentLayer(ProgramLayer):
    """What a careful user would write in PyTorch: no host wait, nothing on the CPU, the union in backward.

    The threshold is a sort on a GPU, where ``kthvalue`` runs in one block, and ``kthvalue`` on a CPU.
    """

    def keep(self, union: Tensor) -> None:
        self.rank = ops.threshold_rank(union.numel(), DENSITY, "magnitude")
        self.free = ~union

    def threshold(self, scores: Tensor) -> Tensor:
        """The exact threshold, left on the device."""
        keys = scores.detach().abs().flatten()
        return keys.sort().values[self.rank] if keys.is_cuda else keys.kthvalue(self.rank + 1).values

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores.abs() < self.threshold(scores))

    def masked_weight(self) -> Tensor:
        tau = self.threshold(self.scores)
        masked: Tensor = _CompetentGate.apply(self.weight, self.scores, tau, self.free, self.dtype)
        return masked


def with_layers(net: nn.Module, problem: Problem, kind: type[ProgramLayer]) -> dict[str, ProgramLayer]:
    """Put a program's layers in the place of the gated ones; they by their names."""
    layers = {}
    for name in problem.gated:
        scores, union = problem.start[f"{name}.scores"], problem.unions[name]
        layers[name] = kind(net.get_submodule(name), scores, union, problem.dtype)
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, layers[name])
    return layers
