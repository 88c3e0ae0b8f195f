"""The two published training programs in plain PyTorch: what the library is compared with, in results and in time.

They are written from the paper (Kang et al., ICML 2022, Algorithm 1), its authors' code and CLArena's; nothing is
copied. They compute as these programs do, and pay for what these pay for: percentiles that the host waits for,
constants that are made on the CPU, float masks that multiply the weights, gradients that are zeroed after backward.
Where the programs are at fault, this is the algorithm without the fault; ``docs/fidelity.md`` lists every such place.

This module imports torch alone: it shares no code with the library, nor with :mod:`wsn_fast.reference.specification`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Features = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class StraightThrough(torch.autograd.Function):
    """Takes zeros where ``drop`` is true and ones elsewhere; the gradient of ``keys`` passes unchanged (Eq. 5).

    Both constants live on the CPU, as in the programs, and are moved to the device in every forward.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, drop: Tensor, zeros: Tensor, ones: Tensor) -> Tensor:
        return torch.where(drop, zeros.to(keys.device), ones.to(keys.device))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0], None, None, None


class PaperGate:
    """The gate of one tensor in the paper's program.

    Args:
        like: the gated tensor, of any shape and floating dtype.

    Attributes:
        used: the weights that finished tasks own, 1 or 0, int64 as in the program.
        reinit_scores: whether every task draws new scores.
    """

    reinit_scores: ClassVar[bool] = False

    def __init__(self, like: Tensor) -> None:
        self.used = torch.zeros_like(like, dtype=torch.int64)
        self._zeros, self._ones = (make(like.shape, dtype=like.dtype) for make in (torch.zeros, torch.ones))

    def threshold(self, scores: Tensor, density: float) -> float | Tensor:
        """The percentile of ``|S|``: ``kthvalue`` at a 1-based rank, and the host waits for the value."""
        keys = scores.detach().abs().flatten()
        q = (1 - density) * 100
        return keys.kthvalue(1 + round(0.01 * float(q) * (keys.numel() - 1))).values.item()

    def mask(self, scores: Tensor, tau: float | Tensor) -> Tensor:
        """The mask of ``|S| >= tau`` as floats, shaped as the scores, through which these get their gradient."""
        keys = scores.abs()
        mask: Tensor = StraightThrough.apply(keys, keys < tau, self._zeros, self._ones)
        return mask

    def protect(self, gradient: Tensor) -> None:
        """Zero the gradient of the weights that finished tasks own, in place (Eq. 4)."""
        gradient[self.used == 1] = 0

    def use(self, mask: Tensor) -> None:
        """Add a finished task's mask, boolean or float, to :attr:`used`."""
        self.used |= mask.bool().long()


class ClarenaGate(PaperGate):
    """The gate of one tensor in CLArena. Its masks are float, and its constants are made anew in every forward."""

    reinit_scores: ClassVar[bool] = True

    def __init__(self, like: Tensor) -> None:
        self.used = torch.zeros_like(like)

    def threshold(self, scores: Tensor, density: float) -> float | Tensor:
        """The linearly interpolated quantile of the raw scores, 0-d; torch allows at most 2^24 of them."""
        return torch.quantile(scores.detach().flatten(), 1 - density)

    def mask(self, scores: Tensor, tau: float | Tensor) -> Tensor:
        """The mask of ``S >= tau`` as floats."""
        zeros, ones = (make(scores.shape, dtype=scores.dtype) for make in (torch.zeros, torch.ones))
        mask: Tensor = StraightThrough.apply(scores, scores < tau, zeros, ones)
        return mask

    def protect(self, gradient: Tensor) -> None:
        """Multiply the gradient by one minus :attr:`used`, in place."""
        gradient *= 1 - self.used

    def use(self, mask: Tensor) -> None:
        torch.maximum(self.used, mask.to(self.used.dtype), out=self.used)


GATES: Mapping[str, type[PaperGate]] = MappingProxyType({"paper": PaperGate, "clarena": ClarenaGate})
"""The gate of each program, by the program's name."""


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
        gates: the gate of each tensor, by name.
    """

    def __init__(
        self, program: str, features: Features, tensors: Mapping[str, Tensor], scores: Mapping[str, Tensor],
        density: float,
    ) -> None:  # fmt: skip
        self.features = features
        self.density = density
        self.gates = {name: GATES[program](tensor) for name, tensor in tensors.items()}
        self.reinit_scores = GATES[program].reinit_scores
        self.weights = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in tensors.items()}
        self.scores = {name: nn.Parameter(scores[name].detach().clone()) for name in tensors}
        self.heads: dict[Hashable, nn.Linear] = {}
        self.masks: dict[Hashable, dict[str, Tensor]] = {}
        self.task: Hashable = None

    def begin_task(self, task: Hashable, head: nn.Linear, make_optimizer: MakeOptimizer) -> None:
        """Start to train ``task`` with its head and a fresh optimizer over all parameters; new scores if the program
        has them."""
        self.task, self.heads[task] = task, head
        if self.reinit_scores:
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

    @property
    def used(self) -> dict[str, Tensor]:
        """The union of the finished tasks' masks, boolean, by name: M in the paper."""
        return {name: gate.used.bool() for name, gate in self.gates.items()}

    def current_masks(self) -> dict[str, Tensor]:
        """The float masks of the scores as they are, through which the scores get their gradient."""
        gates = self.gates.items()
        return {n: g.mask(self.scores[n], g.threshold(self.scores[n], self.density)) for n, g in gates}

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
        for name, gate in self.gates.items():
            gradient = self.weights[name].grad
            assert gradient is not None
            gate.protect(gradient)
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
            self.gates[name].use(mask)
