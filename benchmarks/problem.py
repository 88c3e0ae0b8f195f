"""A layer or a net in the middle of a continual-learning run: the data that every competitor's step starts from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from wsn_fast import reference
from wsn_fast.train import nets

from .cases import Work, WrongResultError, check_close, compute_dtype
from .data import FROZEN
from .shapes import ConvShape, LinearShape, NetShape

StepShape = LinearShape | ConvShape | NetShape
HEAD = "head"
"""The name of a net's head, which is not gated."""
Results = dict[str, Tensor]
"""What a forward and a backward give: "y", "dx" where inputs require gradients, and the gradient of every parameter by
its name, such as "features.1.weight", "features.1.scores" and "head.weight"."""


class _Product(NamedTuple):
    """A gated layer's product: the elements of its input, its weight and its result, and the terms of one of these."""

    x: int
    weight: int
    y: int
    terms: int


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
    """The second task of a net or of a single layer. There are no biases, as in the paper's nets.

    Dropout is off: every program would draw other numbers.

    Args:
        shape: of the layer or the net, and its batch.
        device: where everything is.

    Attributes:
        net: the dense net; competitors take copies.
        gated: the names of its gated layers, in order.
        start: every parameter's first value by name, fp32, as PyTorch and the paper initialise them; scores too.
        old_scores: by layer, those at the end of the first task; their top ``FROZEN`` is in ``unions``, boolean.
        x, target: the batch, and labels; for a layer, which is in the midst of a net, ``target`` is the gradient of its
            result, x requires one, and both are in the compute dtype.
        dtype: the compute dtype: bf16 by autocast on a GPU, fp32 on a CPU.
        numel: gated weights in all.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape, self.device, self.dtype = shape, device, compute_dtype(device)
        self.is_net = isinstance(shape, NetShape)
        with device:
            self.net = _module(shape)
        modules = {n: m for n, m in self.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n != HEAD}
        self.gated = list(modules)
        self.start = {name: parameter.detach().clone() for name, parameter in self.net.named_parameters()}
        self.old_scores: dict[str, Tensor] = {}
        for name, module in modules.items():
            bound = module.weight[0].numel() ** -0.5
            for scores, key in ((self.start, f"{name}.scores"), (self.old_scores, name)):
                scores[key] = torch.empty_like(module.weight, requires_grad=False).uniform_(-bound, bound)
        self.unions = {name: reference.topc_mask(scores, FROZEN) for name, scores in self.old_scores.items()}
        self.numel = sum(union.numel() for union in self.unions.values())
        self.x = torch.randn(input_size(shape), device=device).to(self.dtype)
        self._products: list[_Product] = []
        y = self._look(modules)
        if isinstance(shape, NetShape):
            self.x = self.x.float()  # images as data sets have them, though of few enough bits to be rounded no more
            self.target = torch.randint(shape.classes, (shape.rows,), device=device)
        else:
            self.target = torch.randn_like(y) / y.shape[0]

    def _look(self, modules: Mapping[str, nn.Module]) -> Tensor:
        """A forward pass that notes the sizes of the products."""

        def note(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            self._products.append(_Product(inputs[0].numel(), weight.numel(), y.numel(), weight[0].numel()))

        hooks = [module.register_forward_hook(note) for module in modules.values()]
        with torch.no_grad(), self.autocast():
            y: Tensor = self.net(self.x)
        for hook in hooks:
            hook.remove()
        return y

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """0-d: the cross-entropy of a net; zero, with the given gradient, for a layer."""
        loss: Tensor = F.cross_entropy(y, target) if self.is_net else _Seed.apply(y, target)
        return loss

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on a GPU. Without its cache of cast weights, which lives longer than a captured graph."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def results(self, masks: Mapping[str, Tensor], rule: str | None, exact: bool) -> Results:
        """By the reference, from weights rounded to the compute dtype.

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
            name: reference.select(masks[name], self.start[f"{name}.weight"].to(self.dtype)).to(dtype).requires_grad_()
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
            dw, ds = reference.gate_backward(leaf.grad, weight, scores, masks[name], union, rule or "value")
            found |= {f"{name}.weight": dw} | ({} if rule is None else {f"{name}.scores": ds})
        return found

    def check(self, got: Results, masks: Mapping[str, Tensor], rule: str | None) -> None:
        """The 2x rule for the result and all gradients, which are zero to the bit where they must be.

        Raises:
            WrongResultError: one of them is missing or not right.
        """
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

    def product_bytes(self) -> float:
        """What one product of the first gated layer reads and writes."""
        x, weight, y, _ = self._products[0]
        return self.dtype.itemsize * float(x + weight + y)

    def work(self, bytes_per_weight: float) -> list[Work]:
        """The products, and the elementwise part of a step."""
        item = self.dtype.itemsize
        stages = []
        for i, (x, weight, y, terms) in enumerate(self._products):
            product = Work(item * (x + weight + y), 2.0 * y * terms)
            stages += [product] * (2 if self.is_net and i == 0 else 3)  # nobody wants the gradient of images
        return [*stages, Work(bytes_per_weight * self.numel)]


def input_size(shape: StepShape) -> tuple[int, ...]:
    """The shape of the input."""
    if isinstance(shape, NetShape):
        return shape.rows, *shape.inputs
    if isinstance(shape, ConvShape):
        return shape.batch, shape.channels, shape.size, shape.size
    return shape.rows, shape.inputs


def _module(shape: StepShape) -> nn.Module:
    if isinstance(shape, NetShape):
        net = nets.build(shape.net, shape.inputs, shape.classes)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return net
    if isinstance(shape, ConvShape):
        s = shape
        sizes = (s.channels, s.outputs, s.kernel, s.stride, s.padding, 1, s.groups)
        return nn.Sequential(nn.Conv2d(*sizes, bias=False))
    return nn.Sequential(nn.Linear(shape.inputs, shape.outputs, bias=False))
