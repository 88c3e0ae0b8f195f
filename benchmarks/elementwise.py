"""Cases of the elementwise operations: gate, gradient masking, packed masks. A table of operations, one row builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wsn_fast.backends.mask import GateOrder, GradientOrder, RestoreOrder
from wsn_fast.reference import specification

from .cases import Case, Prepared, Work, compute_dtype, input_sets, name_of
from .checks import WrongResultError, check_same
from .data import DENSITY, FROZEN, RULE, Weight, rank
from .library import BACKENDS, backend
from .products import Results
from .shapes import Shapes


class Operation(NamedTuple):
    """One operation on the operands of :class:`Weight`."""

    name: str  # as the backends call it
    bytes_each: float  # the least bytes per weight to read and write
    run: Callable[[ModuleType, Weight], Any]  # a backend's call; or what prepares one, see below
    expected: Callable[[Weight], Results]  # the results by the reference
    typed: bool = True  # whether it works on floats, whose dtype decides which backends have it
    prepares: bool = False  # whether ``run`` returns the call, since there is more to prepare than the operands


def elementwise_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Every primitive beside the selection by every backend."""
    dtype = compute_dtype(device)
    for n in shapes.elementwise:
        for operation in _operations(dtype, shapes.tasks):
            for name in BACKENDS:
                prepare = partial(_prepare, operation, name, n, shapes.tasks, device)
                yield Case(operation.name, f"{name} backend", str(n), name_of(dtype), prepare)


def device_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """What the device can do: a large copy, and a large product in each compute dtype, on random data."""
    n, side = (1 << 12, 64) if shapes.tasks < 5 else (1 << 28, 8192) if device.type == "cuda" else (1 << 24, 1024)
    yield Case("copy", "torch", f"{n} values", "float32", partial(_copy, n, device))
    for dtype in dict.fromkeys((compute_dtype(device), torch.float32)):
        yield Case("matmul", "torch", f"{side}^3", name_of(dtype), partial(_matmul, side, dtype, device))


def _copy(n: int, device: torch.device) -> Prepared:
    source, target = torch.randn(n, device=device), torch.full((n,), torch.nan, device=device)

    def check(copied: Tensor) -> str:
        check_same(copied, -source, "copy")
        return "bitwise"

    # A negation moves what a copy moves. A copy in a CUDA graph is no kernel, and on an H200 a third slower.
    return Prepared([partial(torch.neg, source, out=target)], check, Work(2.0 * 4 * n))


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.full_like(a, torch.nan)

    def check(product: Tensor) -> str:
        exact = a[:64].double() @ b.double()
        error = float((product[:64].double() - exact).norm() / exact.norm())
        if not error < (4 if dtype.itemsize < 4 else side**0.5) * torch.finfo(dtype).eps:
            raise WrongResultError(f"relative error {error:.3g} in the first rows")
        return f"fp64, first rows: relative error {error:.1g}"

    work = Work(3.0 * dtype.itemsize * side**2, 2.0 * side**3)
    return Prepared([partial(torch.mm, a, b, out=out)], check, work)


def _prepare(operation: Operation, name: str, n: int, tasks: int, device: torch.device) -> Prepared:
    module = backend(name, operation.name, device, torch.float32 if operation.typed else None)
    sets = [Weight.random((n,), device, tasks) for _ in range(input_sets(operation.bytes_each * n, device))]
    expected = operation.expected(sets[0])

    def check(got: Results) -> str:
        pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (got, expected)), strict=True)
        for i, (one, right) in enumerate(pairs):
            check_same(one, right, f"{operation.name}, result {i}")
        return "reference: bitwise"

    calls = [operation.run(module, w) if operation.prepares else partial(operation.run, module, w) for w in sets]
    return Prepared(calls, check, Work(operation.bytes_each * n))


