"""What keeps the per-task values of a finished task right while the model shows them.

:mod:`wsn_fast.nn.per_task` copies these values into the live tensors. Two things need more than that:

* A forward pass in training mode writes to what is shown: batch norms update their running statistics. The kept values
  are copied again after it.
* A program that is exported or traced refers to the tensors of the model. The live tensors get other values when the
  task is left, so the program is given copies, which never change.

Both are done by hooks of the modules that have per-task tensors. They are there while a finished task is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from ..backends import is_exporting, recording
from . import per_task

# The key of the hooks is always the same, so that compiled code finds those that it was compiled with. PyTorch itself
# counts from 0.
_KEY = -1
_ROWS = "_per_task_rows"
_LENT = "_per_task_lent"


def watch(modules: Sequence[nn.Module], row: int | None) -> None:
    """From now on the finished task number ``row`` is shown, or none (None).

    Args:
        modules: all modules of a model, the model itself first.
        row: the row of the task.
    """
    owners = [module for module in modules if per_task.marked(module)]
    # The model has the hooks too, because a module may read the tensors of its children.
    for module in [*modules[:1], *owners] if owners else ():
        unwatch(module)
        if row is not None:
            # Tensors and not the number of the row, so that the same compiled code serves every task.
            module.__dict__[_ROWS] = {name: _copy_of(module, name, row) for name in per_task.marked(module)}
            module._forward_pre_hooks[_KEY] = _lend
            module._forward_hooks[_KEY] = _put_back


def unwatch(module: nn.Module) -> None:
    """Remove the hooks of a module, if it has them."""
    _take_back(module)
    module.__dict__.pop(_ROWS, None)
    module._forward_pre_hooks.pop(_KEY, None)
    module._forward_hooks.pop(_KEY, None)


@torch.inference_mode(False)
def _copy_of(module: nn.Module, name: str, row: int) -> Tensor:
    return per_task.value(module, name, row).clone()


def _lend(module: nn.Module, args: Any) -> None:
    """If a program is being recorded, put copies of the rows of the task in the places of the live tensors."""
    if is_compiling() and not is_exporting():
        return  # compiled code serves all tasks
    if is_dynamo_compiling():
        raise RuntimeError(
            "torch.export.export(..., strict=True) cannot copy the per-task values of the finished task in use, and "
            "they change when the task is left: use strict=False, or export to_dense(wsn, task)"
        )
    if is_exporting() or recording():
        lent = module.__dict__[_LENT] = []
        for owner in module.modules():
            for name, kept in owner.__dict__.get(_ROWS, {}).items():
                place: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
                if place[name] is not kept:
                    lent.append((place, name, place[name]))
                    place[name] = kept


def _take_back(module: nn.Module) -> None:
    """Undo :func:`_lend`."""
    for place, name, tensor in module.__dict__.pop(_LENT, ()):
        place[name] = tensor


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    """Undo :func:`_lend`. After a forward pass that may have written to what is shown, show again what is kept."""
    if not is_dynamo_compiling():
        _take_back(module)
        if is_exporting() or recording():
            return
    if module.training or not isinstance(module, per_task.TORCH_NORMS):
        for name, kept in module.__dict__[_ROWS].items():
            if module.training or name in module._buffers:
                # Through .data: a backward pass may need the version of now, and does not need these values.
                getattr(module, name).data.copy_(kept)
