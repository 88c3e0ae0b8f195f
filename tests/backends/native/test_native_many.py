"""The gates, and the gradients, of many tensors in one call of the native library: bitwise those of each tensor."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS, DTYPES, RULES
from elementwise import assert_same_bits
from gradient_orders import assert_formed, make_order
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import GateOrder, GradientOrder
from wsn_fast.backends.native import many
from wsn_fast.backends.native.shared_library import NativeLibrary

GATED = ("weight", "scores", "masked")
LARGE = 2**20 + 5  # enough for several threads
SIZES = (*range(1, 20), 1023, 1024, 1025, LARGE, 3, 100_003, 8193)


@pytest.fixture
def calls(library: NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library that are called."""
    made: list[str] = []
    call = many.call
    monkeypatch.setattr(many, "call", lambda function, *args: (made.append(function), call(function, *args)))
    return made


# --- gates
def gate_order(n: int, rule: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 3) -> GateOrder:
    weight = DISTRIBUTIONS["infinities"](n, dtypes[0])
    scores = DISTRIBUTIONS["nan"](n, dtypes[1])
    return GateOrder(weight, scores, n // 3, rule, torch.full((n,), torch.nan, dtype=dtypes[2]))


def assert_gated(orders: list[GateOrder], taus: list[Tensor]) -> None:
    for order, tau in zip(orders, taus, strict=True):
        what = f"n={order.weight.numel()} {order.rule}"
        assert_same_bits(tau, native.threshold(order.scores, order.rank, order.rule), f"tau, {what}")
        expected = portable.gate(order.weight, order.scores, tau, order.rule, order.masked.dtype)
        assert_same_bits(order.masked, expected, f"masked, {what}")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
def test_gates_of_all_sizes(rule: str, calls: list[str]) -> None:
    """Small and large tensors in turn: some share the threads, some have all of them."""
    orders = [gate_order(n, rule) for n in SIZES]
    assert_gated(orders, native.gates(orders))
    assert calls == ["wsn_gates"]


@pytest.mark.usefixtures("level")
def test_gates_of_every_dtype() -> None:
    orders = [gate_order(37, rule, dtypes) for *dtypes, rule in itertools.product(DTYPES, DTYPES, DTYPES, RULES)]
    assert_gated(orders, native.gates(orders))


@pytest.fixture
def gate_checks(monkeypatch: pytest.MonkeyPatch) -> list[GateOrder]:
    """The gate orders that are checked in full."""
    made: list[GateOrder] = []
    check = many._checked_gate
    monkeypatch.setattr(many, "_checked_gate", lambda i, order: (made.append(order), check(i, order))[1])
    return made


@pytest.mark.usefixtures("library")
def test_a_plan_of_gates_saves_the_checks(gate_checks: list[GateOrder]) -> None:
    """The thresholds are the same tensors at every call."""
    orders, plan = [gate_order(n, rule) for n, rule in itertools.product((5, 70), RULES)], {}
    taus = native.gates(orders, plan)
    for _ in range(2):
        for order in orders:
            order.scores.copy_(torch.randn_like(order.scores))
            order.masked.fill_(torch.nan)
        again = native.gates(orders, plan)
        assert_gated(orders, again)
        assert all(map(operator.is_, taus, again))
    assert len(gate_checks) == len(orders) and len(plan) == 1


@pytest.mark.usefixtures("library")
def test_a_plan_of_gates_notices_other_operands() -> None:
    plan: dict[Any, Any] = {}
    first, second = gate_order(40, "magnitude"), gate_order(3, "value")
    for change in (
        {},
        {"rank": 5},
        {"rule": "value"},
        {"masked": torch.full((40,), torch.nan, dtype=torch.float16)},
        {"scores": torch.randn(40)},
        {"scores": torch.randn(80)[::2]},
        {"weight": torch.randn(40).double()},
        {},
    ):
        orders = [first._replace(**change), second]
        assert_gated(orders, native.gates(orders, plan))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("field", ["weight", "scores", "masked"])
def test_a_plan_of_gates_notices_a_tensor_that_became_another(field: str) -> None:
    orders, plan = [gate_order(36, "value")], {}
    orders = [orders[0]._replace(**{name: getattr(orders[0], name).view(6, 6) for name in GATED})]
    native.gates(orders, plan)
    transposed(getattr(orders[0], field))
    if field == "masked":
        with pytest.raises(ValueError, match="masked must be contiguous"):
            native.gates(orders, plan)
    else:
        assert_gated(orders, native.gates(orders, plan))


@pytest.mark.usefixtures("library")
def test_one_plan_may_serve_gates_and_gradients() -> None:
    """Their tables do not take each other's place."""
    gate, order, plan = gate_order(9, "value"), make_order(9), {}
    gate = gate._replace(weight=order.weight)
    for _ in range(2):
        assert_gated([gate], native.gates([gate], plan))
        native.gates_backward([order], plan)
        assert_formed([order])
    assert len(plan) == 2


# --- gradients
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_all_sizes(rule: str, calls: list[str]) -> None:
    orders = [make_order(n, rule, with_union=n % 2 == 0) for n in (*SIZES, 0)]
    native.gates_backward(orders)
    assert_formed(orders)
    assert calls == ["wsn_gates_backward"]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_gradients_of_every_dtype(needed: tuple[bool, bool]) -> None:
    kinds = itertools.product(DTYPES, DTYPES, DTYPES, RULES)
    orders = [make_order(37, rule, dtypes, needed) for *dtypes, rule in kinds]
    native.gates_backward(orders)
    assert_formed(orders)


# --- the plan
def fresh(order: GradientOrder) -> GradientOrder:
    """The order of the next step: another G, another tau, other results."""
    results = {
        name: torch.full_like(result, torch.nan)
        for name in ("weight_grad", "score_grad")
        if (result := getattr(order, name)) is not None
    }
    return order._replace(grad=torch.randn_like(order.grad), tau=order.tau * 0.9, **results)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[GradientOrder]:
    """The orders that are checked in full."""
    made: list[GradientOrder] = []
    check = many._checked_order
    monkeypatch.setattr(many, "_checked_order", lambda order, copies: (made.append(order), check(order, copies))[1])
    return made


@pytest.mark.usefixtures("library")
def test_a_plan_saves_the_checks(checks: list[GradientOrder]) -> None:
    orders, plan = [make_order(n) for n in (5, 70)], {}
    for step in range(3):
        orders = [fresh(order) for order in orders]
        native.gates_backward(orders, plan)
        assert_formed(orders)
        assert len(checks) == 2, f"step {step}"


def transposed(x: Tensor) -> None:
    x.data = x.data.t()


def put_elsewhere(x: Tensor) -> None:
    x.data = x.data.clone().mul_(2)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("change", [transposed, put_elsewhere])
@pytest.mark.parametrize("field", ["weight", "scores"])
def test_a_plan_notices_a_tensor_that_changed(field: str, change: Callable[[Tensor], None]) -> None:
    """It is the same object, of the same shape and dtype."""
    orders, plan = [make_order((6, 6)), make_order((6, 6))], {}
    native.gates_backward(orders, plan)
    kept = getattr(orders[1], field).data  # so that nothing else gets its address
    change(getattr(orders[1], field))
    orders = [fresh(order) for order in orders]
    native.gates_backward(orders, plan)
    assert_formed(orders)
    del kept


@pytest.mark.usefixtures("library")
def test_a_plan_notices_a_tensor_that_shrank() -> None:
    order, plan = make_order(40), {}
    native.gates_backward([order], plan)
    order.weight.data = order.weight.data[:3]
    names = ("grad", "scores", "weight_grad", "score_grad")
    order = order._replace(**{name: getattr(order, name)[:3] for name in names}, union=order.union[:1])
    order = fresh(order)
    native.gates_backward([order], plan)
    assert_formed([order])


@pytest.mark.usefixtures("library")
def test_a_plan_notices_another_tensor_at_the_same_place() -> None:
    """Only the scores learn, so that no other tensor tells the dtype of the weight."""
    first, order, plan = make_order(5), make_order(40, needed=(False, True)), {}
    order.weight.copy_(torch.randn(40))
    native.gates_backward([first, order], plan)
    other = fresh(order)._replace(weight=order.weight.view(torch.float16)[:40])
    native.gates_backward([first, other], plan)
    assert_formed([other])


@pytest.mark.usefixtures("library")
def test_a_plan_notices_other_operands() -> None:
    """Another dtype of G, another rule, no union, a result that nobody needs, a strided G: in turn, with one plan."""
    plan: dict[Any, Any] = {}
    first = make_order((8, 5))
    for change in (
        {},
        {"grad": first.grad.bfloat16()},
        {"rule": "value"},
        {"union": None},
        {"weight_grad": None},
        {"score_grad": None},
        {"grad": torch.randn(5, 8).t()},
        {"tau": torch.tensor([0.5])},
        {"union": portable.pack(torch.rand(40) < 0.5)},
        {"scores": torch.randn(8, 5)},
        {},
    ):
        orders = [fresh(first)._replace(**change), make_order(3)]
        native.gates_backward(orders, plan)
        assert_formed(orders)


@pytest.mark.usefixtures("library")
def test_a_plan_refuses_what_is_refused_without_one() -> None:
    order, plan = make_order((4, 6)), {}
    native.gates_backward([order], plan)
    for name, value, error in (
        ("grad", torch.ones(6, 4), ValueError),
        ("grad", torch.ones(4, 6, dtype=torch.int32), TypeError),
        ("weight_grad", torch.ones(6, 4), ValueError),
        ("score_grad", torch.ones(4, 6).double(), TypeError),
        ("weight_grad", torch.ones(4, 6, device="meta"), ValueError),
        ("tau", torch.ones((), dtype=torch.float64), ValueError),
        ("tau", torch.ones(0), ValueError),
        ("union", torch.zeros(2, dtype=torch.uint8), ValueError),
        ("rule", "size", ValueError),
    ):
        with pytest.raises((error, RuntimeError)):
            native.gates_backward([order._replace(**{name: value})], plan)


@pytest.mark.usefixtures("library")
def test_a_plan_does_not_grow_without_end() -> None:
    plan: dict[Any, Any] = {}
    kept = [make_order(5) for _ in range(2 * many.TABLES)]
    for order in kept:
        native.gates_backward([order], plan)
    assert len(plan) == many.TABLES


@pytest.mark.usefixtures("library")
def test_a_plan_keeps_no_copies() -> None:
    """They would be copies of old values, and take memory."""
    plan: dict[Any, Any] = {}
    native.gates_backward([make_order(5)._replace(grad=torch.randn(10)[::2])], plan)
    assert plan == {}


@pytest.mark.usefixtures("library")
def test_threads_share_a_plan() -> None:
    orders, plan = [make_order(n) for n in (300, 70, 1)], {}
    native.gates_backward(orders, plan)

    def work(_: int) -> list[GradientOrder]:
        mine = [fresh(order) for order in orders]
        native.gates_backward(mine, plan)
        return mine

    with ThreadPoolExecutor(4) as pool:
        for mine in pool.map(work, range(200)):
            assert_formed(mine)


# --- what is refused
X = torch.ones(4)
GATE = GateOrder(X, X, 0, "value", torch.empty(4))
GRADIENT = GradientOrder(X, X, X, X[0], None, "value", torch.empty(4), torch.empty(4))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": X.int()}, TypeError, "weight must be float32"),
        ({"scores": X[:3]}, ValueError, r"scores must have shape \(4,\), got \(3,\)"),
        ({"rank": 4}, ValueError, r"orders\[1\].rank must be in \[0, 4\), got 4"),
        ({"rule": "size"}, ValueError, "rule must be one of"),
        ({"masked": torch.empty(8)[::2]}, ValueError, r"orders\[1\].masked must be contiguous, got strides \(2,\)"),
        ({"masked": torch.empty(3)}, ValueError, r"masked must have shape \(4,\), got \(3,\)"),
        ({"masked": torch.empty(4, device="meta")}, ValueError, "masked must be on the CPU, got meta"),
    ],
)
def test_bad_gates_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    written = torch.full((4,), 7.0)
    with pytest.raises(error, match=message):
        native.gates([GATE._replace(masked=written), GATE._replace(**change)])
    assert written.eq(7).all(), "nothing is written before all is checked"


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": X[:3]}, ValueError, r"grad must have shape \(4,\), got \(3,\)"),
        ({"grad": X.int()}, TypeError, "grad must be float32"),
        ({"scores": X.to("meta")}, ValueError, "scores must be on the CPU, got meta"),
        ({"tau": X}, ValueError, "tau must be one element of torch.float32"),
        ({"tau": X[0].double()}, ValueError, "tau must be one element of torch.float32"),
        ({"union": X.byte()}, ValueError, "union must have 1 bytes for 4 elements, got 4"),
        ({"rule": "size"}, ValueError, "rule must be one of"),
        ({"weight_grad": X.double()}, TypeError, "weight_grad must be a torch.float32 tensor, got torch.float64"),
        ({"score_grad": X[:2]}, ValueError, r"score_grad must have shape \(4,\), got \(2,\)"),
    ],
)
def test_bad_gradients_are_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    written = torch.full((4,), 7.0)
    with pytest.raises(error, match=message):
        native.gates_backward([GRADIENT._replace(weight_grad=written), GRADIENT._replace(**change)])
    assert written.eq(7).all(), "nothing is written before all is checked"


