"""The one-pass mode trains as the standard mode does, whatever a training loop does with gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from one_pass_models import (
    CLIP,
    MODES,
    assert_close,
    backward,
    batch,
    begun,
    both,
    each_backend,
    layer_of,
    make_wsn,
    snapshot,
)
from torch import nn

from wsn_fast.optim.optimizers import SubnetSGD

backend = each_backend


# --- G
def test_g_stays_in_bfloat16_and_adds_up_in_float32() -> None:
    wsn, _ = begun(dtype=torch.float32)
    backward(wsn, step=1, autocast=torch.bfloat16)
    weight = layer_of(wsn).weight
    first = weight.grad.clone()
    assert first.dtype is torch.bfloat16
    wsn.zero_grad()
    backward(wsn, step=2, autocast=torch.bfloat16)
    second = weight.grad.clone()
    wsn.zero_grad()
    for step in (1, 2):
        backward(wsn, step=step, autocast=torch.bfloat16)
    assert_same_bits(weight.grad, first.float() + second.float(), "G")


def test_g_adds_up_to_a_gradient_of_zeros() -> None:
    wsn, optimizer = begun(dtype=torch.float32)
    backward(wsn, autocast=torch.bfloat16)
    optimizer.zero_grad(set_to_none=False)
    backward(wsn, autocast=torch.bfloat16)
    assert layer_of(wsn).weight.grad.dtype is torch.float32


@pytest.mark.parametrize("first", [torch.bfloat16, None])
def test_accumulation_across_precisions(first: torch.dtype | None) -> None:
    ends = []
    for wsn, optimizer in both(dtype=torch.float32):
        backward(wsn, step=1, autocast=first)
        backward(wsn, step=2, autocast=None if first else torch.bfloat16)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)


def test_a_layer_called_often_in_one_forward_adds_up_g_in_float32() -> None:
    """The error of the sum of 64 gradients under bfloat16 autocast against their sum in float64."""
    errors = []
    for one_pass in (True, False):
        wsn = make_wsn(dtype=torch.float32)
        wsn.begin_task(0)
        optimizer = SubnetSGD(wsn, 1.0, one_pass=one_pass)
        layer = layer_of(wsn)
        layer.density = 1.0
        before = layer.weight.detach().clone()
        inputs, factors = torch.rand(64, 8, 9), torch.rand(64, 8, 14)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack([(layer(x) * f).sum() for x, f in zip(inputs, factors, strict=True)]).sum()
        loss.backward()
        optimizer.step()
        exact = torch.einsum("kbo,kbi->oi", factors.bfloat16().double(), inputs.bfloat16().double())
        errors.append((before.double() - layer.weight.detach().double() - exact).abs().max())
        torch.manual_seed(0)
    assert errors[0] <= 2 * errors[1]


def test_scores_with_a_gradient_of_their_own_are_not_ignored() -> None:
    """A penalty on scores or weights, which does not go through the gate: taken into account, or refused."""
    ends = []
    for wsn, optimizer in both("sgd"):
        (sum(layer.weight_score.abs().sum() for layer in wsn.subnet_layers().values())).backward()
        backward(wsn)
        if optimizer.one_pass:
            try:
                optimizer.step()
            except RuntimeError:
                return
        else:
            optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


# --- clipping
@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e6, float("inf")])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_clipping_is_that_of_the_standard_mode_and_of_torch(kind: str, max_norm: float, backend: str) -> None:
    ends, norms = [], []
    for wsn, optimizer in both(kind, backend=backend):
        backward(wsn)
        norms.append(optimizer.clip_grad_norm_(max_norm))
        optimizer.step()
        ends.append(wsn)
    wsn, optimizer = begun(kind, False, backend=backend)
    backward(wsn)
    norms.append(torch.nn.utils.clip_grad_norm_(wsn.parameters(), max_norm))
    optimizer.step()
    for norm in norms[1:]:
        torch.testing.assert_close(norms[0], norm, rtol=1e-12, atol=0)
    assert_close(ends[0], ends[1])
    assert_close(ends[1], wsn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@MODES
def test_the_norm_of_half_precision_gradients_does_not_overflow(dtype: torch.dtype, one_pass: bool) -> None:
    wsn = make_wsn(dtype=dtype)
    wsn.begin_task(0)
    optimizer = SubnetSGD(wsn, 0.1, one_pass=one_pass)
    backward(wsn, 0, scale=3e3)
    grads = [p.grad.double() for p in wsn.parameters() if p.grad is not None and not one_pass]
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.isfinite()
    if grads:
        exact = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        torch.testing.assert_close(norm.double(), exact, rtol=0.02, atol=0)


def test_clipping_twice_clips_what_is_clipped() -> None:
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        norms = [optimizer.clip_grad_norm_(max_norm) for max_norm in (0.02, 0.01, 5.0)]
        optimizer.step()
        torch.testing.assert_close(torch.stack(norms[1:]), torch.tensor([0.02, 0.01]).double(), rtol=1e-4, atol=0)
        ends.append(wsn)
    assert_close(*ends)


def test_backward_after_clipping_is_refused_and_changes_nothing() -> None:
    wsn, optimizer = begun()
    backward(wsn)
    optimizer.clip_grad_norm_(CLIP)
    backward(wsn)
    before = snapshot(wsn)
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


def test_backward_between_two_clippings_is_refused() -> None:
    wsn, optimizer = begun()
    backward(wsn)
    optimizer.clip_grad_norm_(CLIP)
    backward(wsn, step=1)
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.clip_grad_norm_(CLIP)


def test_unscaling_after_clipping_does_what_it_does_in_the_standard_mode() -> None:
    """A factor for a factor: GradScaler changes gradients behind autograd's back, so it cannot be refused."""
    ends = []
    for wsn, optimizer in both("sgd", dtype=torch.float32):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        backward(wsn, scale=4.0)
        optimizer.clip_grad_norm_(CLIP)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)


