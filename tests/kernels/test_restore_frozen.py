"""Putting frozen weights back: against the definition, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributions import DTYPES
from elementwise import assert_nothing_beyond, assert_same_bits, bits, poisoned
from restore_orders import assert_restored, expected_params, make_orders

from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.mask import RestoreOrder
from wsn_fast.backends.triton import frozen_values
from wsn_fast.kernels import restore_frozen as kernels
from wsn_fast.kernels._elementwise import Config

SMALL = Config(32, 1)
"""So that sizes up to 70 have full blocks and a tail."""


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8], ids=str)
def test_restore_frozen_is_exact_and_writes_nothing_else(dtype: torch.dtype, device: torch.device) -> None:
    for n in (*range(1, 20), 32, 64, 70, 1000):
        # Random bytes: every payload of NaN has to survive.
        param, saved = torch.randint(256, (2, n * dtype.itemsize), dtype=torch.uint8).view(dtype)
        union = portable.pack(torch.rand(n) < 0.5)
        expected = torch.where(portable.unpack(union, n), bits(saved), bits(param))
        restored = poisoned(n, dtype, device).copy_(param) if dtype.is_floating_point else param.to(device)
        kernels.restore_frozen(restored, saved.to(device), union.to(device), config=SMALL)
        assert torch.equal(bits(restored), expected), f"n={n}"
        if dtype.is_floating_point:
            assert_nothing_beyond(restored)


@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_restore_frozen_with_every_tile_shape(config: Config, device: torch.device) -> None:
    n = 2 * config.block + 5
    param, saved, union = torch.randn(n), torch.randn(n), portable.pack(torch.rand(n) < 0.3)
    expected = torch.where(portable.unpack(union, n), saved, param)
    restored = param.to(device)
    kernels.restore_frozen(restored, saved.to(device), union.to(device), config=config)
    assert_same_bits(restored, expected, "param")


def test_the_launcher_asserts_its_layout(device: torch.device) -> None:
    x, bytes_ = torch.zeros(4, 6, device=device), torch.zeros(3, dtype=torch.uint8, device=device)
    with pytest.raises(AssertionError):
        kernels.restore_frozen(x, x.half(), bytes_)


# --- many tensors in one launch
SHAPES = ((7, 5), 1, 32, (2, 3, 11), 64, 200)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8], ids=str)
def test_many_tensors_in_one_launch(dtype: torch.dtype, device: torch.device) -> None:
    orders = make_orders(SHAPES, dtype, device)
    orders = [o._replace(param=poisoned(tuple(o.param.shape), dtype, device).copy_(o.param)) for o in orders]
    expected = expected_params(orders)
    params, saved, unions = zip(*orders, strict=True)
    kernels.restore_frozen_multi(kernels.restore_frozen_table(params, saved, unions, SMALL).to(device), saved[0])
    assert_restored(orders, expected)
    assert_nothing_beyond(*params)


def test_a_table_serves_saved_values_that_have_moved_together(device: torch.device) -> None:
    orders = make_orders(SHAPES, device=device)
    params, saved, unions = zip(*orders, strict=True)
    table = kernels.restore_frozen_table(params, saved, unions, SMALL).to(device)
    others = torch.randn(sum(x.numel() for x in saved), device=device).split([x.numel() for x in saved])
    orders = [*map(RestoreOrder, params, others, unions)]
    expected = expected_params(orders)
    kernels.restore_frozen_multi(table, others[0])
    assert_restored(orders, expected)


def test_the_table_asserts_its_layout(device: torch.device) -> None:
    x, bits_ = torch.zeros(4, 6, device=device), torch.zeros(3, dtype=torch.uint8, device=device)
    for param, saved, union in ((x.t(), x, bits_), (x, x.half(), bits_), (x, x[:3], bits_), (x, x, bits_[:2])):
        with pytest.raises(AssertionError):
            kernels.restore_frozen_table([x, param], [x, saved], [bits_, union])


# --- the primitive, and its plan
@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launchers that are called."""
    made: list[str] = []

    def noted(name: str) -> Any:
        launcher = getattr(kernels, name)
        return lambda *args, **options: (made.append(name), launcher(*args, **options))[1]

    for name in ("restore_frozen", "restore_frozen_multi"):
        monkeypatch.setattr(kernels, name, noted(name))
    return made


