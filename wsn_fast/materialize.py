"""Memory for models that were built without any, on the meta device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from . import per_task
from .heads import TaskHeads
from .subnet import SubnetLayer

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def materialize(model: M, device: torch.device | str) -> M:
    """Bring a model to ``device`` that was built on the meta device, wholly or in part.

    There tensors have a shape and no memory, so a large model costs nothing until it is known what it is to hold, and
    then it exists once::

        with torch.device("meta"):
            model = convert(Net(), density=0.3, heads="classifier")
        model.load_state_dict(weights, strict=False, assign=True)  # or not, to train from scratch
        materialize(model, "cuda")

    What was loaded is moved as it is. The rest gets its memory here: scores are drawn as :func:`wsn_fast.convert` was
    told, in the dtype of their weights; modules of which nothing was loaded do their ``reset_parameters``, inner ones
    first. So look at the names that ``load_state_dict`` returns as missing. What is tied stays so; tensors that
    ``assign=True`` has parted, as it does in any model, are to be tied again before.

    ``model.to_empty(device=...)`` works too. It draws the scores, breaks ties, and leaves everything else to be loaded
    or initialised, as for any model; gated tensors are NaN until then, and ``WSN.begin_task`` refuses them.

    Args:
        model: converted or not; a part of a model or a :class:`wsn_fast.WSN`. Changed in place.
        device: where all of it is to be.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``device`` is meta; or a tensor can only be loaded and was not: its module was loaded in part or has
            no ``reset_parameters``, or it holds masks or copies of finished tasks. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("device must be one with memory, got 'meta'")
    names = {module: name for name, module in model.named_modules()}
    missing = {module: [n for n, t in _tensors(module).items() if t.is_meta] for module in names}
    lost = [f"{names[module]}.{n}".lstrip(".") for module in names for n in _lost(module, missing[module])]
    if lost:
        raise ValueError(f"these tensors are on the meta device and can only be loaded (assign=True): {lost}")
    made: dict[Tensor, Tensor] = {}
    for module in names:
        _allocate(module, missing[module], device, made)
    for module in reversed(names):
        if isinstance(module, SubnetLayer):
            module.initialise(n for n in missing[module] if n.endswith("_score"))
        if not _ours(module).issuperset(missing[module]):
            module.reset_parameters()  # there is one: nothing is lost
    return model.to(device)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The direct parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _ours(module: nn.Module) -> set[str]:
    """The names of the direct tensors that this library added to a module."""
    ours = {f"{name}_tasks" for name in per_task.marked(module)}
    if isinstance(module, SubnetLayer):
        ours |= {f"{name}{end}" for name in module.GATED for end in ("_score", "_masks")}
    return ours | ({"_birthplace"} if isinstance(module, TaskHeads) else set())


def _lost(module: nn.Module, missing: list[str]) -> list[str]:
    """Those of the missing tensors that nothing here can make."""
    tensors, ours = _tensors(module), _ours(module)
    can_reset = callable(getattr(module, "reset_parameters", None)) and ours.issuperset(tensors.keys() - {*missing})

    def can_make(name: str) -> bool:
        of_finished_tasks = name.endswith(("_masks", "_tasks")) and len(tensors[name]) > 0
        return not of_finished_tasks if name in ours else can_reset

    return [name for name in missing if not can_make(name)]


def _allocate(module: nn.Module, missing: list[str], device: torch.device, made: dict[Tensor, Tensor]) -> None:
    """Memory for what is missing; ``made`` has what took the place of which tensor."""
    tensors: tuple[dict[str, Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
    for store in tensors:
        for name, old in store.items():
            if name in missing:
                assert old is not None
                if old not in made:
                    of_score = isinstance(module, SubnetLayer) and name.endswith("_score")
                    like = store[name.removesuffix("_score")] if of_score else old
                    assert like is not None
                    new = torch.empty_like(like, device=device)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                store[name] = made[old]
