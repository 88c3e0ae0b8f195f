"""Convolutions whose weight and bias are gated by trainable scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backends import candidate
from ..backends.conv_geometry import Geometry, tuning_key
from ..ops.fusion import Fusion, conv_fusion, fuses_conv_of_any_shape
from .gated import SubnetLayer
from .product_layer import ProductLayer

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size = int | tuple[int, ...]
"""One number for all spatial dimensions, or one for each."""


class _SubnetConv(ProductLayer):
    """The constructor and the forward of the convolutions. The dense class handles padding modes, groups and
    dilation."""

    _conv_forward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    _reversed_padding_repeated_twice: list[int]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: PaddingMode
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        bias = ops.check_bool("bias", bias)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._init_subnet(density, rule)

    def forward(self, x: Tensor) -> Tensor:
        taken = self.taken(x)
        if taken is not None:
            return self._conv_forward(x, *taken)
        dtype = self.dtype_of_pass(x)
        bias = self.masked("bias", dtype)
        if self._fuses(x, dtype):
            return self._implicit(x.to(dtype), bias)
        return self._conv_forward(x, self.masked("weight", dtype), bias)

    def _implicit(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the convolution by :meth:`_product`. The kernel only pads with zeros and by numbers; for other
        paddings ``x`` is padded first."""
        if x.ndim < self._weight.ndim:  # x is one image without a batch
            return self._implicit(x.unsqueeze(0), bias).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode).to(x.dtype)  # autocast pads in float32
            padding = (0,) * len(self.stride)
        return self._product(x, bias, Geometry(self.stride, padding, self.dilation), self.groups)

    def fusion(self, dtype: torch.dtype, source: str) -> Fusion:
        weight = self._weight
        if weight.ndim > 4:
            return Fusion(0, "there is no fused convolution in 3-d")
        fusion = conv_fusion(weight.device, dtype, source, None, self._backend)
        if fusion.rows or candidate("masked_conv", weight.device, dtype, self._backend).name != "triton":
            return fusion
        return Fusion(0, "the implicit convolution runs only at input shapes at which it was measured to be faster")

    def _fuses(self, x: Tensor, dtype: torch.dtype) -> bool:
        weight, source = self._weight, self._mask_source()
        spatial = weight.ndim - 2
        if spatial > 2 or x.ndim not in (spatial + 1, spatial + 2) or not self._takes(x, dtype):
            return False
        if x.shape[-spatial - 1] != weight.shape[1] * self.groups or x.numel() == 0:
            return False
        if torch.compiler.is_compiling():
            return fuses_conv_of_any_shape(weight.device, dtype, source, self._backend)
        return conv_fusion(weight.device, dtype, source, self._tuning_key(x), self._backend).rows > 0

    def _tuning_key(self, x: Tensor) -> dict[str, int] | None:
        if x.ndim < self._weight.ndim or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return None
        geometry = Geometry(self.stride, self.padding, self.dilation)
        return tuning_key(x.shape, self._weight.shape, geometry, self.groups)


class FastSubnetConv1d(_SubnetConv, nn.Conv1d):
    """``nn.Conv1d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.Conv1d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`)."""

    DENSE = nn.Conv1d


class FastSubnetConv2d(_SubnetConv, nn.Conv2d):
    """``nn.Conv2d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.Conv2d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`)."""

    DENSE = nn.Conv2d


class FastSubnetConv3d(_SubnetConv, nn.Conv3d):
    """``nn.Conv3d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.Conv3d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`). It has no fused product."""

    DENSE = nn.Conv3d


LAYERS: tuple[type[SubnetLayer], ...] = (FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d)
"""The kinds of layers in this file."""
