"""A stand-in for a CUDA graph: it replays Python instead of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wsn_fast import WSN


class Replayed:
    """A graph that records nothing and computes everything again, into the tensors of the recording."""

    recorded: list[Replayed]

    def __init__(self, model: WSN, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Leaves every value as it was, as a capture does."""
        layers = self.model.subnet_layers().values()
        ready = [
            t for layer in layers for r in layer.gate_state.ready.values() for t in (r.masked, r.next.tau, r.window)
        ]
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        tensors = [*self.model.parameters(), *states, *ready]
        kept = [t.detach().clone() for t in tensors]
        self.work, self.loss = work, work()
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        for layer in layers:
            layer.gate_state.restamp(layer)
        return self.loss

    def replay(self) -> None:
        self.loss.copy_(self.work())
