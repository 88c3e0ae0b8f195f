"""The gated parameters that the subnet optimizers update themselves: where each is in the model, and in which param
groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import ops
from ..nn.gate_state import GateState, Pass
from ..nn.gated import SubnetLayer
from ..nn.model_gates import ModelGates
from ..nn.shards import address
from ..ops.raw_gradients import RawGradient

Group = dict[str, Any]


@runtime_checkable
class Model(Protocol):
    """The part of :class:`wsn_fast.WSN` that the optimizers need."""

    gates: ModelGates

    def parameters(self) -> Iterable[Tensor]:
        """All parameters."""

    def subnet_layers(self) -> dict[str, SubnetLayer]:
        """The subnet layers by name."""

    def guard(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep what finished tasks use."""


@dataclass(slots=True, eq=False)
class GatedParam:
    """A gated tensor that an optimizer updates itself.

    Attributes:
        name: in the model.
        layer, state: its layer, and the state of the gates of the layer.
        tensor, union: its name in the layer, and that of its union.
        param, score: the tensor and its scores.
        about: what is known about the raw gradient of the tensor.
        group, score_group: their param groups.
    """

    name: str
    layer: SubnetLayer
    state: GateState
    tensor: str
    union: str
    param: Tensor
    score: Tensor
    about: RawGradient
    group: Group
    score_group: Group

    def check_in_place(self) -> None:
        """Raise ``RuntimeError`` if another tensor has taken the place of this one in its layer."""
        parameters = self.layer._parameters
        if parameters.get(self.tensor) is not self.param or parameters.get(f"{self.tensor}_score") is not self.score:
            raise RuntimeError(
                f"{self.name} or its scores were replaced after this optimizer was built: build the optimizer again"
            )

    def has_changed(self) -> bool:
        """Whether the tensors that the raw gradient has to be combined with have changed since a forward pass that it
        comes from. Compiled code does not tell."""
        last, param, score = self.state.passes.get(self.tensor), self.param, self.score
        # The last part of a stamp is the density, which may differ for the next gate.
        now = param._version, score._version, address(param), address(score), self.layer.rule
        return last is not None and bool(last.stamp) and last.stamp[:-1] != now

    def drop_zeros(self) -> None:
        """Forget gradients of zeros that come from no forward pass: ``zero_grad(set_to_none=False)`` of a module leaves
        them where a layer, or a loss that read scores, was left out afterwards."""
        for tensor in (self.score, *(() if self.tensor in self.state.passes else (self.param,))):
            if tensor.grad is not None and not bool(tensor.grad.any()):
                tensor.grad = None

    def drop_gradient(self) -> None:
        """Forget the raw gradient, which no step can use any more, and its forward passes."""
        self.param.grad = None
        self.state.passes.pop(self.tensor, None)

    def checked_pass(self) -> Pass:
        """The last forward pass that the raw gradient comes from.

        Raises:
            RuntimeError: there is none, or the scores have a gradient too. The message gives the name.
        """
        last, score = self.state.passes.get(self.tensor), self.score
        if last is None:
            raise RuntimeError(
                f"{self.name} has a gradient, but its layer was not called since the last step. Either some module "
                "reads it without its mask (exclude that layer from the conversion, or let the module call it), or "
                "this is a second step with one gradient"
            )
        if score.grad is not None:
            raise RuntimeError(
                f"the scores of {self.name} have a gradient of their own, which the one-pass mode cannot use: use "
                "one_pass=False for a loss that reads scores"
            )
        if self.state.shards is None and not self.state.traced and self.about.came_past():
            raise RuntimeError(
                f"{self.name} has a gradient that did not come through its layer: some code reads it without its mask, "
                "as a tied layer or a penalty on weights does. The one-pass mode cannot use it: let that code read "
                "layer.masked(name, dtype), or use one_pass=False"
            )
        return last

    def next_dtype(self) -> torch.dtype | None:
        """The dtype of the masked weight that a step outside the one-pass mode prepares for the next forward pass; None
        if it prepares none."""
        if self.state.gates_ahead and self.param.is_contiguous() and self.score.is_contiguous():
            return self.state.compute_dtypes.get(self.tensor)
        return None


def gated_params(layers: Iterable[tuple[str, SubnetLayer]], groups: Sequence[Group]) -> Iterator[GatedParam]:
    """The gated tensors of ``layers``, which have names in the model, with their param groups among ``groups``.

    Raises:
        RuntimeError: a tensor is in no group.
    """
    group_of = {id(param): group for group in groups for param in group["params"]}
    for prefix, layer in layers:
        for gate in layer.gated():
            name = f"{prefix}.{gate.name}".lstrip(".")
            both = [group_of.get(id(tensor)) for tensor in (gate.param, gate.score)]
            if both[0] is None or both[1] is None:
                raise RuntimeError(
                    f"{name} or its scores were replaced after this optimizer was built: build the optimizer again"
                )
            state = layer.gate_state
            yield GatedParam(
                name, layer, state, gate.name, f"{gate.name}_union", gate.param, gate.score,
                state.about_raw(gate.name), both[0], both[1],
            )  # fmt: skip


def param_groups(wsn: object, weight_decay: float, score_weight_decay: object) -> list[dict[str, Any]]:
    """The param groups of all parameters to train. Scores have a group of their own if their weight decay differs.

    Raises:
        TypeError: ``wsn`` is not a WSN.
        ValueError: ``score_weight_decay`` is not a number of at least 0.
    """
    if not isinstance(wsn, Model):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
    number = isinstance(score_weight_decay, Real) and not isinstance(score_weight_decay, bool)
    if not number or not 0 <= float(score_weight_decay) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"score_weight_decay must be a number of at least 0, got {score_weight_decay!r}")
    trained = [p for p in wsn.parameters() if p.requires_grad]
    if score_weight_decay == weight_decay:
        return [{"params": trained}]
    scores = {id(gate.score) for layer in wsn.subnet_layers().values() for gate in layer.gated()}
    return [
        {"params": [p for p in trained if id(p) not in scores]},
        {"params": [p for p in trained if id(p) in scores], "weight_decay": score_weight_decay},
    ]


def check_flags(**flags: object) -> None:
    """Raise ``TypeError`` if one of these arguments is no bool, and ``ValueError`` if it asks for something that the
    subnet optimizers do not have."""
    check_group({name: ops.check_bool(name, value) for name, value in flags.items()})


def check_accumulation(accumulate_in: object, one_pass: bool) -> str:
    """Return the dtype in which raw gradients in bfloat16 are added up.

    Raises:
        ValueError: it is unknown, or it is bfloat16 outside the one-pass mode, where gradients have the dtype of their
            parameter.
    """
    if accumulate_in not in ("float32", "bfloat16"):
        raise ValueError(f"accumulate_in must be 'float32' or 'bfloat16', got {accumulate_in!r}")
    if accumulate_in != "float32" and not one_pass:
        raise ValueError(f"accumulate_in must be 'float32' without one_pass=True, got {accumulate_in!r}")
    return str(accumulate_in)


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a param group asks for something that the subnet optimizers do not have."""
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} must be False, got {group[name]!r}: the subnet optimizers have no {name}")
