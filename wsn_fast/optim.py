"""Optimizers that know the masks: one pass over weights and scores instead of three.

A layer in the one-pass mode hands over G, the gradient of its masked weight, as the weight's ``.grad``. The optimizer
forms ``dW`` and ``dS`` from it (Eq. 4 and 5) in registers while it updates both, and does not store to what finished
tasks use: no gradient is written, and nothing has to be saved and put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import ops
from .backends.torch import SGD, AdamW
from .layers import Gated, SubnetLayer


class Model(Protocol):
    """What the optimizers ask of :class:`wsn_fast.WSN`."""

    def parameters(self) -> Iterable[Tensor]:
        """All parameters."""

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers by name."""

    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep what finished tasks use."""


class _Pair(NamedTuple):
    """A gated tensor with its layer."""

    layer: SubnetLayer
    gate: Gated

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str]:
        """G, W, S, the threshold of the last forward, the union and the rule, as the primitives take them."""
        gate = self.gate
        assert gate.param.grad is not None
        return gate.param.grad, gate.param, gate.score, self.layer.last_tau[gate.name], gate.union, self.layer.rule


class _OnePass(torch.optim.Optimizer):
    """What both optimizers share; comes before torch's optimizer among the bases."""

    TORCH: type[torch.optim.Optimizer]
    one_pass = True  # what the guard asks: frozen weights are safe here

    def _attach(self, wsn: Model, score_weight_decay: float) -> None:
        if not score_weight_decay >= 0:
            raise ValueError(f"score_weight_decay must not be negative, got {score_weight_decay!r}")
        self._score_weight_decay = score_weight_decay
        self._layers = list(wsn.subnet_layers().values())
        self._step_supports_amp_scaling = False  # GradScaler is to unscale G as it unscales any gradient
        wsn.guard(self)  # from here on the layers hand over G

    def _pairs(self) -> dict[int, _Pair]:
        """The gated tensors by the ids of their parameters; one that tied layers share appears once."""
        return {id(gate.param): _Pair(layer, gate) for layer in self._layers for gate in layer.gated()}

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """What torch's own step works on: all but the gated tensors and their scores."""
        rest = [p for p in group["params"] if id(p) not in self._gated]
        return super()._init_group({**group, "params": rest}, *lists)  # type: ignore[misc]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient.

        Args:
            closure: evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = self._pairs()
        self._gated = {key for pair in pairs.values() for key in (id(pair.gate.param), id(pair.gate.score))}
        # Unwrapped: the wrappers of torch's step would call this optimizer's hooks a second time.
        inspect.unwrap(self.TORCH.step)(self)
        for group, pair in self._trained(pairs):
            self._step_pair(group, pair)
        return loss

    def _trained(self, pairs: dict[int, _Pair]) -> Iterator[tuple[dict[str, Any], _Pair]]:
        """The pairs whose tensor has a gradient, each with the group of its tensor."""
        for group in self.param_groups:
            for param in group["params"]:
                pair = pairs.get(id(param))
                if pair is not None and param.grad is not None:
                    yield group, pair

    def _step_pair(self, group: dict[str, Any], pair: _Pair) -> None:
        raise NotImplementedError


class SubnetAdamW(_OnePass, torch.optim.Adam):
    """``torch.optim.AdamW`` for a :class:`wsn_fast.WSN`, in one pass over weights and scores.

    The gradients of gated tensors are those of the *masked* tensors while this optimizer is in use: ``weight.grad`` is
    G, and the scores have none. A norm of G is not that of dW and dS, so ``clip_grad_norm_`` does not mean what it
    says. Accumulation over several backward passes and ``GradScaler`` work as ever. Build it after ``begin_task``, as
    any optimizer.

    Args:
        wsn: the model, with a task in progress. It guards this optimizer at once.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``.
        decoupled: False couples weight decay with the gradient, as ``torch.optim.Adam`` does.
        score_weight_decay: weight decay of the scores.

    Raises:
        ValueError: a setting is out of range.
    """

    TORCH = torch.optim.Adam  # whose weight decay may be decoupled: then it is torch's AdamW

    def __init__(
        self,
        wsn: Model,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        score_weight_decay: float = 0.0,
    ) -> None:
        params = [p for p in wsn.parameters() if p.requires_grad]
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self._attach(wsn, score_weight_decay)

    def _step_pair(self, group: dict[str, Any], pair: _Pair) -> None:
        gate = pair.gate
        ops.adamw_step(
            *pair.operands(),
            self._moments(gate.param),
            self._moments(gate.score),
            self._settings(group, gate.param, group["weight_decay"]),
            self._settings(group, gate.score, self._score_weight_decay),
            pair.layer.backend,
        )

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """The running means of a parameter, which begins its next update."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        return state["exp_avg"], state["exp_avg_sq"]

    def _settings(self, group: dict[str, Any], param: Tensor, decay: float) -> AdamW:
        beta1, beta2 = group["betas"]
        return AdamW(
            group["lr"], beta1, beta2, group["eps"], decay, self.state[param]["step"], group["decoupled_weight_decay"]
        )


class SubnetSGD(_OnePass, torch.optim.SGD):
    """``torch.optim.SGD`` for a :class:`wsn_fast.WSN`, in one pass over weights and scores; see :class:`SubnetAdamW`.

    Args:
        wsn: as there.
        lr, momentum, dampening, weight_decay, nesterov: as of ``torch.optim.SGD``.
        score_weight_decay: weight decay of the scores.

    Raises:
        ValueError: a setting is out of range.
    """

    TORCH = torch.optim.SGD

    def __init__(
        self,
        wsn: Model,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        score_weight_decay: float = 0.0,
    ) -> None:
        params = [p for p in wsn.parameters() if p.requires_grad]
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, fused=True)
        self._attach(wsn, score_weight_decay)

    def _step_pair(self, group: dict[str, Any], pair: _Pair) -> None:
        gate = pair.gate
        weight_buffer, for_weight = self._prepare(group, gate.param, group["weight_decay"])
        score_buffer, for_scores = self._prepare(group, gate.score, self._score_weight_decay)
        ops.sgd_step(*pair.operands(), weight_buffer, score_buffer, for_weight, for_scores, pair.layer.backend)

    def _prepare(self, group: dict[str, Any], param: Tensor, decay: float) -> tuple[Tensor | None, SGD]:
        """The momentum buffer of a parameter, None without momentum, and the settings of its next update."""
        state, momentum = self.state[param], group["momentum"]
        first = momentum != 0 and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(param)
        settings = SGD(group["lr"], momentum, group["dampening"], decay, group["nesterov"], first)
        return (state["momentum_buffer"] if momentum != 0 else None), settings
