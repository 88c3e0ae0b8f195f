"""What a run asks of the samples of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from wsn_fast.train.samples.batch import ALL, Batch, Epoch, Share

# This number is part of the results: kernels may round differently for another batch size.
EVAL_BATCH = 1024


class Samples(ABC):
    """The samples of one part of a task: for training, for validation or for testing."""

    each_process_loads_all = False
    """Whether each process loads whole batches by itself, so that they might differ."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the batches."""

    @abstractmethod
    def to(self, device: torch.device) -> Samples:
        """The same samples, which give their batches on this device."""

    @property
    @abstractmethod
    def count(self) -> int | None:
        """The number of samples; None if that is not known before all have been loaded."""

    @abstractmethod
    def batches(self, batch_size: int) -> int | None:
        """The number of batches of an epoch of training; None if that is not known before its end."""

    @abstractmethod
    def epoch(self, batch_size: int, epoch: Epoch, *, augment: bool = False, share: Share = ALL) -> Iterator[Batch]:
        """The batches of an epoch of training.

        Args:
            batch_size: samples per batch; the last one may have fewer.
            epoch: decides the order of the samples, and all else that is drawn.
            augment: whether images are changed at random (see :mod:`wsn_fast.train.samples.augmentation`).
            share: what this process trains.
        """

    @abstractmethod
    def in_order(self, share: Share = ALL) -> Iterator[tuple[Tensor, Tensor] | None]:
        """The inputs and labels of batches for measuring; None for a batch that another process measures."""

    @abstractmethod
    def first(self, count: int) -> Tensor:
        """The inputs of the first samples: ``count``, or all of them if there are fewer."""