# --- large tensors, whose results pass by the caches
@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("first", [0, 1])
def test_large_tensors_are_gated_as_small_ones_are(first: int) -> None:
    """From 32 MiB on, results are written in another way, but not those at odd addresses (``first``)."""
    n = 2**23 + 77
    tensors = [torch.randn(n + 1)[first:][:n] for _ in range(3)]
    grad, weight, scores = tensors
    masked, dweight, dscores = (torch.full((n + 1,), torch.nan)[first:][:n] for _ in range(3))
    union = torch.randint(256, ((n + 7) // 8,), dtype=torch.uint8)
    (tau,) = native.gates([GateOrder(weight, scores, n // 3, "magnitude", masked)])
    native.gates_backward([GradientOrder(grad, weight, scores, tau, union, "magnitude", dweight, dscores)])
    assert torch.equal(tau, scores.abs().kthvalue(n // 3 + 1).values)
    kept = ~(scores.abs() < tau)
    frozen = portable.unpack(union, n)
    expected = [
        torch.where(kept, weight, 0.0),
        torch.where(kept & ~frozen, grad, 0.0),
        grad * weight * scores.sign(),
    ]
    for result, right in zip((masked, dweight, dscores), expected, strict=True):
        assert torch.equal(result.view(torch.int32), right.view(torch.int32))
