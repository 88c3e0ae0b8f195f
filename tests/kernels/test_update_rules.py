"""The rules of the updates, which keep zeros off the slow paths of roots and quotients: the results of the plain
formulas, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl
from elementwise import assert_same_bits
from torch import Tensor

from wsn_fast.kernels._elementwise import FP_FUSION
from wsn_fast.kernels._update_rules import adamw

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

INF, NAN = float("inf"), float("nan")
TINY = (1e-45, 3e-42, 1.2e-38, 3.9e-31, 4e-31)  # two are denormal; sqrt_rn leaves its fast path below 2^-101
MEANS = (0.0, 1e-8, 0.03, 1.0, 1e19, 3e38, INF, NAN, *TINY)
SIGNED = (*MEANS, *(-x for x in MEANS))
BLOCK = 128


@triton.jit
def plain_kernel(
    p_ptr, mean_ptr, square_ptr, unread_ptr, settings_ptr, out_ptr, n, PLAIN: tl.constexpr, BLOCK: tl.constexpr
):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < n
    p = tl.load(p_ptr + lane, mask=inside)
    mean = tl.load(mean_ptr + lane, mask=inside)
    square = tl.load(square_ptr + lane, mask=inside)
    unread = tl.load(unread_ptr + lane, mask=inside) != 0
    eps, correction = tl.load(settings_ptr), tl.load(settings_ptr + 1)
    size, shrink = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3)
    if PLAIN:
        root = tl.div_rn(tl.sqrt_rn(square), correction) + eps
        out = tl.fma(p, shrink, tl.div_rn(size * mean, root))
    else:
        out = adamw(p, mean, square, (0.0, 0.0, 0.0, eps, correction, size, shrink, 0.0), unread)
    tl.store(out_ptr + lane, out, mask=inside)


def parameters(operands: list[Tensor], settings: Tensor, unread: Tensor, plain: bool) -> Tensor:
    out = torch.empty_like(operands[0])
    grid = (triton.cdiv(len(out), BLOCK),)
    plain_kernel[grid](*operands, unread, settings, out, len(out), PLAIN=plain, BLOCK=BLOCK, **FP_FUSION)
    return out


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-38])
@pytest.mark.parametrize("shrink", [1.0, 0.999, 0.0])
def test_adamw_on_every_kind_of_number(eps: float, shrink: float, device: torch.device) -> None:
    numbers = torch.tensor([*itertools.product(SIGNED, SIGNED, MEANS)], device=device)
    operands = [column.contiguous() for column in numbers.unbind(1)]
    settings = torch.tensor([eps, 0.05, -0.01, shrink], device=device)
    nobody = torch.zeros(len(numbers), dtype=torch.uint8, device=device)
    expected = parameters(operands, settings, nobody, plain=True)
    assert_same_bits(parameters(operands, settings, nobody, plain=False), expected, "parameters")
    unread = (torch.arange(len(numbers), device=device) % 3 == 0).to(torch.uint8)
    read = unread == 0
    assert_same_bits(parameters(operands, settings, unread, plain=False)[read], expected[read], "those that are read")
