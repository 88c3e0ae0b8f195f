"""What streams do to images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from wsn_fast.train.data import Dataset


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and standard deviation per channel of uint8 images [N, C, H, W], float32 [C, 1, 1]; 1 is the
    deviation of a constant channel. They come from histograms, so that no float copy of the set is made."""
    histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    counts = torch.stack(histograms).double()
    values = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = counts @ values / total
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt()
    std[std == 0] = 1.0
    return mean.float()[:, None, None], std.float()[:, None, None]


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Rotate images [N, C, H, W] counter-clockwise about their centre, bilinear, zeros from outside."""
    height, width = x.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The coordinates of the grid go from -1 to 1 along either side. The ratio keeps angles right if the sides differ.
    theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    grid = affine_grid(theta, [1, 1, height, width], align_corners=False)
    # All images are rotated in the same way, so they become channels of one image and share one grid.
    return grid_sample(x.reshape(1, -1, height, width), grid, align_corners=False).view(x.shape)


def brought_together(datasets: Sequence[Dataset]) -> list[Dataset]:
    """The datasets with images of one shape, as one net needs them: grey images get the channels of the others, and
    smaller images a border of zeros, as in the paper's 5-Datasets.

    Raises:
        ValueError: two datasets with more than one channel differ in their number.
    """
    channels, height, width = (max(dataset.train_x.shape[side] for dataset in datasets) for side in (1, 2, 3))
    for dataset in datasets:
        if dataset.train_x.shape[1] not in (1, channels):
            raise ValueError(
                f"data: {dataset.name!r} has images of {dataset.train_x.shape[1]} channels, and another dataset of the "
                f"stream has {channels}"
            )

    def alike(images: Tensor) -> Tensor:
        above, left = (height - images.shape[2]) // 2, (width - images.shape[3]) // 2
        border = (left, width - images.shape[3] - left, above, height - images.shape[2] - above)
        return pad(images, border).expand(-1, channels, -1, -1)

    return [
        Dataset(d.name, alike(d.train_x), d.train_y, alike(d.test_x), d.test_y, d.classes)
        for d in datasets
    ]  # fmt: skip
