"""Nothing is compiled or loaded for the first time inside a capture, where CUDA refuses to load a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from counted_steps import allow_steps
from stand_in_cuda import StandIn
from torch import Tensor, nn

import wsn_fast.optim.capture as capture
from wsn_fast import WSN, capture_step, convert
from wsn_fast.backends import triton as backend
from wsn_fast.optim import SubnetAdamW, SubnetSGD

OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one pass AdamW": lambda wsn: SubnetAdamW(wsn, 1e-3, one_pass=True),
    "AdamW": lambda wsn: SubnetAdamW(wsn, 1e-3),
    "one pass SGD": lambda wsn: SubnetSGD(wsn, 1e-2, momentum=0.9, one_pass=True),
    "guarded SGD": lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 1e-2)),
}


def make_step(stand_in: StandIn, kind: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    allow_steps(stand_in, monkeypatch)
    wsn = WSN(convert(nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)), density=0.3, heads="2"))
    wsn.begin_task(0)
    return capture_step(wsn, OPTIMIZERS[kind](wsn), lambda x, y: F.cross_entropy(wsn(x), y), **options)


@pytest.mark.parametrize(
    ("kind", "max_norm"),
    [
        ("one pass AdamW", None),
        ("one pass AdamW", 1.0),
        pytest.param("AdamW", None, marks=pytest.mark.ci),
        pytest.param("AdamW", 1.0, marks=pytest.mark.ci),
        pytest.param("one pass SGD", None, marks=pytest.mark.ci),
        pytest.param("one pass SGD", 1.0, marks=pytest.mark.ci),
        ("guarded SGD", None),
        ("guarded SGD", 1.0),
    ],
)
def test_nothing_is_loaded_inside_a_capture(
    kind: str, max_norm: float | None, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(stand_in, kind, monkeypatch, max_norm=max_norm)
    for _ in range(capture.WARM_UP + 1):
        step(torch.randn(8, 48), torch.arange(8) % 4)
    assert step._graph is not None, step.reason


def test_a_kernel_that_is_loaded_inside_a_capture_fails_it(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    step = make_step(stand_in, "one pass AdamW", monkeypatch)
    loss_fn, gated = step._loss_fn, []
    x = torch.ones(8, dtype=torch.float64)  # no other test on the stand-in has gates of this dtype

    def gates_a_tensor_in_the_capture(*batch: Tensor) -> Tensor:
        if step._warm_up_steps == capture.WARM_UP and step._inputs:
            gated.append(backend.gate(x, x, x[0], "value", x.dtype))
        return loss_fn(*batch)

    step._loss_fn = gates_a_tensor_in_the_capture
    with pytest.warns(RuntimeWarning, match="operation not permitted when stream is capturing"):
        for _ in range(capture.WARM_UP + 1):
            step(torch.randn(8, 48), torch.arange(8) % 4)
    assert not step.captured
