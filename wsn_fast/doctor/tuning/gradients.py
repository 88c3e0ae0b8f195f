"""The gradients of weight and scores of a masked product: out of the product itself, or with G, the gradient of the
masked weight, written to memory between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends import choose
from ..measuring import oracle
from ..measuring.checks import WrongResultError
from ..measuring.weights import RULE, Weight
from .products import Product, Results


class Operands(NamedTuple):
    """A weight [outputs, inputs]; ``dy`` [rows, outputs] and ``x`` [rows, inputs] in the compute dtype."""

    w: Weight
    dy: Tensor
    x: Tensor


class GradientProduct(Product):
    """``dW`` and ``dS`` [outputs, inputs] from ``G = dy.T @ x``; ``size`` is [outputs, inputs]."""

    operation, launcher = "masked_linear_grad", ("masked_matmul_grad", "masked_matmul_grad")
    names, source = ("dW", "dS"), "scores"

    def __init__(self, size: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        self.size, self.rows = size, rows

    def operands(self) -> Operands:
        w = Weight.random(self.size, self.device)
        dy, x = (torch.randn(self.rows, n, device=self.device).to(self.dtype) for n in self.size)
        return Operands(w, dy / self.rows**0.5, x)

    def in_memory(self, o: Operands) -> Results:
        """G in memory, and the gradient masking by the backend that the library would choose."""
        w, g = o.w, o.dy.t() @ o.x
        module = choose("gate_backward", w.weight.device, w.weight.dtype).backend
        return module.gate_backward(g, w.weight, w.scores, w.tau, w.packed_frozen, RULE, True, True)

    def definition(self, o: Operands, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)
        g = (o.dy.to(dtype).t() @ o.x.to(dtype)).to(wide)
        return oracle.gate_backward(g, o.w.weight.to(wide), o.w.scores.to(wide), o.w.mask, o.w.frozen, RULE)

    def checker(self, o: Operands) -> Callable[[tuple[Tensor, ...]], None]:
        """The 2x rule; and dW is zero to the bit where nothing may be learnt."""
        close, kept = super().checker(o), o.w.mask & ~o.w.frozen

        def check(got: tuple[Tensor, ...]) -> None:
            close(got)
            if bool((got[0][~kept] != 0).any()):
                raise WrongResultError("dW: not zero outside of the mask or inside of the union")

        return check

    def launch(self, o: Operands, outputs: tuple[Tensor, ...], config: Any, splits: int, precision: str) -> None:
        self.kernel()(
            o.dy, o.x, o.w.weight, *outputs, scores=o.w.scores, tau=o.w.tau, union=o.w.packed_frozen, rule=RULE,
            config=config, splits=splits, workspace=self.workspace(*self.size, splits), precision=precision,
        )  # fmt: skip

    def grid(self, config: Any) -> tuple[int, int]:
        n, k = self.size
        return -(-n // config.block_n) * -(-k // config.block_k), -(-self.rows // config.block_m)
