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
from .steps import profile_cases, step_cases


class Section(NamedTuple):
    """Cases that share a heading and a time limit on a GPU. ``part`` is "steps" or "operations"."""

    name: str
    seconds: float
    cases: Callable[[Shapes, torch.device], Iterator[Case]]
    part: str = "operations"
    compiled: bool = False


def _steps(name: str, seconds: float, *fields: str, compiled: bool = False) -> Section:
    """Training steps of the shapes in these fields of :class:`Shapes`."""

    def cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
        for field in fields:
            yield from step_cases(getattr(shapes, field), device, compiled)

    return Section(name, seconds, cases, "steps", compiled)


SECTIONS = (
    _steps("Training steps", 120, "steps"),
    _steps("Training steps of nets", 90, "nets"),
    # Behind what is timed as a loop: a profiler leaves the host a little slower.
    Section("Profile", 15, lambda shapes, device: profile_cases(shapes.steps[:1], device), "steps"),
    Section("Selection", 50, threshold_cases),
    Section("Masked linear products", 75, linear_cases),
    Section("Elementwise operations", 35, elementwise_cases),
    Section("Selection, awkward distributions", 20, worst_cases),
    Section("Selection, many tensors", 15, many_cases),
    Section("Gradients out of the product", 15, gradient_cases),
    Section("Several tasks in one batch", 20, task_cases),
    Section("Convolutions", 25, conv_cases),
    _steps("Training steps, further layers", 120, "more_steps"),
    _steps("Training steps of convolutions", 20, "conv_steps"),
    # Last: how long a compiler takes is the hardest to foretell.
    _steps("Training steps, compiled", 120, "steps", "nets", "more_steps", compiled=True),
)
"""The most valuable first: whatever ends a report early takes the least with it."""
PARTS = ("steps", "operations")


def cases(shapes: Shapes, device: torch.device, *, compiled: bool) -> Iterator[Case]:
    """The cases of all sections but profiles, with those of ``torch.compile`` or without."""
    for section in SECTIONS:
        if section.name != "Profile" and (compiled or not section.compiled):
            yield from section.cases(shapes, device)
