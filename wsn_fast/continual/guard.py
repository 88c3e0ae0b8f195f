"""The guard: makes any first-order optimizer keep frozen values to the bit.

It is not enough to zero gradients, because weight decay and the momentum of an earlier task move weights whose gradient
is zero. The guard copies the frozen values before ``step`` and puts them back afterwards, whatever the optimizer did in
between.

If only the step of a class of ``torch.optim`` writes to the parameters, the copies are dropped after the step.
Anything else (a subclass, somebody's own optimizer, a wrapper, other hooks) may write before and after the hooks of the
guard too, and to parameters without a gradient. Then the copies are kept until the task ends, and every call into the
WSN puts the values back.

``SubnetAdamW`` and ``SubnetSGD`` protect frozen weights in their own update: on a GPU in
``kernels/optimizer_step.py``, in the native library in ``csrc/cpu/steps.cpp``, else in ``_Step`` of
:mod:`wsn_fast.backends.torch`. For them the guard only protects what they leave to torch's step (see
:meth:`KnowsMasks.protects`), and the parameters that must not change at all, such as the heads of finished tasks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..nn.gate import Gated
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.model_gates import ModelGates, in_parallel
from ..nn.refusals import check_arguments
from ..nn.task_ids import TaskId
from .frozen_values import Frozen
from .kept_values import KeptValues
from .optimizers_within import has_step_hooks, hooks_of_all_optimizers, is_optimizer, steps_alone, ways_into, within
from .parallel import Parallel
from .wrappers import check_whole

if TYPE_CHECKING:
    from .wsn import WSN


class Guarded(Protocol):
    """The part of WSN that a guard needs at each step."""

    gates: ModelGates

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

    accumulate_in: str
    """The dtype in which raw gradients in bfloat16 are added up: "float32" or "bfloat16"."""

    def claim(self, layers: Mapping[str, SubnetLayer]) -> Sequence[SubnetLayer]:
        """Return those of the named ``layers`` that the optimizer will update itself from now on."""

    def protects(self, closure: bool) -> set[int]:
        """The ids of the parameters whose frozen values the next step keeps by itself. ``closure`` tells whether this
        step will call a closure, which computes new gradients."""


class OptimizerGuard:
    """The step hooks of one optimizer. They keep everything that ``wsn`` reports as frozen. After a step they make the
    gates of the next forward pass for the layers that want them.

    Args:
        optimizer: has step hooks.
        wsn: the model.
        kept: where the copies of frozen values are kept.

    Attributes:
        wrapped: whether the optimizer is a part of another one, or contains one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wsn: Guarded, kept: KeptValues) -> None:
        self._wsn = wsn
        self._optimizer = weakref.ref(optimizer)
        self._kept = kept
        self._knows_masks = isinstance(optimizer, KnowsMasks)
        self.wrapped = False
        self._ways: tuple[Any, ...] = ()
        self._alone = False
        self._wraps = len(within(optimizer)) > 1  # then gradients are a matter of the optimizers in it
        self.claim()
        # Compiled code must not contain what the hooks find at the first step.
        optimizer.register_step_pre_hook(torch.compiler.disable(self._before))
        optimizer.register_step_post_hook(torch.compiler.disable(self._after))

    def is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is the guard of ``optimizer``."""
        return self._optimizer() is optimizer

    def claim(self) -> None:
        """Tell each layer of this optimizer whether the optimizer needs G, the gradient of the masked weight, or the
        gradients dW and dS of Eq. 4 and 5. A layer whose kind changes drops its gradients."""
        optimizer = self._optimizer()
        assert optimizer is not None
        if self._wraps:
            return
        own, layers = _params_of(optimizer), self._wsn.subnet_layers()
        taken: set[int] = set()
        in_bfloat16 = False
        if self._knows_masks:
            claimed = optimizer.claim(layers)  # type: ignore[attr-defined]
            taken = {id(layer) for layer in claimed if optimizer.one_pass}  # type: ignore[attr-defined]
            in_bfloat16 = optimizer.accumulate_in == "bfloat16"  # type: ignore[attr-defined]
        for layer in layers.values():
            if not own.isdisjoint(id(gate.param) for gate in layer.gated()):
                layer.gate_state.belongs_to(optimizer if id(layer) in taken else None, layer.gated(), in_bfloat16)

    def holds(self, params: Iterable[Tensor]) -> bool:
        """Whether the optimizer is alive and has one of ``params``."""
        optimizer = self._optimizer()
        return optimizer is not None and not _params_of(optimizer).isdisjoint(map(id, params))

    def keep_for_task(self) -> None:
        """Copy all that is frozen of this optimizer, unless only its own step writes to it."""
        optimizer = self._optimizer()
        if optimizer is not None and not self._steps_alone(optimizer):
            self._kept.keep(frozen_among(self._wsn, _params_of(optimizer)), for_task=True)

    def notice_hooks(self) -> None:
        """If hooks were registered since the last look, copy what is frozen before they run."""
        optimizer = self._optimizer()
        if optimizer is not None and ways_into(optimizer) != self._ways:
            self.keep_for_task()

    def _steps_alone(self, optimizer: torch.optim.Optimizer) -> bool:
        ways = ways_into(optimizer)
        if ways != self._ways:
            self._ways, self._alone = ways, steps_alone(optimizer)
        return self._alone and not self.wrapped

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept.ran = True
        if in_parallel():  # first, because an optimizer may hold what the shards were made from
            check_whole(("a gated tensor", tensor) for tensor in self._wsn.gates.tensors())
        self._wsn.check_step(optimizer)
        own, alone = _params_of(optimizer), self._steps_alone(optimizer)
        # Torch's optimizers do not change a parameter without a gradient, but a closure may give it one.
        closure = next((a for a in (*args[1:], kwargs.get("closure")) if callable(a)), None)
        fixed = [p for p in self._wsn.fixed() if id(p) in own and (p.grad is not None or closure or not alone)]
        frozen = [Frozen(p, None) for p in fixed]
        if not self._wraps:
            self._check_raw(optimizer, own)
        own_share: set[int] = optimizer.protects(closure is not None) if self._knows_masks else set()  # type: ignore[attr-defined]
        self._wsn.gates.promise(own_share)
        rest = own - own_share
        gated = not alone or (bool(rest) and not rest.isdisjoint(map(id, self._wsn.gates.tensors())))
        for name, gate in self._wsn.gated() if gated else ():
            trained = id(gate.param) in rest
            if trained and not self._wraps:
                _check_not_bypassed(name, gate, own)
            if gate.union is not None and (trained or (not alone and id(gate.param) in own)):
                frozen.append(Frozen(gate.param, gate.union))
        self._kept.keep(frozen, for_task=not alone)

    def _check_raw(self, optimizer: torch.optim.Optimizer, own: set[int]) -> None:
        """Raise ``RuntimeError`` if a raw gradient is meant for another optimizer."""
        for name, layer in self._wsn.subnet_layers().items():
            if layer.gate_state.owner is optimizer or not layer.one_pass:
                continue
            raw = [g.name for g in layer.gated() if id(g.param) in own and g.param.grad is not None]
            if raw:
                raise RuntimeError(
                    f"the gradient of {name}.{raw[0]} is meant for the optimizer that was guarded last. If one of two "
                    "optimizers is one-pass, they cannot simply alternate on a layer: call wsn.guard(this optimizer) "
                    "again before the forward pass"
                )

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._knows_masks:  # torch's fused optimizers change parameters without a new version for autograd
            increment_version([p for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        own = _params_of(optimizer)
        self._kept.end_step(own)
        torch.clear_autocast_cache()  # it does not look at versions: a step inside an autocast block would be ignored
        self._wsn.gates.make_ahead(own)


class Guards:
    """The guards of one WSN. A copy or a pickle of it holds none, because guards belong to optimizers, which a copy of
    the model does not bring along.

    Attributes:
        kept: the copies of frozen values that the guards took.
        parallel: what the processes that train the WSN have to do with each other.
    """

    def __init__(self) -> None:
        self._guards: weakref.WeakSet[OptimizerGuard] = weakref.WeakSet()
        self._without_hooks: list[weakref.ref[Any]] = []
        self.kept = KeptValues()
        self.parallel = Parallel()

    def __reduce__(self) -> tuple[type[Guards], tuple[()]]:
        return Guards, ()

    def take(self, optimizer: Any, wsn: Guarded) -> None:
        """Guard ``optimizer`` and the optimizers in it. Those that are guarded already claim their layers again."""
        parts = within(optimizer)
        for part in parts:
            if not has_step_hooks(part):
                others = [one for one in self._alive_without_hooks() if one is not part]
                self._without_hooks = [weakref.ref(one) for one in (*others, part)]
                self.kept.keep(frozen_among(wsn, _params_of(part)), for_task=True)
                continue
            guard = next((guard for guard in self._guards if guard.is_of(part)), None)
            if guard is None:
                guard = OptimizerGuard(part, wsn, self.kept)
                self._guards.add(guard)
            else:
                guard.claim()
            guard.wrapped |= len(parts) > 1
            guard.keep_for_task()

    def check_hold_heads(self, task: TaskId, all_heads: Iterable[TaskHeads], stepping: torch.optim.Optimizer) -> None:
        """Raise ``RuntimeError`` if a head of ``task`` has gradients and no guarded optimizer holds it; ``stepping`` is
        the one that most likely does."""
        for heads in all_heads:
            params = [p for p in heads.head(task).parameters() if p.grad is not None]
            if params and _params_of(stepping).isdisjoint(map(id, params)) and not self._hold(params):
                raise RuntimeError(
                    f"no guarded optimizer holds the head of task {task!r}, which would never learn: "
                    "build optimizers after begin_task, or add the head with optimizer.add_param_group"
                )

    def _hold(self, params: Sequence[Tensor]) -> bool:
        """Whether a guarded optimizer has one of ``params``."""
        return any(guard.holds(params) for guard in self._guards) or any(
            not _params_of(optimizer).isdisjoint(map(id, params)) for optimizer in self._alive_without_hooks()
        )

    def before_forward(self, wsn: WSN, args: object) -> None:
        """A forward pass with these arguments is about to use the frozen values: put back what was written to them
        since the last step. If there are several processes, check it."""
        check_arguments(args)
        self.parallel.before_forward(wsn)
        self.settle()

    def settle(self) -> None:
        """A forward pass is about to use the frozen values: put back what was written to them since the last step."""
        if hooks_of_all_optimizers():  # they run before the hooks of a guard
            for guard in self._guards:
                guard.notice_hooks()
        if self.kept:
            self.kept.settle()

    def keep_for_task(self, wsn: Guarded) -> None:
        """Copy what is frozen, because more is frozen now or other values have been loaded, for those optimizers that
        may write to it outside of their hooks."""
        for guard in self._guards:
            guard.keep_for_task()
        for optimizer in self._alive_without_hooks():
            self.kept.keep(frozen_among(wsn, _params_of(optimizer)), for_task=True)

    def _alive_without_hooks(self) -> list[Any]:
        return [optimizer for ref in self._without_hooks if (optimizer := ref()) is not None]


def frozen_among(wsn: Guarded, own: set[int]) -> list[Frozen]:
    """Everything that ``wsn`` reports as frozen among the parameters with the ids ``own``."""
    fixed = [Frozen(param, None) for param in wsn.fixed() if id(param) in own]
    gates = [gate for _, gate in wsn.gated() if gate.union is not None and id(gate.param) in own]
    return fixed + [Frozen(gate.param, gate.union) for gate in gates]


def _params_of(optimizer: Any) -> set[int]:
    return {id(param) for group in optimizer.param_groups for param in group["params"]}


def _check_not_bypassed(name: str, gate: Gated, own: set[int]) -> None:
    """Raise ``RuntimeError`` if a gated tensor has a gradient and its scores have none.

    Then some module reads the tensor without the mask. Later tasks would change what earlier ones compute, and no
    fingerprint would show it.
    """
    if gate.param.grad is not None and gate.score.requires_grad and gate.score.grad is None and id(gate.score) in own:
        raise RuntimeError(
            f"{name} has a gradient and its scores have none: some module reads it without calling its layer, so the "
            "mask is not applied there. Exclude that layer from the conversion, or let the module call it."
        )


def check_guardable(optimizer: Any, params: Iterable[Tensor]) -> None:
    """Check that a guard can keep frozen values for ``optimizer``.

    Raises:
        TypeError: it is not a ``torch.optim.Optimizer`` and has not its ``step`` and ``param_groups`` either; or it is,
            or contains, LBFGS, which evaluates the model between its own updates. Frozen values would be wrong inside
            its line search, where there are no hooks; or it steps while backward runs.
        RuntimeError: ``params`` are sharded.
        ValueError: it holds none of ``params``.
    """
    if not is_optimizer(optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or an object that has its step and param_groups, got "
            f"{type(optimizer).__name__}"
        )
    if any(isinstance(one, torch.optim.LBFGS) for one in within(optimizer)):
        raise TypeError(
            "optimizer must not be LBFGS: it moves the weights and evaluates the model several times inside one step, "
            "where frozen weights cannot be put back. Use a first-order optimizer."
        )
    if any(getattr(one, "_overlap_with_ddp", False) for one in within(optimizer)):
        raise TypeError(
            "optimizer must not be a ZeroRedundancyOptimizer(overlap_with_ddp=True): it moves weights while backward "
            "runs, where frozen weights cannot be put back. Use overlap_with_ddp=False"
        )
    params = list(params)
    check_whole((f"parameter {i} of the model", param) for i, param in enumerate(params))
    if _params_of(optimizer).isdisjoint(map(id, params)):
        raise ValueError(
            "optimizer holds no parameter of this model: was it built from another one, or before .to(device)?"
        )
