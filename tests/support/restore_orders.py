"""Frozen values to put back into many tensors in one call, and what the tensors have to be afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from elementwise import bits
from torch import Tensor

from wsn_fast.backends import torch as portable
from wsn_fast.backends.mask import RestoreOrder


def random_bits(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes: every payload of NaN has to survive."""
    shape = (shape,) if isinstance(shape, int) else shape
    return torch.randint(256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8).view(dtype).view(shape)


def make_orders(
    shapes: Sequence[int | tuple[int, ...]], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> list[RestoreOrder]:
    """Orders whose saved values are the parts of one tensor. Every third tensor has no union."""
    params = [random_bits(shape, dtype).to(device) for shape in shapes]
    saved = random_bits(sum(p.numel() for p in params), dtype).to(device).split([p.numel() for p in params])
    unions = [portable.pack(torch.rand(p.numel()) < 0.5).to(device) if i % 3 else None for i, p in enumerate(params)]
    return [*map(RestoreOrder, params, saved, unions)]


def expected_params(orders: Sequence[RestoreOrder]) -> list[Tensor]:
    """The bits that the parameters have to have, element by element."""
    found = []
    for param, saved, union in orders:
        frozen = torch.ones(param.numel(), dtype=torch.bool) if union is None else portable.unpack(union, param.numel())
        now, then = (bits(x.contiguous().view(-1)) for x in (param, saved))
        found.append(torch.where(frozen.cpu(), then, now))
    return found


def assert_restored(orders: Sequence[RestoreOrder], expected: Sequence[Tensor]) -> None:
    """The parameters have these bits."""
    for i, (order, right) in enumerate(zip(orders, expected, strict=True)):
        assert torch.equal(bits(order.param.contiguous().view(-1)), right), f"orders[{i}], {order.param.shape}"
