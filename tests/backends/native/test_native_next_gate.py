"""The gate that a native optimizer step makes for the next forward pass is exact, however the scores move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from distributions import DISTRIBUTIONS
from gated_updates import ADAMW, Problem, batch_of, run_step
from torch import Tensor

from wsn_fast.backends import native
from wsn_fast.backends import torch as portable
from wsn_fast.backends.updates import WINDOW, AdamWState, Gradient, Next, Update

RULE = "magnitude"

pytestmark = pytest.mark.usefixtures("library")


class Training:
    """Steps with the scores as somebody changes them in between; each leaves the exact gate."""

    def __init__(self, scores: Tensor, rule: str, masked: torch.dtype = torch.float32) -> None:
        n = scores.numel()
        torch.manual_seed(0)
        self.weight, self.scores, self.rule = torch.randn(n, dtype=scores.dtype), scores.clone(), rule
        self.state = AdamWState(*(torch.zeros_like(scores) for _ in range(4)), *torch.ones(2))
        window = torch.zeros(WINDOW, dtype=torch.int64)
        self.next = Next(torch.full((n,), torch.nan, dtype=masked), scores.new_empty(()), (2 * n) // 3, window)
        self.next.tau.copy_(portable.threshold(scores, self.next.rank, rule))

    def step(self, lr: float, grad: Tensor | None = None) -> None:
        grad = torch.randn_like(self.weight) if grad is None else grad
        update = Update(self.weight, self.scores, None, self.rule, self.state, self.next)
        batch = batch_of([Problem(update, Gradient(grad, None, self.next.tau))])
        run_step(native, batch, ADAMW._replace(lr=lr, weight_decay=0.0))
        tau = portable.threshold(self.scores, self.next.rank, self.rule)
        masked = portable.gate(self.weight, self.scores, tau, self.rule, self.next.masked.dtype)
        assert torch.equal(self.next.tau, tau) or (self.next.tau.isnan() and tau.isnan())
        assert torch.equal(self.next.masked.nan_to_num(), masked.nan_to_num())
        assert torch.equal(self.next.masked.isnan(), masked.isnan())

    @property
    def found(self) -> int:
        return int(self.next.window[-2])

    @property
    def searched(self) -> int:
        return int(self.next.window[-1])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "masked"),
    [
        *((n, torch.float32) for n in (1, 2, 70, 1025, 100_003)),
        *((1025, masked) for masked in (torch.bfloat16, torch.float16)),
        *(
            pytest.param(n, masked, marks=pytest.mark.ci)
            for n in (1, 2, 70, 100_003)
            for masked in (torch.bfloat16, torch.float16)
        ),
    ],
)
def test_the_next_gate_is_exact_and_mostly_found(n: int, dtype: torch.dtype, rule: str, masked: torch.dtype) -> None:
    torch.manual_seed(n)
    training = Training(torch.randn(n, dtype=dtype), rule, masked)
    for _ in range(12):
        training.step(1e-3)
    assert training.found + training.searched == 12
    assert training.found >= 8 or n < 100_003


@pytest.mark.parametrize("rule", ["magnitude", "value"])
@pytest.mark.parametrize("kind", list(DISTRIBUTIONS))
def test_the_next_gate_of_any_distribution(kind: str, rule: str) -> None:
    torch.manual_seed(0)
    training = Training(DISTRIBUTIONS[kind](20_011, torch.float32), rule)
    for lr in (0.0, 1e-3, 1e-3, 0.0, 1.0, 0.0):
        training.step(lr)


def test_scores_that_do_not_move_are_found_however_many_are_equal() -> None:
    training = Training(torch.ones(20_011), RULE)
    for _ in range(10):
        training.step(0.0)
    assert training.searched == 1


def test_scores_may_change_behind_the_back_of_the_window() -> None:
    training = Training(torch.randn(20_011), RULE)
    changes: list[Callable[[], object]] = [
        lambda: training.scores.normal_(),
        lambda: training.scores.mul_(1e3),
        lambda: training.scores.fill_(1.0),
        lambda: training.scores.normal_(),
        lambda: training.scores[::3].fill_(torch.nan),
        lambda: training.scores.fill_(torch.nan),
        lambda: training.scores.normal_(),
        lambda: training.next.window.fill_(-1),
        lambda: training.next.window.fill_(2**62),
        lambda: training.next.tau.fill_(torch.nan),
    ]
    for change in changes:
        change()
        for _ in range(3):
            training.step(1e-3)


@pytest.mark.usefixtures("threads")
def test_the_next_gate_of_several_threads() -> None:
    training = Training(torch.randn(700_001), RULE)
    for _ in range(6):
        training.step(1e-3)
    assert training.found >= 3
