"""A WSN whose gated tensors are cut into shards: what its processes tell each other.

Everything else is whole in each process: heads, normalisation layers, whatever is not gated. The gradients of these
tensors are averaged when a backward pass ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import _current_graph_task_id as _backward_in_progress

from ..nn.sharding import Sharding
from ..nn.shards import shard_of
from . import alike
from .parallel import Parallel, drawn_by_processes, kept_of_tasks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .wsn import WSN


class ShardedParallel(Parallel):
    """The processes of one WSN that :func:`wsn_fast.distributed.shard` has cut into shards."""

    WRAPPED_IN = ""

    def __init__(self, sharding: Sharding) -> None:
        super().__init__()
        self._sharding = sharding
        self._agreed: object = None  # the task in use, densities and rules that all processes have agreed on

    @property
    def sharded(self) -> ProcessGroup | None:
        return self._sharding.group

    @property
    def known(self) -> ProcessGroup | None:
        return self._sharding.group

    @property
    def group(self) -> ProcessGroup | None:
        return self._sharding.group

    def before_forward(self, wsn: WSN) -> None:
        """A forward pass is about to run: the processes agree on the task, and on the thresholds of its scores.

        Raises:
            RuntimeError: they use different tasks, or do not train the same tensors.
        """
        if _backward_in_progress() != -1:  # activation checkpointing repeats a part of a forward pass
            return
        self._agree(wsn)
        task = wsn._view.task
        self._sharding.begin_pass(None if task is None else wsn.tasks.index(task))
        if task is None and torch.is_grad_enabled() and wsn.current_task is not None:
            if self._settled != self._state_of(wsn):
                self._settle(wsn)
            self._unreduced.expect()

    def begin(self, wsn: WSN) -> None:
        self._settled = None
        super().begin(wsn)

    def send(self, tensors: Iterable[Tensor]) -> None:
        super().send(tensor for tensor in tensors if shard_of(tensor) is None)

    def _agree(self, wsn: WSN) -> None:
        settings = {name: (layer.gate_density, layer.rule) for name, layer in wsn._parts.layers.items()}
        now = wsn._generation, wsn._view, settings
        if now != self._agreed:
            texts = {f"the density or rule of {name}": repr(one) for name, one in settings.items()}
            texts["the task in use"] = repr((wsn._view, wsn.current_task, wsn.tasks))
            found = alike.different_texts(self._sharding.group, texts, self._sharding.device)
            if found and "the task in use" not in found:
                raise RuntimeError(f"the processes have different values of {alike.listed(found)}: their masks differ")
            if found:
                raise RuntimeError(
                    f"the processes use different tasks, this one {wsn._view}: each would mask its shard for a task of "
                    "its own. Let all of them call begin_task, end_task and use_task alike"
                )
            self._agreed = now

    def _settle(self, wsn: WSN) -> None:
        """A task is about to be trained for the first time, or other tensors of it are."""
        group = self._sharding.group
        for gate in self._sharding.gates:
            if gate.score.requires_grad and not gate.param.requires_grad:
                raise RuntimeError(
                    f"the scores of {gate.path} are trained, and it is not: FSDP2 hands over gradients of tensors that "
                    "are trained only. Train both, or none"
                )
        drawn = {id(tensor): tensor for tensor in drawn_by_processes(wsn)}
        if self._begun != wsn._generation:
            alike.send(group, drawn.values())
            self._begun = wsn._generation
        whole = [*self._whole(wsn)]
        others = [named for named in whole if id(named[1]) not in drawn]
        found = alike.different_tensors(group, others, self._sharding.device)
        if found:
            raise RuntimeError(f"the processes have different values of {alike.listed(found)}: load one state in all")
        self._params = [*wsn.parameters()]
        self._unreduced.watch([p for p in self._params if p.requires_grad and shard_of(p) is None], group)
        self._settled = self._state_of(wsn)

    def _whole(self, wsn: WSN) -> Iterable[alike.Named]:
        of_shards = {id(gate.gated().masks) for gate in self._sharding.gates}
        for name, tensor in kept_of_tasks(wsn):
            if shard_of(tensor) is None and id(tensor) not in of_shards:
                yield name, tensor
