"""Tensors with one value for each task: the affine parameters and statistics of normalisation layers, and tensors that
the user declares.

The live tensor stays in its module, so one optimizer serves all tasks and each task starts from the values of the
task before it. When a task ends, a copy becomes a row of the buffer ``<name>_tasks`` [T, *shape], which no optimizer
can reach. To use a finished task, its row is copied into the live tensor, and ``<name>_live`` keeps the live value
until it is put back; a ``state_dict`` taken in between holds the live value. Values are copied, and tensors are not
exchanged, because optimizers, CUDA graphs and compiled code need the same addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import rows

_ATTRIBUTE = "_per_task_names"
TORCH_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
"""The normalisation layers of torch. In evaluation they write to none of their tensors."""


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer.

    It is one if its class is one of torch's, or if the name of its class says so (``LlamaRMSNorm``, ``LayerNorm2d``),
    it has no children and its parameters are vectors. A "NormalizedLinear" is not one.
    """
    named_so = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    return isinstance(module, TORCH_NORMS) or (named_so and all(p.ndim < 2 for p in module.parameters()))


def norm_tensors(module: nn.Module) -> list[str]:
    """The names of the direct parameters and buffers of a normalisation layer. Each task has its own values of them."""
    own = {**module._parameters, **module._buffers}
    extra = {f"{name}{end}" for name in marked(module) for end in ("_tasks", "_live")}
    return [name for name, tensor in own.items() if tensor is not None and name not in extra]


def marked(module: nn.Module) -> tuple[str, ...]:
    """The names of the direct tensors of ``module`` that are per task; empty for most modules."""
    return getattr(module, _ATTRIBUTE, ())


@torch.inference_mode(False)
def mark(module: nn.Module, names: Iterable[str]) -> None:
    """Make direct parameters or buffers of ``module`` per task. Names that are per task already are skipped."""
    known = marked(module)
    new = [name for name in names if name not in known]
    if not new:
        return
    for name in new:
        live = getattr(module, name)
        module.register_buffer(f"{name}_tasks", torch.empty((0, *live.shape), dtype=live.dtype, device=live.device))
        module.register_buffer(f"{name}_live", None, persistent=False)
    setattr(module, _ATTRIBUTE, (*known, *new))
    if not known:
        module.register_load_state_dict_pre_hook(_make_room)
        module.register_state_dict_post_hook(_save_live_values)


def unmark(module: nn.Module) -> None:
    """Undo :func:`mark`: the live values stay, and the copies and hooks are removed."""
    for name in marked(module):
        del module._buffers[f"{name}_tasks"], module._buffers[f"{name}_live"]
        module._non_persistent_buffers_set.discard(f"{name}_live")
    if marked(module):
        rows.forget_spare(module)
        delattr(module, _ATTRIBUTE)
        for hooks, function in (
            (module._load_state_dict_pre_hooks, _make_room),
            (module._state_dict_hooks, _save_live_values),
        ):
            for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
                del hooks[key]


def value(module: nn.Module, name: str, row: int) -> Tensor:
    """The value that the tensor ``name`` of ``module`` had when the finished task number ``row`` ended."""
    values: Tensor = getattr(module, f"{name}_tasks")
    return values[row]


def count(module: nn.Module, name: str) -> int:
    """The number of finished tasks that the tensor ``name`` of ``module`` has values of."""
    return len(getattr(module, f"{name}_tasks")) if name in marked(module) else 0


@torch.no_grad()
def append_task(module: nn.Module) -> None:
    """Store the live values as the row of the task that has ended. Do not call this while a finished task is in use: it
    would store the values of that task."""
    for name in marked(module):
        rows.append(module, f"{name}_tasks", getattr(module, name).detach())


@torch.inference_mode(False)  # the live value may be trained, loaded or saved before it is put back
@torch.no_grad()
def use_row(modules: Iterable[nn.Module], row: int | None) -> None:
    """Copy the values of a finished task into all ``modules``, or (None) put the live values back.

    All live values are saved before the first row is copied, because a tied tensor has one live value under two names.
    """
    tensors = [(module, name) for module in modules for name in marked(module)]
    torch.clear_autocast_cache()  # it keeps casts of the values that were there
    if row is not None:
        for module, name in tensors:
            if getattr(module, f"{name}_live") is None:
                setattr(module, f"{name}_live", getattr(module, name).detach().clone())
        for module, name in tensors:
            getattr(module, name).copy_(value(module, name, row))
        return
    for module, name in tensors:
        kept = getattr(module, f"{name}_live")
        if kept is not None:
            getattr(module, name).copy_(kept)
            setattr(module, f"{name}_live", None)


@torch.inference_mode(False)
def _make_room(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: make rows for the tasks of the checkpoint, and drop saved live values, which would overwrite the
    loaded ones later."""
    for name in marked(module):
        own, incoming = getattr(module, f"{name}_tasks"), state_dict.get(f"{prefix}{name}_tasks")
        if incoming is None and not len(own) and f"{prefix}{name}" in state_dict:
            # Some programs drop tensors without elements.
            incoming = state_dict[f"{prefix}{name}_tasks"] = own
        if isinstance(incoming, Tensor) and incoming.shape[1:] == own.shape[1:] and incoming.ndim == own.ndim:
            setattr(module, f"{name}_tasks", own.new_zeros(incoming.shape))
        setattr(module, f"{name}_live", None)


def _save_live_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in marked(module):
        kept = getattr(module, f"{name}_live")
        if kept is not None:
            state_dict[f"{prefix}{name}"] = kept
