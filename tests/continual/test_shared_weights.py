"""Two layers share a weight and have scores of their own: what either uses in a finished task stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from wsn_fast import WSN, FastSubnetLinear, TaskHeads
from wsn_fast.optim import SubnetAdamW, averaging

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.05)


def made() -> WSN:
    first, second = FastSubnetLinear(12, 12, density=0.3), FastSubnetLinear(12, 12, density=0.3)
    second.weight = first.weight
    model = nn.Sequential(FastSubnetLinear(8, 12, density=0.3), first, second, TaskHeads(12, 3))
    return WSN(model, reinit_scores=True)


def steps(wsn: WSN, optimizer: Any, count: int = 3) -> None:
    wsn.train()
    for _ in range(count):
        optimizer.zero_grad()
        wsn(X).square().mean().backward()
        optimizer.step()


def finished(tasks: str, make: Callable[[WSN], Any] = lambda wsn: wsn.guard(adamw(wsn.parameters()))) -> WSN:
    wsn = made()
    for task in tasks:
        wsn.begin_task(task)
        steps(wsn, make(wsn))
        wsn.end_task()
    return wsn


@torch.no_grad()
def logits(wsn: WSN, task: str) -> Tensor:
    with wsn.eval().use_task(task):
        return wsn(X)


def of_one_alone(wsn: WSN, one: int) -> tuple[int, int]:
    """An element that the first task uses in one of the two layers."""
    masks = wsn.model[1].mask("weight", 0), wsn.model[2].mask("weight", 0)
    row, column = (masks[one] & ~masks[1 - one]).nonzero()[0].tolist()
    return row, column


@pytest.mark.parametrize("make", [
    lambda wsn: wsn.guard(adamw(wsn.parameters())),
    lambda wsn: wsn.guard(foreign.DecaysAfter(wsn.parameters(), 0.05)),
    lambda wsn: wsn.guard(foreign.DecaysAll(wsn.parameters())),
    lambda wsn: wsn.guard(foreign.LookaheadOptimizer(adamw(wsn.parameters()))),
    lambda wsn: SubnetAdamW(wsn, 0.05),
])  # fmt: skip
def test_a_guard_keeps_both(make: Callable[[WSN], Any]) -> None:
    wsn = finished("a", make)
    before = logits(wsn, "a")
    for task in "bc":
        wsn.begin_task(task)
        steps(wsn, make(wsn))
        wsn.end_task()
    assert torch.equal(logits(wsn, "a"), before)
    wsn.verify()


@pytest.mark.parametrize("redraw_free", [False, True])
@pytest.mark.parametrize("task", "abc")
def test_when_a_task_is_removed_the_others_keep_both(task: str, redraw_free: bool) -> None:
    wsn = finished("abc")
    others = [other for other in "abc" if other != task]
    before = {other: logits(wsn, other) for other in others}
    wsn.remove_task(task, redraw_free=redraw_free)
    assert all(torch.equal(logits(wsn, other), before[other]) for other in others)
    wsn.verify()


@pytest.mark.parametrize("one", [0, 1])
def test_a_state_of_the_best_epoch_may_change_neither(one: int) -> None:
    wsn = finished("a")
    wsn.begin_task("b")
    state = wsn.trainable_state()
    state["1.weight"][of_one_alone(wsn, one)] += 1
    with pytest.raises(ValueError, match=r"1\.weight"):
        wsn.load_trainable_state(state)


@pytest.mark.parametrize("one", [0, 1])
def test_averages_move_neither(one: int) -> None:
    wsn = finished("a")
    wsn.begin_task("b")
    optimizer = wsn.guard(adamw(wsn.parameters()))
    average = AveragedModel(wsn, multi_avg_fn=averaging(wsn, lambda mean, now, count: now + 1))
    for _ in range(2):
        steps(wsn, optimizer, 1)
        average.update_parameters(wsn)
    where = of_one_alone(wsn, one)
    weight = wsn.model[1].weight
    assert average.module.model[1].weight[where] == weight[where]
    assert not torch.equal(average.module.model[1].weight, weight)
