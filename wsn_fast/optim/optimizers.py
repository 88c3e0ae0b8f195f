"""Optimizers that respect the masks: AdamW and SGD that never write to the weights of finished tasks.

In the standard mode they read the ordinary gradients dW and dS. With ``one_pass=True`` a layer stores G, the gradient
of its masked weight, in the weight's ``.grad``. The optimizer then makes one pass over the parameters: it computes dW
and dS from G (Eq. 4 and 5), updates weights, scores and moments, and computes the masked weight of the next forward
pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from .. import ops
from ..backends.moments import Stored
from ..backends.updates import SGD, AdamW, AdamWState, Batch, CodedAdamWState, CodedSGDState, SGDState, State
from ..nn.shards import local
from .gated_params import Group, Model, check_flags, param_groups
from .step_plan import Call
from .stored_means import check_storage, convert, local_mean, put, zeros
from .subnet_optimizer import SubnetOptimizer


class SubnetAdamW(SubnetOptimizer, torch.optim.Adam):
    """``torch.optim.AdamW`` for a :class:`wsn_fast.WSN`. It leaves the bits of frozen weights as they are.

    Build it after ``begin_task``. The WSN guards it at once. Param groups, LR schedulers, closures, ``state_dict`` (to
    and from torch's optimizer with the same param groups), accumulation and ``GradScaler`` work as with torch's
    optimizer. Layers that share tensors, or that are partly frozen, are trained as torch's optimizer would train them,
    under the guard.

    With ``one_pass=True``, and until it is deleted or another optimizer is guarded, the gradients of gated tensors are
    those of the *masked* tensors: ``weight.grad`` is G, and scores have no gradient. Under bfloat16 autocast G is in
    bfloat16, as the product leaves it, and once gradients accumulate in the dtype of ``accumulate_in``. It is in the
    dtype of the weight where the weight has hooks, where several processes train, for tensors of modules that are no
    products, and for a layer whose gate ``torch.compile`` has compiled. Use :meth:`clip_grad_norm_`, because
    ``torch.nn.utils.clip_grad_norm_`` would use the norm of G. The step also computes the gate of the next forward
    pass. That gate is used if weight, scores, density and dtype have not changed until then. Changes through ``.data``
    or NumPy cannot be seen: after such a change the next training step, and only that one, may still use the old mask.
    A copy of the optimizer is in the standard mode.

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
        accumulate_in: with ``one_pass=True``, the dtype in which G is added up where it comes in bfloat16 more than
            once before a step, from several backward passes or from several uses of a layer in one: ``"float32"`` (the
            dtype of the parameter), or ``"bfloat16"``, which takes half of the memory, and loses any term below 1/512
            of the sum so far.
        moments: how the running means of gated tensors and their scores are stored: ``"float32"`` (in the dtype of the
            parameter), ``"bfloat16"``, or ``"8bit"`` with a scale for each block (:mod:`wsn_fast.backends.moments`).
            What PyTorch's step updates, such as heads and norms, has them in the dtype of the parameter. Of a sharded
            WSN each process stores the means of its rows as if the rows were a whole tensor.
        score_moments: how those of the scores are stored, if in another way.
        amsgrad, maximize: must be False.

    Raises:
        TypeError: ``wsn`` is not a WSN, or an argument that is True or False is no bool.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.Adam.step)  # with decoupled weight decay it is torch's AdamW
    MEANS = MappingProxyType({"exp_avg": True, "exp_avg_sq": False})

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
        accumulate_in: str = "float32",
        moments: str = "float32",
        score_moments: str | None = None,
        amsgrad: bool = False,
        maximize: bool = False,
    ) -> None:
        decoupled = ops.check_bool("decoupled", decoupled)
        check_flags(amsgrad=amsgrad, maximize=maximize)
        self.storage = check_storage(moments, score_moments)
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self.attach(wsn, one_pass, accumulate_in)

    def _update(self, call: Call, batch: Batch) -> None:
        steps = [step for update in call.updates for step in update.state[4:]]  # type: ignore[index]
        counts = self._counts.few(call.key, steps)
        torch._foreach_add_(counts, 1)
        try:
            ops.adamw_step(batch, call.each(_adamw_settings), call.key.backend)
        except BaseException:
            torch._foreach_add_(counts, -1)
            raise

    def _states_of(self, call: Call) -> list[State]:
        params = [param for member in call.members for param in (member.param, member.score)]
        storages = self.storage * len(call.members)
        means = [self._means(param, storage) for param, storage in zip(params, storages, strict=True)]
        steps = self._counts.of(call.key, [self.state[param] for param in params])
        halves = (zip(part[::2], part[1::2], strict=True) for part in (means, steps))
        each = [(*weight, *scores, *counts) for (weight, scores), counts in zip(*halves, strict=True)]
        if self.storage.is_coded:
            return [CodedAdamWState(*one) for one in each]
        return [AdamWState(*(mean.values for mean in one[:4]), *one[4:]) for one in each]

    def _means(self, param: Tensor, storage: str) -> tuple[Stored, Stored]:
        """The running means of a parameter, stored in this way."""
        state = self.state[param]
        if not state:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            means = [zeros(param, storage, signed) for signed in self.MEANS.values()]
            state["step"] = step  # not before all of them are there: memory may be short
            for key, mean in zip(self.MEANS, means, strict=True):
                put(state, key, mean)
        convert(state, param, self.MEANS, storage)
        avg, avg_sq = (local_mean(state, key) for key in self.MEANS)
        assert avg is not None and avg_sq is not None
        return avg, avg_sq


