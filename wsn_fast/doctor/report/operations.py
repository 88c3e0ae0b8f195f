"""The times of the elementwise primitives, beside PyTorch's and beside the least that memory allows."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, NamedTuple

import torch

from ...backends import choose
from ...backends import torch as portable
from ...backends.tables import dtype_name
from ..measuring.attempts import Attempts
from ..measuring.operations import OPERATIONS, Operands
from ..measuring.timing import Timing, Turns, in_turns, time_calls
from ..measuring.weights import Weight, compute_dtype, input_sets

PIECES, TASKS = 8, 5
SETS = 4
"""Of operands, at most: a small GPU has room for them."""


class Copy(NamedTuple):
    """A large copy, which is what memory can do: its bytes, read and written, and its times."""

    bytes: float
    timing: Timing

    @property
    def bytes_per_us(self) -> float:
        """What memory moves."""
        return self.bytes / self.timing.median_us


def quantiles(timing: Timing) -> dict[str, Any]:
    """A timing for the report."""
    return {
        "median_us": round(timing.median_us, 3), "p20_us": round(timing.p20_us, 3), "p80_us": round(timing.p80_us, 3),
        "repeats": timing.repeats, "how": timing.how,
    }  # fmt: skip


def copied(device: torch.device, elements: int, seconds: float) -> Copy:
    """Copy so many float32 numbers."""
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    # A negation moves what a copy moves. A copy in a CUDA graph is no kernel, and on an H200 a third slower.
    call = partial(torch.neg, source, out=target) if device.type == "cuda" else partial(target.copy_, source)
    return Copy(8.0 * elements, time_calls([call], device, seconds=seconds))


def times(
    attempts: Attempts, device: torch.device, sizes: tuple[int, ...], copy: Copy | None, seconds: float
) -> list[dict[str, Any]]:
    """A row for each primitive and size.

    Args:
        attempts: until when to measure.
        device: where.
        sizes: numbers of elements.
        copy: what memory can do; None where that is unknown.
        seconds: of measuring, for a row.
    """
    rows = []
    for n in sizes:
        for name in OPERATIONS:
            measure = partial(_row, name, n, device, copy, (seconds, attempts.deadline))
            row = attempts.attempt(f"{name} of {n} elements on {device}", measure)
            rows += [] if row is None else [row]
    return rows


def _row(name: str, n: int, device: torch.device, copy: Copy | None, time: tuple[float, float]) -> dict[str, Any]:
    """The row of a primitive. ``time`` has the seconds of measuring, and the end of all measuring."""
    operation, dtype = OPERATIONS[name], compute_dtype(device)
    chosen = choose(name, device, torch.float32 if operation.typed else None)
    moved = operation.bytes_each(torch.float32.itemsize, dtype.itemsize, TASKS) * n
    weights = [Weight.random((n,), device, TASKS) for _ in range(input_sets(moved, device, SETS))]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = {
            which: [operation.prepare(Operands(module, w, dtype, PIECES)) for w in weights]
            for which, module in {"chosen": chosen.backend, "torch": portable}.items()
            if which == "chosen" or chosen.name != "torch"
        }
        turns = in_turns(calls, device, seconds=time[0], until=time[1])
    row = {
        "operation": name, "elements": n, "dtype": dtype_name(dtype if operation.typed else None),
        "backend": chosen.name, "bytes": moved, "time": quantiles(turns.timing("chosen")),
    }  # fmt: skip
    return row | _beside(turns, moved, copy)


def _beside(turns: Turns, moved: float, copy: Copy | None) -> dict[str, Any]:
    """The floor, PyTorch's times, and the ratios to both; None where there is none."""
    floor = None if copy is None else moved / copy.bytes_per_us
    both = "torch" in turns.times
    return {
        "floor_us": None if floor is None else round(floor, 3),
        "x_floor": None if floor is None else round(turns.timing("chosen").median_us / floor, 3),
        "torch": quantiles(turns.timing("torch")) if both else None,
        "x_torch": round(turns.ratio("chosen", "torch"), 3) if both else None,
    }
