"""All cases, in sections: the one list behind ``pytest benchmarks`` and the device report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .cases import Case
from .elementwise import elementwise_cases
from .gradients import gradient_cases
from .products import conv_cases, linear_cases, task_cases
from .selection import many_cases, threshold_cases, worst_cases
from .shapes import Shapes
from .steps import step_cases


class Section(NamedTuple):
    """Cases that share a heading and a time limit on a GPU."""

    name: str
    seconds: float
    cases: Callable[[Shapes, torch.device], Iterator[Case]]
    compiled: bool = False


SECTIONS = (
    Section("Training steps", 100, lambda shapes, device: step_cases(shapes.steps[:3], device, False)),
    Section("Selection", 50, threshold_cases),
    Section("Masked linear products", 75, linear_cases),
    Section("Elementwise operations", 35, elementwise_cases),
    Section("Selection, awkward distributions", 20, worst_cases),
    Section("Selection, many tensors", 15, many_cases),
    Section("Gradients out of the product", 15, gradient_cases),
    Section("Several tasks in one batch", 20, task_cases),
    Section("Convolutions", 25, conv_cases),
    Section("Training steps of convolutions", 15, lambda shapes, device: step_cases(shapes.conv_steps, device, False)),
    Section("Training steps, further layers", 50, lambda shapes, device: step_cases(shapes.steps[3:], device, False)),
    # Last: how long a compiler takes is the hardest to foretell.
    Section("Training steps, compiled", 45, lambda shapes, device: step_cases(shapes.steps[:4], device, True), True),
)
"""The most valuable first: whatever ends a report early takes the least with it."""


def cases(shapes: Shapes, device: torch.device, *, compiled: bool) -> Iterator[Case]:
    """The cases of all sections, with those of ``torch.compile`` or without."""
    for section in SECTIONS:
        if compiled or not section.compiled:
            yield from section.cases(shapes, device)
