"""How often each tensor was updated: a 0-d tensor in the state of the optimizer, as PyTorch has it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.updates import CallKey


class _Together(NamedTuple):
    """The numbers of updates of all tensors of a call as one tensor, and its elements, which are in the state of the
    optimizer: so they are all raised by one operation."""

    whole: Tensor
    elements: Sequence[Tensor]

    def as_few(self, steps: list[Tensor]) -> list[Tensor]:
        """``steps``, as one tensor if they are all of these numbers."""
        all_of_them = len(self.elements) == len(steps) and all(map(is_, self.elements, steps))
        return [self.whole] if all_of_them else steps

    def has_none_of(self, steps: Sequence[Tensor]) -> bool:
        """Whether none of ``steps`` is among these numbers."""
        return {*map(id, self.elements)}.isdisjoint(map(id, steps))


class StepCounts:
    """The numbers of the updates of all tensors that an optimizer updates itself."""

    def __init__(self) -> None:
        self._known: dict[CallKey, _Together] = {}

    def of(self, key: CallKey, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """The ``step`` in each of the ``states`` of the tensors of a call, which all have one, in one tensor if
        possible."""
        steps: list[Tensor] = [state["step"] for state in states]
        known = self._known.get(key)
        # Numbers that are together stay where they are, because a CUDA graph may raise them.
        if known is None or known.has_none_of(steps):
            whole = torch.stack([step.float() for step in steps])
            steps = list(whole.unbind())
            self._known[key] = _Together(whole, steps)
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        return steps

    def few(self, key: CallKey, steps: list[Tensor]) -> list[Tensor]:
        """``steps`` of a call in as few tensors as possible, to be raised or lowered."""
        return self._known[key].as_few(steps)
