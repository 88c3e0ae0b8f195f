"""What the optimizers leave to torch's optimizer or refuse, and how the one-pass mode ends."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from optimizer_pairs import PAIRS, backward, batch, begun, make_wsn, train
from torch import nn

from wsn_fast import WSN, convert
from wsn_fast.optim.optimizers import SubnetAdamW


def same_as_torch(prepare: Callable[[WSN], None], make: Callable[[], WSN] = make_wsn) -> WSN:
    """Two steps of the second task, one-pass and by torch under the guard, end alike."""
    ends = []
    for build in reversed(PAIRS["adam"]):
        wsn = make()
        train(wsn, PAIRS["adam"][1], tasks=1, steps=3)
        torch.manual_seed(1)
        wsn.begin_task(1)
        prepare(wsn)
        optimizer = build(wsn)
        for _ in range(2):
            optimizer.zero_grad()
            backward(wsn)
            optimizer.step()
        ends.append(wsn)
    for mine, theirs in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    ends[0].end_task()
    ends[0].verify()
    return ends[0]


@pytest.mark.parametrize("name", ["weight", "bias", "weight_score", "bias_score"])
def test_what_is_frozen_by_hand_stays_and_the_rest_learns(name: str) -> None:
    same_as_torch(lambda wsn: getattr(wsn.subnet_layers()["0"], name).requires_grad_(False))


def tied() -> WSN:
    torch.manual_seed(0)
    shared = nn.Linear(9, 9)
    net = nn.Sequential(shared, nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    net[2].weight = shared.weight
    return WSN(convert(net, density=0.4, heads="4"))


def test_tied_layers_learn_as_with_torch() -> None:
    same_as_torch(lambda wsn: None, tied)


def test_tied_layers_have_one_density() -> None:
    wsn = tied()
    with pytest.raises(
        ValueError, match=r"0 and 2 are tied and share one mask, so they need one density, got 0\.2 and 0\.8"
    ):
        wsn.begin_task(0, density={"0": 0.2, "2": 0.8})
    assert wsn.current_task is None


def test_weight_and_scores_of_different_dtypes() -> None:
    wsn = make_wsn(dtype=torch.float32)
    layer = wsn.subnet_layers()["0"]
    layer.weight_score = nn.Parameter(layer.weight_score.double())
    wsn.begin_task(0)
    optimizer = SubnetAdamW(wsn, one_pass=True)
    x, y = batch(0, 0, torch.float32)
    F.cross_entropy(wsn(x), y).backward()
    before = layer.weight_score.clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight_score)


def test_the_mode_ends_with_the_optimizer_and_is_not_copied() -> None:
    wsn, optimizer = begun("adamw")
    layer = wsn.subnet_layers()["0"]
    assert layer.one_pass and not copy.deepcopy(wsn).subnet_layers()["0"].one_pass
    pickle.loads(pickle.dumps(wsn))
    del optimizer
    gc.collect()
    assert not layer.one_pass


def test_a_gradient_past_the_mask_is_refused() -> None:
    wsn, optimizer = begun("sgd")
    layer = wsn.subnet_layers()["0"]
    with torch.no_grad():
        wsn(batch(1, 0)[0])
    layer.weight.square().sum().backward()
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient, but .* reads it without its mask"):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("changed", ["weight", "weight_score"])
def test_an_error_of_the_step_names_the_tensor_in_the_model(changed: str) -> None:
    wsn, optimizer = begun("sgd")
    layer = wsn.subnet_layers()["2"]
    backward(wsn)
    with torch.no_grad():
        getattr(layer, changed).mul_(2)
    with pytest.raises(RuntimeError, match=r"2\.weight, its scores or its rule changed between the forward pass"):
        optimizer.step()
    optimizer.zero_grad()
    setattr(layer, changed, nn.Parameter(getattr(layer, changed).detach().clone()))
    backward(wsn)
    with pytest.raises(RuntimeError, match=r"2\.weight or its scores were replaced after this optimizer was built"):
        optimizer.step()


def test_a_gradient_of_the_scores_names_the_tensor_in_the_model() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn)
    wsn.subnet_layers()["0"].weight_score.sum().backward()
    with pytest.raises(RuntimeError, match=r"the scores of 0\.weight have a gradient of their own"):
        optimizer.step()


def test_scores_follow_their_own_group() -> None:
    wsn, optimizer = begun("adamw")
    layer = wsn.subnet_layers()["0"]
    group = optimizer.param_groups[1]
    group["params"] = [p for p in group["params"] if p is not layer.weight_score]
    optimizer.add_param_group({"params": [layer.weight_score], "lr": 0.0})
    backward(wsn)
    before = layer.weight_score.clone()
    optimizer.step()
    assert torch.equal(layer.weight_score, before)


def test_guarding_again_adds_no_guard() -> None:
    wsn, optimizer = begun("adam")
    hooks = len(optimizer._optimizer_step_pre_hooks)
    wsn.guard(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    assert wsn.subnet_layers()["0"].one_pass


def test_unknown_flags_of_a_loaded_state_are_refused() -> None:
    wsn, optimizer = begun("adam")
    optimizer.param_groups[0]["amsgrad"] = True
    backward(wsn)
    with pytest.raises(ValueError, match="amsgrad must be False"):
        optimizer.step()


def test_what_a_step_writes_is_noticed_by_autograd() -> None:
    wsn, optimizer = begun("sgd")
    weight = wsn.subnet_layers()["0"].weight
    backward(wsn)
    kept = weight.square().sum()
    version = weight._version
    optimizer.step()
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_compiled_layers_hand_over_raw_gradients_too() -> None:
    wsn, optimizer = begun("adamw")
    twin, other = begun("adamw")
    compiled = torch.compile(wsn, fullgraph=True, backend="aot_eager")
    x, y = batch(1, 0)
    F.cross_entropy(compiled(x), y).backward()
    backward(twin)
    optimizer.step()
    other.step()
    for mine, theirs in zip(wsn.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
