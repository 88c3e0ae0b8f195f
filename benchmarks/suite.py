"""All cases, in sections: the one list behind ``pytest benchmarks`` and the device report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .cases import Case
from .elementwise import device_cases, elementwise_cases
from .selection import many_cases, threshold_cases, worst_cases
from .shapes import Shapes
from .steps import inference_cases, step_cases

PARTS = ("steps", "operations")


class Section(NamedTuple):
    """Cases that share a heading and a time limit. ``part`` is "steps" or "operations", or "" for both."""

    name: str
    seconds: float
    part: str
    cases: Callable[[Shapes, torch.device], Iterator[Case]]
    compiled: bool = False


SECTIONS = (
    Section("The device", 30, "", device_cases),
    Section("Training steps", 120, "steps", lambda s, device: step_cases(s.steps, device)),
    Section("Training steps of nets", 90, "steps", lambda s, device: step_cases(s.nets, device)),
    Section("Inference of a finished task", 20, "steps", lambda s, device: inference_cases(s.inference, device)),
    Section("Selection", 50, "operations", threshold_cases),
    Section("Elementwise operations", 35, "operations", elementwise_cases),
    Section("Selection, awkward distributions", 20, "operations", worst_cases),
    Section("Selection, many tensors", 15, "operations", many_cases),
    Section("Training steps, further layers", 120, "steps", lambda s, device: step_cases(s.more_steps, device)),
    Section("Training steps of convolutions", 20, "steps", lambda s, device: step_cases(s.conv_steps, device)),
    # Last: the time of a compiler is the hardest to foretell.
    Section(
        "Training steps, compiled", 120, "steps",
        lambda s, device: step_cases((*s.steps, *s.nets, *s.more_steps), device, compiled=True), compiled=True,
    ),
)  # fmt: skip
"""The most valuable sections come first, so that a report which ends early lacks the least valuable ones."""


class Planned(NamedTuple):
    """A row to come: its section, the seconds that the section may take, and its case."""

    section: str
    seconds: float
    case: Case


def plan(shapes: Shapes, device: torch.device, *, compiled: bool, part: str = "all", only: str = "") -> list[Planned]:
    """Every row of a part whose name contains ``only``, in order, with those of ``torch.compile`` if ``compiled``. It
    makes no data and does not touch the device."""
    sections = [s for s in SECTIONS if (compiled or not s.compiled) and (part == "all" or s.part in ("", part))]
    planned = (Planned(s.name, s.seconds, case) for s in sections for case in s.cases(shapes, device))
    return [row for row in planned if only in str(row.case)]
