"""The score distributions that every selection is tested on, and a comparison that says where two masks part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DENSITIES = (1e-6, 0.03, 0.1, 0.3, 0.5, 0.7, 0.999, 1.0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RULES = ("magnitude", "value")
SMALL_SIZES = (1, 2, 3, 31, 32, 33, 1000)
LARGE_SIZES = (2**20 + 1, 2**24 + 1)


def _choice(n: int, values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (n,))].to(dtype)


def _sprinkled(n: int, values: list[float], dtype: torch.dtype) -> Tensor:
    """Normal scores, a tenth of them replaced by ``values``."""
    return torch.where(torch.rand(n) < 0.1, _choice(n, values, dtype), torch.randn(n).to(dtype))


def _denormal(n: int, dtype: torch.dtype) -> Tensor:
    # The smallest denormals, so that a flush to zero anywhere would merge them.
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (torch.randint(-9, 10, (n,), dtype=torch.float64) * step).to(dtype)


DISTRIBUTIONS: dict[str, Callable[[int, torch.dtype], Tensor]] = {
    "normal": lambda n, dtype: torch.randn(n).to(dtype),
    "uniform": lambda n, dtype: torch.rand(n).to(dtype),
    "all_equal": lambda n, dtype: torch.full((n,), -0.37).to(dtype),
    "two_values": lambda n, dtype: _choice(n, [0.25, -0.5], dtype),
    "denormal": _denormal,
    "zeros_of_both_signs": lambda n, dtype: _sprinkled(n, [0.0, -0.0], dtype),
    "infinities": lambda n, dtype: _sprinkled(n, [float("inf"), float("-inf")], dtype),
    "nan": lambda n, dtype: _sprinkled(n, [float("nan")], dtype),
    "mostly_nan": lambda n, dtype: _choice(n, [float("nan"), float("nan"), 1.0, -2.0], dtype),
    "sorted": lambda n, dtype: torch.linspace(-1, 1, n, dtype=torch.float64).to(dtype),
    "reversed": lambda n, dtype: torch.linspace(1, -1, n, dtype=torch.float64).to(dtype),
}


def assert_same_mask(actual: Tensor, expected: Tensor, what: str) -> None:
    """Bitwise equality of two boolean masks, with the first differing coordinate in the message."""
    assert actual.dtype is torch.bool and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)}"
    )
    if not torch.equal(actual, expected):
        wrong = (actual != expected).nonzero()
        first = tuple(wrong[0].tolist())
        raise AssertionError(f"{what}: {len(wrong)} bits differ, the first at {first}: got {actual[first].item()}")
