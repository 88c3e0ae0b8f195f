"""The gates, and the gradients, of many tensors in few launches: those of the torch backend for each tensor."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distributions import RULES
from elementwise import assert_same_bits, poisoned
from gradient_orders import BOTH, assert_formed, make_order
from gradient_orders import moved as moved_to
from torch import Tensor

from wsn_fast import ops
from wsn_fast.backends import torch as portable
from wsn_fast.backends import triton
from wsn_fast.backends.mask import GradientOrder
from wsn_fast.backends.triton import many, plans
from wsn_fast.kernels import addresses, gate_gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FULL, HALF = (torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)

# NumPy, inside the interpreter, warns of the infinities and NaN that are planted here.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


# --- gates
def test_gates_of_many_tensors_are_those_of_the_torch_backend(device: torch.device) -> None:
    """Of several kinds, in one call; the second call finds its tables in the plan."""
    plan: dict[object, object] = {}
    shapes = (((7, 5), "magnitude"), ((3,), "magnitude"), ((33, 9), "value"), ((4, 3, 3), "magnitude"))
    weights = [torch.randn(shape, device=device) for shape, _ in shapes]
    for seed in range(2):
        torch.manual_seed(seed)
        orders = []
        for weight, (shape, rule) in zip(weights, shapes, strict=True):
            scores = torch.randn(shape, device=device)
            scores.view(-1)[::3] = 0.5  # ties
            rank = ops.threshold_rank(weight.numel(), 0.4, rule)
            orders.append(ops.GateOrder(weight, scores, rank, rule, torch.full_like(weight, torch.nan)))
        taus = triton.gates(orders, plan)
        for order, tau in zip(orders, taus, strict=True):
            expected = portable.threshold(order.scores, order.rank, order.rule)
            assert_same_bits(tau, expected, "tau")
            masked = portable.gate(order.weight, order.scores, expected, order.rule, order.masked.dtype)
            assert_same_bits(order.masked, masked, "masked")


def test_a_plan_of_gates_gives_the_same_tensors_for_the_thresholds(device: torch.device) -> None:
    plan: dict[object, object] = {}
    weight, scores = torch.randn(2, 5, device=device)
    order = ops.GateOrder(weight, scores, 2, "value", torch.empty_like(weight))
    (first,), (second,) = triton.gates([order], plan), triton.gates([order], plan)
    assert first is second


def test_a_plan_of_gates_does_not_grow_without_end(device: torch.device) -> None:
    plan: dict[object, object] = {}
    kept = []
    for _ in range(20):
        weight, scores = torch.randn(5, device=device), torch.randn(5, device=device)
        kept.append(ops.GateOrder(weight, scores, 2, "value", torch.empty_like(weight)))
        triton.gates(kept[-1:], plan)
    assert len([key for key in plan if key is not many._KnownGates]) == many.TABLES


# --- gradients
@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each kernel is launched from now on."""
    found: Counter[str] = Counter()

    def counted(kernel: Any) -> Any:
        class Counted:
            def __getitem__(self, grid: Any) -> Any:
                found[kernel.__name__] += 1
                return kernel[grid]

        return Counted()

    for module, name in (
        (addresses, "write_kernel"),
        (gate_gradients, "gate_backward_kernel"),
        (gate_gradients, "gate_backward_multi_kernel"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    yield found


def make_orders(sizes: tuple[int, ...], device: torch.device, **form: Any) -> list[GradientOrder]:
    return [moved_to(make_order(n, **form), device) for n in sizes]


def fresh(order: GradientOrder) -> GradientOrder:
    """The order of the next step: another G, another tau, other results."""
    results = {
        name: poisoned(tuple(result.shape), result.dtype, result.device)
        for name in ("weight_grad", "score_grad")
        if (result := getattr(order, name)) is not None
    }
    return order._replace(grad=torch.randn_like(order.grad), tau=order.tau.clone(), **results)


def tables(plan: dict[Any, Any]) -> list[plans.Entry[Any]]:
    """The tables of gradients in a plan."""
    return [kept for kept in plan.values() if isinstance(kept, plans.Entry)]


@pytest.mark.parametrize("needed", [BOTH, (True, False), (False, True)])
@pytest.mark.parametrize("with_union", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_odd_sizes(
    rule: str, with_union: bool, needed: tuple[bool, bool], device: torch.device, launches: Counter[str]
) -> None:
    """In one launch; none for what is empty."""
    sizes = (1, 31, 0, 1024, 1025, 7, 4099)
    orders = make_orders(sizes, device, rule=rule, dtypes=HALF, needed=needed, with_union=with_union)
    triton.gates_backward(orders, {})
    assert_formed(orders)
    assert launches == {"write_kernel": 1, "gate_backward_multi_kernel": 1}


@pytest.mark.sample(9)
@pytest.mark.parametrize("dtypes", [*itertools.product((torch.float32, torch.float16), repeat=3), (torch.float64,) * 3])
def test_gradients_of_every_dtype(dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    orders = make_orders((5, 40, 1100), device, dtypes=dtypes)
    triton.gates_backward(orders, {})
    assert_formed(orders)


def test_gradients_of_several_kinds(device: torch.device, launches: Counter[str]) -> None:
    """A launch for each kind, whatever the order; nothing for those that nobody needs."""
    forms: list[dict[str, Any]] = [
        {"rule": "value"}, {}, {"dtypes": HALF}, {"needed": (True, False)}, {"rule": "value"}, {"with_union": False},
        {"needed": (False, False)}, {},
    ]  # fmt: skip
    orders = [order for i, form in enumerate(forms) for order in make_orders((3 + i, 64), device, **form)]
    triton.gates_backward(orders, {})
    assert_formed(orders)
    assert launches["gate_backward_multi_kernel"] == 5


@pytest.mark.parametrize("orders", [[], [make_order(0)], [make_order(5, needed=(False, False))]], ids=len)
def test_nothing_to_form(orders: list[GradientOrder], device: torch.device, launches: Counter[str]) -> None:
    plan: dict[Any, Any] = {}
    triton.gates_backward([moved_to(order, device) for order in orders], plan)
    assert not launches and not plan


@pytest.mark.parametrize("name", [None, "grad", "weight", "scores", "weight_grad", "score_grad"])
def test_unaligned_tensors(name: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view into longer memory. The kernel is told, which has no effect in the interpreter."""
    told: list[bool] = []
    kernel = gate_gradients.gate_backward_multi_kernel

    class Asked:
        def __getitem__(self, grid: Any) -> Any:
            return lambda **arguments: (told.append(arguments["ALIGNED"]), kernel[grid](**arguments))

    monkeypatch.setattr(gate_gradients, "gate_backward_multi_kernel", Asked())
    orders = make_orders((1024, 1030), device)
    if name is not None:
        x = getattr(orders[1], name)
        orders[1] = orders[1]._replace(**{name: torch.cat([x.new_zeros(1), x])[1:]})
    triton.gates_backward(orders, {})
    assert_formed(orders)
    assert told == [name is None]


@pytest.mark.parametrize("name", ["grad", "weight", "scores", "weight_grad", "score_grad"])
def test_tensors_that_are_not_contiguous(name: str, device: torch.device, launches: Counter[str]) -> None:
    """Only weights and scores cost the tensor a launch of its own: a copy of them is at another place at every step."""
    orders, plan = [moved_to(make_order((6, 9)), device) for _ in range(3)], {}
    strided = torch.full((9, 6), torch.nan, device=device).t().copy_(getattr(orders[1], name))
    for _ in range(2):
        orders = [fresh(order) for order in orders]
        orders[1] = orders[1]._replace(**{name: strided})
        triton.gates_backward(orders, plan)
        assert_formed(orders)
        assert getattr(orders[1], name) is strided and not strided.is_contiguous()
    assert launches["gate_backward_kernel"] == (2 if name in ("weight", "scores") else 0)
    assert launches["gate_backward_multi_kernel"] == 2 and len(tables(plan)) == 1


def test_without_a_plan_each_tensor_takes_a_launch(device: torch.device, launches: Counter[str]) -> None:
    orders = make_orders((3, 70, 1), device)
    triton.gates_backward(orders)
    assert_formed(orders)
    assert launches == {"gate_backward_kernel": 3}


# --- the plan
@pytest.mark.parametrize("tensors", [3, 40])
def test_addresses_take_one_launch_or_one_copy(tensors: int, device: torch.device, launches: Counter[str]) -> None:
    """After the first call. None if nothing has moved."""
    orders, plan = make_orders((4,) * tensors, device), {}
    triton.gates_backward(orders, plan)
    assert launches.pop("write_kernel") == -(-4 * tensors // addresses.VALUES)
    for step in range(3):
        kept = orders  # so that no tensor gets the address of another
        orders = [fresh(order) for order in orders]
        triton.gates_backward(orders, plan)
        assert_formed(orders)
        assert launches["write_kernel"] == ((step + 1) if 4 * tensors <= addresses.VALUES else 0)
    del kept
    launches.clear()
    triton.gates_backward(orders, plan)
    assert launches == {"gate_backward_multi_kernel": 1}
    assert len(tables(plan)) == 1


def test_a_plan_notices_other_tensors(device: torch.device) -> None:
    """Other weights, another union, none, another rule, other sizes at the same places."""
    plan: dict[Any, Any] = {}
    first = moved_to(make_order(64), device)
    for change in (
        {},
        {"weight": torch.randn(64, device=device)},
        {"scores": torch.randn(64, device=device)},
        {"union": moved_to(make_order(64), device).union},
        {"union": None},
        {"rule": "value"},
        {"grad": torch.randn(64, device=device).half()},
        {"grad": torch.randn(128, device=device)[::2]},
        {"score_grad": None},
        {name: getattr(first, name)[:37] for name in ("grad", "weight", "scores", "weight_grad", "score_grad")}
        | {"union": first.union[:5]},
        {},
    ):
        order = fresh(first._replace(**change))
        triton.gates_backward([order, moved_to(make_order(9), device)], plan)
        assert_formed([order])


def transposed(x: Tensor) -> None:
    x.data = x.data.t()


def put_elsewhere(x: Tensor) -> None:
    x.data = x.data.clone().mul_(2)


@pytest.mark.parametrize("change", [transposed, put_elsewhere])
@pytest.mark.parametrize("name", ["weight", "scores"])
def test_a_plan_notices_a_tensor_that_changed(
    name: str, change: Callable[[Tensor], None], device: torch.device
) -> None:
    """It is the same object, of the same shape and dtype."""
    plan: dict[Any, Any] = {}
    orders = [moved_to(make_order((6, 6)), device) for _ in range(2)]
    triton.gates_backward(orders, plan)
    kept = getattr(orders[1], name).data  # so that nothing else gets its address
    change(getattr(orders[1], name))
    orders = [fresh(order) for order in orders]
    triton.gates_backward(orders, plan)
    assert_formed(orders)
    del kept


def test_a_plan_of_gradients_does_not_grow_without_end(device: torch.device) -> None:
    plan: dict[Any, Any] = {}
    kept = [make_orders((5,), device) for _ in range(2 * many.TABLES)]
    for orders in kept:
        triton.gates_backward(orders, plan)
    assert len(tables(plan)) == many.TABLES


# --- as in a capture
@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the launches become those of a graph: its last element says so."""
    state = [False]
    for module in (plans, many):
        monkeypatch.setattr(module, "is_capturing", lambda device: state[-1])
    return state


def test_a_graph_has_addresses_of_its_own(
    device: torch.device, launches: Counter[str], capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come as arguments of kernels, and the calls after the capture write elsewhere."""
    orders, plan = make_orders((4,) * 40, device), {}
    triton.gates_backward(orders, plan)
    (entry,) = tables(plan)
    known = entry.addresses.numbers.clone()
    capturing.append(True)
    monkeypatch.setattr(plans.Addresses, "_copy", lambda self, values: pytest.fail("a copy in a capture"))
    launches.clear()
    captured = [fresh(order) for order in orders]
    triton.gates_backward(captured, plan)
    assert launches == {"write_kernel": 2, "gate_backward_multi_kernel": 1}
    assert entry.captured and torch.equal(entry.addresses.numbers, known)
    assert_formed(captured)


def test_what_a_graph_reads_stays_in_the_plan(device: torch.device, capturing: list[bool]) -> None:
    plan: dict[Any, Any] = {}
    kept = [make_orders((5,), device) for _ in range(2 * many.TABLES)]
    triton.gates_backward(kept[0], plan)
    capturing.append(True)
    triton.gates_backward(kept[0], plan)
    capturing.append(False)
    (entry,) = tables(plan)
    for orders in kept[1:]:
        triton.gates_backward(orders, plan)
    assert entry in tables(plan) and len(tables(plan)) == many.TABLES + 1


def test_a_capture_of_tensors_that_are_new_copies_no_table(
    device: torch.device, launches: Counter[str], capturing: list[bool]
) -> None:
    plan: dict[Any, Any] = {}
    capturing.append(True)
    orders = make_orders((5, 6), device)
    triton.gates_backward(orders, plan)
    assert_formed(orders)
    assert launches == {"gate_backward_kernel": 2} and not plan
