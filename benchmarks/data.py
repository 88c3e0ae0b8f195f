"""Scores of many distributions: random, never zeros, made on the device and alike for every contender."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _nan(n: int, device: torch.device) -> Tensor:
    return torch.randn(n, device=device).masked_fill(torch.rand(n, device=device) < 0.3, torch.nan)


DISTRIBUTIONS: dict[str, Callable[[int, torch.device], Tensor]] = {
    "normal": lambda n, device: torch.randn(n, device=device),
    "all equal": lambda n, device: torch.full((n,), -0.37, device=device),
    "two values": lambda n, device: torch.rand(n, device=device).lt(0.5).float() * 0.75 - 0.5,
    "30 % NaN": _nan,
    "denormal": lambda n, device: torch.randint(-9, 10, (n,), device=device).float() * 2.0**-149,
}


def scores(n: int, device: torch.device, kind: str = "normal") -> Tensor:
    """[n] float32 scores."""
    return DISTRIBUTIONS[kind](n, device)
