"""What real steps launch: Triton's kernels as its JIT specialises them, with their grids, and torch's operators.

A step trains one linear layer without bias, with float32 parameters and bf16 autocast, on CPU tensors over the stand-in
for ``libcuda`` of ``tests/support``. The batch is one row: only what depends on the size of the weight is looked at.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast.backends import choice
from wsn_fast.backends import triton as backend

from .provenance import ROOT

sys.path.append(str(ROOT / "tests" / "support"))
steps = importlib.import_module("counted_steps")

WARM = 2  # steps before those that are looked at
LOOKS = 3  # steps that are looked at; allocations of torch decide whether gradients lie where they lay before
PRODUCTS = frozenset(("mm", "addmm"))
OVERWRITING = ("copy_", "zero_", "fill_")  # operators that do not read what they write to


class Launch(NamedTuple):
    """A launch of a Triton kernel.

    Attributes:
        kernel: the compiled kernel.
        programs: of the grid.
        values: the arguments that are numbers or types, by name.
    """

    kernel: Any
    programs: int
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As profiles show it."""
        return self.kernel.metadata.name


class Step(NamedTuple):
    """What a step launches: Triton's kernels, and by torch's operators the bytes that each moves at least. Products and
    operators on small tensors are left out."""

    launches: list[Launch]
    operators: list[tuple[str, int]]


class _Operators(TorchDispatchMode):
    """Writes down the operators that touch a tensor of at least ``size`` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result, given = func(*args, **(kwargs or {})), kwargs or {}
        name = func.overloadpacket.__name__
        if name not in PRODUCTS and steps.Operators.launches(func):
            arguments = func._schema.arguments
            values = [*args, *(given.get(one.name) for one in arguments[len(args) :])]
            read: list[Tensor] = []
            written = [] if func._schema.is_mutable else _tensors(result)
            for argument, value in zip(arguments, values, strict=True):
                # Fused optimizers may write to the gradients, but only with a scaler.
                writes = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
                written += _tensors(value) if writes else []
                read += [] if writes and name.endswith(OVERWRITING) else _tensors(value)
            moved = sum(t.numel() * t.element_size() for t in (*read, *written) if t.numel() >= self.size)
            self.found += [(name, moved)] if moved else []
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


@contextmanager
def _caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of Triton from now on."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    real = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=warmup, **kwargs)
        values = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        launches.append(Launch(kernel, math.prod(grid), values))
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield launches


def _look_at(work: Callable[[], object], warm: int, size: int, monkeypatch: pytest.MonkeyPatch) -> Step:
    """What ``work`` launches after ``warm`` calls: the fewest kernels of a few calls."""

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            work()

    for _ in range(warm):
        run()
    steps_seen = []
    for _ in range(LOOKS if warm else 1):
        with _caught(monkeypatch) as launches, monkeypatch.context() as patch, _Operators(size) as operators:
            # While a dispatch mode is on, the library would take the operators that such a mode can see.
            patch.setattr(choice, "_modes", lambda: 0)
            run()
        steps_seen.append(Step(launches, operators.found))
    return min(steps_seen, key=lambda step: len(step.launches))


def _net(side: int) -> nn.Sequential:
    """A linear layer whose values are not set: nothing is computed."""
    return nn.Sequential(nn.utils.skip_init(nn.Linear, side, side, bias=False))


def dense_step(side: int, monkeypatch: pytest.MonkeyPatch) -> Step:
    """A step of a dense layer with torch's fused AdamW."""
    step = steps.dense_step("dense", _net(side), torch.zeros(1, side))
    return _look_at(step, 1, side * side, monkeypatch)


def training_step(mode: str, side: int, union: bool, monkeypatch: pytest.MonkeyPatch) -> Step:
    """A step of the second task, or without a union of the first."""
    wsn, x = steps.subnet(_net(side)), torch.zeros(1, side)
    if union:
        step = steps.step_of(mode, wsn, x)
    else:
        wsn.begin_task(0)
        step = steps.training_step(mode, wsn, x)
    return _look_at(step, WARM, side * side, monkeypatch)


def first_evaluation(side: int, monkeypatch: pytest.MonkeyPatch) -> Step:
    """The first batch of a finished task; the later ones find the masked weight kept."""
    step = steps.step_of("evaluation", steps.subnet(_net(side)), torch.zeros(1, side))
    return _look_at(step, 0, side * side, monkeypatch)


def cold_select(side: int, monkeypatch: pytest.MonkeyPatch) -> Step:
    """The threshold of scores that no window is known for."""
    scores = torch.empty(side, side)
    return _look_at(lambda: backend.threshold(scores, side * side // 2, "magnitude"), 1, side * side, monkeypatch)
