"""Averages over the processes the gradients that DistributedDataParallel does not reduce, as those of a head that was
made after the wrapper.

It follows the rules of the wrapper: what a backward pass has added up is averaged when it ends, unless the forward pass
ran under ``no_sync()``. All parameters that got a gradient travel together, after the gradients of the wrapper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends import collectives
from ..ops.raw_gradients import queue_callback

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Unreduced:
    """The parameters whose gradients the wrapper leaves as they are."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._params: Sequence[Tensor] = ()
        self._group: ProcessGroup | None = None
        self._awaited: set[int] = set()  # positions in _params
        self._arrived: set[int] = set()

    def watch(self, params: Sequence[Tensor], group: ProcessGroup | None) -> None:
        """From now on these are the parameters, and their gradients are averaged over ``group``."""
        for handle in self._handles:
            handle.remove()
        self._params, self._group = params, group
        self._awaited, self._arrived = set(), set()
        self._handles = [
            param.register_post_accumulate_grad_hook(partial(self._arrive, i)) for i, param in enumerate(params)
        ]

    def expect(self) -> None:
        """The next backward pass averages what it adds up."""
        self._awaited, self._arrived = set(range(len(self._params))), set()

    def _arrive(self, position: int, _: Tensor) -> None:
        if position in self._awaited:
            if not self._arrived:
                queue_callback(self._average)
            self._awaited.discard(position)
            self._arrived.add(position)

    @torch.no_grad()
    def _average(self) -> None:
        arrived, self._arrived = [self._params[i] for i in sorted(self._arrived)], set()
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in arrived:
            if param.grad is not None:
                kinds.setdefault((param.grad.device, param.grad.dtype), []).append(param.grad)
        for grads in kinds.values():
            joined = torch.cat([grad.reshape(-1) for grad in grads]).div_(collectives.size(self._group))
            collectives.sum_over(self._group, joined)
            for grad, mean in zip(grads, joined.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
