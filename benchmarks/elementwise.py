"""Cases of the elementwise operations: gate, gradient masking, packed masks. A table of operations, one row builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.tables import dtype_name
from wsn_fast.doctor.measuring.checks import WrongResultError, check_same
from wsn_fast.doctor.measuring.operations import OPERATIONS, Operands
from wsn_fast.doctor.measuring.weights import DENSITY, Weight, compute_dtype, input_sets
from wsn_fast.reference import specification

from .cases import Case, Prepared, Work
from .library import BACKENDS, backend
from .shapes import Shapes

Results = Tensor | tuple[Tensor, ...]


def elementwise_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """Every primitive beside the selection by every backend."""
    dtype = compute_dtype(device)
    for n in shapes.elementwise:
        for operation in EXPECTED:
            for name in BACKENDS:
                prepare = partial(_prepare, operation, name, n, shapes.tasks, device)
                yield Case(operation, f"{name} backend", str(n), dtype_name(dtype), prepare)


def device_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """What the device can do: a large copy, and a large product in each compute dtype, on random data."""
    n, side = (1 << 12, 64) if shapes.tasks < 5 else (1 << 28, 8192) if device.type == "cuda" else (1 << 24, 1024)
    yield Case("copy", "torch", f"{n} values", "float32", partial(_copy, n, device))
    for dtype in dict.fromkeys((compute_dtype(device), torch.float32)):
        yield Case("matmul", "torch", f"{side}^3", dtype_name(dtype), partial(_matmul, side, dtype, device))


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


def _prepare(name: str, contender: str, n: int, tasks: int, device: torch.device) -> Prepared:
    operation, dtype = OPERATIONS[name], compute_dtype(device)
    module = backend(contender, name, device, torch.float32 if operation.typed else None)
    bytes_each = operation.bytes_each(torch.float32.itemsize, dtype.itemsize, tasks)
    sets = [Weight.random((n,), device, tasks) for _ in range(input_sets(bytes_each * n, device))]
    expected = EXPECTED[name](sets[0], dtype)

    def check(got: Results) -> str:
        pairs = zip(*((r,) if isinstance(r, Tensor) else r for r in (got, expected)), strict=True)
        for i, (one, right) in enumerate(pairs):
            check_same(one, right, f"{name}, result {i}")
        return "reference: bitwise"

    calls = [operation.prepare(Operands(module, w, dtype, PIECES)) for w in sets]
    return Prepared(calls, check, Work(bytes_each * n))


PIECES = 64
"""Into how many tensors a weight is cut for the primitives that take many."""


# --- the results by the reference
def _mask(w: Weight) -> Tensor:
    return specification.topc_mask(w.scores, DENSITY)


def _masked(w: Weight, dtype: torch.dtype) -> Tensor:
    return specification.select(_mask(w), w.weight.to(dtype))


def _masked_gradients(w: Weight, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return specification.gate_backward(w.grad.float(), w.weight, w.scores, _mask(w), w.frozen)


def _gates(w: Weight, dtype: torch.dtype) -> Tensor:
    pieces = Operands(portable, w, dtype, PIECES).cut(w.weight, w.scores)
    gated = (specification.select(specification.topc_mask(s, DENSITY), a) for a, s in pieces)
    return torch.cat(list(gated)).to(dtype)


def _restored(w: Weight, dtype: torch.dtype) -> Tensor:
    """Putting values back gives the same when it is repeated."""
    return w.weight.where(w.frozen, w.scores)


def _union(w: Weight, dtype: torch.dtype) -> Tensor:
    return _bits(specification.union_masks(_unpacked(row, w.mask.numel()) for row in w.task_masks))


EXPECTED: dict[str, Callable[[Weight, torch.dtype], Results]] = {
    "gate": _masked,
    "gate_packed": _masked,
    "gate_backward": _masked_gradients,
    "gates": _gates,
    "gates_backward": _masked_gradients,
    "pack": lambda w, dtype: _bits(_mask(w)),
    "unpack": lambda w, dtype: _mask(w),
    "union": _union,
    "popcount": lambda w, dtype: _mask(w).sum(),
    "restore_frozen": _restored,
    "restore_frozen_many": _restored,
}
"""What each operation gives by the reference, on the operands of :class:`Weight`."""


def _bits(mask: Tensor) -> Tensor:
    """The packed form as numpy has it: element i is bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")).to(mask.device)


def _unpacked(packed: Tensor, n: int) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), count=n, bitorder="little")
    return torch.from_numpy(bits).bool().to(packed.device)
