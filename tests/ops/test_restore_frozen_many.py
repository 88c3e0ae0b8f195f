"""Putting frozen values back into many tensors in one call, in the backends that every machine has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from restore_orders import assert_restored, expected_params, make_orders
from torch import Tensor

from wsn_fast import ops
from wsn_fast.backends import choose, native

BACKENDS = ("torch", pytest.param("native", marks=pytest.mark.skipif(native.load().lib is None, reason="not built")))
SHAPES = ((7, 5), 0, (), (2, 3, 3), 1025, 70, 8, (0, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8], ids=str)
def test_the_values_are_those_that_were_saved(dtype: torch.dtype, backend: str) -> None:
    assert choose("restore_frozen_many", "cpu", dtype, backend).name == backend
    orders = make_orders(SHAPES, dtype)
    expected = expected_params(orders)
    ops.restore_frozen_many(orders, backend)
    assert_restored(orders, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dtype_that_only_torch_has(backend: str) -> None:
    param, saved = torch.zeros(9, dtype=torch.complex128), torch.randn(9, dtype=torch.complex128)
    ops.restore_frozen_many([ops.RestoreOrder(param, saved, ops.pack_mask(torch.arange(9) < 4))], backend)
    assert torch.equal(param[:4], saved[:4]) and not param[4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_orders(backend: str) -> None:
    plan: dict[object, object] = {}
    ops.restore_frozen_many([], backend, plan)
    assert plan == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_require_gradients(backend: str) -> None:
    """As the parameters of a model do. Autograd learns that they have changed."""
    orders = [order._replace(param=order.param.abs().requires_grad_()) for order in make_orders([40, 3])]
    expected = expected_params(orders)
    products = [order.param.square() for order in orders]
    with torch.enable_grad():
        ops.restore_frozen_many(orders, backend)
    assert_restored(orders, expected)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "channels last": lambda x: x[None, :, :, None].expand(2, 6, 4, 3).contiguous(memory_format=torch.channels_last),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STRIDED)
def test_parameters_that_are_not_contiguous(name: str, backend: str) -> None:
    """They stay where they are. Saved values are in row-major order."""
    param = STRIDED[name](torch.randn(6, 4))
    orders = make_orders([5, tuple(param.shape)])
    orders[1] = orders[1]._replace(param=param)
    where, expected = (param.data_ptr(), param.stride()), expected_params(orders)
    for _ in range(2):
        ops.restore_frozen_many(orders, backend, {})
    assert_restored(orders, expected)
    assert where == (param.data_ptr(), param.stride())


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_values_of_another_shape(backend: str) -> None:
    (order,) = make_orders([(6, 4)])
    order = order._replace(saved=order.saved.view(2, 12))
    expected = expected_params([order])
    ops.restore_frozen_many([order], backend)
    assert_restored([order], expected)


def test_while_something_records_the_torch_backend_runs() -> None:
    """A recorder would not see the operations of another backend."""
    from torch.utils.flop_counter import FlopCounterMode

    orders, plan = make_orders([30, 4]), {}
    expected = expected_params(orders)
    with FlopCounterMode(display=False):
        ops.restore_frozen_many(orders, "native", plan)
    assert_restored(orders, expected)
    assert plan == {}
