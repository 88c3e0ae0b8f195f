"""Parts of a state that only some models have, and states that lack them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import convnet, logits, mlp, run_tasks
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, StateError, TaskHeads


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 0.01)


class Scaled(nn.Module):
    """Has a parameter, and a buffer of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("sign", torch.tensor([True, False, True, True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.sign, x, -x) * self.scale


def finished(**owners: Any) -> WSN:
    wsn = WSN(nn.Sequential(Scaled(), *mlp()), **owners)
    run_tasks(wsn, [0], adamw, steps=2)
    return wsn


def made(**owners: Any) -> WSN:
    return WSN(nn.Sequential(Scaled(), *mlp()), **owners)


def refused(wsn: WSN, state: dict[str, Any], match: str, **how: Any) -> None:
    before = copy.deepcopy(wsn.state_dict())
    with pytest.raises(StateError, match=match):
        wsn.load_state_dict(state, **how)
    after = wsn.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
def test_bools_are_not_made_of_numbers(dtype: torch.dtype) -> None:
    state = dict(finished(frozen="0.*").state_dict())
    state["model.0.sign"] = state["model.0.sign"].to(dtype) * 3
    refused(made(frozen="0.*"), state, r"dtype mismatch for model\.0\.sign")


@pytest.mark.parametrize("name", ["scale", "sign"])
def test_a_tensor_that_is_declared_frozen_may_not_be_missing(name: str) -> None:
    state = dict(finished(frozen="0.*").state_dict())
    del state[f"model.0.{name}"]
    refused(made(frozen="0.*"), state, rf"lacks what they compute with: .*0\.{name}", strict=False)


@pytest.mark.parametrize("name", ["scale", "sign"])
def test_the_values_of_finished_tasks_may_not_be_missing(name: str) -> None:
    """The model has as many rows as the state has tasks, and they are of other tasks."""
    state = dict(finished(per_task="0.*").state_dict())
    del state[f"model.0.{name}_tasks"]
    refused(finished(per_task="0.*"), state, rf"lacks what they compute with: .*0\.{name}_tasks", strict=False)


def twins() -> tuple[WSN, WSN]:
    """Two models with tasks of the same names and other masks and heads."""
    both = finished(frozen="0.*"), finished(frozen="0.*")
    assert not torch.equal(logits(both[0], 0), logits(both[1], 0))
    return both


def test_the_masks_of_finished_tasks_may_not_be_missing() -> None:
    """The masks that the model keeps would be those of other tasks."""
    wsn, other = twins()
    state = {name: value for name, value in other.state_dict().items() if not name.endswith("weight_masks")}
    refused(wsn, state, r"lacks what they compute with: .*weight_masks", strict=False)


def test_a_model_does_not_keep_its_heads_for_the_tasks_of_a_state_without_heads() -> None:
    wsn, other = twins()
    state = {name: value for name, value in other.state_dict().items() if ".heads." not in name}
    refused(wsn, state, "has no head, and .* is not what task 0 ended with", strict=False)


def test_a_model_keeps_its_heads_if_they_are_those_of_the_tasks_of_the_state() -> None:
    wsn = finished(frozen="0.*")
    expected = logits(wsn, 0)
    wsn.load_state_dict({n: v for n, v in wsn.state_dict().items() if ".heads." not in n}, strict=False)
    assert torch.equal(logits(wsn, 0), expected)
    wsn.verify()


@pytest.mark.parametrize("tasks", [0, 1])
def test_the_task_in_progress_may_not_lack_its_head(tasks: int) -> None:
    wsn = WSN(convnet())
    run_tasks(wsn, range(tasks), adamw, steps=1)
    wsn.begin_task(tasks)
    WSN(convnet()).load_state_dict(copy.deepcopy(wsn.state_dict()))
    state = {k: v for k, v in wsn.state_dict().items() if f"heads.i{tasks}." not in k}
    state["model.7.heads.i9.weight"] = torch.zeros(3, 12)
    state["model.7.heads.i9.bias"] = torch.zeros(3)
    refused(WSN(convnet()), state, f"no head for the tasks \\[{tasks}\\]", strict=False)


def tied() -> nn.Sequential:
    first, second = FastSubnetLinear(12, 12), FastSubnetLinear(12, 12)
    for name in ("weight", "weight_score", "bias", "bias_score"):
        setattr(second, name, getattr(first, name))
    return nn.Sequential(nn.Flatten(), FastSubnetLinear(36, 12), first, second, TaskHeads(12, 3))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("change", [lambda t: t.t(), lambda t: t.double(), lambda t: t.flip(0)])
def test_tied_parameters_may_not_have_two_values(change: Any, assign: bool) -> None:
    """Also where both lie in the same memory, or are equal in another dtype."""
    wsn = WSN(tied())
    state = dict(copy.deepcopy(wsn.state_dict()))
    state["model.3.weight"] = change(state["model.2.weight"])
    refused(WSN(tied()), state, r"model\.2\.weight and model\.3\.weight are one tied parameter", assign=assign)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_assigned_tensors_may_have_another_dtype(dtype: torch.dtype) -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], adamw, steps=2)
    wsn.model.to(dtype)
    with wsn.use_task(0), torch.no_grad():
        before = wsn(torch.ones(2, 36, dtype=dtype))
    fresh = WSN(mlp())
    fresh.load_state_dict(copy.deepcopy(wsn.state_dict()), assign=True)
    with fresh.use_task(0), torch.no_grad():
        assert torch.equal(fresh(torch.ones(2, 36, dtype=dtype)), before)


def test_what_is_loaded_may_put_right_a_layer_that_was_replaced() -> None:
    wsn = WSN(mlp())
    run_tasks(wsn, [0], adamw, steps=2)
    state, before = copy.deepcopy(wsn.state_dict()), logits(wsn, 0)
    wsn.model[3] = FastSubnetLinear(16, 12, density=0.4)
    wsn.load_state_dict(state)
    assert torch.equal(logits(wsn, 0), before)
    wsn.verify()


class LoadsInItsOwnWay(nn.Sequential):
    """A model with code of its own for loading, as torchvision's MNASNet is."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


def test_heads_in_a_module_that_loads_in_its_own_way_are_loaded() -> None:
    wsn = WSN(LoadsInItsOwnWay(*mlp()))
    run_tasks(wsn, [0, 1], adamw, steps=2)
    fresh = WSN(LoadsInItsOwnWay(*mlp()))
    fresh.load_state_dict(wsn.state_dict())
    assert fresh.tasks == [0, 1]
    state, again = wsn.state_dict(), fresh.state_dict()
    names = [name for name in state if name != "_extra_state"]
    assert names and all(torch.equal(state[name], again[name]) for name in names if isinstance(state[name], Tensor))
