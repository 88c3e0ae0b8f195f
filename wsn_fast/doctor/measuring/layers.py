"""Gated layers without the library: what programs in plain PyTorch share, and the best that we can write."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .problem import Problem
from .weights import DENSITY


class GatedLayer(nn.Module):
    """A linear or convolutional layer under a mask. It takes the dense layer, the first scores, the boolean union of
    what finished tasks own, and the compute dtype.

    Attributes:
        rule: how the layer ranks scores.
        mask_tolerance: the share of mask bits that may differ from the definition.
        finished: the mask of a finished task as the program keeps it; None in training.
    """

    rule: ClassVar[str] = "magnitude"
    mask_tolerance: ClassVar[float] = 0.0
    mask_dtype: ClassVar[torch.dtype] = torch.float32  # of the mask that is kept

    def __init__(self, dense: nn.Module, scores: Tensor, union: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(dense, nn.Linear | nn.Conv2d)
        self.weight, self.scores = dense.weight, nn.Parameter(scores.clone())
        self.dtype = dtype
        self.finished: Tensor | None = None
        self.product: Any = F.linear
        if isinstance(dense, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.product = partial(F.conv2d, **{name: getattr(dense, name) for name in names})
        self.keep(union)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.masked_weight() if self.finished is None else self.finished_weight(self.finished)
        return self.product(x, weight)

    def keep(self, union: Tensor) -> None:
        """Make whatever the layer keeps between steps."""
        raise NotImplementedError

    def mask(self, scores: Tensor) -> Tensor:
        """Its mask of these scores, boolean: for the check."""
        raise NotImplementedError

    def masked_weight(self) -> Tensor:
        """``W*m``, through which both get gradients."""
        raise NotImplementedError

    def finish(self) -> None:
        """End the task: keep the mask of the scores as they are."""
        self.finished = self.mask(self.scores.detach()).to(self.mask_dtype)

    def finished_weight(self, mask: Tensor) -> Tensor:
        """``W*m`` of the finished task."""
        return self.weight * mask

    def protect(self) -> None:
        """Mask the gradient of the weight, where backward has not done it."""


class _EagerGate(torch.autograd.Function):
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


class EagerLayer(GatedLayer):
    """What a careful user would write in PyTorch: no host wait, nothing on the CPU, the union in backward."""

    mask_dtype = torch.bool

    def keep(self, union: Tensor) -> None:
        self.rank = ops.threshold_rank(union.numel(), DENSITY, "magnitude")
        self.free = ~union

    def threshold(self, scores: Tensor) -> Tensor:
        """The exact threshold, left on the device: a sort on a GPU, where ``kthvalue`` runs in one block."""
        keys = scores.detach().abs().flatten()
        return keys.sort().values[self.rank] if keys.is_cuda else keys.kthvalue(self.rank + 1).values

    def mask(self, scores: Tensor) -> Tensor:
        return ~(scores.abs() < self.threshold(scores))

    def masked_weight(self) -> Tensor:
        masked: Tensor = _EagerGate.apply(self.weight, self.scores, self.threshold(self.scores), self.free, self.dtype)
        return masked

    def finished_weight(self, mask: Tensor) -> Tensor:
        return torch.where(mask, self.weight, 0.0)


def with_layers(net: nn.Module, problem: Problem, kind: type[GatedLayer]) -> dict[str, GatedLayer]:
    """Replace the gated layers of a net by a program's; returns these by name."""
    layers = {}
    for name in problem.gated:
        scores, union = problem.start[f"{name}.scores"], problem.unions[name]
        layers[name] = kind(net.get_submodule(name), scores, union, problem.dtype)
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, layers[name])
    return layers
