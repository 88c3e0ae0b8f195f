"""Products with the mask applied while the weight is loaded, by the kernels of ``kernels/``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import implicit_conv, masked_matmul, masked_matmul_grad, masked_matmul_tasks, split_sum
from .. import torch as portable
from ..conv_geometry import Geometry, result_shape, tuning_key
from ..mask import Mask
from . import tuning
from .device import gpu_of, on_device_of, table_of


def precision_of(dtype: torch.dtype, setting: Any) -> str:
    """How a product in ``dtype`` multiplies: "ieee" for float32 unless torch's own setting says "tf32".

    Args:
        dtype: the compute dtype; 16-bit ones have no choice, and their tables say "tf32".
        setting: ``torch.backends.cuda.matmul`` or ``torch.backends.cudnn.conv``, whose ``fp32_precision`` decides.
    """
    return "ieee" if dtype is torch.float32 and setting.fp32_precision != "tf32" else "tf32"


def linear_product(operation: str, dtype: torch.dtype, source: str, backward: bool = False) -> tuning.Product:
    """The key of a linear layer's product in the tuning tables, under torch's precision setting of now."""
    return tuning.Product(operation, dtype, precision_of(dtype, torch.backends.cuda.matmul), source, backward)


def fused_rows(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int
) -> tuple[int, str]:
    """Up to how many rows the fused product was measured to be faster, and how that is known. In training the forward
    pass and its backward pass use the same product, so the fused one must be faster in both."""
    both = source == "scores" and operation == "masked_linear"
    directions = (False, True) if both else (False,)
    answers = [
        table_of(device).fused_rows(linear_product(operation, dtype, source, backward), n, k) for backward in directions
    ]
    return min(answers, key=lambda answer: answer[0])


def conv_wins(device: torch.device, dtype: torch.dtype, source: str, shape: dict[str, int]) -> tuple[bool, str]:
    """Whether the implicit convolution was measured to win at this shape, in both directions, and how that is known."""
    precision = precision_of(dtype, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    answers = [
        table_of(device).conv_wins(tuning.Product("masked_conv", dtype, precision, source, backward), shape)
        for backward in (False, True)
    ]
    return min(answers, key=lambda answer: answer[0])


def masked_linear(x: Tensor, weight: Tensor, mask: Mask, bias: Tensor | None, backward: bool) -> Tensor:
    """``x (W*m)^T + b``, or ``x (W*m)`` for ``backward``, without a masked weight in memory."""
    (n, k), rows = weight.shape, x.shape[0]
    outputs = k if backward else n
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    product = linear_product("masked_linear", x.dtype, mask.source, backward)
    if rows == 0:
        return y
    with on_device_of(x):
        config, splits = table_of(x.device).tile(product, rows, n, k, gpu_of(x.device))
        masked_matmul.masked_matmul(
            _rows(x),
            weight.detach().contiguous(),
            y,
            **_mask_arguments(mask),
            bias=None if bias is None else bias.contiguous(),
            backward=backward,
            config=config,
            splits=splits,
            workspace=_workspace(x, rows, outputs, splits),
            precision=product.precision,
        )
    return y


def masked_linear_grad(
    grad_output: Tensor, x: Tensor, weight: Tensor, mask: Mask, need_weight: bool, need_scores: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of weight and scores inside the product ``grad_output^T x``. That product is G, the
    gradient of the masked weight; it is neither written nor rounded."""
    if not (need_weight or need_scores):
        return None, None
    assert mask.scores is not None and mask.tau is not None
    n, k = weight.shape
    dw = torch.empty(n, k, dtype=weight.dtype, device=x.device) if need_weight else None
    ds = torch.empty(n, k, dtype=mask.scores.dtype, device=x.device) if need_scores else None
    product = linear_product("masked_linear_grad", x.dtype, "scores")
    with on_device_of(x):
        config, splits = table_of(x.device).tile(product, x.shape[0], n, k, gpu_of(x.device))
        masked_matmul_grad.masked_matmul_grad(
            _rows(grad_output),
            _rows(x),
            weight.detach().contiguous(),
            dw,
            ds,
            scores=mask.scores.detach().contiguous(),
            tau=mask.tau,
            union=mask.union,
            rule=mask.rule,
            config=config,
            splits=splits,
            workspace=_workspace(x, n, k, splits),
            precision=product.precision,
        )
    return dw, ds


