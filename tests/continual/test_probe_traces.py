"""A probe leaves no trace in what the model writes itself: caches of merged weights, and counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, UnmaskedReadError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Merges(nn.Module):
    """Merges its weights when evaluation begins, unless they are merged, and forgets that in training."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.enc, self.mid, self.masked = FastSubnetLinear(8, 8), FastSubnetLinear(8, 8), masked
        self.heads = TaskHeads(8, 3)
        self.merged: Tensor | None = None

    def _weight(self, layer: FastSubnetLinear) -> Tensor:
        weight = layer.masked("weight", torch.float32) if self.masked else layer.weight
        assert weight is not None
        return weight.detach()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode:
            self.merged = None
        elif self.merged is None:
            self.merged = self._weight(self.mid) @ self._weight(self.enc)
        return self

    def forward(self, x: Tensor) -> Any:
        out = self.mid(self.enc(x)) if self.merged is None else x @ self.merged.t()
        return self.heads(out)


class MergesHeads(Merges):
    """Merges with the bias of every head, which is what is poisoned last."""

    def _weight(self, layer: FastSubnetLinear) -> Tensor:
        return super()._weight(layer) + sum(float(self.heads.head(task).bias.sum()) for task in self.heads.tasks)


def finished(model: nn.Module, **owners: Any) -> WSN:
    wsn = WSN(model, **owners)
    for task in (0, 1):
        wsn.begin_task(task)
        wsn.end_task()
    return wsn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [Merges, MergesHeads])
def test_weights_that_are_merged_once_are_found_and_merged_again(kind: type[Merges], training: bool) -> None:
    wsn = finished(kind(masked=False)).train()
    wsn.train(training)
    wsn.use_task(0)
    with pytest.raises(UnmaskedReadError):
        wsn.verify(probe=X)
    with torch.no_grad():
        assert wsn.eval()(X).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_masked_weights_may_be_merged(training: bool) -> None:
    wsn = finished(Merges(masked=True)).train()
    with wsn.use_task(0):
        wsn.train().eval()
        with torch.no_grad():
            before = wsn(X)
        wsn.train(training).verify(probe=X)
        with torch.no_grad():
            assert torch.equal(wsn.eval()(X), before)


class Counts(nn.Module):
    """Counts its calls, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize("owner", ["per_task", "shared"])
def test_a_counter_stays_what_it_was(owner: str) -> None:
    wsn = finished(nn.Sequential(Counts(), FastSubnetLinear(8, 8), TaskHeads(8, 3)), **{owner: "0.*"})
    wsn.use_task(0)
    before = wsn.model[0].calls.clone()
    wsn.verify(probe=X)
    assert torch.equal(wsn.model[0].calls, before)


def test_a_counter_in_the_head_of_the_task_stays_what_it_was() -> None:
    wsn = WSN(nn.Sequential(FastSubnetLinear(8, 8), TaskHeads(8, 3)))
    wsn.begin_task(0)
    head = wsn.model[1].head(0)
    head.register_buffer("calls", torch.zeros(()))
    head.register_forward_hook(lambda module, *_: module.calls.add_(1))
    wsn.end_task(probe=X)
    assert head.calls == 0


def test_a_weight_with_two_masks_may_be_read_through_both() -> None:
    first, second = FastSubnetLinear(8, 8), FastSubnetLinear(8, 8)
    second.weight = first.weight
    wsn = WSN(nn.Sequential(first, second, TaskHeads(8, 3)))
    wsn.begin_task(0)
    assert not torch.equal(first.masks_of_scores()["weight"], second.masks_of_scores()["weight"])
    wsn.end_task(probe=X)
    wsn.verify(probe=X)
