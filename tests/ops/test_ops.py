"""Packed masks, and the registered operators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wsn_fast import ops
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import Mask
from wsn_fast.reference import specification


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 5), (4, 2, 3, 3), ()])
def test_packing_is_little_endian_by_bit_and_round_trips(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.4
    packed = ops.pack_mask(mask)
    assert packed.tolist() == np.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
    assert torch.equal(ops.unpack_mask(packed, mask.shape), mask)
    assert ops.count_packed(packed).item() == mask.sum().item()


def test_the_portable_backend_packs_alike() -> None:
    # The choice may prefer the native library; the portable primitives are checked here by name.
    mask = torch.rand(77) < 0.4
    packed = portable.pack(mask)
    assert packed.tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()
    assert torch.equal(portable.unpack(packed, 77), mask)
    assert portable.popcount(packed).item() == mask.sum().item()
    assert torch.equal(portable.union(torch.stack([packed, ~packed])), torch.full_like(packed, 255))


def test_strided_masks_pack_in_row_major_order() -> None:
    mask = (torch.rand(6, 10) < 0.5).t()
    assert torch.equal(ops.pack_mask(mask), ops.pack_mask(mask.contiguous()))


def test_union() -> None:
    masks = torch.rand(3, 5, 7) < 0.3
    packed = torch.stack([ops.pack_mask(m) for m in masks])
    assert torch.equal(ops.unpack_mask(ops.union_packed(packed), (5, 7)), specification.union_masks(masks))


def test_popcount_of_every_byte() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert ops.count_packed(every).item() == sum(bin(i).count("1") for i in range(256))


def test_restoring_keeps_bits_inside_the_union_and_new_values_outside() -> None:
    saved = torch.tensor([1.0, -0.0, float("nan"), 3.0])
    now = torch.tensor([9.0, 0.0, 5.0, 8.0])
    ops.restore_frozen_(now, saved, ops.pack_mask(torch.tensor([False, True, True, False])))
    assert now.view(torch.int32).tolist() == torch.tensor([9.0, -0.0, float("nan"), 8.0]).view(torch.int32).tolist()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_mask(torch.zeros(3)), TypeError, "mask must be a torch.bool"),
        (lambda: ops.unpack_mask(torch.zeros(1), (3,)), TypeError, "packed must be a torch.uint8"),
        (lambda: ops.unpack_mask(torch.zeros(2, dtype=torch.uint8), (3,)), ValueError, r"shape \(1,\).* got \(2,\)"),
        (lambda: ops.union_packed(torch.zeros(0, 2, dtype=torch.uint8)), ValueError, r"T >= 1, got \(0, 2\)"),
        (lambda: ops.count_packed(torch.zeros(2, dtype=torch.bool)), TypeError, "packed must be a torch.uint8"),
    ],
)
def test_bad_masks(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype)


@pytest.mark.parametrize("rule", ops.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operators(rule: str, dtype: torch.dtype) -> None:
    weight, scores, grad = _operands(dtype)
    union = ops.pack_mask(torch.rand(6, 5) < 0.3)
    tau = ops.topc_threshold(scores, 0.3, rule=rule)
    library = torch.ops.wsn_fast
    torch.library.opcheck(library.threshold.default, (scores, 0.3, rule))
    torch.library.opcheck(library.mask.default, (scores.t(), 0.3, rule))
    torch.library.opcheck(library.gate.default, (weight, scores, 0.3, rule, torch.bfloat16))
    torch.library.opcheck(library.gate_packed.default, (weight, union, torch.float32))
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            library.gate_backward.default, (grad, weight, *Mask(scores, tau, rule, None, union), *need)
        )
    torch.library.opcheck(library.gate_backward.default, (grad, weight, *Mask(scores, tau, rule), True, True))


@pytest.mark.parametrize("rule", ops.RULES)
def test_the_gradient_matches_the_reference_to_the_bit(rule: str) -> None:
    weight, scores, grad = _operands(torch.float64)
    grad[0, 0], weight[1, 1] = float("nan"), float("inf")
    union = torch.rand(6, 5) < 0.3
    mask, tau = specification.topc_mask(scores, 0.3, rule=rule), specification.topc_threshold(scores, 0.3, rule=rule)
    actual = ops.gate_backward(grad, weight, Mask(scores, tau, rule, union=ops.pack_mask(union)), True, True)
    expected = specification.gate_backward(grad, weight, scores, mask, union, rule)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    dropped = actual[0][~(mask & ~union)]
    assert (dropped.view(torch.int64) == 0).all(), "a dropped gradient is +0.0, not -0.0 or NaN"


def test_the_choice_gives_its_reason() -> None:
    name, reason = choose("threshold", "cuda")[1:]
    assert name == "torch"
    assert reason
    with pytest.raises(ValueError, match="operation must be a primitive"):
        choose("sort", "cpu")
