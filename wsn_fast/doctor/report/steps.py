"""The times of a training step of a subnet layer, beside the dense layer and the best that plain PyTorch can do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..measuring.attempts import Attempts
from ..measuring.competitors import Competitor, Dense, Eager
from ..measuring.ours import Ours, OursOnePass, OursOnePassCoded
from ..measuring.peak_memory import bytes_per_weight
from ..measuring.problem import Problem
from ..measuring.shapes import LinearShape
from ..measuring.timing import Turns, in_turns
from ..measuring.weights import input_sets
from .operations import quantiles

KINDS: tuple[type[Competitor], ...] = (Dense, Eager, Ours, OursOnePass, OursOnePassCoded)
BYTES_PER_WEIGHT = 40
"""Of weights, scores and moments of a step: what decides whether the L2 cache of a GPU holds them."""


def times(
    attempts: Attempts, device: torch.device, shapes: tuple[LinearShape, ...], seconds: float
) -> list[dict[str, Any]]:
    """A row for each shape and competitor. A competitor whose first step is wrong has no row.

    Args:
        attempts: until when to measure.
        device: where.
        shapes: of the layers.
        seconds: of measuring, for a shape.
    """
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        what = f"steps of {shape} on {device}"
        rows += attempts.attempt(what, partial(_rows, attempts, device, shape, seconds)) or ()
    return rows


def _rows(attempts: Attempts, device: torch.device, shape: LinearShape, seconds: float) -> list[dict[str, Any]]:
    problem = Problem(shape, device)
    sets = input_sets(BYTES_PER_WEIGHT * problem.numel, device)
    made: dict[type[Competitor], list[Competitor]] = {}
    for kind in KINDS:
        right = attempts.attempt(f"{kind.name} on {shape}", partial(_checked, kind, problem, sets))
        if right is not None:
            made[kind] = right
    calls = {kind.name: [one.step for one in all_] for kind, all_ in made.items()}
    turns = in_turns(calls, device, seconds=seconds, until=attempts.deadline)
    rows = []
    for kind, competitors in made.items():
        later = attempts.finish(f"{kind.name} on {shape}, after the timing", competitors[0].check_later)
        if later is None:
            continue
        others = (Dense, Eager)
        ratios = {f"x_{other.name.split()[-1]}": _ratio(turns, kind, other, made) for other in others}
        row = {"shape": str(shape), "step": kind.name, "time": quantiles(turns.timing(kind.name)), **ratios}
        rows.append(row | {"peak_bytes_per_weight": _memory(attempts, kind, problem)})
    return rows


def _checked(kind: type[Competitor], problem: Problem, sets: int) -> list[Competitor]:
    """Competitors on different data, the first of which made a right first step."""
    competitors = [kind(problem) for _ in range(sets)]
    competitors[0].step()
    competitors[0].check()
    return competitors


def _ratio(turns: Turns, kind: type[Competitor], other: type[Competitor], made: Any) -> float | None:
    return round(turns.ratio(kind.name, other.name), 3) if other in made else None


def _memory(attempts: Attempts, kind: type[Competitor], problem: Problem) -> float | None:
    if problem.device.type != "cuda":
        return None
    peak = attempts.finish(f"memory of {kind.name}", partial(bytes_per_weight, kind, problem))
    return None if peak is None else round(peak, 2)
