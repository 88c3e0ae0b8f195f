"""Cases of the selection: the exact threshold of one tensor, of awkward distributions, and of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from wsn_fast import ops

from . import launches, published
from .cases import (
    Case,
    Prepared,
    UnavailableError,
    Work,
    WrongResultError,
    check_threshold,
    input_sets,
    total_bytes,
)
from .contenders import BACKENDS, backend, cuda_select
from .data import DENSITY, DISTRIBUTIONS, rank, scores
from .shapes import Shapes
from .timing import Call

RULE = "magnitude"
_MOVED = 1e-3
Select = Callable[[Tensor, int], Tensor]
Prepare = Callable[[int, torch.device, str], Prepared]


def threshold_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """One tensor of normal scores: ours by every backend, what eager PyTorch offers, and what is published."""
    for n in shapes.thresholds:
        for contender, prepare in {**_ours(), **_theirs(shapes.kthvalue_limit)}.items():
            yield _case(contender, prepare, n, device)


def worst_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Ours on distributions that are hard on counting, beside a normal one of the same size."""
    for kind in DISTRIBUTIONS:
        if kind == "normal" and shapes.worst in shapes.thresholds:
            continue
        for contender, prepare in _ours().items():
            yield _case(contender, prepare, shapes.worst, device, kind)


def many_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Tensors of mixed sizes: all in one call, or one after the other."""
    count, smallest, largest = shapes.many
    sizes = [round(smallest * (largest / smallest) ** (i / (count - 1))) for i in range(count)]
    makers: dict[str, Callable[[list[Tensor]], tuple[Call, Sequence[Tensor]]]] = {
        "triton, one call": _triton_many,
        "CUDA, one call": _cuda_many,
        **{f"{name} backend, in turn": _in_turn(partial(_by_backend, name)) for name in BACKENDS},
        "sort, in turn": _in_turn(_sort),
    }
    for contender, make in makers.items():
        yield Case(
            "threshold of many",
            contender,
            f"{count} tensors, {sum(sizes)} in all",
            "float32",
            partial(_prepare_many, make, sizes, device),
        )


def _case(contender: str, prepare: Prepare, n: int, device: torch.device, kind: str = "normal") -> Case:
    shape = str(n) if kind == "normal" else f"{n}, {kind}"
    return Case("threshold", contender, shape, "float32", partial(prepare, n, device, kind))


def _ours() -> dict[str, Prepare]:
    by_backend = {f"{name} backend": partial(_prepare, partial(_by_backend, name)) for name in BACKENDS}
    return {**by_backend, "CUDA, cold": partial(_prepare, _cuda), "CUDA, warm": _prepare_warm}


def _theirs(kthvalue_limit: int) -> dict[str, Prepare]:
    return {
        "sort": partial(_prepare, _sort),
        "topk": partial(_prepare, _topk),
        "kthvalue": partial(_prepare, _kthvalue, limit=kthvalue_limit),
        "paper": partial(_prepare, _paper, limit=kthvalue_limit, capture=False),
        "CLArena": _prepare_quantile,
    }


# --- the contenders: scores and rank to the threshold
def _by_backend(name: str, s: Tensor, j: int) -> Tensor:
    tau: Tensor = backend(name, "threshold", s.device, s.dtype).threshold(s, j, RULE)
    return tau


def _cuda(s: Tensor, j: int) -> Tensor:
    tau: Tensor = cuda_select(s.device).thresholds([s.detach()], [j], RULE)[0]
    return tau


def _sort(s: Tensor, j: int) -> Tensor:
    return s.abs().sort().values[j]


def _topk(s: Tensor, j: int) -> Tensor:
    return s.abs().topk(s.numel() - j, sorted=False).values.min()


def _kthvalue(s: Tensor, j: int) -> Tensor:
    return s.abs().kthvalue(j + 1).values


def _paper(s: Tensor, j: int) -> Tensor:
    return s.new_tensor(published.paper_threshold(s, DENSITY))


# --- the rows
def _prepare(
    select: Select, n: int, device: torch.device, kind: str, *, limit: int | None = None, capture: bool = True
) -> Prepared:
    """From a function that allocates its result; with more scores than ``limit`` it is not tried."""
    if limit is not None and n > limit:
        raise UnavailableError(f"not tried above {limit} scores: it runs in a single block on a GPU")
    sets = [scores(n, device, kind) for _ in range(input_sets(4 * n, device))]
    result: list[Tensor] = []

    @torch.no_grad()
    def call(s: Tensor) -> None:
        result[:] = [select(s, rank(n))]

    return Prepared(
        [partial(call, s) for s in sets],
        lambda: check_threshold(result[0], sets[0], rank(n), RULE),
        [Work(4 * n)],
        capture=capture,
    )


def _prepare_warm(n: int, device: torch.device, kind: str) -> Prepared:
    """With the state of the call before, on scores that move by a thousandth from call to call, as they do in training;
    those of special values stay."""
    cuda, start = cuda_select(device), scores(n, device, kind).detach()
    moved = _MOVED if kind == "normal" else 0.0
    sets = [start + moved * torch.randn(n, device=device) for _ in range(max(2, input_sets(4 * n, device)))]
    state = cuda.WarmStart(1, device)
    result: list[Tensor] = []

    def call(s: Tensor) -> None:
        result[:] = [cuda.thresholds([s], [rank(n)], RULE, state)[0]]

    call(sets[1])
    return Prepared(
        [partial(call, s) for s in sets],
        lambda: check_threshold(result[0], sets[0], rank(n), RULE),
        [Work(4 * n)],
        notes=lambda: {name: float(value) for name, value in state.statistics()[0]._asdict().items()},
    )


def _prepare_quantile(n: int, device: torch.device, kind: str) -> Prepared:
    """CLArena's: another rule, and in fp32 off by a few elements when n is large, so that its check has a margin."""
    s = scores(n, device, kind)
    result: list[Tensor] = []

    def call() -> None:
        result[:] = [published.clarena_threshold(s, DENSITY)]

    def check() -> str:
        off = int((s < result[0]).sum()) - ops.threshold_rank(n, DENSITY, "value")
        if abs(off) > 1 + (n >> 20):
            raise WrongResultError(f"quantile: {off} elements from the rank that the value rule names")
        return f"the value rule's rank, {off:+d} elements"

    return Prepared([call], check, [Work(4 * n)])


