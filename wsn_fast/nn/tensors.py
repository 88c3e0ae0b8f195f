"""Gated tensors of modules of any class: embeddings, attention, recurrent layers, experts, bare Parameters.

The class of such a module is changed in place to one that is made when it is needed. It derives from the class that the
module had, whose ``forward`` runs as it is and gets the masked tensors when it reads the attributes (see
:mod:`wsn_fast.nn.reads`). The Parameters stay what they are, so the names of a ``state_dict`` stay too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .gated import SubnetLayer
from .reads import MadeClass, scoped_methods

_MAY_SHARE = frozenset(
    {"forward", "extra_repr", "reset_parameters", "training", "_apply", "_load_from_state_dict"}
    | {"flatten_parameters", "_flat_weights", "_flat_weights_names"}
)


class GatedModule(SubnetLayer, MadeClass):
    """A module with gated tensors, of which :func:`gated_class` makes the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not in forward, because hooks read tensors too: those of torch.nn.utils.weight_norm compute the weight.
        scope = self.gate_state.scope
        if scope.is_open():
            return super().__call__(*args, **kwargs)
        return scope(super().__call__, *args, **kwargs)

    def fan_in(self, name: str) -> int:
        """As torch counts it: the elements of ``tensor[0]``. A vector has that of the first matrix of the module, as
        the bias of a linear layer has, or else its own length."""
        tensors: list[Tensor] = [self.param(name), *(gate.param for gate in self.gated())]
        matrix = next((tensor for tensor in tensors if is_matrix(tensor)), None)
        return tensors[0].numel() if matrix is None else matrix[0].numel()


class GatedRecurrent(GatedModule):
    """An ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU``: they compute with a list of their tensors and not with attributes."""

    _flat_weights_names: list[str]

    def _complete(self) -> None:
        self.__dict__.pop("_flat_weights", None)  # else tensors that were replaced would stay there

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, tensors: list[Tensor]) -> None:
        """Ignore the list, which torch makes anew when it moves the module: it is made at each reading."""

    def flatten_parameters(self) -> None:
        """Make the Parameters one block of memory for cuDNN. Masked tensors stay where they are: the next step may
        write to them."""
        if not self.gate_state.scope.are_masked():
            super().flatten_parameters()  # type: ignore[misc]  # of nn.RNNBase

    def become_dense(self, params: Any) -> None:
        super().become_dense(params)
        self._init_flat_weights()  # type: ignore[operator]  # of nn.RNNBase


@cache
def gated_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[SubnetLayer]:
    """The class that modules of the class ``kind`` become when their Parameters ``names`` are gated."""
    base = GatedRecurrent if issubclass(kind, nn.RNNBase) else GatedModule
    attributes = {"MADE_BY": (gated_class, kind, names), "GATED": names, "DENSE": kind, "__module__": __name__}
    return type(f"Subnet{kind.__name__}", (base, kind), {**scoped_methods(kind), **attributes})


@cache
def derived_class(layer: type[SubnetLayer], kind: type[nn.Module]) -> type[SubnetLayer]:
    """The class that modules of the class ``kind`` become, which derives from the dense class of ``layer`` and has no
    forward of its own."""
    attributes = {"MADE_BY": (derived_class, layer, kind), "DENSE": kind, "__module__": __name__}
    return type(f"FastSubnet{kind.__name__}", (MadeClass, layer, kind), attributes)


def is_matrix(tensor: Tensor) -> bool:
    """Whether at least two dimensions are longer than 1."""
    return sum(length > 1 for length in tensor.shape) > 1


def colliding_name(module: nn.Module, layer: type[SubnetLayer]) -> str | None:
    """An attribute of ``module`` that has the name of one of the class ``layer``, which would hide it; None if there is
    none."""
    ours = {name for kind in layer.__mro__ if issubclass(kind, SubnetLayer | MadeClass) for name in vars(kind)}
    ours = {name for name in ours if not name.startswith("__")} - _MAY_SHARE - {*layer.GATED}
    ours |= {*SubnetLayer.OWN, "DENSE", "MADE_BY"}
    known = getattr(layer, "DENSE", nn.Module).__mro__
    classes = [kind for kind in type(module).__mro__ if kind not in known and kind not in nn.Module.__mro__]
    theirs = {*vars(module), *module._parameters, *module._buffers, *module._modules}.union(*map(vars, classes))
    return min(ours & theirs, default=None)


def obstacle_of(module: nn.Module, attribute: str, layer: type[SubnetLayer] | None) -> str:
    """Why the Parameter ``attribute`` of ``module`` cannot be gated; empty if it can.

    Args:
        module: the module, not converted.
        attribute: the name of the Parameter in it.
        layer: the fast class that the module would become; None if there is none.
    """
    param = module._parameters[attribute]
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has compiled its module"
    if not isinstance(param, nn.Parameter):
        return "it is no nn.Parameter: something computes it"
    try:
        same = getattr(module, attribute) is param
    except Exception:  # of a property of the module
        same = False
    if not same:
        return "its attribute returns something else than the Parameter"
    recurrent = GatedRecurrent if isinstance(module, nn.RNNBase) else GatedModule
    colliding = colliding_name(module, layer or recurrent)
    names = (f"{attribute}{end}" for end in ("_score", "_masks", "_union", "_view"))
    colliding = colliding or next((name for name in names if hasattr(module, name)), None)
    return f"the attribute {colliding!r} of its module has a name that subnet layers use" if colliding else ""
