"""Decides when a layer uses a fused product, which applies the mask while it loads the weight.

The other way writes the masked weight to memory (:func:`wsn_fast.ops.gate`) and multiplies with cuBLAS or cuDNN: it
moves more memory and multiplies faster. Which one is faster depends on the shape and on the GPU. A layer uses the fused
product if it was measured to be faster, or if the user asks for it by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from ..backends import candidate, choose, overridden

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of weights and scores that the fused products read."""

F = TypeVar("F", bound=Callable[..., Any])


def _constant_while_tracing(function: F) -> F:
    """Make ``torch.compile`` treat the answer as a constant, because the search for it must not be part of the
    graph."""
    # torch.compiler.assume_constant_result does just this, and imports torch._dynamo, which takes as long as torch.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Fusion(NamedTuple):
    """Up to how many rows of a batch a layer uses the fused product (0: never), and why."""

    rows: int
    reason: str


def linear_fusion(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int, backend: str | None = None
) -> Fusion:
    """Decide up to how many rows a linear layer uses the fused product.

    Args:
        operation: "masked_linear", "masked_linear_grad" or "masked_linear_tasks".
        device: the device of the weight.
        dtype: the compute dtype.
        source: where the mask comes from: "packed" for a finished task, "scores" in training.
        n: rows of the weight.
        k: columns of the weight.
        backend: the layer's override.
    """
    choice = candidate(operation, device, dtype, backend)
    if choice.name != "triton":
        return Fusion(0, choice.reason)
    asked = overridden(operation, backend)[0] == "triton"
    measured = (
        (sys.maxsize, choice.reason) if asked else choice.backend.fused_rows(operation, device, dtype, source, n, k)
    )
    return _checked(Fusion(*measured), operation, device, dtype, backend)


def _checked(fusion: Fusion, operation: str, device: torch.device, dtype: torch.dtype, backend: str | None) -> Fusion:
    """The same, unless the product turns out to be wrong here. A product that is not used is not checked."""
    choice = choose(operation, device, dtype, backend) if fusion.rows else None
    return fusion if choice is None or choice.name == "triton" else Fusion(0, choice.reason)


@_constant_while_tracing
def fused_rows(
    operation: str, device: torch.device, dtype: torch.dtype, source: str, n: int, k: int, backend: str | None
) -> int:
    """Return ``linear_fusion(...).rows``."""
    return linear_fusion(operation, device, dtype, source, n, k, backend).rows


def conv_fusion(
    device: torch.device, dtype: torch.dtype, source: str, shape: dict[str, int] | None, backend: str | None = None
) -> Fusion:
    """Decide whether a convolution uses its fused product, the implicit convolution. It does if ``rows`` of the result
    is not 0. ``shape`` is the convolution as the tuning tables name it, or None if it is unknown, for example while
    ``torch.compile`` traces."""
    choice = candidate("masked_conv", device, dtype, backend)
    if choice.name != "triton":
        return Fusion(0, choice.reason)
    if overridden("masked_conv", backend)[0] == "triton":
        fusion = Fusion(sys.maxsize, choice.reason)
    elif shape is None:
        return Fusion(0, "the implicit convolution has not been measured at this shape")
    else:
        wins, reason = choice.backend.conv_wins(device, dtype, source, shape)
        fusion = Fusion(sys.maxsize if wins else 0, reason)
    return _checked(fusion, "masked_conv", device, dtype, backend)


@_constant_while_tracing
def fuses_conv_of_any_shape(device: torch.device, dtype: torch.dtype, source: str, backend: str | None) -> bool:
    """Whether a convolution is computed implicitly whatever its shape."""
    return conv_fusion(device, dtype, source, None, backend).rows > 0
