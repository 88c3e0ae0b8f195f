"""Which backend is faster for each elementwise operation: the usual one of a device, or PyTorch.

The choice of a backend knows no size. So PyTorch is chosen only if it is faster at every measured size, by more than
the noise of a machine in use: a median of at most ``CLEAR`` times the other one's. Otherwise the usual backend stays,
which is what most people run and what the tests know best. A larger size is measured only while PyTorch may still be
chosen. On a GPU, PyTorch's way has to fit into a CUDA graph, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch

from ...backends import PRIMITIVES, availability, comparison, native
from ...backends import torch as portable
from ...backends.tables import dtype_name
from ..measuring.checks import WrongResultError
from ..measuring.operations import OPERATIONS, Operands
from ..measuring.timing import Turns, in_turns
from ..measuring.weights import Weight, input_sets
from .trials import Found, Trials

SIZES = (1000, 30_000, 1_000_000)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLEAR = 0.9
PIECES = 8
"""Into how many tensors a weight is cut for the operations that take many, as those of a small net."""
TASKS = 5
"""Rows of a union."""
SETS = 4
"""Of operands, at most: a small GPU has room for them, and a CUDA graph for their calls."""


class Rival(NamedTuple):
    """An operation that two backends can run on a device.

    Attributes:
        operation: its name.
        dtype: of the tensors; None for an operation on bits.
        name: of the usual backend.
        module: the usual backend.
    """

    operation: str
    dtype: torch.dtype | None
    name: str
    module: ModuleType

    def __str__(self) -> str:
        return f"{self.operation} {dtype_name(self.dtype)}"


def rivals(device: torch.device) -> Iterator[Rival]:
    """Every elementwise operation and dtype that has two ways on a device, whatever is chosen there now."""
    for operation in PRIMITIVES:
        if operation not in OPERATIONS:
            continue
        for dtype in DTYPES if OPERATIONS[operation].typed else (None,):
            module = _usual(device, operation, dtype)
            if module is not None:
                yield Rival(operation, dtype, "triton" if device.type == "cuda" else "native", module)


def _usual(device: torch.device, operation: str, dtype: torch.dtype | None) -> ModuleType | None:
    if device.type == "cuda":
        return availability.triton(operation, device, dtype, forced=False)[0]
    return native if device.type == "cpu" and native.supports(operation, dtype) is None else None


def measure(trials: Trials, found: Found, *, sizes: tuple[int, ...] = SIZES, seconds: float = 0.25) -> None:
    """An entry for each operation and dtype until the time is up.

    Args:
        trials: the device, and the time.
        found: takes the name of the table, and an entry.
        sizes: numbers of elements.
        seconds: of measuring at each size.
    """
    for rival in rivals(trials.device):
        entry = trials.attempt(str(rival), partial(compare, rival, trials.device, sizes, seconds))
        if entry is not None:
            found("backends", {rival.operation: {dtype_name(rival.dtype): entry}})


def compare(rival: Rival, device: torch.device, sizes: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """The entry of an operation.

    Raises:
        WrongResultError: the usual backend does not compute what the torch backend computes.
    """
    where = comparison.FEW(device, rival.dtype or torch.float32)
    problem = comparison.first_problem(rival.operation, rival.module, where)
    if problem is not None:
        raise WrongResultError(problem)
    by_size: dict[str, Turns] = {}
    chosen = "torch"
    for n in sizes:
        if chosen == "torch":
            by_size[str(n)] = _turns(rival, device, n, seconds)
            chosen = choice(rival.name, device, list(by_size.values()))
    times = {
        size: {name: round(turns.timing(name).median_us, 3) for name in turns.times} for size, turns in by_size.items()
    }
    return {"choose": chosen, "times": times}


def choice(usual: str, device: torch.device, measured: list[Turns]) -> str:
    """Return "torch" where it is clearly faster in all that was measured, else the usual backend."""
    clear = all(turns.timing("torch").median_us <= CLEAR * turns.timing(usual).median_us for turns in measured)
    captured = device.type != "cuda" or all(turns.how["torch"] == "graph" for turns in measured)
    return "torch" if measured and clear and captured else usual


def _turns(rival: Rival, device: torch.device, n: int, seconds: float) -> Turns:
    operation, dtype = OPERATIONS[rival.operation], rival.dtype or torch.float32
    sets = input_sets(operation.bytes_each(dtype.itemsize, dtype.itemsize, TASKS) * n, device, SETS)
    weights = [Weight.random((n,), device, TASKS, dtype, dtype) for _ in range(sets)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = {
            name: [operation.prepare(Operands(module, w, dtype, PIECES)) for w in weights]
            for name, module in ((rival.name, rival.module), ("torch", portable))
        }
        return in_turns(calls, device, seconds=seconds)
