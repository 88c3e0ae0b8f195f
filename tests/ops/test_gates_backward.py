"""The gradients of many tensors in one call, in the backends that every machine has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_orders import assert_formed, make_order
from stand_in_cuda import StandIn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast import ops
from wsn_fast.backends import choose, native

HALF = (torch.bfloat16, torch.float32, torch.float32)
WIDE = (torch.float64,) * 3
BACKENDS = ("torch", pytest.param("native", marks=pytest.mark.skipif(native.load().lib is None, reason="not built")))


def mixed_orders() -> list[ops.GradientOrder]:
    """Of several kinds: odd sizes, an empty tensor, shapes, dtypes, rules, gradients that nobody needs."""
    return [
        make_order((7, 5)),
        make_order(0),
        make_order((2, 3, 3), "value", with_union=False),
        make_order(1025, "magnitude", HALF),
        make_order((), "value", HALF, with_union=False),
        make_order(33, "value", WIDE, needed=(True, False)),
        make_order(70, "magnitude", HALF, needed=(False, True)),
        make_order(9, needed=(False, False)),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradients_are_those_of_each_tensor(backend: str) -> None:
    orders = mixed_orders()
    assert choose("gates_backward", "cpu", torch.float32, backend).name == backend
    assert ops.gates_backward(orders, backend) is None
    assert_formed(orders)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_orders(backend: str) -> None:
    plan: dict[object, object] = {}
    ops.gates_backward([], backend, plan)
    assert plan == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_require_gradients_and_a_graph_that_is_built(backend: str) -> None:
    """As a backward pass with ``create_graph=True`` calls it."""
    order = make_order(40)
    order = order._replace(**{name: getattr(order, name).requires_grad_() for name in ("grad", "weight", "scores")})
    with torch.enable_grad():
        ops.gates_backward([order], backend)
    assert order.weight_grad is not None and not order.weight_grad.requires_grad
    with torch.no_grad():
        assert_formed([order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_learns_that_the_results_have_changed(backend: str) -> None:
    order = make_order(8)
    leaf = torch.ones(8, requires_grad=True)
    products = [leaf * result for result in (order.weight_grad, order.score_grad)]
    ops.gates_backward([order], backend)
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
def test_tensors_that_are_not_contiguous(name: str, backend: str) -> None:
    """Inputs and results; the results stay where they are."""
    strided, order = STRIDED[name], make_order((6, 4))
    shape = strided(order.weight).shape
    union = make_order(tuple(shape)).union
    order = order._replace(
        union=torch.stack([union, union], dim=-1)[:, 0],
        **{
            field: strided(getattr(order, field)) for field in ("grad", "weight", "scores", "weight_grad", "score_grad")
        },
    )
    results = [(order.weight_grad.data_ptr(), order.weight_grad.stride())]
    ops.gates_backward([make_order(5), order], backend, {})
    assert results == [(order.weight_grad.data_ptr(), order.weight_grad.stride())]
    assert_formed([order])


def test_an_override_sends_it_to_a_backend() -> None:
    assert choose("gates_backward", "cpu", torch.float32, "native,gates_backward=torch").name == "torch"


def test_while_something_records_the_torch_backend_runs() -> None:
    """A recorder would not see the operations of another backend."""
    from torch.utils.flop_counter import FlopCounterMode

    order = make_order(30)
    with FlopCounterMode(display=False):
        ops.gates_backward([order], "native", plan := {})
    assert_formed([order])
    assert plan == {}


# --- launches, on a stand-in for the GPU
class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.found[function.name()] += 1
        return function(*args, **(kwargs or {}))


def next_step(orders: list[ops.GradientOrder]) -> list[ops.GradientOrder]:
    """Everything but weights, scores and unions is elsewhere."""
    moving = ("grad", "tau", "weight_grad", "score_grad")
    return [order._replace(**{name: getattr(order, name).clone() for name in moving}) for order in orders]


@pytest.mark.parametrize("tensors", [2, 12, 96])
def test_launches_do_not_grow_with_the_tensors(tensors: int, stand_in: StandIn) -> None:
    """One for the gradients, and one, or a copy, for the addresses."""
    from wsn_fast.backends import triton

    assert choose("gates_backward", "cpu", torch.float32).name == "triton"
    orders, plan = [make_order(40, dtypes=HALF) for _ in range(tensors)], {}
    triton.gates_backward(orders, plan)
    kept = [orders]  # so that no tensor gets the address of another
    for _ in range(2):
        kept.append(next_step(kept[-1]))
        stand_in.forget()
        with Operators() as operators:
            triton.gates_backward(kept[-1], plan)
        launches = stand_in.kernels()
        copies = operators.found["aten::copy_"]
        assert launches.pop("gate_backward_multi_kernel") == 1
        assert launches.pop("write_kernel", 0) + copies == 1 and not launches
        assert set(operators.found) <= {"aten::copy_", "aten::empty.memory_format"}


def test_a_capture_loads_nothing_after_one_call(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsn_fast.backends.triton import many, plans

    orders, plan = [make_order(40) for _ in range(96)], {}
    ops.gates_backward(orders, None, plan)
    for module in (many, plans):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    stand_in.forget()
    with stand_in.capturing():
        ops.gates_backward(next_step(orders), None, plan)
    assert stand_in.kernels() == {"gate_backward_multi_kernel": 1, "write_kernel": 3}
