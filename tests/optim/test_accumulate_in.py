"""Raw gradients in bfloat16 add up in the dtype of the parameter, or in bfloat16 when that is asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from elementwise import assert_same_bits
from one_pass_models import KINDS, assert_close, backward, batch, begun, each_backend, layer_of, make_wsn, snapshot
from torch import Tensor

from wsn_fast import WSN
from wsn_fast.optim import SubnetAdamW, SubnetSGD

backend = each_backend
BFLOAT16 = torch.bfloat16


def started(kind: str = "adamw", accumulate_in: str = "bfloat16", backend: str | None = None) -> tuple[WSN, Any]:
    wsn = make_wsn(dtype=torch.float32, backend=backend)
    wsn.begin_task(0)
    return wsn, KINDS[kind](wsn, one_pass=True, accumulate_in=accumulate_in)


def gradient_of_a_copy(wsn: WSN, step: int, autocast: torch.dtype | None) -> Tensor:
    """G of this batch alone."""
    twin = copy.deepcopy(wsn)
    optimizer = KINDS["adamw"](twin, one_pass=True)
    optimizer.zero_grad()
    backward(twin, step=step, autocast=autocast)
    grad: Tensor = layer_of(twin).weight.grad
    return grad


def test_float32_is_the_default() -> None:
    wsn, optimizer = begun(dtype=torch.float32)
    assert optimizer.accumulate_in == "float32"
    for step in range(2):
        backward(wsn, step=step, autocast=BFLOAT16)
    assert layer_of(wsn).weight.grad.dtype is torch.float32


@pytest.mark.parametrize("ready", [False, True], ids=["a Function a layer", "one Function"])
@pytest.mark.parametrize("accumulate_in", ["float32", "bfloat16"])
def test_the_sum(accumulate_in: str, ready: bool) -> None:
    """Both ways that a gradient comes: of a gate that the layer made, and of those that were made ahead."""
    wsn, optimizer = started(accumulate_in=accumulate_in)
    if ready:
        backward(wsn, step=9, autocast=BFLOAT16)
        optimizer.step()
        optimizer.zero_grad()
    weight, dtype = layer_of(wsn).weight, getattr(torch, accumulate_in)
    expected, singles = None, []
    for _ in range(3):
        before = weight.grad
        singles.append(gradient_of_a_copy(wsn, len(singles), BFLOAT16))
        assert singles[-1].dtype is BFLOAT16
        backward(wsn, step=len(singles) - 1, autocast=BFLOAT16)
        expected = singles[0] if expected is None else expected.to(dtype) + singles[-1].to(dtype)
        assert weight.grad.dtype is expected.dtype
        assert_same_bits(weight.grad, expected, "G")
        assert accumulate_in == "float32" or before is None or weight.grad is before
    optimizer.step()


def test_bfloat16_loses_small_terms_and_float32_does_not() -> None:
    """What the documentation says of both."""
    ends = {}
    for accumulate_in in ("float32", "bfloat16"):
        wsn, optimizer = started(accumulate_in=accumulate_in)
        for scale in (1.0, *[2.0**-10] * 8):
            backward(wsn, scale=scale, autocast=BFLOAT16)
        assert optimizer.accumulate_in == accumulate_in
        ends[accumulate_in] = layer_of(wsn).weight.grad
    first = gradient_of_a_copy(started()[0], 0, BFLOAT16)
    assert_same_bits(ends["bfloat16"], first, "G")
    torch.testing.assert_close(ends["float32"], first.float() * (1 + 8 * 2.0**-10), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_takes_the_sum(kind: str, backend: str) -> None:
    """The update is that of an optimizer that is given the same G in float32."""
    ends = []
    for accumulate_in in ("bfloat16", "float32"):
        wsn, optimizer = started(kind, accumulate_in, backend)
        for _ in range(3):
            for step in range(2):
                backward(wsn, step=step, autocast=BFLOAT16)
            for layer in wsn.subnet_layers().values():
                for param in (layer.weight, layer.bias):
                    assert param.grad.dtype is getattr(torch, accumulate_in)
                    if accumulate_in == "float32":
                        param.grad.copy_(param.grad.bfloat16())
            optimizer.step()
            optimizer.zero_grad()
        ends.append(wsn)
    assert_close(*ends, atol=0 if backend == "native" else 1e-6)


def test_a_layer_called_twice_adds_up_in_bfloat16_too() -> None:
    wsn, optimizer = started()
    layer, x = layer_of(wsn), batch(0, 0)[0].float()
    for _ in range(2):
        with torch.autocast("cpu", BFLOAT16):
            loss = layer(x).sum() + layer(2 * x).sum()
        loss.backward()
        assert layer.weight.grad.dtype is BFLOAT16
    optimizer.step()


@pytest.mark.parametrize("first", [BFLOAT16, None])
def test_a_pass_in_float32_makes_the_sum_float32(first: torch.dtype | None) -> None:
    wsn, optimizer = started()
    singles = []
    for step, autocast in ((0, first), (1, None if first else BFLOAT16)):
        singles.append(gradient_of_a_copy(wsn, step, autocast).float())
        backward(wsn, step=step, autocast=autocast)
    assert layer_of(wsn).weight.grad.dtype is torch.float32
    assert_same_bits(layer_of(wsn).weight.grad, singles[0] + singles[1], "G")
    optimizer.step()


def test_hooks_of_the_user_get_float32() -> None:
    wsn, optimizer = started()
    seen: list[torch.dtype] = []
    backward(wsn, autocast=BFLOAT16)
    layer_of(wsn).weight.register_hook(lambda grad: seen.append(grad.dtype))
    backward(wsn, step=1, autocast=BFLOAT16)
    assert seen == [torch.float32]
    assert layer_of(wsn).weight.grad.dtype is torch.float32
    optimizer.step()


def test_a_gradient_of_zeros_is_added_to() -> None:
    wsn, optimizer = started()
    backward(wsn, autocast=BFLOAT16)
    wsn.zero_grad(set_to_none=False)
    backward(wsn, step=1, autocast=BFLOAT16)
    assert_same_bits(layer_of(wsn).weight.grad, gradient_of_a_copy(wsn, 1, BFLOAT16), "G")
    optimizer.step()


def test_a_foreign_gradient_is_still_refused() -> None:
    wsn, optimizer = started()
    backward(wsn, autocast=BFLOAT16)
    (wsn.model.get_submodule("0").weight.square().sum() * 0.1).backward()
    backward(wsn, step=1, autocast=BFLOAT16)
    before = snapshot(wsn)
    with pytest.raises(RuntimeError, match="did not come through its layer"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


def test_clipping_and_a_scaler(backend: str) -> None:
    ends = []
    for scaled in (False, True):
        wsn, optimizer = started("sgd", backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        scaler.scale(torch.zeros(()))
        for step in range(2):
            backward(wsn, step=step, scale=scaler.get_scale(), autocast=BFLOAT16)
        scaler.unscale_(optimizer)
        assert layer_of(wsn).weight.grad.dtype is BFLOAT16
        optimizer.clip_grad_norm_(0.01)
        scaler.step(optimizer)
        ends.append(wsn)
    assert_close(*ends, atol=1e-7)  # the scale is a power of two


def test_the_state_does_not_depend_on_it() -> None:
    """A run goes on with the other setting, and its states have the same entries and dtypes."""
    states = {}
    for accumulate_in in ("bfloat16", "float32"):
        wsn, optimizer = started(accumulate_in=accumulate_in)
        backward(wsn, autocast=BFLOAT16)
        optimizer.step()
        states[accumulate_in] = copy.deepcopy(optimizer.state_dict())
    mine, theirs = states.values()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in mine["state"].items():
        for name, value in state.items():
            assert_same_bits(value, theirs["state"][key][name], name)
    wsn, optimizer = started(accumulate_in="float32")
    optimizer.load_state_dict(states["bfloat16"])
    assert optimizer.accumulate_in == "float32"


def test_the_next_optimizer_decides_anew() -> None:
    wsn, first = started()
    for accumulate_in in ("float32", "bfloat16"):
        optimizer = SubnetAdamW(wsn, one_pass=True, accumulate_in=accumulate_in)
        for step in range(2):
            backward(wsn, step=step, autocast=BFLOAT16)
        assert layer_of(wsn).weight.grad.dtype is getattr(torch, accumulate_in)
        optimizer.step()
    assert first.accumulate_in == "bfloat16"


@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
@pytest.mark.parametrize("bad", ["float16", "", None, torch.bfloat16])
def test_other_values_are_refused(kind: Any, bad: Any) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    with pytest.raises(ValueError, match="accumulate_in must be 'float32' or 'bfloat16', got"):
        kind(wsn, one_pass=True, accumulate_in=bad)
    with pytest.raises(ValueError, match="accumulate_in must be 'float32' without one_pass=True, got 'bfloat16'"):
        kind(wsn, accumulate_in="bfloat16")
