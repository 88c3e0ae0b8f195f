"""The gate that a one-pass step leaves for the next forward pass is never a stale one."""

from __future__ import annotations

import contextlib
import copy
import gc

import pytest
import torch
from elementwise import assert_same_bits
from gate_changes import CHANGES, stepped_by
from one_pass_models import (
    assert_ready,
    assert_trains_as_standard,
    build,
    each_backend,
    is_stale,
    is_used,
    layer_of,
    loss_of,
    step,
    tanh_wsn,
    with_ready_gate,
)

backend = each_backend


# --- changes of what the gate depends on
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_rebuilds_the_gate(change: str, backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    assert is_used(wsn)
    torch.manual_seed(5)
    CHANGES[change](wsn)
    for layer in wsn.subnet_layers().values():
        assert not any(is_stale(layer, gate) for gate in layer.gated())
    assert_trains_as_standard(wsn, optimizer)
    assert is_used(wsn)


@pytest.mark.parametrize("change", ["density", "density of the task"])
def test_a_change_between_forward_and_step_is_in_the_next_gate(change: str, backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    CHANGES[change](wsn)
    optimizer.step()
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_edit_after_the_forward_pass_is_not_in_the_gate_that_is_ready(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    CHANGES["scores"](wsn)
    with contextlib.suppress(RuntimeError):  # refused, or right
        optimizer.step()
        assert_ready(wsn)
    optimizer.zero_grad()
    assert_trains_as_standard(wsn, optimizer)


def test_the_best_epoch_restored(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    best = wsn.trainable_state()
    for seed in range(3):
        step(wsn, optimizer, seed)
    wsn.load_trainable_state(best)
    assert_trains_as_standard(wsn, optimizer)
    wsn.load_trainable_state(best)
    expected = {name: layer.masks_of_scores()["weight"] for name, layer in wsn.subnet_layers().items()}
    wsn.end_task()
    assert all(torch.equal(layer_of(wsn, name).mask("weight", 1), mask) for name, mask in expected.items())


@pytest.mark.parametrize("reinit_scores", [False, True])
def test_one_optimizer_for_two_tasks(reinit_scores: bool, backend: str) -> None:
    """Scores are drawn anew at begin_task, or the density is another: while the optimizer and its gate live on."""
    wsn = tanh_wsn(backend, reinit_scores=reinit_scores)
    wsn.begin_task(0)
    optimizer = build(wsn)
    for seed in range(2):
        step(wsn, optimizer, seed)
    wsn.end_task()
    wsn.begin_task(1, density=0.4 if reinit_scores else 0.2)
    optimizer.add_param_group({"params": list(wsn.model[4].head(1).parameters())})
    wsn.guard(optimizer)
    optimizer.zero_grad()
    for seed in range(2):
        step(wsn, optimizer, seed)
        assert_ready(wsn)
    fresh = copy.deepcopy(wsn)
    assert_same_bits(loss_of(wsn).detach(), loss_of(fresh).detach(), "loss")
    wsn.end_task()
    wsn.verify()


def test_end_task_takes_the_scores_and_not_what_is_ready(backend: str) -> None:
    wsn, _ = with_ready_gate(backend)
    CHANGES["scores"](wsn)
    expected = layer_of(wsn).masks_of_scores()["weight"]
    wsn.end_task()
    assert torch.equal(layer_of(wsn).mask("weight", 1), expected)


# --- edits that nobody sees
@pytest.mark.parametrize("name", ["weight", "weight_score"])
def test_an_edit_through_data_shows_after_one_step(name: str, backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    getattr(layer_of(wsn), name).data.mul_(-2).add_(0.01)
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_edit_through_numpy_shows_after_one_step(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    layer_of(wsn).weight_score.detach().numpy()[:] = 0.25
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_a_step_of_a_fused_optimizer_that_nobody_guards_shows_after_one_step(backend: str) -> None:
    """Torch does not count the changes that its fused optimizers make."""
    wsn, optimizer = with_ready_gate(backend)
    stepped_by(lambda params: torch.optim.Adam(params, 0.5, fused=True))(wsn)
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


@pytest.mark.parametrize("fused", [True, False])
def test_a_torch_optimizer_that_is_guarded_shows_at_once(fused: bool, backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    params = [p for p in wsn.parameters() if p.requires_grad]
    other = wsn.guard(torch.optim.Adam(params, 0.3, weight_decay=0.1, fused=fused))
    step(wsn, other)
    wsn.guard(optimizer)
    assert_trains_as_standard(wsn, optimizer)


# --- optimizers that come and go
def test_a_new_optimizer_of_either_mode(backend: str) -> None:
    wsn, _ = with_ready_gate(backend)
    for one_pass in (True, False, True, True):
        optimizer = build(wsn, one_pass)
        assert not any(layer.gate_state.ready or layer.gate_state.passes for layer in wsn.subnet_layers().values())
        for seed in range(2):
            step(wsn, optimizer, seed)
        assert bool(layer_of(wsn).gate_state.ready) == one_pass
        if one_pass:
            assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_optimizer_that_is_gone_leaves_no_gate_in_use(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    del optimizer
    gc.collect()
    CHANGES["scores"](wsn)
    assert not layer_of(wsn).one_pass
    assert not is_stale(layer_of(wsn), next(layer_of(wsn).gated()))


def test_the_optimizer_before_cannot_step_with_raw_gradients_of_another(backend: str) -> None:
    wsn, before = with_ready_gate(backend)
    optimizer = build(wsn)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    kept = [p.detach().clone() for p in wsn.parameters()]
    with pytest.raises(RuntimeError, match="meant for the optimizer that was guarded last"):
        before.step()
    assert all(map(torch.equal, wsn.parameters(), kept))
    optimizer.step()
    assert_ready(wsn)


def test_a_torch_optimizer_on_the_rest_steps_beside(backend: str) -> None:
    """Two optimizers, of which one has the heads alone: what is ready stays in use."""
    wsn, _ = with_ready_gate(backend)
    heads = {id(p) for p in wsn.model[4].parameters()}
    optimizer = build(wsn)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in heads]
    other = wsn.guard(torch.optim.SGD(wsn.model[4].head(1).parameters(), 0.1))
    for seed in range(3):
        wsn.zero_grad()
        loss_of(wsn, seed).backward()
        other.step()
        optimizer.step()
        assert_ready(wsn)
        assert is_used(wsn)
