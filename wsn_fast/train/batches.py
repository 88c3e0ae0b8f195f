"""The batches of one epoch of training."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from wsn_fast.train.augmentation import Augmentation


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch.

    Attributes:
        x: all inputs, [N, ...].
        y: their labels [N], on the same device.
        rows: row numbers of each batch, on that device.
        augment: changes inputs; None leaves them as they are.
    """

    x: Tensor
    y: Tensor
    rows: tuple[Tensor, ...]
    augment: Augmentation | None = None

    @property
    def samples(self) -> int:
        """The number of samples N."""
        return len(self.x)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.rows)

    def size(self, number: int) -> int:
        """The number of samples of a batch."""
        return len(self.rows[number])

    def take(self, number: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a part of the batch with this number. What is drawn for a sample does not depend on the
        part."""
        whole = self.rows[number]
        rows = whole[part]
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        return (x if self.augment is None else self.augment(x, number, part, len(whole))), y


def parts_of(size: int, count: int) -> list[slice]:
    """Cut a batch of ``size`` samples into ``count`` parts, as evenly as possible, the larger ones first."""
    ends = [0]
    for part in range(count):
        ends.append(ends[-1] + size // count + (part < size % count))
    return [slice(start, stop) for start, stop in pairwise(ends)]
