"""Optimizers that know the masks: one pass over weights and scores instead of three.

A layer in the one-pass mode hands over G, the gradient of its masked weight, as the weight's ``.grad``. The optimizer
forms ``dW`` and ``dS`` from it (Eq. 4 and 5) in registers while it updates both, and does not store to what finished
tasks use: no gradient is written, and nothing has to be saved and put back.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import ops
from .backends.torch import SGD, AdamW
from .subnet import Gated, SubnetLayer

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str]


@runtime_checkable
class Model(Protocol):
    """What the optimizers ask of :class:`wsn_fast.WSN`."""

    def parameters(self) -> Iterable[Tensor]:
        """All parameters."""

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers by name."""

    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep what finished tasks use."""


class _Pair(NamedTuple):
    """A gated tensor with its layer, and the param groups of the tensor and of its scores."""

    layer: SubnetLayer
    gate: Gated
    group: dict[str, Any]
    score_group: dict[str, Any]

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, str]:
        """G, W, S, the threshold of the last forward, the union and the rule, as the primitives take them."""
        gate = self.gate
        tau = self.layer.last_tau.get(gate.name)
        if tau is None:
            raise RuntimeError(
                f"a {gate.name} has a gradient and its layer was not called since the last step: some module reads it "
                "past its mask. Exclude that layer from the conversion, or let the module call it."
            )
        assert gate.param.grad is not None
        return gate.param.grad, gate.param, gate.score, tau, gate.union, self.layer.rule


class _OnePass(torch.optim.Optimizer):
    """What both optimizers share; comes before torch's optimizer among the bases."""

    TORCH: type[torch.optim.Optimizer]

    _layers: Sequence[SubnetLayer] = ()
    _gated: frozenset[int] = frozenset()

    def _attach(self, wsn: Model) -> None:
        self._step_supports_amp_scaling = False  # GradScaler is to unscale G as it unscales any gradient
        wsn.guard(self)  # which asks what to claim

    def claim(self, layers: Sequence[SubnetLayer]) -> Sequence[SubnetLayer]:
        """Those of the layers whose raw gradients this optimizer takes from now on, beside those it has already: all of
        whose tensors and scores it holds and trains, in one dtype, and none shared with another layer. It treats
        others as torch's optimizer would."""
        own = {id(param) for group in self.param_groups for param in group["params"]}
        uses = Counter(id(t) for layer in layers for gate in layer.gated() for t in (gate.param, gate.score))

        def can_take(gate: Gated) -> bool:
            tensors = (gate.param, gate.score)
            mine = all(id(t) in own and uses[id(t)] == 1 and t.requires_grad for t in tensors)
            return mine and gate.param.dtype is gate.score.dtype

        taken = [layer for layer in layers if all(map(can_take, layer.gated()))]
        self._layers = [*(one for one in self._layers if not any(one is other for other in layers)), *taken]
        return taken

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """What torch's own step works on: all but what is updated in one pass."""
        rest = [p for p in group["params"] if id(p) not in self._gated]
        return super()._init_group({**group, "params": rest}, *lists)  # type: ignore[misc]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient.

        Args:
            closure: evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gated tensor has a gradient that did not come through its layer.
            ValueError: a param group asks for ``amsgrad`` or ``maximize``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = list(self._pairs())
        operands = [pair.operands() for pair in pairs]  # all of them before anything changes
        self._gated = frozenset(id(t) for pair in pairs for t in (pair.gate.param, pair.gate.score))
        # Unwrapped: the wrappers of torch's step would call this optimizer's hooks a second time.
        inspect.unwrap(self.TORCH.step)(self)
        for pair, given in zip(pairs, operands, strict=True):
            self._step_pair(pair, given)
            del pair.layer.last_tau[pair.gate.name]
        return loss

    def _pairs(self) -> Iterator[_Pair]:
        """The gated tensors with a raw gradient."""
        group_of = {id(param): group for group in self.param_groups for param in group["params"]}
        for layer in self._layers:
            if layer.raw_owner is self and layer.one_pass:
                for gate in layer.gated():
                    if gate.param.grad is not None:
                        yield _Pair(layer, gate, group_of[id(gate.param)], group_of[id(gate.score)])

    def _step_pair(self, pair: _Pair, operands: Operands) -> None:
        raise NotImplementedError


def _groups(wsn: object, weight_decay: float, score_weight_decay: object) -> list[dict[str, Any]]:
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


def _check_group(group: dict[str, Any]) -> dict[str, Any]:
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} must be False: the one-pass optimizers have no {name}")
    return group


class SubnetAdamW(_OnePass, torch.optim.Adam):
    """``torch.optim.AdamW`` for a :class:`wsn_fast.WSN`, in one pass over weights and scores.

    The gradients of gated tensors are those of the *masked* tensors while this optimizer is in use: ``weight.grad`` is
    G, and the scores have none. A norm of G is not that of dW and dS, so ``clip_grad_norm_`` does not mean what it
    says. Accumulation over several backward passes and ``GradScaler`` work as ever. Build it after ``begin_task``, as
    any optimizer. Layers that share tensors, or that are frozen in part, are trained as torch's optimizer would.

    Args:
        wsn: the model, with a task in progress. It guards this optimizer at once.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``.
        decoupled: False couples weight decay with the gradient, as ``torch.optim.Adam`` does.
        score_weight_decay: weight decay of the scores, which have a param group of their own if it is another.

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
        params = _groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self._attach(wsn)

    def _step_pair(self, pair: _Pair, operands: Operands) -> None:
        gate = pair.gate
        ops.adamw_step(
            *operands,
            self._moments(gate.param),
            self._moments(gate.score),
            self._settings(pair.group, gate.param),
            self._settings(pair.score_group, gate.score),
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

    def _settings(self, group: dict[str, Any], param: Tensor) -> AdamW:
        beta1, beta2 = _check_group(group)["betas"]
        return AdamW(
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            self.state[param]["step"],
            group["decoupled_weight_decay"],
        )


class SubnetSGD(_OnePass, torch.optim.SGD):
    """``torch.optim.SGD`` for a :class:`wsn_fast.WSN`, in one pass over weights and scores; see :class:`SubnetAdamW`.

    Args:
        wsn: as there.
        lr, momentum, dampening, weight_decay, nesterov: as of ``torch.optim.SGD``.
        score_weight_decay: weight decay of the scores, which have a param group of their own if it is another.

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
        params = _groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, fused=True)
        self._attach(wsn)

    def _step_pair(self, pair: _Pair, operands: Operands) -> None:
        gate = pair.gate
        weight_buffer, for_weight = self._prepare(pair.group, gate.param)
        score_buffer, for_scores = self._prepare(pair.score_group, gate.score)
        ops.sgd_step(*operands, weight_buffer, score_buffer, for_weight, for_scores, pair.layer.backend)

    def _prepare(self, group: dict[str, Any], param: Tensor) -> tuple[Tensor | None, SGD]:
        """The momentum buffer of a parameter, None without momentum, and the settings of its next update."""
        state, momentum = self.state[param], _check_group(group)["momentum"]
        first = momentum != 0 and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(param)
        settings = SGD(group["lr"], momentum, group["dampening"], group["weight_decay"], group["nesterov"], first)
        return (state["momentum_buffer"] if momentum != 0 else None), settings
