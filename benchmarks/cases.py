"""What all benchmarks are made of: a case prepares its data, says how to check a call, and what the call must move."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wsn_fast import reference

from .timing import Call

_POISON = {torch.uint8: 0xA5, torch.bool: True, torch.int64: -1}
MAX_SETS = 160


class WrongResultError(Exception):
    """A call computed something else than it should; its time is worth nothing."""


class UnavailableError(Exception):
    """A contender does not exist on this machine, with the reason."""


class Work(NamedTuple):
    """The least that a stage of a computation must do: bytes to and from memory, floating-point operations."""

    bytes: float = 0.0
    flops: float = 0.0


class Rates(NamedTuple):
    """What the device was measured to do: bytes per second (read plus written), operations per second by dtype."""

    bandwidth: float
    flops: dict[str, float]


class Kernel(NamedTuple):
    """A kernel in the profile of a call.

    Attributes:
        name: as the profiler has it, shortened.
        calls: per call of the benchmark.
        us: device time of these together.
        share: of the device time of the call.
        role: what it does, "" if nobody knows.
        bytes: the least that it has to move, all its calls together; None if nobody knows.
    """

    name: str
    calls: float
    us: float
    share: float
    role: str
    bytes: float | None


@dataclass
class Prepared:
    """A case with its data in place.

    Attributes:
        calls: the same call on different data, as many as keep the data out of the L2 cache.
        check: looks at the result of the first of them and says what it was compared with.
        work: stages that follow one another; their sum is the floor.
        outputs: where the first call writes, poisoned before it; empty where a call allocates its results, which is
            poisoned by torch itself.
        recheck: asked after the timing; None runs the first call and ``check`` once more.
        capture: whether the calls can be captured in a CUDA graph.
        loop: whether they are to be timed as a loop of eager calls (see :func:`benchmarks.timing.time_calls`).
        poison: whether torch may poison what the checked call allocates: not under ``torch.compile``, whose guards
            would see it.
        notes: further numbers, read after the timing.
        kernels: lists what one call runs on the device; None for rows that do not want to know.
    """

    calls: Sequence[Call]
    check: Callable[[], str]
    work: Sequence[Work]
    outputs: Sequence[Tensor] = ()
    recheck: Callable[[], str] | None = None
    capture: bool = True
    loop: bool = False
    poison: bool = True
    notes: Callable[[], dict[str, float]] = field(default=dict)
    kernels: Callable[[], list[Kernel]] | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table: a contender for an operation at a shape. It holds no data until ``prepare`` is called."""

    operation: str
    contender: str
    shape: str
    dtype: str
    prepare: Callable[[], Prepared]

    @property
    def group(self) -> str:
        """Rows of one group do the same work."""
        return f"{self.operation} {self.shape} {self.dtype}"

    def __str__(self) -> str:
        return f"{self.operation}, {self.contender}, {self.shape}, {self.dtype}"


def verify(prepared: Prepared) -> str:
    """Poison the outputs, make the first call and check it: what it was compared with.

    Raises:
        WrongResultError: the result is not right.
    """
    for output in prepared.outputs:
        output.fill_(_POISON.get(output.dtype, math.nan))
    with _poisoned_memory() if prepared.poison else nullcontext():
        prepared.calls[0]()
    return prepared.check()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """What ``torch.empty`` and its like give is full of NaN, or of ones, inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some operations have no deterministic form, which is not the point here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def floor_us(work: Sequence[Work], rates: Rates, dtype: str) -> float | None:
    """The sum over the stages of the larger of bytes / bandwidth and operations / rate, in microseconds.

    None if a stage computes in a dtype whose rate was not measured.
    """
    total = 0.0
    for stage in work:
        if stage.flops and dtype not in rates.flops:
            return None
        total += max(stage.bytes / rates.bandwidth, stage.flops / rates.flops[dtype] if stage.flops else 0.0)
    return total * 1e6


def input_sets(bytes_each: float, device: torch.device) -> int:
    """How many sets of inputs of this size keep a GPU's L2 cache from holding the next one; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_SETS, math.ceil(3 * l2 / max(bytes_each, 1.0))))


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU, as autocast has it; fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


# --- checks
def check_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every value equal, NaN to NaN; -0.0 equals +0.0.

    Raises:
        WrongResultError: with the number of differences and the first.
    """
    if actual.shape != expected.shape or actual.dtype is not expected.dtype:
        raise WrongResultError(
            f"{what}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    if torch.equal(actual, expected):
        return
    wrong = actual != expected
    if actual.is_floating_point():
        wrong &= ~(actual.isnan() & expected.isnan())
    count = int(wrong.sum())
    if count:
        first = tuple(wrong.nonzero()[0].tolist())
        pair = f"{actual[first].item()!r} for {expected[first].item()!r}"
        raise WrongResultError(f"{what}: {count} of {wrong.numel()} differ, the first at {first}: {pair}")


def check_close(actual: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    """The 2x rule: the error against float64 at most twice torch's own at the same dtype, in the largest element and in
    the root of the mean square; half a unit in the last place of the largest value is allowed beside it, since torch is
    at times exact by luck.

    Raises:
        WrongResultError: with both errors.
    """
    if actual.shape != exact.shape or not bool(actual.isfinite().all()):
        raise WrongResultError(f"{what}: shape {list(actual.shape)} for {list(exact.shape)}, or not all finite")
    ours, theirs = (t.double() - exact for t in (actual, torchs))
    unit = torch.finfo(torchs.dtype).eps / 2
    for measure, size in (("largest", _largest), ("mean square", _rms)):
        error, allowed = size(ours), 2 * size(theirs) + unit * size(exact)
        if not error <= allowed:
            raise WrongResultError(f"{what}: {measure} error {error:.3g}, allowed {allowed:.3g} (twice torch's own)")


def _largest(t: Tensor) -> float:
    return float(t.abs().max())


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


def check_threshold(tau: Tensor, scores: Tensor, rank: int, rule: str) -> str:
    """That ``tau`` is the key of ``rank``, by the reference's sort, or by counting where a sort would not fit."""
    keys = reference.gate_key(scores.detach(), rule).reshape(-1)
    tau = tau.detach().reshape(()).to(keys.device)
    if keys.numel() <= 1 << 26:
        expected = keys.sort().values[rank]
        check_same(tau, expected, "threshold")
        check_same(~(keys < tau), ~(keys < expected), "mask")
        return "reference: threshold and mask bitwise"
    below, upto = int((keys < tau).sum()), int((keys <= tau).sum())
    if not below <= rank < upto:
        raise WrongResultError(f"threshold: {below} keys below it and {upto} not above, for rank {rank}")
    return "counted: exactly the rank'th key"


def total_bytes(tensors: Iterable[Tensor | None]) -> float:
    """Bytes of all tensors together."""
    return float(sum(t.numel() * t.element_size() for t in tensors if t is not None))
