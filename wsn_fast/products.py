"""Products with the mask applied while the weight is loaded: when a layer uses them, and their registered operators.

The other way, a masked weight in memory (:func:`wsn_fast.ops.gate`) and then cuBLAS or cuDNN, costs more memory
traffic and multiplies faster. Which one wins depends on the shape and on the GPU: a layer takes the fused product where
that has been measured to win, or where somebody asks for it by name. Like :mod:`wsn_fast.ops`, this runs the backend
directly in eager mode and the registered operator while ``torch.compile`` traces.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .backends import choose, overridden, run
from .backends.shapes import Geometry, result_shape

F = TypeVar("F", bound=Callable[..., Any])


def _constant_while_tracing(function: F) -> F:
    """To ``torch.compile`` the answer is a constant: how it is found does not belong into the graph."""
    return cast(F, torch.compiler.assume_constant_result(function))


class Fusion(NamedTuple):
    """Up to how many rows of a batch the fused product is taken (0: never), and why."""

    rows: int
    reason: str


def linear_fusion(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int, backend: str | None = None
) -> Fusion:
    """When a linear layer takes the fused product.

    Args:
        operation: "masked_linear", "masked_linear_grad" or "masked_linear_tasks".
        device: of the weight.
        dtype: the compute dtype.
        source: where the mask comes from: "packed" for a finished task, "scores" in training.
        n: rows of the weight.
        k: columns of the weight.
        backend: the layer's override.
    """
    choice = choose(operation, device, dtype, backend)
    if choice.name != "triton":
        return Fusion(0, choice.reason)
    if overridden(operation, backend)[0] == "triton":
        return Fusion(sys.maxsize, choice.reason)
    return Fusion(*choice.backend.fused_rows(operation, device, dtype, source, n, k))


@_constant_while_tracing
def fused_rows(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int, backend: str | None
) -> int:
    """The number alone of :func:`linear_fusion`."""
    return linear_fusion(operation, device, dtype, source, n, k, backend).rows


def conv_fusion(
    device: torch.device, dtype: torch.dtype, source: str, shape: dict[str, int] | None, backend: str | None = None
) -> Fusion:
    """When a convolution is computed implicitly: ``rows`` is 0 or not. ``shape`` as in the tuning tables, or None for
    one that is not known, as while tracing."""
    choice = choose("masked_conv", device, dtype, backend)
    if choice.name != "triton":
        return Fusion(0, choice.reason)
    if overridden("masked_conv", backend)[0] == "triton":
        return Fusion(sys.maxsize, choice.reason)
    if shape is None:
        return Fusion(0, "the implicit convolution has not been measured at this shape")
    wins, reason = choice.backend.conv_wins(device, dtype, source, shape)
    return Fusion(sys.maxsize if wins else 0, reason)


@_constant_while_tracing
def fuses_conv_of_any_shape(device: torch.device, dtype: torch.dtype, source: str, backend: str | None) -> bool:
    """Whether a convolution is computed implicitly whatever its shape."""
    return conv_fusion(device, dtype, source, None, backend).rows > 0


# --- linear
def masked_linear(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    backward: bool,
    backend: str | None = None,
) -> Tensor:
    """``x (W*m)^T + b`` with ``x`` [M, K], or ``x (W*m) + b`` with ``x`` [M, N] for ``backward``; ``weight`` [N, K].
    The mask is packed, or formed from the scores and tau; the bias is masked already. The result has the dtype of
    ``x``."""
    if torch.compiler.is_compiling():
        return _masked_linear_op(x, weight, packed, scores, tau, rule, bias, backward, backend)
    chosen = run("masked_linear", x.device, x.dtype, backend)
    return chosen.masked_linear(x, weight, packed, scores, tau, rule, bias, backward)


@torch.library.custom_op("wsn_fast::masked_linear", mutates_args=())
def _masked_linear_op(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    backward: bool,
    backend: str | None,
) -> Tensor:
    return masked_linear(x, weight, packed, scores, tau, rule, bias, backward, backend)


@_masked_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    backward: bool,
    backend: str | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if backward else 0])


def masked_linear_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dW, dS)`` (Eq. 4 and 5) from the gradient [M, N] of the product and its input [M, K]; None for one that is not
    needed."""
    if torch.compiler.is_compiling():
        dw, ds = _masked_linear_grad_op(grad, x, weight, scores, tau, union, rule, need_weight, need_scores, backend)
        return (dw if need_weight else None), (ds if need_scores else None)
    chosen = run("masked_linear_grad", x.device, x.dtype, backend)
    return chosen.masked_linear_grad(grad, x, weight, scores, tau, union, rule, need_weight, need_scores)


@torch.library.custom_op("wsn_fast::masked_linear_grad", mutates_args=())
def _masked_linear_grad_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    dw, ds = masked_linear_grad(grad, x, weight, scores, tau, union, rule, need_weight, need_scores, backend)
    # A schema has no optional results: an empty tensor stands for a gradient that nobody asked for.
    return weight.new_empty(0) if dw is None else dw, scores.new_empty(0) if ds is None else ds


@_masked_linear_grad_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    tau: Tensor,
    union: Tensor | None,
    rule: str,
    need_weight: bool,
    need_scores: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    dw = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    ds = scores.new_empty(scores.shape) if need_scores else scores.new_empty(0)
    return dw, ds


def masked_linear_tasks(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    tasks: Tensor,
    bias: Tensor | None,
    packed_bias: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """``x[i] (W*m[t])^T + b*m_b[t]`` with ``t = tasks[i]``, a row of ``packed`` [T, bytes]; for inference."""
    chosen = run("masked_linear_tasks", x.device, x.dtype, backend)
    return chosen.masked_linear_tasks(x, weight, packed, tasks, bias, packed_bias)


# --- convolution
def masked_conv(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The zero-padded convolution of ``x`` [B, C, *] with the masked weight [OC, C / groups, *]; for an ``input_shape``
    the gradient of the input of that shape, with ``x`` as the gradient of the result."""
    if torch.compiler.is_compiling():
        return _masked_conv_op(
            x, weight, packed, scores, tau, rule, bias, *map(list, geometry), groups, input_shape, backend
        )
    chosen = run("masked_conv", x.device, x.dtype, backend)
    return chosen.masked_conv(x, weight, packed, scores, tau, rule, bias, geometry, groups, input_shape)


@torch.library.custom_op("wsn_fast::masked_conv", mutates_args=())
def _masked_conv_op(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: Sequence[int] | None,
    backend: str | None,
) -> Tensor:
    geometry = Geometry(stride, padding, dilation)
    result = masked_conv(x, weight, packed, scores, tau, rule, bias, geometry, groups, input_shape, backend)
    return result.contiguous()


@_masked_conv_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    scores: Tensor | None,
    tau: Tensor | None,
    rule: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: Sequence[int] | None,
    backend: str | None,
) -> Tensor:
    if input_shape is not None:
        return x.new_empty(input_shape)
    return x.new_empty(result_shape(x.shape, weight.shape, Geometry(stride, padding, dilation)))


def weight_gradient(grad: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry, groups: int) -> Tensor:
    """G, the gradient of a convolution's weight of ``shape``, by cuDNN or what the device has in its place."""
    like = x.new_empty(1).expand(list(shape))
    none = [0] * len(geometry.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, like, None, *map(list, geometry), False, none, groups, [False, True, False]
    )[1]
