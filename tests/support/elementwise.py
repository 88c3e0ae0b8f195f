"""What the tests of elementwise kernels share: values with every special case, poisoned outputs, bitwise comparison."""

from __future__ import annotations

import torch
from torch import Tensor

_POISON = {torch.uint8: 0xFF, torch.bool: True, torch.int64: -1}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GUARD = 64


def planted(n: int, dtype: torch.dtype) -> Tensor:
    """Normal values, a third of them replaced by NaN, infinities, zeros of both signs, denormals and small integers."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, tiny, -tiny, 1.0, -2.0])
    values = torch.where(torch.rand(n) < 1 / 3, special[torch.randint(len(special), (n,))], torch.randn(n))
    return values.to(dtype)


def poisoned(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous output full of NaN (of ones, if not floating), inside a longer buffer of the same."""
    n = torch.Size([shape] if isinstance(shape, int) else shape).numel()
    return torch.full((n + _GUARD,), _POISON.get(dtype, float("nan")), dtype=dtype, device=device)[:n].view(shape)


def assert_nothing_beyond(*outputs: Tensor) -> None:
    """Nothing was written after the end of a :func:`poisoned` output."""
    for output in outputs:
        beyond = output._base[output.numel() :]
        assert len(beyond) == _GUARD
        assert bool((beyond.isnan() if beyond.is_floating_point() else beyond == _POISON[beyond.dtype]).all())


def bits(x: Tensor) -> Tensor:
    """The bits of ``x`` as integers, on the CPU."""
    return x.detach().cpu().view(_INTEGERS[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equality to the bit, any NaN for any other, with the first difference in the message."""
    assert actual.dtype is expected.dtype and actual.shape == expected.shape, f"{what}: {actual.dtype} {actual.shape}"
    actual, expected = actual.cpu(), expected.cpu()
    wrong = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        values = f"got {actual[first].item()!r}, expected {expected[first].item()!r}"
        raise AssertionError(f"{what}: {int(wrong.sum())} elements differ, the first at {first}: {values}")
