"""``python -m wsn_fast.doctor --check``: every operation on this machine's devices, compared with the torch backend.

:mod:`wsn_fast.backends.comparison` compares; the library does the same on fewer tensors before it first uses an
operation. Here every distribution of scores is tried, also the products that no layer uses before a tuning table says
that they are faster, and on a GPU each operation once more as the replay of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch

from ..backends import PRIMITIVES, candidate, comparison
from .findings import devices
from .replays import Replays

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Verdict(NamedTuple):
    """What was found about an operation on tensors of one dtype.

    Attributes:
        operation: one of ``PRIMITIVES``.
        dtype: of the tensors, or "bits" for operations on packed masks.
        backend: the backend that would be chosen there, were it right.
        problem: what is wrong, or None.
        note: why it was not compared, or how, or nothing.
    """

    operation: str
    dtype: str
    backend: str
    problem: str | None
    note: str = ""

    @property
    def compared(self) -> bool:
        """Whether there was something to compare with the torch backend."""
        return self.backend != "torch"


def check(device: torch.device) -> Iterator[Verdict]:
    """Compare every operation that another backend than torch would do on ``device``, one at a time."""
    for operation in PRIMITIVES:
        for dtype in (None,) if operation in comparison.ON_BITS else DTYPES:
            choice = candidate(operation, device, dtype)
            verdict = partial(Verdict, operation, "bits" if dtype is None else str(dtype).removeprefix("torch."))
            if choice.name == "torch":
                yield verdict("torch", None, choice.reason)
            else:
                problem = _problem(operation, choice.backend, dtype or comparison.ANY, device)
                yield verdict(choice.name, problem, "" if device.type == "cpu" else "also captured")


def _problem(operation: str, module: ModuleType, dtype: torch.dtype, device: torch.device) -> str | None:
    problem = comparison.first_problem(operation, module, comparison.ALL(device, dtype))
    if problem is None and device.type == "cuda":
        problem = comparison.first_problem(operation, Replays(module), comparison.FEW(device, dtype))
        problem = problem and f"captured in a CUDA graph: {problem}"
    return problem


def main() -> int:
    """Check every device of this machine, and print a line for each operation. Return 1 if one is wrong, else 0."""
    wrong = 0
    for device, name in devices():
        print(f"{device}: {name}")
        for verdict in check(device):
            wrong += verdict.problem is not None
            says = "right" if verdict.problem is None else f"WRONG: {verdict.problem}"
            says = f"{says} {verdict.note and f'({verdict.note})'}" if verdict.compared else verdict.note
            print(f"  {verdict.operation:20}{verdict.dtype:10}{verdict.backend:8}{says}".rstrip(), flush=True)
    print(
        f"{wrong} operations are wrong; report them with this output" if wrong else "every compared operation is right"
    )
    return min(wrong, 1)
