"""The autograd Functions. They compute Eq. 3 of the WSN paper forward, and Eq. 4 and 5 backward.

G is the gradient of the masked weight. Eq. 4: the gradient of the weight is G inside the mask and outside the weights
that finished tasks use, else 0. Eq. 5: the gradient of the scores is ``G * W * sign(S)``, without the sign for the rule
"value".

:class:`SubnetGate` is the gate by itself, before a product by torch. :class:`SubnetProduct` is a product that applies
the mask while it loads the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.conv_geometry import Geometry
from ..backends.mask import GradientOrder, Mask
from ..backends.updates import CallKey, Plan
from . import products
from .arguments import key_of
from .fusion import fused_rows
from .gate import gate, gate_backward, gates_backward
from .raw_gradients import RawGradient, hand_over, is_watched
from .selection import threshold

VERSION = attrgetter("_version")
Gradients = tuple[Tensor | None, ...]
Again = Mapping[int, Callable[[], None]]
"""See :class:`ModelGate`."""


class GateForm(NamedTuple):
    """What a gate is, beside its tensors.

    Attributes:
        density: the fraction that the mask of the scores keeps.
        rule: "magnitude" or "value".
        dtype: the compute dtype of the masked weight.
        backend: an override, or None.
    """

    density: float
    rule: str
    dtype: torch.dtype
    backend: str | None = None


class SubnetGate(torch.autograd.Function):
    """``W, S -> m ? W : +0.0`` with the straight-through estimator for S.

    ``SubnetGate.apply(weight, scores, union, form, ahead)``: ``weight`` and ``scores`` have one shape; ``union`` is the
    packed mask of the weights that finished tasks own, or None; ``form`` is a :class:`GateForm`; ``ahead`` is the
    masked weight and the threshold where they were made ahead, or None. Backward computes the mask again from the
    scores and the threshold, so no mask is stored.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scores: Tensor,
        union: Tensor | None,
        form: GateForm,
        ahead: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if ahead is None:
            masked, tau = gate(weight, scores, form.density, form.rule, form.dtype, form.backend)
        else:
            masked, tau = ahead[0].detach(), ahead[1]  # the same memory and version, another tensor
        ctx.save_for_backward(weight, scores, tau, union)
        ctx.form = form
        return masked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        weight, scores, tau, union = ctx.saved_tensors
        mask = Mask(scores, tau, key_of(ctx.form.rule), union=union)
        need_weight, need_scores = ctx.needs_input_grad[:2]
        dw, ds = _gate_gradients(grads[0], weight, mask, (need_weight, need_scores), ctx.form.backend)
        return dw, ds, None, None, None


class AheadGate(NamedTuple):
    """A gate that was made ahead, as one of those that :class:`ModelGate` gives to a forward pass.

    Attributes:
        weight, scores: the gated tensor and its scores.
        masked: the masked weight in the compute dtype.
        tau: the threshold of the scores.
        union: the packed mask of the weights that finished tasks own, or None.
        rule: "magnitude" or "value".
        key: which call of a backend serves it together with others.
        raw: if backward hands over G, as :class:`RawGate` does, what is known about the gradient of the weight.
    """

    weight: Tensor
    scores: Tensor
    masked: Tensor
    tau: Tensor
    union: Tensor | None
    rule: str
    key: CallKey
    raw: RawGradient | None


