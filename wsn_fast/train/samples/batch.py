"""A batch of training, the share of one process in it, and the order of an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Epoch(NamedTuple):
    """An epoch of a run. All that is drawn in it follows from these numbers, so that a resumed run needs no saved state
    for it.

    Attributes:
        seed: that of the run.
        task: the task, counted from 0.
        epoch: the epoch, counted from 0.
    """

    seed: int
    task: int
    epoch: int

    def number(self, *more: int) -> int:
        """A number for seeding, which also depends on ``more``."""
        digest = hashlib.blake2b("/".join(map(str, (*self, *more))).encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big")

    def order(self, samples: int) -> Tensor:
        """The order of the samples, int64 [samples] on the CPU."""
        return torch.randperm(samples, generator=torch.Generator().manual_seed(self.number()))


@dataclass(frozen=True)
class Batch:
    """A batch of training.

    Attributes:
        size: the number of its samples.
        own: those that this process trains, between 0 and ``size``. If the batch is too small for all processes, it is
            a sample of another one.
        share: the part of the batch that counts for this process; 0.0 for a sample of another one.
        take: gives inputs and labels of a part of ``own``. What is drawn for a sample does not depend on the part.
        mark: a number above 0 that other labels hardly have; 0 where all processes surely have the same batch.
    """

    size: int
    own: slice
    share: float
    take: Callable[[slice], tuple[Tensor, Tensor]]
    mark: int = 0


class Share(NamedTuple):
    """Which samples of each batch a process trains, and which batches it measures.

    Attributes:
        rank: the number of the process.
        processes: how many there are.
    """

    rank: int = 0
    processes: int = 1

    def of(self, size: int) -> tuple[slice, float]:
        """``own`` and ``share`` of a :class:`Batch` of this size."""
        own = parts_of(size, self.processes)[self.rank]
        return (own, (own.stop - own.start) / size) if own.stop > own.start else (slice(0, 1), 0.0)

    def measures(self, number: int) -> bool:
        """Whether this process measures the batch with this number."""
        return number % self.processes == self.rank


ALL = Share()
"""That of a single process."""


def parts_of(size: int, count: int) -> list[slice]:
    """Cut a batch of ``size`` samples into ``count`` parts, as evenly as possible, the larger ones first."""
    ends = [0]
    for part in range(count):
        ends.append(ends[-1] + size // count + (part < size % count))
    return [slice(start, stop) for start, stop in pairwise(ends)]
