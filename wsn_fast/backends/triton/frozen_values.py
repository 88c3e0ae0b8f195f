"""Putting frozen values back into many tensors in few launches; see :mod:`wsn_fast.backends.triton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels import restore_frozen as kernels
from ...kernels._elementwise import TensorTable
from ..mask import RestoreOrder
from ..updates import Plan
from .device import on_device_of
from .gate import restore_frozen
from .plans import addresses_of, is_capturing, keep

TABLES = 8
"""How many tables a plan keeps, not counting those that a captured graph reads."""


@dataclass
class _Known:
    """What a plan keeps for one set of tensors: their table, and whether a captured graph reads it."""

    table: TensorTable
    captured: bool = False


def restore_frozen_many(orders: Sequence[RestoreOrder], plan: Plan | None = None) -> None:
    """Do what :func:`wsn_fast.backends.torch.restore_frozen_many` does, with one launch for all tensors.

    Args:
        orders: tensors of one device and dtype. One that is not contiguous takes copies and a launch of its own.
        plan: what the caller keeps for the next call, or None. It serves saved values that have moved together, such as
            the parts of one tensor. Without it each tensor takes a launch. So it does in a capture if the plan does not
            know these tensors, because a CUDA graph cannot capture the copy of a table from the host.
    """
    together = [order for order in orders if _has_addresses(order)]
    alone = [order for order in orders if not _has_addresses(order)] if len(together) < len(orders) else []
    with on_device_of(orders[0].param), torch.no_grad():
        table = _table(together, plan) if together and plan is not None else None
        if table is not None:
            kernels.restore_frozen_multi(table, together[0].saved)
        for param, saved, union in orders if table is None else alone:
            if union is None:
                param.copy_(saved.view(param.shape))
            else:
                restore_frozen(param, saved, union.contiguous())


def _has_addresses(order: RestoreOrder) -> bool:
    """Whether the addresses of its tensors say where all elements are."""
    param, _, union = order
    return param.is_contiguous() and (union is None or union.is_contiguous()) and param.numel() > 0


def _table(orders: Sequence[RestoreOrder], plan: Plan) -> TensorTable | None:
    """The table of these tensors. It is made anew if the plan has none, but not in a capture."""
    params, saved, unions = zip(*orders, strict=True)
    device, first = params[0].device, saved[0].data_ptr()
    key = (
        *addresses_of(params),
        *(address - first for address in addresses_of(saved)),
        *addresses_of(unions),
        *(tensor.numel() for tensor in params),  # other tensors may come to lie where these were
    )
    known: _Known | None = plan.get(key)
    capturing = is_capturing(device)
    if known is None:
        if capturing:
            return None
        known = _Known(kernels.restore_frozen_table(params, saved, unions).to(device))
        keep(plan, key, known, TABLES)
    known.captured |= capturing
    return known.table
