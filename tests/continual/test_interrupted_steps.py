"""A step that an exception ends is put right by the next call into the WSN, whoever makes it, although the optimizer is
gone."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, to_dense


class Dies(torch.optim.Optimizer):
    """Moves everything, and dies."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        foreign.decay(foreign.every(self))
        raise KeyboardInterrupt


def dies_in_torch(params: Any) -> torch.optim.Optimizer:
    """An optimizer of torch, whose step fails after some parameters: the last one has a state of another shape."""
    optimizer = torch.optim.AdamW(params, 0.1, foreach=False)
    last = list(params)[-1]
    optimizer.state[last] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros(7, 7, 7), "exp_avg_sq": torch.zeros(7)}
    return optimizer


def dies_in_a_hook(params: Any) -> torch.optim.Optimizer:
    """The hook is there before the guard is, so the guard does not come to its own."""
    optimizer = torch.optim.AdamW(params, 0.1)

    def fail(*_: object) -> None:
        foreign.decay(foreign.every(optimizer))
        raise KeyboardInterrupt

    optimizer.register_step_post_hook(fail)
    return optimizer


WAYS: dict[str, Callable[[Any], Any]] = {
    "an optimizer of its own kind": Dies,
    "torch's": dies_in_torch,
    "a hook": dies_in_a_hook,
    "a subclass after its parent's step": foreign.Raises,
    "a wrapper around one that dies": lambda p: foreign.Lookahead(Dies(p)),
    "a wrapper without hooks": lambda p: foreign.LookaheadOptimizer(foreign.Raises(p)),
}


def interrupted(way: str, model: Callable[[], nn.Module] = mlp) -> tuple[WSN, Tensor]:
    """A WSN in its second task, in which a step died together with its optimizer; and the logits of the first task."""
    wsn = WSN(model())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    before = logits(wsn, 0)
    wsn.begin_task(1)
    wsn.train()

    def train() -> None:
        optimizer = wsn.guard(WAYS[way]([p for p in wsn.parameters() if p.requires_grad]))
        x, y = batches(1, 1)[0]
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()

    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        train()
    gc.collect()
    return wsn, before


def weight_of(wsn: WSN) -> Tensor:
    layer = next(iter(wsn.subnet_layers().values()))
    return layer.weight[layer.mask("weight", 0)]


CALLS: dict[str, Callable[[WSN], Any]] = {
    "verify": lambda wsn: wsn.verify(),
    "end_task": lambda wsn: wsn.end_task(),
    "forward": lambda wsn: wsn(batches(1, 1)[0][0]),
    "forward without gradients": lambda wsn: torch.no_grad()(wsn)(batches(1, 1)[0][0]),
    "use_task": lambda wsn: wsn.use_task(0),
    "use_head": lambda wsn: wsn.use_head(1),
    "state_dict": lambda wsn: wsn.state_dict(),
    "state_dict of a module around it": lambda wsn: nn.Sequential(wsn).state_dict(),
    "trainable_state": lambda wsn: wsn.trainable_state(),
    "forward_tasks": lambda wsn: wsn.eval().forward_tasks(batches(1, 1)[0][0][:2], [0, 0]),
    "forward_tasks in one pass": lambda wsn: wsn.eval().forward_tasks(batches(1, 1)[0][0][:2], [0, 0], one_pass=True),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to_dense": lambda wsn: to_dense(wsn, 0),
    "another step": lambda wsn: another_step(wsn),
}


def another_step(wsn: WSN) -> None:
    optimizer = wsn.guard(torch.optim.SGD([p for p in wsn.parameters() if p.requires_grad], 0.1))
    F.cross_entropy(wsn.model(batches(1, 1)[0][0]), batches(1, 1)[0][1]).backward()  # not through the WSN
    optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_the_next_call_puts_it_right(way: str, call: str) -> None:
    wsn, _ = interrupted(way)
    moved = weight_of(wsn).clone()
    CALLS[call](wsn)
    assert not torch.equal(weight_of(wsn), moved), "the step had moved frozen values"
    wsn.verify()


