"""What an optimizer consists of: the optimizers inside a wrapper, and whether anything but its own step may write to
its parameters."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_KNOWN_CLASSES = ("torch.optim.", "wsn_fast.optim.")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def is_optimizer(candidate: object) -> bool:
    """Whether ``candidate`` is a torch optimizer, or an object that acts as one: it has ``step`` and ``param_groups``.

    Some wrappers derive from no class (schedule-free's), others from ``torch.optim.Optimizer`` without calling its
    constructor (accelerate's).
    """
    groups = getattr(candidate, "param_groups", None)
    return isinstance(groups, list | tuple) and callable(getattr(candidate, "step", None))


def within(optimizer: Any) -> list[Any]:
    """``optimizer`` and the optimizers that it holds in its attributes, the outermost first."""
    found = [optimizer]
    for one in found:  # grows meanwhile
        for attribute in list(getattr(one, "__dict__", {}).values()):
            found += [o for o in _elements(attribute) if is_optimizer(o) and all(o is not known for known in found)]
    return found


def _elements(attribute: object) -> Iterable[object]:
    if isinstance(attribute, list | tuple):
        return attribute
    return list(attribute.values()) if isinstance(attribute, Mapping) else (attribute,)


def has_step_hooks(optimizer: object) -> bool:
    """Whether hooks can be registered that run around the steps of ``optimizer``."""
    return isinstance(optimizer, torch.optim.Optimizer) and all(name in vars(optimizer) for name in _HOOKS)


def hooks_of_all_optimizers() -> bool:
    """Whether there are hooks that run before the steps of all optimizers."""
    return bool(_global_optimizer_pre_hooks)


def ways_into(optimizer: Any) -> tuple[Any, ...]:
    """What :func:`steps_alone` depends on, which is quicker to compare: the step, and the keys of all hooks."""
    own, step = vars(optimizer), type(optimizer).step
    pre, post = own["_optimizer_step_pre_hooks"], own["_optimizer_step_post_hooks"]
    return step, own.get("step"), *pre, *post, *_global_optimizer_pre_hooks, *_global_optimizer_post_hooks


def steps_alone(optimizer: Any) -> bool:
    """Whether nothing but the step of a class of ``torch.optim`` or of this library writes to the parameters of
    ``optimizer`` between its hooks, and no other hook does so before or after.

    A step of torch changes no parameter without a gradient. Any other class may, and a subclass that calls the step of
    its parent may write after the hooks have run.

    Args:
        optimizer: has step hooks.
    """
    if not f"{type(optimizer).__module__}.".startswith(_KNOWN_CLASSES):
        return False
    hooks = [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
    for name in _HOOKS:
        hooks += vars(optimizer)[name].values()
    ours = all(_is_from([*_layers_of(hook)][-1], _OURS) for hook in hooks)
    return ours and all(_is_from(step, _TORCH, _OURS) for step in _layers_of(optimizer.step))


def _layers_of(function: Any) -> Iterator[Any]:
    """A function and those that it wraps: torch puts its hooks around a step, and a schedule puts a counter there."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _is_from(function: Any, *folders: str) -> bool:
    """Whether the code of a function lies in one of ``folders``."""
    function = function.func if isinstance(function, partial) else function
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(folders)
