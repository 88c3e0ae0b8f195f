"""Cases of the gradients of weight and scores from those of a masked product: out of the product itself, or with G, the
gradient of the masked weight, written to memory between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from wsn_fast import reference
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable

from .cases import (
    Case,
    Prepared,
    Work,
    WrongResultError,
    check_close,
    compute_dtype,
    input_sets,
    name_of,
    total_bytes,
)
from .contenders import backend
from .data import FROZEN
from .products import FUSED, RULE, Weight
from .shapes import Shapes

OPERATION = "masked_linear_grad"
BYTES_PER_WEIGHT = 4 + 4 + 1 / 8 + 4 + 4
"""Weight, scores and union are read, their gradients written."""
Pair = tuple[Tensor, Tensor]
"""dW and dS, [outputs, inputs]."""


class Operands(NamedTuple):
    """A weight [outputs, inputs]; ``dy`` [rows, outputs] and ``x`` [rows, inputs] in the compute dtype; the union of
    earlier masks, boolean and packed."""

    w: Weight
    dy: Tensor
    x: Tensor
    frozen: Tensor
    packed_frozen: Tensor

    @classmethod
    def random(cls, size: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device) -> Operands:
        """Of order one, with G."""
        w = Weight.random(size, device)
        dy, x = (torch.randn(rows, features, device=device).to(dtype) for features in size)
        frozen = torch.rand(size, device=device) < FROZEN
        return cls(w, dy / rows**0.5, x, frozen, portable.pack(frozen))

    def in_memory(self) -> Pair:
        """By G in memory, and the gradient masking by the backend that would be chosen."""
        w = self.w
        module = choose("gate_backward", w.weight.device, w.weight.dtype).backend
        dw, ds = module.gate_backward(
            self.dy.t() @ self.x, w.weight, w.scores, w.tau, self.packed_frozen, RULE, True, True
        )
        return dw, ds


class Expected:
    """What the gradients of some operands have to be."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._torchs, self._exact = (self._by_reference(dtype) for dtype in (operands.x.dtype, torch.float64))

    def _by_reference(self, dtype: torch.dtype) -> Pair:
        """With the product in ``dtype``, from the operands as they are."""
        o, wide = self._operands, torch.promote_types(dtype, torch.float32)
        g = (o.dy.to(dtype).t() @ o.x.to(dtype)).to(wide)
        return reference.gate_backward(g, o.w.weight.to(wide), o.w.scores.to(wide), o.w.mask, o.frozen, RULE)

    def check(self, got: Sequence[Tensor]) -> str:
        """The 2x rule, and zero to the bit where nothing may be learnt.

        Raises:
            WrongResultError: one of them is not right.
        """
        for name, one, theirs, right in zip(("dW", "dS"), got, self._torchs, self._exact, strict=True):
            check_close(one, theirs, right, name)
        kept = self._operands.w.mask & ~self._operands.frozen
        if bool((got[0][~kept] != 0).any()):
            raise WrongResultError("dW: not zero outside of the mask or inside of the union")
        return "fp64: at most twice torch's error"


def gradient_cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """By every backend that may fuse, and with G in memory."""
    dtype = compute_dtype(device)
    contenders: dict[str, Callable[[Operands], Pair]] = {f"{name} backend": partial(_fused, name) for name in FUSED}
    contenders["G in memory"] = Operands.in_memory
    for size in shapes.products[:1]:
        for rows in shapes.grad_rows:
            for contender, gradients in contenders.items():
                prepare = partial(_prepare, gradients, size, rows, dtype, device)
                yield Case("masked linear, dW dS", contender, f"{size[0]}x{size[1]} b{rows}", name_of(dtype), prepare)


def _fused(name: str, o: Operands) -> Pair:
    w = o.w
    module = backend(name, OPERATION, w.weight.device, w.weight.dtype)
    dw, ds = module.masked_linear_grad(o.dy, o.x, w.weight, w.scores, w.tau, o.packed_frozen, RULE, True, True)
    return dw, ds


def _prepare(
    gradients: Callable[[Operands], Pair],
    size: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Prepared:
    first = Operands.random(size, rows, dtype, device)
    moved = BYTES_PER_WEIGHT * size[0] * size[1] + total_bytes([first.dy, first.x])
    sets = [first, *(Operands.random(size, rows, dtype, device) for _ in range(input_sets(moved, device) - 1))]
    expected = Expected(first)
    results: list[Tensor] = []

    def call(operands: Operands) -> None:
        results[:] = gradients(operands)

    calls = [partial(call, operands) for operands in sets]
    return Prepared(calls, lambda: expected.check(results), [Work(moved, 2.0 * rows * size[0] * size[1])])
