"""The shapes of convolutions: what comes out, and the name of one in the tuning tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """How a convolution slides, one number per spatial dimension each."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def result_shape(x: Sequence[int], weight: Sequence[int], geometry: Geometry) -> list[int]:
    """The shape of the convolution of an input of shape ``x`` with a weight of shape ``weight``."""
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x[2:], weight[2:], *geometry, strict=True)
    ]
    return [x[0], weight[0], *sizes]


def tuning_key(x: Sequence[int], weight: Sequence[int], geometry: Geometry, groups: int) -> dict[str, int] | None:
    """The convolution as the tuning tables name it; None for what they do not hold: other than two dimensions, kernels
    or steps that are not square, dilation."""
    stride, padding, dilation = geometry
    square = all(len({*sizes}) == 1 for sizes in (weight[2:], stride, padding))
    if len(stride) != 2 or not square or {*dilation} != {1}:
        return None
    names = ("batch", "channels", "height", "width", "out_channels", "kernel", "stride", "padding", "groups")
    return dict(zip(names, (*x, weight[0], weight[2], stride[0], padding[0], groups), strict=True))
