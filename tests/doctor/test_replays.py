"""Calls as replays of CUDA graphs, with a stand-in for the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wsn_fast.backends import PRIMITIVES
from wsn_fast.backends import torch as portable
from wsn_fast.backends.comparison import FEW, first_problem
from wsn_fast.doctor.replays import Replays

WITH_A_PLAN = ("gates", "gates_backward", "restore_frozen_many", "gradient_squares")


class Recorder:
    """Records by running, and counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.counts["recorded"] += 1
        return work(), lambda: self.counts.update(["replayed"])


def planned(function: Callable[..., Any], eager: list[bool]) -> Callable[..., Any]:
    """A function that leaves something in its plan, and writes down whether the plan was empty."""

    def of(*args: Any) -> Any:
        plan = next((a for a in args if isinstance(a, dict)), None)
        plan = args[0].plan if plan is None else plan
        if plan is not None:
            eager.append(not plan)
            plan["known"] = True
        return function(*args)

    return of


@pytest.mark.parametrize("operation", PRIMITIVES)
def test_every_operation_is_recorded(operation: str) -> None:
    """Once its plan is made, where it has one."""
    recorder, eager = Recorder(), list[bool]()
    function = getattr(portable, operation)
    has_plan = operation in WITH_A_PLAN or operation.endswith("_step")
    backend = SimpleNamespace(**{operation: planned(function, eager) if has_plan else function})
    assert first_problem(operation, Replays(backend, recorder), FEW(torch.device("cpu"), torch.float32)) is None
    assert recorder.counts["recorded"] == recorder.counts["replayed"] > 0
    assert recorder.counts["recorded"] == eager.count(False) or not has_plan


def test_what_only_the_first_call_computes_is_found() -> None:
    """A capture that left the work out: its replay changes nothing."""

    def nothing(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return None, lambda: None

    def gates_backward(orders: Any, plan: Any) -> None:
        plan["known"] = True
        portable.gates_backward(orders)

    backend = SimpleNamespace(gates_backward=gates_backward)
    found = first_problem("gates_backward", Replays(backend, nothing), FEW(torch.device("cpu"), torch.float32))
    assert found is not None and "call 1" in found
