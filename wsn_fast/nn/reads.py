"""What code gets that reads a gated tensor without calling its module, as in ``F.linear(x, embedding.weight)``.

While a forward pass of the model runs, the attributes of gated tensors return the masked tensors, to whoever reads
them. At all other times they return the Parameters, which is what optimizers, initialisation and users expect. The
forward pass of a module counts from the call of :class:`~wsn_fast.WSN`, of a module with gated tensors whose class does
not mask them itself, and of every module whose code reads the attributes of gated tensors below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id as _backward_in_progress
from torch.compiler import is_compiling

_SCOPE = "_wsn_fast_scope"


class Scope:
    """Tells whether forward passes run in a model. All modules of the model have the same one, and a copy of the model
    has another one.

    Attributes:
        running: one element for each forward pass that has begun and is not over. (Threads may run several at a time,
            and a list can be changed by several threads.)
    """

    def __init__(self) -> None:
        self.running: list[None] = []
        self._kept: list[dict[str, Any]] = []

    def __reduce__(self) -> tuple[type[Scope], tuple[()]]:
        return Scope, ()

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` as a forward pass of the model."""
        self.running.append(None)
        try:
            return forward(*args, **kwargs)
        finally:
            self._leave()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The code of a ``with`` block counts as a forward pass of the model."""
        self.running.append(None)
        try:
            yield
        finally:
            self._leave()

    def are_masked(self) -> bool:
        """Whether reads get masked tensors now: in a forward pass, and where a backward pass repeats a part of one."""
        if self.running:
            return True
        # Hooks of a backward pass run without gradients, what activation checkpointing repeats runs with them.
        return not is_compiling() and torch.is_grad_enabled() and _backward_in_progress() != -1

    def keep(self, reads: dict[str, Any]) -> None:
        """Clear ``reads`` when no forward pass runs any more."""
        self._kept.append(reads)

    def _leave(self) -> None:
        self.running.pop()
        if self._kept and not self.running:
            for reads in self._kept:
                reads.clear()
            self._kept.clear()


def reading(name: str) -> property:
    """The attribute of a gated tensor: the masked tensor in a forward pass, else the Parameter."""

    def get(layer: Any) -> Tensor | None:
        parameters = layer._parameters
        if name not in parameters:
            if name in vars(layer):
                return None if vars(layer)[name] is None else vars(layer)[name]
            raise AttributeError(name)  # nn.Module looks elsewhere then
        param: Tensor | None = parameters[name]
        if param is None or not layer.gate_state.scope.are_masked():
            return param
        masked: Tensor | None = layer.read(name)
        return masked

    return property(get)


# --- classes that are made when they are needed ----------------------------------------------------------------------
class MadeClass(nn.Module):
    """The base of classes that are made when they are needed. Their instances can be pickled and copied, although no
    module has the classes.

    Attributes:
        MADE_BY: a function with its arguments, which returns the class.
    """

    MADE_BY: ClassVar[tuple[Any, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        found = super().__reduce_ex__(max(protocol, 2))
        if isinstance(found, tuple) and getattr(found[0], "__name__", "") == "__newobj__":
            return (_new, self.MADE_BY, *found[2:])
        return found


def _new(make: Callable[..., type[nn.Module]], *args: Any) -> nn.Module:
    kind = make(*args)
    made: nn.Module = kind.__new__(kind)
    return made


class Reader(MadeClass):
    """A module whose code reads gated tensors of the modules below it. Its call opens the :class:`Scope`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope: Scope = self.__dict__[_SCOPE]
        return scope(super().__call__, *args, **kwargs)


@cache
def reader_class(kind: type[nn.Module]) -> type[Reader]:
    """The :class:`Reader` that modules of the class ``kind`` become. It has the same name, because programs look up
    what a model is by the name of its class."""
    names = {"MADE_BY": (reader_class, kind), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (Reader, kind), names)


def share_scope(model: nn.Module, layers: Iterable[nn.Module]) -> Scope:
    """Give all modules of ``model`` that mask or read gated tensors the same scope, and return it.

    Args:
        model: the model.
        layers: its subnet layers.
    """
    states: dict[nn.Module, Any] = {layer: layer.gate_state for layer in layers}
    scopes = [state.scope for state in states.values()]
    scope: Scope = next((one for one in scopes if one.running), scopes[0] if scopes else Scope())
    for state in states.values():
        state.scope = scope
    for module in model.modules():
        if module not in states and not isinstance(module, Reader):
            inner = {name for child in module.modules() if child in states for name in child.GATED}  # type: ignore[union-attr]
            if inner and reads(type(module), inner):
                module.__class__ = reader_class(type(module))  # type: ignore[arg-type]  # mypy takes the hash of an instance
        if isinstance(module, Reader):
            module.__dict__[_SCOPE] = scope
    return scope


def forget_reader(module: nn.Module) -> None:
    """Turn a :class:`Reader` into what it was before, in place."""
    if isinstance(module, Reader):
        module.__dict__.pop(_SCOPE, None)
        module.__class__ = type(module).MADE_BY[1]


def reads(kind: type[nn.Module], attributes: Collection[str]) -> bool:
    """Whether the forward pass of ``kind``, in the methods that it calls too, mentions one of the ``attributes``."""
    seen: set[str] = set()
    left = ["forward"]
    while left:
        method = left.pop()
        if method in seen:
            continue
        seen.add(method)
        function = inspect.unwrap(inspect.getattr_static(kind, method, None) or _nothing)
        code = getattr(getattr(function, "__func__", getattr(function, "fget", function)), "__code__", None)
        mentioned = {*_names(code)} if isinstance(code, CodeType) else set()
        if not mentioned.isdisjoint(attributes):
            return True
        left += (name for name in mentioned if not hasattr(nn.Module, name) and hasattr(kind, name))
    return False


def _nothing() -> None:
    pass


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):  # getattr(self, "weight")
            yield constant
