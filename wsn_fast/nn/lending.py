"""The gates that were made ahead, as a forward pass of the model gets them: worked out once, and used again as long as
nothing that they depend on has changed but the values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_

from torch import Tensor, nn

from ..backends.updates import CallKey
from ..ops.autograd import AheadGate
from .gate_columns import GateColumns
from .gate_state import GateState, Given, Ready, stamp
from .gated import SubnetLayer

IS_TRAINED, STAMP, TAU = map(attrgetter, ("requires_grad", "next.stamp", "next.tau"))
SETTINGS = attrgetter(
    "rule", "_density", "task_density", "_backend", "_active_row", "gate_state.has_owner", "gate_state.gates_ahead"
)


@dataclass(slots=True, eq=False)
class Loan:
    """A gate that was made ahead, as the autograd Function takes it, and as its layer gets it. It serves every pass."""

    layer: SubnetLayer
    state: GateState
    name: str
    ready: Ready
    gate: AheadGate
    given: Given

    def is_fresh(self) -> bool:
        """Whether the gate is that of the present weight and scores."""
        return self.ready.next.stamp == stamp(self.layer, self.gate.weight, self.gate.scores)


class Lending:
    """The loans of a model.

    Attributes:
        loans: one for each gate that was made ahead and may be used.
        whole: all of them, as the autograd Function takes them.
    """

    def __init__(self, layers: Iterable[SubnetLayer]) -> None:
        self._layers = list(layers)
        self._ready_of = [layer.gate_state.ready for layer in self._layers]
        self._settings = [*map(SETTINGS, self._layers)]
        self._counts = [*map(len, self._ready_of)]
        self.loans = [loan for layer in self._layers for loan in _loans_of(layer)]
        self.whole = Lent.of(self.loans)
        self._columns = GateColumns((one.layer, one.name, one.gate.weight, one.gate.scores) for one in self.loans)
        self._ready_places = [loan.state.ready for loan in self.loans]
        self._ready = [loan.ready for loan in self.loans]
        self._taus = [loan.gate.tau for loan in self.loans]
        self._union_places = [loan.layer._buffers for loan in self.loans]
        self._union_names = [f"{loan.name}_union" for loan in self.loans]
        self._unions = [loan.gate.union for loan in self.loans]
        self._trained = self._are_trained()

    def holds(self) -> bool:
        """Whether the loans are those of the present gates and tensors. The values may have changed."""
        return (
            self._settings == [*map(SETTINGS, self._layers)]
            and self._counts == [*map(len, self._ready_of)]
            and all(map(is_, self._ready, map(dict.get, self._ready_places, self._columns.names)))
            and self._columns.are_in_place()
            and all(map(is_, self._unions, map(dict.get, self._union_places, self._union_names)))
            and self._trained == self._are_trained()
            and all(map(is_, self._taus, map(TAU, self._ready)))
        )

    def is_fresh(self) -> bool:
        """Whether all loans are fresh."""
        return [*self._columns.stamps()] == [*map(STAMP, self._ready)]

    def _are_trained(self) -> list[bool]:
        return [*map(IS_TRAINED, self._columns.params), *map(IS_TRAINED, self._columns.scores)]


@dataclass(slots=True)
class Lent:
    """What an autograd Function gives to layers: the loans, the gates, and the tensors that get gradients."""

    loans: Sequence[Loan]
    gates: Sequence[AheadGate]
    inputs: Sequence[Tensor]

    @staticmethod
    def of(loans: Sequence[Loan]) -> Lent:
        """These loans."""
        gates = [loan.gate for loan in loans]
        return Lent(loans, gates, [*(one.weight for one in gates), *(one.scores for one in gates if not one.raw)])


def _loans_of(layer: SubnetLayer) -> list[Loan]:
    state, raw = layer.gate_state, layer.one_pass
    if layer.active_row is not None or not (raw or state.gates_ahead):
        return []
    loans = []
    for name, ready in state.ready.items():
        param, score = layer._parameters.get(name), layer._parameters.get(f"{name}_score")
        # torch.func may have put the tensors of another copy of the model here.
        if type(param) is not nn.Parameter or score is None or (raw and not state.owns(param, score)):
            continue
        key = CallKey(param.device, param.dtype, layer.backend)
        union = layer._buffers[f"{name}_union"]
        about = state.about_raw(name) if raw else None
        gate = AheadGate(param, score, ready.masked, ready.next.tau, union, layer.rule, key, about)
        loans.append(Loan(layer, state, name, ready, gate, Given(ready.masked, param, 0, score, ready, raw)))
    return loans
