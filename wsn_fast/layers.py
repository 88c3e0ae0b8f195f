"""Drop-in layers whose weight and bias are gated by trainable scores: linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_1_t, _size_2_t, _size_3_t

from . import products
from .backends.shapes import Geometry, tuning_key
from .subnet import SubnetLayer

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _SubnetLinear(SubnetLayer):
    """The forward of the linear layers."""

    TRANSPOSED = False  # whether the weight is stored [in, out]

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype(x)
        if self.row_tasks is not None:
            if x.dtype is not dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"x must be {dtype}, as the weight is, got {x.dtype}")
            return self._forward_rows(x.to(dtype), self.row_tasks)
        bias = self.masked("bias", dtype)
        if self._fuses(x, dtype):
            rows = x.to(dtype).reshape(-1, self.in_features)
            return self._product(rows, bias, None, transposed=self.TRANSPOSED).view(*x.shape[:-1], self.out_features)
        weight = self.masked("weight", dtype)
        assert weight is not None
        return F.linear(x, weight.t() if self.TRANSPOSED else weight, bias)

    def _fuses(self, x: Tensor, dtype: torch.dtype) -> bool:
        n, k = self.weight.shape
        limit = products.fused_rows(
            "masked_linear", self.weight.device, dtype, self._mask_source(), n, k, self._backend
        )
        if limit == 0 or x.ndim == 0 or x.shape[-1] != self.in_features or not self._takes(x, dtype):
            return False
        return 0 < x.numel() // self.in_features <= limit

    def _forward_rows(self, x: Tensor, tasks: Tensor) -> Tensor:
        if self.TRANSPOSED or x.ndim < 2 or x.shape[0] != len(tasks) or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x must be [{len(tasks)}, ..., {self.in_features}] for {len(tasks)} rows, got {tuple(x.shape)}"
            )
        flat = x.reshape(-1, self.in_features)
        y = products.masked_linear_tasks(
            flat,
            self.weight.detach(),
            self.weight_masks,
            tasks.repeat_interleave(len(flat) // max(len(tasks), 1)),
            None if self.bias is None else self.bias.detach(),
            None if self.bias is None else self.bias_masks,
            self._backend,
        )
        return y.view(*x.shape[:-1], self.out_features)


class FastSubnetLinear(_SubnetLinear, nn.Linear):  # type: ignore[misc]  # torch says Linear.bias is never None
    """``y = x (W*m)^T + b*m_b``: ``nn.Linear`` through a winning subnetwork.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        density: the fraction of weights (and of biases) kept, in (0, 1].
        rule: "magnitude" (the paper's code) or "value" (CLArena); see :func:`wsn_fast.topc_threshold`.

    Shape:
        ``[*, in_features] -> [*, out_features]``, any number of leading dimensions, empty ones too.

    Raises:
        ValueError: ``density`` is outside (0, 1] or ``rule`` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_subnet(density, rule)


class FastSubnetTransposedLinear(_SubnetLinear):
    """``y = x (W*m) + b*m_b`` with ``W`` stored ``[in_features, out_features]``, as Hugging Face's ``Conv1D`` stores
    it.

    Made by :func:`wsn_fast.convert`; shapes and arguments otherwise as for :class:`FastSubnetLinear`.
    """

    TRANSPOSED = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        # Named as in Conv1D, whose users read it.
        self.nx, self.nf = in_features, out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._init_subnet(density, rule)

    def _fan_in(self) -> int:
        return self.in_features

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr().lstrip(', ')}"


class _SubnetConv(SubnetLayer):
    """The forward of the convolutions: padding modes, groups and dilation are the dense parent's business."""

    _conv_forward: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    _reversed_padding_repeated_twice: list[int]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: PaddingMode
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype(x)
        bias = self.masked("bias", dtype)
        if self._fuses(x, dtype):
            return self._implicit(x.to(dtype), bias)
        return self._conv_forward(x, self.masked("weight", dtype), bias)

    def _implicit(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Pad as the dense parent does where the kernel cannot, then the product."""
        if x.ndim < self.weight.ndim:  # one image without a batch
            return self._implicit(x.unsqueeze(0), bias).squeeze(0)
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode).to(x.dtype)  # autocast pads in float32
            padding = (0,) * len(self.stride)
        return self._product(x, bias, Geometry(self.stride, padding, self.dilation), self.groups)

    def _fuses(self, x: Tensor, dtype: torch.dtype) -> bool:
        weight, source = self.weight, self._mask_source()
        spatial = weight.ndim - 2
        if spatial > 2 or x.ndim not in (spatial + 1, spatial + 2) or not self._takes(x, dtype):
            return False
        if x.shape[-spatial - 1] != weight.shape[1] * self.groups or x.numel() == 0:
            return False
        if torch.compiler.is_compiling():
            return products.fuses_conv_of_any_shape(weight.device, dtype, source, self._backend)
        return products.conv_fusion(weight.device, dtype, source, self._tuning_key(x), self._backend).rows > 0

    def _tuning_key(self, x: Tensor) -> dict[str, int] | None:
        if x.ndim < self.weight.ndim or isinstance(self.padding, str) or self.padding_mode != "zeros":
            return None
        geometry = Geometry(self.stride, self.padding, self.dilation)
        return tuning_key(x.shape, self.weight.shape, geometry, self.groups)


class FastSubnetConv1d(_SubnetConv, nn.Conv1d):
    """``nn.Conv1d`` through a winning subnetwork: its arguments and shapes, and ``density`` and ``rule`` as in
    :class:`FastSubnetLinear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_1_t,
        stride: _size_1_t = 1,
        padding: str | _size_1_t = 0,
        dilation: _size_1_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        nn.Conv1d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_subnet(density, rule)


class FastSubnetConv2d(_SubnetConv, nn.Conv2d):
    """``nn.Conv2d`` through a winning subnetwork: its arguments and shapes, and ``density`` and ``rule`` as in
    :class:`FastSubnetLinear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_subnet(density, rule)


class FastSubnetConv3d(_SubnetConv, nn.Conv3d):
    """``nn.Conv3d`` through a winning subnetwork: its arguments and shapes, and ``density`` and ``rule`` as in
    :class:`FastSubnetLinear`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_3_t,
        stride: _size_3_t = 1,
        padding: str | _size_3_t = 0,
        dilation: _size_3_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.5,
        rule: str = "magnitude",
    ) -> None:
        nn.Conv3d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._init_subnet(density, rule)