def _prepare_many(
    make: Callable[[list[Tensor]], tuple[Call, Sequence[Tensor]]], sizes: list[int], device: torch.device
) -> Prepared:
    tensors = [scores(n, device) for n in sizes]
    call, results = make(tensors)

    def check() -> str:
        pairs = zip(results, tensors, strict=True)
        return ", ".join(sorted({check_threshold(tau, t, rank(t.numel()), RULE) for tau, t in pairs}))

    return Prepared([call], check, [Work(total_bytes(tensors))])


def _in_turn(select: Select) -> Callable[[list[Tensor]], tuple[Call, Sequence[Tensor]]]:
    def make(tensors: list[Tensor]) -> tuple[Call, Sequence[Tensor]]:
        results: list[Tensor] = []

        @torch.no_grad()
        def call() -> None:
            results[:] = [select(t, rank(t.numel())) for t in tensors]

        return call, results

    return make


def _triton_many(tensors: list[Tensor]) -> tuple[Call, Sequence[Tensor]]:
    call, tau = launches.threshold(tensors, [rank(t.numel()) for t in tensors], RULE)
    return call, tau.fill_(torch.nan).unbind()


def _cuda_many(tensors: list[Tensor]) -> tuple[Call, Sequence[Tensor]]:
    cuda = cuda_select(tensors[0].device)
    results: list[Tensor] = []

    def call() -> None:
        results[:] = cuda.thresholds([t.detach() for t in tensors], [rank(t.numel()) for t in tensors], RULE)

    return call, results
