"""Tensors that exist once per task: the affine parameters and statistics of normalisation layers, and what the user
declares.

The live tensor stays where its module has it, so one optimizer serves all tasks and each task starts from its
predecessor's values. When a task ends, a copy becomes a row of the buffer ``<name>_tasks`` [T, *shape] beside it, which
no optimizer can reach. Using a finished task copies its row into the live tensor and keeps the live value in
``<name>_live`` until it comes back; a ``state_dict`` taken in between holds the live value. Values are copied rather
than tensors swapped, so that addresses stay put (optimizers, CUDA graphs, compiled code).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ATTRIBUTE = "_per_task_names"
_TORCH_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer: torch's own, or one whose class says so (``LlamaRMSNorm``,
    ``LayerNorm2d``) and whose parameters are vectors of its own: a "NormalizedLinear" is none."""
    named_so = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    return isinstance(module, _TORCH_NORMS) or (named_so and all(p.ndim < 2 for p in module.parameters()))


def norm_tensors(module: nn.Module) -> list[str]:
    """The direct parameters and buffers of a norm, by name: all of them vary per task."""
    own = {**module._parameters, **module._buffers}
    extra = {f"{name}{end}" for name in marked(module) for end in ("_tasks", "_live")}
    return [name for name, tensor in own.items() if tensor is not None and name not in extra]


def marked(module: nn.Module) -> tuple[str, ...]:
    """The names of the direct tensors of ``module`` that are per task; empty for most modules."""
    return getattr(module, _ATTRIBUTE, ())


def mark(module: nn.Module, names: Iterable[str]) -> None:
    """Make direct parameters or buffers of ``module`` per task. Names that are so already are left alone."""
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
    """Forget that ``module`` has per-task tensors: the live values stay, the copies and hooks go."""
    for name in marked(module):
        del module._buffers[f"{name}_tasks"], module._buffers[f"{name}_live"]
        module._non_persistent_buffers_set.discard(f"{name}_live")
    if marked(module):
        delattr(module, _ATTRIBUTE)
        for hooks, function in (
            (module._load_state_dict_pre_hooks, _make_room),
            (module._state_dict_hooks, _save_live_values),
        ):
            for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is function]:
                del hooks[key]


def value(module: nn.Module, name: str, row: int) -> Tensor:
    """The value that the tensor ``name`` of ``module`` had when the task of ``row`` ended."""
    rows: Tensor = getattr(module, f"{name}_tasks")
    return rows[row]


@torch.no_grad()
def append_task(module: nn.Module) -> None:
    """Keep the live values as the next row: the task that trained them has ended. Not while a row is in use."""
    for name in marked(module):
        rows, live = getattr(module, f"{name}_tasks"), getattr(module, name)
        setattr(module, f"{name}_tasks", torch.cat([rows, live.detach().unsqueeze(0).to(rows.dtype)]))


@torch.no_grad()
def use_row(modules: Iterable[nn.Module], row: int | None) -> None:
    """Put a finished task's values in place in all ``modules``, or (None) the live ones back.

    All live values are kept before the first row goes in: a tensor that is tied has one live value under two names.
    """
    tensors = [(module, name) for module in modules for name in marked(module)]
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


def _make_room(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: rows for the tasks of the checkpoint, and no live values that would overwrite the loaded ones
    later."""
    for name in marked(module):
        own, incoming = getattr(module, f"{name}_tasks"), state_dict.get(f"{prefix}{name}_tasks")
        if isinstance(incoming, Tensor) and incoming.shape[1:] == own.shape[1:] and incoming.ndim == own.ndim:
            setattr(module, f"{name}_tasks", own.new_zeros(incoming.shape))
        setattr(module, f"{name}_live", None)


def _save_live_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in marked(module):
        kept = getattr(module, f"{name}_live")
        if kept is not None:
            state_dict[f"{prefix}{name}"] = kept
