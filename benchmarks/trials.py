"""What the tuner measures with: the sweep, and candidates that are tried one after the other until the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from . import launches
from .cases import name_of
from .shapes import ConvShape
from .timing import Call

Clock = Callable[[Sequence[Call]], float]
"""Microseconds of a call."""
Size = tuple[int, int]
"""[outputs, inputs] of a weight."""


class Precision(NamedTuple):
    """A compute dtype, and how float32 is multiplied; 16-bit types are under "tf32", which they do not use."""

    dtype: torch.dtype
    name: str

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} {self.name}"

    def product(self, operation: str, source: str, backward: bool, device: torch.device) -> Any:
        """The key of the tables, which knows the tiles to choose from."""
        launches.kernels("matmul", device)
        from wsn_fast.backends import tuning

        return tuning.Product(operation, self.dtype, self.name, source, backward)


BF16, FP16 = Precision(torch.bfloat16, "tf32"), Precision(torch.float16, "tf32")
TF32, IEEE = Precision(torch.float32, "tf32"), Precision(torch.float32, "ieee")


@dataclass(frozen=True)
class Sweep:
    """What is measured. ``precisions``: the first is measured in everything before the others in linear layers."""

    elementwise: int
    precisions: tuple[Precision, ...]
    sizes: tuple[Size, ...]
    rows: tuple[int, ...]
    grad_sizes: tuple[Size, ...]
    grad_rows: tuple[int, ...]
    tasks: int
    task_sizes: tuple[Size, ...]
    task_rows: tuple[int, ...]
    convs: tuple[ConvShape, ...]


class Trials:
    """Tries candidates until the time is up, and notes what came to nothing.

    Args:
        device: where.
        clock: how calls are timed.
        deadline: of ``time.monotonic``.

    Attributes:
        not_measured: a line for everything that failed or that there was no time for.
        processors: of the device.
    """

    def __init__(self, device: torch.device, clock: Clock, deadline: float) -> None:
        self.device, self.clock, self.deadline = device, clock, deadline
        self.not_measured: list[str] = []
        self.processors = 1
        if device.type == "cuda":
            self.processors = torch.cuda.get_device_properties(device).multi_processor_count

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """The result of ``measure``; None, and a line in ``not_measured``, if it failed or there is no time for it."""
        if time.monotonic() > self.deadline:
            self.not_measured.append(f"{what}: no time left")
            return None
        try:
            torch.manual_seed(0)
            return measure()
        except Exception as error:  # one candidate that does not compile or is wrong must not cost the rest
            self.not_measured.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            return None

    def best(self, what: str, candidates: Sequence[Any], time_one: Callable[[Any], float]) -> tuple[Any, float] | None:
        """The fastest candidate and its time; None if there is none."""
        times = [(c, self.attempt(f"{what}, {c}", partial(time_one, c))) for c in candidates]
        measured = [(c, us) for c, us in times if us is not None]
        return min(measured, key=lambda pair: pair[1]) if measured else None


@contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """How PyTorch multiplies float32 inside, for a comparison on equal terms."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = name
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def as_list(config: Any) -> list[int]:
    """A tile as the files have it."""
    return list(astuple(config))
