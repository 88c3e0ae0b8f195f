"""A dataset in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wsn_fast.train.data.files import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification dataset in memory.

    Attributes:
        name: One of `DATASETS`, or any name for data of one's own.
        train_x: Training images, uint8 [N, C, H, W], raw pixel values (0..255; `digits`: 0..16).
        train_y: Training labels, int64 [N], in 0..classes-1.
        test_x: Test images, uint8 [M, C, H, W].
        test_y: Test labels, int64 [M].
        classes: Number of classes.
        superclasses: The number of the superclass of each class, int64 [classes], -1 for a class that has none; None
            if there are no superclasses.
        fingerprint: Hex blake2b over shapes and bytes, superclasses aside: a resumed run can refuse data that changed.

    Raises:
        DataError: If dtypes, shapes, counts or labels do not fit together.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    superclasses: Tensor | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        """Check that the parts fit together and take the fingerprint."""
        check_split(self.train_x, self.train_y, self.classes, f"{self.name} (train)")
        check_split(self.test_x, self.test_y, self.classes, f"{self.name} (test)")
        train, test = tuple(self.train_x.shape[1:]), tuple(self.test_x.shape[1:])
        if train != test:
            raise DataError(f"{self.name}: training images are {train}, test images {test}")
        groups = self.superclasses
        if groups is not None and (groups.dtype != torch.int64 or groups.shape != (self.classes,)):
            raise DataError(
                f"{self.name}: expected int64 superclasses [{self.classes}], got {groups.dtype} {list(groups.shape)}"
            )
        digest = hashlib.blake2b(str(self.classes).encode(), digest_size=16)
        for part in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.contiguous().numpy().data)
        object.__setattr__(self, "fingerprint", digest.hexdigest())


def check_split(images: Tensor, labels: Tensor, classes: int, where: str) -> None:
    """Raise ``DataError`` unless the images and labels of one split fit together; ``where`` names them."""
    dtypes, dims = (images.dtype, labels.dtype), (images.ndim, labels.ndim)
    if dtypes != (torch.uint8, torch.int64) or dims != (4, 1):
        raise DataError(
            f"{where}: expected uint8 images [N, C, H, W] and int64 labels [N], got "
            f"{images.dtype} {list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    if len(images) != len(labels):
        raise DataError(f"{where}: {len(images)} images but {len(labels)} labels")
    if images.numel() == 0:
        raise DataError(f"{where}: no images (shape {list(images.shape)})")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{where}: label {low if low < 0 else high} is outside 0..{classes - 1}")
