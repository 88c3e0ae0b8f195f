"""What a step does again and again, worked out once: which gated tensors are updated by one call of a backend, and
where everything lies that stays in place. A plan is used as long as nothing that it depends on has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends.updates import WINDOW, CallKey, Gradient, Next, Plan, State, Update
from ..nn.gate_columns import GateColumns
from ..nn.gated import SubnetLayer
from ..nn.shards import local
from .gated_params import GatedParam, Group
from .members import Members

SETTINGS = attrgetter("rule", "_density", "task_density", "_backend")


@dataclass
class Call:
    """The gated tensors that one call of a backend updates.

    Attributes:
        key: the device, dtype and backend.
        members: the tensors.
        places: their places among the members of the plan, ascending.
        groups: the pairs of param groups that they are in.
        group_of: which of these pairs each is in.
        updates: the operands of the update that stay in place.
        ahead: the gates that the updates make for the next forward pass, with their masked tensors, thresholds and
            windows.
    """

    key: CallKey
    members: list[GatedParam] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    groups: list[tuple[Group, Group]] = field(default_factory=list)
    group_of: list[int] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    ahead: tuple[GateColumns, list[Tensor], list[Tensor], list[Tensor]] | None = None

    def add(self, member: GatedParam, place: int) -> None:
        """Add a member of the plan."""
        both = member.group, member.score_group
        known = [i for i, pair in enumerate(self.groups) if pair[0] is both[0] and pair[1] is both[1]]
        if not known:
            self.groups.append(both)
        self.group_of.append(known[0] if known else len(self.groups) - 1)
        self.members.append(member)
        self.places.append(place)

    def made_ready(self) -> None:
        """The updates have made the gates of the next forward pass."""
        if self.ahead is None:
            pairs = [(one, update.next) for one, update in zip(self.members, self.updates, strict=True) if update.next]
            columns = GateColumns((one.layer, one.tensor, one.param, one.score) for one, _ in pairs)
            nexts = [following for _, following in pairs]
            self.ahead = columns, [n.masked for n in nexts], [n.tau for n in nexts], [n.window for n in nexts]
        columns, masked, taus, windows = self.ahead
        columns.made_ready(masked, taus, windows)

    def of(self, gradients: Sequence[Gradient]) -> Sequence[Gradient]:
        """Those of the gradients of all members of the plan that belong to this call."""
        return gradients if len(self.places) == len(gradients) else [gradients[place] for place in self.places]

    def each(self, settings: Callable[[Group], Any]) -> list[tuple[Any, Any]]:
        """``settings`` of the param groups of each tensor and of its scores. Tensors of the same groups get the same
        object."""
        pairs = [(settings(group), settings(score_group)) for group, score_group in self.groups]
        return pairs * len(self.members) if len(pairs) == 1 else [pairs[i] for i in self.group_of]


@dataclass
class StepPlan:
    """The calls of a step, and what they depend on.

    Attributes:
        members: the gated tensors that the step updates.
        objects: the dtypes, unions and states of the optimizer that the updates were made from, compared by identity.
        layers, settings: the layers, and their settings.
        tensors: the tensors that stay in place.
        addresses: where they are.
        calls: the calls.
        ids: of all tensors and scores that the calls update.
        others: the parameters that torch's step may have to update.
    """

    members: Members
    objects: list[Any]
    layers: list[SubnetLayer]
    settings: list[Any]
    tensors: list[Tensor]
    addresses: list[int]
    calls: list[Call]
    ids: frozenset[int]
    others: list[Tensor] = field(default_factory=list)

    def holds(self, members: Members, objects: list[Any]) -> bool:
        """Whether nothing has changed since the plan was made."""
        return (
            self.members is members
            and len(self.objects) == len(objects)
            and all(map(is_, self.objects, objects))
            and self.settings == [*map(SETTINGS, self.layers)]
            and self.addresses == [*map(Tensor.data_ptr, self.tensors)]
        )


class Planner:
    """Makes the plan of a step, or finds that the last one still holds."""

    def __init__(self) -> None:
        self._last: StepPlan | None = None
        self._backend_plans: dict[CallKey, Plan] = {}

    def backend_plan(self, key: CallKey) -> Plan:
        """What the backends keep for calls of this kind."""
        return self._backend_plans.setdefault(key, {})

    def plan(
        self,
        members: Members,
        dtypes: Sequence[torch.dtype | None],
        groups: Sequence[Group],
        states: Mapping[Tensor, dict[str, Any]],
        states_of: Callable[[Call], list[State]],
    ) -> tuple[StepPlan, bool]:
        """The plan for a step that updates ``members``, and whether it is a new one.

        Args:
            members: the gated tensors that have gradients.
            dtypes: those of the masked weights that the step prepares for the next forward pass; None for none.
            groups: the param groups.
            states: what the optimizer remembers, by parameter.
            states_of: gives what the optimizer remembers of the tensors of a call, and makes it if it does not exist.
        """
        if self._last is not None and self._last.holds(members, _objects(members, dtypes, groups, states)):
            return self._last, False
        self._last = _make(members, dtypes, states_of)
        self._last.objects = _objects(members, dtypes, groups, states)
        return self._last, True


def _objects(
    members: Members,
    dtypes: Sequence[torch.dtype | None],
    groups: Sequence[Group],
    states: Mapping[Tensor, dict[str, Any]],
) -> list[Any]:
    """What updates are made from, beside the tensors, their places and the settings of the layers."""
    unions = map(dict.get, members.buffers, members.unions)
    momentum = [group.get("momentum") for group in groups]  # without it there are no buffers
    shards = map(local, (*members.columns.params, *members.columns.scores)) if members.are_sharded else ()
    # All states in their order: looking one up by its parameter would take longer.
    remembered = list(states.values())
    return [*dtypes, *unions, *momentum, *shards, *remembered, *chain.from_iterable(map(dict.values, remembered))]


def _make(
    members: Members,
    dtypes: Sequence[torch.dtype | None],
    states_of: Callable[[Call], list[State]],
) -> StepPlan:
    calls: dict[CallKey, Call] = {}
    dtype_of = dict(zip(map(id, members.ones), dtypes, strict=True))
    for place, member in enumerate(members.ones):
        if members.are_sharded and local(member.param).numel() == 0:
            continue  # all rows are in other processes
        key = CallKey(member.param.device, member.param.dtype, member.layer.backend)
        call = calls.setdefault(key, Call(key))
        call.add(member, place)
    for call in calls.values():
        for member, state in zip(call.members, states_of(call), strict=True):
            layer, dtype = member.layer, dtype_of[id(member)]
            following = None if dtype is None else _next(member, dtype)
            union = layer._buffers[f"{member.tensor}_union"]
            param, score = (local(one).detach() if members.are_sharded else one for one in (member.param, member.score))
            call.updates.append(Update(param, score, union, layer.rule, state, following))
    layers = list({id(member.layer): member.layer for member in members.ones}.values())
    updates = [update for call in calls.values() for update in call.updates]
    tensors = [tensor for update in updates for tensor in _tensors(update)]
    return StepPlan(
        members=members,
        objects=[],
        layers=layers,
        settings=[*map(SETTINGS, layers)],
        tensors=tensors,
        addresses=[*map(Tensor.data_ptr, tensors)],
        calls=list(calls.values()),
        ids=members.ids,
    )


def _tensors(update: Update) -> list[Tensor]:
    """The tensors that somebody else may move by replacing their data."""
    means = (mean if isinstance(mean, tuple) else (mean,) for mean in (update.state or ())[:4])
    parts = (update.weight, update.scores, update.union, *chain.from_iterable(means))
    return [part for part in parts if part is not None]


def _next(member: GatedParam, dtype: torch.dtype) -> Next:
    """Memory for the gate of the next forward pass: that of the last gate if it fits, else new memory."""
    param, score, layer = member.param, member.score, member.layer
    ready = member.state.ready.get(member.tensor)
    window = None if ready is None else ready.window
    tau = None if ready is None else ready.next.tau
    if tau is None or window is None or (tau.dtype, tau.device) != (score.dtype, score.device):
        tau, window = score.new_empty(()), torch.zeros(WINDOW, dtype=torch.int64, device=score.device)
    masked = None if ready is None else ready.masked
    if masked is None or (masked.shape, masked.dtype, masked.device) != (param.shape, dtype, param.device):
        masked = torch.empty(param.shape, dtype=dtype, device=param.device)
    return Next(masked, tau, ops.threshold_rank(param.numel(), layer.density_of(member.tensor), layer.rule), window)
