"""What the subnet optimizers work on: a gated tensor with its scores, its gradients, and where the next gate goes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import ops
from .backends.updates import WINDOW, Next, Update
from .subnet import Gated, RawPass, SubnetLayer


@runtime_checkable
class Model(Protocol):
    """What the optimizers ask of :class:`wsn_fast.WSN`."""

    def parameters(self) -> Iterable[Tensor]:
        """All parameters."""

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers by name."""

    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep what finished tasks use."""


Group = dict[str, Any]


class Pair(NamedTuple):
    """A gated tensor with its layer, the param groups of the tensor and of its scores, and the forward pass whose raw
    gradient it has, None for gradients of the usual kind."""

    layer: SubnetLayer
    gate: Gated
    group: Group
    score_group: Group
    last: RawPass | None

    def update(self, scale: Tensor | None, following: Next | None) -> Update:
        """The operands of the update."""
        _, param, score, _, union = self.gate
        assert param.grad is not None
        if self.last is not None:
            return Update(param.grad, None, param, score, self.last.tau, union, self.layer.rule, scale, following)
        return Update(param.grad, score.grad, param, score, None, union, self.layer.rule, scale, following)

    def next(self) -> Next | None:
        """Where the gate of the next forward pass goes: where the last one is, if it fits."""
        if self.last is None:
            return None
        (name, param, score, _, _), dtype = self.gate, self.last.dtype
        ready = self.layer.ready.get(name)
        if ready is None or ready.tau.dtype is not score.dtype or ready.tau.device != score.device:
            tau, window = score.new_empty(()), torch.zeros(WINDOW, dtype=torch.int64, device=score.device)
        else:
            tau, window = ready.tau, ready.window
        masked = None if ready is None else ready.masked
        if masked is None or (masked.shape, masked.dtype, masked.device) != (param.shape, dtype, param.device):
            masked = torch.empty(param.shape, dtype=dtype, device=param.device)
        return Next(masked, tau, ops.threshold_rank(param.numel(), self.layer.gate_density, self.layer.rule), window)


def checked_pass(layer: SubnetLayer, gate: Gated) -> RawPass:
    """The forward pass that a raw gradient came from.

    Raises:
        RuntimeError: there is none, or what the gradient is to be combined with has changed since.
    """
    last = layer.last_pass.get(gate.name)
    if last is None:
        raise RuntimeError(
            f"a {gate.name} has a gradient and its layer was not called since the last step: some module reads it past "
            "its mask (exclude that layer from the conversion, or let the module call it), or this is a second step "
            "with one gradient"
        )
    if last.stamp and last.stamp[:-1] != layer.stamp(gate.param, gate.score)[:-1]:  # whatever the next density
        raise RuntimeError(
            f"a {gate.name}, its scores or its rule changed between the forward pass and the step, which forms "
            "the gradients in the one-pass mode: change them before the forward pass, or use one_pass=False"
        )
    if gate.score.grad is not None:
        raise RuntimeError(
            f"the scores of a {gate.name} have a gradient of their own, which has no place in the one-pass mode: use "
            "one_pass=False for a loss that reads scores"
        )
    return last


class Alike(NamedTuple):
    """What one call of a backend can work on."""

    device: torch.device
    dtype: torch.dtype
    backend: str | None


def alike(pairs: Sequence[Pair]) -> dict[Alike, list[int]]:
    """The numbers of the pairs that go into one call."""
    sets: dict[Alike, list[int]] = {}
    for i, pair in enumerate(pairs):
        param = pair.gate.param
        sets.setdefault(Alike(param.device, param.dtype, pair.layer.backend), []).append(i)
    return sets


def param_groups(wsn: object, weight_decay: float, score_weight_decay: object) -> list[dict[str, Any]]:
    """The param groups: all parameters to train, or scores apart where their weight decay is another.

    Raises:
        TypeError: ``wsn`` is not a WSN.
        ValueError: ``score_weight_decay`` is not a number of at least 0.
    """
    if not isinstance(wsn, Model):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
    number = isinstance(score_weight_decay, Real) and not isinstance(score_weight_decay, bool)
    if not number or not 0 <= float(score_weight_decay) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"score_weight_decay must be a number of at least 0, got {score_weight_decay!r}")
    trained = [p for p in wsn.parameters() if p.requires_grad]
    if score_weight_decay == weight_decay:
        return [{"params": trained}]
    scores = {id(gate.score) for layer in wsn.subnet_layers().values() for gate in layer.gated()}
    return [
        {"params": [p for p in trained if id(p) not in scores]},
        {"params": [p for p in trained if id(p) in scores], "weight_decay": score_weight_decay},
    ]


def check_group(group: Group) -> Group:
    """The param group, or ``ValueError`` if it asks for what the subnet optimizers do not have."""
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} must be False, got {group[name]!r}: the subnet optimizers have no {name}")
    return group
