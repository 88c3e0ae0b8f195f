"""A Triton kernel that is wrong is found before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from wsn_fast.backends import cache_folder, choose, forget, trust
from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton as backend


@triton.jit
def copy_bits_kernel(bits_ptr, mask_ptr, n, WRONG: tl.constexpr, BEYOND: tl.constexpr):
    """Unpacks a mask; ``WRONG`` flips it, ``BEYOND`` writes so many elements too far."""
    i = tl.arange(0, 8192)
    byte = tl.load(bits_ptr + i // 8, mask=i < n, other=0).to(tl.int32)
    tl.store(mask_ptr + i, ((byte >> (i % 8)) & 1) ^ WRONG, mask=i < n + BEYOND)


def unpack(wrong: int = 0, beyond: int = 0, launched: bool = True) -> Callable[[Tensor, int], Tensor]:
    def of(packed: Tensor, n: int) -> Tensor:
        mask = torch.empty(n, dtype=torch.bool, device=packed.device)
        if launched:
            copy_bits_kernel[(1,)](packed, mask.view(torch.uint8), n, wrong, beyond)
        return mask

    return of


def raises(packed: Tensor, n: int) -> Tensor:
    raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")


@pytest.fixture(autouse=True)
def _checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(trust.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setenv(cache_folder.ENVIRONMENT_VARIABLE, str(tmp_path))
    forget()
    trust._memory.cache_clear()
    yield
    forget()
    trust._memory.cache_clear()


def test_a_right_kernel_is_used(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "unpack", unpack())
    assert choose("unpack", device, None, "triton").name == "triton"


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (unpack(wrong=1), "differ"),
        (unpack(beyond=1), "beyond the ends"),
        (unpack(launched=False), "differ"),
        (raises, "out of resource: shared memory"),
    ],
    ids=["wrong", "too far", "not launched", "raises"],
)
def test_a_wrong_kernel_is_not_used(
    kernel: Callable[[Tensor, int], Tensor], says: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "unpack", kernel)
    with pytest.warns(RuntimeWarning, match="triton failed the check of unpack"):
        choice = choose("unpack", device, None, "triton")
    assert choice.backend is portable and says in choice.reason
    assert choose("popcount", device, None, "triton").name == "triton"
