"""What convert refuses, because the converted model would not compute what the user expects. Nothing here changes the
model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import nn

from ..nn import per_task
from ..nn.densities import Densities, density_of
from ..nn.gated import SubnetLayer
from .problems import Problems
from .selection import Chosen, Names, gated_places, shown

BATCH_NORMS = ("per_task", "stateless")
BATCH_NORM_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Gate(NamedTuple):
    """How the tensors of a module will be gated."""

    density: Densities
    rule: str


def check_modules(names: Names, chosen: Chosen, problems: Problems) -> None:
    """Note modules that do with their tensors what a masked tensor does not allow."""
    for module in chosen:
        name = shown(names[module][0])
        for option in ("max_norm", "sparse"):
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and getattr(module, option) not in (None, False):
                what = "writes to its weight in forward" if option == "max_norm" else "has sparse gradients"
                problems.add(
                    f"{name} ({type(module).__name__}) has {option}={getattr(module, option)}: it {what}, which a "
                    "gated weight cannot have. Set it off, or exclude the module (exclude_modules)"
                )


class _Use(NamedTuple):
    """A place where a Parameter is registered."""

    name: str
    module: nn.Module
    attribute: str
    param: nn.Parameter


def check_ties(
    names: Names, chosen: Chosen, gates: Mapping[nn.Module, Gate], classifiers: Container[nn.Module], problems: Problems
) -> None:
    """Note the Parameters that modules share and that are not gated alike wherever they are.

    Args:
        names: all modules of the model.
        chosen: the modules to convert with their tensors.
        gates: the gate of each of them.
        classifiers: modules that heads will replace, with what is inside them.
        problems: gets what is wrong.
    """
    ours = {*gated_places(chosen, names)}
    uses: defaultdict[int, list[_Use]] = defaultdict(list)
    for module, own in names.items():
        for attribute, param in module._parameters.items():
            if param is not None and module not in classifiers:
                # Tensors on the meta device have no memory, so only their identity tells them apart.
                use = _Use(f"{own[0]}.{attribute}".lstrip("."), module, attribute, param)
                uses[param.data_ptr() or id(param)].append(use)
    for tied in uses.values():
        gated = [use for use in tied if (use.module, use.attribute) in ours]
        if len(tied) > 1 and gated:
            _check_tie(tied, gated, gates, problems)


def _check_tie(tied: list[_Use], gated: list[_Use], gates: Mapping[nn.Module, Gate], problems: Problems) -> None:
    bare = [use.name for use in tied if use not in gated]
    if bare:
        names = [use.name for use in gated]
        problems.add(
            f"{', '.join(names)} and {', '.join(bare)} are one tied parameter, and only the first would be masked: "
            f"gate all of them, or exclude {' and '.join(names)} (exclude_modules), make the module a head (heads) or "
            "untie them"
        )
    elif any(use.param is not tied[0].param for use in tied):
        problems.add(
            f"{tied[0].name} and {tied[-1].name} share memory but are not one Parameter: make them one, or copy one"
        )
    else:
        shared = {use.name: _gate(use, gates) for use in tied}
        if len({*shared.values()} - {None}) > 1:
            problems.add(f"one tied parameter needs one density and rule: {shared}")


def _gate(use: _Use, gates: Mapping[nn.Module, Gate]) -> Gate | None:
    module = use.module
    gate = Gate(module.density, module.rule) if isinstance(module, SubnetLayer) else gates.get(module)
    return None if gate is None else Gate(density_of(gate.density, use.attribute), gate.rule)


def check_batch_norm(names: Names, batch_norm: str, problems: Problems) -> None:
    """Note it if ``batch_norm`` is unknown, or is "stateless" after an earlier conversion with "per_task"."""
    if batch_norm not in BATCH_NORMS:
        problems.add(f"batch_norm must be one of {BATCH_NORMS}, got {batch_norm!r}")
    for module, own in names.items():
        if batch_norm == "stateless" and isinstance(module, BATCH_NORM_CLASSES) and per_task.marked(module):
            problems.add(
                f"batch_norm must be 'per_task', got 'stateless': an earlier convert made {shown(own[0])} per-task. "
                "For 'stateless', convert a new model"
            )
