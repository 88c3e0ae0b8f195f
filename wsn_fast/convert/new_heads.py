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
        ValueError: a name is not one of a module inside the model, the module cannot be copied for each task, or a
            width is not a positive int or not possible for it.
    """
    specs = {heads: None} if isinstance(heads, str) else {} if heads is None else heads
    if not isinstance(specs, Mapping):
        raise TypeError(f"heads must be a module name or a mapping from module names, got {heads!r}")
    modules = {name: module for module, own in names.items() for name in own}
    made: Heads = {}
    for name, spec in specs.items():
        old = modules.get(name)
        if old is None or name == "":
            linears = sorted(n for n, module in modules.items() if type(module) is nn.Linear)
            raise ValueError(
                f"heads: the model has no module inside it that is named {name!r}; its nn.Linear layers are: {linears}"
            )
        width, tasks = _widths(name, spec)
        try:
            made[old] = TaskHeads.of(old, width, tasks=tasks)
        except ValueError as error:
            raise ValueError(f"heads[{name!r}]: {error}") from error
        if isinstance(spec, Mapping):
            made[old].out_features = None  # later tasks name their widths too
    _check_apart(names, made)
    return made


def within_heads(names: Names, made: Heads) -> set[nn.Module]:
    """The modules that go with the classifiers: these, and what is only inside them."""
    paths = [name for old in made for name in names[old]]
    return {
        module
        for module, own in names.items()
        if all(any(name == path or name.startswith(f"{path}.") for path in paths) for name in own)
    }


def _check_apart(names: Names, made: Heads) -> None:
    """Raise ``ValueError`` if one classifier is inside another."""
    for outer in made:
        for inner in outer.modules():
            if inner in made and inner is not outer:
                raise ValueError(
                    f"heads: {names[inner][0]!r} is inside {names[outer][0]!r}, of which each task has a copy: name one"
                )


def _widths(name: str, spec: HeadSpec | None) -> tuple[int | None, Mapping[TaskId, int] | list[TaskId] | None]:
    """The width of all heads (None if it is that of the classifier, or if every task has its own), and the tasks that
    get a head at once."""
    if spec is None:
        return None, None
    if isinstance(spec, int):
        return _check_width(name, spec), None
    if isinstance(spec, Mapping):
        return None, {task: _check_width(name, each) for task, each in spec.items()}
    if isinstance(spec, str) or not isinstance(spec, Iterable):
        raise TypeError(f"heads[{name!r}] must be a width, task ids, or widths by task id, got {spec!r}")
    return None, list(spec)


def _check_width(name: str, width: object) -> int:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise ValueError(f"heads[{name!r}]: the width of a head must be a positive int, got {width!r}")
    return width