class ModelGate(torch.autograd.Function):
    """The gates of all layers of a model that were made ahead, in one node of the graph.

    ``ModelGate.apply(gates, again, plan, *tensors)`` returns the masked weights. ``gates`` are :class:`AheadGate`.
    ``again`` has, by id, those for which the raw gradient of an earlier pass may be waiting, and what backward calls if
    none is waiting any more. ``plan`` is what the backends keep from call to call, by backend, device and dtype;
    ``tensors`` are the weights, and then the scores of the gates that are not raw. Backward computes the gradients of
    all gates together. A gate that the loss does not depend on gets none.
    """

    @staticmethod
    def forward(ctx: Any, gates: Sequence[AheadGate], again: Again, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.gates, ctx.again, ctx.plan = gates, again, plan
        ctx.versions = [*map(VERSION, tensors)]
        return tuple(one.masked.detach() for one in gates)  # the same memory and version, other tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        gates: Sequence[AheadGate] = ctx.gates
        raws = _raw_gradients(gates, grads, ctx.again)
        if len(raws) == len(gates):
            results: Gradients = (*raws.values(),)
        else:
            needed = ctx.needs_input_grad[3:]
            of_scores = iter(needed[len(gates) :])
            orders = [
                None if one.raw else _order(one, grad, need, next(of_scores))
                for one, grad, need in zip(gates, grads, needed, strict=False)
            ]
            _check_unchanged(gates, ctx.versions)
            _form_gradients(gates, orders, ctx.plan)
            pairs = [*zip(gates, orders, strict=True)]
            weights = [raws.get(id(one)) if one.raw else order and order.weight_grad for one, order in pairs]
            results = (*weights, *[order and order.score_grad for one, order in pairs if not one.raw])
        if torch.is_grad_enabled():
            of_each = [*gates, *(one for one in gates if not one.raw)]
            made = zip(results, of_each, strict=True)
            results = tuple(_first_order((d,), one.weight, one.scores)[0] for d, one in made)
        return None, None, None, *results


def _order(one: AheadGate, grad: Tensor | None, need_weight: bool, need_scores: bool) -> GradientOrder | None:
    """What to form for a gate, with memory for it; None if nothing is needed."""
    if grad is None or not (need_weight or need_scores):
        return None
    weight, scores, _, tau, union, rule, *_ = one
    return GradientOrder(
        grad, weight, scores, tau, union, rule,
        _empty_like(grad, weight.dtype) if need_weight else None,
        _empty_like(grad, scores.dtype) if need_scores else None,
    )  # fmt: skip


def _empty_like(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad) if grad.dtype is dtype else torch.empty_like(grad, dtype=dtype)


def _form_gradients(gates: Sequence[AheadGate], orders: Sequence[GradientOrder | None], plan: Plan) -> None:
    """Fill the memory of ``orders``: one call for all gates of a backend, device and dtype."""
    together: dict[CallKey, list[GradientOrder]] = {}
    for one, order in zip(gates, orders, strict=True):
        if order is not None:
            together.setdefault(one.key, []).append(order)
    for key, members in together.items():
        gates_backward(members, key.backend, plan.setdefault(key, {}))


def _check_unchanged(gates: Sequence[AheadGate], versions: Sequence[int]) -> None:
    """Raise ``RuntimeError``, as PyTorch does, if a weight or scores were written to since the forward pass."""
    tensors = [one.weight for one in gates] + [one.scores for one in gates if not one.raw]
    if versions != [*map(VERSION, tensors)]:
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    f"a weight or scores of shape {tuple(tensor.shape)} needed for gradient computation has been "
                    f"modified by an inplace operation: it is at version {tensor._version}; expected version {version}"
                )


def _raw_gradients(
    gates: Sequence[AheadGate], grads: Sequence[Tensor | None], again: Again
) -> dict[int, Tensor | None]:
    """The gradients of the weights of those gates that are raw, by the id of the gate."""
    found = [(one, grad, one.raw) for one, grad in zip(gates, grads, strict=True) if one.raw]
    if not found:
        return {}
    raws = [
        None if grad is None else _handed_over(grad, one.weight, again.get(id(one)), about)
        for one, grad, about in found
    ]
    raws = hand_over([about for *_, about in found], [one.weight for one, *_ in found], raws)
    return dict(zip([id(one) for one, *_ in found], raws, strict=True))


def _gate_gradients(
    grad: Tensor, weight: Tensor, mask: Mask, needed: tuple[bool, bool], backend: str | None
) -> Gradients:
    """``(dW, dS)`` from G, the gradient of the masked weight."""
    assert mask.scores is not None
    with torch.no_grad():
        gradients = gate_backward(grad, weight, mask, *needed, backend)
    return _first_order(gradients, weight, mask.scores)


