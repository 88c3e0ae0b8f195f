"""The batches of an epoch in the order of the samples."""

from __future__ import annotations

from torch import Tensor

from wsn_fast.train.samples import Batch


def in_order(x: Tensor, y: Tensor, batch_size: int) -> list[Batch]:
    """Batches of inputs and labels, for a single process."""
    return [
        Batch(len(part[1]), slice(0, len(part[1])), 1.0, lambda rows, part=part: (part[0][rows], part[1][rows]))  # type: ignore[misc]
        for part in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
