"""The autograd Function of the gate: forward Eq. 3, backward Eq. 4 and 5 of the WSN paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops

Gradients = tuple[Tensor | None, ...]


class SubnetGate(torch.autograd.Function):
    """``W, S -> m ? W : +0.0`` with the straight-through estimator for S.

    ``SubnetGate.apply(weight, scores, density, rule, union, dtype)``: ``weight`` and ``scores`` of one shape; ``union``
    the packed mask of the weights that finished tasks own, or None; ``dtype`` the compute dtype of the result. Only
    references and the 0-d
    threshold are kept for backward: the mask is formed again there from the scores, which are read for ``sign(S)``
    anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor,
        density: float,
        rule: str,
        union: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        masked, tau = ops.gate(weight, scores, density, rule, dtype)
        ctx.save_for_backward(weight, scores, tau, union)
        ctx.rule = rule
        return masked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        weight, scores, tau, union = ctx.saved_tensors
        need_weight, need_scores = ctx.needs_input_grad[:2]
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            dw, ds = ops.gate_backward(grads[0], weight, scores, tau, union, ctx.rule, need_weight, need_scores)
        if twice:
            dw, ds = (None if d is None else _RefuseDoubleBackward.apply(d, weight, scores) for d in (dw, ds))
        return dw, ds, None, None, None, None


class _RefuseDoubleBackward(torch.autograd.Function):
    """Hands a first-order gradient on, tied to the graph, so that a second differentiation fails with a reason."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(
            "double backward through a subnet layer is not defined: the gradient of the scores is a straight-through "
            "estimate and has no derivative of its own. Take first-order gradients only (no create_graph=True through "
            "the weights)."
        )
