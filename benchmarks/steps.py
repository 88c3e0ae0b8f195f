"""Cases of whole training steps: every competitor on every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from .baselines import COMPETITORS, Competitor, step_bytes
from .cases import Case, Prepared, compute_dtype, input_sets, name_of
from .problem import LayerShape, Problem
from .shapes import ConvShape

_BYTES_PER_WEIGHT = 40  # of weights, scores and moments of a step: what decides whether the L2 cache holds them


def step_cases(layers: Iterable[LayerShape], device: torch.device, compiled: bool) -> Iterator[Case]:
    """Every competitor for each layer, those under ``torch.compile`` alone or those without it.

    Args:
        layers: linear or convolutional.
        device: where.
        compiled: which of the two sorts.
    """
    for layer in layers:
        operation = "conv step" if isinstance(layer, ConvShape) else "linear step"
        for competitor in COMPETITORS:
            if competitor.compiled is compiled:
                prepare = partial(_prepare, competitor, layer, device)
                yield Case(operation, competitor.name, str(layer), name_of(compute_dtype(device)), prepare)


def _prepare(kind: type[Competitor], layer: LayerShape, device: torch.device) -> Prepared:
    problem = Problem(layer, device)
    n = problem.weight.numel()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    # One layer of a small model would stay in the L2 cache; in training the others drive it out.
    count = 1 if kind.waits or kind.compiled else input_sets(_BYTES_PER_WEIGHT * n, device)
    competitors = [kind(problem) for _ in range(count)]

    masked = kind.rule is not None
    elementwise = step_bytes(2 if masked else 1, problem.dtype.itemsize, masked)

    def notes() -> dict[str, float]:
        if device.type != "cuda" or count > 1:
            return {}
        torch.cuda.reset_peak_memory_stats(device)
        competitors[0].step()
        return {"peak bytes per weight": (torch.cuda.max_memory_allocated(device) - before) / n}

    return Prepared(
        [c.step for c in competitors],
        competitors[0].check,
        problem.work(elementwise),
        recheck=competitors[0].check_later,
        capture=not kind.waits,
        poison=not kind.compiled,
        notes=notes,
    )
