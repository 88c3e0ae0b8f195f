"""Finds the owner of each parameter and buffer. A tensor without an owner is an error, because a later task would
change what earlier tasks compute, and nobody would notice.

An owner is a gate (in subnet layers), a head (in ``TaskHeads``), or a declaration: ``per_task`` (a copy per task; the
default for normalisation layers), ``frozen`` (trained in the first task, then fixed) or ``shared`` (may forget).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ..convert.patterns import matches
from ..nn import per_task
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads

KINDS = ("per_task", "frozen", "shared")
_RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class OwnershipError(ValueError):
    """Parameters or buffers that tasks share have no owner; ``names`` lists them."""

    def __init__(self, names: list[str]) -> None:
        listed = "\n  ".join(names)
        super().__init__(
            "these parameters and buffers are neither gated, nor in TaskHeads, nor declared, so training a later task "
            f"would change what earlier tasks compute:\n  {listed}\n"
            "Declare each in WSN(model, per_task=[...], frozen=[...], shared=[...]) by name or pattern: per_task keeps "
            "a copy per task, frozen trains it in the first task only, shared lets earlier tasks forget."
        )
        self.names = names


class Owned(NamedTuple):
    """A tensor that is neither gated nor in a head. ``kind`` is one of ``KINDS``, or None if it has no owner."""

    name: str
    kind: str | None
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor


def classify(model: nn.Module, declared: dict[str, tuple[str, ...]]) -> list[Owned]:
    """List every tensor of ``model`` that is neither gated nor in a head, with its owner.

    Args:
        model: the converted model.
        declared: for each of ``KINDS`` the name patterns that the user gave.

    Raises:
        ValueError: a pattern matches nothing; a tensor is declared twice; running statistics are declared ``frozen``;
            one Parameter under two names has two owners.
    """
    found: list[Owned] = []
    unmatched = {(kind, pattern) for kind, patterns in declared.items() for pattern in patterns}
    for name, module, attribute in _shared_tensors(model):
        hits = [(k, p) for k, patterns in declared.items() for p in patterns if matches(p, name)]
        unmatched.difference_update(hits)
        kinds = {kind for kind, _ in hits}
        if len(kinds) > 1:
            raise ValueError(f"{name} is declared as {' and as '.join(sorted(kinds))}; one owner is needed")
        kind = next(iter(kinds), None)
        if kind is None and (per_task.is_norm(module) or attribute in per_task.marked(module)):
            kind = "per_task"
        if kind == "frozen" and attribute in _RUNNING_STATISTICS:
            raise ValueError(
                f"{name} cannot be frozen: running statistics change in every training forward. Leave them per_task "
                "(the default)."
            )
        found.append(Owned(name, kind, module, attribute))
    if unmatched:
        kind, pattern = min(unmatched)
        raise ValueError(f"{kind}={pattern!r} matches no parameter or buffer that is neither gated nor in TaskHeads")
    _check_ties(model, found)
    return found


def mark_per_task(owned: Iterable[Owned], finished: int) -> None:
    """Make each tensor of kind ``per_task`` per task, and undo this for tensors that the user declared otherwise.

    Raises:
        ValueError: ``finished`` tasks have ended already and were trained with other owners. If this is raised, nothing
            has been changed.
    """
    wanted: dict[nn.Module, list[str]] = {}
    for item in owned:
        names = wanted.setdefault(item.module, [])
        if item.kind == "per_task":
            names.append(item.attribute)
    for module, names in wanted.items():
        changed = set(names) ^ set(per_task.marked(module))
        if finished and changed:
            raise ValueError(
                f"{type(module).__name__}.{min(changed)} cannot change its owner to or from per_task: {finished} tasks "
                "have ended already. Pass the per_task=, frozen= and shared= patterns that they were trained with"
            )
    for module, names in wanted.items():
        if set(per_task.marked(module)) - set(names):
            per_task.unmark(module)
        per_task.mark(module, names)


def check_owned(owned: Iterable[Owned]) -> None:
    """Raise :class:`OwnershipError`, which names every tensor without an owner, if there is one."""
    unowned = [item.name for item in owned if item.kind is None]
    if unowned:
        raise OwnershipError(unowned)


def _shared_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (full name, module, attribute) of all tensors except gated ones, heads, and those that this library
    added."""
    of_one_task = {m for heads in model.modules() if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    for prefix, module in model.named_modules():
        if module in of_one_task:
            continue
        prefix = prefix.replace("_orig_mod.", "").removesuffix("_orig_mod")
        ours = {f"{name}{end}" for name in per_task.marked(module) for end in ("_tasks", "_live")}
        if isinstance(module, TaskHeads):
            ours.add("_device_and_dtype")
        if isinstance(module, SubnetLayer):
            ours |= {f"{name}{end}" for name in module.GATED for end in ("", "_score", "_masks", "_union", "_view")}
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and attribute not in ours:
                yield f"{prefix}.{attribute}".lstrip("."), module, attribute


def _check_ties(model: nn.Module, found: list[Owned]) -> None:
    """Raise ``ValueError`` if a tied Parameter has two owners. If one of them is a gate, the other would read the
    weight without the mask."""
    gated = {
        id(gate.param): f"{prefix}.{gate.name}"
        for prefix, layer in model.named_modules()
        if isinstance(layer, SubnetLayer)
        for gate in layer.gated()
    }
    owners: dict[int, Owned] = {}
    for item in found:
        if id(item.tensor) in gated:
            raise ValueError(
                f"{item.name} and the gated {gated[id(item.tensor)]} are one tied parameter. Whatever reads "
                f"{item.name} reads it without the mask, so its result would change when later tasks train. Untie "
                "them, or leave the gated layer out of the conversion."
            )
        first = owners.setdefault(id(item.tensor), item)
        if first.kind != item.kind:
            raise ValueError(
                f"{first.name} ({first.kind}) and {item.name} ({item.kind}) are one tied parameter with two owners"
            )


def fix(params: list[nn.Parameter], before: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Stop the training of ``params``, which must not change any more, and return them. Those of ``before`` that are no
    longer among them are trained again."""
    for param in {*before} - {*params}:
        param.requires_grad_(True)
    for param in params:
        if param.requires_grad:
            param.requires_grad_(False)
        if param.grad is not None:
            param.grad = None
    return params
