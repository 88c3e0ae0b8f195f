"""Steps in unusual loops: gradients that appear late, change hands or are replaced, and steps that fail."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from optimizer_pairs import backward, batch, begun, make_wsn
from torch import Tensor, nn

from wsn_fast.backends import torch as portable
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD


@pytest.mark.parametrize("kind", ["adamw", "adamw, standard"])
@pytest.mark.parametrize("where", ["closure", "hook"])
def test_a_change_of_hands_within_a_step_is_refused_and_moves_nothing_frozen(kind: str, where: str) -> None:
    wsn, optimizer = begun(kind)

    def disturb(*_: object) -> None:
        for _, gate in wsn.gated():
            gate.score.requires_grad_(False)
            gate.score.grad = None

    def closure() -> Tensor:
        if where == "closure":
            disturb()
        optimizer.zero_grad()
        x, y = batch(1, 0)
        loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        return loss

    if where == "hook":
        backward(wsn)
        optimizer.register_step_pre_hook(disturb)
    with contextlib.suppress(RuntimeError):
        optimizer.step(closure if where == "closure" else None)
    wsn.verify()


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_first_gradient_may_come_late(one_pass: bool) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    optimizer = SubnetSGD(wsn, 0.1, momentum=0.9, one_pass=one_pass)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    for step in range(3):
        optimizer.zero_grad()
        backward(wsn)
        if step:
            extra.sum().backward()
        optimizer.step()
    assert (extra < 1).all()


def test_a_gradient_replaced_after_clipping_is_refused() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn, 1e4)
    assert isinstance(optimizer, SubnetSGD)
    optimizer.clip_grad_norm_(1.0)
    weight = wsn.subnet_layers()["0"].weight
    assert weight.grad is not None
    weight.grad = weight.grad.clone()
    before = weight.clone()
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_step_that_failed_is_still_clipped_when_repeated() -> None:
    wsn, optimizer = begun("sgd")
    assert isinstance(optimizer, SubnetSGD)
    backward(wsn, 1e4)
    optimizer.clip_grad_norm_(1.0)
    before = [p.detach().clone() for p in wsn.parameters()]
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        optimizer.step()
    optimizer.param_groups[0]["maximize"] = False
    optimizer.step()
    for param, kept in zip(wsn.parameters(), before, strict=True):
        assert (param - kept).norm() <= 1


def test_a_layer_may_be_skipped_after_gradients_were_set_to_zero() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    wsn.model[4].head(1)(torch.ones(2, 7, dtype=torch.float64)).sum().backward()
    optimizer.step()


def test_gradients_of_an_optimizer_that_died_go_with_it() -> None:
    wsn, optimizer = begun("sgd")
    backward(wsn)
    del optimizer
    gc.collect()
    wsn.guard(torch.optim.SGD(wsn.parameters(), 1.0))
    weight = wsn.subnet_layers()["0"].weight
    assert weight.grad is None and weight.grad_dtype is weight.dtype


def test_a_hook_on_the_weight_sees_its_dtype() -> None:
    wsn = make_wsn(dtype=torch.float32)
    wsn.begin_task(0)
    optimizer = SubnetAdamW(wsn, one_pass=True)
    weight = wsn.subnet_layers()["0"].weight
    weight.register_hook(lambda grad: grad.float() * 2)
    x, y = batch(0, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(wsn(x), y)
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype is torch.float32
    optimizer.step()


def test_the_portable_step_that_runs_out_of_memory_leaves_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, optimizer = begun("adamw")
    for layer in wsn.subnet_layers().values():
        layer.backend = "torch"
    backward(wsn)

    def fail(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(portable, "threshold", fail)  # after the update, for the next gate
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    wsn.verify()
