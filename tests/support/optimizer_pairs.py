"""Subnet optimizers in both modes, each beside torch's optimizer under the guard, and a small model to train."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD

Make = Callable[[WSN], torch.optim.Optimizer]


def by_kind(wsn: WSN, decay: float) -> list[dict[str, object]]:
    """Weight decay for everything but scores, as the one-pass optimizers have it."""
    trained = [(name, p) for name, p in wsn.named_parameters() if p.requires_grad]
    scores = [p for name, p in trained if name.endswith("_score")]
    rest = [p for name, p in trained if not name.endswith("_score")]
    return [{"params": rest, "weight_decay": decay}, {"params": scores, "weight_decay": 0.0}]


def pairs_of(one_pass: bool) -> dict[str, tuple[Make, Make]]:
    """By kind: torch's optimizer under the guard, and ours."""
    return {
        "adamw": (
            lambda wsn: wsn.guard(torch.optim.AdamW(by_kind(wsn, 0.1), 0.01)),
            lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass),
        ),
        "adam": (
            lambda wsn: wsn.guard(torch.optim.Adam(by_kind(wsn, 0.1), 0.01)),
            lambda wsn: SubnetAdamW(wsn, 0.01, weight_decay=0.1, decoupled=False, one_pass=one_pass),
        ),
        "sgd": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.1), 0.05)),
            lambda wsn: SubnetSGD(wsn, 0.05, weight_decay=0.1, one_pass=one_pass),
        ),
        "nesterov": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.0), 0.05, momentum=0.9, nesterov=True)),
            lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, one_pass=one_pass),
        ),
        "dampened": (
            lambda wsn: wsn.guard(torch.optim.SGD(by_kind(wsn, 0.1), 0.05, momentum=0.9, dampening=0.5)),
            lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, dampening=0.5, weight_decay=0.1, one_pass=one_pass),
        ),
    }


PAIRS = pairs_of(True) | {f"{kind}, standard": pair for kind, pair in pairs_of(False).items()}


def make_wsn(rule: str = "magnitude", dtype: torch.dtype = torch.float64) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    return WSN(convert(net, density=0.4, heads="4", rule=rule))


def batch(task: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(16, 9, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (16,), generator=generator)


def train(wsn: WSN, make: Make, tasks: int = 2, steps: int = 100, accumulate: int = 1) -> list[Tensor]:
    """The masks after every step."""
    masks = []
    for task in range(tasks):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = make(wsn)
        for step in range(steps):
            for part in range(accumulate):
                x, y = batch(task, step * accumulate + part, next(wsn.parameters()).dtype)
                F.cross_entropy(wsn(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            masks += [m for layer in wsn.subnet_layers().values() for m in layer.masks_of_scores().values()]
        wsn.end_task()
    return masks


def begun(kind: str) -> tuple[WSN, torch.optim.Optimizer]:
    wsn = make_wsn()
    train(wsn, PAIRS[kind][1], tasks=1, steps=3)
    wsn.begin_task(1)
    return wsn, PAIRS[kind][1](wsn)


def backward(wsn: WSN, scale: float = 1.0) -> None:
    x, y = batch(1, 0)
    (F.cross_entropy(wsn(x), y) * scale).backward()
