"""Averages of weights: with ``averaging`` they leave finished tasks as they are, and others are found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks
from torch import Tensor, nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)  # fmt: skip

from wsn_fast import WSN, ForgottenError
from wsn_fast.optim import SubnetAdamW, averaging

FUNCTIONS: dict[str, dict[str, Any]] = {
    "EMA": {"avg_fn": get_ema_avg_fn(0.9)},
    "EMA of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "SWA": {},
    "SWA, torch's": {"avg_fn": get_swa_avg_fn()},
    "SWA of lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
}
BY_PARAMETERS = "parameter by parameter"
PUT_BACK: dict[str, Callable[[WSN, WSN], Any]] = {
    "trainable state": lambda wsn, averaged: wsn.load_trainable_state(averaged.trainable_state()),
    "state_dict": lambda wsn, averaged: wsn.load_state_dict(averaged.state_dict()),
    BY_PARAMETERS: lambda wsn, averaged: put_parameters(wsn, averaged),
}


@torch.no_grad()
def put_parameters(wsn: nn.Module, averaged: nn.Module) -> None:
    for param, mean in zip(wsn.parameters(), averaged.parameters(), strict=True):
        param.copy_(mean)


def adamw(wsn: WSN) -> torch.optim.Optimizer:
    return wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01))


def train(wsn: WSN, optimizer: torch.optim.Optimizer, task: int, after: Callable[[], Any], steps: int = 5) -> None:
    wsn.train()
    for x, y in batches(task, steps):
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("put_back", PUT_BACK)
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("model", [mlp, convnet])
def test_an_averaged_model_keeps_and_gives_back(
    name: str, model: Callable[[], nn.Module], use_buffers: bool, put_back: str
) -> None:
    wsn, known = WSN(model()), {}
    for task in range(3):
        wsn.begin_task(task)
        averaged = AveragedModel(
            wsn, multi_avg_fn=averaging(wsn, **FUNCTIONS[name]), use_buffers=use_buffers  # type: ignore[arg-type]
        )  # fmt: skip
        train(wsn, adamw(wsn), task, lambda averaged=averaged: averaged.update_parameters(wsn))
        for old, then in known.items():  # the average is a model of its own
            assert torch.equal(logits(averaged.module, old), then)
        PUT_BACK[put_back](wsn, averaged.module)
        wsn.end_task()
        known[task] = logits(wsn, task)
        for old, then in known.items():
            assert torch.equal(logits(wsn, old), then)
    wsn.verify()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_may_move_is_averaged_as_torch_does_it(name: str) -> None:
    """In the first task everything may move."""
    wsn = WSN(convnet())
    wsn.begin_task(0)
    averaged = AveragedModel(wsn, multi_avg_fn=averaging(wsn, **FUNCTIONS[name]))  # type: ignore[arg-type]
    plain = AveragedModel(wsn, **FUNCTIONS[name])
    train(wsn, adamw(wsn), 0, lambda: (averaged.update_parameters(wsn), plain.update_parameters(wsn)))
    for (param, mean), other in zip(averaged.module.named_parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(mean, other, msg=param)
    assert not torch.equal(averaged.module.model[0].weight, wsn.model[0].weight)


def test_in_the_second_task_only_what_may_move_is_averaged() -> None:
    wsn = WSN(convnet())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    averaged = AveragedModel(wsn, multi_avg_fn=averaging(wsn, get_ema_avg_fn(0.5)), use_buffers=True)  # type: ignore[arg-type]
    train(wsn, adamw(wsn), 1, lambda: averaged.update_parameters(wsn))
    mean, now = averaged.module.model[4], wsn.model[4]
    mask = now.mask("weight", 0)
    assert torch.equal(mean.weight[mask], now.weight[mask])
    assert (mean.weight != now.weight)[~mask].any() and (mean.weight_score != now.weight_score).any()
    assert torch.equal(mean.weight_masks, now.weight_masks)
    mean, now = averaged.module.model[-1], wsn.model[-1]
    assert torch.equal(mean.head(0).weight, now.head(0).weight)
    assert not torch.equal(mean.head(1).weight, now.head(1).weight)
    mean, now = averaged.module.model[1], wsn.model[1]
    assert torch.equal(mean.running_mean_tasks, now.running_mean_tasks)
    assert not torch.equal(mean.running_mean, now.running_mean)
    assert torch.equal(mean.num_batches_tracked, now.num_batches_tracked)


@pytest.mark.parametrize("make", [
    lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=True),
    lambda wsn: wsn.guard(foreign.MuonLike(wsn.parameters())),
    lambda wsn: wsn.guard(foreign.Lookahead(torch.optim.AdamW(wsn.parameters(), 0.01))),
])  # fmt: skip
def test_with_other_optimizers(make: Callable[[WSN], Any]) -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    before = logits(wsn, 0)
    wsn.begin_task(1)
    averaged = AveragedModel(wsn, multi_avg_fn=averaging(wsn, get_ema_avg_fn(0.9)))  # type: ignore[arg-type]
    train(wsn, make(wsn), 1, lambda: averaged.update_parameters(wsn))
    PUT_BACK["trainable state"](wsn, averaged.module)
    wsn.end_task()
    assert torch.equal(logits(wsn, 0), before)
    wsn.verify()


def test_a_loop_over_a_state_dict() -> None:
    wsn = WSN(convnet())
    run_tasks(wsn, [0, 1], lambda p: torch.optim.AdamW(p, 0.01))
    before = [logits(wsn, task) for task in (0, 1)]
    wsn.begin_task(2)
    average = averaging(wsn, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mean = copy.deepcopy(wsn.state_dict())
    count = 0

    def update() -> None:
        nonlocal count
        count += 1
        now = wsn.state_dict()
        average([mean[name] for name in now], [*now.values()], count)

    train(wsn, adamw(wsn), 2, update)
    assert not torch.equal(mean["model.0.weight"], wsn.model[0].weight)
    wsn.load_state_dict(mean)
    wsn.end_task()
    assert [torch.equal(logits(wsn, task), then) for task, then in enumerate(before)] == [True, True]
    wsn.verify()


def test_tensors_of_other_modules_are_averaged_too() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    whole = nn.ModuleDict({"wsn": wsn, "other": nn.Linear(2, 2)})
    averaged = AveragedModel(whole, multi_avg_fn=averaging(wsn))  # type: ignore[arg-type]
    for value in (0.0, 3.0, 6.0):
        nn.init.constant_(whole["other"].weight, value)
        averaged.update_parameters(whole)
    torch.testing.assert_close(averaged.module["other"].weight, torch.full((2, 2), 3.0))


# --- after the task ---------------------------------------------------------------------------------------------------
def values(module: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("next_task", [True, False])
@pytest.mark.parametrize("model", [mlp, convnet])
def test_an_update_after_the_task_has_ended_changes_nothing(
    use_buffers: bool, next_task: bool, model: Callable[[], nn.Module]
) -> None:
    wsn = WSN(model())
    wsn.begin_task(0)
    averaged = AveragedModel(wsn, multi_avg_fn=averaging(wsn), use_buffers=use_buffers)  # type: ignore[arg-type]
    train(wsn, adamw(wsn), 0, lambda: averaged.update_parameters(wsn))
    wsn.end_task()
    if next_task:
        wsn.begin_task(1)
    before, count = values(averaged.module), averaged.n_averaged.item()
    message = "begin new averages in every task" if next_task else "nothing may change: no task is in progress"
    if use_buffers:  # torch notices first that the buffers of the two are no longer the same
        message = "must be on the same device"
    with pytest.raises(RuntimeError, match=message):
        averaged.update_parameters(wsn)
    assert all(map(torch.equal, before, values(averaged.module))) and averaged.n_averaged == count


def test_an_update_while_a_finished_task_is_in_use_is_refused() -> None:
    wsn = WSN(convnet())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    averaged = AveragedModel(wsn, multi_avg_fn=averaging(wsn))  # type: ignore[arg-type]
    averaged.update_parameters(wsn)
    with wsn.use_task(0), pytest.raises(RuntimeError, match="a finished task is in use"):
        averaged.update_parameters(wsn)
    averaged.update_parameters(wsn)


def test_copies_of_the_tensors_are_refused() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    params = list(wsn.parameters())
    copies = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="current holds no tensor of wsn"):
        averaging(wsn)(copies, copies, 1)


def test_tensors_of_another_shape_are_refused_before_anything_changes() -> None:
    wsn = WSN(mlp())
    wsn.begin_task(0)
    params = [p.detach() for p in wsn.parameters()]
    means = [torch.zeros_like(p) for p in params]
    means[-1] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"averaged\[9\] has shape \(7,\), and current\[9\] \(3,\)"):
        averaging(wsn)(means, params, 1)
    assert not any(mean.any() for mean in means)
    with pytest.raises(ValueError, match="must have the same length, got 1 and 10"):
        averaging(wsn)(means[:1], params, 1)


@pytest.mark.parametrize(("arguments", "error"), [
    ({"wsn": nn.Linear(1, 1)}, TypeError), ({"avg_fn": get_swa_avg_fn(), "multi_avg_fn": print}, ValueError),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"wsn must be|only one of avg_fn"):
        averaging(**{"wsn": WSN(mlp()), **arguments})


# --- what averages without it ----------------------------------------------------------------------------------------
def ema_of_state(wsn: WSN) -> tuple[Callable[[], None], Callable[[], None]]:
    """As many programs do it by hand."""
    mean = copy.deepcopy(wsn.state_dict())

    def update() -> None:
        for name, value in wsn.state_dict().items():
            if value.is_floating_point():
                mean[name].mul_(0.9).add_(value, alpha=0.1)

    return update, lambda: wsn.load_state_dict(mean)  # type: ignore[return-value]


def ema_model(wsn: WSN) -> tuple[Callable[[], None], Callable[[], None]]:
    averaged = AveragedModel(wsn, avg_fn=get_ema_avg_fn(0.9))
    return lambda: averaged.update_parameters(wsn), lambda: put_parameters(wsn, averaged.module)


def ema_model_with_buffers(wsn: WSN) -> tuple[Callable[[], None], Callable[[], None]]:
    averaged = AveragedModel(wsn, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    return lambda: averaged.update_parameters(wsn), lambda: wsn.load_state_dict(averaged.module.state_dict())  # type: ignore[return-value]


def ema_over_data(wsn: WSN) -> tuple[Callable[[], None], Callable[[], None]]:
    """A copy of an earlier time, mixed in without autograd seeing it."""
    mean = [p.detach().clone() for p in wsn.parameters()]

    def put_back() -> None:
        for p, m in zip(wsn.parameters(), mean, strict=True):
            p.data.copy_(0.999 * p.data + 0.001 * m)

    return lambda: None, put_back


@pytest.mark.parametrize("average", [ema_of_state, ema_model, ema_model_with_buffers, ema_over_data])
@pytest.mark.parametrize("model", [mlp, convnet])
def test_other_averages_are_found_at_the_end_of_the_task(
    average: Callable[[WSN], tuple[Callable[[], None], Callable[[], None]]], model: Callable[[], nn.Module]
) -> None:
    wsn = WSN(model())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    update, put_back = average(wsn)
    train(wsn, adamw(wsn), 1, update)
    put_back()
    with pytest.raises(ForgottenError, match=r"an average of weights \(use wsn_fast\.optim\.averaging\)"):
        wsn.end_task()


def test_a_state_with_averaged_frozen_values_is_not_loaded() -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    mean = wsn.trainable_state()
    train(
        wsn,
        adamw(wsn),
        1,
        lambda: [
            m.mul_(0.9).add_(v, alpha=0.1) for m, v in zip(mean.values(), wsn.trainable_state().values(), strict=True)
        ],
    )
    with pytest.raises(ValueError, match="it would change what finished tasks use"):
        wsn.load_trainable_state(mean)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_function_serves_the_averages_of_every_task(name: str) -> None:
    wsn = WSN(mlp())
    function = averaging(wsn, **FUNCTIONS[name])
    for task in (0, 1):
        wsn.begin_task(task)
        averaged = AveragedModel(wsn, multi_avg_fn=function)
        train(wsn, adamw(wsn), task, lambda averaged=averaged: averaged.update_parameters(wsn))
        wsn.load_trainable_state(averaged.module.trainable_state())
        wsn.end_task()
    wsn.verify()
