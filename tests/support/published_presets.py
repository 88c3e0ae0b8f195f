"""PackNet, Piggyback and SupSup in plain PyTorch, written down from their papers: a net of one convolution and one
linear layer with a head for each task. The library shares no line with this file."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("conv", "linear")


def net(seed: int = 0) -> nn.Sequential:
    """The net that everything here computes; "4" is its classifier. The sizes of the weights are multiples of 4."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


def compute(x: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor], head: nn.Linear) -> Tensor:
    hidden = F.conv2d(x, weights["conv"], biases["conv"]).relu().flatten(1)
    return F.linear(F.linear(hidden, weights["linear"], biases["linear"]), head.weight, head.bias)


class Plain:
    """The tensors of :func:`net`, by name, and a head for each task."""

    def __init__(self, model: nn.Sequential) -> None:
        layers: dict[str, Any] = {"conv": model[0], "linear": model[3]}
        self.weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        self.biases = {name: layer.bias.detach().clone() for name, layer in layers.items()}
        self.heads: dict[int, nn.Linear] = {}


class PackNet(Plain):
    """PackNet (CVPR 2018), section 3. ``owner`` has the number of the task that owns each weight, 0 for pruned ones."""

    def __init__(self, model: nn.Sequential, density: float) -> None:
        super().__init__(model)
        self.density = density
        self.owner = {name: torch.zeros_like(w, dtype=torch.int) for name, w in self.weights.items()}
        self.task = 0

    def begin(self, head: nn.Linear) -> None:
        self.task += 1
        self.heads[self.task] = head
        for owner in self.owner.values():
            owner[owner == 0] = self.task

    def train(self, data: list[tuple[Tensor, Tensor]], **settings: float) -> None:
        """Train what the task owns; biases in the first task only."""
        for tensor in (*self.weights.values(), *self.biases.values()):
            tensor.requires_grad_()
        head = self.heads[self.task]
        biases = self.biases.values() if self.task == 1 else ()
        optimizer = torch.optim.SGD([*self.weights.values(), *biases, *head.parameters()], **settings)
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(compute(x, self.weights, self.biases, head), y).backward()
            for name, weight in self.weights.items():
                assert weight.grad is not None
                weight.grad[self.owner[name] != self.task] = 0
            optimizer.step()
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight[self.owner[name] == 0] = 0

    @torch.no_grad()
    def prune(self) -> None:
        """Remove the share of the own weights that has the smallest magnitude."""
        for name, weight in self.weights.items():
            gone = removed(weight, self.owner[name] == self.task, self.density)
            self.owner[name][gone] = 0
            weight[gone] = 0

    def mask(self, name: str, task: int) -> Tensor:
        """A task uses its own weights and those of all tasks before it."""
        return (self.owner[name] >= 1) & (self.owner[name] <= task)


def removed(weight: Tensor, own: Tensor, density: float) -> Tensor:
    """Which of the own weights are removed: those up to the magnitude of the n-th smallest one."""
    n = round((1 - density) * int(own.sum()))
    if n == 0:
        return torch.zeros_like(own)
    return own & (weight.abs() <= weight[own].abs().sort().values[n - 1])


class _Binary(torch.autograd.Function):
    """A binary mask; the gradient of the scores is that of the mask (straight-through)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Masking(Plain):
    """Scores are trained over weights that never change."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(model)
        self.scores: dict[str, Tensor] = {}

    def begin(self, task: int, head: nn.Linear, scores: dict[str, Tensor]) -> None:
        self.heads[task] = head
        self.scores = {name: one.detach().clone().requires_grad_() for name, one in scores.items()}

    def ranked(self, name: str) -> Tensor:
        raise NotImplementedError

    def mask(self, name: str) -> Tensor:
        raise NotImplementedError

    def train(self, task: int, data: list[tuple[Tensor, Tensor]], **settings: float) -> None:
        head = self.heads[task]
        optimizer = torch.optim.SGD([*self.scores.values(), *head.parameters()], **settings)
        for x, y in data:
            optimizer.zero_grad()
            masked = {n: w * _Binary.apply(self.ranked(n), self.mask(n)) for n, w in self.weights.items()}
            F.cross_entropy(compute(x, masked, self.biases, head), y).backward()
            optimizer.step()


class Piggyback(Masking):
    """Piggyback (ECCV 2018), Eq. 1 to 3: a constant threshold, and scores that begin at 1e-2 in each task."""

    def begin(self, task: int, head: nn.Linear, scores: dict[str, Tensor]) -> None:
        super().begin(task, head, {name: torch.full_like(weight, 1e-2) for name, weight in self.weights.items()})

    def ranked(self, name: str) -> Tensor:
        return self.scores[name]

    def mask(self, name: str) -> Tensor:
        return self.scores[name] >= 5e-3


class SupSup(Masking):
    """SupSup (NeurIPS 2020), section 3.1, with edge-popup: the top share of the magnitudes in each layer."""

    density = 0.5

    def ranked(self, name: str) -> Tensor:
        return self.scores[name].abs()

    def mask(self, name: str) -> Tensor:
        keys = self.scores[name].detach().abs().flatten()
        mask = torch.zeros_like(keys, dtype=torch.bool)
        mask[keys.argsort()[int((1 - self.density) * keys.numel()) :]] = True
        return mask.view_as(self.scores[name])
