"""The guard: any ``torch.optim`` optimizer, made to keep frozen values to the bit.

Zeroing gradients is not enough: weight decay, and momentum from an earlier task, move weights whose gradient is zero.
The guard copies what is frozen before ``step`` and puts it back after, whatever the optimizer did in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import ops
from .subnet import Gated, SubnetLayer


class Frozen(NamedTuple):
    """A parameter that must not change: where its packed ``union`` has a bit, or everywhere (None)."""

    param: Tensor
    union: Tensor | None


class Guarded(Protocol):
    """What a guard asks of WSN at each step."""

    def gated(self) -> Iterable[tuple[str, Gated]]:
        """The gated tensors by name."""

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers by name."""

    def fixed(self) -> Iterable[Tensor]:
        """The parameters that must not change at all."""

    def check_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ``RuntimeError`` if a step of ``optimizer`` now would be a mistake."""


@runtime_checkable
class KnowsMasks(Protocol):
    """An optimizer that does not store to frozen weights (:mod:`wsn_fast.optim`)."""

    one_pass: bool
    """Whether it takes raw gradients."""

    def claim(self, layers: Sequence[SubnetLayer]) -> Sequence[SubnetLayer]:
        """Those of the layers that it will update itself from now on."""

    def protects(self, closure: bool) -> set[int]:
        """The ids of the parameters that a step would update itself, with the gradients of now or those of a
        closure."""


class OptimizerGuard:
    """Step hooks of one optimizer that keep what ``wsn`` says is frozen."""

    def __init__(self, optimizer: torch.optim.Optimizer, wsn: Guarded) -> None:
        self._wsn = wsn
        self._optimizer = weakref.ref(optimizer)
        self._saved: list[tuple[Frozen, Tensor]] = []
        self._knows_masks = isinstance(optimizer, KnowsMasks)
        self.claim()
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it guards this optimizer."""
        return self._optimizer() is optimizer

    def claim(self) -> None:
        """The layers that the optimizer holds follow it: they hand raw gradients to an optimizer that can take them,
        and finished ones to any other. Gradients of the other kind go."""
        optimizer = self._optimizer()
        assert optimizer is not None
        own, layers = _params_of(optimizer), list(self._wsn.subnet_layers().values())
        taken: set[int] = set()
        if self._knows_masks:
            claimed = optimizer.claim(layers)  # type: ignore[attr-defined]
            taken = {id(layer) for layer in claimed if optimizer.one_pass}  # type: ignore[attr-defined]
        for layer in layers:
            if id(layer.weight) in own:
                layer.raw_owner = optimizer if id(layer) in taken else None

    def holds(self, params: Iterable[Tensor]) -> bool:
        """Whether the optimizer is alive and has one of ``params``."""
        optimizer = self._optimizer()
        return optimizer is not None and not _params_of(optimizer).isdisjoint(map(id, params))

    @torch.no_grad()
    def settle(self) -> None:
        """Put back what is saved: after a step, after one that an exception cut short, or in the midst of one, whose
        closure may look at another task. It stays saved until the step is over."""
        for frozen, saved in self._saved:
            if frozen.union is None:
                frozen.param.copy_(saved)
            else:
                ops.restore_frozen_(frozen.param, saved, frozen.union)

    def forget(self) -> None:
        """Put back nothing any more: the step is over, or other values are about to be loaded."""
        self._saved = []

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.settle()
        self._wsn.check_step(optimizer)
        own = _params_of(optimizer)
        # Without a gradient torch's optimizers leave a parameter alone; a closure may still give it one.
        closure = next((a for a in (*args[1:], kwargs.get("closure")) if callable(a)), None)
        frozen = [Frozen(p, None) for p in self._wsn.fixed() if id(p) in own and (p.grad is not None or closure)]
        self._check_raw(optimizer, own)
        rest = own - optimizer.protects(closure is not None) if self._knows_masks else own  # type: ignore[attr-defined]
        for name, gate in self._wsn.gated() if rest else ():
            if id(gate.param) in rest:
                _check_not_bypassed(name, gate, own)
                if gate.union is not None:
                    frozen.append(Frozen(gate.param, gate.union))
        self._saved = [(f, f.param.detach().clone()) for f in frozen]

    def _check_raw(self, optimizer: torch.optim.Optimizer, own: set[int]) -> None:
        """Raw gradients are for the optimizer that owns them."""
        for name, layer in self._wsn.subnet_layers().items():
            mine = layer.raw_owner is optimizer or id(layer.weight) not in own
            if not mine and layer.one_pass and layer.weight.grad is not None:
                raise RuntimeError(
                    f"the gradient of {name}.weight is meant for the optimizer that was guarded last: a one-pass "
                    "optimizer and another cannot take turns at a layer. Guard this one again, before the forward"
                )

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._knows_masks:  # torch's fused ones change parameters without telling autograd
            increment_version([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        self.settle()
        self.forget()


def _params_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _check_not_bypassed(name: str, gate: Gated, own: set[int]) -> None:
    """A gated tensor and its scores get their gradients together, or something reads the tensor past its mask: then
    later tasks would change what earlier ones compute, and no fingerprint would show it."""
    if gate.param.grad is not None and gate.score.requires_grad and gate.score.grad is None and id(gate.score) in own:
        raise RuntimeError(
            f"{name} has a gradient and its scores have none: some module reads it without calling its layer, so the "
            "mask is not applied there. Exclude that layer from the conversion, or let the module call it."
        )


def check_guardable(optimizer: object, params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer, if a guard can keep the promise for it.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``, or one that evaluates the model between its own updates (LBFGS): the
            frozen values would be wrong inside its line search, where no hook reaches.
        ValueError: it holds none of ``params``.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must not be LBFGS: it moves the weights and evaluates the model several times inside one step, "
            "where frozen weights cannot be put back. Use a first-order optimizer."
        )
    if _params_of(optimizer).isdisjoint(map(id, params)):
        raise ValueError(
            "optimizer holds no parameter of this model: was it built from another one, or before .to(device)?"
        )
    return optimizer
