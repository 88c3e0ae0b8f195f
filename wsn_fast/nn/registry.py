"""All kinds of subnet layers. To add a kind, add the ``LAYERS`` of its file here. The section "Adding a layer" of
CONTRIBUTING.md has all steps."""

from __future__ import annotations

from torch import nn

from . import conv, conv_transpose, linear
from .gated import SubnetLayer

LAYERS: tuple[type[SubnetLayer], ...] = (
    *linear.LAYERS,
    *conv.LAYERS,
    *conv_transpose.LAYERS,
)


def subnet_class(kind: type[nn.Module]) -> type[SubnetLayer] | None:
    """The class that modules of exactly the class ``kind`` are converted to, or None if there is none."""
    return next((layer for layer in LAYERS if layer.is_made_from(kind)), None)
