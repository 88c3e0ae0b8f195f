"""Says what convert did: how many parameters are gated, and what is left out, and why."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from .selection import Left

_LOGGER = logging.getLogger("wsn_fast")
_SHOWN = 8  # kinds of parameters that a message lists


class Coverage(NamedTuple):
    """How much of a model is gated. Tied parameters count once.

    Attributes:
        gated: the number of elements in gated tensors.
        others: the number of elements in other floating parameters, without heads, normalisation layers and scores.
    """

    gated: int
    others: int

    @property
    def share(self) -> float:
        """The part that is gated, in [0, 1]."""
        return self.gated / max(1, self.gated + self.others)

    def __str__(self) -> str:
        total = self.gated + self.others
        return f"{self.gated:,} of {total:,} parameters outside of heads and norms are gated ({self.share:.1%})"


def coverage(model: nn.Module) -> Coverage:
    """How much of ``model``, converted or not, is gated."""
    gates = [gate for module in model.modules() if isinstance(module, SubnetLayer) for gate in module.gated()]
    gated = {id(gate.param): gate.param.numel() for gate in gates}
    skipped = {id(gate.score) for gate in gates} | gated.keys()
    for module in model.modules():
        if isinstance(module, TaskHeads):
            skipped |= {id(param) for param in module.parameters()}
        elif per_task.is_norm(module):
            skipped |= {id(param) for param in module._parameters.values()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in skipped and p.is_floating_point())
    return Coverage(sum(gated.values()), others)


def tell(model: nn.Module, left: Sequence[Left]) -> None:
    """Log what is gated. Warn if it is less than a half and nobody asked for that."""
    found = coverage(model)
    text = f"{found}{_left_out(left)}"
    unasked = sum(one.tensor.numel() for one in left if not one.asked)
    if unasked > found.gated:
        warnings.warn(
            f"{text}. What is left out has to get an owner in WSN(...), or be named in target_modules", stacklevel=4
        )
    else:
        _LOGGER.info(text)


def _left_out(left: Sequence[Left]) -> str:
    """The parameters that are left out by class of module and reason, the largest first."""
    kinds: defaultdict[tuple[str, str], list[Left]] = defaultdict(list)
    for one in left:
        why = f"{one.reason} leaves it out" if one.asked else one.reason
        kinds[one.kind, why].append(one)
    sizes = {kind: sum(one.tensor.numel() for one in ones) for kind, ones in kinds.items()}
    largest = sorted(kinds, key=lambda kind: -sizes[kind])
    listed = [f"{len(kinds[k])} x {k[0]} such as {kinds[k][0].name} ({k[1]}; {sizes[k]:,})" for k in largest[:_SHOWN]]
    more = f" and {len(largest) - _SHOWN} more kinds" if len(largest) > _SHOWN else ""
    return f"; left out: {', '.join(listed)}{more}" if listed else ""
