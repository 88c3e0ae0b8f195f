"""What the heads of a model are made from: the widths of a linear layer, or a module that is copied for each task."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_DENSE: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class HeadTemplate:
    """Makes heads.

    Attributes:
        kind: what a head is, for messages.
        width_name: what the width of a head is called ("out_features"); None if a head has no width that could be
            asked for.
        in_features: the width of the features; None if the template does not say.
        own_width: the width of a head that nobody asked another width for; None if there is none.
        untrained: the names of the parameters of a head that are not trained.
        has_buffers: whether a head has buffers.
    """

    kind: str
    width_name: str | None
    in_features: int | None
    own_width: int | None = None
    untrained: frozenset[str] = frozenset()
    has_buffers: bool = False

    def check(self, width: int | None, like: Tensor) -> None:
        """Raise ``ValueError`` if :meth:`make` could not make such a head."""

    def make(self, width: int | None, like: Tensor) -> nn.Module:
        """Make a head with new values, on the device of ``like`` and in its dtype."""
        raise NotImplementedError

    def expected(self, saved: Mapping[str, object], like: Tensor) -> nn.Module:
        """A module with the tensors of the head that was saved as ``saved`` (values by name). It may be on the meta
        device, and must not be changed."""
        raise NotImplementedError

    def width_of(self, saved: Mapping[str, object]) -> int | None:
        """The width of a saved head; None if it has none, or if that cannot be told."""
        raise NotImplementedError


class LinearTemplate(HeadTemplate):
    """Every head is an ``nn.Linear``.

    Args:
        in_features: as for ``nn.Linear``.
        bias: as for ``nn.Linear``.
    """

    kind, width_name = "nn.Linear", "out_features"

    def __init__(self, in_features: int, bias: bool) -> None:
        self.in_features: int = in_features
        self.bias = bias

    def make(self, width: int | None, like: Tensor) -> nn.Module:
        assert width is not None
        return nn.Linear(self.in_features, width, self.bias, device=like.device, dtype=like.dtype)

    def expected(self, saved: Mapping[str, object], like: Tensor) -> nn.Module:
        return self.make(self.width_of(saved) or 1, like.to("meta"))

    def width_of(self, saved: Mapping[str, object]) -> int | None:
        return _length(saved.get("weight"), 0)


class ModuleTemplate(HeadTemplate):
    """Every head is a copy of a module.

    Args:
        module: the module. It is copied here, and may be changed or dropped afterwards. Modules inside it that have
            ``reset_parameters`` get new values in each head, and the others keep those that they have here.

    Raises:
        ValueError: it has no parameter to train, is not initialised, or cannot be copied, as modules whose weight is
            computed by a hook (the older ``weight_norm``) cannot.
    """

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module).__name__
        _check(module)
        try:
            self.module = copy.deepcopy(module)
        except Exception as error:
            raise ValueError(f"template cannot be copied, which a head for each task needs: {error}") from error
        for param in self.module.parameters():
            param.grad = None
        if not any(param.requires_grad for param in self.module.parameters()):
            for param in _floating(self.module):  # a frozen model gets heads that are trained
                param.requires_grad_(True)
        self.dtype = next(_floating(self.module)).dtype
        if not any(tensor.is_meta for tensor in _tensors(self.module)):
            self.module.cpu()  # it is only read to make heads
        self.untrained = frozenset(name for name, p in self.module.named_parameters() if not p.requires_grad)
        self.has_buffers = any(True for _ in self.module.buffers())
        self.width_name = _width_name(self.module)
        self.own_width: int | None = None if self.width_name is None else getattr(self.module, self.width_name)
        width = getattr(self.module, "in_features", getattr(self.module, "in_channels", None))
        self.in_features = width if isinstance(width, int) else None

    def check(self, width: int | None, like: Tensor) -> None:
        if width not in (None, self.own_width):
            with torch.device("meta"):
                self._rebuilt(width)
        elif not like.is_meta and any(tensor.is_meta for tensor in _tensors(self.module)):
            _check_can_reset(self.module)

    def make(self, width: int | None, like: Tensor) -> nn.Module:
        is_copy = width in (None, self.own_width)
        head = copy.deepcopy(self.module) if is_copy else self._rebuilt(width)
        for name, param in head.named_parameters():
            param.requires_grad_(name not in self.untrained and (param.is_floating_point() or param.is_complex()))
        if not like.is_meta and any(tensor.is_meta for tensor in _tensors(head)):
            head.to_empty(device=like.device)
        head.to(device=like.device, dtype=None if like.dtype == self.dtype else like.dtype)
        if is_copy:  # the constructor of another one has drawn its values
            _reset(head)
        return head

    def expected(self, saved: Mapping[str, object], like: Tensor) -> nn.Module:
        width = self.width_of(saved)
        if width in (None, self.own_width):
            return self.module
        with torch.device("meta"):
            return self._rebuilt(width)

    def width_of(self, saved: Mapping[str, object]) -> int | None:
        if self.width_name is None:
            return None
        transposed = getattr(self.module, "transposed", False)
        length = _length(saved.get("weight"), 1 if transposed else 0)
        return length * self.module.groups if transposed and length else length  # type: ignore[operator,return-value]

    def _rebuilt(self, width: int | None) -> nn.Module:
        """A module of the class of the template with another width, made by the constructor of that class."""
        name, kind = self.width_name, type(self.module)
        asked = f"{name}={width!r} is not possible for a copy of {self.kind}"
        assert name is not None
        try:
            made = kind(**_arguments(self.module, name, width))
        except Exception as error:
            raise ValueError(f"{asked}: {error}") from error
        kept = ("in_features", "in_channels")  # a constructor may pass on less than it was given
        if (
            getattr(made, name, None) != width
            or any(getattr(made, n, None) != getattr(self.module, n, None) for n in kept)
            or {n: t.ndim for n, t in _named(made)} != {n: t.ndim for n, t in _named(self.module)}
        ):
            raise ValueError(f"{asked}: its constructor made {made}")
        return made.train(self.module.training)


# --- what may be a template ------------------------------------------------------------------------------------------
def _check(module: nn.Module) -> None:
    if any(is_lazy(tensor) for tensor in _tensors(module)):
        raise ValueError("template is not initialised yet: run a batch through it first")
    computed = next(_computed(module), None)
    if computed is not None:
        raise ValueError(
            f"template must be a module that can be copied, and a hook computes {computed} (pruning, or weight_norm or "
            "spectral_norm of torch.nn.utils): use torch.nn.utils.parametrizations, or make the pruning permanent"
        )
    if next(_floating(module), None) is None:
        raise ValueError(f"template must have parameters to train, and this {type(module).__name__} has none")


def _computed(module: nn.Module) -> Iterator[str]:
    """The names of the tensors that a hook computes from others before each forward pass."""
    for name, inner in module.named_modules():
        own = {n for n, _ in inner.named_parameters(recurse=False)}
        for attribute, value in vars(inner).items():
            if isinstance(value, Tensor) and own & {f"{attribute}_orig", f"{attribute}_g"}:
                yield f"{name}.{attribute}".lstrip(".")


def _width_name(module: nn.Module) -> str | None:
    """What the width of ``module`` is called, if a module of its class with another width does the same."""
    if parametrize.is_parametrized(module) or "forward" in vars(module):
        return None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return "out_features"
    return "out_channels" if isinstance(module, _DENSE[1:]) else None


def _arguments(module: nn.Module, width_name: str, width: int | None) -> dict[str, Any]:
    """The arguments with which the class of ``module`` makes one like it, of another width.

    Raises:
        ValueError: the constructor takes no width, or something that ``module`` does not say.
    """
    dense: type[nn.Module] = next(kind for kind in _DENSE if isinstance(module, kind))
    own, of_dense = (inspect.signature(kind).parameters for kind in (type(module), dense))
    kinds = {parameter.kind for parameter in own.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    if width_name not in own and not takes_all:
        raise ValueError(f"its constructor takes no {width_name}")
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = [name for name, parameter in own.items() if parameter.kind not in several]
    names += [name for name in of_dense if takes_all and name not in names]
    weight = module.weight
    known = {"bias": module.bias is not None, "device": None, "dtype": weight.dtype, width_name: width}
    arguments = {}
    for name in names:
        if name not in known and not hasattr(module, name):
            raise ValueError(f"its constructor takes {name}, and the module has no attribute of this name")
        arguments[name] = known[name] if name in known else getattr(module, name)
    return arguments


# --- values ----------------------------------------------------------------------------------------------------------
def _resets(module: nn.Module) -> bool:
    """Whether ``reset_parameters`` of ``module`` gives it new values. That of a parametrized module would write to
    tensors that are computed."""
    return callable(getattr(module, "reset_parameters", None)) and not parametrize.is_parametrized(module)


def _reset(head: nn.Module) -> None:
    """Draw new values, for inner modules first."""
    for module in reversed(list(head.modules())):
        if _resets(module):
            module.reset_parameters()  # type: ignore[operator]


def _check_can_reset(head: nn.Module) -> None:
    """Raise ``ValueError`` if a module that has tensors cannot draw values for them."""
    for name, module in head.named_modules():
        if any(True for _ in _tensors(module, recurse=False)) and not _resets(module):
            raise ValueError(
                f"the head was built on the meta device, and {name or type(module).__name__} has no reset_parameters "
                "that could give it values: build the head on a device with memory"
            )


def _named(module: nn.Module, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from (tensor for _, tensor in _named(module, recurse))


def _floating(module: nn.Module) -> Iterator[nn.Parameter]:
    return (param for param in module.parameters() if param.is_floating_point() or param.is_complex())


def _length(tensor: object, dim: int) -> int | None:
    return tensor.shape[dim] if isinstance(tensor, Tensor) and tensor.ndim > dim else None
