"""What the device can do, measured before anything is compared with it: copies, products, an empty node of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from .cases import Case, Prepared, Rates, Work, WrongResultError, check_same, compute_dtype, name_of
from .rows import Row

SECTION = "Ceilings"
_COPY, _MATMUL, _NODE = "copy", "matmul", "one-element add"


def ceiling_cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    """A large copy, a large product in each compute dtype, and the smallest kernel there is.

    Args:
        device: what is measured.
        tiny: small sizes, for a dry run.
    """
    n = 1 << (12 if tiny else 28 if device.type == "cuda" else 25)
    yield Case(_COPY, "torch", f"{n} values", "float32", partial(_copy, n, device))
    size = 64 if tiny else 8192 if device.type == "cuda" else 2048
    for dtype in dict.fromkeys((compute_dtype(device), torch.float32)):
        side = size if dtype is not torch.float32 or device.type == "cpu" else size // 2
        yield Case(_MATMUL, "torch", f"{side}^3", name_of(dtype), partial(_matmul, side, dtype, device))
    yield Case(_NODE, "torch", "1", "float32", partial(_node, device))


def rates(rows: Iterable[Row]) -> Rates | None:
    """From the rows of :func:`ceiling_cases`, as many as have a time; None while the copy has none."""
    amounts = {
        (row.operation, row.dtype): row.notes["amount"] / row.median_us * 1e6
        for row in rows
        if row.section == SECTION and row.median_us and "amount" in row.notes
    }
    bandwidth = amounts.get((_COPY, "float32"))
    flops = {dtype: rate for (operation, dtype), rate in amounts.items() if operation == _MATMUL}
    return None if bandwidth is None else Rates(bandwidth, flops)


def _copy(n: int, device: torch.device) -> Prepared:
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)

    def check() -> str:
        check_same(target, source, "copy")
        return "bitwise"

    amount = 2.0 * 4 * n
    return Prepared([partial(target.copy_, source)], check, [Work(amount)], [target], notes=lambda: {"amount": amount})


def _matmul(side: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    """On random data: on zeros a GPU draws less power and runs faster."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def check() -> str:
        exact = a[:64].double() @ b.double()
        error = float((out[:64].double() - exact).norm() / exact.norm())
        if not error < 4 * torch.finfo(dtype).eps:
            raise WrongResultError(f"relative error {error:.3g} in the first rows")
        return f"fp64, first rows: relative error {error:.1g}"

    amount = 2.0 * side**3
    call = partial(torch.mm, a, b, out=out)
    return Prepared([call], check, [Work(flops=amount)], [out], notes=lambda: {"amount": amount})


def _node(device: torch.device) -> Prepared:
    """What a launch costs inside a graph, however little it does: no floor below is lower than this in practice."""
    one = torch.zeros(1, device=device)

    def check() -> str:
        if not float(one) >= 1:
            raise WrongResultError(f"it counted {float(one)}")
        return "it counts"

    return Prepared([partial(one.add_, 1)], check, [Work()], recheck=check)