def _first_order(gradients: Gradients, *inputs: Tensor) -> Gradients:
    """Return the gradients. With ``create_graph=True``, a second differentiation of the results raises an error that
    gives the reason."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return tuple(None if d is None else _RefuseDoubleBackward.apply(d, *inputs) for d in gradients)


class ProductForm(NamedTuple):
    """What a masked product is, beside its tensors.

    Attributes:
        density: the fraction that the mask of the scores keeps.
        rule: "magnitude" or "value".
        backend: an override, or None.
        geometry: stride, padding and dilation of a convolution; None for a linear product.
        groups: the number of groups of a convolution.
        transposed: whether the weight of a linear product is stored [in, out].
    """

    density: float
    rule: str
    backend: str | None
    geometry: Geometry | None = None
    groups: int = 1
    transposed: bool = False


class SubnetProduct(torch.autograd.Function):
    """``x, W, S, b -> x (W*m)^T + b`` or the convolution, without a masked weight in memory.

    ``SubnetProduct.apply(x, weight, scores, bias, union, packed, form)``: ``x`` is in the compute dtype, [M, features]
    for a linear product; ``scores`` is None where the mask is ``packed``, and then the weight is a constant; ``bias``
    is masked already and in the compute dtype, or None; ``form`` is a :class:`ProductForm`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scores: Tensor | None,
        bias: Tensor | None,
        union: Tensor | None,
        packed: Tensor | None,
        form: ProductForm,
    ) -> Tensor:
        tau = None if scores is None else threshold(scores.detach(), form.density, form.rule, form.backend)
        ctx.save_for_backward(x, weight, scores, tau, packed, union)
        ctx.form = form
        mask = Mask(scores, tau, key_of(form.rule), packed, union)
        if form.geometry is None:
            return products.masked_linear(x, weight, mask, bias, form.transposed, form.backend)
        return products.masked_conv(x, weight, mask, bias, form.geometry, form.groups, None, form.backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x, weight, scores, tau, packed, union = ctx.saved_tensors
        need_x, need_weight, need_scores, need_bias = ctx.needs_input_grad[:4]
        form: ProductForm = ctx.form
        mask, grad = Mask(scores, tau, key_of(form.rule), packed, union), grads[0]
        dx = dw = ds = db = None
        if need_x:
            dx = _input_gradient(grad, x, weight, mask, form)
        if need_weight or need_scores:
            dw, ds = _weight_gradients(grad, x, weight, mask, form, (need_weight, need_scores))
        if need_bias:
            db = grad.sum(dim=[d for d in range(grad.ndim) if d != 1])
        return dx, dw, ds, db, None, None, None


def _input_gradient(grad: Tensor, x: Tensor, weight: Tensor, mask: Mask, form: ProductForm) -> Tensor:
    with torch.no_grad():
        if form.geometry is None:
            dx = products.masked_linear(grad, weight, mask, None, not form.transposed, form.backend)
        else:
            dx = products.masked_conv(grad, weight, mask, None, form.geometry, form.groups, x.shape, form.backend)
    (result,) = _first_order((dx,), grad, weight)
    assert result is not None
    return result


def _weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Mask, form: ProductForm, needed: tuple[bool, bool]
) -> Gradients:
    """``(dW, dS)`` from the gradient of the product and its input."""
    assert mask.scores is not None
    if not _fuses_gradient(x, weight, form):
        with torch.no_grad():
            masked_grad = _masked_weight_gradient(grad, x, weight, form)
        return _gate_gradients(masked_grad, weight, mask, needed, form.backend)
    with torch.no_grad():
        gradients = products.masked_linear_grad(grad, x, weight, mask, *needed, form.backend)
    return _first_order(gradients, weight, mask.scores)


def _fuses_gradient(x: Tensor, weight: Tensor, form: ProductForm) -> bool:
    if form.geometry is not None or form.transposed:
        return False
    n, k = weight.shape
    limit = fused_rows("masked_linear_grad", weight.device, x.dtype, "scores", n, k, form.backend)
    return 0 < x.shape[0] <= limit


def _masked_weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, form: ProductForm) -> Tensor:
    """G, the gradient of the masked weight, in the compute dtype."""
    if form.geometry is not None:
        return products.weight_gradient(grad, x, weight.shape, form.geometry, form.groups)
    return x.t() @ grad if form.transposed else grad.t() @ x


class RawGate(torch.autograd.Function):
    """The gate for the one-pass optimizers: ``RawGate.apply(weight, masked, again, about)`` returns ``masked``, which
    was made from the weight. Backward stores G, the gradient of the masked weight, as the gradient of the weight. The
    optimizer computes the gradients of Eq. 4 and 5 from G. ``about`` is what is known about that gradient, or None
    while ``torch.compile`` traces.

    A G that was computed in bfloat16 stays in bfloat16 if the weight allows this (``grad_dtype`` is None). If the
    weight is used ``again`` in this step, the gradients are added in the dtype of the weight, unless ``about`` says
    that they are added in bfloat16. ``again`` is then True, or what backward calls if it finds that no gradient of the
    earlier use is waiting any more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        masked: Tensor,
        again: bool | Callable[[], None] | None,
        about: RawGradient | None,
    ) -> Tensor:
        ctx.weight, ctx.again, ctx.about = weight, again, about
        return masked.detach()  # the same memory and version, another tensor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raw: Tensor | None = _handed_over(grads[0], ctx.weight, ctx.again, ctx.about)
        if ctx.about is not None:
            (raw,) = hand_over([ctx.about], [ctx.weight], [raw])
        (first_order,) = _first_order((raw,), *grads[:1], *grads[:1])
        return first_order, None, None, None


def _handed_over(
    raw: Tensor, weight: Tensor, again: bool | Callable[[], None] | None, about: RawGradient | None
) -> Tensor:
    if again and again is not True and weight.grad is None:
        again()
    if raw.dtype is weight.dtype and (weight.grad is None or weight.grad.dtype is raw.dtype):
        return raw
    if torch.compiler.is_compiling() or weight.grad_dtype is not None:
        return raw.to(weight.dtype)
    # GradScaler refuses to unscale float16. Hooks, those of DDP too, expect the dtype of the weight.
    watched = is_watched(weight) or (torch.distributed.is_available() and torch.distributed.is_initialized())
    narrow = raw.dtype is torch.bfloat16 and not watched
    if narrow and about is not None and about.adds_in_bfloat16:
        return raw  # autograd adds it to whatever is waiting, in the dtype of that
    if weight.grad is not None and weight.grad.dtype is not weight.dtype:
        weight.grad = weight.grad.to(weight.dtype)
    return raw if narrow and weight.grad is None and not again else raw.to(weight.dtype)


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
