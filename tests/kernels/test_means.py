"""The codes of running means in the kernels: the bits that ``wsn_fast/backends/moments.py`` specifies."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from distributions import DISTRIBUTIONS
from elementwise import assert_same_bits, planted
from torch import Tensor

from wsn_fast.backends import moments
from wsn_fast.kernels import _means
from wsn_fast.kernels.code_values import write_values

N = 1024  # four blocks


@triton.jit
def _encode_kernel(x_ptr, codes_ptr, scales_ptr, narrow_ptr, n, update, SIGNED: tl.constexpr):
    block = tl.program_id(0)
    lane = block * 256 + tl.arange(0, 256)
    inside = lane < n
    x = tl.load(x_ptr + lane, mask=inside, other=float("inf"))
    r = _means.dither(lane, update.to(tl.uint32))
    most = _means.largest(x, inside)
    if most >= _means.LARGE:
        codes, scale = _means.encode_8bit(x, most, inside, r, SIGNED, SPECIAL=True)
    else:
        codes, scale = _means.encode_8bit(x, most, inside, r, SIGNED, SPECIAL=False)
    tl.store(codes_ptr + lane, codes, mask=inside)
    tl.store(scales_ptr + block, scale)
    tl.store(narrow_ptr + lane, _means.encode_bfloat16(x, r, SIGNED), mask=inside)


@triton.jit
def _decode_kernel(codes_ptr, scales_ptr, narrow_ptr, table_ptr, x_ptr, y_ptr, SIGNED: tl.constexpr):
    block = tl.program_id(0)
    lane = block * 256 + tl.arange(0, 256)
    scale = tl.load(scales_ptr + block)
    tl.store(x_ptr + lane, _means.decode(tl.load(codes_ptr + lane), scale, table_ptr, None, 2, SIGNED))
    tl.store(y_ptr + lane, _means.decode(tl.load(narrow_ptr + lane), scale, table_ptr, None, 1, SIGNED))


def spread(n: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes of all sizes, and more than an octave above one another."""
    return torch.randn(n) * 2.0 ** torch.randint(-149, 128, (n,)).double().float()


def near_codes(n: int, dtype: torch.dtype) -> Tensor:
    """What codes stand for, and the numbers next to it, for scales of all sizes."""
    codes = torch.arange(n).to(torch.uint8)
    scales = 2.0 ** torch.randint(-80, 127, (-(-n // 256),)).float()
    each = [moments.decode(moments.Stored(codes, scales), torch.empty(n), signed) for signed in (True, False)]
    x = torch.where(torch.rand(n) < 0.5, *each)
    return (x.where(x.isfinite(), 1.0).view(torch.int32) + torch.randint(-1, 2, (n,)).int()).view(torch.float32)


VALUES = {
    **DISTRIBUTIONS,
    "planted": planted,
    "spread": spread,
    "near codes": near_codes,
    "of close sizes": lambda n, dtype: torch.randn(n) * 2.0 ** torch.randint(-40, 3, (n,)),
    "largest": lambda n, dtype: torch.rand(n).sub(0.3) * 2.0**127 * 1.9,
    "infinities alone": lambda n, dtype: torch.full((n,), torch.inf),
    "negative NaN": lambda n, dtype: torch.full((n,), -1, dtype=torch.int32).view(torch.float32),
    "zeros": lambda n, dtype: torch.zeros(n),
}


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("kind", VALUES)
def test_encoding(kind: str, signed: bool, device: torch.device) -> None:
    for n, update in ((N, 1), (N - 3, 2), (257, 12345), (5, 2**31 + 7)):
        x = VALUES[kind](n, torch.float32).float()
        x = x if signed else x.abs()
        if n == N:
            x[:256] *= 1e-30  # blocks of other sizes
        codes, narrow = (torch.full((N,), 7, dtype=dtype, device=device) for dtype in (torch.uint8, torch.bfloat16))
        scales = torch.zeros(-(-n // 256), device=device)
        _encode_kernel[(len(scales),)](x.to(device), codes, scales, narrow, n, update, signed, num_warps=1)
        count = torch.tensor(update)
        for storage, found in (("8bit", codes), ("bfloat16", narrow)):
            stored = moments.zeros(x, storage, signed)
            moments.encode(x, stored, signed, count)
            assert_same_bits(found[:n].cpu(), stored.values, f"{storage} of {n}")
            assert bool((found[n:] == 7).all())
            if stored.scales is not None:
                assert_same_bits(scales.cpu(), stored.scales, "scale")


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_decoding_of_every_code(signed: bool, device: torch.device) -> None:
    codes = torch.arange(N).to(torch.uint8)
    narrow = torch.arange(0, 65536, 64)[:N].to(torch.int32).to(torch.int16).view(torch.bfloat16)
    table = torch.empty(512, device=device)
    write_values(table)
    for exponents in ((127, 22, 37, 253), (1, 0, 254, 200)):  # the last four are none that an update writes
        scales = (torch.tensor(exponents, dtype=torch.int32) << 23).view(torch.float32)
        found = [torch.empty(N, device=device) for _ in range(2)]
        _decode_kernel[(4,)](codes.to(device), scales.to(device), narrow.to(device), table, *found, signed)
        like = torch.empty(N)
        for mine, stored in zip(found, (moments.Stored(codes, scales), moments.Stored(narrow, None)), strict=True):
            assert_same_bits(mine.cpu(), moments.decode(stored, like, signed), stored.storage)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_constants_are_those_of_the_specification(signed: bool) -> None:
    code = moments.SIGNED if signed else moments.UNSIGNED
    name = "SIGNED" if signed else "UNSIGNED"
    parts = getattr(_means, f"{name}_PARTS")
    assert [moments.Part(23 - shift, steps) for shift, steps in reversed(parts)] == [*code.parts]
    assert (getattr(_means, f"{name}_TOP").value, getattr(_means, f"{name}_LEAST").value) == (code.top, code.least)
    assert code.infinity == code.top + 1 and code.nan == code.top + 2  # what the kernels count on
    assert _means.STORAGES == moments.STORAGES and _means.BLOCK.value == moments.BLOCK
    assert (_means.ALONG.value, _means.ONWARD.value) == (moments.ALONG, moments.ONWARD)
