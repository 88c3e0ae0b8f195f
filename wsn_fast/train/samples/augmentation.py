"""Augmentation of training images: crops and mirrored images, drawn anew in each epoch."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from wsn_fast.train.samples.batch import Epoch

BORDER = 4
"""Pixels on each side, as is usual for images of 32 x 32."""


class Augmentation(NamedTuple):
    """What is drawn for the batches of one epoch. It follows from the epoch alone, so that a resumed run, and one of
    several processes, draws the same.

    Attributes:
        epoch: the epoch, which decides what is drawn.
    """

    epoch: Epoch

    def __call__(self, x: Tensor, batch: int, part: slice = slice(None), whole: int | None = None) -> Tensor:
        """Crop each image at random from one with a border of ``BORDER`` zeros, and mirror half of them from left to
        right. Zero is the mean of a channel.

        Args:
            x: images [B, C, H, W].
            batch: the number of the batch in its epoch.
            part: which rows ``x`` are of the whole batch.
            whole: the number of rows of the whole batch; None means those of ``x``.

        Returns:
            Images of the same shape.
        """
        count = len(x) if whole is None else whole
        generator = self._generator(batch)
        places = torch.randint(2 * BORDER + 1, (2, count), generator=generator)[:, part]
        mirrored = torch.rand(count, generator=generator)[part] < 0.5
        height, width = x.shape[2:]
        rows = places[0, :, None] + torch.arange(height)
        columns = places[1, :, None] + torch.arange(width)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        rows, columns = rows.to(x.device, non_blocking=True), columns.to(x.device, non_blocking=True)
        images = torch.arange(len(x), device=x.device)[:, None, None]
        bordered = pad(x, (BORDER,) * 4).permute(0, 2, 3, 1)  # indices of one image's pixels are next to each other
        return bordered[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def _generator(self, batch: int) -> torch.Generator:
        numbers = "/".join(map(str, (*self.epoch, batch)))
        digest = hashlib.blake2b(f"augmentation/{numbers}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
