"""A rule with a constant threshold keeps what reaches it, on every way through the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributions import DISTRIBUTIONS, DTYPES, assert_same_mask
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert, ops, topc_mask, topc_threshold
from wsn_fast.optim import SubnetAdamW
from wsn_fast.reference import specification

RULE = "value >= 0.005"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_mask_is_that_of_the_specification(name: str, dtype: torch.dtype) -> None:
    scores = DISTRIBUTIONS[name](301, dtype)
    assert topc_threshold(scores, 0.3, rule=RULE) == torch.tensor(0.005, dtype=dtype)
    assert_same_mask(topc_mask(scores, 0.3, rule=RULE), specification.topc_mask(scores, 0.3, rule=RULE), name)


def test_a_score_at_the_threshold_is_kept_and_nan_too() -> None:
    scores = torch.tensor([-1.0, 0.5, 0.49999997, torch.nan, 2.0, -0.5])
    assert topc_mask(scores, 0.1, rule="value >= 0.5").tolist() == [False, True, False, True, True, False]
    assert not topc_mask(scores[:1], 1.0, rule="value >= 0.5").any(), "a mask may be empty"


@pytest.mark.parametrize("rule", ["value >= ", "value >= a", "value >= nan", "value >= inf", "value > 1", "Value", 1])
def test_other_rules_are_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="rule must be one of"):
        ops.check_rule(rule)


def test_one_spelling_of_each_rule() -> None:
    assert ops.check_rule("value >= 5e-3") == RULE
    assert ops.check_rule("value >= 0") == "value >= 0.0"


def layer(rule: str = RULE) -> FastSubnetLinear:
    torch.manual_seed(0)
    return FastSubnetLinear(12, 8, rule=rule)


def test_gradients_are_those_of_the_specification() -> None:
    own, x = layer(), torch.randn(5, 12)
    own(x).square().sum().backward()
    mask = specification.topc_mask(own.weight_score, 1.0, rule=RULE)
    masked = specification.select(mask, own.weight.detach()).requires_grad_()
    bias = specification.select(specification.topc_mask(own.bias_score, 1.0, rule=RULE), own.bias.detach())
    nn.functional.linear(x, masked, bias).square().sum().backward()
    dw, ds = specification.gate_backward(masked.grad, own.weight, own.weight_score, mask, rule="value")
    torch.testing.assert_close((own.weight.grad, own.weight_score.grad), (dw, ds), rtol=0, atol=0)


def trained(optimizer: str, **options: bool) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(nn.Sequential(layer(), TaskHeads(8, 2)), **options)
    wsn.begin_task(0)
    settings = {"lr": 0.01, "weight_decay": 0.0}
    if optimizer == "one pass":
        chosen: Any = SubnetAdamW(wsn, **settings, score_weight_decay=0.0, one_pass=True)
    else:
        chosen = wsn.guard(torch.optim.AdamW(wsn.parameters(), **settings))
    for _ in range(5):
        chosen.zero_grad()
        wsn(torch.randn(4, 12)).square().sum().backward()
        chosen.step()
    return wsn


@pytest.mark.parametrize(("optimizer", "options"), [("one pass", {}), ("any", {"gates_ahead": True})])
def test_what_ranks_scores_together_leaves_such_layers_alone(optimizer: str, options: dict[str, bool]) -> None:
    expected, found = trained("any"), trained(optimizer, **options)
    for one, other in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_rule_is_saved() -> None:
    other = layer("magnitude")
    other.load_state_dict(layer().state_dict())
    assert other.rule == RULE


def test_a_group_ranks_and_needs_a_rule_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsn_fast.ops import selection

    monkeypatch.setattr(selection.collectives, "check_group", lambda group: None)
    monkeypatch.setattr(selection.collectives, "size", lambda group: 2)
    with pytest.raises(ValueError, match="rule must be 'magnitude' or 'value' with a group"):
        topc_threshold([torch.ones(3)], 0.5, rule=RULE, group=object())  # type: ignore[call-overload]


@pytest.mark.ci
def test_compiled_code_computes_the_same() -> None:
    own, x = layer(), torch.randn(5, 12)
    compiled: Any = torch.compile(own, fullgraph=True, backend="aot_eager")
    found: Tensor = compiled(x)
    found.square().sum().backward()
    grads = [p.grad for p in own.parameters()]
    own.zero_grad()
    expected = own(x)
    expected.square().sum().backward()
    torch.testing.assert_close((found, *grads), (expected, *(p.grad for p in own.parameters())))


# --- scores that begin at a number
def test_all_scores_begin_at_a_number() -> None:
    model = convert(nn.Sequential(nn.Linear(6, 4)), rule=RULE, score_init=0.01)
    wsn = WSN(model, reinit_scores=True, score_init=1)
    own: Any = wsn.subnet_layers()["0"]
    assert (own.weight_score == 0.01).all() and (own.bias_score == 0.01).all()
    wsn.begin_task(0)
    assert (own.weight_score == 1).all()


@pytest.mark.parametrize("mode", [torch.inf, torch.nan, True, "1", None])
def test_other_values_of_scores_are_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match="score_init must be one of"):
        convert(nn.Sequential(nn.Linear(6, 4)), score_init=mode)
