"""Samples in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wsn_fast.train.samples.augmentation import Augmentation
from wsn_fast.train.samples.batch import ALL, Batch, Epoch, Share
from wsn_fast.train.samples.samples import EVAL_BATCH, Samples


@dataclass(frozen=True, eq=False)
class SamplesInMemory(Samples):
    """Samples in memory.

    Attributes:
        x: the inputs, [N, ...].
        y: their labels [N], on the same device.
    """

    x: Tensor
    y: Tensor

    @property
    def device(self) -> torch.device:
        """See :attr:`Samples.device`."""
        return self.x.device

    def to(self, device: torch.device) -> SamplesInMemory:
        """See :meth:`Samples.to`."""
        return SamplesInMemory(self.x.to(device), self.y.to(device))

    @property
    def count(self) -> int:
        """See :attr:`Samples.count`."""
        return len(self.x)

    def batches(self, batch_size: int) -> int:
        """See :meth:`Samples.batches`."""
        return -(-self.count // batch_size)

    def epoch(self, batch_size: int, epoch: Epoch, *, augment: bool = False, share: Share = ALL) -> Iterator[Batch]:
        """See :meth:`Samples.epoch`."""
        order = epoch.order(self.count).to(self.x.device)
        changes = Augmentation(epoch) if augment else None
        for number, rows in enumerate(order.split(batch_size)):
            yield Batch(len(rows), *share.of(len(rows)), partial(self._take, rows, number, changes))

    def _take(self, rows: Tensor, number: int, changes: Augmentation | None, part: slice) -> tuple[Tensor, Tensor]:
        x, y = (values.index_select(0, rows[part]) for values in (self.x, self.y))
        return (x if changes is None else changes(x, number, part, len(rows))), y

    def in_order(self, share: Share = ALL) -> Iterator[tuple[Tensor, Tensor] | None]:
        """See :meth:`Samples.in_order`."""
        for number, batch in enumerate(zip(self.x.split(EVAL_BATCH), self.y.split(EVAL_BATCH), strict=True)):
            yield batch if share.measures(number) else None

    def first(self, count: int) -> Tensor:
        """See :meth:`Samples.first`."""
        return self.x[:count]
