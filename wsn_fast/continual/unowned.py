"""How tensors without an owner are listed: with their sizes, and alike modules together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_SHOWN = 6  # prefixes in a message
_FEW = 8  # tensors that are listed by their full names


class Unowned(NamedTuple):
    """A tensor without an owner: its names, of which a tied one has several, and its shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of its elements."""
        count = 1
        for length in self.shape:
            count *= length
        return count


class _Module(NamedTuple):
    """The tensors of one module."""

    path: str
    tensors: list[tuple[str, Unowned]]

    @property
    def elements(self) -> int:
        return sum(tensor.elements for _, tensor in self.tensors)

    @property
    def described(self) -> str:
        """The tensors with their shapes, after the path of the module."""
        shown = [f"{name} {list(tensor.shape)}{_ties(tensor)}" for name, tensor in self.tensors]
        between = "" if not self.path else "." if len(shown) == 1 else ": "
        return f"{between}{', '.join(shown)}"


def lines(tensors: Iterable[Unowned]) -> list[str]:
    """One line for each tensor, or, if there are many, for each module. Modules whose names differ in numbers only
    share a line, if their tensors have the same names and shapes: ``12 x blocks.*.attn: in_proj_weight [2304, 768],
    ...``."""
    tensors = list(tensors)
    if len(tensors) <= _FEW:
        return [f"{one.names[0]} {list(one.shape)}{_ties(one)} ({one.elements:,} elements)" for one in tensors]
    modules: dict[str, _Module] = {}
    for tensor in tensors:
        path, _, attribute = tensor.names[0].rpartition(".")
        modules.setdefault(path, _Module(path, [])).tensors.append((attribute, tensor))
    alike: dict[tuple[str, str], list[_Module]] = {}
    for module in modules.values():
        alike.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", module.path), module.described), []).append(module)
    return [_line(group) for group in alike.values()]


def _line(modules: Sequence[_Module]) -> str:
    one = modules[0]
    elements = sum(module.elements for module in modules)
    if len(modules) == 1:
        return f"{one.path}{one.described} ({elements:,} elements)"
    parts = zip(*(module.path.split(".") for module in modules), strict=True)
    path = ".".join(names[0] if len(set(names)) == 1 else "*" for names in parts)
    return f"{len(modules)} x {path}{one.described} ({elements:,} elements)"


def _ties(tensor: Unowned) -> str:
    return f" (= {', '.join(tensor.names[1:])})" if tensor.names[1:] else ""


def prefixes(unowned: Iterable[Unowned], owned: Iterable[str]) -> list[str]:
    """The outermost modules that have several of the ``unowned`` tensors, and none of those with the names ``owned``:
    the names of these modules are patterns for exactly those tensors."""
    taken = {prefix for name in owned for prefix in _prefixes(name)}
    counts: dict[str, int] = {}
    for tensor in unowned:
        free = [prefix for prefix in _prefixes(tensor.names[0]) if prefix not in taken]
        if free:
            counts[free[0]] = counts.get(free[0], 0) + 1
    return [prefix for prefix, count in counts.items() if count > 1][:_SHOWN]


def _prefixes(name: str) -> list[str]:
    """The paths of the modules around a tensor, outermost first."""
    path = name.split(".")[:-1]
    return [".".join(path[: end + 1]) for end in range(len(path))]
