"""What convert refuses, because the converted model would not compute what the user expects. Nothing here changes the
model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import nn

from .. import ops
from ..nn import per_task
from ..nn.gated import SubnetLayer
from .selection import Names, shown

BATCH_NORMS = ("per_task", "stateless")
BATCH_NORM_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Gate(NamedTuple):
    """How a layer will be gated."""

    density: float
    rule: str


def check_layer(module: nn.Module, name: str) -> None:
    """Raise ``ValueError`` for a layer that cannot be converted by changing its class."""
    for attribute in ("weight", "bias"):
        param = module._parameters.get(attribute)
        if param is not getattr(module, attribute):
            raise ValueError(
                f"{name}.{attribute} is computed (weight_norm, spectral_norm, pruning, another parametrization), "
                "so there is nothing to gate: remove the parametrization, or exclude the layer"
            )
        if param is not None and (param.dtype not in ops.SCORE_DTYPES or not param.numel()):
            raise ValueError(
                f"{name}.{attribute} must be non-empty and of a dtype in {ops.SCORE_DTYPES}, got "
                f"{param.dtype} {tuple(param.shape)}: exclude the layer"
            )
    if "forward" in vars(module):
        raise ValueError(
            f"{name}.forward was replaced on this object, so the mask would not be applied: restore the forward of the "
            "class, or exclude the layer"
        )


class _Use(NamedTuple):
    """A place where a Parameter is registered."""

    name: str
    module: nn.Module
    param: nn.Parameter


def check_ties(names: Names, gates: Mapping[nn.Module, Gate], classifiers: Container[nn.Module]) -> None:
    """Raise ``ValueError`` unless all layers that share a weight are gated alike and nothing else reads that weight.

    Args:
        names: all modules of the model.
        gates: the layers to convert, each with its gate.
        classifiers: modules that heads will replace, with what is inside them.
    """
    uses: defaultdict[int, list[_Use]] = defaultdict(list)
    for module, own in names.items():
        for attribute, param in module._parameters.items():
            if param is not None and module not in classifiers:
                # Tensors on the meta device have no memory, so only their identity tells them apart.
                use = _Use(f"{own[0]}.{attribute}".lstrip("."), module, param)
                uses[param.data_ptr() or id(param)].append(use)
    for tied in uses.values():
        ours = [use for use in tied if use.module in gates]
        if len(tied) == 1 or not ours:
            continue
        ungated = [use for use in tied if use.module not in gates and not isinstance(use.module, SubnetLayer)]
        if ungated:
            raise ValueError(
                f"{ours[0].name} is tied to {ungated[0].name}, which is not converted and would read the weight "
                f"without the mask: exclude the layer of {ours[0].name} (exclude_modules), make it a head (heads) or "
                "untie the two"
            )
        if any(use.param is not tied[0].param for use in tied):
            raise ValueError(
                f"{tied[0].name} and {tied[-1].name} share memory but are not one Parameter: make them one, or copy one"
            )
        shared = {use.name: _gate(use.module, gates) for use in tied}
        if len(set(shared.values())) > 1:
            raise ValueError(f"one tied parameter needs one density and rule: {shared}")


def _gate(module: nn.Module, gates: Mapping[nn.Module, Gate]) -> Gate:
    return Gate(module.density, module.rule) if isinstance(module, SubnetLayer) else gates[module]


def check_batch_norm(names: Names, batch_norm: str) -> None:
    """Raise ``ValueError`` if ``batch_norm`` is unknown, or is "stateless" after an earlier conversion with
    "per_task"."""
    if batch_norm not in BATCH_NORMS:
        raise ValueError(f"batch_norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
    for module, own in names.items():
        if batch_norm == "stateless" and isinstance(module, BATCH_NORM_CLASSES) and per_task.marked(module):
            raise ValueError(
                f"batch_norm must be 'per_task', got 'stateless': an earlier convert made {shown(own[0])} per-task. "
                "For 'stateless', convert a new model"
            )
