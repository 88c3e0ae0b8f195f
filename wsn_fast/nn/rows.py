"""The rows that modules keep for finished tasks: room for one more, and whether those of a saved state fit.

A buffer ``[T, ...]`` grows by one row when a task ends. Its storage has some rows to spare, so that the rows that are
there need not be copied each time. A ``state_dict`` has no spare rows, because safetensors refuses to save a part of a
storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .densities import check_densities
from .task_ids import TaskId, decode_json, task_of_json

if TYPE_CHECKING:
    from .gated import SubnetLayer

_SPARE = "_spare_rows"
EXTRA_STATE = ("tasks", "density", "task_density", "rule")
"""The fields in the extra state of a subnet layer."""


class _Spare(NamedTuple):
    """The whole storage of a buffer, and how many of its rows are used. It is used up if the buffer has another number:
    then somebody else appended to it."""

    whole: Tensor
    used: int


def append(module: nn.Module, name: str, row: Tensor) -> None:
    """Append ``row`` to the buffer ``name`` of ``module``. The buffer becomes another tensor; the rows that it had are
    copied only if its storage is full, which happens once in ``T / 8`` tasks."""
    rows = module._buffers[name]
    assert rows is not None
    if _SPARE not in module.__dict__:
        module.__dict__[_SPARE] = {}
        module.register_state_dict_pre_hook(_drop_spare_rows)
    spares: dict[str, _Spare] = module.__dict__[_SPARE]
    used, spare = len(rows), spares.get(name)
    fits = spare is not None and spare.used == used < len(spare.whole) and _begins(spare.whole, rows)
    if spare is not None and fits:
        whole = spare.whole
    else:
        whole = rows.new_empty((used + 1 + used // 8, *rows.shape[1:]))
        whole[:used].copy_(rows)
    whole[used].copy_(row)
    spares[name] = _Spare(whole, used + 1)
    module._buffers[name] = whole[: used + 1]


def remove(module: nn.Module, name: str, row: int) -> None:
    """Remove a row of the buffer ``name`` of ``module``. The buffer becomes another tensor, with a storage of its
    own."""
    rows = module._buffers[name]
    assert rows is not None
    module._buffers[name] = torch.cat([rows[:row], rows[row + 1 :]])
    module.__dict__.get(_SPARE, {}).pop(name, None)


def forget_spare(module: nn.Module) -> None:
    """Drop what :func:`append` keeps in ``module``."""
    hooks = module._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _drop_spare_rows]:
        del hooks[key]
    module.__dict__.pop(_SPARE, None)


def _drop_spare_rows(module: nn.Module, *_: Any) -> None:
    """Before saving: give each buffer a storage of its own length."""
    spares: dict[str, _Spare] = module.__dict__.get(_SPARE, {})
    for name, spare in spares.items():
        rows = module._buffers.get(name)
        if rows is not None and len(spare.whole) > len(rows) and _begins(spare.whole, rows):
            module._buffers[name] = rows.clone()
    spares.clear()


def _begins(whole: Tensor, rows: Tensor) -> bool:
    """Whether ``rows`` are the first rows of ``whole``, in memory."""
    same = whole.device == rows.device and whole.dtype == rows.dtype and whole.shape[1:] == rows.shape[1:]
    return same and not whole.is_meta and rows.is_contiguous() and whole.data_ptr() == rows.data_ptr()


# --- saved states ----------------------------------------------------------------------------------------------------
def layer_fields(state: object) -> dict[str, Any]:
    """The fields in the extra state of a subnet layer.

    Raises:
        ValueError: it is not one of a subnet layer.
    """
    fields = decode_json(state)
    for name in fields:
        if name not in EXTRA_STATE:
            raise ValueError(
                f"unknown field {name[:99]!r} in the state of a subnet layer: did a newer version write it?"
            )
    tasks = fields.get("tasks", [])
    if not isinstance(tasks, list) or len({task_of_json(task) for task in tasks}) < len(tasks):
        raise ValueError(f"the tasks of a subnet layer must be different ids, got {str(tasks)[:99]}")
    if "rule" in fields:
        ops.check_rule(fields["rule"])
    for name in ("density", "task_density"):
        if fields.get(name) is not None or (name == "density" and name in fields):
            fields[name] = check_densities(fields[name], name=name)
    return fields


def make_room(layer: SubnetLayer, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Give ``layer`` as many rows of masks as ``state_dict`` has, which may be those of more tasks. Torch checks the
    other sizes."""
    for gate in layer.gated():
        own, incoming = gate.masks, state_dict.get(f"{prefix}{gate.name}_masks")
        if isinstance(incoming, Tensor) and incoming.ndim == 2 and incoming.shape[1] == own.shape[1]:
            setattr(layer, f"{gate.name}_masks", own.new_zeros(incoming.shape))


def check_layer(layer: SubnetLayer, state: Mapping[str, Any], prefix: str) -> list[TaskId]:
    """The tasks that ``layer`` would have after it has been loaded from ``state``, where its names begin with
    ``prefix``.

    Raises:
        ValueError: the state has masks of other tasks than it names.
    """
    extra = state.get(f"{prefix}_extra_state")
    fields = {} if extra is None else layer_fields(extra)
    tasks: list[TaskId] = fields.get("tasks", layer.tasks)
    for name in ("density", "task_density"):
        if isinstance(fields.get(name), dict):
            check_densities(fields[name], [gate.name for gate in layer.gated()], f"{prefix}{name}")
    for gate in layer.gated():
        masks = state.get(f"{prefix}{gate.name}_masks", gate.masks)
        rows = len(masks) if isinstance(masks, Tensor) and masks.ndim else 0
        if rows != len(tasks):
            where = "names" if extra is not None else "names none, because it has no _extra_state: the layer has"
            raise ValueError(
                f"{prefix}{gate.name}_masks: the state has masks of {rows} tasks and {where} {len(tasks)} ({tasks})"
            )
    return tasks


def add_empty_masks(layer: SubnetLayer, state: dict[str, Any], prefix: str) -> None:
    """Add the masks of no task to ``state``, if they are missing because a program has dropped tensors without
    elements, and the state says that no task has ended."""
    extra = state.get(f"{prefix}_extra_state")
    if extra is None or layer_fields(extra).get("tasks") != []:
        return
    for gate in layer.gated():
        state.setdefault(f"{prefix}{gate.name}_masks", gate.masks.new_zeros(0, gate.masks.shape[1]))
