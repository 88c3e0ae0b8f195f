"""A finished task can be removed, and every other task stays what it is, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import foreign_optimizers as foreign
import pytest
import torch
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import Tensor, nn

from wsn_fast import WSN, convert, ops
from wsn_fast.optim import SubnetAdamW, SubnetSGD


def adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)  # type: ignore[arg-type]


@pytest.fixture(params=[mlp, convnet])
def wsn(request: pytest.FixtureRequest) -> WSN:
    wsn = WSN(request.param(0.2), reinit_scores=True)
    run_tasks(wsn, [0, 1, 2], adamw)
    return wsn


def masks(wsn: WSN, row: int) -> dict[str, Tensor]:
    return {name: ops.unpack_mask(gate.masks[row], gate.param.shape) for name, gate in wsn.gated()}


@pytest.mark.parametrize("redraw_free", [False, True])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_other_tasks_stay_to_the_bit(wsn: WSN, task: int, redraw_free: bool) -> None:
    others = [other for other in (0, 1, 2) if other != task]
    before = {other: logits(wsn, other) for other in others}
    wsn.remove_task(task, redraw_free=redraw_free)
    assert wsn.tasks == others and wsn.verify().tasks == others
    assert all(torch.equal(logits(wsn, other), before[other]) for other in others)
    run_tasks(wsn, [3, task], adamw)
    wsn.verify()
    assert all(torch.equal(logits(wsn, other), before[other]) for other in others)


def test_everything_of_the_task_is_gone(wsn: WSN) -> None:
    wsn.remove_task(1)
    for layer in wsn.subnet_layers().values():
        assert layer.tasks == [0, 2] and len(layer.weight_masks) == len(layer.bias_masks) == 2
    assert wsn.model[-1].tasks == [0, 2]
    assert all(len(t) == 2 for name, t in wsn.model.named_buffers() if name.endswith("_tasks"))
    assert not any("i1" in name for name in wsn.state_dict())
    with pytest.raises(ValueError, match="task 1 is unknown"):
        wsn.use_task(1)


def test_what_it_alone_used_is_drawn_anew_and_free(wsn: WSN) -> None:
    first, second, third = (masks(wsn, row) for row in range(3))
    used = {name: mask & ~(first[name] | third[name]) for name, mask in second.items()}
    before = {name: (gate.param.detach().clone(), gate.score.detach().clone()) for name, gate in wsn.gated()}
    wsn.remove_task(1)
    for name, gate in wsn.gated():
        assert used[name].any() or gate.param.numel() < 20
        for now, then in ((gate.param, before[name][0]), (gate.score, before[name][1])):
            assert torch.equal(now != then, used[name]), name
        assert not ops.unpack_mask(gate.union, gate.param.shape)[used[name]].any()


def test_all_free_weights_and_all_scores_are_drawn_where_asked_for(wsn: WSN) -> None:
    before = {name: (gate.param.detach().clone(), gate.score.detach().clone()) for name, gate in wsn.gated()}
    wsn.remove_task(1, redraw_free=True)
    for name, gate in wsn.gated():
        assert torch.equal(gate.param != before[name][0], ~ops.unpack_mask(gate.union, gate.param.shape)), name
        assert (gate.score != before[name][1]).all()


def test_the_freed_weights_train_again(wsn: WSN) -> None:
    used = {name: gate.union.clone() for name, gate in wsn.gated()}
    for task in (0, 1, 2):
        wsn.remove_task(task)
    assert wsn.tasks == [] and all(gate.union is None for _, gate in wsn.gated())
    before = {name: gate.param.detach().clone() for name, gate in wsn.gated()}
    run_tasks(wsn, [0], adamw)
    moved = {name: gate.param != before[name] for name, gate in wsn.gated()}
    assert all((moved[name] & ops.unpack_mask(used[name], moved[name].shape)).any() for name in moved)


@pytest.mark.parametrize("make", [
    adamw,
    lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=True),
    lambda wsn: SubnetSGD(wsn, 0.1, 0.9),
], ids=["AdamW", "one-pass", "SGD"])  # fmt: skip
def test_training_goes_on_with_every_optimizer(make: Callable[..., torch.optim.Optimizer]) -> None:
    wsn = WSN(convnet(0.2))
    run_tasks(wsn, [0, 1], adamw)
    before = logits(wsn, 1)
    wsn.remove_task(0)
    wsn.begin_task(2)
    optimizer = make(wsn.parameters()) if make is adamw else make(wsn)
    train(wsn, wsn.guard(optimizer), batches(2, 5))
    wsn.end_task()
    wsn.verify()
    assert torch.equal(logits(wsn, 1), before)


def test_a_removed_task_does_not_come_back_with_the_state(wsn: WSN) -> None:
    kind = convnet if len(wsn.model) > 6 else mlp
    wsn.remove_task(0)
    state = copy.deepcopy(wsn.state_dict())
    other = WSN(kind(0.2))
    other.load_state_dict(state)
    assert other.verify().tasks == [1, 2]
    assert all(torch.equal(logits(other, task), logits(wsn, task)) for task in (1, 2))
    wsn.capacity(), wsn.task_stats()
    other.remove_task(2)
    other.load_state_dict(state)
    assert other.verify().tasks == [1, 2]


def test_the_capacity_is_that_of_the_remaining_tasks(wsn: WSN) -> None:
    before = wsn.capacity()
    wsn.remove_task(1)
    after = wsn.capacity()
    assert after.tasks == 2 and after.union_density < before.union_density
    fresh = WSN(copy.deepcopy(wsn.model))
    assert after == fresh.capacity()


def test_a_task_in_use_can_be_removed(wsn: WSN) -> None:
    with wsn.use_task(1):
        wsn.remove_task(1)
    assert wsn.model[0 if len(wsn.model) > 6 else 1].active_row is None
    wsn.begin_task(5)
    wsn(batches(5, 1)[0][0])


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_that_was_in_use_before_the_one_in_use_can_be_removed(wsn: WSN, task: int) -> None:
    with wsn.use_task(task):
        with wsn.use_task(2):
            wsn.remove_task(task)
        assert wsn._view.task is None
    assert wsn.verify().tasks == [other for other in (0, 1, 2) if other != task]


@pytest.mark.parametrize("task", [0, 1])
def test_norms_stay_where_they_are_when_an_earlier_task_is_removed(wsn: WSN, task: int) -> None:
    norms = [m for m in wsn.model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    before = [norm.weight.detach().clone() for norm in norms]
    wsn.remove_task(task)
    assert all(torch.equal(norm.weight, kept) for norm, kept in zip(norms, before, strict=True))


def test_the_next_task_starts_from_the_norms_of_the_task_before(wsn: WSN) -> None:
    norms = [m for m in wsn.model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    wsn.remove_task(2)
    assert all(torch.equal(norm.weight, norm.weight_tasks[-1]) for norm in norms)


def test_frozen_parameters_train_again_when_no_task_is_left() -> None:
    wsn = WSN(nn.Sequential(nn.Flatten(), nn.Linear(36, 36), *mlp(0.2)[1:]), frozen="1.*")
    run_tasks(wsn, [0, 1], adamw)
    wsn.remove_task(0)
    assert not wsn.model[1].weight.requires_grad
    wsn.remove_task(1)
    assert wsn.model[1].weight.requires_grad


@pytest.mark.parametrize("kind", [foreign.DecaysAfter, foreign.WithoutHooks, lambda p: foreign.Delegate(adamw(p))])
def test_frozen_parameters_train_again_with_the_optimizer_of_before(kind: Callable[..., torch.optim.Optimizer]) -> None:
    wsn = WSN(nn.Sequential(nn.Flatten(), nn.Linear(36, 36), *mlp(0.2)[1:]), frozen="1.*")
    run_tasks(wsn, [0], adamw)
    optimizer = wsn.guard(kind(list(wsn.parameters())))
    wsn.remove_task(0)
    wsn.begin_task(1)
    before = wsn.model[1].weight.detach().clone()
    optimizer.param_groups[0]["params"] += list(wsn.model[-1].head(1).parameters())
    train(wsn, optimizer, batches(1, 1))
    wsn.end_task()
    assert not torch.equal(wsn.model[1].weight, before)


def test_tied_layers_lose_the_task_together() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    wsn = WSN(convert(model, 0.3), reinit_scores=True)
    for task in "abc":
        wsn.begin_task(task)
        wsn.end_task()
    wsn.remove_task("b")
    assert wsn.verify().tasks == ["a", "c"]
    assert torch.equal(wsn.model[0].weight_masks, wsn.model[2].weight_masks)


def test_what_cannot_be_removed_is_refused(wsn: WSN) -> None:
    with pytest.raises(ValueError, match=r"task 9 has not ended; finished tasks: \[0, 1, 2\]"):
        wsn.remove_task(9)
    wsn.begin_task(9)
    with pytest.raises(RuntimeError, match="task 9 is in progress"):
        wsn.remove_task(1)
    wsn.end_task()
    wsn.verify()
