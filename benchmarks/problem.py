"""One layer in the middle of a continual-learning run: the data that every competitor's training step starts from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import reference

from .cases import Work, WrongResultError, check_close, compute_dtype
from .data import FROZEN
from .shapes import ConvShape, LinearShape

LayerShape = LinearShape | ConvShape


class Gradients(NamedTuple):
    """What a forward and a backward give."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    ds: Tensor | None


class Problem:
    """The second task of a layer without a bias, as in the paper's nets.

    Args:
        shape: of the layer and its batch.
        device: where everything is.

    Attributes:
        weight, scores: fp32, as ``nn.Linear`` and the paper initialise them.
        old_scores: those at the end of the first task; their top ``FROZEN`` is ``union``, boolean.
        x, dy: the batch and the gradient of the layer's result, in the compute dtype.
        dtype: the compute dtype: bf16 by autocast on a GPU, fp32 on a CPU.
    """

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        self.shape, self.device, self.dtype = shape, device, compute_dtype(device)
        size = weight_size(shape)
        bound = (size[0] / torch.Size(size).numel()) ** 0.5
        self.weight, self.scores, self.old_scores = (
            torch.empty(size, device=device).uniform_(-bound, bound) for _ in range(3)
        )
        self.union = reference.topc_mask(self.old_scores, FROZEN)
        self.x = torch.randn(input_size(shape), device=device).to(self.dtype)
        with torch.no_grad():
            y = self.apply(self.x, self.weight.to(self.dtype))
        self.dy = torch.randn_like(y) / y.shape[0]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with this weight."""
        if isinstance(self.shape, ConvShape):
            return F.conv2d(x, weight, None, self.shape.stride, self.shape.padding, 1, self.shape.groups)
        return F.linear(x, weight)

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on a GPU. Without its cache of cast weights, which lives longer than a captured graph."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def gradients(self, mask: Tensor, rule: str, dtype: torch.dtype, union: Tensor | None) -> Gradients:
        """By the reference, computed in ``dtype``, from the operands rounded to the compute dtype."""
        x = self.x.to(dtype, copy=True).requires_grad_()
        masked = reference.select(mask, self.weight.to(self.dtype)).to(dtype).requires_grad_()
        y = self.apply(x, masked)
        y.backward(self.dy.to(dtype))
        assert x.grad is not None and masked.grad is not None
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        weight, scores = self.weight.to(wide), self.scores.to(wide)
        dw, ds = reference.gate_backward(masked.grad.to(wide), weight, scores, mask, union, rule)
        return Gradients(y.detach(), x.grad, dw, ds)

    def check(self, got: Gradients, mask: Tensor, rule: str, union: Tensor | None) -> None:
        """The 2x rule for the result and all gradients, which are zero to the bit where they must be.

        Raises:
            WrongResultError: one of them is not right.
        """
        torchs = self.gradients(mask, rule, self.dtype, union)
        exact = self.gradients(mask, rule, torch.float64, union)
        for name, one, theirs, right in zip(Gradients._fields, got, torchs, exact, strict=True):
            if one is not None and theirs is not None and right is not None:  # a dense layer has no scores
                check_close(one, theirs, right, name)
        trainable = mask if union is None else mask & ~union
        if bool((got.dw[~trainable] != 0).any()):
            raise WrongResultError("dW: not zero outside of the mask or inside of the union")

    def work(self, bytes_per_weight: float) -> list[Work]:
        """Three products, and the elementwise part of a step."""
        y, n, item = self.dy.numel(), self.weight.numel(), self.dtype.itemsize
        flops = 2.0 * y * self.weight[0].numel()
        product = Work(item * (self.x.numel() + y + n), flops)
        return [product] * 3 + [Work(bytes_per_weight * n)]


def input_size(shape: LayerShape) -> tuple[int, ...]:
    """The shape of the layer's input."""
    if isinstance(shape, ConvShape):
        return shape.batch, shape.channels, shape.size, shape.size
    return shape.rows, shape.inputs


def weight_size(shape: LayerShape) -> tuple[int, ...]:
    """The shape of the layer's weight."""
    if isinstance(shape, ConvShape):
        return shape.outputs, shape.channels // shape.groups, shape.kernel, shape.kernel
    return shape.outputs, shape.inputs
