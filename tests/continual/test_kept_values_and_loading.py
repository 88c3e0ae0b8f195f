"""The copies of frozen values, when other values are loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import nn

from wsn_fast import WSN


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)


def in_second_task(model: Callable[[], nn.Module] = mlp) -> WSN:
    wsn = WSN(model())
    run_tasks(wsn, [0], adamw)
    wsn.begin_task(1)
    return wsn.train()


def in_first_task() -> WSN:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    return wsn.train()


def take_steps(wsn: WSN, optimizer: Any, task: int, count: int = 2) -> None:
    for x, y in batches(task, count):
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()


KINDS: dict[str, Callable[[Any], Any]] = {
    "a subclass": foreign.DecaysAfter,
    "a delegate": lambda p: foreign.Delegate(adamw(p)),
    "a wrapper without hooks": lambda p: foreign.LookaheadOptimizer(adamw(p)),
}


@pytest.mark.parametrize(
    "make", [adamw, foreign.DecaysAfter, lambda p: foreign.Delegate(adamw(p)), foreign.WithoutHooks]
)
def test_after_loading_the_loaded_values_are_kept(make: Callable[..., Any]) -> None:
    other = in_second_task(convnet)
    state, before = copy.deepcopy(other.state_dict()), logits(other, 0)
    wsn = in_second_task(convnet)
    optimizer = wsn.guard(make([p for p in wsn.parameters() if p.requires_grad]))
    train(wsn, optimizer, batches(1, 2))
    wsn.load_state_dict(state)
    train(wsn, optimizer, batches(1, 2))
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)
    wsn.verify()


def test_copies_keep_their_addresses_when_a_state_is_loaded() -> None:
    """A CUDA graph of the step reads them."""
    wsn = in_second_task()
    optimizer = wsn.guard(foreign.DecaysAfter(wsn.parameters()))

    def addresses() -> dict[int, int]:
        return {key: kept.values.data_ptr() for key, kept in wsn._guards.kept._copies.items()}

    before = addresses()
    wsn.load_state_dict(copy.deepcopy(wsn.state_dict()))
    assert addresses() == before and len(before) > 0
    train(wsn, optimizer, batches(1, 1))
    assert addresses() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_with_other_masks_after_one_without_any(kind: str) -> None:
    """The layers have other unions then, and other elements of the same parameters are frozen."""
    other, wsn = in_second_task(), in_second_task()
    assert not torch.equal(other.model[1].weight_masks, wsn.model[1].weight_masks)
    before = logits(other, 0)
    optimizer = wsn.guard(KINDS[kind](list(wsn.parameters())))
    for state in (in_first_task(), other):
        wsn.load_state_dict(copy.deepcopy(state.state_dict()))
    optimizer.param_groups[0]["params"] += list(wsn.model[5].head(1).parameters())
    take_steps(wsn.train(), optimizer, 1)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("kind", [foreign.DecaysAfter, foreign.DecaysBefore, KINDS["a delegate"]])
def test_after_a_state_without_tasks_nothing_is_put_back(kind: Callable[[Any], Any], forward: bool) -> None:
    wsn = in_second_task()
    optimizer = wsn.guard(kind(list(wsn.parameters())))
    take_steps(wsn, optimizer, 1)
    state = copy.deepcopy(in_first_task().state_dict())
    wsn.load_state_dict(state)
    layer = wsn.model[1]
    if forward:
        wsn(batches(0, 1)[0][0])
    else:
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    assert torch.allclose(layer.weight, state["model.1.weight"], rtol=0.05, atol=0)


def test_a_failed_load_changes_nothing() -> None:
    wsn = in_second_task()
    wsn.guard(foreign.DecaysAfter(wsn.parameters()))
    state = copy.deepcopy(wsn.state_dict())
    state["model.1.weight"] += 1
    state["model.3.weight"] = torch.zeros(5, 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        wsn.load_state_dict(state)
    assert torch.equal(wsn.model[1].weight + 1, state["model.1.weight"])
    wsn(batches(1, 1)[0][0])
    assert torch.equal(wsn.model[1].weight + 1, state["model.1.weight"])
