"""Compile cases of ``wsn_fast.kernels.implicit_conv``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from compiling import CompileCase

from wsn_fast.kernels.implicit_conv import CONFIGS, DX_CONFIGS, IEEE_CONFIGS, masked_conv

from ._covering import covering
from ._launches import distinct, written_down
from ._products import COMPUTE, FLOATS, MASKS, SCORES, compute_of, tiles

BATCH, SIZE = 2, 16


class Shape(NamedTuple):
    """A convolution.

    Attributes:
        channels: of its input.
        kernel: height and width of the kernel.
        step: stride, padding and dilation.
        groups: groups of channels.
        memory: the order of the images in memory.
    """

    channels: int
    kernel: int
    step: int = 1
    groups: int = 1
    memory: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        last = " channels last" * (self.memory is torch.channels_last)
        return f"{self.channels} channels {self.kernel}x{self.kernel} step {self.step} groups {self.groups}{last}"


WIDE, ODD = Shape(128, 3), Shape(3, 3)
"""Rows of the weight are multiples of 16; or they begin inside a byte of the mask."""
SHAPES = (WIDE, ODD, Shape(16, 3, step=2, groups=2, memory=torch.channels_last), Shape(64, 1), Shape(3, 7, step=3))


def compile_cases() -> list[CompileCase]:
    """Every tile in the forms that take the most shared memory or registers; and any two of all the choices together
    that a launch can be of."""
    return distinct([case for backward in (False, True) for row in rows(backward) for case in _launch(row, backward)])


def rows(backward: bool) -> list[dict[str, Any]]:
    """The choices that make up the cases."""
    configs = DX_CONFIGS if backward else CONFIGS
    axes = {
        "tile": tiles(configs, configs, IEEE_CONFIGS), "compute": COMPUTE, "w": FLOATS, "mask": MASKS, "layout": SHAPES,
        "bias": (False,) if backward else (True, False),
    }  # fmt: skip
    return covering(axes, [{"tile": tile, "w": torch.float32, "mask": SCORES, "layout": WIDE} for tile in axes["tile"]])


def _launch(row: dict[str, Any], backward: bool) -> list[CompileCase]:
    shape, compute = row["layout"], compute_of(row)
    weight = (64, shape.channels // shape.groups, shape.kernel, shape.kernel)
    end = (SIZE + 2 * shape.step - shape.step * (shape.kernel - 1) - 1) // shape.step + 1
    before = torch.empty(BATCH, shape.channels, SIZE, SIZE, dtype=compute).contiguous(memory_format=shape.memory)
    after = torch.empty(BATCH, weight[0], end, end, dtype=compute).contiguous(memory_format=shape.memory)
    with written_down() as cases:
        masked_conv(
            after if backward else before,
            torch.empty(weight, dtype=row["w"]),
            before if backward else after,
            **row["mask"].arguments(*weight),
            bias=torch.empty(weight[0], dtype=compute) if row["bias"] else None,
            stride=(shape.step,) * 2,
            padding=(shape.step,) * 2,
            dilation=(shape.step,) * 2,
            groups=shape.groups,
            backward=backward,
            config=row["tile"].config,
            precision=row["tile"].precision,
        )
    return row["tile"].launched(cases, row, "masked_conv", backward)
