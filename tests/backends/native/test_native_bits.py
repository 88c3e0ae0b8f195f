"""Packed masks in the native library, bitwise against the portable backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000, 2**20 + 5]  # the last one is large enough for threads


def random_mask(n: int) -> torch.Tensor:
    return torch.rand(n) < 0.3


@pytest.mark.usefixtures("library", "threads")
class TestAgainstTorch:
    @pytest.mark.parametrize("n", SIZES)
    def test_pack(self, n: int) -> None:
        mask = random_mask(n)
        assert torch.equal(native.pack(mask), portable.pack(mask))

    @pytest.mark.parametrize("n", SIZES)
    def test_unpack(self, n: int) -> None:
        mask = random_mask(n)
        assert torch.equal(native.unpack(portable.pack(mask), n), mask)

    @pytest.mark.parametrize("n", SIZES)
    def test_popcount(self, n: int) -> None:
        mask = random_mask(n)
        count = native.popcount(portable.pack(mask))
        assert (count.dtype, count.shape, count.item()) == (torch.int64, (), mask.sum().item())

    @pytest.mark.parametrize("rows", [1, 2, 7])
    @pytest.mark.parametrize("n", SIZES)
    def test_union(self, n: int, rows: int) -> None:
        packed = torch.stack([portable.pack(random_mask(n)) for _ in range(rows)])
        assert torch.equal(native.union(packed), portable.union(packed))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.complex64])
    @pytest.mark.parametrize("n", SIZES)
    def test_restore_frozen(self, n: int, dtype: torch.dtype) -> None:
        param, saved = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
        union, expected = portable.pack(random_mask(n)), param.clone()
        portable.restore_frozen(expected, saved, union)
        native.restore_frozen(param, saved, union)
        assert torch.equal(param, expected)

    def test_every_byte(self) -> None:
        every = torch.arange(256, dtype=torch.uint8)
        mask = native.unpack(every, 2048)
        assert torch.equal(mask, portable.unpack(every, 2048))
        assert torch.equal(native.pack(mask), every)


@pytest.mark.usefixtures("library")
def test_strided_mask_is_read_in_row_major_order() -> None:
    mask = random_mask(35).view(5, 7)
    assert torch.equal(native.pack(mask.t()), portable.pack(mask.t().contiguous()))


@pytest.mark.usefixtures("library")
def test_strided_parameter_is_restored_in_row_major_order() -> None:
    param, saved, union = torch.randn(7, 5).t(), torch.randn(5, 7), portable.pack(random_mask(35))
    expected = param.clone()
    portable.restore_frozen(expected, saved, union)
    native.restore_frozen(param, saved, union)
    assert torch.equal(param, expected)


BYTES = torch.zeros(4, dtype=torch.uint8)
BITS = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: native.pack(BYTES), TypeError, "mask must be a torch.bool tensor, got torch.uint8"),
        (lambda: native.pack([True]), TypeError, "mask must be a tensor, got list"),
        (lambda: native.pack(BITS.to("meta")), ValueError, "mask must be on the CPU, got meta"),
        (lambda: native.unpack(BYTES.int(), 32), TypeError, "packed must be a torch.uint8 tensor"),
        (lambda: native.unpack(BYTES, 33), ValueError, "packed must have 5 bytes for 33 elements, got 4"),
        (lambda: native.unpack(BYTES, -1), ValueError, "n must not be negative, got -1"),
        (lambda: native.popcount(BYTES.bool()), TypeError, "packed must be a torch.uint8 tensor"),
        (lambda: native.union(BYTES), ValueError, r"packed must have shape \[T, bytes\]"),
        (lambda: native.restore_frozen(BYTES, BYTES[:2], BYTES[:1]), ValueError, r"saved must have shape \(4,\)"),
        (lambda: native.restore_frozen(BYTES, BYTES.int(), BYTES[:1]), TypeError, "saved must have the dtype"),
        (lambda: native.restore_frozen(BYTES, BYTES, BYTES), ValueError, "union must have 1 bytes for 4 elements"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
