"""Attention whose query, key and value have densities of their own, although torch stores them in one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .. import ops

FUSED = "in_proj_weight"
SLICES = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
Density = float | tuple[float, ...]


def check_density(density: object, name: str) -> Density:
    """Return a density, or one for each of :data:`SLICES`. Raises ``ValueError`` for anything else."""
    if not isinstance(density, tuple):
        return ops.check_density(density, name)
    if len(density) != len(SLICES):
        raise ValueError(f"{name} must be a number, or one each for query, key and value, got {density!r}")
    return tuple(ops.check_density(one, f"{name}[{index}]") for index, one in enumerate(density))


def spread(module: nn.Module, densities: Mapping[str, Density]) -> dict[str, float]:
    """The densities of the tensors of ``module`` after :func:`split`.

    Raises:
        ValueError: a tensor that has no slices has several densities.
    """
    spread: dict[str, float] = {}
    for attribute, density in densities.items():
        if isinstance(density, float):
            spread[attribute] = density
        elif isinstance(module, nn.MultiheadAttention) and attribute == FUSED:
            spread.update(zip(SLICES, density, strict=True))
        else:
            raise ValueError(f"{attribute} of {type(module).__name__} needs one density, got {density}")
    return spread


def split(module: nn.Module) -> None:
    """Give an ``nn.MultiheadAttention`` a Parameter for each of query, key and value, as torch itself does where their
    widths differ. The names in its ``state_dict`` are then :data:`SLICES`."""
    assert isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    parts, trained = module.in_proj_weight.detach().chunk(len(SLICES)), module.in_proj_weight.requires_grad
    module.register_parameter(FUSED, None)
    for name, part in zip(SLICES, parts, strict=True):
        setattr(module, name, nn.Parameter(part.clone(), requires_grad=trained))
    module._qkv_same_embed_dim = False
