"""Makes three functions of one typed function: the one that eager code calls, the operator that ``torch.compile`` sees,
and the operator's fake, which makes results of the right shape without computing them.

A registered operator costs tens of microseconds a call, which is most of a small layer's step. So eager code runs the
function itself, and only code that ``torch.compile`` traces calls the registered operator. An exported program has to
run where this library is not installed. It gets PyTorch's own operations, which the torch backend consists of.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar, cast, get_args, get_type_hints

import torch
from torch import Tensor

from ..backends import is_exporting

P = ParamSpec("P")
R = TypeVar("R")
NAMESPACE = "wsn_fast"


def operator(fake: Callable[[Any], Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the operator ``wsn_fast::<its name>``, with a schema made from its type hints.

    A parameter whose type is a NamedTuple becomes one argument of the schema for each field (``mask.tau`` becomes
    ``mask_tau``), since a schema holds tensors and plain values only. A schema has no optional results either: in the
    operator an empty tensor takes the place of a None. (Real results of such operators are never empty.)

    Args:
        fake: makes results of the right shape, dtype and device, without values. It gets the arguments as attributes of
            one object, by their names.

    Returns:
        The decorator. What it returns is called like the function.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        arguments = _Arguments(function)
        registered = _register(function, fake, arguments)

        @functools.wraps(function)
        def door(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling() or is_exporting():
                return function(*args, **kwargs)
            result = registered(*arguments.flatten(args, kwargs))
            return cast(R, result if isinstance(result, Tensor) else tuple(map(_or_none, result)))

        return door

    return decorate


class _Arguments:
    """The parameters of a function, and how its arguments become those of a schema and back."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.hints = get_type_hints(function)
        self.returns = self.hints.pop("return")
        self.fields: dict[str, tuple[str, ...]] = {n: getattr(hint, "_fields", ()) for n, hint in self.hints.items()}
        parameters = inspect.signature(function).parameters
        self.defaults = {name: parameter.default for name, parameter in parameters.items()}

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of the schema for a call of the function."""
        names = list(self.fields)
        values = [*args, *(kwargs.get(name, self.defaults[name]) for name in names[len(args) :])]
        flat: list[Any] = []
        for name, value in zip(names, values, strict=True):
            flat.extend(value if self.fields[name] else [value])
        return flat

    def restore(self, flat: tuple[Any, ...]) -> dict[str, Any]:
        """The arguments of the function by name, from those of the schema; torch leaves out trailing defaults."""
        values = iter(flat)
        return {
            name: self.hints[name](*(next(values) for _ in fields)) if fields else next(values, self.defaults[name])
            for name, fields in self.fields.items()
        }

    def signature(self) -> inspect.Signature:
        """The schema as a Python signature."""
        results = len(get_args(self.returns))
        returns = tuple[(Tensor,) * results] if results else Tensor  # type: ignore[misc]
        return inspect.Signature(list(self._flat_parameters()), return_annotation=returns)

    def _flat_parameters(self) -> Iterator[inspect.Parameter]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name, fields in self.fields.items():
            of_fields = get_type_hints(self.hints[name]) if fields else {}
            for field in fields:
                yield inspect.Parameter(f"{name}_{field}", kind, annotation=of_fields[field])
            if not fields:
                yield inspect.Parameter(name, kind, annotation=self.hints[name], default=self.defaults[name])


def _register(function: Callable[..., Any], fake: Callable[[Any], Any], arguments: _Arguments) -> Callable[..., Any]:
    """The registered operator, which takes the flattened arguments of ``function``."""

    def run(*flat: Any) -> Any:
        return _without_none(function(**arguments.restore(flat)), flat)

    def imitate(*flat: Any) -> Any:
        return _without_none(fake(SimpleNamespace(**arguments.restore(flat))), flat)

    run.__signature__ = arguments.signature()  # type: ignore[attr-defined]
    registered = torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", run, mutates_args=())
    registered.register_fake(imitate)
    return registered


def _without_none(results: Any, flat: tuple[Any, ...]) -> Any:
    if isinstance(results, Tensor):
        return results
    like = next(value for value in flat if isinstance(value, Tensor))
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _or_none(result: Tensor) -> Tensor | None:
    return None if result.numel() == 0 else result
