"""Every parameter and buffer that tasks share has an owner, or training does not start."""

from __future__ import annotations

import pytest
import torch
from small_models import batches, logits, train
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, OwnershipError, TaskHeads


class Model(nn.Module):
    """A token parameter, a dense layer, a constant buffer, a gated layer and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(36))
        self.dense = nn.Linear(36, 36)
        self.register_buffer("scale", torch.tensor(2.0))
        self.gated = FastSubnetLinear(36, 12)
        self.heads = TaskHeads(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dense(x.flatten(1) + self.token) * self.scale
        out: Tensor = self.heads(self.gated(hidden).relu())
        return out


ALL = {"per_task": "token", "frozen": ["dense.*", "scale"]}


def two_tasks(wsn: WSN) -> tuple[Tensor, Tensor]:
    """The logits of the first task, when it ended and after the second."""
    for task in (0, 1):
        wsn.begin_task(task)
        train(wsn, wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)), batches(task, 5))
        wsn.end_task()
        if task == 0:
            first = logits(wsn, 0)
    return first, logits(wsn, 0)


def test_all_without_an_owner_are_named_before_any_training() -> None:
    wsn = WSN(Model())
    with pytest.raises(OwnershipError) as caught:
        wsn.begin_task(0)
    assert caught.value.names == ["token", "scale", "dense.weight", "dense.bias"]
    assert "dense.bias" in str(caught.value)
    assert wsn.current_task is None
    assert wsn.model.heads.tasks == []


def test_per_task_and_frozen_keep_the_promise() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    first, later = two_tasks(wsn)
    assert torch.equal(first, later)
    assert wsn.verify().shared == []


def test_per_task_values_differ_between_tasks() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    two_tasks(wsn)
    with wsn.use_task(0):
        first = wsn.model.token.clone()
    with wsn.use_task(1):
        assert not torch.equal(wsn.model.token, first)


def test_frozen_is_trained_in_the_first_task_only() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    values = [wsn.model.dense.weight.detach().clone()]
    for task in (0, 1):
        wsn.begin_task(task)
        train(wsn, wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)), batches(task, 3))
        wsn.end_task()
        values.append(wsn.model.dense.weight.detach().clone())
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])


def test_shared_may_forget_and_reports_say_so() -> None:
    wsn = WSN(Model(), per_task="token", shared=["dense.*", "scale"])
    first, later = two_tasks(wsn)
    assert not torch.equal(first, later)
    assert wsn.verify().shared == ["scale", "dense.weight", "dense.bias"]


def test_a_changed_frozen_buffer_is_found() -> None:
    wsn = WSN(Model(), **ALL)  # type: ignore[arg-type]
    two_tasks(wsn)
    wsn.model.scale.mul_(2)
    with pytest.raises(RuntimeError, match="task 0: scale"):
        wsn.verify()


def test_norms_may_be_declared_otherwise() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.LayerNorm(12), TaskHeads(12, 3))
    wsn = WSN(model, frozen="1.*")
    assert list(wsn.model[1].state_dict()) == ["weight", "bias"]


def test_running_statistics_cannot_be_frozen() -> None:
    model = nn.Sequential(FastSubnetLinear(36, 12), nn.BatchNorm1d(12), TaskHeads(12, 3))
    with pytest.raises(ValueError, match=r"1\.running_mean cannot be frozen"):
        WSN(model, frozen="1.*")


class MyRMSNorm(nn.Module):
    """A norm of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(12))


def test_norms_are_known_by_their_name_too() -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(36, 12), MyRMSNorm(), TaskHeads(12, 3)))
    wsn.begin_task(0)


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match="frozen='embedding' matches no parameter or buffer"):
        WSN(Model(), frozen=["embedding"])


def test_a_pattern_that_is_no_string() -> None:
    with pytest.raises(TypeError, match="shared must be name patterns"):
        WSN(Model(), shared=[3])  # type: ignore[list-item]


def test_two_owners() -> None:
    with pytest.raises(ValueError, match="token is declared as frozen and as shared"):
        WSN(Model(), frozen="token", shared="*")


def test_a_parameter_tied_to_a_gated_one() -> None:
    model = Model()
    model.dense.weight = nn.Parameter(torch.randn(12, 36))
    model.gated.weight = model.dense.weight
    with pytest.raises(ValueError, match=r"dense\.weight and the gated gated\.weight are one tied parameter"):
        WSN(model, **ALL)  # type: ignore[arg-type]


def test_one_parameter_with_two_owners() -> None:
    model = Model()
    model.extra = nn.Module()
    model.extra.token = model.token
    with pytest.raises(ValueError, match=r"token \(per_task\) and extra\.token \(frozen\)"):
        WSN(model, per_task="tok[e]n", frozen=["dense.*", "scale", "extra.token"])