def _operations(dtype: torch.dtype, tasks: int) -> tuple[Operation, ...]:
    """Gate and gradient masking; packed masks; putting frozen values back, which gives the same when it is repeated."""

    def restore(module: ModuleType, w: Weight) -> Tensor:
        module.restore_frozen(w.scores, w.weight, w.packed_frozen)
        return w.scores

    def restored(w: Weight) -> Tensor:
        return w.weight.where(w.frozen, w.scores)

    def union(w: Weight) -> Tensor:
        return _bits(specification.union_masks(_unpacked(row, w.mask.numel()) for row in w.task_masks))

    def gradients(module: ModuleType, w: Weight) -> tuple[Tensor, ...]:
        return module.gate_backward(w.grad, w.weight, w.scores, w.tau, w.packed_frozen, RULE, True, True)

    def masked(w: Weight) -> Tensor:
        return w.as_specified(dtype)

    def masked_gradients(w: Weight) -> tuple[Tensor, ...]:
        return specification.gate_backward(w.grad.float(), w.weight, w.scores, w.mask, w.frozen)

    size = dtype.itemsize
    return (
        Operation("gate", 4 + 4 + size, lambda b, w: b.gate(w.weight, w.scores, w.tau, RULE, dtype), masked),
        Operation("gate_packed", 4 + 1 / 8 + size, lambda b, w: b.gate_packed(w.weight, w.packed, dtype), masked),
        Operation("gate_backward", size + 4 + 4 + 1 / 8 + 4 + 4, gradients, masked_gradients),
        Operation("gates", 4 + 4 + size, partial(_gates, dtype), partial(_expected_gates, dtype), prepares=True),
        Operation("gates_backward", size + 4 + 4 + 1 / 8 + 4 + 4, _gates_backward, masked_gradients, prepares=True),
        Operation("pack", 1 + 1 / 8, lambda b, w: b.pack(w.mask), lambda w: _bits(w.mask), False),
        Operation("unpack", 1 + 1 / 8, lambda b, w: b.unpack(w.packed, w.mask.numel()), lambda w: w.mask, False),
        Operation("union", (tasks + 1) / 8, lambda b, w: b.union(w.task_masks), union, False),
        Operation("popcount", 1 / 8, lambda b, w: b.popcount(w.packed), lambda w: w.mask.sum(), False),
        Operation("restore_frozen", FROZEN * (4 + 4) + 1 / 8, restore, restored),
        Operation("restore_frozen_many", FROZEN * (4 + 4) + 1 / 8, _restore_many, restored, prepares=True),
    )


PIECES = 64
"""Into how many tensors a weight is cut for the primitives that take many."""


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    size = -(-tensors[0].numel() // (8 * PIECES)) * 8  # whole bytes of packed masks
    yield from zip(*(x.view(-1).split(size // 8 if x.dtype is torch.uint8 else size) for x in tensors), strict=True)


def _gates(dtype: torch.dtype, module: ModuleType, w: Weight) -> Callable[[], Tensor]:
    """The call of ``gates`` on the pieces of a weight, which returns all masked weights in one."""
    masked, plan = torch.full_like(w.weight, torch.nan, dtype=dtype), {}
    orders = [GateOrder(a, s, rank(a.numel()), RULE, out) for a, s, out in _pieces(w.weight, w.scores, masked)]

    def call() -> Tensor:
        module.gates(orders, plan)
        return masked

    return call


def _expected_gates(dtype: torch.dtype, w: Weight) -> Tensor:
    gated = (specification.select(specification.topc_mask(s, DENSITY), a) for a, s in _pieces(w.weight, w.scores))
    return torch.cat(list(gated)).to(dtype)


def _gates_backward(module: ModuleType, w: Weight) -> Callable[[], tuple[Tensor, ...]]:
    """The call of ``gates_backward`` on the pieces of a weight, which returns dW and dS of all in one each."""
    results, plan = tuple(torch.full_like(w.weight, torch.nan) for _ in range(2)), {}
    pieces = _pieces(w.grad, w.weight, w.scores, w.packed_frozen, *results)
    orders = [GradientOrder(g, a, s, w.tau, union, RULE, dw, ds) for g, a, s, union, dw, ds in pieces]

    def call() -> tuple[Tensor, ...]:
        module.gates_backward(orders, plan)
        return results

    return call


def _restore_many(module: ModuleType, w: Weight) -> Callable[[], Tensor]:
    """The call of ``restore_frozen_many`` on the pieces of the scores, which returns them in one."""
    plan: dict[Any, Any] = {}
    orders = [RestoreOrder(*piece) for piece in _pieces(w.scores, w.weight, w.packed_frozen)]

    def call() -> Tensor:
        module.restore_frozen_many(orders, plan)
        return w.scores

    return call


def _bits(mask: Tensor) -> Tensor:
    """The packed form as numpy has it: element i is bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")).to(mask.device)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits).bool().to(packed.device)
