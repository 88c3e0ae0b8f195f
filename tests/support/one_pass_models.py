"""Small models in a task, and what both modes of the optimizers are compared by, for the tests of the one-pass mode."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from torch import Tensor, nn

from wsn_fast import WSN, convert, ops
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable
from wsn_fast.nn.gate_state import stamp
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, **how),
    "adam": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, decoupled=False, **how),
    "sgd": lambda wsn, **how: SubnetSGD(wsn, 0.05, weight_decay=0.1, **how),
    "momentum": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, dampening=0.5, weight_decay=0.1, **how),
    "nesterov": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, **how),
}
MODES = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "standard"])
CLIP = 0.3


@pytest.fixture(params=["torch", "native"])
def each_backend(request: pytest.FixtureRequest) -> str:
    if choose("adamw_step", "cpu", torch.float32, request.param).name != request.param:
        pytest.skip(f"the {request.param} backend is not here")
    name: str = request.param
    return name


def make_wsn(rule: str = "magnitude", dtype: torch.dtype = torch.float64, backend: str | None = None) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    wsn = WSN(convert(net, density=0.4, heads="4", rule=rule))
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    return wsn


def batch(task: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs that bfloat16 holds exactly, in float64, and labels."""
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(16, 9, generator=generator).bfloat16().double()
    return x, torch.randint(3, (16,), generator=generator)


def backward(wsn: WSN, task: int = 1, step: int = 0, scale: float = 1.0, autocast: torch.dtype | None = None) -> Tensor:
    x, y = batch(task, step)
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        logits = wsn(x.to(next(wsn.parameters()).dtype))
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y) * scale
    loss.backward()
    return loss.detach()


def begun(kind: str = "adamw", one_pass: bool = True, rule: str = "magnitude", **how: Any) -> tuple[WSN, Any]:
    """In its second task, of which one step is done; standard and one-pass alike but for rounding."""
    wsn = make_wsn(rule, **how)
    for task in range(2):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn, one_pass=one_pass)
        backward(wsn, task)
        optimizer.step()
        optimizer.zero_grad()
        if task == 0:
            wsn.end_task()
    return wsn, optimizer


def both(kind: str = "adamw", **how: Any) -> list[tuple[WSN, Any]]:
    """The one-pass mode, and the standard mode from the same state."""
    return [begun(kind, one_pass, **how) for one_pass in (True, False)]


def layer_of(wsn: WSN, name: str = "0") -> Any:
    return wsn.subnet_layers()[name]


def masks(wsn: WSN) -> list[Tensor]:
    return [m for layer in wsn.subnet_layers().values() for m in layer.masks_of_scores().values()]


def union_of(wsn: WSN) -> dict[str, Tensor]:
    """Of each gated tensor, True where a finished task uses it."""
    return {
        name: portable.unpack(gate.union, gate.param.numel()).view(gate.param.shape)
        for name, gate in wsn.gated()
        if gate.union is not None
    }


def frozen_of(wsn: WSN, union: dict[str, Tensor]) -> list[Tensor]:
    return [gate.param.detach()[union[name]] for name, gate in wsn.gated()]


def snapshot(wsn: WSN) -> list[Tensor]:
    return [p.detach().clone() for p in wsn.parameters()]


def assert_close(mine: WSN, theirs: WSN, atol: float = 1e-12) -> None:
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def fresh_gate(layer: Any, gate: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    how = (layer.gate_density, layer.rule, dtype, layer.backend)
    return ops.gate(gate.param.detach(), gate.score.detach(), *how)


def assert_ready(wsn: WSN, *, stamped: bool = True) -> None:
    """There is a gate for the next forward pass, and it is that of the scores of now."""
    for name, layer in wsn.subnet_layers().items():
        assert_layer_ready(layer, name, stamped=stamped)


def assert_layer_ready(layer: Any, name: str = "layer", *, stamped: bool = True) -> None:
    for gate in layer.gated():
        ready = layer.gate_state.ready[gate.name]
        masked, tau = fresh_gate(layer, gate, ready.masked.dtype)
        assert_same_bits(ready.next.tau, tau, f"tau of {name}.{gate.name}")
        assert_same_bits(ready.masked, masked, f"masked {name}.{gate.name}")
        expected = ops.topc_threshold(gate.score, layer.gate_density, rule=layer.rule, backend=layer.backend)
        assert_same_bits(ready.next.tau, expected, f"tau of {name}.{gate.name}")
        assert not stamped or ready.next.stamp == stamp(layer, gate.param, gate.score)


# --- a model of which a gate is ready
WIDTH = 13


def tanh_wsn(backend: str | None = None, dtype: torch.dtype = torch.float64, width: int = WIDTH, **how: Any) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 3)).to(dtype)
    wsn = WSN(convert(net, density=0.4, heads="4"), **how)
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    return wsn


def tanh_batch(seed: int, dtype: torch.dtype, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (8,), generator=generator)


def loss_of(wsn: WSN, seed: int = 0, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    first = layer_of(wsn).weight
    x, y = tanh_batch(seed, first.dtype, first.shape[1])
    logits = (run or wsn)(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)


def build(wsn: WSN, one_pass: bool = True) -> Any:
    return SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass)


def step(wsn: WSN, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(wsn, seed).backward()
    optimizer.step()


def with_ready_gate(backend: str | None = None, **how: Any) -> tuple[WSN, Any]:
    """In its second task, of which two steps are done: a gate is ready."""
    wsn = tanh_wsn(backend, **how)
    for task in range(2):
        torch.manual_seed(task)
        wsn.begin_task(task)
        optimizer = build(wsn)
        for seed in range(2):
            step(wsn, optimizer, seed)
        if task == 0:
            wsn.end_task()
    assert_ready(wsn)
    return wsn, optimizer


def is_used(wsn: WSN, dtype: torch.dtype | None = None) -> bool:
    """Whether the next forward pass takes what is ready."""
    layer = layer_of(wsn)
    masked = layer.masked("weight", dtype or layer.weight.dtype)
    return (
        bool(masked.data_ptr() == layer.gate_state.ready["weight"].masked.data_ptr())
        if layer.gate_state.ready
        else False
    )


def is_stale(layer: Any, gate: Any) -> bool:
    masked = layer.masked(gate.name, gate.param.dtype)
    return not torch.equal(masked, fresh_gate(layer, gate, gate.param.dtype)[0])


def assert_trains_as_standard(
    wsn: WSN, optimizer: Any, around: Callable[[], Any] = contextlib.nullcontext, steps: int = 2, atol: float = 1e-12
) -> None:
    """From here on, forward passes are to the bit those of a copy in the standard mode, and steps are its steps."""
    twin = copy.deepcopy(wsn)
    for mine, theirs in zip(wsn.subnet_layers().values(), twin.subnet_layers().values(), strict=True):
        theirs.backend = mine.backend
    standard = build(twin, one_pass=False)
    standard.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(steps):
        losses = []
        for model, steps_of in ((wsn, optimizer), (twin, standard)):
            steps_of.zero_grad()
            with around():
                loss = loss_of(model, seed)
            loss.backward()
            losses.append(loss.detach())
            steps_of.step()
        assert_same_bits(losses[0], losses[1], "loss") if seed == 0 else None
        for (name, a), b in zip(wsn.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert_ready(wsn)
