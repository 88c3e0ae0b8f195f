"""``python -m benchmarks.forgetting`` measures forgetting: the accuracy of task 1 while later tasks are trained.

The data are five permutations of the digits that travel with the package; the net is an MLP; the optimizer is torch's
Adam with weight decay. The published programs (:mod:`wsn_fast.reference.trainer`) zero the gradients of frozen weights,
but the optimizer still shrinks these weights. The library puts the same optimizer under its guard.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.reference.trainer import ReferenceTrainer
from wsn_fast.train.data import Dataset, load

from .provenance import provenance

PROGRAMS = ("ours", "paper", "clarena")
TASKS, WIDTH, BATCH = 5, 100, 64
DENSITY, LEARNING_RATE, WEIGHT_DECAY = 0.5, 1e-3, 1e-4
SEEDS, EPOCHS = (0, 1, 2), 5


def _features(x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    return F.relu(F.linear(F.relu(F.linear(x, t["0.weight"])), t["2.weight"]))


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class _Ours:
    """The library: a converted net, torch's Adam under the guard."""

    def __init__(self, net: nn.Sequential, classes: int) -> None:
        self.wsn = WSN(convert(nn.Sequential(*net, nn.Linear(WIDTH, classes)), DENSITY, heads="4"))

    def begin(self, task: int) -> None:
        self.wsn.begin_task(task)
        self.optimizer = self.wsn.guard(_adam(self.wsn.parameters()))

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.wsn(x), y).backward()
        self.optimizer.step()

    def end(self) -> None:
        self.wsn.end_task()

    def logits(self, x: Tensor) -> Tensor:
        with self.wsn.use_task(0):
            y: Tensor = self.wsn(x)
        return y


class _Published:
    """A published program, with the same net and optimizer."""

    def __init__(self, program: str, net: nn.Sequential, classes: int) -> None:
        tensors = {name: parameter.detach() for name, parameter in net.named_parameters()}
        scores = {name: nn.init.kaiming_uniform_(torch.empty_like(t), a=5**0.5) for name, t in tensors.items()}
        self.trainer, self.classes = ReferenceTrainer(program, _features, tensors, scores, DENSITY), classes
        self.step, self.end = self.trainer.step, self.trainer.end_task

    def begin(self, task: int) -> None:
        self.trainer.begin_task(task, nn.Linear(WIDTH, self.classes), _adam)

    def logits(self, x: Tensor) -> Tensor:
        return self.trainer.logits(x, 0)


def run(program: str, data: Dataset, seed: int, epochs: int) -> list[float]:
    """The test accuracy of task 1 in percent: when it has ended, and after every epoch of the later tasks."""
    torch.manual_seed(seed)
    (train_x, test_x), size = (x.flatten(1).float() / 16 for x in (data.train_x, data.test_x)), data.train_x[0].numel()
    net = nn.Sequential(nn.Linear(size, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU())
    learner = _Ours(net, data.classes) if program == "ours" else _Published(program, net, data.classes)
    generator, accuracies = torch.Generator().manual_seed(seed), list[float]()
    orders = [torch.randperm(size, generator=generator) for _ in range(TASKS)]

    def measure() -> None:
        with torch.no_grad():
            right = learner.logits(test_x[:, orders[0]]).argmax(1) == data.test_y
        accuracies.append(100 * float(right.float().mean()))

    for task, order in enumerate(orders):
        learner.begin(task)
        for _ in range(epochs):
            for batch in torch.randperm(len(train_x), generator=generator).split(BATCH):
                learner.step(train_x[batch][:, order], data.train_y[batch])
            if task:
                measure()
        learner.end()
        if not task:
            measure()
    return accuracies


def measure(seeds: Sequence[int] = SEEDS, epochs: int = EPOCHS) -> dict[str, Any]:
    """Facts, settings, and the curve of each program and seed."""
    data = load("digits")
    settings = {
        "data": "digits, permuted", "tasks": TASKS, "net": f"MLP 64-{WIDTH}-{WIDTH}", "density": DENSITY,
        "optimizer": "Adam", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "batch": BATCH, "epochs": epochs,
        "seeds": list(seeds),
    }  # fmt: skip
    curves = {program: [run(program, data, seed, epochs) for seed in seeds] for program in PROGRAMS}
    return {"facts": provenance(torch.device("cpu")), "settings": settings, "curves": curves}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: prints JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each task")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(options.seeds, options.epochs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
