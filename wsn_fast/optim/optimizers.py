"""Optimizers that respect the masks: AdamW and SGD that never write to the weights of finished tasks.

In the standard mode they read the ordinary gradients dW and dS. With ``one_pass=True`` a layer stores G, the gradient
of its masked weight, in the weight's ``.grad``. The optimizer then makes one pass over the parameters: it computes dW
and dS from G (Eq. 4 and 5), updates weights, scores and moments, and computes the masked weight of the next forward
pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends.updates import SGD, AdamW, AdamWState, Batch, CallKey, SGDState
from .gated_params import Group, Model, check_flags, param_groups
from .step_plan import Call, State
from .subnet_optimizer import SubnetOptimizer


class _Counts(NamedTuple):
    """The numbers of updates of all tensors of a call as one tensor, and its elements, which are in the state of the
    optimizer: so they are all raised by one operation."""

    together: Tensor
    elements: Sequence[Tensor]

    def as_few(self, steps: list[Tensor]) -> list[Tensor]:
        """``steps``, as one tensor if they are all of these numbers."""
        all_of_them = len(self.elements) == len(steps) and all(map(is_, self.elements, steps))
        return [self.together] if all_of_them else steps

    def has_none_of(self, steps: Sequence[Tensor]) -> bool:
        """Whether none of ``steps`` is among these numbers."""
        return {*map(id, self.elements)}.isdisjoint(map(id, steps))


class SubnetAdamW(SubnetOptimizer, torch.optim.Adam):
    """``torch.optim.AdamW`` for a :class:`wsn_fast.WSN`. It leaves the bits of frozen weights as they are.

    Build it after ``begin_task``. The WSN guards it at once. Param groups, LR schedulers, closures, ``state_dict`` (to
    and from torch's optimizer with the same param groups), accumulation and ``GradScaler`` work as with torch's
    optimizer. Layers that share tensors, or that are partly frozen, are trained as torch's optimizer would train them,
    under the guard.

    With ``one_pass=True``, and until it is deleted or another optimizer is guarded, the gradients of gated tensors are
    those of the *masked* tensors: ``weight.grad`` is G (in bfloat16 under bfloat16 autocast, in float32 once gradients
    accumulate), and scores have no gradient. Use :meth:`clip_grad_norm_`, because ``torch.nn.utils.clip_grad_norm_``
    would use the norm of G. The step also computes the gate of the next forward pass. That gate is used if weight,
    scores, density and dtype have not changed until then. Changes through ``.data`` or NumPy cannot be seen: after such
    a change the next training step, and only that one, may still use the old mask. A copy of the optimizer is in the
    standard mode.

    Warning: with ``one_pass=True`` a loss must not read gated tensors or scores outside their layers, as a penalty on
    weights does; it may read ``layer.masked(name, dtype)``. The step refuses a gradient of the scores, and one of the
    weights that did not come through their layer. The latter is not seen where several processes train, where a layer
    is used several times in one backward pass, where a weight has hooks, and where ``torch.compile`` has compiled the
    whole WSN.

    Args:
        wsn: the model, with a task in progress.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``, but ``weight_decay`` is 0 by default. ``lr`` may be a
            tensor, for CUDA graphs.
        decoupled: False adds the weight decay to the gradient, as ``torch.optim.Adam`` does.
        score_weight_decay: the weight decay of the scores. They have a param group of their own if it differs from
            ``weight_decay``.
        one_pass: whether the step computes the gradients of Eq. 4 and 5 itself, in one pass over the parameters.
        amsgrad, maximize: must be False.

    Raises:
        TypeError: ``wsn`` is not a WSN, or an argument that is True or False is no bool.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.Adam.step)  # with decoupled weight decay it is torch's AdamW
    _counts: Mapping[CallKey, _Counts] = MappingProxyType({})

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
        decoupled = ops.check_bool("decoupled", decoupled)
        check_flags(amsgrad=amsgrad, maximize=maximize)
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self._attach(wsn, one_pass)

    def _update(self, call: Call, batch: Batch) -> None:
        steps = [step for update in call.updates for step in update.state[4:]]  # type: ignore[index]
        counts = self._counts[call.key].as_few(steps)
        torch._foreach_add_(counts, 1)
        try:
            ops.adamw_step(batch, call.each(_adamw_settings), call.key.backend)
        except BaseException:
            torch._foreach_add_(counts, -1)
            raise

    def _states_of(self, call: Call) -> list[State]:
        params = [param for member in call.members for param in (member.param, member.score)]
        means = [self._means(param) for param in params]
        steps: list[Tensor] = [self.state[param]["step"] for param in params]
        known = self._counts.get(call.key)
        # Numbers that are together stay where they are, because a CUDA graph may raise them.
        if known is None or known.has_none_of(steps):
            together = torch.stack([step.float() for step in steps])
            steps = list(together.unbind())
            self._counts = {**self._counts, call.key: _Counts(together, steps)}
            for param, step in zip(params, steps, strict=True):
                self.state[param]["step"] = step
        halves = (zip(part[::2], part[1::2], strict=True) for part in (means, steps))
        return [AdamWState(*weight, *scores, *counts) for (weight, scores), counts in zip(*halves, strict=True)]

    def _means(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """The running means of a parameter."""
        state = self.state[param]
        if not state:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            means = torch.zeros_like(param), torch.zeros_like(param)
            state.update(step=step, exp_avg=means[0], exp_avg_sq=means[1])  # all or nothing: memory may be short
        return state["exp_avg"], state["exp_avg_sq"]


def _adamw_settings(group: Group) -> AdamW:
    beta1, beta2 = group["betas"]
    return AdamW(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["decoupled_weight_decay"])


class SubnetSGD(SubnetOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` for a :class:`wsn_fast.WSN`; see :class:`SubnetAdamW`.

    Args:
        wsn: the model, with a task in progress.
        lr, momentum, dampening, weight_decay, nesterov: the same as in ``torch.optim.SGD``.
        score_weight_decay, one_pass, maximize: see :class:`SubnetAdamW`.

    Raises:
        TypeError: ``wsn`` is not a WSN, or an argument that is True or False is no bool.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.SGD.step)
    _new: Sequence[Tensor] = ()  # the momentum buffers that have no value yet

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
        nesterov = ops.check_bool("nesterov", nesterov)
        check_flags(maximize=maximize)
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self._attach(wsn, one_pass)

    def _update(self, call: Call, batch: Batch) -> None:
        def settings(group: Group, first: bool = False) -> SGD:
            momentum, dampening = group["momentum"], group["dampening"]
            return SGD(group["lr"], momentum, dampening, group["weight_decay"], group["nesterov"], first)

        each, new = call.each(settings), {*map(id, self._new)}
        for i, update in enumerate(call.updates) if new else ():
            pair = zip(each[i], update.state or (), strict=True)
            each[i] = tuple(s._replace(first=s.momentum != 0 and id(buffer) in new) for s, buffer in pair)
        ops.sgd_step(batch, each, call.key.backend)
        if new:
            new -= {id(buffer) for update in call.updates for buffer in update.state or ()}
            self._new = [buffer for buffer in self._new if id(buffer) in new]

    def _states_of(self, call: Call) -> list[State]:
        return [
            SGDState(self._momentum(one.param, one.group), self._momentum(one.score, one.score_group))
            for one in call.members
        ]

    def _momentum(self, param: Tensor, group: Group) -> Tensor | None:
        """The momentum buffer of a parameter; None without momentum."""
        if group["momentum"] == 0:
            return None
        state = self.state[param]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(param)
            self._new = [*self._new, state["momentum_buffer"]]
        buffer: Tensor = state["momentum_buffer"]
        return buffer
