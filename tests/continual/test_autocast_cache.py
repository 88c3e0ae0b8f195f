"""Autocast keeps casts of parameters until its block is left, and looks at no versions. Whatever changes parameters in
place must make it forget them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim import SubnetAdamW, SubnetSGD

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def made() -> WSN:
    """Layer 2 is dense and per task."""
    return WSN(convert(net(), density=0.3, heads="4", exclude_modules="2"), per_task="2.*")


def finished(*tasks: int) -> WSN:
    torch.manual_seed(0)
    wsn = made()
    for task in tasks:
        wsn.begin_task(task)
        optimizer = wsn.guard(torch.optim.SGD(wsn.parameters(), 0.5))
        for _ in range(2):
            optimizer.zero_grad()
            wsn(X + task).square().mean().backward()
            optimizer.step()
        wsn.end_task()
    return wsn


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def fresh(compute: Callable[[], Tensor]) -> Tensor:
    """What is computed in an autocast block of its own."""
    with torch.no_grad(), autocast():
        return compute()


def test_tasks_that_are_used_one_after_another_in_one_block() -> None:
    wsn = finished(1, 2)
    expected = {}
    for task in (1, 2):
        with wsn.use_task(task):
            expected[task] = fresh(lambda: wsn(X))
    assert not torch.equal(expected[1], expected[2])
    with autocast():
        for task in (1, 2, 1):
            with wsn.use_task(task):
                assert torch.equal(wsn(X), expected[task])


def test_a_task_that_is_left_in_a_block() -> None:
    wsn = finished(1)
    wsn.begin_task(2)
    with torch.no_grad():
        wsn.model[2].weight.mul_(2)
    expected = fresh(lambda: wsn(X))
    with autocast():
        with wsn.use_task(1):
            wsn(X)
        assert torch.equal(wsn(X), expected)


def test_rows_of_several_tasks_in_one_block() -> None:
    wsn = finished(1, 2)
    with wsn.use_task(2):
        expected = fresh(lambda: wsn(X))
    with autocast():
        both = wsn.forward_tasks(torch.cat([X, X]), [1] * len(X) + [2] * len(X))
    assert torch.equal(both[len(X) :], expected)


def test_the_state_of_the_best_epoch_that_is_put_back_in_a_block() -> None:
    wsn = finished(1)
    wsn.begin_task(2)
    best, expected = wsn.trainable_state(), fresh(lambda: wsn(X))
    with torch.no_grad():
        wsn.model[2].weight.mul_(2)
    with autocast():
        wsn(X)
        wsn.load_trainable_state(best)
        assert torch.equal(wsn(X), expected)


def test_a_task_that_is_removed_in_a_block() -> None:
    """The next task starts from the norms of the task before, which are copied."""
    wsn = finished(1, 2)
    with torch.no_grad():
        wsn.model[2].weight_tasks[1].mul_(2)
    wsn._register.trust(wsn._parts)
    with autocast():
        wsn(X)
        wsn.remove_task(2)
        after = wsn.model[:4](X)
    assert torch.equal(after, fresh(lambda: wsn.model[:4](X)))


def test_a_checkpoint_that_is_loaded_in_a_block() -> None:
    wsn = finished(1)
    state = copy.deepcopy(wsn.state_dict())
    wsn.use_task(1)
    expected = fresh(lambda: wsn(X))
    wsn.begin_task(2)
    with torch.no_grad():
        wsn.model[2].weight.mul_(2)
    with autocast():
        wsn(X)
        wsn.load_state_dict(state, strict=False)
        with wsn.use_task(1):
            assert torch.equal(wsn(X), expected)


class Subclass(torch.optim.SGD):
    """The guard keeps copies of what is frozen for it, and none for a step."""


OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "torch, guarded": lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 0.5)),
    "a subclass, guarded": lambda wsn: wsn.guard(Subclass(wsn.parameters(), 0.5)),
    "fused, guarded": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.1, fused=True)),
    "subnet sgd": lambda wsn: SubnetSGD(wsn, 0.5),
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.1, one_pass=True),
}


@pytest.mark.parametrize("tasks", [(), (1,)], ids=["first task", "second task"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_in_a_block_is_seen_by_the_next_forward_pass(kind: str, tasks: tuple[int, ...]) -> None:
    wsn = finished(*tasks)
    wsn.begin_task(2)
    optimizer = OPTIMIZERS[kind](wsn)
    with autocast():
        for _ in range(2):
            optimizer.zero_grad()
            wsn(X).square().mean().backward()
            optimizer.step()
        after = wsn(X)
    assert torch.equal(after, fresh(lambda: wsn(X)))


def test_a_step_of_an_optimizer_without_a_guard() -> None:
    """A copy of an optimizer has no hooks. What it trains is in no finished task here."""
    wsn = made()
    wsn.begin_task(1)
    original = SubnetSGD(wsn, 0.5)
    optimizer = copy.deepcopy(original)
    optimizer.param_groups[0]["params"] = original.param_groups[0]["params"]
    with autocast():
        for _ in range(2):
            optimizer.zero_grad()
            wsn(X).square().mean().backward()
            optimizer.step()
        after = wsn(X)
    assert torch.equal(after, fresh(lambda: wsn(X)))


class CutShort(torch.optim.SGD):
    """Moves everything by hand, and then raises as an interrupted step does."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.add_(1.0)
        raise KeyboardInterrupt


def test_frozen_values_that_are_put_back_in_a_block() -> None:
    wsn = WSN(convert(net(), density=0.3, heads="4", exclude_modules="2"), frozen="2.*")
    wsn.begin_task(1)
    wsn.end_task()
    wsn.begin_task(2)
    dense = wsn.model[2].requires_grad_(True)  # only casts of parameters that require a gradient are kept
    expected = fresh(lambda: dense(X))
    optimizer = wsn.guard(CutShort(wsn.parameters(), 0.0))
    with autocast():
        wsn(X).square().mean().backward()
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        torch.clear_autocast_cache()
        assert not torch.equal(dense(X), expected)  # a cast of what the step has left
        wsn.trainable_state()  # puts frozen values back
        assert torch.equal(dense(X), expected)
