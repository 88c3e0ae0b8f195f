"""What a model consists of, as WSN sees it: gated tensors, heads, tensors with a copy per task, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import ops, ownership, per_task
from .heads import TaskHeads
from .patterns import matches
from .subnet import Gated, SubnetLayer
from .tasks import TaskId

T = TypeVar("T")
Density = float | Mapping[str, float]


class ModelParts:
    """The parts of ``model``, by name, found anew by :meth:`refresh` (models are edited between tasks).

    Args:
        model: has subnet layers, or it is a ``ValueError``.
        declared: the name patterns of each kind of owner (see :mod:`wsn_fast.ownership`).
    """

    def __init__(self, model: nn.Module, declared: dict[str, tuple[str, ...]]) -> None:
        self._declared = declared
        self.refresh(model)
        ownership.mark_per_task(self.owned, finished=len(self.tasks_of_layers()))

    def refresh(self, model: nn.Module) -> None:
        """Look at ``model`` again. Raises ``ValueError`` when it has no subnet layer, or its layers or per-task tensors
        disagree about how many tasks have ended."""
        self.model = model
        # A compiled model wraps the original; names stay those of the original.
        named = [(name.replace("_orig_mod.", "").removesuffix("_orig_mod"), m) for name, m in model.named_modules()]
        self.layers = {name: m for name, m in named if isinstance(m, SubnetLayer)}
        if not self.layers:
            raise ValueError("model has no subnet layer: convert(model) it first, or build it from FastSubnet layers")
        self.heads = {name: m for name, m in named if isinstance(m, TaskHeads)}
        self.owned = ownership.classify(model, self._declared)
        self.tasks_of_layers()

    def gated(self) -> Iterator[tuple[str, Gated]]:
        """The gated tensors; one that tied layers share (scores too) appears once."""
        seen = set()
        for prefix, layer in self.layers.items():
            for gate in layer.gated():
                if (id(gate.param), id(gate.score)) not in seen:
                    seen.add((id(gate.param), id(gate.score)))
                    yield f"{prefix}.{gate.name}".lstrip("."), gate

    def tasks_of_layers(self) -> list[TaskId]:
        """The finished tasks as the layers know them. Raises ``ValueError`` when they disagree."""
        listed = {name: layer.tasks for name, layer in self.layers.items()}
        first, tasks = next(iter(listed.items()))
        for name, other in listed.items():
            if other != tasks:
                raise ValueError(
                    f"subnet layers disagree about the finished tasks: {first} has {tasks}, {name} has {other}. A "
                    "layer cannot join or be replaced after a task has ended"
                )
        return tasks

    def check_rows(self, tasks: int) -> None:
        """Raise ``ValueError`` unless every per-task tensor has a row for each of the ``tasks`` that have ended."""
        for item in self.owned:
            if item.kind == "per_task":
                known = item.attribute in per_task.marked(item.module)
                rows = len(getattr(item.module, f"{item.attribute}_tasks")) if known else 0
                if not known or rows != tasks:
                    raise ValueError(
                        f"{item.name} has values of {rows} finished tasks, the subnet layers know {tasks}: its module "
                        "was added or replaced after WSN(model)"
                    )

    def task_densities(self, density: Density | None) -> dict[str, float | None]:
        """The density of its own that a task has for each layer; None where the layer's holds."""
        names = list(self.layers)
        own: dict[str, float | None] = dict.fromkeys(names)
        if density is None:
            return own
        if not isinstance(density, Mapping):
            return dict.fromkeys(names, ops.check_density(density))
        for pattern, value in reversed(list(density.items())):  # so that the first match counts
            hits = [name for name in names if matches(pattern, name)]
            if not hits:
                raise ValueError(f"density pattern {pattern!r} matches no subnet layer; layers: {names}")
            own.update(dict.fromkeys(hits, ops.check_density(value, f"density[{pattern!r}]")))
        return own

    def check_tied(self, densities: Mapping[str, float | None]) -> None:
        """Raise ``ValueError`` unless layers that share a weight and its scores share the density too: each would have
        a mask of its own otherwise, and only one of them would be kept."""
        first: dict[tuple[int, int], str] = {}
        for name, layer in self.layers.items():
            other = first.setdefault((id(layer.weight), id(layer.weight_score)), name)
            own, others = (densities[n] or self.layers[n].density for n in (name, other))
            if own != others:
                raise ValueError(
                    f"density of {name} is {own}, and that of {other}, tied to it, {others}: they share a mask"
                )

    @torch.no_grad()
    def check_initialised(self) -> None:
        """Raise ``RuntimeError`` naming the first tensor that is on the meta device, or gated tensor with NaN among its
        values or scores: that is what they are before they are initialised (:meth:`SubnetLayer.initialise`)."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_meta:
                raise RuntimeError(f"{name} is on the meta device: wsn_fast.materialize(model, device) gives it memory")
        for name, gate in self.gated():
            for what, tensor in (("", gate.param), ("_score", gate.score)):
                if tensor.isnan().any():
                    raise RuntimeError(
                        f"{name}{what} has NaN among its values: after to_empty nothing was loaded into it and nothing "
                        "initialised it, or it was spoilt since"
                    )

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise ``FloatingPointError`` naming the first gated tensor whose values or scores are not all finite."""
        for name, gate in self.gated():
            for what, tensor in (("", gate.param), ("_score", gate.score)):
                if not tensor.isfinite().all():
                    raise FloatingPointError(f"{name}{what} has values that are not finite")

    def fixed(self, tasks: list[TaskId]) -> Iterator[nn.Parameter]:
        """Parameters that must not change at all once ``tasks`` have ended: their heads, and what is declared
        frozen."""
        for heads in self.heads.values():
            for task in heads.tasks:
                if task in tasks:
                    yield from heads.head(task).parameters()
        for item in self.owned:
            if tasks and item.kind == "frozen" and isinstance(item.tensor, nn.Parameter):
                yield item.tensor

    def show(self, row: int | None, head: TaskId | None) -> None:
        """Compute with the masks and per-task values of ``row`` (None: current scores, live values) and that head."""
        for heads in self.heads.values():
            heads.active = head
        for layer in self.layers.values():
            layer.active_row = row
        per_task.use_row(list(self.model.modules()), row)

    def trainable(self) -> Iterator[tuple[str, Tensor]]:
        """All that training changes, by name: parameters, scores, live buffers; live values even while a row is
        shown."""
        stored: set[int] = set()
        for _, gate in self.gated():
            stored |= {id(gate.masks), id(gate.union)}
        for layer in self.layers.values():
            stored |= {id(getattr(layer, f"{name}_view")) for name in layer.GATED}
        live: dict[int, Tensor] = {}
        for module in self.model.modules():
            for name in per_task.marked(module):
                kept = getattr(module, f"{name}_live")
                stored |= {id(getattr(module, f"{name}_tasks")), id(kept)}
                if kept is not None:
                    live[id(getattr(module, name))] = kept
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if id(tensor) not in stored:
                yield name, live.get(id(tensor), tensor)

    def moved(self, own: Mapping[str, Tensor], state: Mapping[str, Tensor], fixed: Iterable[Tensor]) -> list[str]:
        """The names in ``state`` with other values than ``own`` has where finished tasks use them."""
        unions = {id(gate.param): gate.union for _, gate in self.gated()} | dict.fromkeys(map(id, fixed))
        found = []
        for name, tensor in own.items():
            if id(tensor) not in unions:
                continue
            union, then = unions[id(tensor)], state[name].to(tensor.device)
            if union is not None:
                tensor, then = (ops.gate_packed(t.detach(), union, t.dtype) for t in (tensor, then))
            elif any(tensor is gate.param for _, gate in self.gated()):
                continue  # no task has ended
            if not torch.equal(tensor, then):
                found.append(name)
        return found

    @torch.no_grad()
    def append_task(self, task: TaskId, packed: Mapping[str, Mapping[str, Tensor]], then: Callable[[], T]) -> T:
        """Store a finished task: its packed masks by layer and gated tensor, and the live per-task values. Returns what
        ``then`` does with that. All or nothing: after an error everything is as before."""
        changed = [*self.layers.values(), *(m for m in self.model.modules() if per_task.marked(m))]
        before = [dict(module._buffers) for module in changed]
        try:
            for name, layer in self.layers.items():
                layer.append_task(task, packed[name])
            for module in self.model.modules():
                per_task.append_task(module)
            return then()
        except BaseException:
            for module, buffers in zip(changed, before, strict=True):
                module._buffers.update(buffers)
            for layer in self.layers.values():
                layer.tasks = layer.tasks[: len(layer.weight_masks)]
                layer.rebuild_union()
            raise
