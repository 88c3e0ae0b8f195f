"""Gates that are made after a step for all layers together, without a one-pass optimizer: the same training to the bit,
and never a stale gate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gate_changes import CHANGES
from one_pass_models import layer_of, loss_of, tanh_wsn
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from wsn_fast import WSN, convert, ops
from wsn_fast.ops import autograd
from wsn_fast.optim import SubnetAdamW, SubnetSGD

OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "guarded AdamW": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.02, weight_decay=0.1)),
    "guarded fused Adam": lambda wsn: wsn.guard(torch.optim.Adam(wsn.parameters(), 0.02, fused=True)),
    "SubnetAdamW": lambda wsn: SubnetAdamW(wsn, 0.02, weight_decay=0.1),
    "SubnetSGD": lambda wsn: SubnetSGD(wsn, 0.1, momentum=0.9),
}


class Net(nn.Module):
    """A convolution, a layer that is used twice, and no bias in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.twice = nn.Linear(48, 48, bias=False)
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


def make_wsn(ahead: bool, rule: str = "magnitude") -> WSN:
    torch.manual_seed(0)
    return WSN(convert(Net(), density=0.4, rule=rule, heads="head"), gates_ahead=ahead)


def train(wsn: WSN, make: Callable[[WSN], torch.optim.Optimizer], dtype: torch.dtype | None) -> list[Tensor]:
    losses = []
    for task in (0, 1):
        torch.manual_seed(task)
        wsn.begin_task(task, density=0.3 if task else None)
        optimizer = make(wsn)
        for step in range(6):
            generator = torch.Generator().manual_seed(10 * task + step)
            x, y = torch.randn(8, 1, 4, 4, generator=generator), torch.randint(4, (8,), generator=generator)
            if step != 3:  # the fourth step has the gradients of two passes
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(wsn(x), y)
            loss.backward()
            losses.append(loss.detach())
            if step != 2:
                optimizer.step()
        wsn.end_task()
    wsn.verify()
    return losses


@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_training_is_the_same_to_the_bit(kind: str, dtype: torch.dtype | None, rule: str) -> None:
    ahead, plain = make_wsn(True, rule), make_wsn(False, rule)
    assert train(ahead, OPTIMIZERS[kind], dtype) == train(plain, OPTIMIZERS[kind], dtype)
    for (name, mine), theirs in zip(ahead.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that forward passes gate from now on."""
    found: list[Tensor] = []
    gate = autograd.gate

    def counted(weight: Tensor, *args: Any) -> Any:
        found.append(weight)
        return gate(weight, *args)

    monkeypatch.setattr(autograd, "gate", counted)
    return found


def step(wsn: WSN, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(wsn, seed).backward()
    optimizer.step()


def with_gates_ahead() -> tuple[WSN, torch.optim.Optimizer]:
    """A model in its second task, with gates that were made ahead."""
    wsn = tanh_wsn("torch", gates_ahead=True)
    wsn.begin_task(0)
    wsn.end_task()
    wsn.begin_task(1)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.02, weight_decay=0.1))
    for seed in range(2):
        step(wsn, optimizer, seed)
    return wsn, optimizer


def assert_exact(wsn: WSN) -> None:
    """A copy of the model has no gates, and so makes its own."""
    assert torch.equal(loss_of(wsn).detach(), loss_of(copy.deepcopy(wsn)).detach())


def test_a_forward_pass_makes_no_gate_that_was_made_ahead(gated: list[Tensor]) -> None:
    wsn, optimizer = with_gates_ahead()
    gated.clear()
    for seed in range(3):
        step(wsn, optimizer, seed)
    assert gated == []


def test_evaluation_makes_its_own(gated: list[Tensor]) -> None:
    wsn, _ = with_gates_ahead()
    gated.clear()
    with torch.no_grad():
        loss_of(wsn)
    assert gated


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_rebuilds_the_gate(change: str) -> None:
    wsn, optimizer = with_gates_ahead()
    torch.manual_seed(5)
    CHANGES[change](wsn)
    assert_exact(wsn)
    step(wsn, optimizer)
    assert_exact(wsn)


@pytest.mark.parametrize("name", ["weight", "weight_score"])
def test_an_edit_through_data_shows_after_one_step(name: str) -> None:
    wsn, optimizer = with_gates_ahead()
    getattr(layer_of(wsn), name).data.mul_(-2).add_(0.01)
    step(wsn, optimizer)
    assert_exact(wsn)


def test_without_the_option_an_edit_through_data_shows_at_once() -> None:
    wsn = tanh_wsn("torch")
    wsn.begin_task(0)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.02))
    step(wsn, optimizer)
    layer_of(wsn).weight_score.data.mul_(-2).add_(0.01)
    assert_exact(wsn)


def test_parameters_of_another_copy_are_gated_by_themselves() -> None:
    wsn, _ = with_gates_ahead()
    others = {name: (2 * p.detach()).requires_grad_() for name, p in wsn.named_parameters()}
    twin = copy.deepcopy(wsn)
    x = torch.randn(4, layer_of(wsn).in_features, dtype=torch.float64)
    mine, theirs = (torch.func.functional_call(model, others, (x,)) for model in (wsn, twin))
    assert torch.equal(mine, theirs)


def test_a_backward_pass_after_the_step_is_refused() -> None:
    """The masked weight of its forward pass has been written over, as the weight itself has."""
    wsn, optimizer = with_gates_ahead()
    loss = loss_of(wsn)
    step(wsn, optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_to_one_pass_and_back() -> None:
    wsn, _ = with_gates_ahead()
    for one_pass in (True, False, True):
        optimizer = SubnetAdamW(wsn, 0.02, one_pass=one_pass)
        for seed in range(2):
            step(wsn, optimizer, seed)
            assert all(
                layer.gate_state.ready and layer.gate_state.is_ready(layer) for layer in wsn.subnet_layers().values()
            )
        assert_exact(wsn)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_primitive_is_threshold_and_gate_of_each(backend: str) -> None:
    orders = []
    for shape, rule, dtype in (
        ((7, 5), "magnitude", torch.float32),
        ((3,), "value", torch.bfloat16),
        ((2, 3, 3), "value", torch.float32),
    ):
        weight, scores = torch.randn(shape), torch.randn(shape)
        rank = ops.threshold_rank(weight.numel(), 0.3, rule)
        orders.append(ops.GateOrder(weight, scores, rank, rule, torch.full(shape, torch.nan, dtype=dtype)))
    taus = ops.gates(orders, backend, {})
    for (weight, scores, _, rule, masked), tau in zip(orders, taus, strict=True):
        expected, expected_tau = ops.gate(weight, scores, 0.3, rule, masked.dtype, "torch")
        assert torch.equal(masked, expected) and torch.equal(tau, expected_tau)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", [*OPTIMIZERS, "one pass"])
def test_no_node_of_autograd_outlives_its_step(kind: str, ahead: bool) -> None:
    """A node that accumulates gradients works on the stream on which it was made. One from the default stream would
    keep a user's CUDA graph from being recorded."""
    wsn = make_wsn(ahead)
    wsn.begin_task(0)
    optimizer = SubnetAdamW(wsn, 0.02, one_pass=True) if kind == "one pass" else OPTIMIZERS[kind](wsn)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(wsn(torch.randn(8, 1, 4, 4)), torch.randint(4, (8,))).backward()
        optimizer.step()

    step(), step()
    trained = [p for p in wsn.parameters() if p.requires_grad]
    for parameter in trained:
        get_gradient_edge(parameter).node.metadata["seen"] = True
    step()
    assert [p for p in trained if "seen" in get_gradient_edge(p).node.metadata] == []
