"""Transposed convolutions whose weight and bias are gated by trainable scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .conv import Size
from .gated import SubnetLayer
from .product_layer import ProductLayer


class _SubnetConvTranspose(ProductLayer):
    """The constructor and the forward of the transposed convolutions."""

    CONVOLVE: ClassVar[Callable[..., Tensor]]
    """The function of torch that computes the dense layer."""

    _output_padding: Any
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        bias = ops.check_bool("bias", bias)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_subnet(density, rule)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        dtype = self.dtype_of_pass(x)
        # The dense class computes this from output_size, and reports a size that it cannot reach.
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation
        )
        weight, bias = self.masked("weight", dtype), self.masked("bias", dtype)
        return self.CONVOLVE(x, weight, bias, self.stride, self.padding, output_padding, self.groups, self.dilation)


class FastSubnetConvTranspose1d(_SubnetConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.ConvTranspose1d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`). It has no fused product."""

    DENSE = nn.ConvTranspose1d
    CONVOLVE = staticmethod(F.conv_transpose1d)


class FastSubnetConvTranspose2d(_SubnetConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.ConvTranspose2d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`). It has no fused product."""

    DENSE = nn.ConvTranspose2d
    CONVOLVE = staticmethod(F.conv_transpose2d)


class FastSubnetConvTranspose3d(_SubnetConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose weight and bias are masked by trainable scores. It takes the arguments and shapes of
    ``nn.ConvTranspose3d``, and ``density`` and ``rule`` (see :class:`FastSubnetLinear`). It has no fused product."""

    DENSE = nn.ConvTranspose3d
    CONVOLVE = staticmethod(F.conv_transpose3d)


LAYERS: tuple[type[SubnetLayer], ...] = (
    FastSubnetConvTranspose1d,
    FastSubnetConvTranspose2d,
    FastSubnetConvTranspose3d,
)
"""The kinds of layers in this file."""
