"""The device functions on bits, each in the smallest kernel that can call it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.kernels._bits import from_order_key, order_key, pack_bits, unpack_bits
from wsn_fast.kernels._elementwise import FP_FUSION

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULES = ("magnitude", "value")


@triton.jit
def key_kernel(
    x_ptr,  # [BLOCK] any float
    key_ptr,  # [BLOCK] int64
    back_ptr,  # [BLOCK], dtype of x
    BLOCK: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    key = order_key(tl.load(x_ptr + i), MAGNITUDE)
    tl.store(key_ptr + i, key.to(tl.int64))
    tl.store(back_ptr + i, from_order_key(key, x_ptr.dtype.element_ty, MAGNITUDE))


@triton.jit
def pack_kernel(
    keep_ptr,  # [ROWS, COLUMNS] uint8
    packed_ptr,  # [ROWS, COLUMNS // 8] uint8
    back_ptr,  # [ROWS, COLUMNS] uint8
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    at = row * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    packed = pack_bits(tl.load(keep_ptr + at) != 0)
    tl.store(packed_ptr + row * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)[None, :], packed)
    tl.store(back_ptr + at, unpack_bits(packed).to(tl.uint8))


@triton.jit
def pack_flat_kernel(
    keep_ptr,  # [BLOCK] uint8
    packed_ptr,  # [BLOCK // 8] uint8
    back_ptr,  # [BLOCK] uint8
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    packed = pack_bits(tl.load(keep_ptr + i) != 0)
    tl.store(packed_ptr + tl.arange(0, BLOCK // 8), packed)
    tl.store(back_ptr + i, unpack_bits(packed).to(tl.uint8))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


def patterns(dtype: torch.dtype) -> Tensor:
    """2**16 values: all there are of 16 bits; of 32 bits the corners and a random choice, NaNs of both signs
    among them."""
    if dtype is not torch.float32:
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    corners = torch.tensor(
        [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFE, 0x7FFFFFFF]
    )
    chosen = torch.randint(-(2**31), 2**31, (2**16 - 20,))
    return torch.cat([corners, corners - 2**31, chosen]).to(torch.int32).view(dtype)


def keys_of(x: Tensor, rule: str, device: torch.device) -> tuple[Tensor, Tensor]:
    key = torch.full(x.shape, -1, dtype=torch.int64, device=device)
    back = torch.full_like(x, float("nan"), device=device)
    constants = {"BLOCK": len(x), "MAGNITUDE": rule == "magnitude"}
    key_kernel[(1,)](x_ptr=x.to(device), key_ptr=key, back_ptr=back, **constants, num_warps=8, **FP_FUSION)
    return key.cpu(), back.cpu()


def dense_rank(x: np.ndarray) -> np.ndarray:
    """The rank of every value among the different ones: NaN last and one value, zeros one value."""
    return np.unique(x, return_inverse=True)[1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_order_as_scores_do(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    x = patterns(dtype)
    key, _ = keys_of(x, rule, device)
    value = x.double().abs() if rule == "magnitude" else x.double()
    np.testing.assert_array_equal(dense_rank(key.numpy()), dense_rank(value.numpy()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_have_the_promised_width(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    key, _ = keys_of(patterns(dtype), rule, device)
    assert key.min() >= 0 and key.max() < 2 ** (8 * dtype.itemsize - (rule == "magnitude"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_score_of_a_key(dtype: torch.dtype, rule: str, device: torch.device) -> None:
    x = patterns(dtype)
    _, back = keys_of(x, rule, device)
    expected = x.abs() if rule == "magnitude" else x
    expected = torch.where(expected == 0, torch.zeros_like(expected), expected)
    expected = torch.where(expected.isnan(), torch.full_like(expected, float("nan")), expected)
    assert torch.equal(bits(back), bits(expected))


@pytest.mark.parametrize("shape", [(1, 8), (4, 32), (16, 8), (1, 1024)], ids=str)
def test_pack_and_unpack(shape: tuple[int, int], device: torch.device) -> None:
    keep = torch.rand(shape, device=device) < 0.5
    packed = torch.full((keep.numel() // 8,), 0xFF, dtype=torch.uint8, device=device)
    back = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    tensors = {"keep_ptr": keep.to(torch.uint8), "packed_ptr": packed, "back_ptr": back}
    pack_kernel[(1,)](**tensors, ROWS=shape[0], COLUMNS=shape[1], **FP_FUSION)
    assert torch.equal(packed, portable.pack(keep))
    assert torch.equal(back, keep.to(torch.uint8))


def test_pack_and_unpack_flat(device: torch.device) -> None:
    keep = torch.rand(256, device=device) < 0.5
    packed = torch.full((32,), 0xFF, dtype=torch.uint8, device=device)
    back = torch.full((256,), 0xFF, dtype=torch.uint8, device=device)
    pack_flat_kernel[(1,)](keep_ptr=keep.to(torch.uint8), packed_ptr=packed, back_ptr=back, BLOCK=256, **FP_FUSION)
    assert torch.equal(packed, portable.pack(keep))
    assert torch.equal(back, keep.to(torch.uint8))
