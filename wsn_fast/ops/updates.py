"""Updates in place: the steps of the optimizers, and the restoring of frozen values. Arguments are not checked."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import run
from ..backends.mask import RestoreOrder
from ..backends.updates import SGD, AdamW, Batch, CodedAdamWState, CodedSGDState, Plan


@torch.no_grad()
def restore_frozen_(param: Tensor, saved: Tensor, union: Tensor) -> None:
    """In place: ``param = union ? saved : param``, bit for bit; ``union`` is packed."""
    run("restore_frozen", param.device, param.dtype).restore_frozen(param, saved, union)
    increment_version(param)


@torch.no_grad()
def restore_frozen_many(orders: Sequence[RestoreOrder], backend: str | None = None, plan: Plan | None = None) -> None:
    """:func:`restore_frozen_` for many tensors of one device and dtype, in few launches. ``plan`` is what the backend
    keeps from call to call, and serves no other operation."""
    if not orders:
        return
    param = orders[0].param
    run("restore_frozen_many", param.device, param.dtype, backend).restore_frozen_many(orders, plan)
    increment_version([order.param for order in orders])


def adamw_step(batch: Batch, settings: Sequence[tuple[AdamW, AdamW]], backend: str | None = None) -> None:
    """Update gated tensors and their scores in place by one AdamW step. See
    :func:`wsn_fast.backends.torch.adamw_step` and :func:`wsn_fast.backends.torch.adamw_coded_step`."""
    if isinstance(batch.updates[0].state, CodedAdamWState):
        _of(batch, "adamw_coded_step", backend).adamw_coded_step(batch, settings)
    else:
        _of(batch, "adamw_step", backend).adamw_step(batch, settings)
    _changed(batch)


def sgd_step(batch: Batch, settings: Sequence[tuple[SGD, SGD]], backend: str | None = None) -> None:
    """Do what :func:`adamw_step` does, for SGD."""
    if isinstance(batch.updates[0].state, CodedSGDState):
        _of(batch, "sgd_coded_step", backend).sgd_coded_step(batch, settings)
    else:
        _of(batch, "sgd_step", backend).sgd_step(batch, settings)
    _changed(batch)


def gradient_squares(batch: Batch, backend: str | None = None) -> Tensor:
    """Return the sums of the squares of the gradients that an update would use: of dW and dS of each tensor in turn."""
    result: Tensor = _of(batch, "gradient_squares", backend).gradient_squares(batch)
    return result


def _of(batch: Batch, operation: str, backend: str | None) -> ModuleType:
    weight = batch.updates[0].weight
    return run(operation, weight.device, weight.dtype, backend)


def _changed(batch: Batch) -> None:
    """Tell autograd which tensors have changed. No backward pass reads the running means."""
    weights, scores, *_, nexts = zip(*batch.updates, strict=True)
    increment_version([*weights, *scores, *[following.masked for following in nexts if following is not None]])
