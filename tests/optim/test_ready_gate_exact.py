"""The gate that a one-pass step leaves is exact, whatever the scores are."""

from __future__ import annotations

import pytest
import torch
from distributions import DISTRIBUTIONS, RULES
from one_pass_models import (
    assert_layer_ready,
    assert_ready,
    assert_trains_as_standard,
    each_backend,
    step,
    with_ready_gate,
)
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear
from wsn_fast.backends import choose
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

backend = each_backend


class OneLayer:
    """Training of a single layer whose scores somebody else chooses."""

    def __init__(self, scores: Tensor, rule: str, backend: str, density: float = 0.3) -> None:
        torch.manual_seed(0)
        rows = 3 if scores.numel() < 10_000 else 101
        assert scores.numel() % rows == 0
        self.columns = scores.numel() // rows
        layer = FastSubnetLinear(self.columns, rows, bias=False, dtype=scores.dtype, density=density, rule=rule)
        self.wsn, self.layer = WSN(nn.Sequential(layer)), layer
        layer.backend = backend
        self.wsn.begin_task(0)
        with torch.no_grad():
            layer.weight_score.copy_(scores.view(rows, -1))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x = torch.randn(2, self.columns).to(self.layer.weight.dtype)
        self.wsn(x).float().square().mean().backward()
        optimizer.step()
        assert_layer_ready(self.layer)

    @property
    def window(self) -> list[int]:
        found: list[int] = self.layer.gate_state.ready["weight"].window.tolist()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_gate_is_exact_for_any_scores(kind: str, rule: str, dtype: torch.dtype, backend: str) -> None:
    for n in (3, 1023, 101 * 131):
        torch.manual_seed(n)
        run = OneLayer(DISTRIBUTIONS[kind](n, dtype), rule, backend)
        optimizer = SubnetSGD(run.wsn, 0.0, one_pass=True)
        for lr in (0.0, 1e-3, 1e-3, 1.0, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            run.step(optimizer)


@pytest.mark.parametrize("density", [1e-6, 0.03, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_the_gate_is_exact_at_any_density(rule: str, density: float, backend: str) -> None:
    for kind in ("normal", "two_values", "nan"):
        run = OneLayer(DISTRIBUTIONS[kind](1023, torch.float32), rule, backend, density)
        optimizer = SubnetAdamW(run.wsn, 1e-3, one_pass=True)
        for _ in range(4):
            run.step(optimizer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_is_mostly_found_in_the_window(dtype: torch.dtype, rule: str) -> None:
    if choose("adamw_step", "cpu", dtype, "native").name != "native":
        pytest.skip("the native backend is not here")
    run = OneLayer(torch.randn(101 * 997).to(dtype), rule, "native")
    optimizer = SubnetAdamW(run.wsn, 1e-3, one_pass=True)
    for _ in range(20):
        run.step(optimizer)
    found, searched = run.window[-2:]
    assert found + searched == 20
    assert found >= 14


@pytest.mark.parametrize("rule", RULES)
def test_the_gate_is_exact_when_the_scores_jump(rule: str) -> None:
    """A window that was right for slow steps is of no use, and does no harm, after any of these."""
    if choose("adamw_step", "cpu", torch.float32, "native").name != "native":
        pytest.skip("the native backend is not here")
    run = OneLayer(torch.randn(101 * 997), rule, "native")
    optimizer = SubnetAdamW(run.wsn, 1e-4, one_pass=True)
    for kind in ("normal", "all_equal", "nan", "mostly_nan", "denormal", "infinities", "two_values", "sorted"):
        for _ in range(4):
            run.step(optimizer)
        with torch.no_grad():
            run.layer.weight_score.copy_(DISTRIBUTIONS[kind](run.layer.weight.numel(), torch.float32).view(101, -1))
        for state in optimizer.state.values():
            for value in state.values():
                value.nan_to_num_(0, 0, 0)
    run.step(optimizer)
    assert run.window[-2] > 0


def test_backends_take_turns(backend: str) -> None:
    """What one left in the window is nothing for the other."""
    wsn, optimizer = with_ready_gate(backend)
    other = "torch" if backend == "native" else "native"
    for name in (other, backend, other, other, backend):
        for layer in wsn.subnet_layers().values():
            layer.backend = name
        step(wsn, optimizer)
        assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)
