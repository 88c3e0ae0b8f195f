"""What the subnet optimizers share: which gated tensors they update themselves, and the course of a step.

A gated tensor is updated here if its layer was claimed (:meth:`SubnetOptimizer.claim`). Everything else is left to the
step of torch's optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import ops
from ..backends.updates import Batch, Gradient, State
from ..nn.gate import Gated
from ..nn.gated import SubnetLayer
from ..nn.model_gates import ModelGates
from ..nn.shards import local
from .gated_params import Model, check_accumulation, check_group, gated_params
from .members import Members
from .step_counts import StepCounts
from .step_plan import Call, Planner, StepPlan
from .stored_means import PLAIN, Storage, convert, take_coded

_PART = 2**17
"""How many elements of a gradient in 16 bits are converted to float32 at once."""


class SubnetOptimizer(torch.optim.Optimizer):
    """The code that both optimizers share. In the list of bases it comes before torch's optimizer."""

    _torch_step: Callable[..., Any]
    """The unwrapped step of torch's optimizer. Its wrappers would call the hooks of this optimizer a second time."""

    MEANS: Mapping[str, bool]
    """The names of the running means in the state of a parameter, and whether each has a sign."""

    one_pass: bool = False
    accumulate_in: str = "float32"
    storage: Storage = PLAIN
    # An optimizer that was copied or unpickled knows no model: it has only what PyTorch's optimizer has.
    _known_gates: ModelGates | None = None
    _layers: Sequence[tuple[str, SubnetLayer]] = ()
    _members: Members
    _members_of: Sequence[object] | None = None  # the layers, param groups and parameters that _members were found in
    _planned_for: Sequence[object] | None = None  # the _members_of of the last plan
    _known_planner: Planner | None = None
    _known_counts: StepCounts | None = None
    _has_coded = False  # whether some state may have means that are not in the dtype of their parameter

    @property
    def knows_model(self) -> bool:
        """False if this optimizer was copied or unpickled, and not attached to a model since."""
        return self._known_gates is not None

    def attach(self, wsn: Model, one_pass: bool, accumulate_in: str) -> None:
        """Let this optimizer train ``wsn``, whose parameters it holds, in this mode. ``wsn`` guards it.

        Args:
            wsn: the model.
            one_pass: as for the constructor.
            accumulate_in: as for the constructor.

        Raises:
            TypeError: ``one_pass`` is no bool.
            ValueError: ``accumulate_in`` is unknown or not possible.
        """
        one_pass = ops.check_bool("one_pass", one_pass)
        self.accumulate_in = check_accumulation(accumulate_in, one_pass)
        self.one_pass, self._known_gates = one_pass, wsn.gates
        self._has_coded = self.storage.is_coded
        self._step_supports_amp_scaling = False  # GradScaler has to unscale G, as it unscales any gradient
        wsn.guard(self)  # the guard calls claim

    def claim(self, layers: Mapping[str, SubnetLayer]) -> Sequence[SubnetLayer]:
        """Return those of the named ``layers`` that this optimizer updates itself from now on.

        It takes a layer if it holds and trains all of the layer's tensors and scores, if they have one dtype, if no
        other layer shares them, and if the rule of the layer ranks the scores. It updates the other layers as torch's
        optimizer would."""
        own = {id(param) for group in self.param_groups for param in group["params"]}
        uses = Counter(id(t) for one in layers.values() for gate in one.gated() for t in (gate.param, gate.score))

        def can_take(gate: Gated) -> bool:
            tensors = (gate.param, gate.score)
            mine = all(id(t) in own and uses[id(t)] == 1 and t.requires_grad for t in tensors)
            return mine and gate.param.dtype is gate.score.dtype

        ranked = {name: x for name, x in layers.items() if ops.constant_threshold(x.rule) is None}
        taken = [(name, layer) for name, layer in ranked.items() if all(map(can_take, layer.gated()))]
        asked = {id(layer) for layer in layers.values()}
        self._layers = [*(known for known in self._layers if id(known[1]) not in asked), *taken]
        return [layer for _, layer in taken]

    @property
    def _gates(self) -> ModelGates:
        if self._known_gates is None:
            self._known_gates = ModelGates()
        return self._known_gates

    @property
    def _planner(self) -> Planner:
        if self._known_planner is None:
            self._known_planner = Planner()
        return self._known_planner

    @property
    def _counts(self) -> StepCounts:
        if self._known_counts is None:
            self._known_counts = StepCounts()
        return self._known_counts

    @property
    def primitive(self) -> str:
        """The primitive of the backends that updates gated tensors."""
        kind = "adamw" if isinstance(self, torch.optim.Adam) else "sgd"
        return f"{kind}_coded_step" if self.storage.is_coded else f"{kind}_step"

    def protects(self, closure: bool) -> frozenset[int]:
        """The ids of the gated tensors and scores that a step updates without writing to frozen weights.

        ``closure`` tells whether a closure runs first. Then it is not known yet which tensors will have gradients, so
        the standard mode promises nothing. The one-pass mode updates all gated tensors of its layers in any case."""
        if self.one_pass:
            return self._raw_members().ids
        return frozenset() if closure else self._known_members().with_both_gradients().ids

    def _raw_members(self) -> Members:
        """The gated tensors whose raw gradients this optimizer takes."""
        return self._known_members().raw_of(self)

    def _known_members(self) -> Members:
        """The gated tensors of the claimed layers.

        Raises:
            RuntimeError: one of them was replaced.
        """
        if self._gates.sharding is not None:
            self._gates.sharding.reshard()
        places = [self._layers, *chain.from_iterable((group, *group["params"]) for group in self.param_groups)]
        known = self._members_of
        if known is None or len(known) != len(places) or not all(map(is_, known, places)):
            self._members, self._members_of = Members([*gated_params(self._layers, self.param_groups)]), places
        self._members.check_in_place()
        return self._members

    @contextmanager
    def _groups_of_the_rest(self, gated: frozenset[int]) -> Iterator[None]:
        """Take the parameters that are updated here out of the param groups, for as long as torch's own step runs."""
        whole = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gated]
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, whole, strict=True):
                group["params"] = params

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update everything that has a gradient.

        Args:
            closure: evaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gated tensor has a raw gradient that did not come through its layer alone, or gradients
                changed after :meth:`clip_grad_norm_`.
            ValueError: a param group asks for ``amsgrad`` or ``maximize``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything that may fail comes before the first change.
        members, gradients, dtypes = self._take_gradients()
        scale = self._gates.clipping_factor()
        for group in self.param_groups:
            check_group(group)
        plan = self._plan_of(members, dtypes)
        rest = [p for p in plan.others if p.grad is not None]
        self._gates.check_promised(rest)
        for call in plan.calls:
            backend_plan = self._planner.backend_plan(call.key)
            batch = Batch(call.updates, call.of(gradients), scale, backend_plan)
            self._update(call, batch)
        if rest:
            for param in rest if self._has_coded else ():
                convert(self.state[param], param, self.MEANS, "float32")  # PyTorch knows no other form
            new = [p for p in rest if not self.state.get(p)]
            try:
                with self._groups_of_the_rest(plan.ids):
                    self._torch_step()
            except BaseException:
                for param in new:  # torch may have made a half of their states
                    self.state.pop(param, None)
                raise
            increment_version(rest)  # fused optimizers do not tell autograd what they have changed
        torch.clear_autocast_cache()  # it does not look at versions
        self._gates.forget_clipping()
        if members.are_sharded:
            members.were_updated()
        else:
            for call in plan.calls:
                call.made_ready()
        return loss

    def _take_gradients(self) -> tuple[Members, list[Gradient], list[torch.dtype | None]]:
        """The gated tensors with gradients that this optimizer updates itself; these gradients; and the dtype of the
        masked weight that the step prepares for the next forward pass of each, or None."""
        if not self.one_pass:
            members = self._known_members().with_both_gradients()
            return members, members.gradients(None), members.next_dtypes()
        members, passes = self._raw_members().with_passes()
        dtypes = [None if members.are_sharded else last.dtype for last in passes]
        return members, members.gradients(passes), dtypes

    def _plan_of(self, members: Members, dtypes: Sequence[torch.dtype | None]) -> StepPlan:
        plan, is_new = self._planner.plan(members, dtypes, self.param_groups, self.state, self._states_of)
        if is_new or self._planned_for is not self._members_of:
            plan.others = [p for group in self.param_groups for p in group["params"] if id(p) not in plan.ids]
            self._planned_for = self._members_of
        return plan

    def _states_of(self, call: Call) -> list[State]:
        """What this optimizer remembers of the gated tensors of a call. It is made at the first step."""
        raise NotImplementedError

    def _update(self, call: Call, batch: Batch) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the 2-norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_`` does.

        In the one-pass mode torch's function would use the norm of G. This one uses the norm of dW and dS. To compute
        it, it reads gradients, weights and scores once more. The step then scales the gradients of gated tensors. Call
        this between the last backward pass (and ``GradScaler.unscale_``) and the step.

        Args:
            max_norm: the largest norm to allow, positive.
            error_if_nonfinite: whether to raise an exception if the norm is not finite.

        Returns:
            The norm before clipping, 0-d.

        Raises:
            TypeError: ``error_if_nonfinite`` is no bool.
            ValueError: ``max_norm`` is not a positive number.
            RuntimeError: the norm is not finite and ``error_if_nonfinite`` is True.
        """
        if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0:
            raise ValueError(f"max_norm must be a positive number, got {max_norm!r}")
        error_if_nonfinite = ops.check_bool("error_if_nonfinite", error_if_nonfinite)
        before = self._gates.clipping_factor()
        members, gradients, dtypes = self._take_gradients() if self.one_pass else (None, [], [])
        plan = None if members is None else self._plan_of(members, dtypes)
        others = chain.from_iterable(group["params"] for group in self.param_groups) if plan is None else plan.others
        rest = [p.grad for p in others if p.grad is not None]
        norms = [_norm(grad) for grad in rest if local(grad) is grad]
        of_shards = [_norm(local(grad)) for grad in rest if local(grad) is not grad]
        for call in () if plan is None else plan.calls:
            batch = Batch(call.updates, call.of(gradients), before, {})
            gated = ops.gradient_squares(batch, call.key.backend).sqrt().unbind()
            norms += () if self._gates.sharding else gated
            of_shards += gated if self._gates.sharding else ()
        if self._gates.sharding is not None:
            norms.append(self._gates.sharding.norm(of_shards))
        if not norms:
            return torch.tensor(0.0)
        device, dtype = norms[0].device, max((n.dtype for n in norms), key=lambda d: d.itemsize)
        norm = torch.linalg.vector_norm(torch.stack([n.to(device, dtype) for n in norms]))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(f"the norm of the gradients is {norm.item()}, so it cannot be clipped")
        scale = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)
        for grad in map(local, rest):
            grad.mul_(scale.to(grad.device))
        if members is not None and members.ones:
            clipped = [(one.layer, one.tensor, raw.grad) for one, raw in zip(members.ones, gradients, strict=True)]
            self._gates.clip(scale if before is None else before * scale, clipped)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do what ``torch.optim.Optimizer`` does, except that raw gradients always become None. A raw gradient of zeros
        would be an error, because it comes from no forward pass.

        Raises:
            TypeError: ``set_to_none`` is no bool.
        """
        set_to_none = ops.check_bool("set_to_none", set_to_none)
        self._gates.forget_clipping()
        if self._gates.sharding is None or set_to_none:
            super().zero_grad(set_to_none)
        else:  # PyTorch cannot set DTensors and other tensors to 0 together
            for param in chain.from_iterable(group["params"] for group in self.param_groups):
                if param.grad is not None:
                    local(param.grad).detach().zero_()
        if self.one_pass and not set_to_none:
            for member in self._raw_members().ones:
                member.param.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do what ``torch.optim.Optimizer`` does, with the running means in any storage. They get that of this
        optimizer, and keep every bit if they have it already. The state may come from torch's optimizer of the same
        kind.

        Raises:
            ValueError: a param group of the state asks for ``amsgrad`` or ``maximize``, or running means do not fit
                their parameters.
        """
        for group in state_dict["param_groups"]:
            check_group(group)
        own = [*chain.from_iterable(group["params"] for group in self.param_groups)]
        coded: dict[Tensor, dict[str, Any]] = {}

        def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            ids = chain.from_iterable(group["params"] for group in state["param_groups"])
            params = dict(zip(ids, own, strict=False))
            rest, taken = take_coded(state["state"], params, self.MEANS)
            coded.update((params[index], means) for index, means in taken.items())
            return {**state, "state": rest}

        last = self.register_load_state_dict_pre_hook(take)  # PyTorch would cast codes to the dtype of the parameter
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for param, means in coded.items():
            self.state[param].update((key, value.to(param.device)) for key, value in means.items())
        self._has_coded = self._has_coded or bool(coded)
        self._convert_own()

    def _convert_own(self) -> None:
        """Bring the running means of the claimed layers into the storage of this optimizer."""
        if not self._has_coded:
            return
        gates = [gate for _, layer in self._layers for gate in layer.gated()]
        for gate in gates:
            for param, storage in zip((gate.param, gate.score), self.storage, strict=True):
                if param in self.state:
                    convert(self.state[param], param, self.MEANS, storage)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "storage": self.storage, "_has_coded": self._has_coded}


def _norm(grad: Tensor) -> Tensor:
    """The 2-norm of a gradient, 0-d, in float32 or in its dtype if that is wider."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    if not grad.is_cpu or grad.dtype is dtype:
        return torch.linalg.vector_norm(grad, dtype=dtype)
    # On the CPU PyTorch would copy the whole gradient in float32.
    parts = [torch.linalg.vector_norm(part, dtype=dtype) for part in grad.reshape(-1).split(_PART)]
    return torch.linalg.vector_norm(torch.stack(parts))
