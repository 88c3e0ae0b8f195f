"""The gradients of the gate: straight-through for scores, masked for weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsn_fast import ops
from wsn_fast.ops.autograd import GateForm, SubnetGate
from wsn_fast.reference import specification

RULES = ops.RULES


def gate(weight: Tensor, scores: Tensor, rule: str, union: Tensor | None = None) -> Tensor:
    return SubnetGate.apply(weight, scores, union, GateForm(0.4, rule, weight.dtype))


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    return weight, torch.randn(5, 7, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_of_inputs_and_weight(operands: tuple[Tensor, Tensor], rule: str) -> None:
    weight, scores = operands
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    bias_scores = torch.randn(5, dtype=torch.float64)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, gate(weight, scores.detach(), rule), gate(bias, bias_scores, rule))

    assert torch.autograd.gradcheck(layer, (x, weight, bias))


@pytest.mark.parametrize("rule", RULES)
def test_score_gradient_is_that_of_the_surrogate(operands: tuple[Tensor, Tensor], rule: str) -> None:
    weight, scores = operands
    probe = torch.randn(5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad((specification.surrogate_weight(weight, scores, 0.4, rule) * probe).sum(), scores)
    (actual,) = torch.autograd.grad((gate(weight, scores, rule) * probe).sum(), scores)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (actual[~specification.topc_mask(scores, 0.4, rule=rule)] != 0).all(), "scores outside the mask learn too"


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck_must_fail_on_scores(operands: tuple[Tensor, Tensor], rule: str) -> None:
    weight, scores = operands
    assert not torch.autograd.gradcheck(lambda s: gate(weight.detach(), s, rule), (scores,), raise_exception=False)


@pytest.mark.parametrize("rule", RULES)
def test_frozen_weights_get_no_gradient_and_their_scores_do(operands: tuple[Tensor, Tensor], rule: str) -> None:
    weight, scores = operands
    union = torch.rand(5, 7) < 0.5
    probe = torch.randn(5, 7, dtype=torch.float64)
    (gate(weight, scores, rule, ops.pack_mask(union)) * probe).sum().backward()
    mask = specification.topc_mask(scores, 0.4, rule=rule)
    dw, ds = specification.gate_backward(probe, weight.detach(), scores.detach(), mask, union, rule)
    assert torch.equal(weight.grad, dw)
    assert torch.equal(scores.grad, ds)
    assert (mask & union).any(), "the case has frozen weights that the mask re-selects"


def test_zero_scores_have_zero_gradient_under_magnitude() -> None:
    weight, scores = torch.ones(4), torch.tensor([0.0, -0.0, 1.0, -1.0], requires_grad=True)
    gate(weight, scores, "magnitude").sum().backward()
    assert scores.grad.tolist() == [0.0, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("weight_learns", [True, False])
def test_only_what_is_asked_for_is_computed(weight_learns: bool) -> None:
    weight = torch.randn(4, requires_grad=weight_learns)
    scores = torch.randn(4, requires_grad=not weight_learns)
    gate(weight, scores, "magnitude").sum().backward()
    assert (weight.grad is None, scores.grad is None) == (not weight_learns, weight_learns)


@pytest.mark.parametrize("wanted", [0, 1], ids=["weight", "scores"])
def test_double_backward_is_refused_with_the_reason(operands: tuple[Tensor, Tensor], wanted: int) -> None:
    loss = gate(*operands, "magnitude").square().sum()
    (first,) = torch.autograd.grad(loss, operands[wanted], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through a subnet layer is not defined"):
        first.sum().backward()


def test_a_first_order_gradient_with_create_graph_is_right(operands: tuple[Tensor, Tensor]) -> None:
    loss = gate(*operands, "value").sum()
    plain = torch.autograd.grad(loss, operands, retain_graph=True)
    with_graph = torch.autograd.grad(loss, operands, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, with_graph, strict=True))


def test_scores_changed_between_forward_and_backward_are_caught(operands: tuple[Tensor, Tensor]) -> None:
    weight, scores = operands
    out = gate(weight, scores, "magnitude").sum()
    with torch.no_grad():
        scores.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
