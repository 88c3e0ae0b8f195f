"""A layer in the middle of a continual-learning run: the data that every competitor's step starts from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import oracle
from .checks import WrongResultError, check_close
from .shapes import ConvShape, LinearShape
from .weights import FROZEN, compute_dtype

HEAD = "head"
"""The name of a net's head, which is not gated."""
Results = dict[str, Tensor]
"""What a forward and a backward give: "y", "dx" where inputs require gradients, and the gradient of every parameter by
its name, such as "features.1.weight", "features.1.scores" and "head.weight"."""


class _Seed(torch.autograd.Function):
    """A loss of zero whose gradient is given: a layer alone has no loss, and computing one would be timed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.save_for_backward(dy)
        return dy.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = ctx.saved_tensors
        return dy, None


class Problem:
    """The second task of a single layer. There are no biases, as in the paper's nets. Subclasses have whole nets.

    Attributes:
        net: the dense net; competitors take copies.
        gated: the names of its gated layers, in order.
        start: every parameter's first value by name, fp32, as PyTorch and the paper initialise them; scores too.
        old_scores: by layer, those at the end of the first task; their top ``FROZEN`` is in ``unions``, boolean.
        x, target: the batch, which requires a gradient, and the gradient of its result; both in the compute dtype.
        dtype: the compute dtype: bf16 by autocast on a GPU, fp32 on a CPU.
        numel: gated weights in all.
    """

    is_net: ClassVar[bool] = False
    oracle: ClassVar[Any] = oracle
    """What defines masks and gradients: a module with the functions of :mod:`.oracle`."""

    def __init__(self, shape: Any, device: torch.device) -> None:
        self.shape, self.device, self.dtype = shape, device, compute_dtype(device)
        with device:
            self.net = self.build_net()
        modules = {n: m for n, m in self.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n != HEAD}
        self.gated = list(modules)
        self.start = {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}
        self.old_scores: dict[str, Tensor] = {}
        for name, module in modules.items():
            bound = module.weight[0].numel() ** -0.5
            for scores, key in ((self.start, f"{name}.scores"), (self.old_scores, name)):
                scores[key] = torch.empty_like(module.weight, requires_grad=False).uniform_(-bound, bound)
        self.unions = {name: self.oracle.topc_mask(scores, FROZEN) for name, scores in self.old_scores.items()}
        self.numel = sum(union.numel() for union in self.unions.values())
        self.x = torch.randn(shape.input_size, device=device).to(self.dtype)
        with torch.no_grad(), self.autocast():
            y = self.net(self.x)
        self.target = self.make_target(y)

    def build_net(self) -> nn.Module:
        """The dense layer, in a container."""
        return _module(self.shape)

    def make_target(self, y: Tensor) -> Tensor:
        """The gradient of the result ``y``."""
        return torch.randn_like(y) / y.shape[0]

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """0-d: zero, with the given gradient."""
        loss: Tensor = _Seed.apply(y, target)
        return loss

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on a GPU. Without its cache of cast weights, which lives longer than a captured graph."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def results(self, masks: Mapping[str, Tensor], rule: str | None, exact: bool) -> Results:
        """By the definition, from weights rounded to the compute dtype.

        Args:
            masks: by layer, boolean.
            rule: how the scores were ranked; None for a dense net, without masks, unions or scores.
            exact: compute in float64 instead of the compute dtype.
        """
        dtype = torch.float64 if exact else torch.float32
        net = copy.deepcopy(self.net).to(dtype)
        net.load_state_dict({name: self.start[name] for name in net.state_dict()})
        x = (self.x.double() if exact else self.x.clone()).requires_grad_(not self.is_net)
        masked = {
            name: self.oracle.select(masks[name], self.start[f"{name}.weight"].to(self.dtype))
            .to(dtype)
            .requires_grad_()
            for name in self.gated
        }
        with nullcontext() if exact else self.autocast():
            y = functional_call(net, {f"{name}.weight": weight for name, weight in masked.items()}, (x,))
            target = self.target.to(dtype) if exact and self.target.is_floating_point() else self.target
            loss = self.loss(y, target)
        loss.backward()
        found = {"y": y.detach()} | ({} if x.grad is None else {"dx": x.grad})
        found |= {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
        for name, leaf in masked.items():
            weight, scores = (self.start[f"{name}.{kind}"].to(dtype) for kind in ("weight", "scores"))
            assert leaf.grad is not None
            union = None if rule is None else self.unions[name]
            dw, ds = self.oracle.gate_backward(leaf.grad, weight, scores, masks[name], union, rule or "value")
            found |= {f"{name}.weight": dw} | ({} if rule is None else {f"{name}.scores": ds})
        return found

    def check(self, got: Results, masks: Mapping[str, Tensor], rule: str | None) -> None:
        """The 2x rule for the result and all gradients, which are zero to the bit where they must be."""
        torchs, exact = (self.results(masks, rule, exact) for exact in (False, True))
        if got.keys() != exact.keys():
            raise WrongResultError(f"gradients: {sorted(got.keys() ^ exact.keys())} are on one side alone")
        for name, right in exact.items():
            check_close(got[name], torchs[name], right, name if name in ("y", "dx") else f"gradient of {name}")
        for name in self.gated if rule is not None else ():
            if bool((got[f"{name}.weight"][~masks[name] | self.unions[name]] != 0).any()):
                raise WrongResultError(
                    f"gradient of {name}.weight: not zero outside of the mask or inside of the union"
                )


def _module(shape: LinearShape | ConvShape) -> nn.Module:
    if isinstance(shape, ConvShape):
        s = shape
        sizes = (s.channels, s.outputs, s.kernel, s.stride, s.padding, 1, s.groups)
        return nn.Sequential(nn.Conv2d(*sizes, bias=False))
    return nn.Sequential(nn.Linear(shape.inputs, shape.outputs, bias=False))
