"""Cases of the elementwise operations: gate, gradient masking, packed masks. A table of operations, one row builder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsn_fast import reference

from . import published
from .cases import Case, Prepared, Work, check_same, compute_dtype, input_sets, name_of
from .contenders import BACKENDS, backend
from .data import FROZEN, Gate
from .shapes import Shapes

RULE = "magnitude"
Make = Callable[[Gate], Callable[[], Any]]
"""From the operands to a call that returns the results."""


class Operation(NamedTuple):
    """One operation on the operands of :class:`Gate`.

    Attributes:
        name: as the backends call it.
        bytes_each: the least bytes per weight to read and write.
        run: a backend's call.
        expected: the results by the reference.
        others: further contenders.
        waiting: those of them that copy from the CPU, so that no CUDA graph can hold them.
        typed: whether it works on floats, whose dtype decides which backends have it.
    """

    name: str
    bytes_each: float
    run: Callable[[ModuleType, Gate], Any]
    expected: Callable[[Gate], tuple[Tensor, ...]]
    others: Mapping[str, Make] = {}
    waiting: Collection[str] = ()
    typed: bool = True


def elementwise_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Every primitive beside the selection by every backend, and the paper's ways of gate and gradient."""
    dtype = compute_dtype(device)
    for n in shapes.elementwise:
        for operation in (*_float_operations(dtype), *_bit_operations(shapes.tasks)):
            makers: dict[str, Make] = dict(operation.others)
            makers |= {f"{name} backend": partial(_by_backend, operation, name, device) for name in BACKENDS}
            for contender, make in makers.items():
                capture = contender not in operation.waiting
                prepare = partial(_prepare, operation, make, n, shapes.tasks, device, capture)
                yield Case(operation.name, contender, str(n), name_of(dtype), prepare)


def _by_backend(operation: Operation, name: str, device: torch.device, operands: Gate) -> Callable[[], Any]:
    module = backend(name, operation.name, device, operands.weight.dtype if operation.typed else None)
    return partial(operation.run, module, operands)


def _prepare(operation: Operation, make: Make, n: int, tasks: int, device: torch.device, capture: bool) -> Prepared:
    dtype = compute_dtype(device)
    sets = [Gate.random(n, device, dtype, tasks) for _ in range(input_sets(operation.bytes_each * n, device))]
    expected = operation.expected(sets[0])
    results: list[Any] = []

    def keep(call: Callable[[], Any]) -> None:
        results[:] = [call()]

    def check() -> str:
        got = (results[0],) if isinstance(results[0], Tensor) else results[0]
        for i, (one, right) in enumerate(zip(got, expected, strict=True)):
            check_same(one, right, f"{operation.name}, result {i}")
        return "reference: bitwise"

    calls = [partial(keep, make(operands)) for operands in sets]
    return Prepared(calls, check, [Work(operation.bytes_each * n)], capture=capture)


def _float_operations(dtype: torch.dtype) -> Iterator[Operation]:
    """The gate from scores and from a packed mask, and the gradient masking."""

    def paper_gate(g: Gate) -> Callable[[], Tensor]:
        zeros, ones = torch.zeros(g.weight.shape), torch.ones(g.weight.shape)
        return lambda: (g.weight * published.paper_gate(g.scores, g.tau, zeros, ones)).to(dtype)

    def paper_gradient(g: Gate) -> Callable[[], tuple[Tensor, Tensor]]:
        mask, used = g.mask.float(), g.frozen.long()

        def call() -> tuple[Tensor, Tensor]:
            grad = g.grad.float()
            dw, ds = grad * mask, grad * g.weight * g.scores.sign()
            published.paper_protect(dw, used)
            return dw, ds

        return call

    def masked(g: Gate) -> tuple[Tensor, ...]:
        return (reference.select(g.mask, g.weight.to(dtype)),)

    yield Operation(
        "gate",
        4 + 4 + dtype.itemsize,
        lambda b, g: b.gate(g.weight, g.scores, g.tau, RULE, dtype),
        masked,
        {"paper": paper_gate},
        waiting={"paper"},
    )
    yield Operation(
        "gate_packed", 4 + 1 / 8 + dtype.itemsize, lambda b, g: b.gate_packed(g.weight, g.packed, dtype), masked
    )
    yield Operation(
        "gate_backward",
        dtype.itemsize + 4 + 4 + 1 / 8 + 4 + 4,
        lambda b, g: b.gate_backward(g.grad, g.weight, g.scores, g.tau, g.packed_frozen, RULE, True, True),
        lambda g: reference.gate_backward(g.grad.float(), g.weight, g.scores, g.mask, g.frozen),
        {"paper": paper_gradient},
    )


def _bit_operations(tasks: int) -> Iterator[Operation]:
    """Packed masks, and putting frozen values back, in place: the same again each time it is repeated."""

    def restore(module: ModuleType, g: Gate) -> Tensor:
        module.restore_frozen(g.scores, g.weight, g.packed_frozen)
        return g.scores

    yield Operation("pack", 1 + 1 / 8, lambda b, g: b.pack(g.mask), lambda g: (_bits(g.mask),), typed=False)
    yield Operation(
        "unpack", 1 + 1 / 8, lambda b, g: b.unpack(g.packed, g.mask.numel()), lambda g: (g.mask,), typed=False
    )
    yield Operation(
        "union",
        (tasks + 1) / 8,
        lambda b, g: b.union(g.task_rows),
        lambda g: (_bits(reference.union_masks(_unpacked(row, g.mask.numel()) for row in g.task_rows)),),
        typed=False,
    )
    yield Operation("popcount", 1 / 8, lambda b, g: b.popcount(g.packed), lambda g: (g.mask.sum(),), typed=False)
    yield Operation(
        "restore_frozen",
        FROZEN * (4 + 4) + 1 / 8,
        restore,
        lambda g: (torch.where(g.frozen, g.weight, g.scores),),
    )


def _bits(mask: Tensor) -> Tensor:
    """The packed form by its definition: element i is bit i % 8 of byte i // 8."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = torch.zeros_like(padded[:, 0])
    for bit in range(8):
        packed |= padded[:, bit] << bit
    return packed


def _unpacked(packed: Tensor, n: int) -> Tensor:
    return torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1).view(-1)[:n].bool()
