"""The kernels of packed masks against the torch backend, to the bit."""

from __future__ import annotations

import os

import pytest
import torch
from distributions import assert_same_mask
from elementwise import assert_nothing_beyond, assert_same_bits, poisoned

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import gate
from wsn_fast.kernels import packed_masks as kernels
from wsn_fast.kernels._elementwise import Config

SMALL = Config(32, 1)
"""So that sizes up to 70 have full blocks and a tail."""
SIZES = range(1, 71)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("config", [SMALL, *kernels.CONFIGS], ids=str)
def test_pack_and_unpack(config: Config, device: torch.device) -> None:
    for n in (*(SIZES if config is SMALL else ()), config.block, 2 * config.block + 9):
        mask = torch.rand(n) < 0.5
        packed, again = poisoned((n + 7) // 8, torch.uint8, device), poisoned(n, torch.bool, device)
        kernels.pack(mask.to(device), packed, config=config)
        assert_same_bits(packed, portable.pack(mask), f"pack n={n}")
        kernels.unpack(packed, again, config=config)
        assert_same_mask(again.cpu(), mask, f"unpack n={n}")
        assert_nothing_beyond(packed, again)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_union(rows: int, device: torch.device) -> None:
    for size, beside in ((1, 3), (9, 3), (31, 3), (32, 3), (33, 3), (100, 3), (64, 0), (64, 16), (80, 32), (90, 6)):
        # Rows of a wider matrix: their stride is not their length. Rows that begin at multiples of 16 are read faster.
        packed = torch.randint(256, (rows, size + beside), dtype=torch.uint8)[:, :size]
        out = poisoned(size, torch.uint8, device)
        kernels.union(packed.to(device), out, config=SMALL)
        assert_same_bits(out, portable.union(packed), f"{rows} rows of {size}")
        assert_nothing_beyond(out)


@pytest.mark.parametrize("config", [SMALL, *kernels.CONFIGS], ids=str)
def test_popcount(config: Config, device: torch.device) -> None:
    for size in (1, 31, 100, 5001):
        packed = torch.randint(256, (size,), dtype=torch.uint8)
        count = torch.full((), -1, dtype=torch.int64, device=device)
        kernels.popcount(packed.to(device), count, config=config)
        assert int(count) == int(portable.unpack(packed, 8 * size).sum())


def test_popcount_of_every_byte(device: torch.device) -> None:
    count = torch.empty((), dtype=torch.int64, device=device)
    for byte in range(256):
        kernels.popcount(torch.tensor([byte], dtype=torch.uint8, device=device), count, config=SMALL)
        assert int(count) == byte.bit_count()


def test_packed_kernels_of_nothing(device: torch.device) -> None:
    count = torch.full((), -1, dtype=torch.int64, device=device)
    kernels.popcount(torch.empty(0, dtype=torch.uint8, device=device), count)
    assert int(count) == 0


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter would take days")
def test_more_than_two_to_the_31_elements(device: torch.device) -> None:
    n = 2**31 + 2**12 + 5
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    places = torch.tensor([0, 9, 2**31 - 1, 2**31, 2**31 + 77, n - 1], device=device)
    mask[places] = True
    packed = torch.full(((n + 7) // 8,), 0xFF, dtype=torch.uint8, device=device)
    kernels.pack(mask, packed)
    count = torch.empty((), dtype=torch.int64, device=device)
    kernels.popcount(packed, count)
    assert int(count) == len(places)
    weight, out = torch.ones(n, dtype=torch.bfloat16, device=device), mask.new_empty(n, dtype=torch.bfloat16)
    gate.gate_packed(weight, packed, out)
    assert torch.equal(out.nonzero().flatten(), places)
