"""``state["step"]`` of every parameter is the number of its own updates, although the numbers of all gated tensors of a
model are raised together."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_pass_models import MODES, each_backend
from optimizer_pairs import by_kind
from plan_changes import Run, make_run, of_a_layer, of_all
from torch import Tensor

from wsn_fast import ops
from wsn_fast.optim import SubnetAdamW

__all__ = ["each_backend"]


def begun(one_pass: bool, backend: str | None = "torch", steps: int = 0) -> Run:
    run = make_run("adamw", one_pass, True, backend)
    for _ in range(steps):
        run.step()
    return run


def counts(run: Run) -> dict[str, float]:
    """By parameter. Every number is a tensor of its own shape, dtype and device, as torch has it."""
    found = {}
    for name, param in run.wsn.named_parameters():
        step = run.optimizer.state[param]["step"]
        assert step.shape == () and step.dtype is torch.float32 and step.device == param.device
        found[name] = float(step)
    return found


def assert_counts(run: Run, expected: float, of_layer: float | None = None) -> None:
    """``of_layer`` is the number of the tensors of layer 2, if it is another one."""
    found = counts(run)
    mine = {name for name in found if name.startswith("model.2.")}
    assert len(mine) == 4 and len(found) > 8
    assert found == {name: expected if of_layer is None or name not in mine else of_layer for name in found}


# --- steps
@MODES
def test_every_step_counts_once(one_pass: bool, each_backend: str) -> None:
    run = begun(one_pass, each_backend)
    for i in range(4):
        run.step()
        assert_counts(run, i + 1)


@MODES
def test_clipping_does_not_count(one_pass: bool) -> None:
    run = begun(one_pass)
    for i in range(2):
        run.step(before=lambda: run.optimizer.clip_grad_norm_(0.1))
        assert_counts(run, i + 1)


@MODES
def test_a_step_without_a_gradient_does_not_count(one_pass: bool, each_backend: str) -> None:
    run = begun(one_pass, each_backend)
    of_layer = 0
    for i, without in enumerate((False, True, True, False, False, True, False)):
        run.step(*([of_a_layer] if without else []))
        of_layer += not without
        assert_counts(run, i + 1, of_layer)


@MODES
def test_a_parameter_may_be_updated_later_than_the_others(one_pass: bool) -> None:
    run = begun(one_pass)
    run.step(of_a_layer)
    assert "step" not in run.optimizer.state.get(run.weight("2"), {})
    run.step()
    assert_counts(run, 2, 1)
    run.step(of_all)
    assert_counts(run, 2, 1)


def test_all_numbers_are_raised_by_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that were loaded. Each by itself would take a launch on a GPU."""
    run, raised = begun(True, steps=1), []
    add = torch._foreach_add_

    def counted(tensors: list[Tensor], *value: Any) -> None:
        mine = run.optimizer.state[run.weight()]["step"].untyped_storage().data_ptr()
        raised.extend([len(tensors)] if any(t.untyped_storage().data_ptr() == mine for t in tensors) else [])
        add(tensors, *value)

    monkeypatch.setattr(torch, "_foreach_add_", counted)
    run.step()
    run.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    run.step()
    assert raised == [1, 1]
    assert_counts(run, 3)


# --- a step that fails
class Failure(Exception):
    """What a backend raises in these tests."""


def failing(call: Callable[..., None], times: list[bool]) -> Callable[..., None]:
    """``call``, which raises an exception once in every call for which ``times`` says so."""
    left = iter(times)

    def run(*args: Any) -> None:
        if next(left):
            raise Failure
        call(*args)

    return run


@MODES
@pytest.mark.parametrize("without", [False, True], ids=["all gradients", "some gradients"])
def test_a_step_that_failed_does_not_count(without: bool, one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(one_pass, steps=2)

    def failed() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ops, "adamw_step", failing(ops.adamw_step, [True]))
            with pytest.raises(Failure):
                run.optimizer.step()
        assert_counts(run, 2)

    run.step(*([of_a_layer] if without else []), before=failed)
    assert_counts(run, 3, 2 if without else 3)


