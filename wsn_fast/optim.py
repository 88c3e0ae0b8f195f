"""Optimizers that know the masks: AdamW and SGD which never store to what finished tasks use.

Their gradients are those of any PyTorch model, dW and dS, unless ``one_pass=True``: then a layer hands over G, the
gradient of its masked weight, as the weight's ``.grad``, and one pass over the parameters forms dW and dS from it (Eq.
4 and 5), updates weights, scores and moments, and leaves the masked weight of the next forward pass behind.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import ops
from .backends.updates import SGD, AdamW, AdamWState, Plan, SGDState, Update
from .pairs import Alike, Model, Pair, alike, check_group, checked_pass, param_groups
from .subnet import Gated, Ready, SubnetLayer


class _SubnetOptimizer(torch.optim.Optimizer):
    """What both optimizers share; comes before torch's optimizer among the bases."""

    _torch_step: Callable[..., Any]
    """That of torch's optimizer, unwrapped: the wrappers would call this optimizer's hooks a second time."""

    one_pass: bool = False
    _layers: Sequence[SubnetLayer] = ()
    _gated: frozenset[int] = frozenset()
    _promised: frozenset[int] = frozenset()
    _plans: dict[Alike, Plan] | None = None
    _scale: Tensor | None = None
    _clipped: Sequence[tuple[Pair, Tensor, int]] = ()

    def _attach(self, wsn: Model, one_pass: bool) -> None:
        self.one_pass = one_pass
        self._step_supports_amp_scaling = False  # GradScaler is to unscale G as it unscales any gradient
        wsn.guard(self)  # which asks what to claim

    def claim(self, layers: Sequence[SubnetLayer]) -> Sequence[SubnetLayer]:
        """Those of the layers that this optimizer updates itself from now on, beside those it has already: all of
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

    def protects(self, closure: bool) -> set[int]:
        """The ids of the gated tensors and scores that a step updates without storing to frozen weights; ``closure``:
        whether one is to come, which decides what has a gradient."""
        ids: set[int] = set()
        for layer in self._layers:
            if self._takes_raw(layer) if self.one_pass else not closure:
                for gate in layer.gated():
                    if self.one_pass or (gate.param.grad is not None and gate.score.grad is not None):
                        ids |= {id(gate.param), id(gate.score)}
        self._promised = frozenset(ids)
        return ids

    def _takes_raw(self, layer: SubnetLayer) -> bool:
        return layer.raw_owner is self and layer.one_pass

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        """What torch's own step works on: all but what is updated here."""
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
            RuntimeError: a gated tensor has a raw gradient that did not come through its layer, or gradients changed
                after :meth:`clip_grad_norm_`.
            ValueError: a param group asks for ``amsgrad`` or ``maximize``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All that may fail, before anything changes.
        pairs = list(self._pairs())
        scale = self._settle_clipping()
        for group in self.param_groups:
            check_group(group)
        updates = [pair.update(scale, pair.next()) for pair in pairs]
        self._gated = frozenset(id(t) for update in updates for t in (update.weight, update.scores))
        self._check_promised()
        for kind, indices in alike(pairs).items():
            self._update([pairs[i] for i in indices], [updates[i] for i in indices], kind.backend, self._plan(kind))
        self._torch_step()
        increment_version(self._rest())  # of which fused optimizers do not tell autograd
        self._forget_clipping()
        for pair, update in zip(pairs, updates, strict=True):
            if update.next is not None:
                layer, (name, param, score, *_) = pair.layer, pair.gate
                del layer.last_pass[name]
                layer.ready[name] = Ready(
                    update.next.masked, update.next.tau, update.next.window, layer.stamp(param, score)
                )
        return loss

    def _check_promised(self) -> None:
        """Whatever the guard left to this step has to be updated here, or not at all."""
        promised, self._promised = self._promised, frozenset()
        if any(id(p) in promised for p in self._rest()):
            raise RuntimeError(
                "a closure, or a hook before the step, changed which gated tensors have gradients, or to whom they "
                "belong: do that before the step"
            )

    def _rest(self) -> list[Tensor]:
        """What torch's step updates."""
        trained = (p for group in self.param_groups for p in group["params"] if p.grad is not None)
        return [p for p in trained if id(p) not in self._gated]

    def _pairs(self) -> Iterator[Pair]:
        """The gated tensors with gradients that are updated here."""
        group_of = {id(param): group for group in self.param_groups for param in group["params"]}
        for layer in self._layers:
            raw = self._takes_raw(layer)
            if raw is not self.one_pass:
                continue
            for gate in layer.gated():
                if gate.param.grad is None or not (raw or gate.score.grad is not None):
                    continue
                if id(gate.param) not in group_of or id(gate.score) not in group_of:
                    raise RuntimeError(
                        f"a {gate.name} or its scores are not what this optimizer holds: parameters were replaced "
                        "after it was built. Build it again"
                    )
                last = checked_pass(layer, gate) if raw else None
                yield Pair(layer, gate, group_of[id(gate.param)], group_of[id(gate.score)], last)

    def _update(self, pairs: Sequence[Pair], updates: Sequence[Update], backend: str | None, plan: Plan) -> None:
        raise NotImplementedError

    def _plan(self, kind: Alike) -> Plan:
        if self._plans is None:
            self._plans = {}
        return self._plans.setdefault(kind, {})

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the 2-norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does.

        In the one-pass mode that function would take the norm of G; this one takes that of dW and dS, for which it
        reads gradients, weights and scores once more, and leaves the scaling of gated tensors to the step. Call it
        after the last backward pass (and ``GradScaler.unscale_``) before the step.

        Args:
            max_norm: the largest norm to allow, positive.
            error_if_nonfinite: refuse a norm that is not finite.

        Returns:
            The norm before clipping, 0-d.

        Raises:
            ValueError: ``max_norm`` is not a positive number.
            RuntimeError: the norm is not finite and ``error_if_nonfinite`` is True.
        """
        if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0:
            raise ValueError(f"max_norm must be a positive number, got {max_norm!r}")
        before = self._settle_clipping()
        pairs = list(self._pairs()) if self.one_pass else []
        gated = {id(pair.gate.param) for pair in pairs}
        rest = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None and id(p) not in gated
        ]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)) for grad in rest]
        for kind, indices in alike(pairs).items():
            updates = [pairs[i].update(before, None) for i in indices]
            norms += ops.gradient_squares(updates, kind.backend, self._plan(kind)).sqrt().unbind()
        if not norms:
            return torch.tensor(0.0)
        device, dtype = norms[0].device, max((n.dtype for n in norms), key=lambda d: d.itemsize)
        norm = torch.linalg.vector_norm(torch.stack([n.to(device, dtype) for n in norms]))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the norm of the gradients is {norm.item()}, so it cannot be clipped")
        scale = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
        for grad in rest:
            grad.mul_(scale.to(grad.device))
        if pairs:
            self._scale = scale if before is None else before * scale
            grads = [(pair, pair.gate.param.grad) for pair in pairs]
            self._clipped = [(pair, grad, grad._version) for pair, grad in grads if grad is not None]
        return norm

    def _settle_clipping(self) -> Tensor | None:
        """The factor of the gradients at hand."""
        mine = False
        for pair, grad, version in self._clipped:
            now = pair.gate.param.grad
            replaced = now is not None and pair.layer.last_pass.get(pair.gate.name) is pair.last
            if (now is grad and grad._version != version) or (now is not grad and replaced):
                raise RuntimeError(
                    "gradients changed after clip_grad_norm_: clip after the last backward pass and unscale_"
                )
            mine |= now is grad
        return self._scale if mine else None

    def _forget_clipping(self) -> None:
        self._scale, self._clipped = None, ()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of ``torch.optim.Optimizer``, but that raw gradients become None in any case: a zero that came through no
        forward pass would be an error."""
        self._forget_clipping()
        super().zero_grad(set_to_none)
        for layer in self._layers if self.one_pass else ():
            if self._takes_raw(layer):
                for gate in layer.gated():
                    gate.param.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of ``torch.optim.Optimizer``; the state may be that of torch's optimizer of the same kind.

        Raises:
            ValueError: a param group of the state asks for ``amsgrad`` or ``maximize``.
        """
        for group in state_dict["param_groups"]:
            check_group(group)
        super().load_state_dict(state_dict)


class SubnetAdamW(_SubnetOptimizer, torch.optim.Adam):
    """``torch.optim.AdamW`` for a :class:`wsn_fast.WSN`: frozen weights are safe because nothing is stored to them.

    Build it after ``begin_task``, as any optimizer; the WSN guards it at once. Param groups, LR schedulers, closures,
    ``state_dict`` (to and from torch's optimizer with the same param groups), accumulation and ``GradScaler`` are as
    ever. Layers that share tensors, or that are frozen in part, are trained as torch's optimizer would, under the
    guard.

    With ``one_pass=True`` the gradients of gated tensors are those of the *masked* tensors while this optimizer is in
    use: ``weight.grad`` is G (in bfloat16 under bfloat16 autocast, in float32 once gradients accumulate), and the
    scores have none. ``torch.nn.utils.clip_grad_norm_`` would clip by the norm of G; use :meth:`clip_grad_norm_`. The
    gate of the next forward pass is made during the step and used if weight, scores, density and dtype are still the
    same then. Python sees every change of them but those through ``.data`` or NumPy: after such an edit the next
    training step, and only that one, may still use the mask of before. A loss may not read gated tensors or scores
    past their layers (a penalty on weights): the gradient of scores is refused, and that of weights cannot be told from
    G. A copy of the optimizer is in the standard mode.

    Args:
        wsn: the model, with a task in progress.
        lr, betas, eps, weight_decay: as of ``torch.optim.AdamW``. ``lr`` may be a tensor, for CUDA graphs.
        decoupled: False couples weight decay with the gradient, as ``torch.optim.Adam`` does.
        score_weight_decay: weight decay of the scores, which have a param group of their own if it is another.
        one_pass: one pass over the parameters instead of gradients as Eq. 4 and 5 have them.
        amsgrad, maximize: must be False.

    Raises:
        TypeError: ``wsn`` is not a WSN.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.Adam.step)  # whose weight decay may be decoupled: then it is torch's AdamW

    def __init__(
        self,
        wsn: Model,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        score_weight_decay: float = 0.0,
        one_pass: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        check_group({"amsgrad": amsgrad, "maximize": maximize})
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self._attach(wsn, one_pass)

    def _update(self, pairs: Sequence[Pair], updates: Sequence[Update], backend: str | None, plan: Plan) -> None:
        states = [AdamWState(*self._moments(u.weight), *self._moments(u.scores)) for u in updates]
        steps = [self.state[param]["step"] for u in updates for param in (u.weight, u.scores)]
        if steps[0].is_cpu:
            for step in steps:
                step += 1
        else:
            torch._foreach_add_(steps, 1)
        for_weights = [self._settings(pair.group, step) for pair, step in zip(pairs, steps[::2], strict=True)]
        for_scores = [self._settings(pair.score_group, step) for pair, step in zip(pairs, steps[1::2], strict=True)]
        try:
            ops.adamw_step(updates, states, for_weights, for_scores, backend, plan)
        except BaseException:
            for step in steps:
                step -= 1
            raise

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """The running means of a parameter."""
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state["exp_avg"], state["exp_avg_sq"]

    @staticmethod
    def _settings(group: dict[str, Any], step: Tensor) -> AdamW:
        beta1, beta2 = group["betas"]
        decoupled = group["decoupled_weight_decay"]
        return AdamW(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step, decoupled)


class SubnetSGD(_SubnetOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` for a :class:`wsn_fast.WSN`; see :class:`SubnetAdamW`.

    Args:
        wsn: as there.
        lr, momentum, dampening, weight_decay, nesterov: as of ``torch.optim.SGD``.
        score_weight_decay, one_pass, maximize: as there.

    Raises:
        TypeError: ``wsn`` is not a WSN.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.SGD.step)

    def __init__(
        self,
        wsn: Model,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        score_weight_decay: float = 0.0,
        one_pass: bool = False,
        maximize: bool = False,
    ) -> None:
        check_group({"maximize": maximize})
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self._attach(wsn, one_pass)

    def _update(self, pairs: Sequence[Pair], updates: Sequence[Update], backend: str | None, plan: Plan) -> None:
        weights = [self._prepare(pair.group, u.weight) for pair, u in zip(pairs, updates, strict=True)]
        scores = [self._prepare(pair.score_group, u.scores) for pair, u in zip(pairs, updates, strict=True)]
        states = [SGDState(w, s) for (w, _), (s, _) in zip(weights, scores, strict=True)]
        ops.sgd_step(updates, states, [settings for _, settings in weights], [s for _, s in scores], backend, plan)

    def _prepare(self, group: dict[str, Any], param: Tensor) -> tuple[Tensor | None, SGD]:
        """The momentum buffer of a parameter, None without momentum, and the settings of its next update."""
        state, momentum = self.state[param], group["momentum"]
        first = momentum != 0 and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.zeros_like(param)
        settings = SGD(group["lr"], momentum, group["dampening"], group["weight_decay"], group["nesterov"], first)
        return (state["momentum_buffer"] if momentum != 0 else None), settings
