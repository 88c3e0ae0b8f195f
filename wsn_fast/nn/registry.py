"""All kinds of subnet layers. To add a kind, add the ``LAYERS`` of its file here. The section "Adding a layer" of
CONTRIBUTING.md has all steps."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from . import conv, conv_transpose, linear
from .gated import SubnetLayer
from .tensors import derived_class, gated_class

LAYERS: tuple[type[SubnetLayer], ...] = (
    *linear.LAYERS,
    *conv.LAYERS,
    *conv_transpose.LAYERS,
)


def product_class(module: nn.Module) -> type[SubnetLayer] | None:
    """The class that ``module`` becomes if it only multiplies its input with its weight and adds its bias; None if it
    does anything else: then its tensors are masked when it reads them."""
    kind = type(module)
    exact = next((layer for layer in LAYERS if layer.is_made_from(kind)), None)
    layer = exact or next((layer for layer in LAYERS if _is_derived(kind, layer.DENSE)), None)
    if layer is None or not {*module._parameters} <= {*layer.GATED} or not _is_plain(module):
        return None
    # mypy takes the hash of a class for that of its instances.
    return layer if exact else derived_class(layer, kind)  # type: ignore[arg-type]


def _is_derived(kind: type[nn.Module], dense: type[nn.Module]) -> bool:
    """Whether ``kind`` derives from ``dense`` and computes what that class computes."""
    methods = ("forward", "_conv_forward", "__call__", "_output_padding", "__getattr__", "__getattribute__")
    return issubclass(kind, dense) and all(getattr(kind, name, None) is getattr(dense, name, None) for name in methods)


def _is_plain(module: nn.Module) -> bool:
    """Whether the tensors are used as they are: no parametrization computes them, and no object has a forward of its
    own."""
    return (
        not parametrize.is_parametrized(module)
        and "forward" not in vars(module)
        and module._parameters.get("weight") is getattr(module, "weight", None) is not None
    )


def subnet_class(module: nn.Module, names: tuple[str, ...]) -> type[SubnetLayer]:
    """The class that ``module`` becomes when its Parameters ``names`` are gated."""
    product = product_class(module)
    own = tuple(name for name, param in module._parameters.items() if param is not None)
    if product is not None and {*names} == {*own}:
        return product
    return gated_class(type(module), names)  # type: ignore[arg-type]
