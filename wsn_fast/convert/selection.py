"""Which tensors of a model are gated, and with which density. Nothing here changes the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import ops
from ..nn import per_task
from ..nn.densities import Densities, check_densities
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.registry import product_class
from ..nn.tensors import is_matrix, obstacle_of
from . import slices
from .patterns import as_patterns, matches, names_it
from .problems import Problems

FilterFn = Callable[[nn.Module, str], bool]
Names = dict[nn.Module, list[str]]
"""Every module with all its names."""
Chosen = dict[nn.Module, tuple[str, ...]]
"""The modules to convert, in the order of the model, each with the names of the Parameters in it that are gated."""


def all_names(model: nn.Module) -> Names:
    """All modules of ``model`` with their names. Raises ``ValueError`` for one that is not initialised yet."""
    names: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"{shown(name)} is not initialised yet: run a batch through the model first")
    return names


def shown(name: str) -> str:
    """The name of a module for an error message."""
    return name or "(the model itself)"


def tensor_names(own: Iterable[str], attribute: str) -> list[str]:
    """The names of a tensor of a module that has the names ``own``."""
    return [f"{name}.{attribute}".lstrip(".") for name in own]


class Left(NamedTuple):
    """A Parameter that stays as it is.

    Attributes:
        name: its name.
        kind: the name of the class of its module.
        tensor: the Parameter.
        reason: why it is left out.
        asked: whether an argument of the user left it out.
    """

    name: str
    kind: str
    tensor: Tensor
    reason: str
    asked: bool


class Selection(NamedTuple):
    """What the user wants gated, by the arguments of :func:`wsn_fast.convert`."""

    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    filter_fn: FilterFn | None

    def left_by(self, own: list[str], attribute: str) -> str:
        """The argument that leaves a Parameter out by its name; empty if none does."""
        names = tensor_names(own, attribute)
        if any(matches(pattern, name) for pattern in self.excluded or () for name in names):
            return "exclude_modules"
        if self.targets is not None and not any(matches(p, name) for p in self.targets for name in names):
            return "target_modules"
        return ""

    def names_tensor(self, own: list[str], attribute: str) -> bool:
        """Whether a pattern of ``target_modules`` names this very Parameter, and not only its module."""
        return any(names_it(p, name) for p in self.targets or () for name in tensor_names(own, attribute))

    def check_used(self, known: Iterable[str], problems: Problems) -> None:
        """Note each pattern that matches none of the names ``known``: it is a typo, probably."""
        known = list(known)
        for argument, patterns in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            for pattern in patterns or ():
                if not any(matches(pattern, name) for name in known):
                    listed = [*dict.fromkeys(name.rpartition(".")[0] or name for name in known)]
                    problems.add(f"{argument}={pattern!r} matches nothing that can be gated; there is: {listed}")


def choose(
    names: Names, selection: Selection, classifiers: Collection[nn.Module], problems: Problems
) -> tuple[Chosen, list[Left]]:
    """The modules to convert with their tensors, and the Parameters that are left out.

    Args:
        names: all modules of the model.
        selection: what the user asked for.
        classifiers: modules that heads will replace, with what is inside them; they are not converted.
        problems: notes that a pattern matches nothing, or that nothing is left to convert.
    """
    of_heads = {m for heads in names if isinstance(heads, TaskHeads) for m in heads.heads.modules()} | {*classifiers}
    chosen: Chosen = {}
    left: list[Left] = []
    known: list[str] = []
    for module, own in names.items():
        if isinstance(module, SubnetLayer):
            known += (name for attribute in module.GATED for name in tensor_names(own, attribute))
        elif not per_task.is_norm(module):
            known += (name for attribute, _ in module._parameters.items() for name in tensor_names(own, attribute))
            gated, others = ((), []) if module in of_heads else _of_module(module, own, selection)
            left += others
            if gated and (selection.filter_fn is None or selection.filter_fn(module, own[0])):
                chosen[module] = gated
            else:
                places = [(tensor_names(own, attribute)[0], module._parameters[attribute]) for attribute in gated]
                left += (Left(n, type(module).__name__, p, "filter_fn", True) for n, p in places if p is not None)
    selection.check_used(known, problems)
    if not chosen and not any(isinstance(module, SubnetLayer) for module in names):
        rejected = sorted({one.name.rpartition(".")[0] for one in left if one.asked})
        unasked = ", ".join(f"{one.name} ({one.reason})" for one in left if not one.asked)
        why = [f"filter_fn, target_modules and exclude_modules rejected all of {rejected}"] if rejected else []
        why += [f"left out are {unasked}"] if unasked else []
        none = "it has no matrix outside of heads and normalisation layers"
        problems.add(f"model has no layer to convert: {'; '.join(why) or none}")
    return chosen, left


def _of_module(module: nn.Module, own: list[str], selection: Selection) -> tuple[tuple[str, ...], list[Left]]:
    """The Parameters of one module that are gated, and the others."""
    gated: list[str] = []
    left: list[Left] = []
    product = product_class(module)
    for attribute, param in module._parameters.items():
        if param is None:
            continue
        reason, asked = selection.left_by(own, attribute), True
        if not reason:
            reason, asked = _obstacle(attribute, param, product is not None), False
            if reason and selection.names_tensor(own, attribute) and param.dtype in ops.SCORE_DTYPES and param.numel():
                reason = ""
            reason = reason or obstacle_of(module, attribute, product)
        if reason:
            left.append(Left(tensor_names(own, attribute)[0], type(module).__name__, param, reason, asked))
        else:
            gated.append(attribute)
    return tuple(gated), left


def _obstacle(attribute: str, param: Tensor, of_product: bool) -> str:
    """Why a Parameter is not gated unless the user names it; empty if it is gated."""
    if param.dtype not in ops.SCORE_DTYPES:
        return f"scores cannot have the dtype {param.dtype}"
    if not param.numel():
        return "it is empty"
    if of_product:
        return ""
    if not (is_matrix(param) or "bias" in attribute):
        return "it is a vector and no bias"
    return "" if param.requires_grad else "it is constant (requires_grad=False)"


def densities_of(
    names: Names, chosen: Chosen, density: float | Mapping[str, slices.Density], problems: Problems
) -> dict[nn.Module, Densities]:
    """The density of the tensors of each chosen module. Notes what is wrong with the patterns. In ``chosen``, attention
    that will be split (see :mod:`wsn_fast.convert.slices`) gets the names that its tensors will have.

    Raises:
        TypeError, ValueError: a density is no number in (0, 1].
    """
    if not isinstance(density, Mapping):
        return dict.fromkeys(chosen, ops.check_density(density))
    as_patterns("density", density)
    by_pattern = {p: slices.check_density(d, f"density[{p!r}]") for p, d in density.items()}
    densities: dict[nn.Module, Densities] = {}
    # A pattern may also name layers that an earlier call converted. They stay as they are.
    unused = by_pattern.keys() - {"*"}
    for module in (*chosen, *(m for m in names if isinstance(m, SubnetLayer))):
        found = {a: _first(by_pattern, names[module], a) for a in chosen.get(module) or module.GATED}  # type: ignore[union-attr]
        unused -= {*found.values()}
        if module in chosen:
            lacking = [attribute for attribute, pattern in found.items() if pattern is None]
            if lacking:
                what = (
                    shown(names[module][0])
                    if len(lacking) == len(found)
                    else tensor_names(names[module], lacking[0])[0]
                )
                problems.add(f"density has no pattern for {what} ('*' takes the rest)")
            else:
                try:
                    each = slices.spread(module, {a: by_pattern[p] for a, p in found.items() if p is not None})
                except ValueError as error:
                    problems.add(f"density: {shown(names[module][0])}: {error}")
                else:
                    chosen[module], densities[module] = tuple(each), check_densities(each)
    if unused:
        problems.add(
            f"density: the patterns {sorted(unused)} have no effect: they match no layer to convert, or an earlier "
            "pattern matches all their layers"
        )
    return densities


def _first(patterns: Iterable[str], own: list[str], attribute: str) -> str | None:
    return next((p for p in patterns if any(matches(p, name) for name in tensor_names(own, attribute))), None)


def gated_places(chosen: Chosen, names: Names) -> Iterator[tuple[nn.Module, str]]:
    """Each module with the name of a tensor in it that is gated, or will be."""
    for module, attributes in chosen.items():
        yield from ((module, attribute) for attribute in attributes)
    for module in names:
        if isinstance(module, SubnetLayer):
            yield from ((module, attribute) for attribute in module.GATED)
