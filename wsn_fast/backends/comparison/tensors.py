"""Awkward tensors, guards around memory, and sentences about what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = 64
"""How many elements lie before and behind a guarded tensor. It stays aligned to 16 bytes, whatever the dtype."""
_BYTE = 0x25


class Source:
    """Reproducible numbers. NumPy draws them, so that no generator of torch's moves, and no transform such as ``vmap``
    that happens to be active has a say."""

    def __init__(self) -> None:
        self._numbers = np.random.default_rng(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 on the CPU."""
        return torch.from_numpy(self._numbers.standard_normal(shape, dtype=np.float32))

    def chance(self, n: int, share: float) -> Tensor:
        """A boolean [n] on the CPU, of which about ``share`` is true."""
        return torch.from_numpy(self._numbers.random(n) < share)

    def below(self, n: int, limit: int) -> Tensor:
        """Numbers from 0 to ``limit`` - 1, int64 [n] on the CPU."""
        return torch.from_numpy(self._numbers.integers(0, limit, n))


def _awkward(source: Source, n: int) -> Tensor:
    """All that is rare, at once."""
    values = source.normal(n)
    for special in (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, 0.5, -0.5):
        values.masked_fill_(source.chance(n, 0.08), special)
    return values


SCORES: Mapping[str, Callable[[Source, int], Tensor]] = MappingProxyType(
    {
        "normal": lambda source, n: source.normal(n),
        "all equal": lambda source, n: torch.full((n,), -0.5, dtype=torch.float32, device="cpu"),
        "two values": lambda source, n: source.chance(n, 0.5).float() * 0.75 - 0.5,
        "signed zeros": lambda source, n: source.normal(n).sign() * 0.0,
        "NaN": lambda source, n: source.normal(n).masked_fill(source.chance(n, 0.3), torch.nan),
        "infinite": lambda source, n: source.normal(n).masked_fill(source.chance(n, 0.3), torch.inf),
        "denormal": lambda source, n: source.normal(n) * 1e-40,
        "ascending": lambda source, n: torch.linspace(-1, 1, n, dtype=torch.float32, device="cpu"),
        "awkward": _awkward,
    }
)
"""Scores by the name of their distribution: float32 [n] on the CPU."""


class Guarded(NamedTuple):
    """A tensor inside a larger one, whose other elements are NaN, or 37 for integers, or True."""

    whole: Tensor
    inner: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Guarded:
        """Room of the shape, strides, dtype and device of ``like``, which has no gaps in memory. It is filled as its
        guards are."""
        fill = torch.nan if like.is_floating_point() else _fill(like)
        size = like.numel() + 2 * GUARD
        whole = torch.full((size,), fill, dtype=like.dtype, device=like.device)
        return cls(whole, whole.as_strided(like.shape, like.stride(), GUARD))

    @classmethod
    def like(cls, tensor: Tensor) -> Guarded:
        """A contiguous copy of ``tensor``."""
        made = cls.empty(tensor.contiguous())
        made.inner.copy_(tensor)
        return made

    def is_intact(self) -> bool:
        """Whether nobody has written beside the inner tensor."""
        ends = torch.cat([self.whole[:GUARD], self.whole[-GUARD:]])
        return bool((ends.isnan() if ends.is_floating_point() else ends == _fill(ends)).all())


def _fill(like: Tensor) -> int:
    return True if like.dtype is torch.bool else _BYTE


def inside(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` between guards, which shows in the result when somebody reads beyond its ends."""
    return Guarded.like(tensor).inner


class Allocations(TorchDispatchMode):
    """Puts every tensor that is allocated in its block between guards: results and workspaces of a backend alike.

    What ``torch.empty`` allocates is filled with NaN, so that an element that nobody writes is seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Guarded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not name.startswith(("empty", "new_empty", "zeros", "new_zeros")) or not isinstance(out, Tensor):
            return out
        if not out.numel() or _span(out) != out.numel():
            return out
        made = Guarded.empty(out)
        if "zeros" in name:
            made.inner.zero_()
        self.made.append(made)
        return made.inner


class Watched:
    """A backend that allocates between guards, which are looked at when it is left as a context.

    Args:
        module: the backend.
    """

    def __init__(self, module: Any) -> None:
        self._module, self._allocations = module, Allocations()

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = getattr(self._module, operation)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self._allocations:
                return function(*args, **kwargs)

        return call

    def problems(self) -> Iterator[str]:
        """A sentence if an operation has written beside a tensor that it allocated."""
        for made in self._allocations.made:
            if not made.is_intact():
                yield f"written beyond the ends of a tensor of shape {tuple(made.inner.shape)}"


def _span(tensor: Tensor) -> int:
    """How many elements lie between the first and the last one of a tensor, both included."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def unsigned_zero(tau: Tensor) -> Tensor:
    """A threshold with +0.0 for -0.0: the sign of a zero among thresholds is not defined."""
    return torch.where(tau == 0, torch.zeros_like(tau), tau)


def same(found: Tensor, expected: Tensor, what: str) -> Iterator[str]:
    """A sentence about the first element that differs. Every NaN is the same; zeros differ by their sign."""
    if found.dtype is not expected.dtype or found.shape != expected.shape:
        yield f"{what} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        return
    a, b = found.detach().cpu().reshape(-1), expected.detach().cpu().reshape(-1)
    wrong = a != b
    if a.is_floating_point():
        wrong = (wrong & ~(a.isnan() & b.isnan())) | (a.signbit() != b.signbit()) & (a == 0)
    yield from _first(wrong, a, b, what, "differ")


def close(found: Tensor, expected: Tensor, what: str, rtol: float) -> Iterator[str]:
    """A sentence about the first element that is further off than ``rtol`` allows."""
    a, b = found.detach().cpu().double().reshape(-1), expected.detach().cpu().double().reshape(-1)
    yield from _first(~torch.isclose(a, b, rtol=rtol, atol=rtol * 1e-2, equal_nan=True), a, b, what, "are off")


def within(found: Tensor, exact: Tensor, bound: Tensor, what: str) -> Iterator[str]:
    """A sentence about the first element that is further from ``exact`` than ``bound``, both float64."""
    if found.shape != exact.shape:
        yield f"{what} has the shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
        return
    a, b, most = (t.detach().cpu().double().reshape(-1) for t in (found, exact, bound))
    yield from _first(~((a - b).abs() <= most), a, b, what, "are off")


def _first(wrong: Tensor, found: Tensor, expected: Tensor, what: str, are: str) -> Iterator[str]:
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        count = f"{int(wrong.sum())} of {found.numel()} {are}"
        yield f"{what}: {count}, [{at}] is {found[at].item()}, expected {expected[at].item()}"
