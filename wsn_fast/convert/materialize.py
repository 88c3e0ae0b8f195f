"""materialize: allocates the memory of models that were built on the meta device."""

from __future__ import annotations

from collections import Counter
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
    work = Materialization(model, device)
    for module in work.modules:
        work.allocate(module)
    for module in reversed(work.modules):
        work.initialise(module)
    return model.to(work.device)


class Materialization:
    """What :func:`materialize` does, for one module at a time. Nothing is changed when this is made.

    Args:
        model: the model.
        device: the device for the tensors without memory.

    Attributes:
        modules: all modules of the model, outer ones first. Inner ones are initialised first.
        missing: the names of the direct tensors of each that have no memory.

    Raises:
        TypeError, ValueError: as for :func:`materialize`.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.device = torch.device(device)
        if self.device.type == "meta":
            raise ValueError("device must be one with memory, got 'meta'")
        names = {module: name for name, module in model.named_modules()}
        self.modules = [*names]
        self.missing = {module: [n for n, t in _tensors(module).items() if t.is_meta] for module in names}
        lost = [f"{names[module]}.{n}".lstrip(".") for module in names for n in _lost(module, self.missing[module])]
        if lost:
            raise ValueError(
                f"these tensors have no memory yet: {lost}. Load them first: model.load_state_dict(weights, "
                "assign=True)"
            )
        places = Counter(id(tensor) for module in names for tensor in _tensors(module).values() if tensor.is_meta)
        self._tied = {key for key, count in places.items() if count > 1}
        self._made: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # what was replaced, so that no other tensor gets its id

    def allocate(self, module: nn.Module) -> None:
        """Give memory to the missing direct tensors of a module."""
        tensors: tuple[dict[str, Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]
        for store in tensors:
            for name, old in store.items():
                if name in self.missing[module]:
                    assert old is not None
                    of_score = isinstance(module, SubnetLayer) and name.endswith("_score")
                    like = store[name.removesuffix("_score")] if of_score else old
                    assert like is not None
                    store[name] = self._new(old, like)

    def _new(self, old: Tensor, like: Tensor) -> Tensor:
        if id(old) in self._made:
            return self._made[id(old)]
        new = torch.empty_like(like, device=self.device)
        new = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        if id(old) in self._tied:
            self._made[id(old)] = new
            self._kept.append(old)
        return new

    def resets(self, module: nn.Module) -> bool:
        """Whether :meth:`initialise` calls ``reset_parameters`` of the module."""
        return not _ours(module).issuperset(self.missing[module])

    def initialise(self, module: nn.Module) -> None:
        """Give values to the direct tensors of a module that had no memory. Its inner modules have theirs."""
        if isinstance(module, SubnetLayer):
            module.initialise(n for n in self.missing[module] if n.endswith("_score"))
        if self.resets(module):
            module.reset_parameters()  # type: ignore[operator]  # the check of what is lost made sure that it exists


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
