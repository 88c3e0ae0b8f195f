"""Awkward tensors, guards around results, and sentences about what differs: what :mod:`.checking` compares with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

GUARD = 64
"""How many elements lie before and behind a result."""


def _normal(n: int) -> Tensor:
    return torch.randn(n)


def _signed_zeros(n: int) -> Tensor:
    return torch.randn(n).sign() * 0.0


def _many_nan(n: int) -> Tensor:
    return torch.randn(n).masked_fill(torch.rand(n) < 0.3, torch.nan)


def _infinite(n: int) -> Tensor:
    return torch.randn(n).masked_fill(torch.rand(n) < 0.3, torch.inf)


SCORES: dict[str, Callable[[int], Tensor]] = {
    "normal": _normal,
    "all equal": lambda n: torch.full((n,), -0.5),
    "two values": lambda n: torch.where(torch.rand(n) < 0.5, 0.25, -0.5),
    "signed zeros": _signed_zeros,
    "NaN": _many_nan,
    "infinite": _infinite,
    "denormal": lambda n: torch.randn(n) * 1e-40,
    "ascending": lambda n: torch.linspace(-1, 1, n),
}
"""Scores by the name of their distribution."""


class Guarded(NamedTuple):
    """A tensor of n elements inside a larger one, whose other elements are NaN, or 0xA5 for bytes."""

    whole: Tensor
    inner: Tensor

    @classmethod
    def like(cls, tensor: Tensor) -> Guarded:
        """A copy of ``tensor``, contiguous."""
        flat = tensor.reshape(-1)
        fill = torch.nan if flat.is_floating_point() else 0xA5
        whole = torch.full((flat.numel() + 2 * GUARD,), fill, dtype=flat.dtype, device=flat.device)
        inner = whole[GUARD : GUARD + flat.numel()]
        inner.copy_(flat)
        return cls(whole, inner.view(tensor.shape))

    def is_intact(self) -> bool:
        """Whether nobody has written beside the inner tensor."""
        ends = torch.cat([self.whole[:GUARD], self.whole[-GUARD:]])
        return bool((ends.isnan() if ends.is_floating_point() else ends == 0xA5).all())


def same(found: Tensor, expected: Tensor, what: str) -> Iterator[str]:
    """A sentence about the first element that differs. Every NaN is the same; zeros differ by their sign."""
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        yield f"{what} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        return
    a, b = found.detach().cpu().reshape(-1), expected.detach().cpu().reshape(-1)
    wrong = a != b
    if a.is_floating_point():
        wrong = (wrong & ~(a.isnan() & b.isnan())) | (a.signbit() != b.signbit()) & (a == 0)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        yield f"{what}: {int(wrong.sum())} of {a.numel()} differ, [{at}] is {a[at].item()}, expected {b[at].item()}"


def close(found: Tensor, expected: Tensor, what: str, rtol: float) -> Iterator[str]:
    """A sentence about the first element that is further off than ``rtol`` allows."""
    a, b = found.detach().cpu().double().reshape(-1), expected.detach().cpu().double().reshape(-1)
    wrong = ~torch.isclose(a, b, rtol=rtol, atol=rtol * 1e-2, equal_nan=True)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        yield f"{what}: {int(wrong.sum())} of {a.numel()} are off, [{at}] is {a[at].item()}, expected {b[at].item()}"
