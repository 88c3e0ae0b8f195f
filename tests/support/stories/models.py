"""The models and optimizers of the stories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foreign_optimizers as foreign
import torch
from small_models import CLASSES, convnet, mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert
from wsn_fast.nn.task_ids import TaskId
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

TASKS: list[TaskId] = [0, 1, -7, "a", "0", "b.c d"]


def converted() -> nn.Module:
    body = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    return convert(body, 0.2, rule="value", heads="4")


def partly_dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), FastSubnetLinear(16, 12), nn.ReLU(), TaskHeads(12, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "mlp": (mlp, {}),
    "convnet": (lambda: convnet(0.1, "value"), {"reinit_scores": True}),
    "converted": (converted, {}),
    "frozen": (partly_dense, {"frozen": "1.*"}),
    "per task": (partly_dense, {"per_task": "1.*"}),
}
"""Each model, with the arguments of WSN that it needs."""


class Accident(BaseException):
    """Ends a call as an interrupt does: it is no ``Exception``."""


class CutShort(torch.optim.AdamW):
    """Updates everything, frozen or not, and then raises as an interrupted step does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        raise Accident


class CutInTheMiddle(foreign.MuonLike):
    """Raises when it has updated a half of its parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = foreign.every(self)
        foreign.decay(params[: len(params) // 2])
        raise Accident


OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "adamw": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01, weight_decay=0.1)),
    "nesterov": lambda wsn: wsn.guard(
        torch.optim.SGD(wsn.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    ),
    "subnet adamw": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1),
    "one-pass adamw": lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=True),
    "one-pass sgd": lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, weight_decay=0.01, one_pass=True),
    "cut short": lambda wsn: wsn.guard(CutShort(wsn.parameters(), 0.01)),
    "cut in the middle": lambda wsn: wsn.guard(CutInTheMiddle(wsn.parameters())),
    "Muon-like": lambda wsn: wsn.guard(foreign.MuonLike(wsn.parameters())),
    "writes after the step": lambda wsn: wsn.guard(foreign.DecaysTwice(wsn.parameters(), 0.01)),
    "a wrapper": lambda wsn: wsn.guard(foreign.Lookahead(torch.optim.AdamW(wsn.parameters(), 0.01))),
}


class FailsAt(TorchDispatchMode):
    """Raises :class:`Accident` in place of the operation number ``at``, counted from 0."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == -1:
            raise Accident
        return func(*args, **(kwargs or {}))
