"""The gate that a one-pass step leaves is the right one for any forward pass, and for any graph of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from elementwise import assert_same_bits
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
    tanh_batch,
    with_ready_gate,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN

backend = each_backend


# --- other views of the model in between
def show_and_leave(wsn: WSN) -> None:
    with wsn.use_task(0), torch.no_grad():
        wsn(tanh_batch(3, torch.float64)[0])


def show_with_gradients(wsn: WSN) -> None:
    with wsn.use_task(0):
        wsn(tanh_batch(3, torch.float64)[0])


def show_at_once(wsn: WSN) -> None:
    wsn.use_task(0)
    wsn(tanh_batch(3, torch.float64)[0])
    wsn.use_task(None)


def show_head(wsn: WSN) -> None:
    with wsn.use_head(0):
        wsn(tanh_batch(3, torch.float64)[0])


def show_several(wsn: WSN) -> None:
    wsn.eval()
    wsn.forward_tasks(tanh_batch(3, torch.float64)[0], [0, 1] * 4, one_pass=False)
    wsn.train()


def evaluate(train: bool, guard: Callable[[], Any]) -> Callable[[WSN], None]:
    def look(wsn: WSN) -> None:
        wsn.train(train)
        with guard():
            wsn(tanh_batch(3, torch.float64)[0])
        wsn.train()

    return look


LOOKS: dict[str, Callable[[WSN], None]] = {
    "use_task": show_and_leave,
    "use_task with gradients": show_with_gradients,
    "use_task at once": show_at_once,
    "use_head": show_head,
    "forward_tasks": show_several,
    "eval, no_grad": evaluate(False, torch.no_grad),
    "eval, inference_mode": evaluate(False, torch.inference_mode),
    "eval, gradients": evaluate(False, contextlib.nullcontext),
    "train, no_grad": evaluate(True, torch.no_grad),
    "train, gradients": evaluate(True, contextlib.nullcontext),
    "under autocast": evaluate(False, lambda: torch.autocast("cpu", torch.bfloat16)),
    "deepcopy": lambda wsn: loss_of(copy.deepcopy(wsn)).backward(),
    "state_dict": lambda wsn: wsn.state_dict() and None,
    "verify": lambda wsn: wsn.verify() and None,
    "capacity": lambda wsn: wsn.capacity() and None,
}


@pytest.mark.parametrize("where", ["before forward", "before backward", "before step"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_look_in_between_changes_nothing(look: str, where: str, backend: str) -> None:
    """And what is ready is still used, where nothing was in the way."""
    ends = []
    for looks in (True, False):
        wsn, optimizer = with_ready_gate(backend)
        for seed in range(2):
            optimizer.zero_grad()
            for stage in ("before forward", "before backward", "before step"):
                if looks and stage == where:
                    LOOKS[look](wsn)
                if stage == "before forward":
                    assert is_used(wsn)
                    loss = loss_of(wsn, seed)
                elif stage == "before backward":
                    loss.backward()
                else:
                    optimizer.step()
            assert_ready(wsn)
        ends.append([p.detach().clone() for p in wsn.parameters()])
    for mine, theirs in zip(*ends, strict=True):
        assert_same_bits(mine, theirs, "parameter")


def test_a_step_while_a_finished_task_is_shown_is_refused(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    with wsn.use_task(0), pytest.raises(RuntimeError, match="task 0 is finished and in use"):
        optimizer.step()
    optimizer.step()
    assert_ready(wsn)


def test_a_copy_shares_nothing_that_is_ready(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    twin = copy.deepcopy(wsn)
    assert not any(layer.gate_state.ready or layer.gate_state.owner for layer in twin.subnet_layers().values())
    theirs = build(twin)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2):
        step(twin, theirs, seed)
    assert_ready(wsn)
    assert_ready(twin)
    addresses = [
        layer.gate_state.ready["weight"].masked.data_ptr() for model in (wsn, twin) for layer in [layer_of(model)]
    ]
    assert addresses[0] != addresses[1]
    assert_trains_as_standard(wsn, optimizer)


# --- dtypes
def as_bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def as_float16() -> Any:
    return torch.autocast("cpu", torch.float16)


def test_autocast_switched_between_steps(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend, dtype=torch.float32)
    for around in (as_bfloat16, contextlib.nullcontext, as_float16, as_bfloat16):
        assert_trains_as_standard(wsn, optimizer, around, atol=1e-4)
        found = layer_of(wsn).gate_state.ready["weight"].masked.dtype
        with around():
            assert found is layer_of(wsn).dtype_of_pass(torch.zeros(1))
            assert is_used(wsn, found)


def test_autocast_for_a_forward_pass_of_two(backend: str) -> None:
    """One of the two passes before a step finds nothing ready for it."""
    wsn, optimizer = with_ready_gate(backend, dtype=torch.float32)
    for order in ((as_bfloat16, contextlib.nullcontext), (contextlib.nullcontext, as_bfloat16)):
        optimizer.zero_grad()
        for around in order:
            with around():
                loss = loss_of(wsn)
            loss.backward()
        optimizer.step()
        assert_ready(wsn)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_in_another_dtype(to: torch.dtype, backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend, dtype=torch.float32)
    for dtype in (to, torch.float32):
        wsn.to(dtype)
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())  # which follows
        assert_trains_as_standard(wsn, optimizer, atol=1e-12 if dtype is torch.float64 else 1e-2)


@pytest.mark.parametrize("there", ["half", "bfloat16", "double"])
def test_the_model_to_another_dtype_and_back(there: str) -> None:
    """New tensors may lie where the old ones lay: the address of a tensor says nothing about what is in it."""
    for width in (3, 16, 64, 100, 128, 200, 512, 1024):
        wsn, _ = with_ready_gate(dtype=torch.float32, width=width)
        getattr(wsn, there)()
        wsn.float()
        for name, layer in wsn.subnet_layers().items():
            assert not any(is_stale(layer, gate) for gate in layer.gated()), f"{name} of width {width}"


def test_new_tensors_where_the_old_ones_were() -> None:
    """The same, certain: Module.to and its like make tensors that happen to get the memory of those before."""
    wsn, _ = with_ready_gate(dtype=torch.float32)
    wsn._apply(lambda t: t.data.neg_() if t.is_floating_point() else t)
    assert not any(is_stale(layer_of(wsn), gate) for gate in layer_of(wsn).gated())


# --- graphs of other shapes
def test_two_forward_passes_before_backward(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = with_ready_gate(backend)[0]
        optimizer = build(wsn, one_pass)
        for _ in range(3):
            optimizer.zero_grad()
            first, second, unused = (loss_of(wsn, seed) for seed in range(3))
            first.backward()
            second.backward()
            assert unused > 0
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    ends = []
    for how in ("one pass, checkpointed", "standard, checkpointed", "standard"):
        wsn = with_ready_gate(backend)[0]
        optimizer = build(wsn, how.startswith("one pass"))

        def run(x: Tensor, wsn: WSN = wsn) -> Tensor:
            hidden = checkpoint(wsn.model[:3], x.requires_grad_(), use_reentrant=reentrant)
            return wsn.model[3:](hidden)

        for seed in range(3):
            optimizer.zero_grad()
            loss_of(wsn, seed, run if "checkpointed" in how else None).backward()
            optimizer.step()
            if how.startswith("one pass"):
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs, plain in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


def test_a_layer_used_twice_in_one_forward_pass(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = with_ready_gate(backend)[0]
        optimizer = build(wsn, one_pass)

        def run(x: Tensor, model: Any = wsn.model) -> Tensor:
            hidden = model[1](model[0](x))
            for _ in range(3):
                hidden = model[3](model[2](hidden))
            return model[4](hidden)

        for seed in range(3):
            optimizer.zero_grad()
            loss_of(wsn, seed, run).backward()
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_backward_after_the_step_is_the_error_of_autograd_and_nothing_worse(backend: str) -> None:
    wsn, optimizer = with_ready_gate(backend)
    optimizer.zero_grad()
    late = loss_of(wsn, 1)
    loss_of(wsn, 0).backward()
    optimizer.step()
    kept = [p.detach().clone() for p in wsn.parameters()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    assert all(map(torch.equal, wsn.parameters(), kept))
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_backward_twice_through_one_graph(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = with_ready_gate(backend)[0]
        optimizer = build(wsn, one_pass)
        optimizer.zero_grad()
        loss = loss_of(wsn)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_penalty_on_gradients_of_the_inputs(backend: str) -> None:
    """Backward through a backward pass, but for the gate once."""
    ends = []
    for one_pass in (True, False):
        wsn = with_ready_gate(backend)[0]
        optimizer = build(wsn, one_pass)
        for seed in range(2):
            optimizer.zero_grad()
            x = tanh_batch(seed, torch.float64)[0].requires_grad_()
            (slope,) = torch.autograd.grad(wsn(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_double_backward_through_the_weights_is_refused() -> None:
    wsn, _ = with_ready_gate()
    (raw,) = torch.autograd.grad(loss_of(wsn), layer_of(wsn).weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through a subnet layer is not defined"):
        raw.square().sum().backward()
