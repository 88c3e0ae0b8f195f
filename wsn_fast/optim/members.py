"""The gated tensors that an optimizer updates itself, and what has to be right about their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import compress, repeat
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends.updates import Gradient
from ..nn.gate_columns import GateColumns
from ..nn.gate_state import Pass
from ..nn.shards import local
from .gated_params import GatedParam

GRAD, IS_TRAINED, TAU = map(attrgetter, ("grad", "requires_grad", "tau"))
IS_AHEAD, ARRIVED, IS_FOREIGN, OPEN = map(attrgetter, ("gates_ahead", "arrived", "is_foreign", "open"))
_make_gradient: Any = partial(tuple.__new__, Gradient)  # Gradient itself is code in Python


def _local(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else local(gradient)


class Members:
    """Gated tensors of an optimizer, in columns.

    Attributes:
        ones: the gated tensors.
        columns: their gates.
        ids: of the tensors and their scores.
        are_sharded: whether FSDP2 has cut the tensors into shards.
        buffers, unions: the buffers of their layers, and the names of their unions there.
    """

    def __init__(self, ones: Sequence[GatedParam]) -> None:
        self.ones = ones
        self.columns = GateColumns((one.layer, one.tensor, one.param, one.score) for one in ones)
        self.ids = frozenset(id(tensor) for one in ones for tensor in (one.param, one.score))
        self.buffers = [one.layer._buffers for one in ones]
        self.unions = [one.union for one in ones]
        self._abouts = [one.about for one in ones]
        self._states = [*dict.fromkeys(one.state for one in ones)]
        self._compute_dtypes = [one.state.compute_dtypes for one in ones]
        self._part: Members | None = None
        self.are_sharded = any(state.shards is not None for state in self._states)

    def those(self, chosen: Iterable[bool]) -> Members:
        """Those of the tensors that are ``chosen``."""
        chosen = [*chosen]
        if all(chosen):
            return self
        ones = [*compress(self.ones, chosen)]
        if self._part is None or self._part.ones != ones:
            self._part = Members(ones)
        return self._part

    def check_in_place(self) -> None:
        """Raise ``RuntimeError`` if another tensor has taken the place of one of these in its layer."""
        if not self.columns.are_in_place():
            for one in self.ones:
                one.check_in_place()

    def raw_of(self, owner: object) -> Members:
        """Those whose raw gradients ``owner`` takes."""
        columns = self.columns
        trained = all(map(IS_TRAINED, columns.params)) and all(map(IS_TRAINED, columns.scores))
        if trained and all(state.owner is owner for state in self._states):
            return self
        return self.those(one.state.owner is owner and one.layer.one_pass for one in self.ones)

    def with_both_gradients(self) -> Members:
        """Those that have a gradient, and whose scores have one."""
        weights, scores = map(GRAD, self.columns.params), map(GRAD, self.columns.scores)
        return self.those(dw is not None and ds is not None for dw, ds in zip(weights, scores, strict=True))

    def with_passes(self) -> tuple[Members, list[Pass]]:
        """Those that have a raw gradient, and the forward passes that these gradients come from.

        Raises:
            RuntimeError: a tensor, its scores or its rule changed since a forward pass, so all these gradients were
                dropped; or as :meth:`GatedParam.checked_pass`.
        """
        members = self.those(map(is_not, map(GRAD, self.columns.params), repeat(None)))
        passes = members.columns.passes()
        if not members._are_doubtful(passes):
            return members, passes  # type: ignore[return-value]
        for one in members.ones:
            one.drop_zeros()
        members = members.those(one.param.grad is not None for one in members.ones)
        changed = next((one.name for one in members.ones if one.has_changed()), None)
        if changed is not None:
            for one in members.ones:
                one.drop_gradient()  # else each later step would be refused too, in a loop that never sets them to None
            raise RuntimeError(
                f"{changed}, its scores or its rule changed between the forward pass and the step. In the one-pass "
                "mode they must not change there: change them before the forward pass, or use one_pass=False. The "
                "gradients of all gated tensors were dropped, and training can go on"
            )
        return members, [one.checked_pass() for one in members.ones]

    def _are_doubtful(self, passes: Sequence[Pass | None]) -> bool:
        """Whether each tensor has to be looked at by itself."""
        abouts = self._abouts
        return (
            [None if last is None else last.stamp for last in passes] != [*self.columns.stamps()]
            or any(map(ARRIVED, abouts))
            or any(map(IS_FOREIGN, abouts))
            or any(map(OPEN, abouts))
            or any(map(is_not, map(GRAD, self.columns.scores), repeat(None)))
        )

    def gradients(self, passes: Sequence[Pass] | None) -> list[Gradient]:
        """The gradients: raw ones of these ``passes``, or dW and dS if there are none."""
        taus = repeat(None) if passes is None else map(TAU, passes)
        columns = map(GRAD, self.columns.params), map(GRAD, self.columns.scores), taus
        if self.are_sharded:
            columns = map(_local, columns[0]), map(_local, columns[1]), taus
        return [*map(_make_gradient, zip(*columns, strict=False))]

    def were_updated(self) -> None:
        """An update has written to the shards of sharded tensors, of which autograd has heard nothing."""
        increment_version([*self.columns.params, *self.columns.scores])
        for one in self.ones:
            one.state.passes.pop(one.tensor, None)

    def next_dtypes(self) -> list[torch.dtype | None]:
        """The dtypes of the masked weights that a step outside the one-pass mode prepares for the next forward pass;
        None where it prepares none."""
        columns = self.columns
        tensors = (*columns.params, *columns.scores)
        if self.are_sharded:
            return [None] * len(self.ones)
        if all(map(IS_AHEAD, self._states)) and all(map(Tensor.is_contiguous, tensors)):
            return [*map(dict.get, self._compute_dtypes, columns.names)]
        return [one.next_dtype() for one in self.ones]
