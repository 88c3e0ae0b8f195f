"""Cases of the selection: the exact threshold of one tensor, of awkward distributions, and of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from wsn_fast import ops
from wsn_fast.doctor.measuring.checks import UnavailableError, WrongResultError
from wsn_fast.doctor.measuring.launchers import threshold
from wsn_fast.doctor.measuring.timing import Call
from wsn_fast.doctor.measuring.weights import DENSITY, RULE, input_sets, rank
from wsn_fast.reference.trainer import ClarenaGate, PaperGate

from .cases import Case, Prepared, Work
from .checks import check_threshold
from .data import DISTRIBUTIONS, scores
from .library import BACKENDS, backend
from .shapes import Shapes

Select = Callable[[Tensor, int], Tensor]
"""From scores and rank to the threshold."""
Many = Callable[[list[Tensor], list[int]], Call]
"""From scores and ranks to a call that returns the thresholds."""


def threshold_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """One tensor of normal scores: the library and all its backends, eager PyTorch, and the published programs."""
    limited = partial(_prepare, limit=shapes.kthvalue_limit)
    others = {
        "sort": partial(_prepare, _sort),
        "topk": partial(_prepare, lambda s, j: s.abs().topk(s.numel() - j, sorted=False).values.min()),
        "kthvalue": partial(limited, lambda s, j: s.abs().kthvalue(j + 1).values),
        "paper": partial(limited, partial(_published, PaperGate), capture=False),
        "CLArena": partial(_prepare, partial(_published, ClarenaGate), check=_check_quantile),
    }
    ours = {"ours": partial(_prepare, lambda s, j: ops.topc_threshold(s, DENSITY, rule=RULE))}
    for n in shapes.thresholds:
        yield from _cases(ours | _backends() | others, n, device)


def worst_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """The library on distributions that are hard on counting, beside a normal one of the same size."""
    for kind in DISTRIBUTIONS:
        if kind != "normal" or shapes.worst not in shapes.thresholds:
            yield from _cases(_backends(), shapes.worst, device, kind)


def _backends() -> dict[str, Callable[..., Prepared]]:
    return {f"{name} backend": partial(_prepare, partial(_by_backend, name)) for name in BACKENDS}


def _cases(
    contenders: dict[str, Callable[..., Prepared]], n: int, device: torch.device, kind: str = "normal"
) -> Iterator[Case]:
    shape = str(n) if kind == "normal" else f"{n}, {kind}"
    for contender, prepare in contenders.items():
        yield Case("threshold", contender, shape, "float32", partial(prepare, n, device, kind))


# --- the contenders
def _by_backend(name: str, s: Tensor, j: int) -> Tensor:
    tau: Tensor = backend(name, "threshold", s.device, s.dtype).threshold(s, j, RULE)
    return tau


def _sort(s: Tensor, j: int) -> Tensor:
    return s.abs().sort().values[j]


def _published(gate: type[PaperGate], s: Tensor, j: int) -> Tensor:
    return torch.as_tensor(gate(s[:1]).threshold(s, DENSITY), dtype=s.dtype, device=s.device)


# --- the rows
def _check_quantile(tau: Tensor, s: Tensor, j: int, rule: str) -> str:
    """CLArena's has another rule, and is off by a few elements in fp32 when there are many: its check has a margin."""
    off = int((s < tau).sum()) - ops.threshold_rank(s.numel(), DENSITY, "value")
    if abs(off) > 1 + (s.numel() >> 20):
        raise WrongResultError(f"quantile: {off} elements from the rank that the value rule names")
    return f"the value rule's rank, {off:+d} elements"


def _prepare(
    select: Select,
    n: int,
    device: torch.device,
    kind: str,
    limit: int | None = None,
    capture: bool = True,
    check: Callable[[Tensor, Tensor, int, str], str] = check_threshold,
) -> Prepared:
    """From a function that allocates its result; with more scores than ``limit`` it is not tried."""
    if limit is not None and n > limit:
        raise UnavailableError(f"not tried above {limit} scores: it runs in a single block on a GPU")
    sets = [scores(n, device, kind) for _ in range(input_sets(4 * n, device))]
    calls = [partial(select, s, rank(n)) for s in sets]
    return Prepared(calls, lambda tau: check(tau, sets[0], rank(n), RULE), Work(4 * n), capture=capture)


# --- many tensors
def many_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Tensors of mixed sizes: all in one call, or one after the other."""
    count, smallest, largest = shapes.many
    sizes = [round(smallest * (largest / smallest) ** (i / (count - 1))) for i in range(count)]
    ways: dict[str, Many] = {"triton, one call": _triton_many}
    ways |= {f"{name} backend, in turn": partial(_in_turn, partial(_by_backend, name)) for name in BACKENDS}
    for contender, select in {**ways, "sort, in turn": partial(_in_turn, _sort)}.items():
        prepare = partial(_prepare_many, select, sizes, device)
        yield Case("threshold of many", contender, f"{count} tensors, {sum(sizes)} in all", "float32", prepare)


def _prepare_many(select: Many, sizes: list[int], device: torch.device) -> Prepared:
    tensors = [scores(n, device) for n in sizes]

    def check(taus: Sequence[Tensor]) -> str:
        verdicts = {check_threshold(tau, s, rank(s.numel()), RULE) for tau, s in zip(taus, tensors, strict=True)}
        return ", ".join(sorted(verdicts))

    return Prepared([select(tensors, [rank(n) for n in sizes])], check, Work(4 * sum(sizes)))


def _in_turn(select: Select, tensors: list[Tensor], ranks: list[int]) -> Call:
    return lambda: list(map(select, tensors, ranks))


def _triton_many(tensors: list[Tensor], ranks: list[int]) -> Call:
    launch, tau = threshold(tensors, ranks, RULE)
    return lambda: (launch(), tau.unbind())[1]
