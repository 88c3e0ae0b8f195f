"""What the optimizer kernels do to one tile, on values: the gradients, and the rules of AdamW and SGD.

The order of operations and of roundings is that of PyTorch's fused optimizers. Everything is computed in float32, and
rounded where PyTorch stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._elementwise import below, convert, table_pointer, widen

SCALES = {None: None, torch.float32: tl.float32, torch.float64: tl.float64}
"""The dtypes that a scale and a step count may have."""


@triton.jit
def load_threshold(gradients_ptr, tensor, tensors, DTYPE: tl.constexpr, GIVEN: tl.constexpr):
    """The threshold of the last forward pass, which gradients that are GIVEN do without."""
    if GIVEN:
        return 0.0
    else:
        return tl.load(table_pointer(gradients_ptr, 2, tensor, tensors, DTYPE, False))


@triton.jit
def load_scale(gradients_ptr, tensor, tensors, SCALE: tl.constexpr):
    """The factor for dW and dS."""
    if SCALE is None:
        return 1.0
    else:
        return tl.load(table_pointer(gradients_ptr, 3, tensor, tensors, SCALE, False)).to(tl.float32)


@triton.jit
def gradients(
    g, ds, w, s, tau, frozen, scale,
    MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """``dW`` and ``dS`` times ``scale``, in float32 and rounded to the dtype of ``w``: from G as :mod:`.grad` forms
    them, or as they are where they are GIVEN."""
    DTYPE: tl.constexpr = w.dtype
    dw = convert(g, DTYPE)
    if not GIVEN:
        ds = convert(widen(dw) * widen(w), DTYPE)
        if MAGNITUDE:  # the sign of NaN is 0, as PyTorch's
            ds = convert(widen(ds) * ((widen(s) > 0).to(tl.float32) - (widen(s) < 0).to(tl.float32)), DTYPE)
        drop = below(s, tau, MAGNITUDE)
        if HAS_UNION:
            drop |= frozen
        dw = tl.where(drop, tl.zeros_like(dw), dw)
    return widen(convert(widen(dw) * scale, DTYPE)), widen(convert(widen(ds) * scale, DTYPE))


@triton.jit
def load_settings(settings_ptr):
    """The eight numbers of a parameter's update, as the prepare kernels write them."""
    return (
        tl.load(settings_ptr), tl.load(settings_ptr + 1), tl.load(settings_ptr + 2), tl.load(settings_ptr + 3),
        tl.load(settings_ptr + 4), tl.load(settings_ptr + 5), tl.load(settings_ptr + 6), tl.load(settings_ptr + 7),
    )  # fmt: skip


@triton.jit
def adamw(p, g, mean, square, settings):
    """The parameter and its running means after an update."""
    weight, beta2, rest2, eps, correction, size, shrink, decay = settings
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    # torch.lerp: from the nearer end, which the sign of the weight tells.
    mean = tl.fma(weight, g - mean, tl.where(weight > 0, mean, g))
    square = square * beta2 + rest2 * g * g
    root = tl.div_rn(tl.sqrt_rn(square), correction) + eps
    return p * shrink + tl.div_rn(size * mean, root), mean, square


@triton.jit
def sgd(p, g, momentum, settings, HAS_MOMENTUM: tl.constexpr):
    """The parameter and its momentum after an update."""
    size, factor, rest, decay, nesterov, first, _, _ = settings
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    if HAS_MOMENTUM:
        momentum = tl.where(first != 0, g, tl.fma(g, rest, momentum * factor))
        g = tl.where(nesterov != 0, tl.fma(momentum, factor, g), momentum)
    return tl.fma(g, size, p), momentum
