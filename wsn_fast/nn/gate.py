"""A gated tensor of a layer, with everything that its gate is made from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import ops


class Gated(NamedTuple):
    """A gated tensor of a layer with its scores and masks.

    ``masks`` is ``uint8`` [T, ceil(n / 8)]. ``union`` is ``uint8`` [ceil(n / 8)], or None before the first task has
    ended (T = 0).
    """

    name: str
    param: Tensor
    score: Tensor
    masks: Tensor
    union: Tensor | None


def check_gateable(name: str, param: Tensor) -> None:
    """Check that a parameter can be gated.

    Raises:
        TypeError: its dtype is not a floating dtype that scores can have.
        ValueError: it has no element.
    """
    if param.dtype not in ops.SCORE_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {param.dtype}")
    if param.numel() == 0:
        raise ValueError(f"{name} must have at least one element, got shape {tuple(param.shape)}")
