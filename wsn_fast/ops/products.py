"""Products with the masked weight that never write it to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import run
from ..backends.conv_geometry import Geometry, result_shape
from ..backends.mask import Mask
from .operator import operator


# --- linear
@operator(fake=lambda a: a.x.new_empty(a.x.shape[0], a.weight.shape[1 if a.backward else 0]))
def masked_linear(
    x: Tensor, weight: Tensor, mask: Mask, bias: Tensor | None, backward: bool, backend: str | None = None
) -> Tensor:
    """Return ``x (W*m)^T + b`` for ``x`` [M, K]; if ``backward``, return ``x (W*m) + b`` for ``x`` [M, N]. ``weight``
    is [N, K]. The bias is masked already. The result has the dtype of ``x``."""
    return run("masked_linear", x.device, x.dtype, backend).masked_linear(x, weight, mask, bias, backward)


def _empty_gradients(a: Any) -> tuple[Tensor | None, Tensor | None]:
    return (
        a.weight.new_empty(a.weight.shape) if a.need_weight else None,
        a.mask.scores.new_empty(a.mask.scores.shape) if a.need_scores else None,
    )


@operator(fake=_empty_gradients)
def masked_linear_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    need_weight: bool,
    need_scores: bool,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``(dW, dS)`` (Eq. 4 and 5), computed from the gradient [M, N] of the product and its input [M, K]. One
    that is not needed is None. ``mask`` has scores."""
    chosen = run("masked_linear_grad", x.device, x.dtype, backend)
    return chosen.masked_linear_grad(grad, x, weight, mask, need_weight, need_scores)


def masked_linear_tasks(
    x: Tensor,
    weight: Tensor,
    packed: Tensor,
    tasks: Tensor,
    bias: Tensor | None,
    packed_bias: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """Return ``x[i] (W*m[t])^T + b*m_b[t]`` for each i, for inference; ``t = tasks[i]`` is a row of ``packed``
    [T, bytes]. The bias is not masked yet: its masks are ``packed_bias`` [T, bytes]."""
    chosen = run("masked_linear_tasks", x.device, x.dtype, backend)
    return chosen.masked_linear_tasks(x, weight, packed, tasks, bias, packed_bias)


# --- convolution
def _empty_convolution(a: Any) -> Tensor:
    shape = a.input_shape
    return a.x.new_empty(result_shape(a.x.shape, a.weight.shape, a.geometry) if shape is None else shape)


@operator(fake=_empty_convolution)
def masked_conv(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the zero-padded convolution of ``x`` [B, C, *] with the masked weight [OC, C / groups, *]. If
    ``input_shape`` is given, compute the gradient of an input of that shape instead; then ``x`` is the gradient of the
    convolution's result."""
    chosen = run("masked_conv", x.device, x.dtype, backend)
    result: Tensor = chosen.masked_conv(x, weight, mask, bias, geometry, groups, input_shape)
    return result.contiguous()  # as the fake has it, whatever cuDNN prefers


def weight_gradient(grad: Tensor, x: Tensor, shape: Sequence[int], geometry: Geometry, groups: int) -> Tensor:
    """G, the gradient of a convolution's weight of ``shape``, computed by PyTorch (by cuDNN on a GPU)."""
    like = x.new_empty(1).expand(list(shape))
    none = [0] * len(geometry.stride)
    return torch.ops.aten.convolution_backward(
        grad, x, like, None, *map(list, geometry), False, none, groups, [False, True, False]
    )[1]
