"""Small models and a training loop that the tests of WSN share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetConv2d, FastSubnetLinear, TaskHeads

INPUT = (1, 6, 6)
CLASSES = 3


def mlp(density: float = 0.4, rule: str = "magnitude") -> nn.Sequential:
    """Flatten, two subnet layers, heads that are made as tasks begin."""
    return nn.Sequential(
        nn.Flatten(),
        FastSubnetLinear(36, 16, density=density, rule=rule),
        nn.ReLU(),
        FastSubnetLinear(16, 12, density=density, rule=rule),
        nn.ReLU(),
        TaskHeads(12, CLASSES),
    )


def convnet(density: float = 0.4, rule: str = "magnitude") -> nn.Sequential:
    """A convolution, batch and layer normalisation, a linear layer, heads."""
    return nn.Sequential(
        FastSubnetConv2d(1, 4, 3, density=density, rule=rule),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        FastSubnetLinear(64, 12, density=density, rule=rule),
        nn.LayerNorm(12),
        nn.ReLU(),
        TaskHeads(12, CLASSES),
    )


def batches(task: int, count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Random inputs and labels of a task, the same at every call."""
    generator = torch.Generator().manual_seed(1000 + task)
    x = torch.randn(count, size, *INPUT, generator=generator)
    y = torch.randint(CLASSES, (count, size), generator=generator)
    return list(zip(x, y, strict=True))


def train(wsn: WSN, optimizer: torch.optim.Optimizer, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Plain steps. Gradients are zeroed rather than dropped: the hard case, where every optimizer moves what it
    holds."""
    wsn.train()
    for x, y in data:
        optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()


def run_tasks(wsn: WSN, tasks: Sequence[int], optimizer: Callable[..., torch.optim.Optimizer], steps: int = 5) -> None:
    """Train some tasks, each with a fresh guarded optimizer over all parameters."""
    for task in tasks:
        wsn.begin_task(task)
        train(wsn, wsn.guard(optimizer(wsn.parameters())), batches(task, steps))
        wsn.end_task()


@torch.no_grad()
def logits(wsn: WSN, task: int | str) -> Tensor:
    """What a task computes on a fixed input, in evaluation mode."""
    wsn.eval()
    with wsn.use_task(task):
        return wsn(batches(99, 1)[0][0]).clone()
