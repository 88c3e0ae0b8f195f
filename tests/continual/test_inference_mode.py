"""Calls under ``torch.inference_mode``: what they leave behind can be trained, saved and loaded outside of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsn_fast import WSN, TaskHeads, convert, materialize, to_dense
from wsn_fast.optim import SubnetAdamW

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(2))
KINDS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one pass": lambda wsn: SubnetAdamW(wsn, 0.02, one_pass=True),
    "standard": lambda wsn: SubnetAdamW(wsn, 0.02),
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad], 0.02)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.BatchNorm1d(9), nn.Linear(9, 3))


def evaluate(wsn: WSN) -> None:
    wsn.eval()
    with wsn.use_task(0):
        wsn(X)
    wsn.forward_tasks(X, [0] * len(X))
    wsn.train()


def in_use(wsn: WSN) -> None:
    """A finished task that stays in use is what the state is taken from and loaded into."""
    with torch.inference_mode(False):
        state, best = copy.deepcopy(wsn.state_dict()), wsn.trainable_state()
    wsn.use_task(0)
    with torch.inference_mode(False):
        wsn.load_trainable_state(best)
        wsn.load_state_dict(state)
    wsn.use_task(None)


CALLS: dict[str, Callable[[WSN], object]] = {
    "evaluation": evaluate,
    "a finished task in use": in_use,
    "trainable_state": lambda wsn: wsn.load_trainable_state(wsn.trainable_state()),
    "state_dict": lambda wsn: wsn.load_state_dict(copy.deepcopy(wsn.state_dict())),
    "verify": lambda wsn: wsn.verify(),
    "questions": lambda wsn: (wsn.capacity(), wsn.task_stats(), to_dense(wsn, 0), copy.deepcopy(wsn)),
}
STEPS = ["convert", "WSN", "begin_task", "optimizer", "end_task", *CALLS]


def train(wsn: WSN, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(wsn(X), Y).backward()
        optimizer.step()


def run(kind: str, inside: str | None) -> WSN:
    """Two tasks; ``inside`` runs under inference mode."""

    def mode(name: str) -> contextlib.AbstractContextManager[object]:
        return torch.inference_mode() if name == inside else contextlib.nullcontext()

    model = net()
    with mode("convert"):
        convert(model, density=0.4, heads="3")
    with mode("WSN"):
        wsn = WSN(model, gates_ahead=True)
    for task in range(2):
        torch.manual_seed(task)
        with mode("begin_task"):
            wsn.begin_task(task)
        with mode("optimizer"):
            optimizer = KINDS[kind](wsn)
        train(wsn, optimizer)
        for name, call in CALLS.items() if task else ():
            with mode(name):
                call(wsn)
        train(wsn, optimizer)
        with mode("end_task"):
            wsn.end_task()
    wsn.verify()
    return wsn


@each_kind
@pytest.mark.parametrize("inside", STEPS)
def test_a_call_in_inference_mode_changes_no_training(kind: str, inside: str) -> None:
    mine, theirs = run(kind, inside), run(kind, None)
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b) and not a.is_inference(), name


@each_kind
def test_a_state_of_other_tasks_may_be_loaded_in_inference_mode(kind: str) -> None:
    """New heads, masks, unions and copies are made by it."""
    state = run(kind, None).state_dict()
    wsn = WSN(convert(net(), density=0.4, heads="3"))
    with torch.inference_mode():
        wsn.load_state_dict(state)
    wsn.begin_task("next")
    train(wsn, KINDS[kind](wsn))
    wsn.end_task()
    wsn.verify()
    wsn.load_state_dict(state)


def test_heads_made_in_inference_mode_are_trained() -> None:
    heads = TaskHeads(6, 3)
    with torch.inference_mode():
        heads.add("a")
    heads.active = "a"
    F.cross_entropy(heads(X), Y).backward()
    assert heads.head("a").weight.grad is not None


def test_a_model_that_gets_its_memory_in_inference_mode_is_trained() -> None:
    with torch.device("meta"):
        model = convert(net(), density=0.4, heads="3")
    with torch.inference_mode():
        materialize(model, "cpu")
    wsn = WSN(model)
    wsn.begin_task(0)
    train(wsn, KINDS["one pass"](wsn))


@pytest.mark.parametrize("what", ["weights", "statistics", "moved"])
def test_a_model_made_in_inference_mode_is_refused_with_the_way_out(what: str) -> None:
    wsn = WSN(convert(net(), density=0.4, heads="3"))
    with torch.inference_mode():
        if what == "weights":
            wsn.model[0] = convert(nn.Linear(6, 9), density=0.4)  # type: ignore[operator]
        elif what == "statistics":
            wsn.model[2].running_mean = torch.zeros(9)  # type: ignore[operator, union-attr]
        else:
            wsn.double().float()
    with pytest.raises(RuntimeError, match=r"model\.\S+|\d\.\S+ was made under torch.inference_mode\(\)"):
        wsn.begin_task(0)
    assert wsn.current_task is None and not wsn.model[3].tasks  # type: ignore[operator, union-attr]
    other = WSN(copy.deepcopy(wsn.model))
    other.begin_task(0)
    train(other, KINDS["standard"](other))


def with_two_tasks() -> WSN:
    wsn = WSN(convert(net(), 0.4, heads="3"))
    for task in (0, 1):
        wsn.begin_task(task)
        train(wsn, KINDS["guarded"](wsn))
        wsn.end_task()
    return wsn


@each_kind
@pytest.mark.parametrize("redraw_free", [False, True])
@pytest.mark.parametrize("task", [0, 1])
def test_after_a_removal_in_inference_mode_tasks_are_trained(kind: str, task: int, redraw_free: bool) -> None:
    wsn = with_two_tasks()
    with torch.inference_mode():
        wsn.remove_task(task, redraw_free=redraw_free)
    assert not any(tensor.is_inference() for tensor in wsn.state_dict().values())
    wsn.begin_task(task)
    train(wsn, KINDS[kind](wsn))
    wsn.end_task()
    wsn.verify()


def test_a_wsn_made_in_inference_mode_of_a_model_with_tasks_is_trained() -> None:
    wsn = with_two_tasks()
    with torch.inference_mode():
        wsn.model[0].weight_union = None
        again = WSN(wsn.model)
    again.begin_task(2)
    train(again, KINDS["guarded"](again))
    again.end_task()
    again.verify()