@pytest.mark.parametrize("whose", ["optimizer", "module", "by hand"])
@pytest.mark.parametrize("again", [False, True], ids=["no more", "clipped again"])
def test_the_factor_goes_with_the_gradients(whose: str, again: bool) -> None:
    """Clip, skip the step, drop the gradients in one of three ways: the next step knows nothing of it."""
    ends, norms = [], []
    for clipped in (True, False):
        wsn, optimizer = begun("sgd")
        if clipped:
            backward(wsn)
            optimizer.clip_grad_norm_(1e-3)
        if whose == "optimizer":
            optimizer.zero_grad()
        elif whose == "module":
            wsn.zero_grad()
        else:
            for p in wsn.parameters():
                p.grad = None
        backward(wsn, step=1)
        norms.append(optimizer.clip_grad_norm_(0.3) if again else torch.zeros(()))
        optimizer.step()
        ends.append(wsn)
    torch.testing.assert_close(*norms, rtol=0, atol=1e-12)
    assert_close(*ends)


def test_zero_grad_in_place_drops_the_factor() -> None:
    ends = []
    for clipped in (True, False):
        wsn, optimizer = begun("sgd")
        backward(wsn)
        if clipped:
            optimizer.clip_grad_norm_(1e-3)
        optimizer.zero_grad(set_to_none=False)
        backward(wsn, step=1)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


def test_the_factor_is_used_once() -> None:
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        optimizer.clip_grad_norm_(1e-2)
        optimizer.step()
        optimizer.zero_grad()
        backward(wsn)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite(bad: float, backend: str) -> None:
    """Without an error it does what torch's clipping does to gradients in the standard mode."""
    ends = []
    for wsn, optimizer in both("sgd", backend=backend):
        backward(wsn)
        for layer in wsn.subnet_layers().values():
            for p in (layer.weight, layer.bias):
                row = layer.masks_of_scores()["weight" if p is layer.weight else "bias"].nonzero()[0].tolist()
                p.grad[tuple(row)] = bad  # inside the mask
        before = snapshot(wsn)
        with pytest.raises(RuntimeError, match=r"the norm of the gradients is (inf|nan), so it cannot be clipped"):
            optimizer.clip_grad_norm_(CLIP, error_if_nonfinite=True)
        assert all(map(torch.equal, snapshot(wsn), before))
        assert not optimizer.clip_grad_norm_(CLIP).isfinite()
        ends.append((wsn, optimizer))
    (mine, optimizer), (theirs, standard) = ends
    optimizer.step(), standard.step()
    # dS of the bad elements is formed from G in one mode, and was formed before in the other: weights are the same.
    for a, b in zip(mine.subnet_layers().values(), theirs.subnet_layers().values(), strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(a.bias, b.bias, rtol=0, atol=1e-12, equal_nan=True)


@MODES
@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), True, "1", None])
def test_a_wrong_norm_is_refused(one_pass: bool, max_norm: Any) -> None:
    _, optimizer = begun(one_pass=one_pass)
    with pytest.raises(ValueError, match="max_norm must be a positive number, got"):
        optimizer.clip_grad_norm_(max_norm)


