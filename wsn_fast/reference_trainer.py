"""The two published training algorithms in plain PyTorch: what the library is compared with, step by step.

Written from the paper (Kang et al., ICML 2022, Algorithm 1), its authors' code and CLArena's, in the way in which these
compute: percentiles, float masks that multiply the weights, gradients zeroed after backward. It imports torch alone,
and not :mod:`wsn_fast.reference` either, which specifies what this library computes. Where the programs are at fault,
this is the algorithm without the fault; ``docs/fidelity.md`` lists every such place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def paper_percentile(keys: Tensor, density: float) -> Tensor:
    """The paper's code: ``kthvalue`` at a 1-based rank. 0-d."""
    q = (1 - density) * 100
    return keys.flatten().kthvalue(1 + round(0.01 * float(q) * (keys.numel() - 1))).values


def clarena_percentile(keys: Tensor, density: float) -> Tensor:
    """CLArena: the linearly interpolated quantile. 0-d."""
    return torch.quantile(keys, 1 - density)


@dataclass(frozen=True)
class Program:
    """What tells the two programs apart.

    Attributes:
        key: what is ranked, from the scores.
        percentile: the threshold, from keys and density.
        reinit_scores: whether every task draws new scores.
    """

    key: Callable[[Tensor], Tensor]
    percentile: Callable[[Tensor, float], Tensor]
    reinit_scores: bool


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "paper": Program(torch.abs, paper_percentile, reinit_scores=False),
        "clarena": Program(lambda scores: scores, clarena_percentile, reinit_scores=True),
    }
)


class StraightThrough(torch.autograd.Function):
    """One where ``keys >= tau`` and zero elsewhere, in the dtype of the keys; the gradient passes unchanged (Eq. 5)."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, tau: Tensor) -> Tensor:
        return torch.where(keys < tau, torch.zeros_like(keys), torch.ones_like(keys))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class ReferenceTrainer:
    """WSN's training of one task after another (Algorithm 1), slow and obvious.

    Args:
        program: "paper" or "clarena".
        features: the network below the heads, a function of the input and of the masked tensors by name.
        tensors: the gated tensors by name, copied; names end in "weight" or "bias", a weight before its bias.
        scores: the initial scores by the same names, copied.
        density: the fraction of each tensor that a task keeps.

    Attributes:
        weights, scores: the parameters, by name.
        heads: the classifier of each task.
        masks: the float masks of each finished task, by name.
        used: the union of these, boolean, by name: M in the paper.
    """

    def __init__(
        self, program: str, features: Features, tensors: Mapping[str, Tensor], scores: Mapping[str, Tensor],
        density: float,
    ) -> None:  # fmt: skip
        self.program = PROGRAMS[program]
        self.features = features
        self.density = density
        self.weights = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
        self.scores = {name: nn.Parameter(scores[name].detach().clone()) for name in tensors}
        self.heads: dict[Hashable, nn.Linear] = {}
        self.masks: dict[Hashable, dict[str, Tensor]] = {}
        self.used = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in tensors.items()}
        self.task: Hashable = None

    def begin_task(self, task: Hashable, head: nn.Linear, make_optimizer: MakeOptimizer) -> None:
        """Start to train ``task`` with its head and a fresh optimizer over all parameters; new scores if the program
        has them."""
        self.task, self.heads[task] = task, head
        if self.program.reinit_scores:
            self.draw_scores()
        self.optimizer = make_optimizer(self.parameters())

    def draw_scores(self) -> None:
        """Kaiming uniform with a = sqrt(5) for weights, uniform within 1 / sqrt(fan_in) for biases."""
        for name, score in self.scores.items():
            if name.endswith("weight"):
                nn.init.kaiming_uniform_(score, a=math.sqrt(5))
            else:
                bound = 1 / math.sqrt(self.weights[name.removesuffix("bias") + "weight"][0].numel())
                nn.init.uniform_(score, -bound, bound)

    def parameters(self) -> list[Tensor]:
        """All of them: gated tensors, scores, heads."""
        heads = [parameter for head in self.heads.values() for parameter in head.parameters()]
        return [*self.weights.values(), *self.scores.values(), *heads]

    def current_masks(self) -> dict[str, Tensor]:
        """The float masks of the scores as they are, through which the scores get their gradient."""
        keys = {name: self.program.key(score) for name, score in self.scores.items()}
        return {n: StraightThrough.apply(k, self.program.percentile(k.detach(), self.density)) for n, k in keys.items()}

    def logits(self, x: Tensor, task: Hashable = None) -> Tensor:
        """What a finished ``task`` answers, or (None) the one in training with the masks of its current scores."""
        masks = self.current_masks() if task is None else self.masks[task]
        head = self.heads[self.task if task is None else task]
        answer: Tensor = head(self.features(x, {name: w * masks[name] for name, w in self.weights.items()}))
        return answer

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on a batch: inputs [N, ...] and labels [N]."""
        self.optimizer.zero_grad()
        F.cross_entropy(self.logits(x), y).backward()
        for name, used in self.used.items():
            gradient = self.weights[name].grad
            assert gradient is not None
            gradient[used] = 0  # Eq. 4
        self.optimizer.step()

    def state(self) -> list[Tensor]:
        """A copy of all parameters, as kept of the best epoch."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Put a :meth:`state` of this task back."""
        for parameter, kept in zip(self.parameters(), state, strict=True):
            parameter.copy_(kept)

    @torch.no_grad()
    def end_task(self) -> None:
        """Keep the masks of the scores as they are now (after the best epoch was restored), and add them to the
        union."""
        self.masks[self.task] = self.current_masks()
        for name, mask in self.masks[self.task].items():
            self.used[name] |= mask.bool()