def restore(orders: Sequence[RestoreOrder], plan: dict[Any, Any] | None) -> None:
    expected = expected_params(orders)
    triton.restore_frozen_many(orders, plan)
    assert_restored(orders, expected)


def test_a_plan_keeps_the_table_while_the_saved_values_move(device: torch.device, launches: list[str]) -> None:
    orders, plan = make_orders(SHAPES, device=device), {}
    kept = []
    for _ in range(3):
        others = make_orders(SHAPES, device=device)
        kept.append(others)  # so that no memory is used twice
        orders = [mine._replace(saved=other.saved) for mine, other in zip(orders, others, strict=True)]
        restore(orders, plan)
    assert launches == ["restore_frozen_multi"] * 3 and len(plan) == 1


def test_without_a_plan_each_tensor_takes_a_launch(device: torch.device, launches: list[str]) -> None:
    restore(make_orders([5, 9, 70], device=device), None)
    assert launches == ["restore_frozen"] * 2, "the tensor without a union is copied"


def test_a_plan_notices_other_tensors(device: torch.device) -> None:
    """Another parameter, other places of the saved values, another union, a tensor less: in turn, with one plan."""
    first, plan = make_orders([40, 24], device=device), {}
    for orders in (
        first,
        [first[0]._replace(param=first[1].saved.new_zeros(40)), first[1]],
        [first[0], first[1]._replace(saved=torch.randn(24, device=device))],
        [first[0]._replace(union=portable.pack(torch.rand(40) < 0.5).to(device)), first[1]],
        [first[0], first[1]._replace(union=None)],
        first[:1],
        first,
    ):
        restore(orders, plan)


def test_a_plan_tells_tensors_at_one_address_apart(device: torch.device) -> None:
    """By their sizes. The table does not depend on the dtype."""
    param, saved, plan = torch.zeros(16, device=device), torch.randn(16, device=device), {}
    restore([RestoreOrder(param, saved, None)], plan)
    param.zero_()
    restore([RestoreOrder(param[:8], saved[:8], None)], plan)
    assert not param[8:].any()
    restore([RestoreOrder(param.view(torch.bfloat16)[:16], saved.view(torch.bfloat16)[:16], None)], plan)


def test_tensors_without_elements_or_with_strides_take_part(device: torch.device) -> None:
    orders, plan = make_orders([0, (6, 4), (0, 3), (5, 5), (4, 6), 7], device=device), {}
    orders[1] = orders[1]._replace(param=orders[1].param.t().contiguous().t())
    orders[4] = orders[4]._replace(union=torch.stack([orders[4].union] * 2, dim=-1)[:, 0])
    restore(orders, plan)
    others = make_orders([order.param.shape for order in orders], device=device)
    restore([mine._replace(saved=other.saved) for mine, other in zip(orders, others, strict=True)], plan)
    assert len(plan) == 1
    restore(orders[:1], plan)


def test_a_plan_drops_the_oldest_tables_but_those_of_graphs(device: torch.device) -> None:
    plan: dict[Any, Any] = {}
    kept = [make_orders([5], device=device) for _ in range(2 * frozen_values.TABLES)]
    for i, orders in enumerate(kept):
        restore(orders, plan)
        if i == 0:
            next(iter(plan.values())).captured = True
    assert len(plan) <= frozen_values.TABLES + 1 and next(iter(plan.values())).captured


def test_a_capture_makes_no_table(device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses one that exists, which then stays; otherwise each tensor takes a launch."""
    known, unknown, plan = make_orders([5, 9], device=device), make_orders([5, 9], device=device), {}
    restore(known, plan)
    monkeypatch.setattr(frozen_values, "is_capturing", lambda device: True)
    restore(known, plan)
    restore(unknown, plan)
    assert launches == ["restore_frozen_multi"] * 2 + ["restore_frozen"]
    assert [one.captured for one in plan.values()] == [True]
