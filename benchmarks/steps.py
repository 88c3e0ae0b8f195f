"""Cases of whole training steps: every competitor on every layer and net, and profiles of some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from . import memory
from .baselines import COMPETITORS, Competitor, Dense, Ours, OursOnePass, step_bytes
from .cases import Case, Kernel, Prepared, compute_dtype, input_sets, name_of
from .problem import Problem, StepShape
from .profile import profile
from .shapes import ConvShape, NetShape

PROFILED: tuple[type[Competitor], ...] = (Dense, Ours, OursOnePass)
_BYTES_PER_WEIGHT = 40  # of weights, scores and moments of a step: what decides whether the L2 cache holds them


def step_cases(shapes: Iterable[StepShape], device: torch.device, compiled: bool) -> Iterator[Case]:
    """Every competitor for each layer or net, those under ``torch.compile`` alone or those without it.

    Args:
        shapes: of layers and nets.
        device: where.
        compiled: which of the two sorts.
    """
    for shape in shapes:
        for kind in COMPETITORS:
            if kind.compiled is compiled and not (kind.linear_only and _convolutional(shape)):
                prepare = partial(_prepare, kind, shape, device)
                yield Case(operation(shape), kind.name, str(shape), name_of(compute_dtype(device)), prepare)


def profile_cases(shapes: Iterable[StepShape], device: torch.device) -> Iterator[Case]:
    """What runs in the steps of a dense layer and of ours."""
    for shape in shapes:
        for kind in PROFILED:
            prepare = partial(_prepare, kind, shape, device, profiled=True)
            yield Case(f"{operation(shape)} profile", kind.name, str(shape), name_of(compute_dtype(device)), prepare)


def operation(shape: StepShape) -> str:
    """Which of the three sorts of steps it is."""
    return f"{'net' if isinstance(shape, NetShape) else 'conv' if isinstance(shape, ConvShape) else 'linear'} step"


def _convolutional(shape: StepShape) -> bool:
    return isinstance(shape, ConvShape) or (isinstance(shape, NetShape) and shape.convolutional)


def _prepare(kind: type[Competitor], shape: StepShape, device: torch.device, profiled: bool = False) -> Prepared:
    problem = Problem(shape, device)
    loop = problem.is_net or kind.captures
    # One layer of a small model would stay in the L2 cache; in training the others drive it out. A net is itself.
    alone = loop or profiled or kind.waits or kind.compiled
    count = 1 if alone else input_sets(_BYTES_PER_WEIGHT * problem.numel, device)
    competitors = [kind(problem) for _ in range(count)]
    for competitor in competitors:
        competitor.settle()

    def notes() -> dict[str, float]:
        if profiled:
            return {}
        return memory.on_gpu(kind, problem) if device.type == "cuda" else memory.on_cpu(kind, shape)

    kernels: Callable[[], list[Kernel]] | None = None
    if profiled:
        kernels = partial(profile, competitors[0].step, problem, kind is OursOnePass)
    masked = kind.rule is not None
    return Prepared(
        [c.step for c in competitors],
        competitors[0].check,
        problem.work(step_bytes(2 if masked else 1, problem.dtype.itemsize, masked)),
        recheck=competitors[0].check_later,
        capture=not kind.waits,
        loop=loop,
        poison=not kind.compiled,
        notes=notes,
        kernels=kernels,
    )
