"""What code gets that reads a gated tensor without calling its module, as in ``F.linear(x, embedding.weight)``.

While a forward pass of the model runs, the attributes of gated tensors return the masked tensors, to whoever reads
them. At all other times they return the Parameters, which is what optimizers, initialisation and users expect.

A forward pass is the call of :class:`~wsn_fast.WSN`; of a module with gated tensors whose class does not mask them
itself; of every module that holds such a module, since anything in it may read them; and of every module whose code
reads the attributes of gated tensors below it. It is also the call of a method that the forward method of such a module
calls, as ``forward_features`` of many packages: users call these by themselves, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from operator import is_
from threading import get_ident
from types import CodeType, FunctionType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _current_graph_task_id as _backward_in_progress
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.compiler import is_compiling
from torch.fx import GraphModule

from ..backends import is_exporting
from .transforms import are_active

hooks_of_saved_tensors = _top_saved_tensors_default_hooks
"""Returns the hooks that take what is saved for backward, if called with False; None without any. Functions of their
own must not wrap it, because ``torch.compile`` cannot trace it."""
_SCOPE = "_wsn_fast_scope"
_ONLY_CALL = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that do nothing but call the modules in them."""


class Passes:
    """The forward passes that run, and the layers whose reads are dropped after the last of them: what scopes that are
    joined have in common. A copy has none."""

    def __init__(self) -> None:
        self.running: list[int] = []
        self.read: list[Any] = []

    def __reduce__(self) -> tuple[type[Passes], tuple[()]]:
        return Passes, ()