@pytest.mark.parametrize("model", [mlp, convnet])
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on(way: str, model: Callable[[], nn.Module]) -> None:
    wsn, before = interrupted(way, model)
    another_step(wsn)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)
    wsn.verify()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda wsn: pickle.loads(pickle.dumps(wsn))])
def test_a_copy_has_the_right_values(make_copy: Callable[[WSN], WSN]) -> None:
    wsn, before = interrupted("torch's")
    assert torch.equal(logits(make_copy(wsn), 0), before)


def test_a_state_of_before_is_what_is_loaded() -> None:
    """The values that the dead optimizer left behind are not put into it."""
    wsn, _ = interrupted("an optimizer of its own kind")
    other = WSN(mlp())
    run_tasks(other, [0], lambda p: torch.optim.SGD(p, 0.1))
    wsn.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.equal(logits(wsn, 0), logits(other, 0))
    wsn.verify()


@pytest.mark.parametrize(
    "move", [nn.Module.double, nn.Module.bfloat16, lambda m: m.to(memory_format=torch.channels_last)]
)
def test_a_model_that_was_moved_meanwhile(move: Callable[[nn.Module], Any]) -> None:
    wsn, _ = interrupted("an optimizer of its own kind", convnet)
    torch.manual_seed(0)  # as in the beginning of this test
    other = WSN(convnet())
    run_tasks(other, [0], lambda p: torch.optim.AdamW(p, 0.01))
    move(wsn)
    move(other)
    wsn.use_task(0)  # puts them right
    layer, same = next(iter(wsn.subnet_layers().values())), next(iter(other.subnet_layers().values()))
    assert layer.weight.dtype is same.weight.dtype
    assert torch.equal(layer.weight[layer.mask("weight", 0)], same.weight[same.mask("weight", 0)])


@pytest.mark.parametrize("way", ["torch's", "an optimizer of its own kind", "a hook"])
def test_a_part_of_the_state_is_compared_with_the_right_values(way: str) -> None:
    """A state without a register may not change what finished tasks use. What a dead step has left is not compared."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    before = logits(wsn, 0)
    part = {name: tensor.clone() for name, tensor in wsn.state_dict().items() if name.endswith((".weight", ".bias"))}
    optimizer = wsn.guard(WAYS[way]([p for p in wsn.parameters() if p.requires_grad]))
    F.cross_entropy(wsn.train()(batches(1, 1)[0][0]), batches(1, 1)[0][1]).backward()
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        optimizer.step()
    wsn.load_state_dict(part, strict=False)
    assert torch.equal(logits(wsn, 0), before)


def test_a_write_after_the_step_was_put_right_is_put_right_too() -> None:
    wsn, _ = interrupted("torch's")
    wsn(batches(1, 1)[0][0])
    frozen = weight_of(wsn).clone()
    with torch.no_grad():
        for _, gate in wsn.gated():
            gate.param.mul_(2)
    wsn(batches(1, 1)[0][0])
    assert torch.equal(weight_of(wsn), frozen)


class ThroughData(torch.optim.SGD):
    """Moves everything so that autograd does not see it, before and after a step with a closure."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.move()
        super().step(closure)
        self.move()

    def move(self) -> None:
        for param in foreign.every(self):
            param.data.mul_(0.9)


class Wrapper(foreign.Delegate):
    def step(self, closure: Any = None) -> None:
        self._inner.step(closure)
        self._inner.move()


@pytest.mark.parametrize("kind", [ThroughData, lambda p: Wrapper(ThroughData(p))])
def test_a_forward_pass_within_a_step_and_the_next_one_have_the_frozen_values(kind: Callable[[Any], Any]) -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    frozen = weight_of(wsn).clone()
    optimizer = wsn.guard(kind(wsn.parameters()))
    x, y = batches(1, 1)[0]

    def closure() -> Tensor:
        loss = F.cross_entropy(wsn(x), y)
        assert torch.equal(weight_of(wsn), frozen)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        wsn(x)
        assert torch.equal(weight_of(wsn), frozen)
