"""Masked products: each element lies within rounding of the product in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import torch as portable
from ..conv_geometry import Geometry, result_shape
from ..mask import Mask
from .masks import Where
from .tensors import Source, inside, within

SIZES = ((5, 24, 40), (33, 130, 70))
"""Rows of the input, and rows and columns of the weight."""
TASKS = 3
TF32 = 2.0**-10


class _Conv(NamedTuple):
    """A convolution to compare on."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    groups: int


CONVS = (
    _Conv((2, 4, 9, 8), (6, 2, 3, 3), Geometry((2, 1), (1, 0), (1, 2)), 2),
    _Conv((3, 3, 17), (5, 3, 4), Geometry((1,), (2,), (1,)), 1),
)


class _Operands:
    """The tensors of one comparison, from one source."""

    def __init__(self, where: Where) -> None:
        self.where, self.source = where, Source()

    def normal(self, *shape: int) -> Tensor:
        return inside(self.source.normal(*shape).to(self.where.device, self.where.dtype))

    def mask(self, shape: tuple[int, ...], rule: str, packed: bool = False) -> Mask:
        n = torch.Size(shape).numel()
        scores = self.normal(*shape)
        tau = portable.threshold(scores, n // 2, rule)
        if packed:
            return Mask.of_packed(portable.pack(portable.keep_mask(scores, tau, rule)))
        return Mask(scores, tau, rule, None, self.where.union(self.source, n))


def _wide(value: Any, absolute: bool = False) -> Any:
    """Numbers in float64, or their absolute values; masks and all else as they are."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double().abs() if absolute else value.double()
    return value


def _compare(
    operation: Callable[..., Any], exact: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype, what: str
) -> Iterator[str]:
    """Run an operation, and once more in float64, and compare with what rounding allows: a share of the same product of
    absolute values. The scores stay as they are, so that the mask is the same."""

    def results(of: Callable[..., Any], values: Iterator[Any]) -> list[Tensor]:
        found = of(*values)
        return [found] if isinstance(found, Tensor) else list(found)

    # Where float32 may be multiplied as TF32, it is; a 16-bit result is rounded at the end.
    share = 4 * max(torch.finfo(dtype).eps, TF32 if _tf32(dtype) else 0.0)
    found = results(operation, iter(arguments))
    expected = results(exact, map(_wide, arguments))
    bounds = results(exact, (_wide(value, absolute=True) for value in arguments))
    for i, (one, other, bound) in enumerate(zip(found, expected, bounds, strict=True)):
        of = what if len(found) == 1 else f"{('dW', 'dS')[i]} of {what}"
        if one.dtype is not dtype:
            yield f"{of} is {one.dtype}, expected {dtype}"
        yield from within(one, other, share * bound.abs() + torch.finfo(dtype).tiny, of)


def _tf32(dtype: torch.dtype) -> bool:
    return dtype is torch.float32 and "tf32" in (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    )


def linear(module: Any, where: Where) -> Iterator[str]:
    """Compare ``masked_linear``, forward and backward, with masks of both sources."""
    operands = _Operands(where)
    for i, (m, n, k) in enumerate(SIZES):
        for packed in (False, True):
            for backward in (False, True):
                weight, mask = operands.normal(n, k), operands.mask((n, k), where.rule(i), packed)
                x = operands.normal(m, n if backward else k)
                bias = None if backward or i == 0 else operands.normal(n)
                what = f"the product {(m, n, k)} with a mask of {mask.source}{', backward' if backward else ''}"
                yield from _compare(
                    module.masked_linear, portable.masked_linear, (x, weight, mask, bias, backward), where.dtype, what
                )


def linear_grad(module: Any, where: Where) -> Iterator[str]:
    """Compare ``masked_linear_grad``."""
    operands = _Operands(where)
    for i, (m, n, k) in enumerate(SIZES):
        grad, x, weight = operands.normal(m, n), operands.normal(m, k), operands.normal(n, k)
        arguments = (grad, x, weight, operands.mask((n, k), where.rule(i)), True, True)
        yield from _compare(
            module.masked_linear_grad, portable.masked_linear_grad, arguments, where.dtype, f"{(m, n, k)}"
        )


def linear_tasks(module: Any, where: Where) -> Iterator[str]:
    """Compare ``masked_linear_tasks``."""
    operands = _Operands(where)
    for m, n, k in SIZES:
        x, weight, bias = operands.normal(m, k), operands.normal(n, k), operands.normal(n)
        of_weight, of_bias = (_masks(operands, size) for size in (n * k, n))
        tasks = operands.source.below(m, TASKS).to(where.device)
        arguments = (x, weight, of_weight, tasks, bias, of_bias)
        yield from _compare(
            module.masked_linear_tasks, portable.masked_linear_tasks, arguments, where.dtype, f"tasks, {(m, n, k)}"
        )


def _masks(operands: _Operands, n: int) -> Tensor:
    return torch.stack([operands.where.union(operands.source, n) for _ in range(TASKS)])


def conv(module: Any, where: Where) -> Iterator[str]:
    """Compare ``masked_conv`` and its gradient of the input."""
    operands = _Operands(where)
    for case, packed in zip(CONVS, (False, True), strict=True):
        for backward in (False, True):
            weight, mask = operands.normal(*case.weight), operands.mask(case.weight, "magnitude", packed)
            x = operands.normal(*(result_shape(case.x, case.weight, case.geometry) if backward else case.x))
            bias = None if backward else operands.normal(case.weight[0])
            arguments = (x, weight, mask, bias, case.geometry, case.groups, case.x if backward else None)
            what = f"the convolution {case.x} with {case.weight}{', backward' if backward else ''}"
            yield from _compare(module.masked_conv, portable.masked_conv, arguments, where.dtype, what)
