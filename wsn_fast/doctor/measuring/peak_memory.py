"""The peak memory of a training step on a GPU, by PyTorch's allocator."""

from __future__ import annotations

import torch

from .competitors import Competitor
from .problem import Problem

STEPS = 4
"""Enough for whatever captures itself."""


def train(kind: type[Competitor], problem: Problem) -> None:
    """Make a competitor and train a few steps."""
    competitor = kind(problem)
    for _ in range(STEPS):
        competitor.step()


def bytes_per_weight(kind: type[Competitor], problem: Problem) -> float:
    """The peak of such a training on a GPU, in bytes per gated weight: parameters, moments, gradients, activations and
    the competitor's copy of the batch."""
    device = problem.device
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    train(kind, problem)
    return (torch.cuda.max_memory_allocated(device) - before) / problem.numel
