"""One layer or more of every kind, with its dense class and the shape of an input."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from wsn_fast import (
    FastSubnetConv1d,
    FastSubnetConv2d,
    FastSubnetConv3d,
    FastSubnetConvTranspose1d,
    FastSubnetConvTranspose2d,
    FastSubnetConvTranspose3d,
    FastSubnetLinear,
)
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.linear import FastSubnetTransposedLinear

CASES: dict[str, tuple[Callable[..., SubnetLayer], type[nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (5, 6)),
    "linear_3d": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (5, 3, 6)),
    "linear_1d": (lambda **k: FastSubnetLinear(6, 8, **k), nn.Linear, (6,)),
    "transposed": (lambda **k: FastSubnetTransposedLinear(6, 8, **k), nn.Linear, (5, 6)),
    "conv1d": (lambda **k: FastSubnetConv1d(4, 8, 3, groups=2, dilation=2, **k), nn.Conv1d, (5, 4, 9)),
    "conv2d": (lambda **k: FastSubnetConv2d(4, 8, (3, 2), 2, "valid", groups=4, **k), nn.Conv2d, (5, 4, 9, 8)),
    "reflect": (lambda **k: FastSubnetConv2d(4, 8, 3, 1, 1, padding_mode="reflect", **k), nn.Conv2d, (2, 4, 6, 6)),
    "conv3d": (lambda **k: FastSubnetConv3d(2, 4, 3, padding="same", **k), nn.Conv3d, (2, 2, 5, 4, 6)),
    "up1d": (lambda **k: FastSubnetConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2, **k), nn.ConvTranspose1d, (5, 4, 7)),
    "up2d": (lambda **k: FastSubnetConvTranspose2d(4, 6, (3, 2), (2, 1), dilation=2, **k), nn.ConvTranspose2d,
             (5, 4, 6, 5)),
    "up3d": (lambda **k: FastSubnetConvTranspose3d(2, 4, 2, 2, groups=2, **k), nn.ConvTranspose3d, (2, 2, 3, 4, 2)),
}  # fmt: skip
