"""The gates of a whole model: made ahead for all layers together, given to a forward pass by one autograd Function, and
what optimizer, guard and CUDA graphs share about them.

A layer by itself needs four launches on a GPU to select and gate a tensor, in every forward pass, and one more for the
gradients. All layers together need as many as one layer. A layer uses what it is given only if its stamp is up to date,
and makes its own gate otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import recording
from ..backends.updates import Plan
from ..ops.autograd import ModelGate
from .ahead import Ahead
from .gate_state import GateState, Given, Kept, Pass
from .gated import SubnetLayer
from .lending import Lending, Lent, Loan
from .sharding import Sharding
from .shards import local
from .transforms import are_active

VERSION, KEPT, BACKEND = map(attrgetter, ("_version", "kept", "_backend"))
GATE_SETTINGS = attrgetter("_active_row", "_density", "task_density", "rule", "gate_state._owner")
"""What the gates of a layer depend on beside its tensors."""


class _Clipped(NamedTuple):
    """A gradient that was there when the norm of all gradients was clipped, with its version, how many passes its layer
    had noted, and the last of its own."""

    layer: SubnetLayer
    name: str
    grad: Tensor
    version: int
    noted: int
    last: Pass | None


class _Shown(NamedTuple):
    """The masked tensors of a finished task for all layers, and what they were made from."""

    layers: Sequence[SubnetLayer]
    kept: Sequence[Kept]
    states: Sequence[GateState]  # where the layers have them
    names: Sequence[str]
    given: Sequence[tuple[GateState, dict[str, Given]]]
    sources: Sequence[Tensor]  # tensors and masks
    versions: Sequence[int]
    addresses: Sequence[int]
    backends: Sequence[str | None]


class ModelGates:
    """The gates of the layers of one model. A copy of it knows no layers until :meth:`of` is called.

    Attributes:
        layers: the layers.
        sharding: how FSDP2 has cut the gated tensors into shards; None if they are whole.
    """

    def __init__(self) -> None:
        self.layers: list[SubnetLayer] = []
        self._plan: Plan = {}
        self._gradient_plan: Plan = {}
        self._lending: Lending | None = None
        self._lent: Sequence[Loan] = ()
        self._ahead: Ahead | None = None
        self._factor: Tensor | None = None
        self._clipped: Sequence[_Clipped] = ()
        self._promised: frozenset[int] = frozenset()
        self.sharding: Sharding | None = None

    def __reduce__(self) -> tuple[type[ModelGates], tuple[()]]:
        return ModelGates, ()

    def of(self, layers: Iterable[SubnetLayer]) -> ModelGates:
        """From now on these are the layers."""
        self.layers = list(layers)
        self._lending = self._ahead = None
        return self

    # --- a forward pass of the model
    def give(self) -> bool:
        """Give every layer the masked tensors for the forward pass that begins, as far as they exist: in training those
        that were made ahead, for a finished task those that are kept. Returns whether :meth:`take_back` is due."""
        if torch.compiler.is_compiling() or recording() or not self.layers or are_active():
            return False
        if self.layers[0]._active_row is not None:
            return self._give_kept()
        if not torch.is_grad_enabled():
            return False
        if self.layers[0].gate_state.keeps_others():  # training will change the weights that they were made from
            self.drop_kept()
        try:
            return not in_parallel() and self._give_ready()
        except BaseException:
            self.take_back()
            raise

    def drop_kept(self) -> None:
        """Drop the masked tensors of finished tasks."""
        for layer in self.layers:
            layer.gate_state.drop_kept()

    def take_back(self) -> None:
        """The forward pass of the model is over. The graph of autograd is the loss's alone: if something here kept it,
        the nodes that accumulate gradients would stay on the stream of the first pass, which no CUDA graph can
        capture."""
        for layer in self.layers:
            layer.gate_state.settle()
        for loan in self._lent:
            loan.given.masked = loan.ready.masked
        self._lent = ()

    def _give_ready(self) -> bool:
        lending = self._lending
        if lending is None or not lending.holds():
            lending = self._lending = Lending(self.layers)
        lent = lending.whole if lending.is_fresh() else Lent.of([loan for loan in lending.loans if loan.is_fresh()])
        if not lent.loans:
            return False
        again = {
            id(loan.gate): partial(loan.state.begin_gradient, loan.name)
            for loan in lent.loans
            if loan.name in loan.state.passes and loan.gate.raw
        }
        self._lent = lent.loans
        masked_tensors = ModelGate.apply(lent.gates, again, self._gradient_plan, *lent.inputs)
        for loan, masked in zip(lent.loans, masked_tensors, strict=True):
            loan.given.masked = masked
            loan.state.given[loan.name] = loan.given
        return True

    def _give_kept(self) -> bool:
        # The first layer holds it, so that it goes when the layers drop what they keep.
        shown: _Shown | None = self.layers[0].gate_state.kept.of_model
        if shown is None or not self._is_right(shown):
            shown = self._show_kept()
            self.layers[0].gate_state.kept.of_model = shown
        if shown is None:
            return False
        for state, given in shown.given:
            state.given = given
        return True

    def _show_kept(self) -> _Shown | None:
        """What the layers keep of the finished task, in the dtypes of its last pass; None if one keeps nothing yet."""
        kept: list[Kept] = []
        states: list[GateState] = []
        names: list[str] = []
        given: list[tuple[GateState, dict[str, Given]]] = []
        for layer in self.layers:
            of_layer: dict[str, Given] = {}
            for gate in layer.gated():
                packed = layer._buffers[f"{gate.name}_view"]
                if layer.gate_state.compiled and packed is not None:  # compiled code keeps nothing itself
                    dtype = layer.dtype_of_pass(gate.param)
                    layer.gate_state.masked_of_finished(gate.name, gate.param, packed, dtype, layer._backend)
                one = layer.gate_state.kept.get(gate.name)
                if one is None or one.param is not gate.param or one.packed is not packed:
                    return None
                if not one.is_right(layer._backend):
                    return None
                kept.append(one)
                states.append(layer.gate_state)
                names.append(gate.name)
                of_layer[gate.name] = Given(one.masked, one.param, version=one.param._version)
            given.append((layer.gate_state, of_layer))
        sources = [tensor for one in kept for tensor in (one.param, one.packed)]
        addresses = [tensor.data_ptr() for tensor in sources]
        backends = [layer._backend for layer in self.layers]
        versions = [*map(VERSION, sources)]
        return _Shown(self.layers, kept, states, names, given, sources, versions, addresses, backends)

    def _is_right(self, shown: _Shown) -> bool:
        """Whether nothing has changed since."""
        present = map(dict.get, map(KEPT, shown.states), shown.names)  # None where a layer was left or moved
        return (
            shown.layers is self.layers
            and all(map(is_, present, shown.kept))
            and shown.versions == [*map(VERSION, shown.sources)]
            and shown.addresses == [*map(Tensor.data_ptr, shown.sources)]
            and shown.backends == [*map(BACKEND, self.layers)]
        )

    # --- gates ahead
    def make_ahead(self, owned: set[int]) -> None:
        """Make the gates of those tensors that took part in a training forward pass, in the dtype of that pass.

        What an optimizer of :mod:`wsn_fast.optim` has made in its step is not made again.

        Args:
            owned: the ids of the parameters that the optimizer has updated.
        """
        if self._ahead is None or not self._ahead.holds(owned):
            self._ahead = Ahead(
                [layer for layer in self.layers if any(id(gate.param) in owned for gate in layer.gated())], owned
            )
        self._ahead.make(self._plan)

    # --- clipping
    def clip(self, factor: Tensor, gradients: Iterable[tuple[SubnetLayer, str, Tensor]]) -> None:
        """The step will scale these raw gradients by ``factor``, a 0-d tensor."""
        self._factor = factor
        self._clipped = [
            _Clipped(layer, name, grad, grad._version, layer.gate_state.noted, layer.gate_state.passes.get(name))
            for layer, name, grad in gradients
        ]

    def clipping_factor(self) -> Tensor | None:
        """The factor that clipping gave the present gradients; None without clipping.

        Raises:
            RuntimeError: gradients changed after they were clipped; this clipping is forgotten.
        """
        mine = False
        for layer, name, grad, version, noted, last in self._clipped:
            state = layer.gate_state
            now = (layer.param(name) if state.shards is None else state.shards[name].param).grad
            now = None if now is None else local(now)
            replaced = now is not None and state.noted == noted and state.passes.get(name) is last
            if (now is grad and grad._version != version) or (now is not grad and replaced):
                self.forget_clipping()  # else each later step would be refused too
                raise RuntimeError(
                    "gradients changed after clip_grad_norm_: clip after the last backward pass and unscale_"
                )
            mine |= now is grad
        return self._factor if mine else None

    def forget_clipping(self) -> None:
        """The gradients are gone, or used."""
        self._factor, self._clipped = None, ()

    # --- the guard's share
    def promise(self, ids: Iterable[int]) -> None:
        """The guard leaves the parameters with these ids to the optimizer's own update in the step that begins."""
        self._promised = frozenset(ids)

    def check_promised(self, others: Iterable[Tensor]) -> None:
        """Raise ``RuntimeError`` if one of ``others``, which torch's step will update, was left to the optimizer."""
        promised, self._promised = self._promised, frozenset()
        if promised and any(id(p) in promised for p in others):
            raise RuntimeError(
                "a closure or a hook changed which gated tensors have gradients, or which optimizer owns them, during "
                "the step: do this before optimizer.step()"
            )

    # --- a captured step
    def settings(self) -> list[Any]:
        """What a CUDA graph fixes of the gates, beside their tensors."""
        return [*map(GATE_SETTINGS, self.layers)]

    def tensors(self) -> list[Tensor]:
        """The gated tensors and their scores."""
        if self.sharding is not None:
            return [tensor for gate in self.sharding.gates for tensor in (gate.param, gate.score)]
        found = []
        for layer in self.layers:
            parameters = layer._parameters
            for name in layer.TENSORS:
                found.append(parameters[name] if name in parameters else getattr(layer, name))
        return [tensor for tensor in found if tensor is not None]

    def are_ready(self) -> bool:
        """Whether all gates that were made ahead are up to date."""
        return all(layer.gate_state.is_ready(layer) for layer in self.layers)

    def restamp(self) -> None:
        """The replay of a CUDA graph changed weights and scores, and made the gates of the new ones."""
        for layer in self.layers:
            layer.gate_state.restamp(layer)


def in_parallel() -> bool:
    """Whether several processes train the model. Their gradients are reduced while backward runs, so each layer then
    has a Function of its own."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
