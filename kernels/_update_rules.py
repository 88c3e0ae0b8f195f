"""What the optimizer kernels compute for one tile: the gradients, and the updates of AdamW and SGD. These functions
store nothing.

The order of operations and of roundings is that of PyTorch's fused optimizers. Everything is computed in float32, and
rounded where PyTorch stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _layout as layout
from ._elementwise import below, convert, table_pointer, widen

SCALES = {None: None, torch.float32: tl.float32, torch.float64: tl.float64}
"""The dtypes that a scale and a step count may have."""


@triton.jit
def load_threshold(gradients_ptr, tensor, tensors, DTYPE: tl.constexpr, GIVEN: tl.constexpr):
    """The threshold of the last forward pass. Gradients that are GIVEN do not need it."""
    if GIVEN:
        return 0.0
    else:
        return tl.load(table_pointer(gradients_ptr, layout.GRADIENT_TAU, tensor, tensors, DTYPE, ALIGNED=False))


@triton.jit
def load_scale(gradients_ptr, tensor, tensors, SCALE: tl.constexpr):
    """The factor for dW and dS."""
    if SCALE is None:
        return 1.0
    else:
        scale_ptr = table_pointer(gradients_ptr, layout.GRADIENT_SCALE, tensor, tensors, SCALE, ALIGNED=False)
        return tl.load(scale_ptr).to(tl.float32)


@triton.jit
def load_frozen(union_ptr, at, left, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Which of the BLOCK elements from ``at`` on are frozen; ``left`` elements remain in the tensor."""
    four = tl.arange(0, BLOCK // 4)  # a thread has four elements, and loads the byte that has their bits
    byte = tl.load(union_ptr + at // 8 + four // 2, mask=four * 4 < left if TAIL else None)
    bits = (byte.to(tl.int32) >> (four % 2 * 4))[:, None] >> tl.arange(0, 4)[None, :]
    return ((bits & 1) != 0).reshape(BLOCK)


@triton.jit
def gradients(
    g, ds, w, s, tau, frozen, scale,
    MAGNITUDE: tl.constexpr, HAS_UNION: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """``dW`` and ``dS`` times ``scale``, in float32 and rounded to the dtype of ``w``.

    They are formed from G as in :mod:`.gate_gradients`. Where they are GIVEN, ``g`` and ``ds`` are dW and dS already.
    """
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
def load_settings(settings_ptr, ADAM: tl.constexpr):
    """The coefficients of one parameter's update, in the order in which :func:`adamw` or :func:`sgd` takes them."""
    if ADAM:
        return (
            tl.load(settings_ptr + layout.ADAMW_LERP),
            tl.load(settings_ptr + layout.ADAMW_BETA2),
            tl.load(settings_ptr + layout.ADAMW_REST2),
            tl.load(settings_ptr + layout.ADAMW_EPS),
            tl.load(settings_ptr + layout.ADAMW_CORRECTION),
            tl.load(settings_ptr + layout.ADAMW_SIZE),
            tl.load(settings_ptr + layout.ADAMW_SHRINK),
            tl.load(settings_ptr + layout.ADAMW_DECAY),
        )
    else:
        return (
            tl.load(settings_ptr + layout.SGD_SIZE),
            tl.load(settings_ptr + layout.SGD_MOMENTUM),
            tl.load(settings_ptr + layout.SGD_REST),
            tl.load(settings_ptr + layout.SGD_DECAY),
            tl.load(settings_ptr + layout.SGD_NESTEROV),
            tl.load(settings_ptr + layout.SGD_FIRST),
        )


@triton.jit
def running_means(p, g, mean, square, settings):
    """The running means of AdamW after an update."""
    lerp, beta2, rest2, _, _, _, _, decay = settings
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    # With t = 1 - beta1, torch.lerp computes mean + t * (g - mean) if t < 0.5, and g - (1 - t) * (g - mean) otherwise.
    # A positive ``lerp`` is t, for the first form. A negative one is t - 1, for the second form.
    mean = tl.fma(lerp, g - mean, tl.where(lerp > 0, mean, g))
    return mean, tl.fma(square, beta2, rest2 * g * g)


@triton.jit
def adamw(p, mean, square, settings, unread):
    """The parameter after an update that left these running means. Nobody reads the parameters that are ``unread``.

    The instructions behind ``sqrt_rn`` and ``div_rn`` leave their fast path for an operand of 0, and the whole warp
    with them. Most second moments of weights outside the mask are exactly 0. Therefore such elements get other operands
    here, and then the result that 0 would give, to the bit.
    """
    _, _, _, eps, correction, size, shrink, _ = settings
    zero = tl.where(unread | (square == 0), 1.0, 0.0)
    root = tl.fma(tl.div_rn(tl.sqrt_rn(square + zero), correction), 1.0 - zero, eps)
    step = size * mean
    zero = unread | ((step == 0) & (root > 0))
    step = tl.where(zero, step, tl.div_rn(tl.where(zero, root, step), root))
    return tl.fma(p, shrink, step)


@triton.jit
def rough_adamw(p, mean, square, settings, inverse):
    """:func:`adamw` with a root and a quotient that are wrong by some units in the last place, for means whose own
    codes have few bits; ``inverse`` is one over the bias correction of the root. No operand is slow. It ends with the
    bits of ``-lr * m / (sqrt(v) / c + eps)`` for zeros, infinities and NaN."""
    _, _, _, eps, _, size, shrink, _ = settings
    root = tl.rsqrt(tl.fma(tl.sqrt(square), inverse, eps))
    return tl.fma(p, shrink, size * mean * root * root)


@triton.jit
def inverse_correction(settings_ptr, ADAM: tl.constexpr):
    """One over the bias correction of AdamW's root; 1 for SGD."""
    return 1.0 / tl.load(settings_ptr + layout.ADAMW_CORRECTION) if ADAM else 1.0


@triton.jit
def sgd(p, g, momentum, settings, HAS_MOMENTUM: tl.constexpr):
    """The parameter and its momentum after an update."""
    size, factor, rest, decay, nesterov, first = settings
    g = tl.where(decay != 0, tl.fma(p, decay, g), g)
    if HAS_MOMENTUM:
        momentum = tl.where(first != 0, g, tl.fma(g, rest, momentum * factor))
        g = tl.where(nesterov != 0, tl.fma(momentum, factor, g), momentum)
    return tl.fma(g, size, p), momentum
