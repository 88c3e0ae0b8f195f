"""Gradients to form for many tensors in one call, and what they have to be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from elementwise import assert_same_bits, planted
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import GradientOrder

BOTH = (True, True)


def make_order(
    shape: int | tuple[int, ...],
    rule: str = "magnitude",
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    needed: tuple[bool, bool] = BOTH,
    with_union: bool = True,
) -> GradientOrder:
    """An order on numbers of all kinds, with results full of NaN.

    Args:
        shape: of the tensors.
        rule: "magnitude" or "value".
        dtypes: of G, weight and scores.
        needed: whether dW is needed, and dS.
        with_union: whether there is a union.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    n = torch.Size(shape).numel()
    grad, weight, scores = (planted(n, dtype).view(shape) for dtype in dtypes)
    tau = portable.threshold(scores, n // 3, rule) if n else torch.zeros((), dtype=scores.dtype)
    union = portable.pack(torch.rand(n) < 0.3) if with_union else None
    results = [
        torch.full_like(x, torch.nan) if need else None for x, need in zip((weight, scores), needed, strict=True)
    ]
    return GradientOrder(grad, weight, scores, tau, union, rule, *results)


def expected_gradients(order: GradientOrder) -> tuple[Tensor | None, Tensor | None]:
    """dW and dS by the torch backend's primitive for one tensor."""
    grad, weight, scores, tau, union, rule, dw, ds = order
    return portable.gate_backward(grad, weight, scores, tau, union, rule, dw is not None, ds is not None)


def moved(order: GradientOrder, device: torch.device) -> GradientOrder:
    """The order on another device."""
    return GradientOrder(*(x.to(device) if isinstance(x, Tensor) else x for x in order))


def assert_formed(
    orders: Iterable[GradientOrder], compare: Callable[[Tensor, Tensor, str], None] = assert_same_bits
) -> None:
    """The results are those of the primitive for one tensor, to the bit."""
    for i, order in enumerate(orders):
        for name, expected in zip(("weight_grad", "score_grad"), expected_gradients(order), strict=True):
            actual = getattr(order, name)
            assert (actual is None) == (expected is None)
            if actual is not None:
                compare(actual, expected, f"{name} of orders[{i}]")
