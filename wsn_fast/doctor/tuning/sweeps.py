"""What the tuner measures of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...backends.tables import dtype_name
from ..measuring.shapes import ConvShape

Size = tuple[int, int]
"""[outputs, inputs] of a weight."""


class Precision(NamedTuple):
    """A compute dtype, and how float32 is multiplied. 16-bit types are listed under "tf32", which they do not use."""

    dtype: torch.dtype
    name: str

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {self.name}"


BF16, FP16 = Precision(torch.bfloat16, "tf32"), Precision(torch.float16, "tf32")
TF32, IEEE = Precision(torch.float32, "tf32"), Precision(torch.float32, "ieee")


@dataclass(frozen=True)
class Sweep:
    """What is measured. The first of ``precisions`` is measured in everything, the others in linear layers."""

    elementwise: int
    precisions: tuple[Precision, ...]
    sizes: tuple[Size, ...]
    rows: tuple[int, ...]
    grad_sizes: tuple[Size, ...]
    grad_rows: tuple[int, ...]
    tasks: int
    task_sizes: tuple[Size, ...]
    task_rows: tuple[int, ...]
    convs: tuple[ConvShape, ...]


FULL = Sweep(
    elementwise=1 << 24,
    precisions=(BF16, TF32, FP16, IEEE),
    sizes=((4096, 4096), (1024, 1024), (4096, 16384), (16384, 4096), (512, 512)),
    rows=(1, 8, 16, 32, 64, 128, 256),
    grad_sizes=((4096, 4096), (1024, 1024)),
    grad_rows=(32, 64, 128, 256, 1024, 4096, 16384),
    tasks=8,
    task_sizes=((4096, 4096), (1024, 1024)),
    task_rows=(8, 16, 32, 64, 128, 256),
    convs=tuple(
        ConvShape(64, channels, size, outputs, 3, padding=1)
        for channels, size, outputs in ((64, 32, 128), (256, 16, 256), (64, 56, 64), (512, 7, 512))
    ),
)
