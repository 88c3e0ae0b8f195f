"""The parts of a model that WSN works with: subnet layers, heads, per-task tensors, and all other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import ops
from ..convert.patterns import matches
from ..nn import per_task, shown_rows
from ..nn.densities import Densities, check_densities, density_of
from ..nn.gate import Gated
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.reads import share_scope
from ..nn.sharding import Sharding
from ..nn.shards import local, shard_of
from ..nn.task_ids import TaskId, task_key
from ..nn.tensors import GatedModule
from . import ownership, wrappers

T = TypeVar("T")
Density = float | Mapping[str, float]


class ModelParts:
    """The parts of ``model`` by name. :meth:`refresh` finds them again, because users edit models between tasks.

    Args:
        model: a model with subnet layers; without any, ``ValueError`` is raised.
        declared: the owners that the user declared.
    """

    def __init__(self, model: nn.Module, declared: ownership.Declared) -> None:
        self._declared = declared
        self._shown: tuple[int | None, TaskId | None] = None, None
        self.sharding: Sharding | None = None
        self.refresh(model)
        ownership.mark_per_task(self.owned, finished=len(self.tasks_of_layers()))
        self.copied = [module for module in model.modules() if per_task.marked(module)]

    def refresh(self, model: nn.Module) -> None:
        """Find the parts of ``model`` again. Raises ``ValueError`` if it has no subnet layer, or if its layers disagree
        about the tasks that have ended."""
        self.model = model
        # A compiled model wraps the original; names stay those of the original.
        named = [(ownership.original(name), module) for name, module in model.named_modules()]
        self.layers = {name: m for name, m in named if isinstance(m, SubnetLayer)}
        if not self.layers:
            raise ValueError("model has no subnet layer: convert(model) it first, or build it from FastSubnet layers")
        self.heads = {name: m for name, m in named if isinstance(m, TaskHeads)}
        self.scope = share_scope(model, self.layers.values())
        self.owned = ownership.classify(model, self._declared)
        self.copied = [module for _, module in named if per_task.marked(module)]  # those with per-task tensors
        self.tasks_of_layers()

    def gated(self) -> Iterator[tuple[str, Gated]]:
        """The gated tensors by name. A tensor that tied layers share together with its scores appears once."""
        seen = set()
        for prefix, layer in self.layers.items():
            for gate in layer.gated():
                if (id(gate.param), id(gate.score)) not in seen:
                    seen.add((id(gate.param), id(gate.score)))
                    yield f"{prefix}.{gate.name}".lstrip("."), gate

    def agree(self, names: Iterable[str]) -> list[str]:
        """These names; of a model that is cut into shards those that any process has."""
        return list(names) if self.sharding is None else self.sharding.agree(names)

    def whole_masks(self) -> list[Tensor]:
        """The packed masks of all gated tensors, ``uint8`` [T, ceil(n / 8)] each."""
        shards = [(gate, shard_of(gate.param)) for _, gate in self.gated()]
        return [gate.masks if shard is None else shard.whole_masks(gate.masks) for gate, shard in shards]

    def unions(self) -> dict[int, Tensor | None]:
        """By the id of each gated tensor, the packed mask of the elements that finished tasks use; None before the
        first task has ended. Layers may share a tensor and have masks of their own: this covers those of all."""
        found: dict[int, Tensor | None] = {}
        for _, gate in self.gated():
            other = found.get(id(gate.param))
            found[id(gate.param)] = gate.union if other is None or gate.union is None else other | gate.union
        return found

    def tasks_of_layers(self) -> list[TaskId]:
        """The finished tasks that the layers have masks of. Raises ``ValueError`` if the layers disagree."""
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
                rows = per_task.count(item.module, item.attribute)
                if not known or rows != tasks:
                    raise ValueError(
                        f"{item.name} has values for {rows} finished tasks, but the subnet layers have masks for "
                        f"{tasks}: its module was added or replaced after WSN(model)"
                    )

    def task_densities(self, density: Density | None) -> dict[str, Densities | None]:
        """The density of a task for each layer by name; None where the density of the layer holds.

        Raises:
            ValueError: a density is outside (0, 1], or a pattern matches no layer.
        """
        if not isinstance(density, Mapping):
            return dict.fromkeys(self.layers, None if density is None else ops.check_density(density))
        places = {
            f"{name}.{gate.name}".lstrip("."): (name, gate.name)
            for name, x in self.layers.items()
            for gate in x.gated()
        }
        given: dict[str, dict[str, float]] = {}
        for pattern, value in reversed(list(density.items())):  # so that the first match counts
            hits = [place for tensor, place in places.items() if matches(pattern, tensor)]
            if not hits:
                raise ValueError(f"density pattern {pattern!r} matches no subnet layer; layers: {list(self.layers)}")
            for name, tensor in hits:
                given.setdefault(name, {})[tensor] = ops.check_density(value, f"density[{pattern!r}]")
        own = {name: {g.name: density_of(x.density, g.name) for g in x.gated()} for name, x in self.layers.items()}
        return {name: check_densities(own[name] | given[name]) if name in given else None for name in self.layers}

    def check_tied(self, densities: Mapping[str, Densities | None]) -> None:
        """Raise ``ValueError`` if layers that share a weight and its scores have different densities. Each would have
        its own mask then, and only one of the masks would be stored."""
        first: dict[tuple[int, int], str] = {}
        for name, layer in self.layers.items():
            for gate in layer.gated():
                other = first.setdefault((id(gate.param), id(gate.score)), name)
                own, others = (density_of(densities[n] or self.layers[n].density, gate.name) for n in (name, other))
                if own != others:
                    raise ValueError(
                        f"{other} and {name} are tied and share one mask, so they need one density, got {others} and "
                        f"{own}"
                    )

    def check_ranked(self) -> None:
        """Raise ``ValueError`` if a density has no effect in a layer, because its rule has a constant threshold."""
        for name, layer in self.layers.items():
            if ops.constant_threshold(layer.rule) is not None:
                raise ValueError(f"density must be None: {name} has the rule {layer.rule!r}, which needs none")

    @torch.no_grad()
    def check_initialised(self) -> None:
        """Raise ``RuntimeError``, naming the tensor, if a tensor is on the meta device, sharded, or was made in
        inference mode, or if a gated tensor or its scores contain NaN, as they do before they are initialised
        (:meth:`SubnetLayer.initialise`); also if a module is wrapped for several processes."""
        wrappers.check_model(self.model)
        for prefix, layer in self.layers.items():
            hidden = [name for name in layer.GATED if isinstance(layer, GatedModule) and is_parametrized(layer, name)]
            if hidden:
                raise RuntimeError(
                    f"{prefix or 'the model'} was parametrized after convert, which leaves {hidden} without masks: "
                    "parametrize modules before convert"
                )
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_meta:
                raise RuntimeError(f"{name} is on the meta device: wsn_fast.materialize(model, device) gives it memory")
            if tensor.is_inference():
                raise RuntimeError(
                    f"{name} was made under torch.inference_mode() and cannot be trained: build, load and move the "
                    "model outside of it, or take copy.deepcopy(model)"
                )
        for name, gate in self.gated():
            for what, tensor in (("", gate.param), ("_score", gate.score)):
                if local(tensor).isnan().any():
                    raise RuntimeError(
                        f"{name}{what} has NaN among its values. Load or initialise it after to_empty; if it was "
                        "loaded, training has diverged"
                    )

    @torch.no_grad()
    def check_finite(self) -> None:
        """Raise ``FloatingPointError``, naming the tensor, if a gated tensor or its scores are not all finite."""
        for name, gate in self.gated():
            for what, tensor in (("", gate.param), ("_score", gate.score)):
                # A NaN is both the least and the largest. This reads the tensor once and writes nothing.
                own = local(tensor)
                if own.numel() and not torch.stack(own.aminmax()).isfinite().all():
                    raise FloatingPointError(f"{name}{what} has values that are not finite")

    def finish(self, tasks: list[TaskId], *, anew: bool = False) -> None:
        """From now on the heads of ``tasks`` are those of finished tasks (see :meth:`TaskHeads.finish`)."""
        for heads in self.heads.values():
            heads.finish(tasks, anew=anew)

    def untrained(self) -> set[int]:
        """The ids of the parameters that are not trained, although they are in heads."""
        return {key for heads in self.heads.values() for key in heads.untrained()}

    def fixed_buffers(self, tasks: list[TaskId]) -> Iterator[Tensor]:
        """The buffers that must not change at all after ``tasks`` have ended, as :meth:`fixed` yields parameters."""
        for heads in self.heads.values():
            for task in tasks:
                if task in heads.tasks:
                    yield from heads.head(task).buffers()
        for item in self.owned:
            if tasks and item.kind == "frozen" and not isinstance(item.tensor, nn.Parameter):
                yield item.tensor

    def fixed(self, tasks: list[TaskId]) -> Iterator[nn.Parameter]:
        """The parameters that must not change at all after ``tasks`` have ended: their heads, and those declared
        ``frozen``."""
        finished = {task_key(task) for task in tasks}
        for heads in self.heads.values():
            for key, head in heads.heads.items():
                if key in finished:
                    yield from head.parameters()
        for item in self.owned:
            if tasks and item.kind == "frozen" and isinstance(item.tensor, nn.Parameter):
                yield item.tensor

    def show(self, row: int | None, head: TaskId | None) -> None:
        """Make the model compute with the masks and per-task values of ``row`` and with ``head``. For ``row`` None, it
        computes with the current scores and live values. After an error it computes with what it did before."""
        try:
            self._show(row, head)
        except BaseException:
            self._show(*self._shown)  # needs no memory: what had to be kept for it is kept
            raise
        self._shown = row, head

    def _show(self, row: int | None, head: TaskId | None) -> None:
        for heads in self.heads.values():
            heads.active = head
        for layer in self.layers.values():
            layer.active_row = row
        if row != self._shown[0]:
            self._forget_caches()
        watched = [self.model, *self.copied]
        shown_rows.watch(watched, None)
        per_task.use_row(self.copied, row)
        shown_rows.watch(watched, row)

    def _forget_caches(self) -> None:
        """Let modules forget what they computed from the tensors of another task. Some keep such values in evaluation
        mode (timm's LeViT keeps its attention biases), and drop them when the mode changes."""
        caching = [m for m in self.model.modules() if type(m).train is not nn.Module.train and not m.training]
        modes = [(module, module.training) for one in caching for module in one.modules()]
        for module in caching:
            module.train()
            module.eval()
        for module, training in modes:
            module.training = training

    @torch.no_grad()
    def append_task(self, task: TaskId, packed: Mapping[str, Mapping[str, Tensor]], then: Callable[[], T]) -> T:
        """Store a finished task: its packed masks by layer and gated tensor, and the live per-task values.

        Calls ``then`` afterwards and returns its result. After an error, in ``then`` too, everything is as before.
        """
        changed = [*self.layers.values(), *self.copied]
        before = [dict(module._buffers) for module in changed]
        try:
            for name, layer in self.layers.items():
                layer.append_task(task, packed[name])
            for module in self.copied:
                per_task.append_task(module)
            return then()
        except BaseException:
            for module, buffers in zip(changed, before, strict=True):
                module._buffers.update(buffers)
            for layer in self.layers.values():
                layer.tasks = layer.tasks[: len(next(layer.gated()).masks)]
                layer.rebuild_union()
            raise