def test_only_the_calls_that_were_made_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call for the first backend is made, the one for the second fails."""
    run = begun(False, steps=2)
    run.layer("2").backend = "native"
    monkeypatch.setattr(ops, "adamw_step", failing(ops.adamw_step, [False, True]))
    with pytest.raises(Failure):
        run.step()
    layer, other = run.layer("2"), run.layer("0")
    assert [float(run.optimizer.state[p]["step"]) for p in (other.weight, other.bias_score)] == [3, 3]
    assert [float(run.optimizer.state[p]["step"]) for p in (layer.weight, layer.bias_score)] == [2, 2]


# --- states that come and go
def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file)
    return loaded


WAYS = pytest.mark.parametrize(
    "way", [copy.deepcopy, through_a_file, lambda state: state], ids=["copy", "file", "same"]
)


def torchs(run: Run) -> Run:
    """The same model with an optimizer of torch, which is guarded from now on."""
    optimizer = torch.optim.AdamW(by_kind(run.wsn, 0.1), 0.01)
    run.wsn.guard(optimizer)
    return Run(run.wsn, optimizer, run.seed)


def subnets(run: Run, one_pass: bool) -> Run:
    return Run(run.wsn, SubnetAdamW(run.wsn, 0.01, weight_decay=0.1, one_pass=one_pass), run.seed)


@MODES
@WAYS
def test_numbers_go_to_torch_and_back(one_pass: bool, way: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    mine = begun(one_pass, steps=2)
    mine.step(of_a_layer)
    theirs = torchs(mine)
    theirs.optimizer.load_state_dict(way(mine.optimizer.state_dict()))
    assert_counts(theirs, 3, 2)
    for _ in range(2):
        theirs.step()
    assert_counts(theirs, 5, 4)
    again = subnets(theirs, one_pass)
    again.optimizer.load_state_dict(way(theirs.optimizer.state_dict()))
    assert_counts(again, 5, 4)
    again.step()
    again.step(of_a_layer)
    assert_counts(again, 7, 5)


@MODES
@WAYS
def test_numbers_go_to_another_optimizer_of_the_kind(
    one_pass: bool, way: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    first = begun(one_pass, steps=2)
    second = subnets(first, one_pass)
    second.optimizer.load_state_dict(way(first.optimizer.state_dict()))
    for i in range(2):
        second.step()
        assert_counts(second, 3 + i)


@MODES
def test_numbers_may_be_loaded_between_steps(one_pass: bool) -> None:
    run = begun(one_pass, steps=1)
    early = copy.deepcopy(run.optimizer.state_dict())
    for expected in (2, 3):
        run.step()
        assert_counts(run, expected)
    for state in (early, run.optimizer.state_dict()):
        run.optimizer.load_state_dict(state)
    run.optimizer.load_state_dict(early)
    assert_counts(run, 1)
    run.step()
    assert_counts(run, 2)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_may_be_set(dtype: torch.dtype, one_pass: bool, each_backend: str) -> None:
    """In its place, and as another tensor."""
    run = begun(one_pass, each_backend, steps=2)
    weight, score = run.weight("2"), run.layer("2").weight_score
    run.optimizer.state[weight]["step"].fill_(70)
    run.optimizer.state[score]["step"] = torch.tensor(40.0, dtype=dtype)
    run.step()
    found = {name: float(run.optimizer.state[param]["step"]) for name, param in run.wsn.named_parameters()}
    assert (found.pop("model.2.weight"), found.pop("model.2.weight_score")) == (71, 41)
    assert {*found.values()} == {3}


def test_a_state_dict_does_not_change_with_later_steps() -> None:
    """If it was copied, as torch says."""
    run = begun(True, steps=2)
    state = copy.deepcopy(run.optimizer.state_dict())
    run.step()
    steps: list[Tensor] = [one["step"] for one in state["state"].values()]
    assert {*map(float, steps)} == {2.0}
