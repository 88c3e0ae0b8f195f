"""Frozen values of many tensors put back in one call of the native library."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from distributions import DTYPES
from restore_orders import assert_restored, expected_params, make_orders, random_bits
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends.mask import RestoreOrder
from wsn_fast.backends.native import many

LARGE = 2**20 + 5  # enough for several threads
SIZES = (*range(20), 1023, 1024, 1025, LARGE, 3, 100_003, 8193)


def restore(orders: list[RestoreOrder], plan: dict[Any, Any] | None = None) -> None:
    expected = expected_params(orders)
    native.restore_frozen_many(orders, plan)
    assert_restored(orders, expected)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library that are called."""
    made: list[str] = []
    call = many.call
    monkeypatch.setattr(many, "call", lambda function, *args: (made.append(function), call(function, *args)))
    return made


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[RestoreOrder]:
    """The orders that are checked in full."""
    made: list[RestoreOrder] = []
    check = many._plain
    monkeypatch.setattr(many, "_plain", lambda order, copies: (made.append(order), check(order, copies))[1])
    return made


@pytest.mark.usefixtures("library", "threads")
def test_all_sizes(calls: list[str]) -> None:
    """Small and large tensors in turn share the threads."""
    restore(make_orders(SIZES))
    assert calls == ["wsn_restore_frozen_many"]


@pytest.mark.usefixtures("library")
def test_every_dtype_in_one_call() -> None:
    dtypes = (*DTYPES, torch.uint8, torch.int64, torch.complex64)
    restore([order for dtype in dtypes for order in make_orders([37, 1, 70], dtype)])


# --- the plan
@pytest.mark.usefixtures("library")
def test_a_plan_saves_the_checks_of_the_same_orders(checks: list[RestoreOrder]) -> None:
    orders, plan = make_orders([5, 70, 3]), {}
    for _ in range(3):
        for order in orders:
            order.saved.copy_(random_bits(order.saved.numel(), torch.float32))
        restore(orders, plan)
    assert len(checks) == 3
    restore(list(orders), plan)
    assert len(checks) == 6, "another list may hold other tensors"


def put_elsewhere(param: Tensor) -> None:
    param.data = param.data.clone().neg_()


def transposed(param: Tensor) -> None:
    param.data = param.data.t()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("change", [put_elsewhere, transposed])
def test_a_plan_notices_a_parameter_that_became_another(change: Callable[[Tensor], None]) -> None:
    orders, plan = make_orders([(6, 6), (6, 6)]), {}
    restore(orders, plan)
    change(orders[1].param)
    restore(orders, plan)


@pytest.mark.usefixtures("library")
def test_a_plan_finds_saved_values_that_have_moved() -> None:
    memory = random_bits(40, torch.float32)
    orders, plan = [RestoreOrder(torch.zeros(40), memory.view(-1), None)], {}
    restore(orders, plan)
    memory.set_(random_bits(40, torch.float32))
    orders[0].saved.set_(memory)
    restore(orders, plan)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "error"), [(lambda param: param.data[:3], ValueError), (lambda param: param.data.double(), TypeError)]
)
def test_a_plan_refuses_what_is_refused_without_one(change: Callable[[Tensor], Tensor], error: type[Exception]) -> None:
    orders, plan = make_orders([3, 8]), {}
    restore(orders, plan)
    orders[1].param.data = change(orders[1].param)
    with pytest.raises(error):
        native.restore_frozen_many(orders, plan)


@pytest.mark.usefixtures("library")
def test_a_plan_keeps_no_copies() -> None:
    """They would be copies of old values."""
    (order,) = make_orders([(6, 4)])
    for strided in (
        order._replace(param=order.param.t().contiguous().t()),
        order._replace(saved=random_bits(48, torch.float32)[::2]),
    ):
        plan: dict[Any, Any] = {}
        restore([strided], plan)
        assert plan == {}


@pytest.mark.usefixtures("library")
def test_threads_share_a_plan() -> None:
    orders, plan = make_orders([300, 70, 1]), {}
    expected = expected_params(orders)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: native.restore_frozen_many(orders, plan), range(200)))
    assert_restored(orders, expected)


# --- what is refused
X = torch.ones(4)
ORDER = RestoreOrder(X, X, torch.zeros(1, dtype=torch.uint8))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": None}, TypeError, "param must be a tensor, got NoneType"),
        ({"param": X.to("meta")}, ValueError, "param must be on the CPU, got meta"),
        ({"saved": X[:3]}, ValueError, "saved must have the 4 elements of param, got 3"),
        ({"saved": X.int()}, TypeError, "saved must have the dtype torch.float32 of param, got torch.int32"),
        ({"saved": X.to("meta")}, ValueError, "saved must be on the CPU, got meta"),
        ({"union": X.byte()}, ValueError, "union must have 1 bytes for 4 elements, got 4"),
        ({"union": X[:1].int()}, TypeError, "union must be a torch.uint8 tensor, got torch.int32"),
    ],
)
def test_bad_orders_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    written = torch.full((4,), 7.0)
    with pytest.raises(error, match=message):
        native.restore_frozen_many([RestoreOrder(written, X, None), ORDER._replace(**change)])
    assert written.eq(7).all(), "nothing is written before all is checked"
