"""The guard: any ``torch.optim`` optimizer, made to keep frozen values to the bit.

Zeroing gradients is not enough: weight decay, and momentum from an earlier task, move weights whose gradient is zero.
The guard copies what is frozen before ``step`` and puts it back after, whatever the optimizer did in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops


class Frozen(NamedTuple):
    """A parameter that must not change: where its packed ``union`` has a bit, or everywhere (None)."""

    param: Tensor
    union: Tensor | None


class OptimizerGuard:
    """Step hooks of one optimizer. ``frozen`` answers, at each step, what is frozen by now."""

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Callable[[], Iterable[Frozen]]) -> None:
        self._frozen = frozen
        self._saved: list[tuple[Frozen, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        self._saved = [(f, f.param.detach().clone()) for f in self._frozen() if id(f.param) in own]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for frozen, saved in self._saved:
            if frozen.union is None:
                frozen.param.copy_(saved)
            else:
                ops.restore_frozen_(frozen.param, saved, frozen.union)
        self._saved = []


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
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if not any(id(param) in own for param in params):
        raise ValueError(
            "optimizer holds no parameter of this model: was it built from another one, or before .to(device)?"
        )
    return optimizer
