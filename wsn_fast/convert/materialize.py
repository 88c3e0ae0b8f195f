"""materialize: allocates the memory of models that were built on the meta device."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
@torch.no_grad()
def materialize(model: M, device: torch.device | str) -> M:
    """Bring a model to ``device`` that was built on the meta device, wholly or in part.

    Tensors on the meta device have a shape and no memory. So a large model takes no memory until its weights are known,
    and then it takes the memory of one model::

        with torch.device("meta"):
            model = convert(Net(), density=0.3, heads="classifier")
        model.load_state_dict(weights, strict=False, assign=True)  # leave this out to train from scratch
        materialize(model, "cuda")

    Loaded tensors are moved as they are. The others get their memory here: scores are drawn in the mode that
    :func:`wsn_fast.convert` was given, in the dtype of their weights; modules of which nothing was loaded call their
    ``reset_parameters``, inner modules first. Such a module gets random values without a warning, so check the names
    that ``load_state_dict`` returns as missing. Tied tensors stay tied. Loading with ``assign=True`` breaks ties, as it
    does in any model; tie such tensors again before this call.

    ``model.to_empty(device=...)`` works too. It draws the scores and breaks ties; everything else has to be loaded or
    initialised afterwards, as for any model. Until then gated tensors are NaN, and ``WSN.begin_task`` refuses them.

    Args:
        model: converted or not; a part of a model or a :class:`wsn_fast.WSN`. Changed in place.
        device: the device for all of the model.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``device`` is meta; or a tensor was not loaded and cannot be made here, because its module was
            loaded in part or has no ``reset_parameters``, or because it holds masks or copies of finished tasks.

        If one of these is raised, nothing has been changed.
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
        raise ValueError(
            f"these tensors have no memory yet: {lost}. Load them first: model.load_state_dict(weights, assign=True)"
        )
    made: dict[Tensor, Tensor] = {}
    for module in names:
        _allocate(module, missing[module], device, made)
    for module in reversed(names):
        if isinstance(module, SubnetLayer):
            module.initialise(n for n in missing[module] if n.endswith("_score"))
        if not _ours(module).issuperset(missing[module]):
            module.reset_parameters()  # the check of `lost` made sure that it exists
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
    return ours | ({"_device_and_dtype"} if isinstance(module, TaskHeads) else set())


def _lost(module: nn.Module, missing: list[str]) -> list[str]:
    """The missing tensors that cannot be made here and would have to be loaded."""
    tensors, ours = _tensors(module), _ours(module)
    can_reset = callable(getattr(module, "reset_parameters", None)) and ours.issuperset(tensors.keys() - {*missing})

    def can_make(name: str) -> bool:
        of_finished_tasks = name.endswith(("_masks", "_tasks")) and len(tensors[name]) > 0
        return not of_finished_tasks if name in ours else can_reset

    return [name for name in missing if not can_make(name)]


def _allocate(module: nn.Module, missing: list[str], device: torch.device, made: dict[Tensor, Tensor]) -> None:
    """Give memory to the missing tensors; ``made`` maps each old tensor to the one in its place."""
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
