"""Samples that are measured again after every task."""

from __future__ import annotations

from collections.abc import Callable

import torch

from wsn_fast.train.samples.memory import SamplesInMemory
from wsn_fast.train.samples.samples import Samples

MOST_BYTES = 1 << 28


class KeptSamples:
    """Gives the samples of tasks, and keeps those in memory as long as they are small together.

    Args:
        make: makes the samples of a task.
        device: where they are kept.
    """

    def __init__(self, make: Callable[[int], Samples], device: torch.device) -> None:
        self._make, self._device = make, device
        self._kept: dict[int, Samples] = {}
        self._left = MOST_BYTES

    def __getitem__(self, task: int) -> Samples:
        """The samples of a task."""
        if task in self._kept:
            return self._kept[task]
        samples = self._make(task).to(self._device)
        size = samples.x.nbytes + samples.y.nbytes if isinstance(samples, SamplesInMemory) else 0
        if 0 < size <= self._left:
            self._kept[task] = samples
            self._left -= size
        return samples
