"""The density of the gated tensors of a layer: one number for all of them, or a number for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .. import ops

Densities = float | dict[str, float]
"""A density in (0, 1], or one for each gated tensor by its name in the layer."""


def check_densities(density: object, gated: Collection[str] | None = None, name: str = "density") -> Densities:
    """Return ``density`` as a float, or as a dict of floats; equal numbers for all tensors as a float.

    Args:
        density: a number, or a mapping from the names of gated tensors to numbers.
        gated: the names of the gated tensors; None if they are not known.
        name: the argument, for the message.

    Raises:
        ValueError: a number is not in (0, 1], or a tensor has none, or a name is not one of a gated tensor.
    """
    if not isinstance(density, Mapping):
        return ops.check_density(density, name)
    if not density or (gated is not None and {*density} != {*gated}):
        raise ValueError(f"{name} must have a number for each of {sorted(gated or ())}, got {dict(density)!r}")
    each = {str(tensor): ops.check_density(one, f"{name}[{tensor!r}]") for tensor, one in density.items()}
    return next(iter(each.values())) if len({*each.values()}) == 1 else each


def density_of(density: Densities, name: str) -> float:
    """The density of the tensor ``name``."""
    return density if isinstance(density, float) else density[name]
