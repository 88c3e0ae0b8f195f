"""A comparison with the torch backend finds what is wrong: each way to be wrong is planted in one operation."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wsn_fast.backends import PRIMITIVES
from wsn_fast.backends import torch as portable
from wsn_fast.backends.comparison import FEW, first_problem

CPU = torch.device("cpu")


def problem(operation: str, **broken: Callable[..., Any]) -> str | None:
    """What a comparison on a few tensors says of a backend that is torch's but for what is ``broken``."""
    backend = SimpleNamespace(**{name: getattr(portable, name) for name in PRIMITIVES} | broken)
    return first_problem(operation, backend, FEW(CPU, torch.float32))


@pytest.mark.parametrize("operation", PRIMITIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_torch_backend_is_like_itself(operation: str, dtype: torch.dtype) -> None:
    assert first_problem(operation, portable, FEW(CPU, dtype)) is None


def beyond(tensor: Tensor) -> None:
    """Write the element behind the last one."""
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + tensor.numel()).fill_(7.0)


def beyond_the_result(result: Tensor) -> Tensor:
    """As a backend does that allocates its result and then writes too far."""
    made = torch.empty_like(result).copy_(result)
    beyond(made)
    return made


def before_the_result(result: Tensor) -> Tensor:
    made = torch.empty_like(result).copy_(result)
    torch.as_strided(made, (1,), (1,), made.storage_offset() - 1).fill_(7.0)
    return made


def gates_too_long(orders: Any, plan: Any = None) -> Any:
    taus = portable.gates(orders, plan)
    beyond(orders[0].masked)
    return taus


def gates_from_the_last_call(orders: Any, plan: Any = None) -> Any:
    """A stale threshold: that of the first call."""
    taus = portable.gates(orders)
    first = plan.setdefault("taus", [tau.clone() for tau in taus])
    for order, tau in zip(orders, first, strict=True):
        order.masked.copy_(portable.gate(order.weight, order.scores, tau, order.rule, order.masked.dtype))
    return first


def gradients_of_the_first_call(orders: Any, plan: Any = None) -> None:
    if plan.setdefault("calls", 0) == 0:
        portable.gates_backward(orders)
    plan["calls"] += 1


def step_without_union(batch: Any, settings: Any) -> None:
    updates = [update._replace(union=None) for update in batch.updates]
    portable.adamw_step(batch._replace(updates=updates), settings)


def step_with_an_old_gate(batch: Any, settings: Any) -> None:
    portable.adamw_step(batch._replace(updates=[update._replace(next=None) for update in batch.updates]), settings)


def second_step_forgotten(batch: Any, settings: Any) -> None:
    if batch.plan.setdefault("steps", 0) == 0:
        portable.adamw_step(batch, settings)
    batch.plan["steps"] += 1


def restore_too_much(param: Tensor, saved: Tensor, union: Tensor) -> None:
    param.copy_(saved)


def reads_beyond(scores: Tensor, rank: int, rule: str) -> Tensor:
    """One score too many."""
    longer = torch.as_strided(scores, (scores.numel() + 1,), (1,), scores.storage_offset())
    return portable.threshold(longer, rank + 1, rule)


def conv_with_a_zero(x: Tensor, *rest: Any) -> Tensor:
    """A result whose last element nobody computed."""
    result = portable.masked_conv(x, *rest)
    result.view(-1)[-1] = 0.0
    return result


def raises(*args: object) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("operation", "broken", "says"),
    [
        ("threshold", lambda s, rank, rule: portable.threshold(s, max(rank - 1, 0), rule), "expected"),
        ("threshold", reads_beyond, "expected"),
        ("threshold", raises, "RuntimeError: no kernel image"),
        ("keep_mask", lambda s, tau, rule: portable.gate_key(s, rule) > tau, "differ"),
        ("gate", lambda w, s, tau, rule, dtype: portable.gate(w, s, tau, rule, dtype) * 1.01, "differ"),
        ("gate", lambda w, s, tau, rule, dtype: (w * portable.keep_mask(s, tau, rule)).to(dtype), "differ"),  # -0.0
        ("gate", lambda w, s, tau, rule, dtype: portable.gate(w, s, tau, rule, w.dtype), "is torch.float32"),
        ("gate", lambda *a: beyond_the_result(portable.gate(*a)), "beyond the ends"),
        ("gate", lambda *a: before_the_result(portable.gate(*a)), "beyond the ends"),
        ("gate", lambda w, s, tau, rule, dtype: torch.empty_like(w, dtype=dtype), "is nan"),
        ("gates", gates_too_long, "beyond"),
        ("gates", gates_from_the_last_call, "call 1"),
        ("gate_packed", lambda w, packed, dtype: portable.gate_packed(w, ~packed, dtype), "differ"),
        ("gate_backward", lambda g, w, s, tau, union, *rest: portable.gate_backward(g, w, s, tau, None, *rest), "dW"),
        ("gates_backward", gradients_of_the_first_call, "call 1"),
        ("restore_frozen", restore_too_much, "restored"),
        ("restore_frozen_many", lambda orders, plan: None, "restored"),
        ("pack", lambda mask: portable.pack(mask.flip(0)), "pack"),
        ("pack", lambda mask: beyond_the_result(portable.pack(mask)), "beyond the ends"),
        ("unpack", lambda packed, n: portable.unpack(packed.flip(0), n), "unpack"),
        ("union", lambda packed: packed[0], "union"),
        ("popcount", lambda packed: portable.popcount(packed) + 1, "popcount"),
        ("adamw_step", step_without_union, "frozen"),
        ("adamw_step", step_with_an_old_gate, "next"),
        ("adamw_step", second_step_forgotten, "step 2"),
        ("adamw_coded_step", lambda batch, settings: None, "weights"),
        ("sgd_step", lambda batch, settings: None, "weights"),
        ("sgd_coded_step", lambda batch, settings: None, "weights"),
        ("gradient_squares", lambda batch: portable.gradient_squares(batch) * 1.001, "squares"),
        ("masked_linear", lambda x, w, m, b, back: portable.masked_linear(x, w, m, None, back), "the product"),
        ("masked_linear", lambda *a: portable.masked_linear(*a) * 1.01, "the product"),
        ("masked_linear_grad", lambda *a: portable.masked_linear_grad(*a)[::-1], "dW"),
        ("masked_linear_tasks", lambda x, w, p, t, b, pb: portable.masked_linear_tasks(x, w, p, t * 0, b, pb), "tasks"),
        ("masked_conv", conv_with_a_zero, "the convolution"),
    ],
)
def test_what_is_wrong_is_found(operation: str, broken: Callable[..., Any], says: str) -> None:
    found = problem(operation, **{operation: broken})
    assert found is not None and says in found


def test_nothing_of_the_callers_settings_counts() -> None:
    """The torch backend has to be right as a measure, and random numbers go on as before."""
    before = torch.random.get_rng_state()
    with torch.autocast("cpu"), torch.inference_mode():
        assert problem("masked_linear", masked_linear=portable.masked_linear) is None
    torch.set_default_dtype(torch.float64)
    try:
        assert problem("adamw_coded_step") is problem("gates") is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.func.vmap(lambda x: x * (problem("threshold") is None))(torch.ones(2)).tolist() == [1, 1]
    assert torch.equal(before, torch.random.get_rng_state())
