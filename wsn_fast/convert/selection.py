"""Which layers of a model are converted, and with which density. Nothing here changes the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .. import ops
from ..nn.gated import SubnetLayer
from ..nn.heads import TaskHeads
from ..nn.registry import LAYERS, subnet_class
from .patterns import as_patterns, matches

FilterFn = Callable[[nn.Module, str], bool]
Names = dict[nn.Module, list[str]]
"""Every module with all its names."""

# Classes, by module and name, that use the weights of linear layers inside them without calling those layers.
_WEIGHT_READERS = (
    ("torch.nn.modules.activation", "MultiheadAttention"),
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"),
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.swin_transformer_v2", "WindowAttention"),
)


def all_names(model: nn.Module) -> Names:
    """List every module of ``model`` with all its names, in order. A module that is used at two paths has two names.

    Raises:
        ValueError: a lazy module is not initialised yet.
    """
    names: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"{shown(name)} is not initialised yet: run a batch through the model first")
    return names


def shown(name: str) -> str:
    """The name of a module for an error message."""
    return name or "(the model itself)"


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)


class Selection(NamedTuple):
    """The layers that the user wants converted, by the arguments of :func:`wsn_fast.convert`. The methods take all
    names of one module."""

    targets: tuple[str, ...] | None
    excluded: tuple[str, ...] | None
    filter_fn: FilterFn | None

    def targets_by_name(self, names: Sequence[str]) -> bool:
        """Whether a pattern of ``target_modules`` matches."""
        return any(_matches(pattern, names) for pattern in self.targets or ())

    def excludes(self, names: Sequence[str]) -> bool:
        """Whether a pattern of ``exclude_modules`` matches."""
        return any(_matches(pattern, names) for pattern in self.excluded or ())

    def wants(self, module: nn.Module, names: Sequence[str]) -> bool:
        """Whether all three arguments allow the conversion of ``module``."""
        if self.excludes(names) or (self.targets is not None and not self.targets_by_name(names)):
            return False
        return self.filter_fn is None or bool(self.filter_fn(module, names[0]))

    def check_used(self, known: Names) -> None:
        """Raise ``ValueError`` for a pattern that matches none of the modules ``known``: it is a typo, probably."""
        for argument, patterns in (("target_modules", self.targets), ("exclude_modules", self.excluded)):
            for pattern in patterns or ():
                if not any(_matches(pattern, names) for names in known.values()):
                    listed = [names[0] for names in known.values()]
                    raise ValueError(f"{argument}={pattern!r} matches no layer to convert; the layers are: {listed}")


def subnet_class_of(module: nn.Module) -> type[SubnetLayer] | None:
    """The class that ``module`` would be converted to, by its exact type; None if it cannot be converted."""
    # Torch gives a parametrized module a new class. Look at the old one, so that check_layer can refuse the module.
    kind = parametrize.type_before_parametrizations(module)
    return subnet_class(kind)


def choose(names: Names, selection: Selection, classifiers: Container[nn.Module]) -> list[nn.Module]:
    """The modules to convert, in the order of the model.

    Args:
        names: all modules of the model.
        selection: what the user asked for.
        classifiers: modules that heads will replace, with what is inside them; they are not converted.

    Raises:
        ValueError: a pattern matches nothing, a chosen layer sits in a module that reads its weight without calling it,
            or no layer is left to convert.
    """
    of_heads = {m for heads in names if isinstance(heads, TaskHeads) for m in heads.heads.modules()}
    layers: Names = {m: n for m, n in names.items() if subnet_class_of(m) and m not in of_heads}
    subnets: Names = {m: n for m, n in names.items() if isinstance(m, SubnetLayer)}
    readers: Names = {
        m: n for m, n in names.items() if _reads_weights(m) and m not in of_heads and m not in classifiers
    }
    inside: Names = {m: names[m] for reader in readers for m in _linears(reader)}
    derived: Names = {m: n for m, n in names.items() if _is_derived(m) and m not in of_heads and m not in inside}
    selection.check_used({**layers, **subnets, **readers, **inside, **derived})
    for reader in readers:
        _check_reader(reader, selection, names)
    candidates = {m: n for m, n in layers.items() if m not in classifiers and m not in inside}
    chosen = [m for m, own in candidates.items() if selection.wants(m, own)]
    if not chosen and not subnets:
        rejected = [own[0] for own in candidates.values()]
        reason = (
            f"filter_fn, target_modules and exclude_modules rejected all of {rejected}"
            if rejected
            else ("it has no linear or convolution layer outside of heads and attention modules")
        )
        raise ValueError(f"model has no layer to convert: {reason}")
    left_out = [m for m, own in derived.items() if m not in classifiers and selection.wants(m, own)]
    _warn_left_out(left_out, names)
    return chosen


def _is_derived(module: nn.Module) -> bool:
    """Whether the class of ``module`` derives from a dense class of a layer, and is none itself."""
    dense = tuple(layer.DENSE for layer in LAYERS)
    return isinstance(module, dense) and not isinstance(module, SubnetLayer) and subnet_class_of(module) is None


def _warn_left_out(modules: Sequence[nn.Module], names: Names) -> None:
    """Say which layers stay dense although nobody asked for that."""
    if modules:
        listed = ", ".join(f"{shown(names[m][0])} ({type(m).__name__})" for m in modules)
        warnings.warn(
            f"these layers stay dense, because their classes derive from one that is converted and may compute "
            f"something else: {listed}. If that is wanted, name them in exclude_modules",
            stacklevel=4,
        )


def _reads_weights(module: nn.Module) -> bool:
    """Whether ``module`` or a base of its class is one of ``_WEIGHT_READERS``."""
    return any((c.__module__, c.__name__) in _WEIGHT_READERS for c in type(module).__mro__)


def _linears(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _check_reader(reader: nn.Module, selection: Selection, names: Names) -> None:
    """Refuse to convert inside a module that would bypass the masks, unless the user has excluded it."""
    own = names[reader]
    asked = selection.targets_by_name(own) or any(selection.wants(m, names[m]) for m in _linears(reader))
    if asked and not selection.excludes(own):
        raise ValueError(
            f"{shown(own[0])} ({type(reader).__name__}) computes with bare weights or with the weights of linear "
            "layers that it does not call, so its masks would be dropped silently. Either leave it dense "
            f"(exclude_modules={own[0]!r}) and declare its parameters in WSN(model, per_task=..., frozen=... "
            "or shared=...), or use an attention module that calls its nn.Linear layers."
        )


def densities_of(
    names: Names, chosen: Sequence[nn.Module], density: float | Mapping[str, float]
) -> dict[nn.Module, float]:
    """The density of each chosen layer.

    Raises:
        ValueError: a density is outside (0, 1], a layer has no density, or a pattern matches no layer.
    """
    if not isinstance(density, Mapping):
        return dict.fromkeys(chosen, ops.check_density(density))
    as_patterns("density", density)
    by_pattern = {p: ops.check_density(d, f"density[{p!r}]") for p, d in density.items()}
    wanted, densities = set(chosen), {}
    # A pattern may also name layers that an earlier call converted. They stay as they are.
    unused = by_pattern.keys() - {"*"}
    for module in (*chosen, *(m for m in names if isinstance(m, SubnetLayer))):
        pattern = next((p for p in by_pattern if _matches(p, names[module])), None)
        unused -= {pattern}
        if module in wanted:
            if pattern is None:
                raise ValueError(f"density has no pattern for {shown(names[module][0])} ('*' takes the rest)")
            densities[module] = by_pattern[pattern]
    if unused:
        raise ValueError(
            f"density: the patterns {sorted(unused)} have no effect: they match no layer to convert, or an earlier "
            "pattern matches all their layers"
        )
    return densities
