"""Cases of whole training steps and of inference: every competitor on every layer and net."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from wsn_fast.backends.tables import dtype_name
from wsn_fast.doctor.measuring.checks import check_close
from wsn_fast.doctor.measuring.competitors import Competitor
from wsn_fast.doctor.measuring.peak_memory import bytes_per_weight
from wsn_fast.doctor.measuring.shapes import ConvShape
from wsn_fast.doctor.measuring.weights import compute_dtype, input_sets

from . import memory
from .cases import Case, Prepared
from .ours import COMPETITORS
from .problem import StepShape, problem_of
from .shapes import NetShape

INFERRING = ("ours", "dense", "best eager", "paper", "CLArena")
_BYTES_PER_WEIGHT = 40  # of weights, scores and moments of a step: what decides whether the L2 cache holds them


def step_cases(shapes: Iterable[StepShape], device: torch.device, compiled: bool = False) -> Iterator[Case]:
    """Every competitor for each layer or net, those under ``torch.compile`` alone or those without it."""
    for shape in shapes:
        sort = "net" if isinstance(shape, NetShape) else "conv" if isinstance(shape, ConvShape) else "linear"
        for kind in _competitors(shape):
            if kind.compiled is compiled:
                prepare = partial(_prepare, kind, shape, device)
                yield Case(f"{sort} step", kind.name, str(shape), dtype_name(compute_dtype(device)), prepare)


def inference_cases(shapes: Iterable[StepShape], device: torch.device) -> Iterator[Case]:
    """The result of a finished task, with its mask as each program keeps it, without gradients."""
    for shape in shapes:
        for kind in _competitors(shape):
            if kind.name in INFERRING:
                prepare = partial(_prepare_inference, kind, shape, device)
                yield Case("inference", kind.name, str(shape), dtype_name(compute_dtype(device)), prepare)


def _competitors(shape: StepShape) -> list[type[Competitor]]:
    """Those that have the layers of this shape."""
    convolutional = isinstance(shape, ConvShape) or (isinstance(shape, NetShape) and shape.net != "mlp")
    return [kind for kind in COMPETITORS if not (kind.linear_only and convolutional)]


def _prepare(kind: type[Competitor], shape: StepShape, device: torch.device) -> Prepared:
    problem = problem_of(shape, device)
    loop = problem.is_net or kind.captures
    # One layer of a small model would stay in the L2 cache; in training the others drive it out. A net is itself.
    alone = loop or kind.waits or kind.compiled
    count = 1 if alone else input_sets(_BYTES_PER_WEIGHT * problem.numel, device)
    competitors = [kind(problem) for _ in range(count)]
    for competitor in competitors:
        competitor.settle()

    def notes() -> dict[str, float]:
        return {memory.NOTE: bytes_per_weight(kind, problem)} if device.type == "cuda" else memory.on_cpu(kind, shape)

    return Prepared(
        [c.step for c in competitors],
        lambda _: competitors[0].check(),
        recheck=competitors[0].check_later,
        capture=not kind.waits,
        loop=loop,
        poison=not kind.compiled,
        notes=notes,
    )


def _prepare_inference(kind: type[Competitor], shape: StepShape, device: torch.device) -> Prepared:
    problem = problem_of(shape, device)
    competitor = kind(problem)
    masks, _ = competitor.masks()
    competitor.finish()
    torchs, exact = (problem.results(masks, kind.rule, exact)["y"] for exact in (False, True))

    def check(y: torch.Tensor) -> str:
        check_close(y, torchs, exact, "y")
        return "fp64: at most twice torch's error, with the specified mask"

    return Prepared([competitor.infer], check, loop=True)
