"""PackNet (Mallya and Lazebnik, CVPR 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..continual import model_parts
from ..continual.probe import Probe
from ..continual.wsn import WSN
from ..convert import convert
from ..convert.slices import Density
from ..nn.gate import Gated
from ..nn.task_ids import TaskId
from .frozen import is_bias


class _Free(NamedTuple):
    """A gated tensor with its name and its density, and the mask of the elements that no finished task uses."""

    name: str
    gate: Gated
    density: float
    free: Tensor

    def removed(self) -> int:
        """How many of the free weights a task does not keep."""
        return round((1 - self.density) * int(self.free.sum()))

    def largest(self) -> Tensor:
        """The mask of the free weights that a task keeps: those of larger magnitude than the last one that is removed.
        So ties with that one are removed. Weights that have never learned are all 0, and to keep them would use them
        up."""
        removed = self.removed()
        if removed == 0:
            return self.free
        weight = self.gate.param
        return self.free & (weight.abs() > ops.key_at(weight[self.free], removed - 1, "magnitude"))


class PackNet(WSN):
    """Trains the free weights of a model on a task, prunes them, trains the kept ones again, and freezes these (Mallya
    and Lazebnik, "PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning", CVPR 2018).

    A task is begun and trained as with every WSN, now with all weights: those of earlier tasks are frozen, and the free
    ones learn. :meth:`prune` keeps a fraction of the free weights, those of largest magnitude in each tensor. Train
    again for a while, with a new optimizer, and end the task. A finished task computes with the weights of its own and
    of all tasks before it.

    No scores are trained: they are 1 for the weights that the task may use, and 0 for the others. Biases, which are
    never pruned, and tensors that are neither gated nor in heads are trained in the first task only, and then fixed.
    Normalisation layers have values for each task.

    Args:
        model: the model, trained or not; it is converted in place.
        density: the fraction of the free weights of each tensor that a task keeps, as for :func:`wsn_fast.convert`.
        options: ``heads`` and other arguments of :func:`wsn_fast.convert`, but not ``rule`` and ``score_init``.

    Raises:
        TypeError, ValueError: as :func:`wsn_fast.convert` says. Then nothing has been changed.
    """

    def __init__(self, model: nn.Module, density: float | Mapping[str, Density] = 0.5, **options: Any) -> None:
        convert(model, density, rule="value >= 0.5", score_init=1, **options)
        super().__init__(model, rest="frozen", reinit_scores=True, score_init=1)
        for _, gate in self.gated():
            gate.score.requires_grad_(False)

    def begin_task(
        self, task: TaskId, *, density: model_parts.Density | None = None, out_features: int | None = None
    ) -> None:
        """Start to train ``task`` with all weights. See :meth:`wsn_fast.WSN.begin_task`.

        Raises:
            RuntimeError: no weight is free; or another reason that is given there.
        """
        self._refresh()
        densities = self._parts.task_densities(density)
        if not any(one.free.any() for one in self._free()):
            raise RuntimeError(
                f"task {task!r} cannot begin: no weight is free, because the {len(self.tasks)} finished tasks use all. "
                "Keep fewer weights for each task (density), or remove a task"
            )
        super().begin_task(task, out_features=out_features)
        for name, layer in self._parts.layers.items():
            layer.task_density = densities[name]

    @property
    def is_pruned(self) -> bool:
        """Whether :meth:`prune` has removed weights of the task in progress."""
        return self.current_task is not None and any(bool((gate.score == 0).any()) for _, gate in self.gated())

    @torch.inference_mode(False)
    @torch.no_grad()
    def prune(self) -> None:
        """Keep the free weights of largest magnitude in each tensor, and set the other free weights to 0.

        Of n free weights, ``round((1 - density) * n)`` are removed, and with them those that have the same magnitude as
        the last of them, as the published program does. Build the optimizer anew after this call.

        Raises:
            RuntimeError: no task is in progress, or its weights are pruned already.
            ValueError: the task would keep no weight of its own, or a tensor would have none at all.
            FloatingPointError: a weight is not finite.

            After each of these errors nothing has been changed.
        """
        task = self.current_task
        if task is None:
            raise RuntimeError("no task is in progress: begin_task(task) first")
        if self.is_pruned:
            raise RuntimeError(f"task {task!r} is pruned already: train the weights that are kept, and end the task")
        self._refresh()
        self.check_finite()
        kept = [(one, one.largest()) for one in self._free()]
        for one, keep in kept:
            if not keep.any() and one.free.all():
                raise ValueError(f"density {one.density} keeps none of the {keep.numel()} weights of {one.name}")
        if not any(keep.any() for _, keep in kept):
            raise ValueError(f"the density of task {task!r} keeps none of the weights that are free")
        for one, keep in kept:
            one.gate.param.masked_fill_(one.free & ~keep, 0)
            one.gate.score.copy_(keep | ~one.free)

    def end_task(self, *, probe: Probe | None = None) -> None:
        """Finish the task in progress. What it does not keep is 0 for the next task. See
        :meth:`wsn_fast.WSN.end_task`.

        Raises:
            RuntimeError: the weights are not pruned; or another reason that is given there.
        """
        if self.current_task is not None and not self.is_pruned and any(one.removed() for one in self._free()):
            raise RuntimeError(
                f"task {self.current_task!r} is not pruned, and would keep all free weights: prune() first"
            )
        super().end_task(probe=probe)
        with torch.no_grad():  # an optimizer may have moved them since they were pruned
            for one in self._free():
                one.gate.param.masked_fill_(one.free, 0)

    def _free(self) -> list[_Free]:
        unions = self._parts.unions()
        layers = self._parts.layers.values()
        densities = {id(gate.score): layer.density_of(gate.name) for layer in layers for gate in layer.gated()}
        densities |= {id(gate.score): 1.0 for _, gate in self.gated() if is_bias(gate.name)}
        found = []
        for name, gate in self.gated():
            union = unions[id(gate.param)]
            free = torch.ones_like(gate.param, dtype=torch.bool)
            if union is not None:
                free = ~ops.unpack_mask(union, free.shape)
            found.append(_Free(name, gate, densities[id(gate.score)], free))
        return found
