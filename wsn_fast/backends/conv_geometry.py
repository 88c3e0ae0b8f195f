"""The shapes of convolutions: the shape of the result, and the key of a convolution in the tuning tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution: each has one number for each spatial dimension."""

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
    """The key of the convolution in the tuning tables. It is None for convolutions that the tables do not cover: those
    in 1-d or 3-d, those that are not square, and those with dilation."""
    stride, padding, dilation = geometry
    square = all(len({*sizes}) == 1 for sizes in (weight[2:], stride, padding))
    if len(stride) != 2 or not square or {*dilation} != {1}:
        return None
    names = ("batch", "channels", "height", "width", "out_channels", "kernel", "stride", "padding", "groups")
    return dict(zip(names, (*x, weight[0], weight[2], stride[0], padding[0], groups), strict=True))