@MODES
def test_without_gradients_nothing_happens(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    before = snapshot(wsn)
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


def test_a_layer_without_gradients_stays_and_learns_later() -> None:
    ends = []
    for wsn, optimizer in both():
        for only_last in (True, False, True, True, False):
            x, y = batch(1, 5)
            model = wsn.model
            logits = model[4](model[3](model[2](torch.ones(16, 14).double()))) if only_last else wsn(x)
            F.cross_entropy(logits, y).backward()
            optimizer.clip_grad_norm_(CLIP)
            before = layer_of(wsn).weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(layer_of(wsn).weight, before) == only_last
        ends.append(wsn)
    assert_close(*ends)


# --- what a training loop does between forward and step
def test_a_change_of_weights_between_forward_and_backward_is_an_error_as_in_the_standard_mode() -> None:
    for wsn, optimizer in both():
        x, y = batch(1, 0)
        loss = F.cross_entropy(wsn(x), y)
        with torch.no_grad():
            layer_of(wsn).weight.mul_(-3)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed between the forward pass"):
            loss.backward()  # in the standard mode
            optimizer.step()


@pytest.mark.parametrize("what", ["weight", "weight_score"])
def test_a_change_between_backward_and_step_does_not_change_the_gradient(what: str) -> None:
    """Or is refused."""
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        with torch.no_grad():
            getattr(layer_of(wsn), what).mul_(-3)
        if optimizer.one_pass:
            try:
                optimizer.step()
            except RuntimeError:
                return
        else:
            optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("trained", [False, True])
def test_a_forward_with_other_parameters_does_not_disturb_the_step(trained: bool) -> None:
    """As of a perturbed or averaged copy of the model, through torch.func.functional_call."""
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        others = {name: (-2 * p.detach() + 1).requires_grad_(trained) for name, p in wsn.named_parameters()}
        torch.func.functional_call(wsn, others, (batch(1, 3)[0],))
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@MODES
@pytest.mark.parametrize("how", ["all", "one"])
def test_parameters_that_the_optimizer_does_not_hold_are_refused_clearly(how: str, one_pass: bool) -> None:
    """They were replaced meanwhile, all of them by ``load_state_dict(assign=True)`` or one by hand."""
    wsn, optimizer = begun(one_pass=one_pass)
    if how == "all":
        wsn.load_state_dict(copy.deepcopy(wsn.state_dict()), assign=True)
    else:
        layer_of(wsn).weight = nn.Parameter(layer_of(wsn).weight.detach().clone())
    backward(wsn)
    before = snapshot(wsn)
    with pytest.raises(RuntimeError, match="optimizer"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


# --- GradScaler
@MODES
def test_grad_scaler_and_float16_autocast(one_pass: bool, backend: str) -> None:
    """Scaled, unscaled, clipped: the step without a scaler; a step with infinite gradients is skipped."""
    ends = []
    for scaled in (True, False):
        wsn, optimizer = begun("adam", one_pass, dtype=torch.float32, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        scaler.scale(torch.zeros(()))
        for step in range(3):
            backward(wsn, step=step, scale=scaler.get_scale(), autocast=torch.float16)
            assert layer_of(wsn).weight.grad.dtype is torch.float32
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(wsn)
        if scaled:
            kept = snapshot(wsn)
            backward(wsn, scale=float("inf"), autocast=torch.float16)
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert scaler.get_scale() == 32
            assert all(map(torch.equal, snapshot(wsn), kept))
    assert_close(*ends, atol=2e-3)


def test_a_scaler_with_bfloat16_gradients() -> None:
    ends = []
    for wsn, optimizer in both("sgd", dtype=torch.float32):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        backward(wsn, scale=8.0, autocast=torch.bfloat16)
        scaler.step(optimizer)
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)
