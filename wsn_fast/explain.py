"""What runs each operation of each layer, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from . import products
from .backends import choose
from .layers import FastSubnetTransposedLinear
from .subnet import SubnetLayer

STEP = ("threshold", "gate", "gate_packed", "gate_backward")
"""The primitives that a layer calls in training and in evaluation."""


class Route(NamedTuple):
    """How one operation of one layer runs.

    Attributes:
        layer: the layer's name in the model.
        operation: a primitive of :mod:`wsn_fast.backends.torch`, or "product (...)".
        backend: "torch", "triton" or "native".
        reason: why.
    """

    layer: str
    operation: str
    backend: str
    reason: str


class Explanation(list[Route]):
    """The routes of a model; ``str`` of it is a table."""

    def __str__(self) -> str:
        head = Route("layer", "operation", "backend", "reason")
        widths = [max(len(row[i]) for row in [head, *self]) for i in range(3)]
        lines = (
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.reason])
            for row in [head, *self]
        )
        return "\n".join(lines)


def explain(model: nn.Module, *, dtype: torch.dtype | None = None) -> Explanation:
    """Which backend runs what in each subnet layer of ``model``, on the device where it is, and why.

    Args:
        model: any module with subnet layers, or a layer.
        dtype: the compute dtype, as under autocast; None for that of each layer's weight.

    Returns:
        A :class:`Route` for each operation; print it for a table. An override (``layer.backend``, the environment
        variable ``WSN_FAST_BACKEND``) shows in the reasons.

    Raises:
        ValueError: ``model`` has no subnet layer.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, SubnetLayer)]
    if not layers:
        raise ValueError(f"model has no subnet layer: {type(model).__name__}")
    routes = Explanation()
    for name, layer in layers:
        weight, backend = layer.weight, layer.backend
        for operation in STEP:
            dtype_of = layer.weight_score.dtype if operation == "threshold" else weight.dtype
            chosen = choose(operation, weight.device, dtype_of, backend)
            routes.append(Route(name, operation, chosen.name, chosen.reason))
        if layer.one_pass:
            chosen = choose("adamw_step", weight.device, weight.dtype, backend)
            routes.append(Route(name, "one-pass step", chosen.name, chosen.reason))
        for source, when in (("scores", "training"), ("packed", "finished task")):
            fusion = _fusion(layer, dtype or weight.dtype, source)
            routes.append(Route(name, f"product ({when})", *_product(fusion)))
    return routes


def _fusion(layer: SubnetLayer, dtype: torch.dtype, source: str) -> products.Fusion:
    weight, backend = layer.weight, layer.backend
    if layer.one_pass and source == "scores":
        return products.Fusion(0, "a one-pass optimizer takes the gradient of the masked weight")
    if isinstance(layer, (nn.Linear, FastSubnetTransposedLinear)):
        n, k = weight.shape
        return products.linear_fusion("masked_linear", weight.device, dtype, source, n, k, backend)
    if weight.ndim > 4:
        return products.Fusion(0, "there is no fused convolution in 3-d")
    fusion = products.conv_fusion(weight.device, dtype, source, None, backend)
    if fusion.rows or choose("masked_conv", weight.device, dtype, backend).name != "triton":
        return fusion
    return products.Fusion(0, "but for input shapes at which the implicit convolution was measured to be faster")


def _product(fusion: products.Fusion) -> tuple[str, str]:
    if fusion.rows == 0:
        return "torch", f"masked weight in memory, then torch's product: {fusion.reason}"
    return "triton", f"mask applied while the weight is loaded: {fusion.reason}"
