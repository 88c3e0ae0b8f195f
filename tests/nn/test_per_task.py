"""Tensors with a copy per task."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from wsn_fast.nn import per_task


@pytest.fixture
def norm() -> nn.BatchNorm1d:
    module = nn.BatchNorm1d(3)
    per_task.mark(module, per_task.norm_tensors(module))
    for value in (1.0, 2.0):
        module.running_mean.fill_(value)
        per_task.append_task(module)
    module.running_mean.fill_(3.0)
    return module


def test_rows_come_and_the_live_value_returns(norm: nn.BatchNorm1d) -> None:
    seen = []
    for row in (0, 1, 0, None):
        per_task.use_row([norm], row)
        seen.append(norm.running_mean[0].item())
    assert seen == [1.0, 2.0, 1.0, 3.0]


def test_the_live_tensor_stays_the_same_object(norm: nn.BatchNorm1d) -> None:
    address, parameter = norm.running_mean.data_ptr(), norm.weight
    per_task.use_row([norm], 0)
    assert norm.running_mean.data_ptr() == address
    assert norm.weight is parameter


def test_the_live_value_follows_the_module_while_a_row_is_in_use(norm: nn.BatchNorm1d) -> None:
    per_task.use_row([norm], 0)
    norm.double()
    per_task.use_row([norm], None)
    assert norm.running_mean.tolist() == [3.0] * 3
    assert norm.running_mean.dtype is torch.float64


def test_a_tied_tensor_keeps_its_one_live_value() -> None:
    first, second = nn.LayerNorm(3), nn.LayerNorm(3)
    second.weight = first.weight
    for module in (first, second):
        per_task.mark(module, ["weight"])
        per_task.append_task(module)
    with torch.no_grad():
        first.weight.fill_(3.0)
    per_task.use_row([first, second], 0)
    assert second.state_dict()["weight"].tolist() == [3.0] * 3
    per_task.use_row([first, second], None)
    assert first.weight.tolist() == [3.0] * 3


def test_marking_twice_is_harmless(norm: nn.BatchNorm1d) -> None:
    before = list(norm.state_dict())
    per_task.mark(norm, per_task.norm_tensors(norm))
    assert list(norm.state_dict()) == before
    assert before == [
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked", "weight_tasks", "bias_tasks",
        "running_mean_tasks", "running_var_tasks", "num_batches_tracked_tasks",
    ]  # fmt: skip


def test_unmarking_leaves_an_ordinary_module(norm: nn.BatchNorm1d) -> None:
    per_task.unmark(norm)
    plain = nn.BatchNorm1d(3)
    assert list(norm.state_dict()) == list(plain.state_dict())
    assert norm.__dict__.keys() == plain.__dict__.keys()
    plain.load_state_dict(norm.state_dict())
    per_task.mark(norm, ["weight"])


def test_loading_makes_room_for_the_tasks_of_the_checkpoint(norm: nn.BatchNorm1d) -> None:
    fresh = nn.BatchNorm1d(3)
    per_task.mark(fresh, per_task.norm_tensors(fresh))
    fresh.load_state_dict(norm.state_dict(), strict=True)
    assert per_task.value(fresh, "running_mean", 1).tolist() == [2.0] * 3


def test_loading_while_a_row_is_in_use_is_not_undone_later(norm: nn.BatchNorm1d) -> None:
    state = copy.deepcopy(norm.state_dict())
    state["running_mean"].fill_(5.0)
    per_task.use_row([norm], 0)
    norm.load_state_dict(state)
    per_task.use_row([norm], None)
    assert norm.running_mean.tolist() == [5.0] * 3


def test_hooks_survive_a_deep_copy(norm: nn.BatchNorm1d) -> None:
    twin = copy.deepcopy(norm)
    per_task.use_row([twin], 0)
    assert twin.state_dict()["running_mean"].tolist() == [3.0] * 3


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm1d(2, affine=True),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.RMSNorm(2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_norms_of_torch(module: nn.Module) -> None:
    assert per_task.is_norm(module)
    assert "weight" in per_task.norm_tensors(module)


def test_what_is_no_norm() -> None:
    assert not per_task.is_norm(nn.Linear(2, 2))
    assert not per_task.is_norm(nn.Sequential(nn.LayerNorm(2)))
    assert not per_task.is_norm(type("NormalizedLinear", (nn.Linear,), {})(2, 2))
