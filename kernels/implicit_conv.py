"""Masked convolution in two dimensions, or one, as an implicit matrix product.

The mask is applied while the weight is loaded, and the patches of the input are gathered tile by tile, so that neither
is written to memory. By default convolutions write the masked weight and call cuDNN; this kernel saves that memory.
:mod:`.masked_matmul` explains the select, the order of the sums, and why the weight is operand A.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._elementwise import FP_FUSION
from ._matmul_tile import ALL_REGISTERS, MatmulConfig, dot, load_masked

# ``block_m`` counts positions (of all images) instead of rows.
CONFIGS = (  # bf16, fp16, and fp32 as tf32
    MatmulConfig(32, 64, 32, 4, 3),
    MatmulConfig(64, 64, 32, 8, 3),
    MatmulConfig(32, 128, 32, 8, 3),
    MatmulConfig(128, 64, 32, 8, 3),
)
DX_CONFIGS = CONFIGS[:3]  # the other tile needs more registers than there are
MOST_PER_CHANNEL = 2**25
"""The largest number of weights per output channel in the backward kernel, whose offsets are int32."""
MOST_STRIDE = 2**31 - 1
"""The largest stride of an image, in elements. Strides of 64 bits would take registers that some tiles lack."""
IEEE_CONFIGS = (MatmulConfig(32, 32, 32, 8, 3),)  # see masked_matmul.IEEE_CONFIGS


@triton.jit
def load_masked_elements(w_ptr, mask_ptr, s_ptr, tau, first, within, inside, RULE: tl.constexpr):
    """``m ? W : +0.0`` at the elements ``first + within`` of the flattened weight, for tiles that do not run along its
    rows. Only ``first`` is an int64, because a tile of int64 takes twice the registers."""
    w = tl.load(w_ptr + first + within, mask=inside, other=0.0)
    if mask_ptr is not None:
        bit = (first & 7).to(tl.int32) + within
        byte = tl.load(mask_ptr + (first >> 3) + (bit >> 3), mask=inside, other=0).to(tl.int32)
        return tl.where(((byte >> (bit & 7)) & 1) != 0, w, 0.0)
    else:
        key = tl.load(s_ptr + first + within, mask=inside, other=0.0).to(tl.float32)
        if RULE == "magnitude":
            key = tl.abs(key)
        return tl.where(key < tau, 0.0, w)


@triton.jit
def conv2d_kernel(
    x_ptr,  # [B, C, H, W] compute dtype
    w_ptr,  # [OC, C / groups, KH, KW] fp32, bf16 or fp16
    mask_ptr,  # [ceil(w.numel() / 8)] uint8, or None: scores and tau
    s_ptr,  # as w_ptr, or None
    tau_ptr,  # [1] dtype of the scores, or None
    bias_ptr,  # [OC] any float, or None
    y_ptr,  # [B, OC, OH, OW] any float
    positions,  # B * OH * OW
    C_PER_GROUP,
    H,
    W,
    O_PER_GROUP,
    OH,
    OW,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    groups,
    stride_mask,
    KH: tl.constexpr,
    KW: tl.constexpr,
    RULE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of a group's output channels by positions; the sum runs along a row of the flattened weight."""
    K = stride_mask * 8 if ALIGNED else C_PER_GROUP * (KH * KW)  # known to be a multiple of 8: wide loads
    tiles_m = tl.cdiv(positions, BLOCK_M)
    group = tl.program_id(1)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) // tiles_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, oh, ow = (m // (OH * OW)).to(tl.int64), m // OW % OH, m % OW
    channel = group * O_PER_GROUP + o
    tau = 0.0
    if tau_ptr is not None:
        tau = tl.load(tau_ptr).to(tl.float32)
    x_image = x_ptr + b * stride_xb + group.to(tl.int64) * C_PER_GROUP * stride_xc
    top, left = oh * step_h - pad_h, ow * step_w - pad_w
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    for first_r in range(0, K, BLOCK_R):
        r = (first_r + tl.arange(0, BLOCK_R))[:, None]
        h = top[None, :] + r // KW % KH * dilation_h
        w = left[None, :] + r % KW * dilation_w
        inside = (r < K) & (m < positions)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = (r // (KH * KW)).to(tl.int64) * stride_xc + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        x = tl.load(x_image[None, :] + at, mask=inside, other=0.0)
        weight = load_masked(
            w_ptr, mask_ptr, s_ptr, tau, channel, first_r, groups * O_PER_GROUP, K, stride_mask, RULE, ALIGNED, BLOCK_R
        )
        acc = dot(weight.to(x.dtype), x, acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=o < O_PER_GROUP, other=0.0).to(tl.float32)[:, None]
    y_at = b * stride_yb + oh.to(tl.int64) * stride_yh + ow.to(tl.int64) * stride_yw
    y = y_ptr + channel.to(tl.int64)[:, None] * stride_yc + y_at[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(o < O_PER_GROUP)[:, None] & (m < positions)[None, :])


@triton.jit
def conv2d_dx_kernel(
    dy_ptr,  # [B, OC, OH, OW] compute dtype
    w_ptr,  # [OC, C / groups, KH, KW] fp32, bf16 or fp16
    mask_ptr,  # [ceil(w.numel() / 8)] uint8, or None: scores and tau
    s_ptr,  # as w_ptr, or None
    tau_ptr,  # [1] dtype of the scores, or None
    dx_ptr,  # [B, C, H, W] any float
    positions,  # B * H * W
    C_PER_GROUP,
    H,
    W,
    O_PER_GROUP,
    OH,
    OW,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yh,
    stride_yw,
    step_h,
    step_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    RULE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of a group's input channels by positions; the sum runs over the outputs that an input takes part in."""
    tiles_m = tl.cdiv(positions, BLOCK_M)
    group = tl.program_id(1).to(tl.int64)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) // tiles_m) * BLOCK_O + tl.arange(0, BLOCK_O)
    b, h, w = (m // (H * W)).to(tl.int64), m // W % H, m % W
    tau = 0.0
    if tau_ptr is not None:
        tau = tl.load(tau_ptr).to(tl.float32)
    dy_image = dy_ptr + b * stride_yb + group * O_PER_GROUP * stride_yc
    filter_numel = C_PER_GROUP * (KH * KW)
    lane = tl.arange(0, BLOCK_R)
    within = c[:, None] * (KH * KW) + lane[None, :] * filter_numel
    acc = tl.zeros([BLOCK_O, BLOCK_M], tl.float32)
    o_steps = tl.cdiv(O_PER_GROUP, BLOCK_R)
    for step in range(KH * KW * o_steps):  # one loop: two nested ones need more registers
        tap, first_o = step // o_steps, step % o_steps * BLOCK_R
        # The output that reads this input through this tap, where there is one.
        far_h, far_w = h + pad_h - tap // KW * dilation_h, w + pad_w - tap % KW * dilation_w
        oh, ow = far_h // step_h, far_w // step_w
        exact = (far_h >= 0) & (far_w >= 0) & (oh * step_h == far_h) & (ow * step_w == far_w)
        reads = exact & (oh < OH) & (ow < OW) & (m < positions)
        dy_at = dy_image + oh.to(tl.int64) * stride_yh + ow.to(tl.int64) * stride_yw
        is_o = first_o + lane < O_PER_GROUP
        o = (first_o + lane).to(tl.int64)
        dy = tl.load(dy_at[None, :] + (o * stride_yc)[:, None], mask=is_o[:, None] & reads[None, :], other=0.0)
        first = (group * O_PER_GROUP + first_o) * filter_numel + tap
        w_inside = (c < C_PER_GROUP)[:, None] & is_o[None, :]
        weight = load_masked_elements(w_ptr, mask_ptr, s_ptr, tau, first, within, w_inside, RULE)
        acc = dot(weight.to(dy.dtype), dy, acc, PRECISION)
    dx_at = b * stride_xb + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    dx = dx_ptr + (group * C_PER_GROUP + c)[:, None] * stride_xc + dx_at[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=(c < C_PER_GROUP)[:, None] & (m < positions)[None, :])


def masked_conv(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    *,
    packed: Tensor | None = None,
    scores: Tensor | None = None,
    tau: Tensor | None = None,
    rule: str = "magnitude",
    bias: Tensor | None = None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backward: bool = False,
    config: MatmulConfig,
    precision: str = "ieee",
) -> None:
    """Write ``y = conv(x, W*m, bias)`` with zero padding, or the gradient of its input if ``backward``. The mask m is
    packed, or formed from scores.

    Args:
        x: [B, C, H, W] or [B, C, L], B >= 1, strides of at most 2^31 - 1, in the compute dtype (bf16, fp16, fp32);
            backward: the gradient [B, OC, OH, OW] or [B, OC, OL].
        w: [OC, C / groups, KH, KW] or [OC, C / groups, KL], fp32, bf16 or fp16, contiguous. Backward: at most 2^25
            elements per output channel.
        y: the result, [B, OC, OH, OW] or [B, OC, OL] (backward: the shape of the convolution's input), strides as those
            of x, any floating dtype. At most 2^31 - 1 positions in all its images.
        packed: the packed mask, [ceil(w.numel() / 8)] uint8; or else ``scores`` and ``tau``.
        scores: the shape of w, fp32, bf16 or fp16, contiguous.
        tau: one element in the scores' dtype.
        rule: ``"magnitude"`` or ``"value"``.
        bias: [OC], already masked, contiguous; forward only.
        stride: one number per spatial dimension, as are ``padding`` and ``dilation``.
        padding: zeros on each side.
        dilation: distance of the taps.
        groups: groups of channels.
        backward: whether to compute the input gradient.
        config: of ``CONFIGS`` (backward: ``DX_CONFIGS``); for fp32 with precision ``"ieee"`` of ``IEEE_CONFIGS``.
        precision: how fp32 is multiplied, ``"ieee"`` or ``"tf32"``.
    """
    assert w.is_contiguous() and (packed is None) != (scores is None) and not (backward and bias is not None)
    assert scores is None or scores.is_contiguous()
    assert not backward or w[0].numel() <= MOST_PER_CHANNEL
    assert max(*x.stride(), *y.stride()) <= MOST_STRIDE
    if x.dim() == 3:
        x, w, y = x.unsqueeze(2), w.unsqueeze(2), y.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    inner, outer = (y, x) if backward else (x, y)  # the convolution's input and output, or their gradients
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    channels = w.shape[1] if backward else w.shape[0] // groups
    grid = (triton.cdiv(positions, config.block_m) * triton.cdiv(channels, config.block_o), groups)
    shared = {
        "w_ptr": w,
        "mask_ptr": packed,
        "s_ptr": scores,
        "tau_ptr": tau,
        "positions": positions,
        "C_PER_GROUP": w.shape[1],
        "H": inner.shape[2],
        "W": inner.shape[3],
        "O_PER_GROUP": w.shape[0] // groups,
        "OH": outer.shape[2],
        "OW": outer.shape[3],
        **dict(zip(("stride_xb", "stride_xc", "stride_xh", "stride_xw"), inner.stride(), strict=True)),
        **dict(zip(("stride_yb", "stride_yc", "stride_yh", "stride_yw"), outer.stride(), strict=True)),
        "step_h": stride[0],
        "step_w": stride[1],
        "pad_h": padding[0],
        "pad_w": padding[1],
        "dilation_h": dilation[0],
        "dilation_w": dilation[1],
        "KH": w.shape[2],
        "KW": w.shape[3],
        "RULE": rule,
        "PRECISION": precision,
        "BLOCK_M": config.block_m,
        "BLOCK_O": config.block_o,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": ALL_REGISTERS,
    }
    if backward:
        conv2d_dx_kernel[grid](dy_ptr=x, dx_ptr=y, **shared, **FP_FUSION)
    else:
        k = w[0].numel()
        conv2d_kernel[grid](
            x_ptr=x,
            bias_ptr=bias,
            y_ptr=y,
            groups=groups,
            stride_mask=k // 8,
            ALIGNED=k % 8 == 0,
            **shared,
            **FP_FUSION,
        )
