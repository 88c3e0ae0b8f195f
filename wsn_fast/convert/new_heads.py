"""The heads that take the place of a model's classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..nn.heads import TaskHeads
from ..nn.task_ids import TaskId
from .selection import Names

HeadSpec = Mapping[TaskId, int] | Iterable[TaskId] | int
Heads = dict[nn.Module, TaskHeads]
"""Each classifier with the heads that replace it."""


def make_heads(names: Names, heads: str | Mapping[str, HeadSpec] | None) -> Heads:
    """Make the heads that ``heads``, the argument of :func:`wsn_fast.convert`, asks for.

    Raises:
        TypeError: ``heads`` is of a wrong type.
        ValueError: a name is not one of an ``nn.Linear`` of the model, or a width is not a positive int.
    """
    specs = {heads: None} if isinstance(heads, str) else {} if heads is None else heads
    if not isinstance(specs, Mapping):
        raise TypeError(f"heads must be a module name or a mapping from module names, got {heads!r}")
    linears = {n: m for m, own in names.items() for n in own if type(m) is nn.Linear}
    made: Heads = {}
    for name, spec in specs.items():
        if name not in linears:
            raise ValueError(
                f"heads: the model has no nn.Linear named {name!r}; its nn.Linear layers are: {sorted(linears)}"
            )
        old = linears[name]
        width, tasks = _widths(name, spec, old.out_features)
        bias, like = old.bias is not None, old.weight
        new = TaskHeads(old.in_features, width, tasks=tasks, bias=bias, device=like.device, dtype=like.dtype)
        made[old] = new.train(old.training)
    return made


def _widths(
    name: str, spec: HeadSpec | None, width: int
) -> tuple[int | None, Mapping[TaskId, int] | list[TaskId] | None]:
    """The width of all heads (None if every task has its own), and the tasks that get a head at once."""
    if spec is None:
        return width, None
    if isinstance(spec, int):
        return _check_width(name, spec), None
    if isinstance(spec, Mapping):
        return None, {task: _check_width(name, each) for task, each in spec.items()}
    if isinstance(spec, str) or not isinstance(spec, Iterable):
        raise TypeError(f"heads[{name!r}] must be a width, task ids, or widths by task id, got {spec!r}")
    return width, list(spec)


def _check_width(name: str, width: object) -> int:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"heads[{name!r}]: the width of a head must be a positive int, got {width!r}")
    return width
