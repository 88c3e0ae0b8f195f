"""The autograd Functions: forward Eq. 3, backward Eq. 4 and 5 of the WSN paper.

:class:`SubnetGate` is the gate by itself, before a product by torch. :class:`SubnetProduct` is a product that applies
the mask while it loads the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, products
from .backends.shapes import Geometry

Gradients = tuple[Tensor | None, ...]


class SubnetGate(torch.autograd.Function):
    """``W, S -> m ? W : +0.0`` with the straight-through estimator for S.

    ``SubnetGate.apply(weight, scores, density, rule, union, dtype, backend)``: ``weight`` and ``scores`` of one shape;
    ``union`` the packed mask of the weights that finished tasks own, or None; ``dtype`` the compute dtype of the
    result; ``backend`` an override or None. Only references and the 0-d threshold are kept for backward: the mask is
    formed again there from the scores, which are read for ``sign(S)`` anyway.
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
        backend: str | None = None,
    ) -> Tensor:
        masked, tau = ops.gate(weight, scores, density, rule, dtype, backend)
        ctx.save_for_backward(weight, scores, tau, union)
        ctx.rule, ctx.backend = rule, backend
        return masked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        weight, scores, tau, union = ctx.saved_tensors
        need_weight, need_scores = ctx.needs_input_grad[:2]
        dw, ds = _gate_gradients(ctx, need_weight, need_scores, grads[0], weight, scores, tau, union)
        return dw, ds, None, None, None, None, None


def _gate_gradients(
    ctx: Any,
    need_weight: bool,
    need_scores: bool,
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
) -> Gradients:
    """``(dW, dS)`` from G, the gradient of the masked weight."""
    with torch.no_grad():
        gradients = ops.gate_backward(grad, weight, scores, tau, union, ctx.rule, need_weight, need_scores, ctx.backend)
    return _first_order(gradients, weight, scores)


def _first_order(gradients: Gradients, *inputs: Tensor) -> Gradients:
    """The gradients as they are, or for ``create_graph=True`` such that differentiating them again says why not."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return tuple(None if d is None else _RefuseDoubleBackward.apply(d, *inputs) for d in gradients)


class SubnetProduct(torch.autograd.Function):
    """``x, W, S, b -> x (W*m)^T + b`` or the convolution, without a masked weight in memory.

    ``SubnetProduct.apply(x, weight, scores, bias, density, rule, union, packed, geometry, groups, transposed,
    backend)``: ``x`` in the compute dtype, [M, features] for a linear product; ``scores`` None where the mask is
    ``packed``, and then the weight is a constant; ``bias`` masked already, in the compute dtype, or None; ``geometry``
    and ``groups`` of a convolution, None for a linear product, whose weight is stored [in, out] if ``transposed``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor | None,
        bias: Tensor | None,
        density: float,
        rule: str,
        union: Tensor | None,
        packed: Tensor | None,
        geometry: Geometry | None,
        groups: int,
        transposed: bool,
        backend: str | None,
    ) -> Tensor:
        tau = None if scores is None else ops.threshold(scores.detach(), density, rule, backend)
        ctx.save_for_backward(x, weight, scores, tau, union, packed)
        ctx.rule, ctx.backend, ctx.geometry, ctx.groups, ctx.transposed = rule, backend, geometry, groups, transposed
        if geometry is None:
            return products.masked_linear(x, weight, packed, scores, tau, rule, bias, transposed, backend)
        return products.masked_conv(x, weight, packed, scores, tau, rule, bias, geometry, groups, None, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x, weight, scores, tau, union, packed = ctx.saved_tensors
        need_x, need_weight, need_scores, need_bias = ctx.needs_input_grad[:4]
        grad = grads[0]
        dx = dw = ds = db = None
        if need_x:
            dx = _input_gradient(ctx, grad, x, weight, scores, tau, packed)
        if need_weight or need_scores:
            mask = (weight, scores, tau, union)
            if _fuses_gradient(ctx, grad, x, weight):
                with torch.no_grad():
                    gradients = products.masked_linear_grad(
                        grad, x, *mask, ctx.rule, need_weight, need_scores, ctx.backend
                    )
                dw, ds = _first_order(gradients, weight, scores)
            else:
                with torch.no_grad():
                    masked_grad = _weight_gradient(ctx, grad, x, weight)
                dw, ds = _gate_gradients(ctx, need_weight, need_scores, masked_grad, *mask)
        if need_bias:
            db = grad.sum(dim=[d for d in range(grad.ndim) if d != 1])
        return dx, dw, ds, db, *[None] * 8


def _input_gradient(
    ctx: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    tau: Tensor | None,
    packed: Tensor | None,
) -> Tensor:
    mask = (packed, scores, tau, ctx.rule, None)
    with torch.no_grad():
        if ctx.geometry is None:
            dx = products.masked_linear(grad, weight, *mask, not ctx.transposed, ctx.backend)
        else:
            dx = products.masked_conv(grad, weight, *mask, ctx.geometry, ctx.groups, x.shape, ctx.backend)
    (result,) = _first_order((dx,), grad, weight)
    assert result is not None
    return result


def _fuses_gradient(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> bool:
    if ctx.geometry is not None or ctx.transposed:
        return False
    n, k = weight.shape
    limit = products.fused_rows("masked_linear_grad", weight.device, x.dtype, "scores", n, k, ctx.backend)
    return 0 < x.shape[0] <= limit


def _weight_gradient(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """G, the gradient of the masked weight, in the compute dtype."""
    if ctx.geometry is not None:
        return products.weight_gradient(grad, x, weight.shape, ctx.geometry, ctx.groups)
    return x.t() @ grad if ctx.transposed else grad.t() @ x


class RawGate(torch.autograd.Function):
    """The gate for the one-pass optimizers: ``RawGate.apply(weight, masked, again)`` is ``masked``, which was formed
    from the weight, and hands G, the gradient of the masked weight, to the weight as it is. What Eq. 4 and 5 make of it
    is the optimizer's business. G stays in bfloat16 where it was computed so, if the weight allows (``grad_dtype``
    None) and is not used ``again`` in this step: it is added up in the dtype of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, masked: Tensor, again: bool) -> Tensor:
        ctx.weight, ctx.again = weight, again
        return masked.detach()  # the same memory and version, another tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        (raw,) = _first_order((_handed_over(grads[0], ctx.weight, ctx.again),), *grads[:1], *grads[:1])
        return raw, None, None


def _handed_over(raw: Tensor, weight: Tensor, again: bool) -> Tensor:
    if torch.compiler.is_compiling() or weight.grad_dtype is not None:
        return raw.to(weight.dtype)
    if weight.grad is not None and weight.grad.dtype is not weight.dtype:
        weight.grad = weight.grad.to(weight.dtype)
        again = True
    # GradScaler refuses to unscale float16. Hooks, and DDP's, expect the dtype of the weight.
    watched = bool(weight._backward_hooks) or (torch.distributed.is_available() and torch.distributed.is_initialized())
    stays = raw.dtype is torch.bfloat16 and weight.grad is None and not again and not watched
    return raw if stays else raw.to(weight.dtype)


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
