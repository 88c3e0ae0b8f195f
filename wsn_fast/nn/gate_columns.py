"""Many gates side by side, in columns. Every step looks at all gates of a model, and C code that runs over a column
takes a fraction of the time of a loop in Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import compress, repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from .gate_state import Pass, Ready, Stamp
from .gated import SubnetLayer
from .shards import address

VERSION, RULE, DENSITY, DTYPE = map(attrgetter, ("_version", "rule", "gate_density", "dtype"))
_make_pass: Any = partial(tuple.__new__, Pass)  # Pass itself is code in Python


class GateColumns:
    """Gates of the layers of a model.

    Args:
        gates: of each gate the layer, the name of the tensor in it, the tensor, and its scores.

    Attributes:
        layers, names, params, scores: the columns.
    """

    def __init__(self, gates: Iterable[tuple[SubnetLayer, str, Tensor, Tensor]]) -> None:
        columns = [*zip(*gates, strict=True)] or [()] * 4
        self.layers: Sequence[SubnetLayer] = columns[0]
        self.names: Sequence[str] = columns[1]
        self.params: Sequence[Tensor] = columns[2]
        self.scores: Sequence[Tensor] = columns[3]
        self._states = [*dict.fromkeys(layer.gate_state for layer in self.layers)]
        self._ready = [layer.gate_state.ready for layer in self.layers]
        self._passes = [layer.gate_state.passes for layer in self.layers]
        self._places = [layer._parameters for layer in self.layers]
        sharded = any(state.shards is not None for state in self._states)
        self._address: Callable[[Tensor], int] = address if sharded else Tensor.data_ptr
        self._score_names = [f"{name}_score" for name in self.names]

    def those(self, chosen: Iterable[bool]) -> GateColumns:
        """Those of the gates that are ``chosen``."""
        return GateColumns(compress(zip(self.layers, self.names, self.params, self.scores, strict=True), chosen))

    def are_in_place(self) -> bool:
        """Whether the layers still hold these tensors and scores."""
        params, scores = map(dict.get, self._places, self.names), map(dict.get, self._places, self._score_names)
        return all(map(is_, self.params, params)) and all(map(is_, self.scores, scores))

    def stamps(self) -> Iterator[Stamp]:
        """What :func:`wsn_fast.nn.gate_state.stamp` returns for each gate now."""
        versions = map(VERSION, self.params), map(VERSION, self.scores)
        addresses = map(self._address, self.params), map(self._address, self.scores)
        return zip(*versions, *addresses, map(RULE, self.layers), map(DENSITY, self.layers), strict=True)

    def passes(self) -> list[Pass | None]:
        """The forward pass that each gate took part in since the last step, if it did."""
        return [*map(dict.get, self._passes, self.names)]

    def are_ready(self) -> list[bool]:
        """Whether each gate was made ahead and is up to date."""
        found = map(dict.get, self._ready, self.names)
        return [one is not None and one.next.stamp == now for one, now in zip(found, self.stamps(), strict=True)]

    def made_ready(
        self, masked: Sequence[Tensor], taus: Sequence[Tensor], windows: Iterable[Tensor | None] = repeat(None)
    ) -> None:
        """All gates were made ahead; see :meth:`GateState.made_ready <wsn_fast.nn.gate_state.GateState.made_ready>`."""
        deque(map(dict.pop, self._passes, self.names, repeat(None)), maxlen=0)
        for state in self._states:
            state.traced = False
        nexts = map(_make_pass, zip(taus, map(DTYPE, masked), self.stamps(), repeat(()), strict=False))
        for there, name, tensor, window, following in zip(
            self._ready, self.names, masked, windows, nexts, strict=False
        ):
            ready = there.get(name)
            if ready is not None and ready.masked is tensor and ready.window is window:
                ready.next = following
            else:
                there[name] = Ready(tensor, window, following)