class Scope:
    """Tells whether forward passes run in a model. All modules of the model have the same one, and a copy of the model
    has another one.

    Attributes:
        running: for each forward pass that has begun and is not over the number of its thread, or 0 in compiled code.
            (Several threads may change a list.)
    """

    def __init__(self, passes: Passes | None = None) -> None:
        self._passes = Passes() if passes is None else passes
        self.running, self._read = self._passes.running, self._passes.read

    def __reduce__(self) -> tuple[type[Scope], tuple[Passes]]:
        return Scope, (self._passes,)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` as a forward pass of the model."""
        if is_exporting():  # which wants no side effects
            return forward(*args, **kwargs)
        if self.is_open():
            return forward(*args, **kwargs)
        me = 0 if is_compiling() else get_ident()
        self.running.append(me)
        try:
            return forward(*args, **kwargs)
        finally:
            self._leave(me)

    def is_open(self) -> bool:
        """Whether this thread is within a forward pass."""
        running = self.running
        return bool(running) and not is_compiling() and get_ident() in running

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The code of a ``with`` block counts as a forward pass of the model."""
        me = get_ident()
        self.running.append(me)
        try:
            yield
        finally:
            self._leave(me)

    def are_masked(self) -> bool:
        """Whether reads get masked tensors now: in a forward pass, and where a backward pass repeats a part of one."""
        if self.running or is_exporting():
            return True
        # Hooks of a backward pass run without gradients, what activation checkpointing repeats runs with them.
        return not is_compiling() and torch.is_grad_enabled() and _backward_in_progress() != -1

    def join(self, other: Scope) -> None:
        """A forward pass in one of both is one in the other: they have modules in common."""
        self._passes, self.running, self._read = other._passes, other.running, other._read

    def note(self, layer: Any) -> None:
        """A tensor of ``layer`` was read: look at its reads, and drop them, when no forward pass runs any more."""
        if not self._read or self._read[-1] is not layer:
            self._read.append(layer)

    def _leave(self, thread: int) -> None:
        self.running.remove(thread)
        if self._read and not self.running:
            layers = [*self._read]
            self._read.clear()
            try:
                for layer in layers:
                    _check_reads(layer)
            finally:
                for layer in layers:
                    _forget_reads(layer)


class Read(NamedTuple):
    """A masked tensor that an attribute returned, with its version then, and what it depends on: the tensor and its
    scores, and their versions with other plain values."""

    masked: Tensor
    version: int
    tensors: tuple[Tensor, Tensor]
    values: tuple[object, ...]


def read(layer: Any, name: str) -> Tensor | None:
    """What code gets that reads the gated tensor ``name`` of a layer in a forward pass: masked, made once in a pass."""
    state, param = layer.gate_state, layer.param(name)
    if param is None:
        return None
    if layer.row_tasks is not None:
        raise RuntimeError(
            f"{name!r} of {type(layer).__name__} is read in a pass with rows of several tasks, where no mask is "
            "right for it: use forward_tasks(..., one_pass=False)"
        )
    masked: Tensor | None
    given = state.given.get(name)
    if given is not None and given.score is None and given.is_for(param, param.dtype, False):
        masked = given.masked
        if given.read is None and not is_compiling():
            given.read = masked._version
            state.scope.note(layer)
        return masked
    if is_compiling() or are_active() or param.is_inference():
        masked = layer.masked(name, param.dtype)
        return masked
    if torch.is_grad_enabled() and hooks_of_saved_tensors(False) is not None:
        # What activation checkpointing runs again makes its gates again, so it shares none with what is around it.
        masked = layer.masked(name, param.dtype)
        return masked
    tensors = param, getattr(layer, f"{name}_score")
    values = *(tensor._version for tensor in tensors), layer._active_row, torch.is_grad_enabled()
    last = state.reads.get(name)
    if last is not None:
        masked = last.masked
        if all(map(is_, last.tensors, tensors)) and last.values == values:
            return masked
        _check_unwritten(layer, name, masked, last.version)
    masked = layer.masked(name, param.dtype)
    if masked is not None and state.scope.running and not masked.is_inference():
        state.reads[name] = Read(masked, masked._version, tensors, values)
        state.scope.note(layer)
    return masked


def _check_reads(layer: Any) -> None:
    """Check what the attributes of ``layer`` returned in the pass that is over."""
    for name, last in layer.gate_state.reads.items():
        _check_unwritten(layer, name, last.masked, last.version)
    for name, given in layer.gate_state.given.items():
        if given.read is not None:
            _check_unwritten(layer, name, given.masked, given.read)


def _forget_reads(layer: Any) -> None:
    layer.gate_state.reads.clear()
    for given in layer.gate_state.given.values():
        given.read = None


def _check_unwritten(layer: Any, name: str, masked: Tensor, version: int) -> None:
    """Raise ``RuntimeError`` if somebody has written to a masked tensor since it had this version."""
    if masked._version != version:
        layer.gate_state.drop()  # what was written to may be kept
        raise RuntimeError(
            f"something wrote to {name!r} of {type(layer).__name__} in a forward pass, where this attribute is the "
            f"masked tensor. To change the tensor itself, write to layer.param({name!r})"
        )


def reading(name: str) -> property:
    """The attribute of a gated tensor: the masked tensor in a forward pass, else the Parameter."""

    def get(layer: Any) -> Tensor | None:
        if name not in layer._parameters and name not in vars(layer):
            raise AttributeError(name)  # nn.Module looks elsewhere then
        scope = layer.gate_state.scope
        if not (scope.running or scope.are_masked()):
            tensor: Tensor | None = layer.param(name)
            return tensor
        try:
            masked = read(layer, name)
        except AttributeError as error:  # which nn.Module would answer with the Parameter itself
            raise RuntimeError(
                f"the gated tensor {name!r} of {type(layer).__name__} cannot be masked: {error}"
            ) from error
        return masked

    def put(layer: Any, tensor: Tensor | None) -> None:
        vars(layer)[name] = tensor  # pruning and copies for several devices put tensors here that are no Parameters

    def remove(layer: Any) -> None:
        if vars(layer).pop(name, None) is None:
            raise AttributeError(name)

    return property(get, put, remove)


# --- classes that are made when they are needed ----------------------------------------------------------------------
class MadeClass(nn.Module):
    """The base of classes that are made when they are needed. Their instances can be pickled and copied, although no
    module has the classes.

    Attributes:
        MADE_BY: a function with its arguments, which returns the class.
    """

    MADE_BY: ClassVar[tuple[Any, ...]]

    def __init_subclass__(cls) -> None:
        """Not that of the class from which a made class derives: it may want arguments, or list its subclasses."""

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
    """A module that reads gated tensors of the modules below it, or may do so. Its call opens the :class:`Scope`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope: Scope | None = self.__dict__.get(_SCOPE)  # None in a new object of the class, which is not converted
        return super().__call__(*args, **kwargs) if scope is None else scope(super().__call__, *args, **kwargs)


@cache
def reader_class(kind: type[nn.Module]) -> type[Reader]:
    """The :class:`Reader` that modules of the class ``kind`` become. It has the same name, because programs look up
    what a model is by the name of its class."""
    names = {"MADE_BY": (reader_class, kind), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (Reader, kind), {**scoped_methods(kind), **names})


def share_scope(model: nn.Module, layers: Iterable[nn.Module]) -> Scope:
    """Give all modules of ``model`` that mask or read gated tensors the same scope, and return it.

    Args:
        model: the model.
        layers: its subnet layers.
    """
    states: dict[nn.Module, Any] = {layer: layer.gate_state for layer in layers}
    scopes = [state.scope for state in states.values()]
    scopes += [vars(module)[_SCOPE] for module in model.modules() if _SCOPE in vars(module)]
    scope: Scope = next((one for one in scopes if one.running), scopes[0] if scopes else Scope())
    for other in scopes:
        if other is not scope:  # a module that is not in this model may have it
            other.join(scope)
    for state in states.values():
        state.scope = scope
    for module in model.modules():
        if module not in states and not isinstance(module, Reader) and _may_read(module, states):
            module.__class__ = reader_class(type(module))  # type: ignore[arg-type]  # mypy takes the hash of an instance
        if isinstance(module, Reader):
            module.__dict__[_SCOPE] = scope
    return scope


def _may_read(module: nn.Module, layers: Container[nn.Module]) -> bool:
    """Whether a call of ``module`` may read the attributes of gated tensors below it."""
    if type(module) in _ONLY_CALL or isinstance(module, torch.jit.ScriptModule | GraphModule):
        return False  # the class of a GraphModule is made for it alone, and copies of it derive from the next one
    below = [child for child in module.modules() if child in layers]
    if any(isinstance(child, MadeClass) for child in below):
        return True  # also by a function that is not found in the code of its class
    if below and "forward" in vars(module):
        return True
    return bool(below) and reads(type(module), {name for child in below for name in child.GATED})  # type: ignore[union-attr]


def forget_reader(module: nn.Module) -> None:
    """Turn a :class:`Reader` into what it was before, in place."""
    if isinstance(module, Reader):
        module.__dict__.pop(_SCOPE, None)
        module.__class__ = type(module).MADE_BY[1]


# --- what the code of a class does -----------------------------------------------------------------------------------
def scoped_methods(kind: type[nn.Module]) -> dict[str, Any]:
    """The forward method of ``kind`` and the methods that it calls, each as one that opens the :class:`Scope`."""
    lazy = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
    return {
        name: _scoped(kind, name, function)
        for name, function, _ in _in_forward(kind)
        if isinstance(function, FunctionType) and name not in ("", "reset_parameters")
        if getattr(nn.Module, name, None) is not function and not any(is_lazy(function) for is_lazy in lazy)
    }


def _scoped(kind: type[nn.Module], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, function = self.__dict__, getattr(kind, name)  # somebody may have put another one there
        scope = own["gate_state"].scope if "gate_state" in own else own.get(_SCOPE)
        if scope is None or scope.is_open():
            return function(self, *args, **kwargs)
        return scope(function, self, *args, **kwargs)

    return method


def reads(kind: type[nn.Module], attributes: Collection[str]) -> bool:
    """Whether the forward pass of ``kind``, in the methods and functions that it calls too, mentions one of the
    ``attributes``."""
    return any(not mentioned.isdisjoint(attributes) for _, _, mentioned in _in_forward(kind))


def _in_forward(kind: type[nn.Module]) -> Iterator[tuple[str, Any, set[str]]]:
    """The forward method of ``kind`` and what it calls: methods of ``kind`` by name, and functions of modules under the
    name ``""``; each with all names in its code."""
    seen: set[Any] = set()
    left: list[tuple[str, Any]] = [("forward", inspect.getattr_static(kind, "forward", None))]
    while left:
        name, found = left.pop()
        function = inspect.unwrap(found) if callable(found) else found
        function = getattr(function, "__func__", getattr(function, "fget", function))
        code = getattr(function, "__code__", None)
        if not isinstance(code, CodeType) or code in seen:
            continue
        seen.add(code)
        mentioned = {*_names(code)}
        yield name, found, mentioned
        for other in mentioned:
            if not hasattr(nn.Module, other) and hasattr(kind, other):
                left.append((other, inspect.getattr_static(kind, other)))
            elif isinstance(function.__globals__.get(other), FunctionType) and not _is_of_torch(function, other):
                left.append(("", function.__globals__[other]))


def _is_of_torch(function: Any, name: str) -> bool:
    return str(function.__globals__[name].__module__).partition(".")[0] == "torch"


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
        elif isinstance(constant, str):  # getattr(self, "weight")
            yield constant
