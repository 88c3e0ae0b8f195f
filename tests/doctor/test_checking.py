"""``python -m wsn_fast.doctor --check`` finds what is wrong: each way to be wrong is planted in one operation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wsn_fast.backends import choice
from wsn_fast.backends import torch as portable
from wsn_fast.doctor import __main__ as command
from wsn_fast.doctor import checking

CPU = torch.device("cpu")


def verdicts(monkeypatch: pytest.MonkeyPatch, **broken: Callable[..., Any]) -> dict[str, str | None]:
    """What a check says of each operation in float32, of a backend that is torch's but for what is ``broken``."""
    backend = SimpleNamespace(**{name: getattr(portable, name) for name in choice.PRIMITIVES} | broken)
    monkeypatch.setattr(checking, "choose", lambda *_: choice.Choice(backend, "mine", "planted"))
    monkeypatch.setattr(checking, "DTYPES", (torch.float32,))
    return {verdict.operation: verdict.problem for verdict in checking.check(CPU)}


def test_a_right_backend_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(verdicts(monkeypatch).values()) == {None}


def beyond(tensor: Tensor) -> None:
    """Write the element behind the last one."""
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + tensor.numel()).fill_(7.0)


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


def step_without_union(batch: Any, settings: Any) -> None:
    updates = [update._replace(union=None) for update in batch.updates]
    portable.adamw_step(batch._replace(updates=updates), settings)


def step_with_an_old_gate(batch: Any, settings: Any) -> None:
    portable.adamw_step(batch._replace(updates=[update._replace(next=None) for update in batch.updates]), settings)


def restore_too_much(param: Tensor, saved: Tensor, union: Tensor) -> None:
    param.copy_(saved)


def raises(*args: object) -> None:
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    ("operation", "broken", "says"),
    [
        ("threshold", lambda s, rank, rule: portable.threshold(s, max(rank - 1, 0), rule), "expected"),
        ("threshold", raises, "RuntimeError: no kernel image"),
        ("keep_mask", lambda s, tau, rule: portable.gate_key(s, rule) > tau, "differ"),
        ("gate", lambda w, s, tau, rule, dtype: portable.gate(w, s, tau, rule, dtype) * 1.0001, "differ"),
        ("gate", lambda w, s, tau, rule, dtype: w * portable.keep_mask(s, tau, rule), "differ"),  # -0.0
        ("gates", gates_too_long, "beyond"),
        ("gates", gates_from_the_last_call, "call 1"),
        ("gate_backward", lambda g, w, s, tau, union, *rest: portable.gate_backward(g, w, s, tau, None, *rest), "dW"),
        ("restore_frozen", restore_too_much, "restored"),
        ("pack", lambda mask: portable.pack(mask.flip(0)), "pack"),
        ("popcount", lambda packed: portable.popcount(packed) + 1, "popcount"),
        ("adamw_step", step_without_union, "frozen"),
        ("adamw_step", step_with_an_old_gate, "next"),
        ("gradient_squares", lambda batch: portable.gradient_squares(batch) * 1.001, "squares"),
    ],
)
def test_what_is_wrong_is_found(
    operation: str, broken: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdicts(monkeypatch, **{operation: broken})
    problem = found.pop(operation)
    assert problem is not None and says in problem
    assert set(found.values()) == {None}, "nothing else is blamed"


def test_the_command_checks_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    assert command.main(["--check"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("cpu: ") and printed.endswith("every compared operation is right\n")
    assert all(operation in printed for operation in choice.PRIMITIVES)
    assert torch.equal(before, torch.random.get_rng_state()), "random numbers go on as before"


def test_the_command_fails_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = SimpleNamespace(**{name: getattr(portable, name) for name in choice.PRIMITIVES} | {"pack": raises})
    monkeypatch.setattr(checking, "choose", lambda *_: choice.Choice(backend, "mine", "planted"))
    assert command.main(["--check"]) == 1
    assert "WRONG: RuntimeError: no kernel image" in capsys.readouterr().out


@pytest.mark.ci
def test_help_is_quick_to_read() -> None:
    done = subprocess.run([sys.executable, "-m", "wsn_fast.doctor", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--check" in done.stdout
