"""A benchmark case: it prepares its data and says how to check a call, and how much work the call must do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from wsn_fast.doctor.measuring.timing import Call


class Work(NamedTuple):
    """What a call must do at least: bytes to and from memory, floating-point operations."""

    bytes: float = 0.0
    flops: float = 0.0


_NO_WORK = Work()


@dataclass
class Prepared:
    """A case with its data in place."""

    calls: Sequence[Call]  # the same call on different data, enough of it to keep the data out of the L2 cache
    check: Callable[[Any], str]  # checks what the first call returned and says what it was compared with
    work: Work = _NO_WORK  # the least that one call must do, where a rate says something
    recheck: Callable[[], str] | None = None  # the check after the timing; None repeats the first call and its check
    capture: bool = True  # whether the calls can be captured in a CUDA graph
    loop: bool = False  # whether they are timed as a loop of eager calls
    poison: bool = True  # whether PyTorch may poison what the call allocates: guards of torch.compile would see it
    notes: Callable[[], dict[str, float]] = field(default=dict)  # measures further numbers, after the timing


@dataclass(frozen=True)
class Case:
    """One row of a table: a contender for an operation at a shape. It holds no data until ``prepare`` is called."""

    operation: str
    contender: str
    shape: str
    dtype: str
    prepare: Callable[[], Prepared]

    def __str__(self) -> str:
        return f"{self.operation}, {self.contender}, {self.shape}, {self.dtype}"


def verify(prepared: Prepared) -> str:
    """Make the first call in poisoned memory and check it; returns what the result was compared with."""
    with _poisoned_memory() if prepared.poison else nullcontext():
        result = prepared.calls[0]()
    return prepared.check(result)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Inside, ``torch.empty`` and its like give memory that is full of NaN, or of ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some operations have no deterministic form, which is not the point here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