def _adamw_settings(group: Group) -> AdamW:
    beta1, beta2 = group["betas"]
    return AdamW(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["decoupled_weight_decay"])


class SubnetSGD(SubnetOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` for a :class:`wsn_fast.WSN`; see :class:`SubnetAdamW`.

    Args:
        wsn: the model, with a task in progress.
        lr, momentum, dampening, weight_decay, nesterov: the same as in ``torch.optim.SGD``.
        score_weight_decay, one_pass, accumulate_in, moments, score_moments, maximize: see :class:`SubnetAdamW`. The
            running mean is the momentum buffer.

    Raises:
        TypeError: ``wsn`` is not a WSN, or an argument that is True or False is no bool.
        ValueError: a setting is out of range.
    """

    _torch_step = inspect.unwrap(torch.optim.SGD.step)
    MEANS = MappingProxyType({"momentum_buffer": True})
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
        accumulate_in: str = "float32",
        moments: str = "float32",
        score_moments: str | None = None,
        maximize: bool = False,
    ) -> None:
        nesterov = ops.check_bool("nesterov", nesterov)
        check_flags(maximize=maximize)
        self.storage = check_storage(moments, score_moments)
        params = param_groups(wsn, weight_decay, score_weight_decay)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self.attach(wsn, one_pass, accumulate_in)

    def _update(self, call: Call, batch: Batch) -> None:
        def settings(group: Group, first: bool = False) -> SGD:
            momentum, dampening = group["momentum"], group["dampening"]
            return SGD(group["lr"], momentum, dampening, group["weight_decay"], group["nesterov"], first)

        each, new = call.each(settings), {*map(id, self._new)}
        for i, update in enumerate(call.updates) if new else ():
            pair = zip(each[i], _momenta(update.state), strict=True)
            each[i] = tuple(s._replace(first=s.momentum != 0 and id(buffer) in new) for s, buffer in pair)
        # Only what is stored in fewer bytes needs the numbers of the updates.
        states = [update.state for update in call.updates] if self.storage.is_coded else []
        steps = [step for state in states if isinstance(state, CodedSGDState) for step in state[2:]]
        counts = self._counts.few(call.key, steps) if self.storage.is_coded else []
        if counts:
            torch._foreach_add_(counts, 1)
        try:
            ops.sgd_step(batch, each, call.key.backend)
        except BaseException:
            if counts:
                torch._foreach_add_(counts, -1)
            raise
        if new:
            new -= {id(buffer) for update in call.updates for buffer in _momenta(update.state)}
            self._new = [buffer for buffer in self._new if id(buffer) in new]

    def _states_of(self, call: Call) -> list[State]:
        pairs = [
            (
                self._momentum(one.param, one.group, self.storage.weights),
                self._momentum(one.score, one.score_group, self.storage.scores),
            )
            for one in call.members
        ]
        if not self.storage.is_coded:
            return [SGDState(*(buffer and buffer.values for buffer in pair)) for pair in pairs]
        states = [self.state[param] for one in call.members for param in (one.param, one.score)]
        steps = self._counts.of(call.key, states)
        return [CodedSGDState(*pair, *counts) for pair, *counts in zip(pairs, steps[::2], steps[1::2], strict=True)]

    def _momentum(self, param: Tensor, group: Group, storage: str) -> Stored | None:
        """The momentum buffer of a parameter, stored in this way; None without momentum."""
        state = self.state[param] if self.storage.is_coded or group["momentum"] != 0 else {}
        if self.storage.is_coded:
            step = state.get("step", torch.zeros((), dtype=torch.float32))
            state["step"] = step.to(param.device)
        if group["momentum"] == 0:
            return None
        if state.get("momentum_buffer") is None:
            put(state, "momentum_buffer", zeros(param, storage, True))
            self._new = [*self._new, local(state["momentum_buffer"])]
        convert(state, param, self.MEANS, storage)
        return local_mean(state, "momentum_buffer")


def _momenta(state: object) -> tuple[Tensor | None, Tensor | None]:
    """The momentum buffers of a tensor and of its scores."""
    if isinstance(state, CodedSGDState):
        first, second = (None if buffer is None else buffer.values for buffer in state[:2])
        return first, second
    assert isinstance(state, SGDState)
    return state