def masked_linear_tasks(
    x: Tensor, weight: Tensor, packed: Tensor, tasks: Tensor, bias: Tensor | None, packed_bias: Tensor | None
) -> Tensor:
    """``x[i] (W*m[tasks[i]])^T + b*m_b[tasks[i]]``, the weight read once for all tasks of a tile."""
    rows, (n, k) = x.shape[0], weight.shape
    y = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    product = linear_product("masked_linear_tasks", x.dtype, "packed")
    if rows == 0:
        return y
    with on_device_of(x):
        config, splits = table_of(x.device).tile(product, rows, n, k, gpu_of(x.device))
        masked_matmul_tasks.masked_matmul_tasks(
            _rows(x),
            weight.detach().contiguous(),
            y,
            packed=packed.contiguous(),
            tasks=tasks.to(torch.int32).contiguous(),
            order=tasks.argsort().to(torch.int32),  # neighbours of one task share a tile
            bias=None if bias is None else bias.detach().contiguous(),
            packed_bias=None if packed_bias is None else packed_bias.contiguous(),
            config=config,
            splits=splits,
            workspace=_workspace(x, rows, n, splits),
            precision=product.precision,
        )
    return y


def _mask_arguments(mask: Mask) -> dict[str, Any]:
    """What the launchers take for a mask."""
    return {
        "packed": None if mask.packed is None else mask.packed.contiguous(),
        "scores": None if mask.scores is None else mask.scores.detach().contiguous(),
        "tau": mask.tau,
        "rule": mask.rule,
    }


def _rows(x: Tensor) -> Tensor:
    """Return ``x`` in a form that the kernels can read: the elements of a row must be contiguous, rows may lie
    apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _workspace(x: Tensor, rows: int, outputs: int, splits: int) -> Tensor | None:
    size = split_sum.workspace_numel(rows, outputs, splits)
    return torch.empty(size, dtype=torch.float32, device=x.device) if size else None


def masked_conv(
    x: Tensor,
    weight: Tensor,
    mask: Mask,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    input_shape: Sequence[int] | None,
) -> Tensor:
    """Compute the convolution as an implicit masked product, or if ``input_shape`` is given the gradient of its input
    (see :func:`wsn_fast.backends.torch.masked_conv`)."""
    stride, padding, dilation = geometry
    backward = input_shape is not None
    shape = list(input_shape) if input_shape is not None else result_shape(x.shape, weight.shape, geometry)
    if min(shape) < 0 or 0 in shape[2:]:
        raise RuntimeError(f"the kernel {tuple(weight.shape[2:])} is larger than the padded input {tuple(x.shape[2:])}")
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    precision = precision_of(x.dtype, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    product = tuning.Product("masked_conv", x.dtype, precision, mask.source, backward)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_()
    far = max(*x.stride(), *y.stride()) > implicit_conv.MOST_STRIDE
    if far or (backward and weight[0].numel() > implicit_conv.MOST_PER_CHANNEL):
        return portable.masked_conv(x, weight, mask, bias, geometry, groups, input_shape)
    positions = y.numel() // y.shape[1]
    key = tuning_key(shape if backward else x.shape, weight.shape, geometry, groups)
    with on_device_of(x):
        implicit_conv.masked_conv(
            x,
            weight.detach().contiguous(),
            y,
            **_mask_arguments(mask),
            bias=None if bias is None else bias.contiguous(),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            backward=backward,
            config=table_of(x.device).conv_config(product, key, positions, gpu_of(x.device)),
            precision=product.precision,
        )
    return y
