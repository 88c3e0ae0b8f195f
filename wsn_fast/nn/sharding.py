"""The sharded gates of a model together: their thresholds, and what is the same in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..backends import collectives
from .shards import CommonState, ShardedGate, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Sharding:
    """How a model is cut into shards.

    Args:
        group: the processes.
        modules: the modules that FSDP2 gathers, the root first.
        compute_dtype: in which masked tensors are gathered; None for that of the tensors.

    Attributes:
        gates: the sharded gates.
        device: where the processes exchange tensors.
        is_exported: whether a state of the parts is asked for by who makes a whole one of it.
    """

    def __init__(self, group: ProcessGroup, modules: Sequence[Any], compute_dtype: torch.dtype | None) -> None:
        collectives.end_calmly()
        self.group, self.modules, self.compute_dtype = group, modules, compute_dtype
        self.gates: list[ShardedGate] = []
        self.device = torch.device("cpu")
        self.is_exported = False
        self.common = CommonState()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` in the compute dtype: in autocast, because only gated tensors are gathered in it."""
        dtype = self.compute_dtype
        with torch.autocast(self.device.type, dtype) if dtype is torch.bfloat16 else nullcontext():
            return forward(*args, **kwargs)

    def reshard(self) -> None:
        """Make the shards the Parameters of the model, where gathered tensors are still in their place."""
        for module in self.modules:
            module.reshard()

    def begin_pass(self, row: int | None) -> None:
        """A forward pass is about to begin, in which all processes compute with this row: gathered tensors of before
        are out of date."""
        self.reshard()
        self.common.passes += 1
        self.common.row = row
        if row is None:
            self.find_thresholds()

    @torch.inference_mode(False)  # training reads them too
    def find_thresholds(self) -> None:
        """Find the thresholds of all scores, if some have changed."""
        stamps = [gate.stamp() for gate in self.gates]
        if all(gate.tau_stamp == now for gate, now in zip(self.gates, stamps, strict=True)):
            return
        pairs = sorted(zip(self.gates, stamps, strict=True), key=_kind)
        for _, members in groupby(pairs, key=_kind):
            together = [*members]
            layers = [gate.layer for gate, _ in together]
            densities = [gate.layer.density_of(gate.name) for gate, _ in together]
            scores = [local(gate.score).detach() for gate, _ in together]
            taus = ops.topc_threshold(scores, densities, rule=layers[0].rule, group=self.group)
            for (gate, now), tau in zip(together, taus, strict=True):
                gate.tau, gate.tau_stamp = tau, now

    def agree(self, names: Iterable[str]) -> list[str]:
        """The names that some process has."""
        texts = collectives.texts_of(self.group, "\n".join(names))
        return sorted({name for text in texts for name in text.split("\n") if name})

    def sums(self, values: Tensor) -> Tensor:
        """The sums over the processes, in place."""
        collectives.sum_over(self.group, values)
        return values

    def norm(self, of_shards: Sequence[Tensor]) -> Tensor:
        """The 2-norm of what all processes have together, given the norms of the shards of this one: 0-d."""
        squares = [one.to(torch.float64).square() for one in of_shards]
        nothing = torch.zeros((), dtype=torch.float64, device=self.device)
        return self.sums(torch.stack(squares).sum() if squares else nothing).sqrt()


def _kind(pair: tuple[ShardedGate, object]) -> tuple[str, str]:
    gate = pair[0]
    return str(gate.score.dtype), gate.layer.rule
